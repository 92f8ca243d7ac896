//! Bridges, wires, addresses and routes: what rtnetlink is asked for. Which address is whose is the business of
//! `address`.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::error::Error;
use crate::netlink::{Refusal, Socket};

/// The pod's side of every wire.
pub(crate) const INTERFACE: &str = "eth0";
/// RT_TABLE_MAIN.
const MAIN: u8 = 254;

/// A pair of interfaces: one on the bridge, the other in the pod.
pub(crate) struct Wire<'a> {
    pub(crate) name: &'a str,
    pub(crate) netns: &'a OwnedFd,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: Option<u32>,
}

/// Makes the bridge unless it is there, gives it its addresses and returns its index.
pub(crate) fn ensure_bridge(
    host: &mut Socket,
    name: &str,
    mtu: Option<u32>,
    addresses: &[(IpAddr, u8)],
) -> Result<u32, Error> {
    let act = || format!("create bridge {name}");
    let mut link = named(name);
    link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
    if let Some((ip, _)) = addresses.first() {
        // A bridge without a fixed address takes the lowest of its ports', and changes it under its pods.
        link.attributes.push(LinkAttribute::Address(mac(*ip).to_vec()));
    }
    link.attributes.extend(mtu.map(LinkAttribute::Mtu));
    match host.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL) {
        Err(refusal) if !refusal.is(libc::EEXIST) => return Err(refusal.to(act())),
        _ => {}
    }
    let found = find(host, name).map_err(|refusal| refusal.to(act()))?;
    let Some(link) = found.filter(is_bridge) else {
        return Err(Error::Config(format!("{name} is there and is not a bridge")));
    };
    let index = link.header.index;
    let mut requests = Vec::new();
    for (ip, prefix) in addresses {
        requests.push((
            RouteNetlinkMessage::NewAddress(address(index, *ip, *prefix)),
            NLM_F_CREATE | NLM_F_REPLACE,
        ));
    }
    requests.push((RouteNetlinkMessage::SetLink(up(named(name))), 0));
    all(host, requests, &act)?;
    Ok(index)
}

/// Makes a wire, one end in the pod's namespace, and the other one up but not on the bridge yet.
pub(crate) fn add_wire(host: &mut Socket, wire: &Wire<'_>) -> Result<(), Refusal> {
    // The peer cannot be up before its other end is there (ENOTCONN).
    let mut peer = named(INTERFACE);
    peer.attributes.push(LinkAttribute::Address(wire.mac.to_vec()));
    peer.attributes.push(LinkAttribute::NetNsFd(wire.netns.as_raw_fd()));
    peer.attributes.extend(wire.mtu.map(LinkAttribute::Mtu));
    let mut link = up(named(wire.name));
    link.attributes.extend(wire.mtu.map(LinkAttribute::Mtu));
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    host.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

/// Puts the host's end of a wire on the bridge.
pub(crate) fn join(host: &mut Socket, name: &str, bridge: u32) -> Result<(), Refusal> {
    let mut port = named(name);
    port.attributes.push(LinkAttribute::Controller(bridge));
    // A packet that was sent to the host, and from there back to its sender, leaves by the port it came in by.
    let mut hairpin = named(name);
    hairpin.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
    ]));
    let requests = vec![(RouteNetlinkMessage::NewLink(port), 0), (RouteNetlinkMessage::NewLink(hairpin), 0)];
    host.requests(requests)?.into_iter().collect()
}

/// Brings the pod's end up and gives it its addresses and a default route per family. `pod` is a socket of the pod's namespace.
pub(crate) fn configure(pod: &mut Socket, addresses: &[(IpAddr, u8, IpAddr)]) -> Result<(), Error> {
    let act = || format!("configure {INTERFACE} of the pod");
    let link = find(pod, INTERFACE).map_err(|refusal| refusal.to(act()))?;
    let index = link.map(|link| link.header.index).unwrap_or_default();
    let mut requests = vec![(RouteNetlinkMessage::SetLink(up(named(INTERFACE))), 0)];
    for (ip, prefix, gateway) in addresses {
        requests
            .push((RouteNetlinkMessage::NewAddress(address(index, *ip, *prefix)), NLM_F_CREATE | NLM_F_EXCL));
        requests
            .push((RouteNetlinkMessage::NewRoute(default_route(index, *gateway)), NLM_F_CREATE | NLM_F_EXCL));
    }
    all(pod, requests, &act)
}

/// Limits what an interface sends: a token bucket in place of its queue.
pub(crate) fn limit(socket: &mut Socket, name: &str, bits: u64) -> Result<(), Error> {
    let act = || format!("limit {name} to {bits} bit/s");
    let link = find(socket, name).map_err(|refusal| refusal.to(act()))?;
    let mut message = TcMessage::default();
    message.header.index = link.map(|link| link.header.index).unwrap_or_default() as i32;
    message.header.parent = TcHandle::ROOT;
    message.attributes.push(TcAttribute::Kind("tbf".into()));
    let bucket = Bucket::of(bits);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Other(DefaultNla::new(TBF_PARAMETERS, bucket.parameters())),
        TcOption::Other(DefaultNla::new(TBF_RATE64, bucket.rate.to_ne_bytes().to_vec())),
        TcOption::Other(DefaultNla::new(TBF_BURST, bucket.burst.to_ne_bytes().to_vec())),
    ]));
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    socket.request(message, NLM_F_CREATE | NLM_F_REPLACE).map_err(|refusal| refusal.to(act()))
}

// linux/pkt_sched.h
const TBF_PARAMETERS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const LINKLAYER_ETHERNET: u8 = 1;

/// How full a token bucket is, and how fast it fills, in bytes.
#[derive(Debug, PartialEq)]
struct Bucket {
    rate: u64,
    burst: u32,
    queue: u32,
}

impl Bucket {
    /// Room for 20 ms, or for two of the largest packets that a local sender makes; and a queue of 100 ms more.
    fn of(bits: u64) -> Bucket {
        let rate = bits.div_ceil(8);
        let bytes = |part: u64, least: u32| {
            u32::try_from(rate / part).unwrap_or(u32::MAX / 4).clamp(least, u32::MAX / 4)
        };
        let burst = bytes(50, 128 << 10);
        Bucket { rate, burst, queue: burst + bytes(10, 128 << 10) }
    }

    /// struct tc_tbf_qopt: two tc_ratespec, the second (a peak rate) of which is none, then limit, buffer and mtu.
    fn parameters(&self) -> Vec<u8> {
        let rate = u32::try_from(self.rate).unwrap_or(u32::MAX);
        let mut bytes = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
        bytes.extend(rate.to_ne_bytes());
        bytes.extend([0; 12]);
        bytes.extend(self.queue.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes
    }
}

/// Removes a link. Succeeds when there is none.
pub(crate) fn delete(host: &mut Socket, name: &str) -> Result<(), Error> {
    match host.request(RouteNetlinkMessage::DelLink(named(name)), 0) {
        Err(refusal) if !refusal.is(libc::ENODEV) => Err(refusal.to(format!("delete link {name}"))),
        _ => Ok(()),
    }
}

/// The link of that name, if there is one.
pub(crate) fn find(socket: &mut Socket, name: &str) -> Result<Option<LinkMessage>, Refusal> {
    match socket.get(RouteNetlinkMessage::GetLink(named(name)), false) {
        Err(refusal) if refusal.is(libc::ENODEV) => Ok(None),
        Err(refusal) => Err(refusal),
        Ok(found) => Ok(found.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })),
    }
}

/// The names of all links that are ports of the bridge.
pub(crate) fn ports(host: &mut Socket, bridge: u32) -> Result<Vec<String>, Error> {
    let all = host.get(RouteNetlinkMessage::GetLink(LinkMessage::default()), true);
    let all = all.map_err(|refusal| refusal.to("list links"))?;
    let name = |message: RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewLink(link) = message else { return None };
        link.attributes.contains(&LinkAttribute::Controller(bridge)).then_some(())?;
        link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        })
    };
    Ok(all.into_iter().filter_map(name).collect())
}

/// The hardware address that belongs to an address: whoever gets the address next gets this one too, and the
/// neighbours' caches stay right.
pub(crate) fn mac(ip: IpAddr) -> [u8; 6] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [0x0a, 0x58, a, b, c, d]
        }
        IpAddr::V6(ip) => {
            let [.., a, b, c, d] = ip.octets();
            [0x0a, 0x59, a, b, c, d]
        }
    }
}

fn all(
    socket: &mut Socket,
    requests: Vec<(RouteNetlinkMessage, u16)>,
    act: &dyn Fn() -> String,
) -> Result<(), Error> {
    let answers = socket.requests(requests).map_err(|cause| Refusal::from(cause).to(act()))?;
    answers.into_iter().collect::<Result<(), Refusal>>().map_err(|refusal| refusal.to(act()))
}

fn named(name: &str) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    link
}

fn up(mut link: LinkMessage) -> LinkMessage {
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

/// Whether it is a bridge, and not something else of that name.
pub(crate) fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(crate) fn address(index: u32, ip: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(ip));
    message.attributes.push(AddressAttribute::Address(ip));
    if ip.is_ipv6() {
        // We know that nobody else has it; to ask around would take a second.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

pub(crate) fn default_route(index: u32, gateway: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(gateway);
    message.header.table = MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Gateway(match gateway {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }));
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fits_its_rate() {
        for (bits, rate, burst) in [
            (1_000, 125, 128 << 10),
            (1_000_000_000, 125_000_000, 2_500_000),
            (10u64.pow(15), 125_000_000_000_000, u32::MAX / 4),
        ] {
            let bucket = Bucket::of(bits);
            assert_eq!((bucket.rate, bucket.burst), (rate, burst), "{bits}");
            assert!(bucket.queue > bucket.burst);
            assert_eq!(bucket.parameters().len(), 36);
        }
    }
}
