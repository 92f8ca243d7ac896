//! Which protocol is spoken: pure decisions over header values. The order of the client decides; its header may be
//! repeated, a list with commas, or both.

use http::HeaderMap;

/// Version of the remote command protocol (kubernetes/apimachinery `remotecommand`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1 = 1,
    V2,
    V3,
    V4,
    V5,
}

/// How channels are written in WebSocket messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    pub(crate) version: Version,
    pub(crate) base64: bool,
}

/// SPDY inside WebSocket, for port-forward.
pub(crate) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// The one protocol of port-forward over SPDY.
pub(crate) const PORT_FORWARD: &str = "portforward.k8s.io";

pub(crate) const SPDY: &str = "SPDY/3.1";
pub(crate) const VERSION_HEADER: &str = "x-stream-protocol-version";

const REMOTE: [(&str, Version); 5] = [
    ("v5.channel.k8s.io", Version::V5),
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// Every value of a header, lists taken apart.
pub(crate) fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    let values = lines.flat_map(|line| line.split(',')).map(|value| value.trim().to_owned());
    values.filter(|value| !value.is_empty()).collect()
}

/// Whether the request asks to go on with another protocol.
pub(crate) fn upgrades(headers: &HeaderMap, protocol: &str) -> bool {
    let has =
        |name, wanted: &str| values(headers, name).iter().any(|value| value.eq_ignore_ascii_case(wanted));
    has("connection", "upgrade") && has("upgrade", protocol)
}

/// The remote command protocol for SPDY, with the name that the client used.
pub(crate) fn remote(offered: &[String]) -> Option<(String, Version)> {
    offered.iter().find_map(|offer| {
        let (_, version) = REMOTE.iter().find(|(name, _)| name == offer)?;
        Some((offer.clone(), *version))
    })
}

/// What SPDY's reference server would list.
pub(crate) fn remote_names() -> impl Iterator<Item = &'static str> {
    REMOTE.iter().map(|(name, _)| *name)
}

/// The WebSocket subprotocol of exec and attach. A client that offers none speaks the oldest, and gets no name back.
pub(crate) fn websocket(offered: &[String]) -> Option<(Option<String>, Channels)> {
    if offered.is_empty() {
        return Some((None, Channels { version: Version::V1, base64: false }));
    }
    offered.iter().find_map(|offer| {
        let (version, base64) = match offer.as_str() {
            "v5.channel.k8s.io" => (Version::V5, false),
            "v4.channel.k8s.io" => (Version::V4, false),
            "v4.base64.channel.k8s.io" => (Version::V4, true),
            "channel.k8s.io" => (Version::V1, false),
            "base64.channel.k8s.io" => (Version::V1, true),
            _ => return None,
        };
        Some((Some(offer.clone()), Channels { version, base64 }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(VERSION_HEADER, line.parse().unwrap());
        }
        headers
    }

    #[test]
    fn repeated_and_comma_listed_headers_are_one_list_in_the_clients_order() {
        for lines in [
            &["v9.x, v4.channel.k8s.io", "channel.k8s.io"][..],
            &["v9.x", "v4.channel.k8s.io,channel.k8s.io"],
        ] {
            let offered = values(&headers(lines), VERSION_HEADER);
            assert_eq!(remote(&offered), Some(("v4.channel.k8s.io".into(), Version::V4)));
        }
        assert_eq!(remote(&["v9.x".into()]), None);
        assert_eq!(remote(&[]), None);
    }

    #[test]
    fn a_websocket_without_a_subprotocol_speaks_the_oldest() {
        assert_eq!(websocket(&[]), Some((None, Channels { version: Version::V1, base64: false })));
        let (name, channels) = websocket(&["x".into(), "v4.base64.channel.k8s.io".into()]).unwrap();
        assert_eq!((name.as_deref(), channels.base64), (Some("v4.base64.channel.k8s.io"), true));
        assert_eq!(websocket(&["x".into()]), None);
    }

    #[test]
    fn an_upgrade_needs_both_headers() {
        let mut map = HeaderMap::new();
        map.insert("upgrade", "spdy/3.1".parse().unwrap());
        assert!(!upgrades(&map, SPDY));
        map.insert("connection", "keep-alive, Upgrade".parse().unwrap());
        assert!(upgrades(&map, SPDY));
    }
}
