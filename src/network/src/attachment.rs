//! What a pod wants of the network, and what it got. Plain data: the daemon stores both and hands them back.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// One pod's wish to be on the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachment {
    /// The pod's id; CNI calls it the container id.
    pub pod_id: String,
    /// The pod's name in Kubernetes.
    pub name: String,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// The pod's Kubernetes uid.
    pub uid: String,
    /// Where the pod's network namespace is pinned. May be gone when detaching.
    pub netns: PathBuf,
    /// Ports of the host that lead to the pod. Entries without a host port are ignored.
    pub ports: Vec<PortMapping>,
    /// Limits for the pod's traffic.
    pub bandwidth: Option<Bandwidth>,
    /// Name servers, for plugins that want to know.
    pub dns: Dns,
}

/// One port of the host that leads to a port of the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortMapping {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port inside the pod.
    pub container_port: u16,
    /// The port of the host; 0 means none.
    pub host_port: u16,
    /// The one address of the host that it is for; all of them when absent.
    pub host_ip: Option<IpAddr>,
}

/// The transport protocols that can be forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

/// Limits in bits per second, seen from the pod: ingress is what it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bandwidth {
    /// What the pod may receive.
    pub ingress: Option<u64>,
    /// What the pod may send.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// Reads the values of `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`.
    /// Kubernetes wants them between 1k and 1P; anything else is an error, nothing at all is `None`.
    pub fn parse(ingress: Option<&str>, egress: Option<&str>) -> Result<Option<Bandwidth>, Error> {
        let ingress = ingress.map(rate).transpose()?;
        let egress = egress.map(rate).transpose()?;
        Ok((ingress.is_some() || egress.is_some()).then_some(Bandwidth { ingress, egress }))
    }
}

/// A Kubernetes quantity as bits per second: digits with an optional fraction, and a suffix.
fn rate(text: &str) -> Result<u64, Error> {
    let bad = || Error::Config(format!("bandwidth {text:?} is not a quantity between 1k and 1P"));
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1000u128.pow(2),
        "G" => 1000u128.pow(3),
        "T" => 1000u128.pow(4),
        "P" => 1000u128.pow(5),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() > 16
        || fraction.len() > 9
        || whole.is_empty()
        || (number.contains('.') && fraction.is_empty())
    {
        return Err(bad());
    }
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| bad())?;
    let bits = (digits * factor).div_ceil(10u128.pow(fraction.len() as u32));
    if !(1000..=1000u128.pow(5)).contains(&bits) {
        return Err(bad());
    }
    u64::try_from(bits).map_err(|_| bad())
}

/// What `/etc/resolv.conf` of the pod will say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

/// What a pod got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attached {
    /// The pod's addresses, the preferred one first.
    pub ips: Vec<IpAddr>,
    /// The pod's interface they are on.
    pub interface: String,
    /// That interface's hardware address.
    pub mac: String,
    /// The whole result, in the form of CNI 1.0 or later, for those who want more.
    pub result: serde_json::Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_read_as_kubernetes_writes_it() {
        for (text, bits) in [
            ("1k", 1_000),
            ("10M", 10_000_000),
            ("1.5M", 1_500_000),
            ("1P", 10u64.pow(15)),
            ("1Mi", 1 << 20),
            ("1000", 1000),
        ] {
            assert_eq!(rate(text).unwrap(), bits, "{text}");
        }
    }

    #[test]
    fn bandwidth_outside_of_its_bounds_is_refused() {
        for text in [
            "",
            "999",
            "0",
            "2P",
            "1e3",
            "-5M",
            "5m",
            "M",
            "1.",
            ".5M",
            "1 M",
            "1M ",
            "99999999999999999999P",
            "1\u{663}M",
        ] {
            assert!(rate(text).is_err(), "{text:?}");
        }
        assert_eq!(Bandwidth::parse(None, None).unwrap(), None);
    }
}
