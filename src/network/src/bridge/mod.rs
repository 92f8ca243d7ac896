//! The built-in network: a bridge, an address and a wire for each pod, masquerade and host ports. Nothing to install.
//!
//! A pod is attached by one thread of its own, which asks the host's kernel side for the wire, moves into the pod's
//! namespace and configures it there. What is decided (addresses, ports) is on record before the kernel hears of it,
//! and goes off the record when the kernel has forgotten it.
//!
//! To delete a wire takes the kernel 10 ms and more, during which nobody else can change anything. But mostly the pod's
//! namespace goes right after the pod was detached, and takes the wire with it, many at a time. So detaching closes the
//! pod's ports, and leaves its wire and its addresses to a task that looks a little later what remains to be done.

mod address;
mod link;
mod nft;

use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::task::spawn_blocking;

pub use crate::subnet::Subnet;

use crate::attachment::{Attached, Attachment, PortMapping, Protocol};
use crate::error::Error;
use crate::netlink::Socket;
use crate::{netns, subnet};
use address::{Lease, Leases, Records, WIRE};
use link::Wire;
use nft::{Forward, Table};

/// How long a wire may take to go by itself.
const GRACE: Duration = Duration::from_millis(250);
/// How long to wait when it could not be deleted.
const RETRY: Duration = Duration::from_secs(5);

/// How the bridge is set up.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The bridge's name, which the nftables table carries as well.
    pub name: String,
    /// One subnet, or two for dual stack. None: those that the kubelet tells.
    pub subnets: Vec<Subnet>,
    /// The largest packet; the kernel's default when absent.
    pub mtu: Option<u32>,
    /// Whether pods reach the world under the node's address.
    pub masquerade: bool,
    /// Where addresses are kept, one directory per bridge; should not outlive a reboot, as the bridge does not.
    pub state_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: "crisp0".into(),
            subnets: Vec::new(),
            mtu: None,
            masquerade: true,
            state_dir: "/run/crisp/network".into(),
        }
    }
}

/// The node's built-in network.
#[derive(Debug)]
pub struct Bridge(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: Config,
    table: Table,
    records: Records,
    subnets: Mutex<Vec<Subnet>>,
    leases: Mutex<Leases>,
    /// Pods that were attached, or began to be, and are not detached: these are never collected.
    active: Mutex<HashSet<String>>,
    /// The bridge's index, once it is known to be there. Held while it is made, so that it is made once.
    index: Mutex<Option<u32>>,
    /// Whether there is a task that looks after what is leaving.
    reaping: AtomicBool,
    /// Held while wires are deleted and addresses freed.
    burying: Mutex<()>,
}

impl Bridge {
    /// Reads what is remembered. Nothing is made before the first pod comes.
    pub fn open(config: Config) -> Result<Bridge, Error> {
        check_name(&config.name)?;
        check_subnets(&config.subnets)?;
        let records = Records::open(config.state_dir.join(&config.name))?;
        let leases = records.read()?;
        let subnets = if config.subnets.is_empty() { records.read_subnets() } else { config.subnets.clone() };
        Ok(Bridge(Arc::new(Shared {
            table: Table::of(&config.name).map_err(opening)?,
            records,
            subnets: Mutex::new(subnets),
            leases: Mutex::new(leases),
            active: Mutex::default(),
            index: Mutex::default(),
            reaping: AtomicBool::new(false),
            burying: Mutex::default(),
            config,
        })))
    }

    /// How it was set up.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Gives the pod an address of every subnet, a wire and its host ports. Attached again, a pod keeps its
    /// addresses.
    pub async fn attach(&self, attachment: &Attachment) -> Result<Attached, Error> {
        let (shared, pod) = (self.0.clone(), attachment.clone());
        let done = on_own_thread(move || {
            let lease = shared.prepare(&pod)?;
            shared.plug(&pod, &lease)
        })
        .await;
        if done.is_err() {
            // From here, because that thread may have ended inside the pod. What this cannot take away is on
            // record, and left for the caller's detach.
            let _ = self.detach(attachment).await;
        }
        done
    }

    /// Closes the pod's ports, and sees to it that its wire goes within a moment and its addresses after it.
    /// Succeeds when all is gone already.
    pub async fn detach(&self, attachment: &Attachment) -> Result<(), Error> {
        let (shared, pod) = (self.0.clone(), attachment.pod_id.clone());
        blocking(move || shared.detach(&pod)).await?;
        if !self.0.reaping.swap(true, Ordering::AcqRel) {
            tokio::spawn(look_after(self.0.clone()));
        }
        Ok(())
    }

    /// Whether the pod still has its address and its wire.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), Error> {
        let (shared, pod) = (self.0.clone(), attachment.pod_id.clone());
        blocking(move || shared.check(&pod)).await
    }

    /// Takes away what belongs to no live pod, and puts the rules back if somebody flushed them.
    pub async fn gc(&self, live: &[String]) -> Result<(), Error> {
        let (shared, live) = (self.0.clone(), live.to_vec());
        blocking(move || shared.gc(&live)).await
    }

    /// Whether there is a subnet.
    pub fn status(&self) -> Result<(), String> {
        match lock(&self.0.subnets).is_empty() {
            true => Err("the bridge has no subnets, and the kubelet told none yet".into()),
            false => Ok(()),
        }
    }

    /// Takes the subnets from the kubelet where the configuration names none.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<(), Error> {
        if cidr.trim().is_empty() || !self.0.config.subnets.is_empty() {
            return Ok(());
        }
        let subnets = subnet::list(cidr)?;
        check_subnets(&subnets)?;
        let shared = self.0.clone();
        blocking(move || {
            shared.records.write_subnets(&subnets)?;
            if *lock(&shared.subnets) != subnets {
                *lock(&shared.subnets) = subnets;
                // The next pod finds the bridge wanting and gives it its new addresses.
                *lock(&shared.index) = None;
            }
            Ok(())
        })
        .await
    }

    /// Removes the bridge and its rules when no pod is left on it. Returns whether it did.
    pub async fn teardown(&self) -> Result<bool, Error> {
        let shared = self.0.clone();
        blocking(move || shared.teardown()).await
    }
}

impl Shared {
    /// Decides what the pod gets, and takes away what an earlier attachment of it may have left half done.
    fn prepare(&self, pod: &Attachment) -> Result<Lease, Error> {
        if pod.pod_id.is_empty() || pod.pod_id.len() > 256 {
            return Err(Error::Attachment { pod: pod.pod_id.clone(), reason: "bad id".into() });
        }
        let subnets = lock(&self.subnets).clone();
        if subnets.is_empty() {
            return Err(Error::NotReady("the bridge has no subnets".into()));
        }
        lock(&self.active).insert(pod.pod_id.clone());
        let known = lock(&self.leases).get(&pod.pod_id).cloned();
        if let Some(lease) = known {
            self.close(&lease)?;
            link::delete(&mut socket()?, &lease.wire(&self.config.name))?;
        }
        let mut lease = lock(&self.leases).take(&pod.pod_id, &subnets, &pod.ports);
        if matches!(lease, Err(Error::Exhausted(_))) {
            // Those that are leaving may be all that is missing.
            self.reap()?;
            lease = lock(&self.leases).take(&pod.pod_id, &subnets, &pod.ports);
        }
        let lease = lease?;
        lease.ports.iter().try_for_each(|port| address::reachable(port, &lease.ips))?;
        lease.ports.iter().try_for_each(address::probe)?;
        self.records.write(&lease)?;
        Ok(lease)
    }

    /// Does what was decided. The thread that it is called on ends in the pod's namespace.
    fn plug(&self, pod: &Attachment, lease: &Lease) -> Result<Attached, Error> {
        let namespace = netns::open(&pod.netns)?;
        let bridge = self.ensure()?;
        let wire = Wire {
            name: &lease.wire(&self.config.name),
            netns: &namespace,
            mac: lease.ips.first().map(|ip| link::mac(*ip)).unwrap_or_default(),
            mtu: self.config.mtu,
        };
        let mut host = socket()?;
        link::add_wire(&mut host, &wire).map_err(|refusal| refusal.to("make a wire to the pod"))?;
        self.forward(lease)?;
        // From here on this thread is inside. A socket stays where it was opened.
        netns::enter(&namespace).map_err(|cause| Error::Netns {
            act: "enter",
            path: pod.netns.clone(),
            cause,
        })?;
        let addresses = self.addresses(lease);
        if lease.ips.iter().any(IpAddr::is_ipv6) {
            // Whoever claims to be a router on the bridge is another pod (CVE-2020-10749).
            netns::sysctl(&format!("net/ipv6/conf/{}/accept_ra", link::INTERFACE), "0")?;
        }
        let mut inside = socket()?;
        link::configure(&mut inside, &addresses)?;
        // A limit is on the sender's side of the wire. A pod that may administer its network can lift its own.
        if let Some(bits) = pod.bandwidth.and_then(|limits| limits.egress) {
            link::limit(&mut inside, link::INTERFACE, bits)?;
        }
        if let Some(bits) = pod.bandwidth.and_then(|limits| limits.ingress) {
            link::limit(&mut host, wire.name, bits)?;
        }
        link::join(&mut host, wire.name, bridge)
            .map_err(|refusal| refusal.to("put the pod on the bridge"))?;
        Ok(self.summary(pod, &wire, &addresses))
    }

    fn detach(&self, pod: &str) -> Result<(), Error> {
        let lease = lock(&self.leases).get(pod).cloned();
        if let Some(lease) = lease {
            self.close(&lease)?;
            lock(&self.leases).leave(pod);
        }
        lock(&self.active).remove(pod);
        Ok(())
    }

    /// Deletes the wires that have not gone by themselves, and frees their addresses: no sooner, as the old pod
    /// could still answer to them.
    fn reap(&self) -> Result<(), Error> {
        // One at a time: what the second wants to bury, a new pod may have already.
        let _alone = lock(&self.burying);
        let leaving = lock(&self.leases).leaving().to_vec();
        let mut host = socket()?;
        let mut first_error = None;
        for lease in leaving {
            if let Err(error) = self.bury(&mut host, &lease) {
                first_error = first_error.or(Some(error));
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn bury(&self, host: &mut Socket, lease: &Lease) -> Result<(), Error> {
        let wire = lease.wire(&self.config.name);
        if link::find(host, &wire).map_err(|refusal| refusal.to("find a wire"))?.is_some() {
            link::delete(host, &wire)?;
        }
        self.records.remove(lease)?;
        lock(&self.leases).release(lease);
        Ok(())
    }

    fn close(&self, lease: &Lease) -> Result<(), Error> {
        let forwards = forwards(lease);
        if forwards.is_empty() {
            return Ok(());
        }
        self.table.remove(&forwards).map_err(|refusal| refusal.to("close host ports"))?;
        self.forget_connections(lease)
    }

    fn forward(&self, lease: &Lease) -> Result<(), Error> {
        let forwards = forwards(lease);
        if forwards.is_empty() {
            return Ok(());
        }
        self.table.add(&forwards).map_err(|refusal| refusal.to("open host ports"))?;
        self.forget_connections(lease)
    }

    fn forget_connections(&self, lease: &Lease) -> Result<(), Error> {
        for port in lease.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
            self.table
                .forget_connections(port)
                .map_err(|refusal| refusal.to("forget connections to a host port"))?;
        }
        Ok(())
    }

    fn check(&self, pod: &str) -> Result<(), Error> {
        let gone = |what: &str| Error::NoAddress(format!("{}: pod {pod} has no {what}", self.config.name));
        let lease = lock(&self.leases).get(pod).cloned().ok_or_else(|| gone("address"))?;
        let name = lease.wire(&self.config.name);
        let mut host = socket()?;
        let bridge =
            link::find(&mut host, &self.config.name).map_err(|refusal| refusal.to("find the bridge"))?;
        let bridge = bridge.ok_or_else(|| gone("bridge"))?.header.index;
        match link::ports(&mut host, bridge)?.contains(&name) {
            true => Ok(()),
            false => Err(gone("wire")),
        }
    }

    fn gc(&self, live: &[String]) -> Result<(), Error> {
        let dead: Vec<String> = {
            let active = lock(&self.active);
            let leases = lock(&self.leases);
            let pods = leases.all().map(|lease| lease.pod.clone());
            pods.filter(|pod| !active.contains(pod) && !live.contains(pod)).collect()
        };
        dead.iter().try_for_each(|pod| self.detach(pod))?;
        self.reap()?;
        let mut host = socket()?;
        let bridge =
            link::find(&mut host, &self.config.name).map_err(|refusal| refusal.to("find the bridge"))?;
        let Some(bridge) = bridge else { return Ok(()) };
        // First the wires, then who has one: a pod has its lease before its wire.
        let wires = link::ports(&mut host, bridge.header.index)?;
        let known: HashSet<String> = {
            let leases = lock(&self.leases);
            leases.all().chain(leases.leaving()).map(|lease| lease.wire(&self.config.name)).collect()
        };
        for wire in wires.iter().filter(|wire| wire.starts_with(WIRE) && !known.contains(*wire)) {
            link::delete(&mut host, wire)?;
        }
        if known.is_empty() { Ok(()) } else { self.ensure().map(|_| ()) }
    }

    fn teardown(&self) -> Result<bool, Error> {
        self.reap()?;
        let mut index = lock(&self.index);
        if lock(&self.leases).all().next().is_some() {
            return Ok(false);
        }
        *index = None;
        self.table.delete().map_err(|refusal| refusal.to("delete the table of host ports"))?;
        let mut host = socket()?;
        let found =
            link::find(&mut host, &self.config.name).map_err(|refusal| refusal.to("find the bridge"))?;
        // A link of that name that is no bridge was not made by us.
        if found.as_ref().is_some_and(link::is_bridge) {
            link::delete(&mut host, &self.config.name)?;
        }
        Ok(true)
    }

    /// Makes sure that the bridge and its rules are there, as somebody may have removed either, and returns the
    /// bridge's index.
    fn ensure(&self) -> Result<u32, Error> {
        let mut host = socket()?;
        let known = *lock(&self.index);
        if known.is_some() && self.present(&mut host)? == known {
            return known.ok_or_else(|| Error::NotReady("no bridge".into()));
        }
        let mut index = lock(&self.index);
        if index.is_some() && self.present(&mut host)? == *index {
            return index.ok_or_else(|| Error::NotReady("no bridge".into()));
        }
        let subnets = lock(&self.subnets).clone();
        let name = &self.config.name;
        let gateways: Vec<(IpAddr, u8)> = subnets.iter().map(|s| (s.gateway(), s.prefix())).collect();
        let made = link::ensure_bridge(&mut host, name, self.config.mtu, &gateways)?;
        settings(name, &subnets)?;
        let forwards: Vec<Forward> = lock(&self.leases).all().flat_map(forwards).collect();
        let rebuilt = self.table.rebuild(&subnets, self.config.masquerade, &forwards);
        rebuilt.map_err(|refusal| refusal.to("make the table of host ports"))?;
        *index = Some(made);
        Ok(made)
    }

    fn present(&self, host: &mut Socket) -> Result<Option<u32>, Error> {
        let found = link::find(host, &self.config.name).map_err(|refusal| refusal.to("find the bridge"))?;
        let table = self.table.exists().map_err(|refusal| refusal.to("find the table of host ports"))?;
        Ok(found.filter(|_| table).map(|link| link.header.index))
    }

    /// The pod's addresses, each with the length of its prefix and its gateway.
    fn addresses(&self, lease: &Lease) -> Vec<(IpAddr, u8, IpAddr)> {
        let subnets = lock(&self.subnets).clone();
        let one = |ip: &IpAddr| {
            let subnet = subnets.iter().find(|subnet| subnet.contains(*ip))?;
            Some((*ip, subnet.prefix(), subnet.gateway()))
        };
        lease.ips.iter().filter_map(one).collect()
    }

    fn summary(&self, pod: &Attachment, wire: &Wire<'_>, addresses: &[(IpAddr, u8, IpAddr)]) -> Attached {
        let mac = wire.mac.map(|byte| format!("{byte:02x}")).join(":");
        let ips: Vec<_> = addresses
            .iter()
            .map(|(ip, prefix, gateway)| {
                json!({"address": format!("{ip}/{prefix}"), "gateway": gateway, "interface": 2})
            })
            .collect();
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": self.config.name}, {"name": wire.name},
                           {"name": link::INTERFACE, "mac": mac, "sandbox": pod.netns}],
            "ips": ips,
        });
        let ips = addresses.iter().map(|(ip, ..)| *ip).collect();
        Attached { ips, interface: link::INTERFACE.to_owned(), mac, result }
    }
}

/// A port of the host leads to the pod's first address of each family that the port is for.
fn forwards(lease: &Lease) -> Vec<Forward> {
    let fits = |port: &PortMapping, pod: &IpAddr| port.host_ip.is_none_or(|ip| ip.is_ipv4() == pod.is_ipv4());
    let mut found = Vec::new();
    for port in &lease.ports {
        for is_ipv4 in [true, false] {
            let pod = lease.ips.iter().find(|ip| ip.is_ipv4() == is_ipv4);
            found.extend(pod.filter(|pod| fits(port, pod)).map(|pod| Forward { port: *port, pod: *pod }));
        }
    }
    found
}

/// The kernel's settings without which a bridge is not a gateway.
fn settings(bridge: &str, subnets: &[Subnet]) -> Result<(), Error> {
    if subnets.iter().any(Subnet::is_ipv4) {
        set("net/ipv4/ip_forward", "1")?;
        // For connections to 127.0.0.1 that lead to a pod; the table keeps the pods out of the loopback.
        set(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")?;
    }
    if subnets.iter().any(|subnet| !subnet.is_ipv4()) {
        set(&format!("net/ipv6/conf/{bridge}/accept_ra"), "0")?;
        if value("net/ipv6/conf/all/forwarding") == "0" {
            // A host that forwards stops listening to its own routers, and loses its way, unless told otherwise.
            for entry in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
                let name = format!("net/ipv6/conf/{}/accept_ra", entry.file_name().to_string_lossy());
                if value(&name) == "1" {
                    set(&name, "2")?;
                }
            }
            set("net/ipv6/conf/all/forwarding", "1")?;
        }
    }
    Ok(())
}

fn set(name: &str, wanted: &str) -> Result<(), Error> {
    if value(name) == wanted { Ok(()) } else { netns::sysctl(name, wanted) }
}

fn value(name: &str) -> String {
    fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default().trim().to_owned()
}

/// The name becomes a link, a table, a directory and the path of settings.
fn check_name(name: &str) -> Result<(), Error> {
    let good = name.len() < libc::IFNAMSIZ
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        && !["all", "default", "lo"].contains(&name);
    if good { Ok(()) } else { Err(Error::Config(format!("{name:?} cannot be the name of a bridge"))) }
}

fn check_subnets(subnets: &[Subnet]) -> Result<(), Error> {
    for (at, subnet) in subnets.iter().enumerate() {
        if subnet.pods() == 0 {
            return Err(Error::Config(format!("subnet {subnet} has no room for a pod")));
        }
        if subnets.iter().take(at).any(|other| other.overlaps(subnet)) {
            return Err(Error::Config(format!("subnet {subnet} overlaps another one")));
        }
    }
    Ok(())
}

fn socket() -> Result<Socket, Error> {
    Socket::route().map_err(opening)
}

fn opening(cause: std::io::Error) -> Error {
    Error::Netlink { act: "open a netlink socket".into(), cause, hint: String::new() }
}

/// Waits a little, does what is left to do, and ends when nothing is.
async fn look_after(shared: Arc<Shared>) {
    let mut wait = GRACE;
    loop {
        tokio::time::sleep(wait).await;
        let reaper = shared.clone();
        wait = match blocking(move || reaper.reap()).await {
            Ok(()) => GRACE,
            Err(error) => {
                tracing::warn!(%error, "a wire of a pod that is gone remains for now");
                RETRY
            }
        };
        if lock(&shared.leases).leaving().is_empty() {
            shared.reaping.store(false, Ordering::Release);
            // Who left between the look and the store relies on us.
            if lock(&shared.leases).leaving().is_empty() || shared.reaping.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work).await.unwrap_or_else(|e| Err(Error::Worker(e.to_string())))
}

/// Runs work on a thread that may end in another namespace, and so is nobody else's.
async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("attach".into()).stack_size(256 << 10).spawn(move || {
        // Who asked may be gone; what was done is on record.
        let _ = sender.send(work());
    });
    thread.map_err(|e| Error::Worker(e.to_string()))?;
    receiver.await.unwrap_or_else(|e| Err(Error::Worker(e.to_string())))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
