//! Which servers answer for a registry: containerd's `certs.d/<host>/hosts.toml`, read at each pull, with its rules
//! for directory names, defaults and schemes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use crate::error::{Error, Result};

/// A file of this kind is never longer.
const MAX_FILE: u64 = 1 << 20;

/// One server to ask.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Endpoint {
    pub(crate) https: bool,
    /// TLS is tried first although the scheme is http: the port does not tell, and TLS was configured.
    pub(crate) ambiguous: bool,
    /// Host and perhaps port.
    pub(crate) host: String,
    /// What comes before the repository: `/v2`, unless the path is overridden.
    pub(crate) path: String,
    pub(crate) pull: bool,
    pub(crate) resolve: bool,
    pub(crate) ca: Vec<PathBuf>,
    /// Certificate and key; the key may be in the certificate's file.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(crate) skip_verify: bool,
    pub(crate) header: Vec<(HeaderName, HeaderValue)>,
    pub(crate) dial_timeout: Option<Duration>,
}

/// The servers for a registry host, in the order in which they are asked. An empty list is a registry that the
/// operator closed.
pub(crate) fn endpoints(directories: &[PathBuf], host: &str) -> Result<Vec<Endpoint>> {
    let mut configured = Vec::new();
    let directory = directories.iter().find_map(|root| directory(root, host));
    match directory {
        Some(directory) => configured = load(&directory)?,
        None => configured.push(Parsed::default()),
    }
    let mut endpoints = Vec::new();
    for mut parsed in configured {
        if parsed.host.is_empty() {
            complete(&mut parsed, host);
        }
        let explicit_tls = !parsed.ca.is_empty() || !parsed.client.is_empty() || parsed.skip_verify.is_some();
        endpoints.push(Endpoint {
            https: parsed.https,
            ambiguous: !parsed.https && explicit_tls && port(&parsed.host) != Some("80"),
            host: parsed.host,
            path: parsed.path,
            pull: parsed.pull,
            resolve: parsed.resolve,
            ca: parsed.ca,
            client: parsed.client,
            skip_verify: parsed.skip_verify.unwrap_or(false),
            header: parsed.header,
            dial_timeout: parsed.dial_timeout,
        });
    }
    Ok(endpoints)
}

/// Whether a host (with or without port) is this machine by its very name.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[derive(Default)]
pub(crate) struct Parsed {
    https: bool,
    host: String,
    path: String,
    pull: bool,
    resolve: bool,
    ca: Vec<PathBuf>,
    client: Vec<(PathBuf, Option<PathBuf>)>,
    skip_verify: Option<bool>,
    header: Vec<(HeaderName, HeaderValue)>,
    dial_timeout: Option<Duration>,
}

#[derive(Deserialize, Default)]
struct File {
    #[serde(default)]
    server: String,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    root: Fields,
}

#[derive(Deserialize, Default)]
struct Fields {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<OneOrMany>,
    client: Option<Clients>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: toml::Table,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    dial_timeout: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Clients {
    One(String),
    Many(Vec<Client>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    Combined(String),
    Pair([String; 2]),
}

/// The directory for a host below one root: `host_port_`, `host:port`, then `_default`. An existing directory
/// counts, whatever is in it.
fn directory(root: &Path, host: &str) -> Option<PathBuf> {
    let mangled = match host.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() => Some(format!("{name}_{port}_")),
        _ => None,
    };
    // The host comes from a parsed reference and holds no slash, but may not be a name for a directory either.
    let names = mangled.as_deref().into_iter().chain([host, "_default"]);
    names.filter(|name| !matches!(*name, "." | "..")).map(|name| root.join(name)).find(|path| path.exists())
}

fn load(directory: &Path) -> Result<Vec<Parsed>> {
    let path = directory.join("hosts.toml");
    let bad = |why: String| Error::Config { path: path.clone(), why };
    let text = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > MAX_FILE => return Err(bad("longer than 1 MiB".into())),
        Ok(_) => std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(bad(error.to_string())),
    };
    if text.is_empty() {
        return Ok(vec![certificates(directory)?]);
    }
    match parse(&text, directory) {
        Ok(hosts) => Ok(hosts),
        // As containerd does, so that a node behaves the same under both: say it, and go on with the certificates.
        Err(why) => {
            tracing::error!(path = %path.display(), %why, "hosts.toml is not used");
            Ok(vec![certificates(directory)?])
        }
    }
}

pub(crate) fn parse(text: &str, base: &Path) -> Result<Vec<Parsed>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut hosts = Vec::new();
    for (server, fields) in file.host {
        let fields = fields.try_into().map_err(|error| format!("host.{server:?}: {error}"))?;
        hosts.push(one(&server, fields, base)?);
    }
    hosts.push(one(&file.server, file.root, base)?);
    Ok(hosts)
}

fn one(server: &str, fields: Fields, base: &Path) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    if !server.is_empty() {
        let url = if server.starts_with("http") { server.to_owned() } else { format!("https://{server}") };
        let (https, rest) = match url.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err(format!("server {server:?} is no http or https URL")),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) => (host, format!("/{path}")),
            None => (rest, String::new()),
        };
        if host.is_empty() || host.contains(['@', '?', '#', ' ']) || path.contains(['?', '#', ' ']) {
            return Err(format!("server {server:?} is no usable URL"));
        }
        parsed.https = https;
        parsed.host = host.to_owned();
        let has_path = !path.is_empty();
        parsed.path = if has_path { clean(&path)? } else { path };
        if !fields.override_path && !parsed.path.ends_with("/v2") {
            parsed.path.push_str("/v2");
        }
    }
    (parsed.pull, parsed.resolve) = (fields.capabilities.is_empty(), fields.capabilities.is_empty());
    for capability in &fields.capabilities {
        match capability.to_ascii_lowercase().as_str() {
            "pull" => parsed.pull = true,
            "resolve" => parsed.resolve = true,
            "push" => {}
            other => return Err(format!("unknown capability {other:?}")),
        }
    }
    parsed.ca = match fields.ca {
        None => Vec::new(),
        Some(OneOrMany::One(file)) => vec![base.join(file)],
        Some(OneOrMany::Many(files)) => files.iter().map(|file| base.join(file)).collect(),
    };
    let pair = |client| match client {
        Client::Combined(file) => (base.join(file), None),
        Client::Pair([certificate, key]) => (base.join(certificate), Some(base.join(key))),
    };
    parsed.client = match fields.client {
        None => Vec::new(),
        Some(Clients::One(file)) => vec![(base.join(file), None)],
        Some(Clients::Many(clients)) => clients.into_iter().map(pair).collect(),
    };
    parsed.skip_verify = fields.skip_verify;
    for (name, value) in fields.header {
        let values = match value {
            toml::Value::String(value) => vec![value],
            value => value.try_into::<Vec<String>>().map_err(|error| format!("header {name:?}: {error}"))?,
        };
        let header =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("header {name:?} is malformed"))?;
        for value in values {
            let mut value = HeaderValue::from_str(&value)
                .map_err(|_| format!("value of header {name:?} is malformed"))?;
            value.set_sensitive(true);
            parsed.header.push((header.clone(), value));
        }
    }
    if !fields.dial_timeout.is_empty() {
        let timeout = duration(&fields.dial_timeout);
        parsed.dial_timeout = Some(timeout.ok_or_else(|| format!("dial_timeout {:?}", fields.dial_timeout))?);
    }
    Ok(parsed)
}

/// The registry itself, at its usual place.
fn complete(parsed: &mut Parsed, host: &str) {
    let port = port(host);
    (parsed.https, parsed.host) = (true, host.to_owned());
    if host == "docker.io" {
        parsed.host = "registry-1.docker.io".into();
    } else if is_loopback(host) {
        // TLS on loopback proves nothing, and its absence is usual.
        parsed.https = matches!(port, None | Some("443"));
        if port != Some("80") {
            parsed.skip_verify = Some(true);
        }
    }
    parsed.path = "/v2".into();
    (parsed.pull, parsed.resolve) = (true, true);
}

fn port(host: &str) -> Option<&str> {
    let (_, port) = host.rsplit_once(':')?;
    port.bytes().all(|byte| byte.is_ascii_digit()).then_some(port)
}

/// As Docker lays certificates out: `*.crt` are authorities, `x.cert` and `x.key` are ours.
fn certificates(directory: &Path) -> Result<Parsed> {
    let bad = |why: std::io::Error| Error::Config { path: directory.to_owned(), why: why.to_string() };
    let mut parsed = Parsed { pull: true, resolve: true, ..Parsed::default() };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(bad)?.take(10_000) {
        files.push(entry.map_err(bad)?.path());
    }
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => parsed.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.exists() {
                    return Err(Error::Config { path: file, why: "its key is missing".into() });
                }
                parsed.client.push((file, Some(key)));
            }
            _ => {}
        }
    }
    Ok(parsed)
}

/// Takes `.`, `..` and doubled slashes out of a path.
fn clean(path: &str) -> Result<String, String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    Ok(parts.iter().map(|part| format!("/{part}")).collect())
}

/// Go's durations: `1h2m3.5s`, `300ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = 0f64;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = rest.split_at(end);
        let number: f64 = number.parse().ok()?;
        let length = unit.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(unit.len());
        let (unit, next) = unit.split_at(length);
        total += number
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = next;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(total).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(files: &[(&str, &str)], host: &str) -> Vec<Endpoint> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let mut endpoints =
            endpoints(&[PathBuf::from("/nonexistent"), root.path().to_owned()], host).unwrap();
        for endpoint in &mut endpoints {
            for file in &mut endpoint.ca {
                *file = file.strip_prefix(root.path()).unwrap_or(file).to_owned();
            }
            for (file, key) in &mut endpoint.client {
                *file = file.strip_prefix(root.path()).unwrap_or(file).to_owned();
                *key = key.take().map(|key| key.strip_prefix(root.path()).unwrap_or(&key).to_owned());
            }
        }
        endpoints
    }

    #[test]
    fn without_a_file_the_registry_itself_is_asked() {
        let hub = &with(&[], "docker.io")[0];
        assert_eq!((hub.host.as_str(), hub.https, hub.path.as_str()), ("registry-1.docker.io", true, "/v2"));
        assert!(!hub.skip_verify && !hub.ambiguous && hub.pull && hub.resolve);
        let local = &with(&[], "localhost:5000")[0];
        assert!(!local.https && local.ambiguous && local.skip_verify);
        assert!(with(&[], "127.0.0.1")[0].https);
        let plain = &with(&[], "[::1]:80")[0];
        assert!(!plain.https && !plain.ambiguous && !plain.skip_verify);
        assert!(with(&[], "r.example:5000")[0].https);
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://up.example"
            [host."https://z.example"]
            capabilities = ["pull"]
            [host."http://a.example:8080/some//path/"]
            override_path = true
            [host."m.example/prefix"]
            capabilities = ["Pull", "resolve", "push"]
            [host."https://v.example/v2/"]
        "#;
        let all = with(&[("r.example/hosts.toml", text)], "r.example");
        let seen: Vec<_> =
            all.iter().map(|e| (e.https, e.host.as_str(), e.path.as_str(), e.pull, e.resolve)).collect();
        assert_eq!(
            seen,
            [
                (true, "z.example", "/v2", true, false),
                (false, "a.example:8080", "/some/path", true, true),
                (true, "m.example", "/prefix/v2", true, true),
                (true, "v.example", "/v2", true, true),
                (true, "up.example", "/v2", true, true),
            ]
        );
    }

    #[test]
    fn every_field_is_read() {
        let text = r#"
            ca = "root.pem"
            [host."http://m.example"]
            ca = ["a.pem", "/abs/b.pem"]
            client = [["c.cert", "c.key"], "both.pem"]
            skip_verify = true
            dial_timeout = "1m1.5s"
            [host."http://m.example".header]
            x-one = "1"
            x-two = ["2", "3"]
        "#;
        let all = with(&[("r.example/hosts.toml", text)], "r.example");
        let mirror = &all[0];
        assert_eq!(mirror.ca, [Path::new("r.example/a.pem"), Path::new("/abs/b.pem")]);
        assert_eq!(
            mirror.client,
            [
                (PathBuf::from("r.example/c.cert"), Some(PathBuf::from("r.example/c.key"))),
                (PathBuf::from("r.example/both.pem"), None)
            ]
        );
        assert!(mirror.skip_verify && mirror.ambiguous && !mirror.https);
        assert_eq!(mirror.dial_timeout, Some(Duration::from_millis(61_500)));
        assert_eq!(mirror.header.len(), 3);
        assert_eq!((all[1].host.as_str(), all[1].ca.len()), ("r.example", 1));
    }

    #[test]
    fn directories_are_found_by_every_name_that_containerd_knows() {
        let file = |mirror: &str| format!("[host.\"https://{mirror}\"]\n");
        let first = |files: &[(&str, &str)], host: &str| with(files, host)[0].host.clone();
        let (a, b, c) = (file("a"), file("b"), file("c"));
        let all = [
            ("r.example_5000_/hosts.toml", a.as_str()),
            ("r.example:5000/hosts.toml", &b),
            ("_default/hosts.toml", &c),
        ];
        assert_eq!(first(&all, "r.example:5000"), "a");
        assert_eq!(first(&all[1..], "r.example:5000"), "b");
        assert_eq!(first(&all[2..], "r.example:5000"), "c");
        // The default's mirror comes first, the registry itself last.
        assert_eq!(with(&all[2..], "r.example:5000")[1].host, "r.example:5000");
    }

    #[test]
    fn certificates_without_a_file_are_taken_as_docker_lays_them_out() {
        let all = with(
            &[("r.example/ca.crt", ""), ("r.example/me.cert", ""), ("r.example/me.key", "")],
            "r.example",
        );
        assert_eq!(all[0].host, "r.example");
        assert_eq!(all[0].ca, [Path::new("r.example/ca.crt")]);
        assert_eq!(all[0].client[0].1.as_deref(), Some(Path::new("r.example/me.key")));
        let broken = with(&[("r.example/hosts.toml", "server = ["), ("r.example/ca.crt", "")], "r.example");
        assert_eq!((broken.len(), broken[0].ca.len()), (1, 1));
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        assert_eq!(duration("300ms"), Some(Duration::from_millis(300)));
        assert_eq!(duration("1h1m"), Some(Duration::from_secs(3660)));
        for bad in ["", "5", "s", "1x", "-1s", "..s", "1e9999h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "(server|host|ca|client|header|=|\\.|\"|\\[|\\]|\n|x|://|http|capabilities|dial_timeout|1s){0,60}") {
            let _ = parse(&text, Path::new("/x"));
            let _ = duration(&text);
        }
    }
}
