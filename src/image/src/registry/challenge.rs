//! `WWW-Authenticate`, as registries write it (RFC 9110, section 11.6.1).

/// What a registry wants before it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token of a token server.
    Bearer { realm: String, service: Option<String>, scope: Option<String>, error: Option<String> },
}

/// Nobody needs more of it.
const MAX_HEADER: usize = 16 << 10;

/// The challenges of one header that we can answer. What we do not know is passed over.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = header.get(..header.len().min(MAX_HEADER)).unwrap_or_default();
    let mut current: Option<(String, Vec<(String, String)>)> = None;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            break;
        }
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 {
            // Not a token: skip one character, so that rubbish ends.
            let mut characters = rest.chars();
            characters.next();
            rest = characters.as_str();
            continue;
        }
        let (word, after) = rest.split_at(end);
        let equals = after.trim_start_matches([' ', '\t']).strip_prefix('=');
        match (equals, &mut current) {
            (Some(after), Some((_, parameters))) => {
                let (value, after) = value(after.trim_start_matches([' ', '\t']));
                parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            (Some(after), None) => rest = after,
            (None, _) => {
                challenges.extend(current.take().and_then(finish));
                current = Some((word.to_ascii_lowercase(), Vec::new()));
                rest = after;
            }
        }
    }
    challenges.extend(current.take().and_then(finish));
    challenges
}

fn finish((scheme, parameters): (String, Vec<(String, String)>)) -> Option<Challenge> {
    let get = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: get("realm")?,
            service: get("service"),
            scope: get("scope").filter(|scope| !scope.is_empty()),
            error: get("error"),
        }),
        _ => None,
    }
}

/// A quoted string or a token, and what follows it.
fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    (value, characters.as_str())
}

fn is_token(character: char) -> bool {
    character.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(character)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges_of_real_registries_are_understood() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse(hub),
            [Challenge::Bearer {
                realm: "https://auth.docker.io/token".into(),
                service: Some("registry.docker.io".into()),
                scope: Some("repository:a/b:pull,push".into()),
                error: None,
            }]
        );
        assert_eq!(parse(r#"Basic realm="x", charset="UTF-8""#), [Challenge::Basic]);
        assert_eq!(parse("Negotiate, basic realm=x").len(), 1);
        let two = parse(r#"Bearer realm="r",error="insufficient_scope", Basic realm="b""#);
        assert!(
            matches!(&two[..], [Challenge::Bearer { error: Some(e), .. }, Challenge::Basic] if e == "insufficient_scope")
        );
    }

    #[test]
    fn rubbish_is_no_challenge() {
        for text in ["", ",", "=", "\"", "Bearer", "Bearer service=\"x\"", "Digest realm=\"x\""] {
            assert!(parse(text).is_empty(), "{text}");
        }
        assert!(
            matches!(&parse(r#"Bearer realm="un\"closed"#)[..], [Challenge::Bearer { realm, .. }] if realm == "un\"closed")
        );
    }

    proptest! {
        #[test]
        fn no_header_panics_or_hangs(text in "\\PC{0,200}", odd in "[Bbearlm=\", \\\\]{0,200}") {
            parse(&text);
            parse(&odd);
        }
    }
}
