//! Address translation for the bridge, as nf_tables messages written by hand: no program has to be installed for it,
//! and a port comes and goes as one element of a map, whatever the number of pods.
//!
//! ```text
//! table inet crisp-<bridge> {
//!     map ports4 { l4proto . port : address . port }              and ports6, for IPv6
//!     map hosts4 { host address . l4proto . port : address . port }   and hosts6
//!     chain guard       { filter, prerouting raw:  from the bridge, from or to 127/8: drop }
//!     chain prerouting  { nat, dstnat:  to an address of the host: jump ports }
//!     chain output      { nat, dstnat:  to an address of the host: jump ports }
//!     chain ports       { dnat to hosts4, ports4, and but for ::1 to hosts6, ports6 }
//!     chain postrouting { nat, srcnat:  to the bridge, translated, from the subnets or 127/8: masquerade
//!                                       from the subnets to elsewhere: masquerade }
//! }
//! ```

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::attachment::PortMapping;
use crate::netlink::{Refusal, Socket};
use crate::subnet::Subnet;

// linux/netfilter/nfnetlink.h, nf_tables.h, nfnetlink_conntrack.h
const NLM_REQUEST: u16 = 1;
const NLM_ACK: u16 = 4;
const NLM_CREATE: u16 = 0x400;
const NLM_APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const SUBSYSTEM: u16 = 10;
const CONNTRACK_DELETE: u16 = (1 << 8) | 2;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;

const UNSPEC: u8 = 0;
const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;

const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
const RAW: i32 = -300;
const DSTNAT: i32 = -100;
const SRCNAT: i32 = 100;

/// Registers of 32 bits start at this number; an address of IPv6 and an interface name take four.
const REGISTER: u32 = 8;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_STATUS: u32 = 2;
/// IPS_DST_NAT: where the connection goes was changed.
const STATUS_DNAT: u32 = 1 << 5;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const SET_IS_MAP: u32 = 8;
/// RTN_LOCAL, of the kinds of addresses.
const LOCAL: u32 = 2;
/// How the `nft` program names types, so that it can show our maps: six bits for each part.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_PROTO: u32 = 12;
const TYPE_PORT: u32 = 13;

/// The table of one bridge.
pub(crate) struct Table {
    name: String,
    bridge: String,
    /// One for all requests: to close one makes the kernel wait until what was deleted is gone, 10 ms and more.
    socket: Mutex<Socket>,
}

/// A host port of a pod with that address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    pub(crate) port: PortMapping,
    pub(crate) pod: IpAddr,
}

impl Forward {
    /// The map that it stands in, its key and its value.
    fn element(&self) -> (&'static str, Vec<u8>, Vec<u8>) {
        let host = self.port.host_ip.filter(|ip| !ip.is_unspecified());
        let map = match (host.is_some(), self.pod.is_ipv4()) {
            (false, true) => "ports4",
            (false, false) => "ports6",
            (true, true) => "hosts4",
            (true, false) => "hosts6",
        };
        let mut key = host.map(octets).unwrap_or_default();
        key.extend([self.port.protocol.number(), 0, 0, 0]);
        key.extend(padded_port(self.port.host_port));
        let mut value = octets(self.pod);
        value.extend(padded_port(self.port.container_port));
        (map, key, value)
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Table {
    pub(crate) fn of(bridge: &str) -> io::Result<Table> {
        let socket = Mutex::new(Socket::netfilter()?);
        Ok(Table { name: format!("crisp-{bridge}"), bridge: bridge.to_owned(), socket })
    }

    /// Whether the kernel has it: others flush rules.
    pub(crate) fn exists(&self) -> Result<bool, Refusal> {
        let mut socket = self.socket();
        let number = socket.number(1);
        let mut message = Writer::default();
        message.header(kind(GET_TABLE), NLM_REQUEST | NLM_ACK, number, INET, 0);
        message.text(1, &self.name);
        match socket.batch(&message.finish(), number, number) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(false),
            Err(refusal) => Err(refusal),
        }
    }

    /// Makes the table with these forwards, in place of what was there, in one step.
    pub(crate) fn rebuild(
        &self,
        subnets: &[Subnet],
        masquerade: bool,
        forwards: &[Forward],
    ) -> Result<(), Refusal> {
        self.whole(subnets, masquerade, forwards).commit(&mut self.socket())
    }

    /// Adds forwards, or none of them.
    pub(crate) fn add(&self, forwards: &[Forward]) -> Result<(), Refusal> {
        let mut batch = Batch::begin();
        // Again the same is no fault; the same port to somewhere else is (EBUSY).
        self.elements(&mut batch, NEW_ELEMENT, NLM_CREATE, forwards);
        batch.commit(&mut self.socket())
    }

    /// Takes forwards away. Succeeds when they, or the table, are gone.
    pub(crate) fn remove(&self, forwards: &[Forward]) -> Result<(), Refusal> {
        let mut batch = Batch::begin();
        self.elements(&mut batch, DELETE_ELEMENT, 0, forwards);
        let result = batch.commit(&mut self.socket());
        match result {
            Err(refusal) if refusal.is(libc::ENOENT) && forwards.len() > 1 => {
                // One that is missing keeps the others from going.
                forwards.iter().try_for_each(|forward| self.remove(std::slice::from_ref(forward)))
            }
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    pub(crate) fn delete(&self) -> Result<(), Refusal> {
        let mut batch = Batch::begin();
        batch.message(DELETE_TABLE, 0, |w| w.text(1, &self.name));
        match batch.commit(&mut self.socket()) {
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// Forgets the connections to a port of the host, which would go on to where it led before: a UDP client
    /// that never pauses opens no new connection, and is never led by new rules.
    pub(crate) fn forget_connections(&self, port: &PortMapping) -> Result<(), Refusal> {
        const PROTOCOL: u32 = 1 << 3;
        const TO_PORT: u32 = 1 << 5;
        let mut socket = self.socket();
        for family in [IPV4, IPV6] {
            let number = socket.number(1);
            let mut message = Writer::default();
            message.header(CONNTRACK_DELETE, NLM_REQUEST | NLM_ACK, number, family, 0);
            message.nest(1, |w| {
                w.nest(2, |w| {
                    w.put(1, &[port.protocol.number()]);
                    w.put(3, &port.host_port.to_be_bytes());
                });
            });
            message.nest(25, |w| {
                w.put(1, &(PROTOCOL | TO_PORT).to_ne_bytes());
                w.put(2, &0u32.to_ne_bytes());
            });
            match socket.batch(&message.finish(), number, number) {
                // Before Linux 6.10 deletion knows no such filter: old connections then end by their own timeout.
                Err(refusal)
                    if [libc::ENOENT, libc::EINVAL, libc::EOPNOTSUPP].iter().any(|e| refusal.is(*e)) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn whole(&self, subnets: &[Subnet], masquerade: bool, forwards: &[Forward]) -> Batch {
        let mut batch = Batch::begin();
        // To make it first lets the deletion succeed in any case.
        batch.message(NEW_TABLE, NLM_CREATE, |w| w.text(1, &self.name));
        batch.message(DELETE_TABLE, 0, |w| w.text(1, &self.name));
        batch.message(NEW_TABLE, NLM_CREATE, |w| w.text(1, &self.name));
        let port = (TYPE_PROTO << 6) | TYPE_PORT;
        for (id, (name, key_type, key, value_type, value)) in [
            ("ports4", port, 8, (TYPE_IPV4 << 6) | TYPE_PORT, 8),
            ("ports6", port, 8, (TYPE_IPV6 << 6) | TYPE_PORT, 20),
            ("hosts4", (TYPE_IPV4 << 12) | port, 12, (TYPE_IPV4 << 6) | TYPE_PORT, 8),
            ("hosts6", (TYPE_IPV6 << 12) | port, 24, (TYPE_IPV6 << 6) | TYPE_PORT, 20),
        ]
        .into_iter()
        .enumerate()
        {
            batch.message(NEW_SET, NLM_CREATE, |w| {
                w.text(1, &self.name);
                w.text(2, name);
                for (attribute, number) in [
                    (3, SET_IS_MAP),
                    (4, key_type),
                    (5, key),
                    (6, value_type),
                    (7, value),
                    (10, id as u32 + 1),
                ] {
                    w.be32(attribute, number);
                }
            });
        }
        self.chain(&mut batch, "guard", Some(("filter", PREROUTING, RAW)));
        self.chain(&mut batch, "prerouting", Some(("nat", PREROUTING, DSTNAT)));
        self.chain(&mut batch, "output", Some(("nat", OUTPUT, DSTNAT)));
        self.chain(&mut batch, "postrouting", Some(("nat", POSTROUTING, SRCNAT)));
        self.chain(&mut batch, "ports", None);
        for (chain, rule) in self.rules(subnets, masquerade) {
            batch.message(NEW_RULE, NLM_CREATE | NLM_APPEND, |w| {
                w.text(1, &self.name);
                w.text(2, chain);
                w.nest(4, |w| rule.iter().for_each(|step| step.write(w)));
            });
        }
        self.elements(&mut batch, NEW_ELEMENT, NLM_CREATE, forwards);
        batch
    }

    fn chain(&self, batch: &mut Batch, name: &str, hook: Option<(&str, u32, i32)>) {
        batch.message(NEW_CHAIN, NLM_CREATE, |w| {
            w.text(1, &self.name);
            w.text(3, name);
            if let Some((kind, hook, priority)) = hook {
                w.nest(4, |w| {
                    w.be32(1, hook);
                    w.be32(2, priority as u32);
                });
                w.text(7, kind);
            }
        });
    }

    fn rules(&self, subnets: &[Subnet], masquerade: bool) -> Vec<(&'static str, Vec<Step>)> {
        let mut rules = Vec::new();
        let to_bridge = || Step::interface(META_OIFNAME, true, &self.bridge);
        // With route_localnet on the bridge, a pod could talk to what listens on the host's loopback only, and
        // pretend to come from there (CVE-2020-8558).
        for source in [true, false] {
            let mut rule = Step::interface(META_IIFNAME, true, &self.bridge);
            rule.extend(Step::loopback(source));
            rule.push(Step::Drop);
            rules.push(("guard", rule));
        }
        for chain in ["prerouting", "output"] {
            let is_local = Step::Compare { equal: true, value: LOCAL.to_ne_bytes().to_vec() };
            rules.push((chain, vec![Step::AddressType, is_local, Step::Jump("ports")]));
        }
        // An element for one address of the host goes before one for all.
        for (family, hosts, ports) in [(IPV4, "hosts4", "ports4"), (IPV6, "hosts6", "ports6")] {
            let words = if family == IPV4 { 1 } else { 4 };
            let to =
                Step::Payload { base: NETWORK, offset: destination(family), len: words * 4, register: 0 };
            // No packet to ::1 would arrive in the pod. Left alone, its sender is refused at once in place of waiting.
            let start = || {
                let mut rule = Step::family(family);
                rule.push(to.clone());
                if family == IPV6 {
                    let loopback = Ipv6Addr::LOCALHOST.octets().to_vec();
                    rule.push(Step::Compare { equal: false, value: loopback });
                }
                rule
            };
            let mut rule = start();
            rule.extend([
                Step::Meta { key: META_L4PROTO, register: words },
                Step::Payload { base: TRANSPORT, offset: 2, len: 2, register: words + 1 },
                Step::Map(hosts),
                Step::Dnat { family, port: words },
            ]);
            rules.push(("ports", rule));
            let mut rule = start();
            rule.extend([
                Step::Meta { key: META_L4PROTO, register: 0 },
                Step::Payload { base: TRANSPORT, offset: 2, len: 2, register: 1 },
                Step::Map(ports),
                Step::Dnat { family, port: words },
            ]);
            rules.push(("ports", rule));
        }
        // What a pod, or the host's loopback, sent to a host port must come back the same way.
        let translated = || {
            let mask = STATUS_DNAT.to_ne_bytes().to_vec();
            let zero = Step::Compare { equal: false, value: vec![0; 4] };
            [Step::ConnectionStatus, Step::Mask(mask), zero]
        };
        let mut rule = to_bridge();
        rule.extend(translated());
        rule.extend(Step::loopback(true));
        rule.push(Step::Masquerade);
        rules.push(("postrouting", rule));
        for subnet in subnets {
            let mut rule = to_bridge();
            rule.extend(translated());
            rule.extend(Step::source(subnet));
            rule.push(Step::Masquerade);
            rules.push(("postrouting", rule));
        }
        for subnet in subnets.iter().filter(|_| masquerade) {
            let mut rule = Step::interface(META_OIFNAME, false, &self.bridge);
            rule.extend(Step::source(subnet));
            rule.push(Step::Masquerade);
            rules.push(("postrouting", rule));
        }
        rules
    }

    fn elements(&self, batch: &mut Batch, verb: u16, flags: u16, forwards: &[Forward]) {
        for forward in forwards {
            let (map, key, value) = forward.element();
            batch.message(verb, flags, |w| {
                w.text(1, &self.name);
                w.text(2, map);
                w.nest(3, |w| {
                    w.nest(1, |w| {
                        w.nest(1, |w| w.put(1, &key));
                        if verb == NEW_ELEMENT {
                            w.nest(2, |w| w.put(1, &value));
                        }
                    });
                });
            });
        }
    }
}

/// One step of a rule.
#[derive(Clone)]
enum Step {
    Meta { key: u32, register: u32 },
    Compare { equal: bool, value: Vec<u8> },
    Payload { base: u32, offset: u32, len: u32, register: u32 },
    Mask(Vec<u8>),
    ConnectionStatus,
    AddressType,
    Map(&'static str),
    Dnat { family: u8, port: u32 },
    Masquerade,
    Jump(&'static str),
    Drop,
}

impl Step {
    fn family(family: u8) -> Vec<Step> {
        vec![
            Step::Meta { key: META_NFPROTO, register: 0 },
            Step::Compare { equal: true, value: vec![family] },
        ]
    }

    fn interface(key: u32, equal: bool, name: &str) -> Vec<Step> {
        let mut value = name.as_bytes().to_vec();
        value.resize(libc::IFNAMSIZ, 0);
        vec![Step::Meta { key, register: 0 }, Step::Compare { equal, value }]
    }

    fn source(subnet: &Subnet) -> Vec<Step> {
        let family = if subnet.is_ipv4() { IPV4 } else { IPV6 };
        let mask = subnet.mask();
        let (offset, len) = (source(family), mask.len() as u32);
        let mut steps = Step::family(family);
        steps.extend([
            Step::Payload { base: NETWORK, offset, len, register: 0 },
            Step::Mask(mask),
            Step::Compare { equal: true, value: octets(subnet.address()) },
        ]);
        steps
    }

    fn loopback(from: bool) -> Vec<Step> {
        let offset = if from { source(IPV4) } else { destination(IPV4) };
        let mut steps = Step::family(IPV4);
        steps.extend([
            Step::Payload { base: NETWORK, offset, len: 1, register: 0 },
            Step::Compare { equal: true, value: vec![127] },
        ]);
        steps
    }

    fn write(&self, w: &mut Writer) {
        let first = REGISTER;
        match self {
            Step::Meta { key, register } => w.expression("meta", |w| {
                w.be32(1, first + register);
                w.be32(2, *key);
            }),
            Step::Compare { equal, value } => w.expression("cmp", |w| {
                w.be32(1, first);
                w.be32(2, u32::from(!equal));
                w.nest(3, |w| w.put(1, value));
            }),
            Step::Payload { base, offset, len, register } => w.expression("payload", |w| {
                w.be32(1, first + register);
                w.be32(2, *base);
                w.be32(3, *offset);
                w.be32(4, *len);
            }),
            Step::Mask(mask) => w.expression("bitwise", |w| {
                w.be32(1, first);
                w.be32(2, first);
                w.be32(3, mask.len() as u32);
                w.nest(4, |w| w.put(1, mask));
                w.nest(5, |w| w.put(1, &vec![0; mask.len()]));
            }),
            Step::ConnectionStatus => w.expression("ct", |w| {
                w.be32(1, first);
                w.be32(2, CT_STATUS);
            }),
            Step::AddressType => w.expression("fib", |w| {
                w.be32(1, first);
                // The kind of address, of the destination.
                w.be32(2, 3);
                w.be32(3, 2);
            }),
            Step::Map(name) => w.expression("lookup", |w| {
                w.text(1, name);
                w.be32(2, first);
                w.be32(3, first);
            }),
            Step::Dnat { family, port } => w.expression("nat", |w| {
                w.be32(1, 1);
                w.be32(2, u32::from(*family));
                w.be32(3, first);
                w.be32(5, first + port);
            }),
            Step::Masquerade => w.expression("masq", |_| {}),
            // NFT_JUMP and NF_DROP, into the register of verdicts.
            Step::Jump(chain) => w.verdict((-3i32) as u32, Some(chain)),
            Step::Drop => w.verdict(0, None),
        }
    }
}

fn source(family: u8) -> u32 {
    if family == IPV4 { 12 } else { 8 }
}

fn destination(family: u8) -> u32 {
    if family == IPV4 { 16 } else { 24 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn padded_port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn kind(verb: u16) -> u16 {
    (SUBSYSTEM << 8) | verb
}

/// Messages that the kernel carries out together or not at all.
struct Batch {
    writer: Writer,
    starts: Vec<usize>,
}

impl Batch {
    fn begin() -> Batch {
        let mut writer = Writer::default();
        writer.header(BATCH_BEGIN, NLM_REQUEST, 0, UNSPEC, SUBSYSTEM);
        writer.close();
        Batch { writer, starts: vec![0] }
    }

    fn message(&mut self, verb: u16, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.starts.push(self.writer.bytes.len());
        self.writer.header(kind(verb), flags | NLM_REQUEST, 0, INET, 0);
        body(&mut self.writer);
        self.writer.close();
    }

    /// How many messages there are, with the beginning and the end.
    fn len(&self) -> u32 {
        self.starts.len() as u32 + 1
    }

    /// Closes the batch, asks for an answer to the last message before the end, and numbers all of them. Returns
    /// the number of the one that is answered.
    fn end(mut self, first: u32) -> (Vec<u8>, u32) {
        if let Some(flags) = self.starts.last().and_then(|start| self.writer.bytes.get_mut(start + 6)) {
            *flags |= NLM_ACK as u8;
        }
        self.starts.push(self.writer.bytes.len());
        self.writer.header(BATCH_END, NLM_REQUEST, 0, UNSPEC, SUBSYSTEM);
        let last = first.wrapping_add(self.len() - 3);
        let mut bytes = self.writer.finish();
        let mut number = first;
        for start in self.starts {
            if let Some(place) = bytes.get_mut(start + 8..start + 12) {
                place.copy_from_slice(&number.to_ne_bytes());
            }
            number = number.wrapping_add(1);
        }
        (bytes, last)
    }

    fn commit(self, socket: &mut Socket) -> Result<(), Refusal> {
        if self.starts.len() == 1 {
            return Ok(());
        }
        let first = socket.number(self.len());
        let (bytes, last) = self.end(first);
        socket.batch(&bytes, first, last)
    }
}

/// Writes messages and attributes, which carry their lengths in front.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    start: usize,
}

impl Writer {
    fn header(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) {
        self.start = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
    }

    /// Ends a message: its length is known now.
    fn close(&mut self) {
        let length = (self.bytes.len() - self.start) as u32;
        if let Some(place) = self.bytes.get_mut(self.start..self.start + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.close();
        self.bytes
    }

    fn put(&mut self, attribute: u16, value: &[u8]) {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(attribute.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, attribute: u16, value: &str) {
        let mut value = value.as_bytes().to_vec();
        value.push(0);
        self.put(attribute, &value);
    }

    fn be32(&mut self, attribute: u16, value: u32) {
        self.put(attribute, &value.to_be_bytes());
    }

    fn nest(&mut self, attribute: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.bytes.len();
        self.put(attribute | NESTED, &[]);
        body(self);
        let length = (self.bytes.len() - start) as u16;
        if let Some(place) = self.bytes.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn expression(&mut self, name: &str, body: impl FnOnce(&mut Writer)) {
        self.nest(1, |w| {
            w.text(1, name);
            w.nest(2, body);
        });
    }

    fn verdict(&mut self, code: u32, chain: Option<&str>) {
        self.expression("immediate", |w| {
            w.be32(1, 0);
            w.nest(2, |w| {
                w.nest(2, |w| {
                    w.be32(1, code);
                    if let Some(chain) = chain {
                        w.text(2, chain);
                    }
                });
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::Protocol;
    use crate::netlink::Attributes;

    /// Splits a batch into messages: kind, flags, sequence, attributes.
    fn messages(mut bytes: &[u8]) -> Vec<(u16, u16, u32, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u32::from_ne_bytes(bytes[..4].try_into().unwrap()) as usize;
            let half = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
            let sequence = u32::from_ne_bytes(bytes[8..12].try_into().unwrap());
            assert_eq!(length % 4, 0);
            found.push((half(4), half(6), sequence, bytes[20..length].to_vec()));
            bytes = &bytes[length..];
        }
        found
    }

    fn attribute(bytes: &[u8], wanted: u16) -> Vec<u8> {
        Attributes(bytes).find(|(kind, _)| *kind == wanted).unwrap().1.to_vec()
    }

    fn forward(host_ip: &str, pod: &str) -> Forward {
        let port = PortMapping {
            protocol: Protocol::Udp,
            container_port: 80,
            host_port: 8080,
            host_ip: host_ip.parse().ok(),
        };
        Forward { port, pod: pod.parse().unwrap() }
    }

    #[test]
    fn a_port_is_one_element_of_the_right_map() {
        for (host_ip, pod, map, key) in [
            ("", "10.0.0.2", "ports4", vec![17, 0, 0, 0, 0x1f, 0x90, 0, 0]),
            ("0.0.0.0", "10.0.0.2", "ports4", vec![17, 0, 0, 0, 0x1f, 0x90, 0, 0]),
            ("", "fd00::2", "ports6", vec![17, 0, 0, 0, 0x1f, 0x90, 0, 0]),
            ("127.0.0.1", "10.0.0.2", "hosts4", vec![127, 0, 0, 1, 17, 0, 0, 0, 0x1f, 0x90, 0, 0]),
        ] {
            let (name, found, value) = forward(host_ip, pod).element();
            assert_eq!((name, found), (map, key));
            assert_eq!(value[value.len() - 4..], [0, 80, 0, 0]);
        }
        assert_eq!(forward("::1", "fd00::2").element().1.len(), 24);
    }

    #[test]
    fn a_batch_has_a_beginning_an_end_and_one_question() {
        let mut batch = Batch::begin();
        let table = Table::of("br").unwrap();
        table.elements(
            &mut batch,
            NEW_ELEMENT,
            NLM_CREATE,
            &[forward("", "10.0.0.2"), forward("", "fd00::2")],
        );
        let (bytes, last) = batch.end(7);
        let messages = messages(&bytes);
        assert_eq!(messages.iter().map(|m| m.0).collect::<Vec<_>>(), [16, 0xa0c, 0xa0c, 17]);
        assert_eq!(messages.iter().map(|m| m.1 & NLM_ACK).collect::<Vec<_>>(), [0, 0, NLM_ACK, 0]);
        assert_eq!(messages.iter().map(|m| m.2).collect::<Vec<_>>(), [7, 8, 9, 10]);
        assert_eq!(last, 9);
        assert_eq!(attribute(&messages[1].3, 1), b"crisp-br\0");
        assert_eq!(attribute(&messages[1].3, 2), b"ports4\0");
        let element = attribute(&attribute(&messages[1].3, 3), 1);
        assert_eq!(attribute(&attribute(&element, 1), 1), [17, 0, 0, 0, 0x1f, 0x90, 0, 0]);
        assert_eq!(attribute(&attribute(&element, 2), 1), [10, 0, 0, 2, 0, 80, 0, 0]);
    }

    #[test]
    fn the_whole_table_is_replaced_in_one_batch() {
        let subnets = crate::subnet::list("10.0.0.0/24,fd00::/64").unwrap();
        let (bytes, _) = Table::of("br").unwrap().whole(&subnets, true, &[forward("", "10.0.0.2")]).end(7);
        let kinds: Vec<u16> = messages(&bytes).iter().map(|m| m.0 & 0xff).collect();
        assert_eq!(kinds[..4], [16, NEW_TABLE, DELETE_TABLE, NEW_TABLE]);
        let count = |kind| kinds.iter().filter(|k| **k == kind).count();
        assert_eq!((count(NEW_SET), count(NEW_CHAIN), count(NEW_ELEMENT)), (4, 5, 1));
        assert_eq!(count(NEW_RULE), 2 + 2 + 4 + 1 + 2 + 2);
        let (bytes, _) = Table::of("br").unwrap().whole(&subnets, false, &[]).end(7);
        let rules = messages(&bytes).iter().filter(|m| m.0 & 0xff == NEW_RULE).count();
        assert_eq!(rules, 2 + 2 + 4 + 1 + 2, "without masquerade");
    }

    #[test]
    fn a_rule_is_a_list_of_named_expressions() {
        let subnets = crate::subnet::list("10.1.0.0/16").unwrap();
        let rules = Table::of("br").unwrap().rules(&subnets, true);
        let mut writer = Writer::default();
        rules.last().unwrap().1.iter().for_each(|step| step.write(&mut writer));
        let names: Vec<Vec<u8>> = Attributes(&writer.bytes).map(|(_, e)| attribute(e, 1)).collect();
        let names: Vec<&str> =
            names.iter().map(|n| std::str::from_utf8(n).unwrap().trim_end_matches('\0')).collect();
        assert_eq!(names, ["meta", "cmp", "meta", "cmp", "payload", "bitwise", "cmp", "masq"]);
        let compare = Attributes(&writer.bytes).nth(1).unwrap().1;
        let value = attribute(&attribute(&attribute(compare, 2), 3), 1);
        assert_eq!(value, b"br\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
}
