//! Image references: what people write, what registries want, what the kubelet compares.
//!
//! The grammar is that of the distribution project; the short names are Docker's: no host means the default
//! registry, one path component on docker.io means `library/`, no tag means `latest`.

use std::fmt;

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The longest repository name that the distribution specification knows, host included.
const LONGEST_NAME: usize = 255;

/// A normalised reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses and normalises. `default_registry` completes names without a host; `None` refuses them.
    pub fn parse(text: &str, default_registry: Option<&str>) -> Result<Reference> {
        let fail = |why| Error::InvalidReference { reference: text.chars().take(300).collect(), why };
        if text.is_empty() {
            return Err(fail("it is empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest.parse().map_err(|_| fail("its digest is malformed"))?))
            }
            None => (text, None),
        };
        // A colon after the last slash starts the tag; one before it belongs to a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(fail("its tag is malformed"));
        }
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if is_host_like(host) => (host, path.to_owned()),
            _ => (default_registry.ok_or_else(|| fail("it names no registry"))?, name.to_owned()),
        };
        let host = if host == "index.docker.io" { "docker.io" } else { host };
        let path = if host == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path };
        if !is_host(host) {
            return Err(fail("its registry host is malformed"));
        }
        if !path.split('/').all(is_component) {
            return Err(fail("its repository is malformed (lower case letters, digits and separators only)"));
        }
        if host.len() + 1 + path.len() > LONGEST_NAME {
            return Err(fail("its name is longer than 255 characters"));
        }
        if digest.is_none() && tag.is_none() && is_bare_id(text) {
            return Err(fail("64 hex digits are an image id, not a name"));
        }
        // A digest decides; a tag beside it is a comment.
        let tag = match (&digest, tag) {
            (Some(_), _) => None,
            (None, tag) => Some(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Reference { host: host.to_owned(), path, tag, digest })
    }

    /// The registry as the reference names it: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository on that registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag; absent when there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest that the reference insists on.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Host and repository: what tags and digests are appended to.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// `name@digest` for the given digest.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.host, self.path)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

/// The first component is a host when it could not be a repository: a dot, a port, an upper-case letter, or localhost.
fn is_host_like(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':', '['])
        || component.bytes().any(|byte| byte.is_ascii_uppercase())
}

/// A DNS name or an address (IPv6 in brackets), perhaps with a port.
fn is_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let Some((address, rest)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return false,
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.is_none_or(|name| name.len() <= 253 && name.split('.').all(label))
        && port
            .is_none_or(|port| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

/// Lower-case letters and digits, held together by one dot, one or two underscores, or dashes.
fn is_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
    ends && bytes.split(alphanumeric).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-')
    })
}

/// A word character, then up to 127 of word, dot and dash.
fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

fn is_bare_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Reference> {
        Reference::parse(text, Some("docker.io"))
    }

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".into()),
            ("foo/bar", "docker.io/foo/bar:latest".into()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".into()),
            ("localhost/x", "localhost/x:latest".into()),
            ("localhost:5000/x:y", "localhost:5000/x:y".into()),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9".into()),
            ("[::1]:5000/a/b", "[::1]:5000/a/b:latest".into()),
            (&format!("busybox@{digest}"), format!("docker.io/library/busybox@{digest}")),
            (&format!("busybox:1.36@{digest}"), format!("docker.io/library/busybox@{digest}")),
            ("Host/x", "Host/x:latest".into()),
            ("a__b/c.d-e--f", "docker.io/a__b/c.d-e--f:latest".into()),
        ] {
            assert_eq!(parse(short).unwrap().to_string(), full);
        }
    }

    #[test]
    fn malformed_names_are_refused() {
        let id = "a".repeat(64);
        let long = format!("example.com/{}", "a/".repeat(130));
        for bad in [
            "",
            ":",
            "busybox:",
            "busybox:-x",
            "Busybox",
            "foo/Bar",
            "foo//bar",
            "foo/",
            "/foo",
            "a___b",
            "a..b",
            "foo@sha256:x",
            "foo@md5:1234",
            "example.com:99999/x",
            "exa mple.com/x",
            "-x.com/y",
            "[zz]/x",
            &id,
            &long,
            "a.b/../c",
            "x.y/..",
            "foo:bar:baz@",
            "example.com:/x\n",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn short_names_can_be_switched_off() {
        assert!(Reference::parse("busybox", None).is_err());
        assert!(Reference::parse("example.com/busybox", None).is_ok());
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_is_stable(text in "\\PC{0,80}|[a-zA-Z0-9:/@._\\[\\]-]{0,80}") {
            if let Ok(reference) = parse(&text) {
                let full = reference.to_string();
                prop_assert_eq!(parse(&full).unwrap(), reference);
            }
        }
    }
}
