//! What can be set, what can be changed while we run, and the bounds that follow from it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::unpack::Unpacker;

/// How the library is set up. [`Config::new`] knows the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory of everything that this library keeps, `<root>/images` of the daemon.
    pub root: PathBuf,
    /// The SQLite file that holds our tables; others may have theirs in it.
    pub database: PathBuf,
    /// The program that unpacks a layer: `/proc/self/exe unpack`, say, if `main` calls [`crate::unpack_main`].
    pub unpacker: Unpacker,
    /// Directories with `<host>/hosts.toml`; the first that knows a host wins. Live.
    pub hosts_dirs: Vec<PathBuf>,
    /// Layers that are downloaded at once, over all pulls. Live.
    pub max_concurrent_downloads: usize,
    /// Layers that are unpacked at once, over all pulls. Live.
    pub max_concurrent_unpacks: usize,
    /// A registry that sends nothing for so long is left and asked again. Live.
    pub progress_timeout: Duration,
    /// A registry that sends fewer bytes a second than this, over one progress timeout, counts as stalled. Live.
    pub min_throughput: u64,
    /// Whether compressed layers are dropped once they are unpacked. Live.
    pub discard_layers: bool,
    /// Patterns (`*`, `?`, `[...]`) of references that are reported as pinned. Live.
    pub pinned: Vec<String>,
    /// What completes a name without a host; `None` refuses such names. Live.
    pub default_registry: Option<String>,
    /// Whether registries are reached through a proxy.
    pub proxy: Proxy,
    /// The node's own credentials, in the format of `~/.docker/config.json`; read at each pull. Live.
    pub auth_file: Option<PathBuf>,
}

impl Config {
    /// The defaults.
    pub fn new(root: impl Into<PathBuf>, database: impl Into<PathBuf>, unpacker: Unpacker) -> Config {
        Config {
            root: root.into(),
            database: database.into(),
            unpacker,
            hosts_dirs: Vec::new(),
            max_concurrent_downloads: 8,
            max_concurrent_unpacks: 8,
            progress_timeout: Duration::from_secs(30),
            min_throughput: 1024,
            discard_layers: true,
            pinned: Vec::new(),
            default_registry: Some("docker.io".into()),
            proxy: Proxy::Environment,
            auth_file: None,
        }
    }
}

/// Whether and how an HTTP proxy is used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Proxy {
    /// `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, as operators expect.
    #[default]
    Environment,
    /// Never.
    None,
    /// Always this one, but for loopback.
    Url(String),
}

/// The settings of the moment, with the bounds that belong to them.
pub(crate) struct Live {
    pub(crate) config: Config,
    pub(crate) downloads: Arc<Semaphore>,
    pub(crate) unpacks: Arc<Semaphore>,
}

impl Live {
    pub(crate) fn new(config: Config) -> Live {
        let places = |wanted: usize| Arc::new(Semaphore::new(wanted.clamp(1, 1000)));
        Live {
            downloads: places(config.max_concurrent_downloads),
            unpacks: places(config.max_concurrent_unpacks),
            config,
        }
    }

    /// The same with other settings. What does not change keeps its semaphore, so that a reload never doubles a bound.
    pub(crate) fn with(&self, config: Config) -> Live {
        let mut next = Live::new(Config {
            root: self.config.root.clone(),
            database: self.config.database.clone(),
            proxy: self.config.proxy.clone(),
            ..config
        });
        if next.config.max_concurrent_downloads == self.config.max_concurrent_downloads {
            next.downloads = self.downloads.clone();
        }
        if next.config.max_concurrent_unpacks == self.config.max_concurrent_unpacks {
            next.unpacks = self.unpacks.clone();
        }
        next
    }
}

/// Whether a shell pattern fits a whole name. `*` passes over slashes: patterns are written for references.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // The classic two-pointer match: on a mismatch the last star swallows one more. Linear but for repeated stars.
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match one(&pattern, p, name[n]) {
            Some(next) => (p, n) = (next, n + 1),
            None if pattern.get(p) == Some(&'*') => {
                star = Some((p, n));
                p += 1;
            }
            None => match star {
                Some((at, swallowed)) => {
                    star = Some((at, swallowed + 1));
                    (p, n) = (at + 1, swallowed + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|rest| *rest == '*')
}

/// Matches one character that is not a star; returns where the pattern goes on.
fn one(pattern: &[char], at: usize, character: char) -> Option<usize> {
    match *pattern.get(at)? {
        '*' => None,
        '?' => Some(at + 1),
        '[' => {
            let Some(length) = pattern[at + 1..].iter().skip(1).position(|c| *c == ']') else {
                return (character == '[').then_some(at + 1);
            };
            let set = &pattern[at + 1..at + 2 + length];
            let (negated, set) = match set.first() {
                Some('!' | '^') => (true, &set[1..]),
                _ => (false, set),
            };
            let mut inside = false;
            let mut i = 0;
            while i < set.len() {
                if i + 2 < set.len() && set[i + 1] == '-' {
                    inside |= (set[i]..=set[i + 2]).contains(&character);
                    i += 3;
                } else {
                    inside |= set[i] == character;
                    i += 1;
                }
            }
            (inside != negated).then_some(at + 3 + length)
        }
        literal => (literal == character).then_some(at + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_fit_as_a_shell_would_say() {
        for (pattern, name, expected) in [
            ("registry.k8s.io/pause*", "registry.k8s.io/pause:3.9", true),
            ("*/pause:*", "registry.k8s.io/pause:3.9", true),
            ("pause", "registry.k8s.io/pause:3.9", false),
            ("*", "", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a[0-9]c", "a5c", true),
            ("a[!0-9]c", "a5c", false),
            ("a[", "a[", true),
            ("**b**", "aabaa", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_panics(pattern in "[*?\\[\\]!a-c-]{0,20}", name in "[a-c\\[\\]-]{0,20}") {
            fits(&pattern, &name);
            prop_assert!(fits("*", &name));
        }
    }
}
