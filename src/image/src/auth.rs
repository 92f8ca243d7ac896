//! Credentials: what a caller hands in, what the node's auth file holds, and which registry each is for.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};

use crate::error::{Error, Result};
use crate::reference::Reference;

/// Credentials for one registry. Never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Auth {
    secret: Secret,
    /// The registry that they are for; any, when the caller did not say.
    server: Option<String>,
}

/// What a registry or its token server takes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Secret {
    /// A user and a password.
    Basic { user: String, password: String },
    /// A refresh token of the registry's token server.
    Identity(String),
    /// A bearer token, sent as it is.
    Bearer(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Auth {
    /// A user and a password.
    pub fn basic(user: impl Into<String>, password: impl Into<String>) -> Auth {
        Auth::of(Secret::Basic { user: user.into(), password: password.into() })
    }

    /// A refresh token.
    pub fn identity_token(token: impl Into<String>) -> Auth {
        Auth::of(Secret::Identity(token.into()))
    }

    /// A bearer token that is sent to the registry as it is.
    pub fn registry_token(token: impl Into<String>) -> Auth {
        Auth::of(Secret::Bearer(token.into()))
    }

    /// `base64(user:password)`, as Docker's configuration stores it.
    pub fn header(encoded: &str) -> Result<Auth, Error> {
        let encoded = encoded.trim();
        let decoded = STANDARD
            .decode(encoded)
            .or_else(|_| STANDARD_NO_PAD.decode(encoded))
            .or_else(|_| URL_SAFE.decode(encoded))
            .map_err(|_| Error::InvalidArgument("auth is not base64".into()))?;
        let text =
            String::from_utf8(decoded).map_err(|_| Error::InvalidArgument("auth is not text".into()))?;
        let Some((user, password)) = text.split_once(':') else {
            return Err(Error::InvalidArgument("auth holds no user:password".into()));
        };
        // Some tools pad with NUL.
        Ok(Auth::basic(user, password.trim_end_matches('\0')))
    }

    /// All fields of a CRI AuthConfig, most of them usually empty. `None` when there is nothing to use.
    pub fn from_parts(
        user: &str,
        password: &str,
        auth: &str,
        server_address: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Auth>, Error> {
        let found = if !user.is_empty() {
            Auth::basic(user, password)
        } else if !identity_token.is_empty() {
            Auth::identity_token(identity_token)
        } else if !auth.is_empty() {
            Auth::header(auth)?
        } else if !registry_token.is_empty() {
            Auth::registry_token(registry_token)
        } else {
            return Ok(None);
        };
        Ok(Some(found.for_server(server_address)))
    }

    /// Binds the credentials to one registry; an empty address binds nothing.
    pub fn for_server(mut self, address: &str) -> Auth {
        self.server = (!address.is_empty()).then(|| host_of(address).to_owned());
        self
    }

    fn of(secret: Secret) -> Auth {
        Auth { secret, server: None }
    }

    /// The secret, if it may go to this registry host.
    pub(crate) fn for_host(&self, host: &str) -> Option<&Secret> {
        self.server.as_deref().is_none_or(|server| same(server, host)).then_some(&self.secret)
    }
}

/// The credentials that the node's auth file has for a reference: the longest matching key wins.
pub(crate) fn from_file(path: &Path, reference: &Reference) -> Result<Option<Auth>> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        auths: BTreeMap<String, Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        auth: String,
        #[serde(default)]
        username: String,
        #[serde(default)]
        password: String,
        #[serde(default, alias = "identity_token")]
        identitytoken: String,
        #[serde(default, alias = "registry_token")]
        registrytoken: String,
    }
    let bad = |why: String| Error::Config { path: path.to_owned(), why };
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
    };
    // The parser's message would quote the file: a line and column must do.
    let file: File = serde_json::from_slice(&text).map_err(|error| {
        bad(format!("not an auth file (line {}, column {})", error.line(), error.column()))
    })?;
    let best = file
        .auths
        .iter()
        .filter(|(key, _)| {
            let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
            let (host, path) = key.split_once('/').unwrap_or((key, ""));
            let path = if matches!(path, "v1" | "v2") { "" } else { path };
            same(host, reference.host())
                && (path.is_empty()
                    || reference
                        .path()
                        .strip_prefix(path)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        })
        .max_by_key(|(key, _)| key.len());
    let Some((key, entry)) = best else { return Ok(None) };
    let Entry { auth, username, password, identitytoken, registrytoken } = entry;
    Auth::from_parts(username, password, auth, host_of(key), identitytoken, registrytoken)
        .map_err(|error| bad(format!("{key}: {error}")))
}

/// `https://host/v1/` and `host` are the same server.
fn host_of(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// docker.io has three names.
fn same(left: &str, right: &str) -> bool {
    let normal = |host: &str| match host.to_ascii_lowercase().as_str() {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    };
    normal(left) == normal(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(auth: &Auth) -> (&str, &str) {
        match &auth.secret {
            Secret::Basic { user, password } => (user, password),
            _ => panic!(),
        }
    }

    #[test]
    fn every_form_of_the_cri_is_understood() {
        let none = Auth::from_parts("", "", "", "x", "", "").unwrap();
        assert!(none.is_none());
        let encoded = STANDARD.encode("user:pass:word");
        let auth = Auth::from_parts("", "", &encoded, "", "", "").unwrap().unwrap();
        assert_eq!(basic(&auth), ("user", "pass:word"));
        assert!(Auth::from_parts("", "", "!!", "", "", "").is_err());
        let token = Auth::from_parts("", "", "", "", "", "t").unwrap().unwrap();
        assert!(token.secret == Secret::Bearer("t".into()));
    }

    #[test]
    fn credentials_go_to_the_server_that_they_are_for() {
        let auth = Auth::basic("u", "p").for_server("https://index.docker.io/v1/");
        assert!(auth.for_host("registry-1.docker.io").is_some());
        assert!(auth.for_host("evil.example").is_none());
        assert!(Auth::basic("u", "p").for_host("anywhere").is_some());
    }

    #[test]
    fn nothing_secret_is_printed() {
        let text = format!("{:?}", Auth::basic("someone", "hunter2").for_server("r.example"));
        assert!(!text.contains("hunter2") && !text.contains("someone"), "{text}");
    }

    #[test]
    fn the_longest_key_of_the_auth_file_wins() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = |user: &str| STANDARD.encode(format!("{user}:p"));
        let text = format!(
            r#"{{"auths":{{"r.example":{{"auth":"{}"}},"r.example/team":{{"auth":"{}"}},"https://index.docker.io/v1/":{{"auth":"{}"}}}}}}"#,
            one("all"),
            one("team"),
            one("hub")
        );
        std::fs::write(file.path(), text).unwrap();
        let user = |name: &str| {
            let reference = Reference::parse(name, Some("docker.io")).unwrap();
            from_file(file.path(), &reference).unwrap().map(|auth| basic(&auth).0.to_owned())
        };
        assert_eq!(user("r.example/x").as_deref(), Some("all"));
        assert_eq!(user("r.example/team/x").as_deref(), Some("team"));
        assert_eq!(user("r.example/teams/x").as_deref(), Some("all"));
        assert_eq!(user("busybox").as_deref(), Some("hub"));
        assert_eq!(user("other.example/x"), None);
        let reference = Reference::parse("x", Some("docker.io")).unwrap();
        assert!(from_file(Path::new("/nonexistent"), &reference).unwrap().is_none());
        std::fs::write(file.path(), "{\"auths\": \"secret").unwrap();
        let error = from_file(file.path(), &reference).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
