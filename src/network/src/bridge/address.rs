//! Who has which address and which port of the host. Decides in memory; what is decided stands in a directory, one
//! file per address, written by rename. What the kernel is told about it is the business of `link` and `nft`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::attachment::{PortMapping, Protocol};
use crate::error::Error;
use crate::subnet::Subnet;

/// What the names of our wires begin with.
pub(crate) const WIRE: &str = "cr";

/// What one pod has. Also what its files hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) pod: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) ports: Vec<PortMapping>,
}

impl Lease {
    /// The name of the host's end of the pod's wire. It follows from the address, which no other pod gets before
    /// the wire is gone.
    pub(crate) fn wire(&self, bridge: &str) -> String {
        let address = match self.ips.first() {
            Some(IpAddr::V4(ip)) => ip.to_bits(),
            Some(IpAddr::V6(ip)) => ip.to_bits() as u32,
            None => 0,
        };
        // FNV-1a, of which 16 bits tell bridges apart.
        let hash = bridge
            .bytes()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        format!("{WIRE}{:04x}{address:08x}", hash >> 16)
    }
}

/// All leases, and where to look for the next free address: not at the lowest but behind the last one, so that
/// an address rests a while before it comes back and old connections to it have died.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    pods: HashMap<String, Lease>,
    /// Leases whose pods are gone while the kernel still has their wires.
    leaving: Vec<Lease>,
    owners: HashMap<IpAddr, String>,
    cursors: HashMap<IpAddr, u32>,
}

impl Leases {
    /// Gives the pod an address of every subnet, and its ports. A pod that has a lease keeps its addresses.
    pub(crate) fn take(
        &mut self,
        pod: &str,
        subnets: &[Subnet],
        ports: &[PortMapping],
    ) -> Result<Lease, Error> {
        let ports: Vec<PortMapping> = ports.iter().filter(|port| port.host_port != 0).copied().collect();
        self.check_ports(pod, &ports)?;
        let ips = match self.pods.get(pod) {
            Some(lease) => lease.ips.clone(),
            None => {
                let ips: Result<Vec<IpAddr>, Error> =
                    subnets.iter().map(|subnet| self.next(subnet)).collect();
                ips?
            }
        };
        let lease = Lease { pod: pod.to_owned(), ips, ports };
        self.insert(lease.clone());
        Ok(lease)
    }

    pub(crate) fn get(&self, pod: &str) -> Option<&Lease> {
        self.pods.get(pod)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Lease> {
        self.pods.values()
    }

    /// The pod is no more. Its ports are free; its addresses stay taken until they are released.
    pub(crate) fn leave(&mut self, pod: &str) {
        if let Some(mut lease) = self.pods.remove(pod) {
            lease.ports.clear();
            self.leaving.push(lease);
        }
    }

    pub(crate) fn leaving(&self) -> &[Lease] {
        &self.leaving
    }

    /// Frees the addresses of a lease that is leaving.
    pub(crate) fn release(&mut self, lease: &Lease) {
        self.leaving.retain(|leaving| leaving.ips != lease.ips);
        for ip in &lease.ips {
            self.owners.remove(ip);
        }
    }

    fn insert(&mut self, lease: Lease) {
        for ip in &lease.ips {
            self.owners.insert(*ip, lease.pod.clone());
        }
        let before = self.pods.insert(lease.pod.clone(), lease.clone());
        // A pod that was detached and attached again, by a daemon that died in between.
        self.leaving.extend(before.filter(|before| before.ips != lease.ips));
    }

    fn next(&mut self, subnet: &Subnet) -> Result<IpAddr, Error> {
        let pods = subnet.pods();
        let cursor = self.cursors.entry(subnet.address()).or_default();
        for step in 0..pods {
            let number = (*cursor + step) % pods;
            let ip = subnet.pod(number);
            if !self.owners.contains_key(&ip) {
                *cursor = (number + 1) % pods;
                return Ok(ip);
            }
        }
        Err(Error::Exhausted(subnet.to_string()))
    }

    fn check_ports(&self, pod: &str, wanted: &[PortMapping]) -> Result<(), Error> {
        for (at, port) in wanted.iter().enumerate() {
            let others = self.pods.values().filter(|lease| lease.pod != pod);
            let theirs =
                others.flat_map(|lease| lease.ports.iter().map(move |port| (lease.pod.as_str(), port)));
            let own = wanted.iter().take(at).map(|port| (pod, port));
            if let Some((holder, _)) = theirs.chain(own).find(|(_, other)| clash(port, other)) {
                return Err(taken(port, format!("pod {holder}")));
            }
        }
        Ok(())
    }
}

/// Two ports clash when they are of one number and protocol, and no address keeps them apart.
fn clash(one: &PortMapping, two: &PortMapping) -> bool {
    let apart = match (one.host_ip, two.host_ip) {
        (Some(one), Some(two)) if one.is_unspecified() || two.is_unspecified() => {
            one.is_ipv4() != two.is_ipv4()
        }
        (Some(one), Some(two)) => one != two,
        _ => false,
    };
    one.host_port == two.host_port && one.protocol == two.protocol && !apart
}

pub(crate) fn taken(port: &PortMapping, holder: String) -> Error {
    let PortMapping { protocol, host_port, host_ip, .. } = *port;
    Error::PortTaken { protocol, port: host_port, host_ip, holder }
}

/// The directory of leases.
#[derive(Clone, Debug)]
pub(crate) struct Records(PathBuf);

impl Records {
    pub(crate) fn open(dir: PathBuf) -> Result<Records, Error> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|cause| Error::Record { act: "create", path: dir.clone(), cause })?;
        Ok(Records(dir))
    }

    /// Reads all leases. A file that cannot be understood keeps its address taken, by a pod of no name, until it
    /// is collected.
    pub(crate) fn read(&self) -> Result<Leases, Error> {
        let mut leases = Leases::default();
        let failed = |cause| Error::Record { act: "read", path: self.0.clone(), cause };
        for entry in fs::read_dir(&self.0).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(ip) = path.file_name().and_then(|name| name.to_str()?.parse::<IpAddr>().ok()) else {
                if path.extension().is_some_and(|e| e == "new") {
                    let _ = fs::remove_file(&path);
                }
                continue;
            };
            let lease = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Lease>(&text).ok());
            match lease {
                Some(lease) if lease.ips.contains(&ip) => leases.insert(lease),
                _ => {
                    warn!(path = %path.display(), "an address is taken by nobody knows whom");
                    let nobody = Lease { pod: String::new(), ips: vec![ip], ports: Vec::new() };
                    leases.insert(nobody);
                }
            }
        }
        Ok(leases)
    }

    pub(crate) fn write(&self, lease: &Lease) -> Result<(), Error> {
        for ip in &lease.ips {
            let path = self.0.join(ip.to_string());
            let failed = |cause| Error::Record { act: "write", path: path.clone(), cause };
            let temporary = self.0.join(format!("{ip}.new"));
            let text = serde_json::to_vec(lease).map_err(|e| failed(e.into()))?;
            fs::write(&temporary, text).map_err(failed)?;
            fs::rename(&temporary, &path).map_err(failed)?;
        }
        Ok(())
    }

    pub(crate) fn remove(&self, lease: &Lease) -> Result<(), Error> {
        for ip in &lease.ips {
            remove_file(&self.0.join(ip.to_string()))?;
        }
        Ok(())
    }

    /// The subnets that the kubelet told last.
    pub(crate) fn read_subnets(&self) -> Vec<Subnet> {
        let text = fs::read_to_string(self.0.join("subnets")).unwrap_or_default();
        crate::subnet::list(&text).unwrap_or_default()
    }

    pub(crate) fn write_subnets(&self, subnets: &[Subnet]) -> Result<(), Error> {
        let path = self.0.join("subnets");
        let failed = |cause| Error::Record { act: "write", path: path.clone(), cause };
        let text: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
        let temporary = path.with_extension("new");
        fs::write(&temporary, text.join(",")).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)
    }
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::Record { act: "remove", path: path.to_owned(), cause: e })
        }
        _ => Ok(()),
    }
}

/// Whether an address of the host can lead to a pod with these addresses. Linux forwards what is sent to 127/8 where
/// it is told to (route_localnet), and never what is sent to ::1.
pub(crate) fn reachable(port: &PortMapping, pod: &[IpAddr]) -> Result<(), Error> {
    let Some(host_ip) = port.host_ip.filter(|ip| !ip.is_unspecified()) else { return Ok(()) };
    let why = match host_ip {
        IpAddr::V6(ip) if ip.is_loopback() => "the kernel forwards nothing from IPv6's loopback",
        ip if !pod.iter().any(|pod| pod.is_ipv4() == ip.is_ipv4()) => "the pod has no address of that family",
        _ => return Ok(()),
    };
    Err(Error::PortUnreachable { port: port.host_port, host_ip, why })
}

/// Whether a process of the host listens on the port: our rules would take its callers away from it.
pub(crate) fn probe(port: &PortMapping) -> Result<(), Error> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};
    let family = match port.host_ip {
        Some(IpAddr::V6(_)) => AddressFamily::INET6,
        _ => AddressFamily::INET,
    };
    let (kind, protocol) = match port.protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, ipproto::SCTP),
    };
    // A kernel without SCTP, or without IPv6, has nobody listening there.
    let Ok(socket) = socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol)) else { return Ok(()) };
    // Connections that linger in TIME_WAIT are no reason to refuse; for UDP the option would allow too much.
    if port.protocol != Protocol::Udp {
        let _ = sockopt::set_socket_reuseaddr(&socket, true);
    }
    let any = if family == AddressFamily::INET6 { "::" } else { "0.0.0.0" };
    let ip = port.host_ip.or_else(|| any.parse().ok()).unwrap_or(IpAddr::from([0, 0, 0, 0]));
    match bind(&socket, &std::net::SocketAddr::new(ip, port.host_port)) {
        Err(rustix::io::Errno::ADDRINUSE) => Err(taken(port, "a process of the host".into())),
        Err(errno) if port.host_ip.is_some() && errno == rustix::io::Errno::ADDRNOTAVAIL => {
            // An address that the host has not got yet, a floating one say.
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnets(text: &str) -> Vec<Subnet> {
        crate::subnet::list(text).unwrap()
    }

    fn release(leases: &mut Leases, pod: &str) {
        if let Some(lease) = leases.get(pod).cloned() {
            leases.leave(pod);
            leases.release(&lease);
        }
    }

    fn port(host_port: u16, protocol: Protocol, host_ip: &str) -> PortMapping {
        PortMapping { protocol, container_port: 80, host_port, host_ip: host_ip.parse().ok() }
    }

    #[test]
    fn an_address_of_the_host_leads_to_pods_of_its_family_and_ipv6s_loopback_to_none() {
        let (four, six) = (IpAddr::from([10, 0, 0, 2]), "fd00::2".parse().unwrap());
        for (host_ip, pod, fine) in [
            ("", &[four][..], true),
            ("0.0.0.0", &[six][..], true),
            ("127.0.0.1", &[four], true),
            ("127.0.0.1", &[six], false),
            ("192.0.2.1", &[four, six], true),
            ("2001:db8::1", &[four, six], true),
            ("2001:db8::1", &[four], false),
            ("::1", &[four, six], false),
            ("::1", &[four], false),
        ] {
            assert_eq!(reachable(&port(80, Protocol::Tcp, host_ip), pod).is_ok(), fine, "{host_ip} {pod:?}");
        }
    }

    #[test]
    fn a_pod_gets_one_address_of_every_subnet() {
        let lease = Leases::default().take("a", &subnets("10.0.0.0/24,fd00::/64"), &[]).unwrap();
        assert_eq!(lease.ips, ["10.0.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
    }

    #[test]
    fn an_address_rests_before_it_is_given_again() {
        let mut leases = Leases::default();
        let subnets = subnets("10.0.0.0/29");
        let mut seen = Vec::new();
        for pod in 0..6 {
            let lease = leases.take(&pod.to_string(), &subnets, &[]).unwrap();
            seen.push(lease.ips[0].to_string());
            release(&mut leases, &pod.to_string());
        }
        assert_eq!(seen, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.2"]);
    }

    #[test]
    fn a_full_subnet_says_so_and_takes_nothing() {
        let mut leases = Leases::default();
        let both = subnets("fd00::/64,10.0.0.0/30");
        leases.take("a", &both, &[]).unwrap();
        assert!(matches!(leases.take("b", &both, &[]), Err(Error::Exhausted(_))));
        assert_eq!(leases.owners.len(), 2);
        release(&mut leases, "a");
        leases.take("b", &both, &[]).unwrap();
    }

    #[test]
    fn taking_again_keeps_the_addresses() {
        let mut leases = Leases::default();
        let subnets = subnets("10.0.0.0/24");
        let ports = [port(80, Protocol::Tcp, "")];
        let first = leases.take("a", &subnets, &ports).unwrap();
        assert_eq!(leases.take("a", &subnets, &ports).unwrap(), first);
    }

    #[test]
    fn ports_clash_when_nothing_keeps_them_apart() {
        use Protocol::*;
        for (one, two, clashes) in [
            (port(80, Tcp, ""), port(80, Tcp, ""), true),
            (port(80, Tcp, ""), port(80, Udp, ""), false),
            (port(80, Tcp, ""), port(81, Tcp, ""), false),
            (port(80, Tcp, "10.0.0.1"), port(80, Tcp, ""), true),
            (port(80, Tcp, "10.0.0.1"), port(80, Tcp, "0.0.0.0"), true),
            (port(80, Tcp, "10.0.0.1"), port(80, Tcp, "10.0.0.2"), false),
            (port(80, Tcp, "10.0.0.1"), port(80, Tcp, "::"), false),
            (port(80, Tcp, "0.0.0.0"), port(80, Tcp, "::"), false),
            (port(80, Sctp, "::"), port(80, Sctp, "fd00::1"), true),
        ] {
            let mut leases = Leases::default();
            let subnets = subnets("10.0.0.0/24");
            leases.take("a", &subnets, &[one]).unwrap();
            assert_eq!(leases.take("b", &subnets, &[two]).is_err(), clashes, "{one:?} {two:?}");
            release(&mut leases, "b");
            assert!(leases.take("b", &subnets, &[one, two]).is_err(), "the first is taken");
            release(&mut leases, "a");
            assert_eq!(leases.take("b", &subnets, &[one, two]).is_err(), clashes, "within one pod");
        }
    }

    #[test]
    fn a_pod_that_leaves_frees_its_ports_at_once_and_its_addresses_later() {
        let mut leases = Leases::default();
        let subnets = subnets("10.0.0.0/30");
        let ports = [port(80, Protocol::Tcp, "")];
        let lease = leases.take("a", &subnets, &ports).unwrap();
        leases.leave("a");
        assert!(leases.get("a").is_none());
        assert!(matches!(leases.take("b", &subnets, &ports), Err(Error::Exhausted(_))));
        leases.release(&lease);
        assert_eq!(leases.take("b", &subnets, &ports).unwrap().ips, lease.ips);
        assert!(leases.leaving().is_empty());
    }

    #[test]
    fn wires_have_names_that_the_kernel_takes() {
        let wire = |bridge: &str, ip: &str| {
            Lease { pod: "a".into(), ips: vec![ip.parse().unwrap()], ports: Vec::new() }.wire(bridge)
        };
        assert!(wire("crisp0", "255.255.255.255").len() < libc::IFNAMSIZ);
        assert_ne!(wire("crisp0", "10.0.0.2"), wire("crisp1", "10.0.0.2"));
        assert_ne!(wire("crisp0", "10.0.0.2"), wire("crisp0", "10.0.0.3"));
        assert_ne!(wire("crisp0", "fd00::2"), wire("crisp0", "fd00::3"));
    }

    #[test]
    fn ports_without_a_host_port_are_nobodys() {
        let mut leases = Leases::default();
        let subnets = subnets("10.0.0.0/24");
        for pod in ["a", "b"] {
            assert_eq!(leases.take(pod, &subnets, &[port(0, Protocol::Tcp, "")]).unwrap().ports, []);
        }
    }

    #[test]
    fn leases_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("b")).unwrap();
        let mut leases = Leases::default();
        let lease =
            leases.take("a", &subnets("10.0.0.0/24,fd00::/64"), &[port(80, Protocol::Udp, "::1")]).unwrap();
        records.write(&lease).unwrap();
        records.write_subnets(&subnets("10.0.0.0/24,fd00::/64")).unwrap();
        fs::write(dir.path().join("b/10.0.0.9"), "garbage").unwrap();
        fs::write(dir.path().join("b/10.0.0.8.new"), "cut short").unwrap();
        let mut read = records.read().unwrap();
        assert_eq!(read.get("a"), Some(&lease));
        assert_eq!(read.get("").unwrap().ips, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert!(!dir.path().join("b/10.0.0.8.new").exists());
        assert_eq!(records.read_subnets(), subnets("10.0.0.0/24,fd00::/64"));
        let next = read.take("b", &subnets("10.0.0.0/24"), &[]).unwrap();
        assert_eq!(next.ips, ["10.0.0.3".parse::<IpAddr>().unwrap()]);
        records.remove(&lease).unwrap();
        records.remove(&lease).unwrap();
        assert!(records.read().unwrap().get("a").is_none());
    }

    #[test]
    fn a_listening_process_keeps_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = listener.local_addr().unwrap().port();
        assert!(matches!(probe(&port(number, Protocol::Tcp, "")), Err(Error::PortTaken { .. })));
        assert!(matches!(probe(&port(number, Protocol::Tcp, "127.0.0.1")), Err(Error::PortTaken { .. })));
        probe(&port(number, Protocol::Tcp, "127.0.0.2")).unwrap();
        drop(listener);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let number = socket.local_addr().unwrap().port();
        assert!(matches!(probe(&port(number, Protocol::Udp, "")), Err(Error::PortTaken { .. })));
    }

    proptest! {
        #[test]
        fn no_address_ever_has_two_owners(steps in proptest::collection::vec((0u8..12, any::<bool>()), 0..200)) {
            let mut leases = Leases::default();
            let subnets = subnets("10.0.0.0/28,fd00::/124");
            for (pod, take) in steps {
                let pod = pod.to_string();
                if take {
                    prop_assert!(leases.take(&pod, &subnets, &[]).is_ok());
                } else {
                    release(&mut leases, &pod);
                }
                let mut ips: Vec<IpAddr> = leases.all().flat_map(|lease| lease.ips.clone()).collect();
                let count = ips.len();
                ips.sort();
                ips.dedup();
                prop_assert_eq!(ips.len(), count);
                prop_assert_eq!(leases.owners.len(), count);
            }
        }
    }
}
