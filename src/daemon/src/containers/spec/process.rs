//! Command, environment, working directory and limits of the first process.

use std::collections::HashMap;

use cri_api::v1;

use super::Error;

/// PATH of a process whose image and pod name none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The kernel takes no more than 6 MiB of arguments and environment together (execve(2)).
const TOTAL: usize = 6 << 20;
/// PATH_MAX of the kernel, terminator included.
const PATH_MAX: usize = 4096;

/// The command: Kubernetes' `command` replaces the entrypoint and with it the image's arguments; `args` replaces
/// the image's arguments only.
pub fn args(
    command: &[String],
    args: &[String],
    entrypoint: &[String],
    cmd: &[String],
) -> Result<Vec<String>, Error> {
    let (first, rest) = match (command.is_empty(), args.is_empty()) {
        (false, _) => (command, args),
        (true, false) => (entrypoint, args),
        (true, true) => (entrypoint, cmd),
    };
    let all: Vec<String> = first.iter().chain(rest).cloned().collect();
    if all.is_empty() {
        return Err(Error::NoCommand);
    }
    if all.iter().any(|arg| arg.contains('\0')) {
        return Err(Error::Nul("the command"));
    }
    if all.iter().map(|arg| arg.len() + 1).sum::<usize>() > TOTAL {
        return Err(Error::TooLong("the command"));
    }
    Ok(all)
}

/// The environment as `NAME=value`. Each name once, at the place where it came first, with the value that came last.
pub fn env(
    image: &[String],
    defaults: &[String],
    hostname: &str,
    terminal: bool,
    home: &str,
    wanted: &[v1::KeyValue],
    devices: &[String],
) -> Result<Vec<Vec<u8>>, Error> {
    let mut env = Env::default();
    env.set(PATH.as_bytes());
    if terminal {
        env.set(b"TERM=xterm");
    }
    env.set(format!("HOSTNAME={hostname}").as_bytes());
    // Entries of an image without `=` or with an empty name mean nothing to a process and are passed over.
    for entry in defaults.iter().chain(image) {
        if entry.find('=').is_some_and(|at| at > 0) && !entry.contains('\0') {
            env.set(entry.as_bytes());
        }
    }
    for pair in wanted {
        if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
            return Err(Error::EnvName(pair.key.escape_debug().take(80).collect()));
        }
        if pair.value.contains(&0) {
            return Err(Error::Nul("a value of the environment"));
        }
        env.set(&[pair.key.as_bytes(), b"=", &pair.value].concat());
    }
    for entry in devices {
        env.set(entry.as_bytes());
    }
    // What login programs set; programs that find no HOME write into the root directory.
    if !env.places.contains_key(b"HOME".as_slice()) {
        env.set(format!("HOME={home}").as_bytes());
    }
    if env.entries.iter().map(|entry| entry.len() + 1).sum::<usize>() > TOTAL {
        return Err(Error::TooLong("the environment"));
    }
    Ok(env.entries)
}

#[derive(Default)]
struct Env {
    entries: Vec<Vec<u8>>,
    places: HashMap<Vec<u8>, usize>,
}

impl Env {
    fn set(&mut self, entry: &[u8]) {
        let name = entry.split(|b| *b == b'=').next().unwrap_or_default();
        match self.places.get(name).and_then(|at| self.entries.get_mut(*at)) {
            Some(old) => *old = entry.to_vec(),
            None => {
                self.places.insert(name.to_vec(), self.entries.len());
                self.entries.push(entry.to_vec());
            }
        }
    }
}

/// The working directory.
pub fn cwd(wanted: &str, image: &str) -> Result<String, Error> {
    let cwd = if wanted.is_empty() { image } else { wanted };
    if cwd.contains('\0') {
        return Err(Error::Nul("the working directory"));
    }
    if cwd.len() >= PATH_MAX {
        return Err(Error::TooLong("the working directory"));
    }
    match cwd {
        "" => Ok("/".to_owned()),
        _ if cwd.starts_with('/') => Ok(cwd.to_owned()),
        // Old builders wrote WORKDIR as it stood in the Dockerfile, meaning below the root.
        _ if wanted.is_empty() => Ok(format!("/{cwd}")),
        _ => Err(Error::RelativeCwd(cwd.escape_debug().take(200).collect())),
    }
}

/// One limit of `default_ulimits`, `nofile=1024:4096`: name, soft, hard.
pub fn ulimit(text: &str) -> Option<(String, u64, u64)> {
    const NAMES: [&str; 16] = [
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    let (name, limits) = text.split_once('=')?;
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("rlimit_").unwrap_or(&name);
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(u64::MAX),
        _ => text.parse().ok(),
    };
    let (soft, hard) = (number(soft)?, number(hard)?);
    (NAMES.contains(&name) && soft <= hard)
        .then(|| (format!("RLIMIT_{}", name.to_ascii_uppercase()), soft, hard))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| (*item).to_owned()).collect()
    }

    #[test]
    fn command_and_args_replace_what_kubernetes_says_they_replace() {
        type Words<'a> = &'a [&'a str];
        let table: [[Words<'_>; 5]; 7] = [
            [&[], &[], &["ep"], &["cmd"], &["ep", "cmd"]],
            [&[], &["arg"], &["ep"], &["cmd"], &["ep", "arg"]],
            [&["command"], &[], &["ep"], &["cmd"], &["command"]],
            [&["command"], &["arg"], &["ep"], &["cmd"], &["command", "arg"]],
            [&[], &[], &[], &["cmd"], &["cmd"]],
            [&[], &["arg"], &[], &["cmd"], &["arg"]],
            [&[], &[], &["ep"], &[], &["ep"]],
        ];
        for [command, arg, entrypoint, cmd, expected] in table {
            let got = args(&list(command), &list(arg), &list(entrypoint), &list(cmd)).unwrap();
            assert_eq!(got, expected);
        }
        assert!(matches!(args(&[], &[], &[], &[]), Err(Error::NoCommand)));
        assert!(args(&list(&["a\0b"]), &[], &[], &[]).is_err());
        assert!(args(&["x".repeat(TOTAL)], &[], &[], &[]).is_err());
    }

    fn pair(key: &str, value: &[u8]) -> v1::KeyValue {
        v1::KeyValue { key: key.to_owned(), value: value.to_vec() }
    }

    fn text(image: &[&str], terminal: bool, wanted: &[v1::KeyValue]) -> Vec<String> {
        let env = env(&list(image), &[], "pod-1", terminal, "/root", wanted, &[]).unwrap();
        env.into_iter().map(|entry| String::from_utf8_lossy(&entry).into_owned()).collect()
    }

    #[test]
    fn a_name_keeps_its_place_and_takes_the_last_value() {
        assert_eq!(text(&[], false, &[]), [PATH, "HOSTNAME=pod-1", "HOME=/root"]);
        assert_eq!(
            text(&["PATH=/bin", "A=1", "B=2", "junk", "=x"], true, &[pair("A", b"3"), pair("C", b"=")]),
            ["PATH=/bin", "TERM=xterm", "HOSTNAME=pod-1", "A=3", "B=2", "C==", "HOME=/root"]
        );
        assert_eq!(
            text(&["HOME=/img", "TERM=vt100"], true, &[pair("HOSTNAME", b"h"), pair("HOME", b"/h")]),
            [PATH, "TERM=vt100", "HOSTNAME=h", "HOME=/h"]
        );
    }

    #[test]
    fn values_are_bytes_and_names_are_checked() {
        let got = env(&[], &[], "h", false, "/", &[pair("K", &[0xff, 0xfe])], &[]).unwrap();
        assert!(got.contains(&b"K=\xff\xfe".to_vec()));
        for bad in [pair("", b"x"), pair("A=B", b"x"), pair("A\0", b"x"), pair("A", b"x\0y")] {
            assert!(env(&[], &[], "h", false, "/", &[bad], &[]).is_err());
        }
        let big = pair("BIG", &vec![b'x'; 10 << 20]);
        assert!(matches!(env(&[], &[], "h", false, "/", &[big], &[]), Err(Error::TooLong(_))));
    }

    #[test]
    fn the_working_directory_is_the_clients_the_images_or_the_root() {
        for (wanted, image, expected) in
            [("/a", "/b", "/a"), ("", "/b", "/b"), ("", "", "/"), ("", "app", "/app")]
        {
            assert_eq!(cwd(wanted, image).unwrap(), expected);
        }
        assert!(cwd("rel", "").is_err());
        assert!(cwd("/a\0", "").is_err());
        assert!(cwd(&format!("/{}", "x".repeat(1 << 20)), "").is_err());
    }

    #[test]
    fn limits_are_read_as_operators_write_them() {
        for (text, expected) in [
            ("nofile=1024:4096", Some(("RLIMIT_NOFILE", 1024, 4096))),
            ("NOFILE=1024", Some(("RLIMIT_NOFILE", 1024, 1024))),
            ("RLIMIT_CORE=0:-1", Some(("RLIMIT_CORE", 0, u64::MAX))),
            ("memlock=unlimited", Some(("RLIMIT_MEMLOCK", u64::MAX, u64::MAX))),
            ("nofile=2:1", None),
            ("files=1", None),
            ("nofile", None),
            ("nofile=", None),
        ] {
            let got = ulimit(text);
            assert_eq!(
                got.as_ref().map(|(name, soft, hard)| (name.as_str(), *soft, *hard)),
                expected,
                "{text}"
            );
        }
    }
}
