//! Reads network configurations as CNI lays them down: a directory of `.conflist`, `.conf` and `.json` files, the
//! first by name counts. Running the plugins they name is the business of `plugin`.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::Error;

/// A configuration file is some kilobytes; more than this is a mistake.
const MAX_FILE: u64 = 1 << 20;
/// So many files in one directory are looked at.
const MAX_FILES: usize = 1000;
/// So many plugins can be in one network.
const MAX_PLUGINS: usize = 64;
/// The versions of the specification that we speak, oldest first.
const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One network: plugins, called one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NetworkList {
    pub(crate) name: String,
    pub(crate) version: Version,
    pub(crate) disable_check: bool,
    pub(crate) disable_gc: bool,
    pub(crate) plugins: Vec<Plugin>,
}

/// One plugin's configuration, as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Plugin(Map<String, Value>);

impl Plugin {
    /// The name of its program.
    pub(crate) fn kind(&self) -> &str {
        self.0.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether it wants to be told about such a thing.
    pub(crate) fn capable_of(&self, capability: &str) -> bool {
        self.0.get("capabilities").and_then(|c| c.get(capability)).and_then(Value::as_bool).unwrap_or(false)
    }

    /// What it reads from its standard input.
    pub(crate) fn input(&self, network: &NetworkList, more: Map<String, Value>) -> Vec<u8> {
        let mut all = self.0.clone();
        all.insert("name".into(), json!(network.name));
        all.insert("cniVersion".into(), json!(network.version.as_str()));
        all.extend(more);
        Value::Object(all).to_string().into_bytes()
    }
}

/// A version of the CNI specification that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Version(usize);

impl Version {
    pub(crate) const V0_3_0: Version = Version(2);
    pub(crate) const V0_4_0: Version = Version(4);
    pub(crate) const V1_0_0: Version = Version(5);
    pub(crate) const V1_1_0: Version = Version(6);

    pub(crate) fn parse(text: &str) -> Option<Version> {
        VERSIONS.iter().position(|known| *known == text).map(Version)
    }

    pub(crate) fn as_str(self) -> &'static str {
        VERSIONS.get(self.0).copied().unwrap_or("1.1.0")
    }
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Version, String> {
        Version::parse(&text).ok_or_else(|| format!("unknown CNI version {text:?}"))
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.as_str().to_owned()
    }
}

/// The networks that count in a directory: the named one, or the first `max` by file name (0: all).
///
/// A bad file that comes before the end of the search is an error and not skipped: what comes after it is rarely
/// what the operator wants his pods to be on.
pub(crate) fn load(dir: &Path, max: usize, named: Option<&str>) -> Result<Vec<NetworkList>, Error> {
    let none = || Error::NotReady(format!("no network configuration in {}", dir.display()));
    let bad = |reason| Error::Conf { path: dir.to_owned(), reason };
    let files = match files(dir, &["conflist", "conf", "json"]) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(none()),
        Err(e) => return Err(bad(e.to_string())),
        Ok(files) => files,
    };
    // Who can lay down a file here decides what we run as root.
    fs::metadata(dir).map_err(|e| e.to_string()).and_then(|stat| trusted(&stat)).map_err(bad)?;
    let mut networks: Vec<NetworkList> = Vec::new();
    let mut refused = None;
    for path in files {
        match (read(&path), named) {
            (Ok(network), Some(name)) if network.name == name => return Ok(vec![network]),
            (Ok(_), Some(_)) => {}
            (Err(error), Some(_)) => refused = refused.or(Some(error)),
            (Ok(network), None) => {
                if networks.iter().any(|n| n.name == network.name) {
                    return Err(Error::Conf {
                        path,
                        reason: format!("network {} is there already", network.name),
                    });
                }
                networks.push(network);
                if networks.len() == max {
                    break;
                }
            }
            (Err(error), None) => return Err(error),
        }
    }
    match named {
        Some(name) => {
            Err(refused.unwrap_or_else(|| Error::NotReady(format!("no network {name} in {}", dir.display()))))
        }
        None if networks.is_empty() => Err(none()),
        None => Ok(networks),
    }
}

/// What would differ if a configuration had changed: names, inodes, sizes and times of all files that matter.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Signature(Vec<(PathBuf, [i64; 6])>);

impl Signature {
    pub(crate) fn of(dir: &Path) -> Signature {
        let mut seen = Vec::new();
        Signature::collect(dir, 1, &mut seen);
        seen.sort();
        Signature(seen)
    }

    fn collect(dir: &Path, deeper: u8, seen: &mut Vec<(PathBuf, [i64; 6])>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten().take(MAX_FILES) {
            let path = entry.path();
            let Ok(stat) = fs::metadata(&path) else { continue };
            let facts = [
                stat.mtime(),
                stat.mtime_nsec(),
                stat.ctime(),
                stat.ctime_nsec(),
                stat.size() as i64,
                stat.ino() as i64,
            ];
            if stat.is_dir() && deeper > 0 {
                Signature::collect(&path, deeper - 1, seen);
            }
            seen.push((path, facts));
        }
    }
}

/// A network name becomes a file name and an argument: the specification's pattern keeps it harmless.
pub(crate) fn is_name(text: &str) -> bool {
    text.len() <= 200
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Only root, or the one we run as, may own what we execute or obey, and nobody else may write it.
pub(crate) fn trusted(stat: &fs::Metadata) -> Result<(), String> {
    if stat.uid() != 0 && stat.uid() != rustix::process::geteuid().as_raw() {
        return Err(format!("owned by user {}, not by root", stat.uid()));
    }
    if stat.mode() & 0o022 != 0 {
        return Err(format!("writable by others than its owner (mode {:o})", stat.mode() & 0o7777));
    }
    Ok(())
}

fn files(dir: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?
        .take(MAX_FILES)
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<NetworkList, Error> {
    let bad = |reason: String| Error::Conf { path: path.to_owned(), reason };
    let value = read_json(path)?;
    let mut network = parse(value).map_err(&bad)?;
    // CNI 1.1 lets every network have a directory of its own, in which others drop further plugins.
    if let Some((dir, true)) = path.parent().map(|parent| (parent.join(&network.list.name), network.inlined))
    {
        for extra in files(&dir, &["conf"]).unwrap_or_default() {
            let plugin = plugin(read_json(&extra)?).map_err(|reason| Error::Conf { path: extra, reason })?;
            network.list.plugins.push(plugin);
        }
    }
    match network.list.plugins.len() {
        0 => Err(bad("no plugins".into())),
        n if n > MAX_PLUGINS => Err(bad(format!("{n} plugins, more than {MAX_PLUGINS}"))),
        _ => Ok(network.list),
    }
}

fn read_json(path: &Path) -> Result<Value, Error> {
    let bad = |reason: String| Error::Conf { path: path.to_owned(), reason };
    let io = |e: io::Error| Error::Conf { path: path.to_owned(), reason: e.to_string() };
    let file = fs::File::open(path).map_err(io)?;
    trusted(&file.metadata().map_err(io)?).map_err(&bad)?;
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_FILE {
        return Err(bad(format!("larger than {MAX_FILE} bytes")));
    }
    serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))
}

pub(crate) struct Parsed {
    pub(crate) list: NetworkList,
    /// Whether plugins from the network's own directory are wanted as well.
    inlined: bool,
}

pub(crate) fn parse(value: Value) -> Result<Parsed, String> {
    let Value::Object(mut all) = value else { return Err("not a JSON object".into()) };
    let name = match all.get("name") {
        Some(Value::String(name)) if is_name(name) => name.clone(),
        other => return Err(format!("bad or missing name {}", other.unwrap_or(&Value::Null))),
    };
    let version = version(&all)?;
    let flag = |all: &Map<String, Value>, key: &str| match all.get(key) {
        None => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        // Older lists write it as a string; the reference implementation takes that.
        Some(Value::String(s)) if s.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} is {other}, not true or false")),
    };
    let (disable_check, disable_gc) = (flag(&all, "disableCheck")?, flag(&all, "disableGC")?);
    let inlined = !flag(&all, "loadOnlyInlinedPlugins")?;
    let is_list = all.contains_key("plugins") || !all.contains_key("type");
    let plugins = match all.remove("plugins") {
        Some(Value::Array(plugins)) => plugins.into_iter().map(plugin).collect::<Result<_, _>>()?,
        None if is_list => Vec::new(),
        None => vec![plugin(Value::Object(all))?],
        Some(_) => return Err("plugins is not a list".into()),
    };
    Ok(Parsed {
        list: NetworkList { name, version, disable_check, disable_gc, plugins },
        inlined: inlined && is_list,
    })
}

/// The version to speak: the highest of `cniVersions` (CNI 1.1) that we know, else `cniVersion`.
fn version(all: &Map<String, Value>) -> Result<Version, String> {
    let offered = all.get("cniVersions").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let best = offered.iter().filter_map(|v| Version::parse(v.as_str()?)).max();
    let single = match all.get("cniVersion") {
        None => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(Value::String(text)) => match Version::parse(text) {
            Some(version) => Some(version),
            None if best.is_some() => None,
            None => return Err(format!("unknown CNI version {text:?}")),
        },
        Some(other) => return Err(format!("cniVersion is {other}, not a string")),
    };
    // A file without a version is from the first days, says the specification.
    Ok(best.max(single).unwrap_or(Version(0)))
}

fn plugin(value: Value) -> Result<Plugin, String> {
    let Value::Object(all) = value else { return Err("a plugin is not a JSON object".into()) };
    match all.get("type").and_then(Value::as_str) {
        // The type is looked up in the plugin directories: it must not lead out of them (CVE-2021-20206).
        Some(kind) if !kind.is_empty() && !kind.contains('/') && kind != "." && kind != ".." => {
            Ok(Plugin(all))
        }
        Some(kind) => Err(format!("bad plugin type {kind:?}")),
        None => Err("a plugin without type".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn names(dir: &tempfile::TempDir, max: usize) -> Vec<String> {
        load(dir.path(), max, None).unwrap().into_iter().map(|n| n.name).collect()
    }

    const A: &str = r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;
    const B: &str = r#"{"cniVersion":"0.4.0","name":"b","type":"ptp"}"#;

    #[test]
    fn the_first_file_by_name_counts() {
        let dir =
            dir(&[("20-a.conflist", A), ("10-b.conf", B), ("05-c.txt", "not ours"), ("00-dir.conf/x", "")]);
        assert_eq!(names(&dir, 1), ["b"]);
        assert_eq!(names(&dir, 2), ["b", "a"]);
        assert_eq!(names(&dir, 0), ["b", "a"]);
    }

    #[test]
    fn a_named_network_is_found_behind_bad_files() {
        let dir = dir(&[("10-bad.conf", "{"), ("20-a.conflist", A), ("30-b.conf", B)]);
        assert_eq!(load(dir.path(), 1, Some("b")).unwrap()[0].name, "b");
        assert!(matches!(load(dir.path(), 1, Some("z")), Err(Error::Conf { .. })));
    }

    #[test]
    fn a_bad_file_in_front_is_an_error_and_one_behind_is_not_read() {
        let front = dir(&[("10-bad.conf", "{"), ("20-a.conflist", A)]);
        assert!(
            matches!(load(front.path(), 1, None), Err(Error::Conf { path, .. }) if path.ends_with("10-bad.conf"))
        );
        let behind = dir(&[("10-a.conflist", A), ("20-bad.conf", "{")]);
        assert_eq!(names(&behind, 1), ["a"]);
    }

    #[test]
    fn an_empty_or_missing_directory_is_not_ready() {
        let dir = dir(&[]);
        assert!(matches!(load(dir.path(), 1, None), Err(Error::NotReady(_))));
        assert!(matches!(load(&dir.path().join("none"), 1, None), Err(Error::NotReady(_))));
    }

    #[test]
    fn versions_are_chosen_as_the_specification_says() {
        let speak = |text: &str| version(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap());
        for (text, version) in [
            ("{}", "0.1.0"),
            (r#"{"cniVersion":""}"#, "0.1.0"),
            (r#"{"cniVersion":"0.3.1"}"#, "0.3.1"),
            (r#"{"cniVersions":["0.4.0","1.1.0","7.0.0"]}"#, "1.1.0"),
            (r#"{"cniVersion":"1.0.0","cniVersions":["0.4.0"]}"#, "1.0.0"),
            (r#"{"cniVersion":"9.0.0","cniVersions":["1.0.0"]}"#, "1.0.0"),
        ] {
            assert_eq!(speak(text).unwrap().as_str(), version, "{text}");
        }
        for text in [r#"{"cniVersion":"2.0.0"}"#, r#"{"cniVersion":1}"#, r#"{"cniVersion":"../x"}"#] {
            assert!(speak(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bad_configurations_are_refused() {
        for text in [
            "[]",
            r#"{"plugins":[{"type":"x"}]}"#,
            r#"{"name":"../etc","plugins":[{"type":"x"}]}"#,
            r#"{"name":"-n","plugins":[{"type":"x"}]}"#,
            r#"{"name":"n","plugins":{}}"#,
            r#"{"name":"n","plugins":[{}]}"#,
            r#"{"name":"n","plugins":[3]}"#,
            r#"{"name":"n","plugins":[{"type":"../sh"}]}"#,
            r#"{"name":"n","plugins":[{"type":".."}]}"#,
            r#"{"name":"n","plugins":[{"type":""}]}"#,
            r#"{"name":"n","disableCheck":7,"plugins":[{"type":"x"}]}"#,
        ] {
            assert!(parse(serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
        let dir = dir(&[("10.conflist", r#"{"name":"n","plugins":[]}"#)]);
        assert!(matches!(load(dir.path(), 1, None), Err(Error::Conf { .. })));
    }

    #[test]
    fn a_network_takes_further_plugins_from_its_own_directory() {
        let open = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"one"}]}"#;
        let closed =
            r#"{"cniVersion":"1.1.0","name":"n","loadOnlyInlinedPlugins":true,"plugins":[{"type":"one"}]}"#;
        for (text, kinds) in [(open, vec!["one", "two", "three"]), (closed, vec!["one"])] {
            let dir = dir(&[
                ("10.conflist", text),
                ("n/10.conf", r#"{"type":"two"}"#),
                ("n/20.conf", r#"{"type":"three"}"#),
            ]);
            let list = load(dir.path(), 1, None).unwrap().remove(0);
            assert_eq!(list.plugins.iter().map(Plugin::kind).collect::<Vec<_>>(), kinds);
        }
    }

    #[test]
    fn a_file_or_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = dir(&[("10-a.conflist", A)]);
        fs::set_permissions(dir.path().join("10-a.conflist"), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(
            matches!(load(dir.path(), 1, None), Err(Error::Conf { reason, .. }) if reason.contains("writable"))
        );
    }

    #[test]
    fn a_plugin_reads_name_version_and_what_is_added() {
        let dir = dir(&[("10-a.conflist", A)]);
        let list = load(dir.path(), 1, None).unwrap().remove(0);
        let mut more = Map::new();
        more.insert("prevResult".into(), json!({"ips": []}));
        let input: Value = serde_json::from_slice(&list.plugins[1].input(&list, more)).unwrap();
        assert_eq!(input["name"], "a");
        assert_eq!(input["cniVersion"], "1.0.0");
        assert_eq!(input["prevResult"]["ips"], json!([]));
        assert!(list.plugins[1].capable_of("portMappings"));
        assert!(!list.plugins[0].capable_of("portMappings"));
    }

    #[test]
    fn a_signature_changes_with_content_removal_and_return() {
        let dir = dir(&[("10-a.conflist", A)]);
        let first = Signature::of(dir.path());
        assert_eq!(first, Signature::of(dir.path()));
        fs::write(dir.path().join("10-a.conflist"), B).unwrap();
        let second = Signature::of(dir.path());
        assert_ne!(first, second);
        fs::remove_file(dir.path().join("10-a.conflist")).unwrap();
        assert_eq!(Signature::of(dir.path()), Signature::default());
    }
}
