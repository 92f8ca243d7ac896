//! Namespaces: which ones a container gets, made or joined, and a pod's namespaces held as descriptors.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{At, Error, Failure, Step};
use crate::init::channel::{Channel, Report};
use crate::init::sysctl::{self, Sysctl};
use crate::kernel::{
    self, CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS, Cloned, check, setns,
};
use crate::spec::{IdMapping, NamespaceKind, Spec};

/// Which ids of a user namespace are which ids of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// User ids.
    pub uid: Vec<IdMapping>,
    /// Group ids.
    pub gid: Vec<IdMapping>,
}

/// The most lines that the kernel takes (user_namespaces(7)).
const LINES: usize = 340;

impl IdMaps {
    /// The host's number for a user of the container.
    pub fn host_uid(&self, id: u32) -> Result<u32, Error> {
        host_id(&self.uid, id).ok_or_else(|| Error::Invalid(format!("uid {id} is not mapped")))
    }

    /// The host's number for a group of the container.
    pub fn host_gid(&self, id: u32) -> Result<u32, Error> {
        host_id(&self.gid, id).ok_or_else(|| Error::Invalid(format!("gid {id} is not mapped")))
    }

    fn check(&self) -> Result<(), Error> {
        for map in [&self.uid, &self.gid] {
            if map.is_empty() || map.len() > LINES {
                return Err(Error::Invalid(format!("{} id mappings; 1 to {LINES} are possible", map.len())));
            }
            for line in map {
                let fits = |first: u32| line.size > 0 && first.checked_add(line.size).is_some();
                if !fits(line.container_id) || !fits(line.host_id) {
                    return Err(Error::Invalid(format!("id mapping {line:?} is empty or wraps")));
                }
            }
        }
        Ok(())
    }
}

fn host_id(map: &[IdMapping], id: u32) -> Option<u32> {
    map.iter().find_map(|line| {
        let offset = id.checked_sub(line.container_id).filter(|offset| *offset < line.size)?;
        line.host_id.checked_add(offset)
    })
}

/// Namespaces of a pod to be made.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// A new ipc namespace.
    pub ipc: bool,
    /// A new uts namespace.
    pub uts: bool,
    /// A new network namespace, its loopback interface up.
    pub net: bool,
    /// A new user namespace, which then owns the others.
    pub user: Option<&'a IdMaps>,
    /// Set in the new uts namespace, unless empty.
    pub hostname: &'a str,
    /// Set in the new uts namespace, unless empty.
    pub domainname: &'a str,
    /// Set in the new namespaces and in `net_join`.
    pub sysctls: Option<&'a BTreeMap<String, String>>,
    /// A network namespace that exists, whose sysctls are meant.
    pub net_join: Option<BorrowedFd<'a>>,
}

/// Namespaces that exist as long as these descriptors, and the containers that joined them.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Held {
    pub user: Option<OwnedFd>,
    pub ipc: Option<OwnedFd>,
    pub uts: Option<OwnedFd>,
    pub net: Option<OwnedFd>,
}

/// How long the short-lived child may take for what are a few system calls.
const LIMIT: i64 = 10_000;

/// Makes namespaces by a child that ends before this returns; nothing is mounted.
pub fn hold(wanted: &Wanted<'_>) -> Result<Held, Error> {
    let has = sysctl::Has { ipc: wanted.ipc, uts: wanted.uts, net: wanted.net || wanted.net_join.is_some() };
    let (mut late, mut sysctls) = (Vec::new(), Vec::new());
    for sysctl in sysctl::check(wanted.sysctls, has)? {
        // A namespace that the new user namespace does not own is set from outside of it.
        let outside = wanted.user.is_some() && !wanted.net && sysctl.is_net();
        if outside { late.push(sysctl) } else { sysctls.push(sysctl) }
    }
    let mut flags = 0;
    for (wanted, flag) in [
        (wanted.ipc, CLONE_NEWIPC),
        (wanted.uts, CLONE_NEWUTS),
        (wanted.net, CLONE_NEWNET),
        (wanted.user.is_some(), CLONE_NEWUSER),
    ] {
        flags |= if wanted { flag } else { 0 };
    }
    if let Some(maps) = wanted.user {
        maps.check()?;
    }
    let net_join = if wanted.user.is_some() { None } else { wanted.net_join };
    let held = if flags != 0 || !sysctls.is_empty() {
        let act = Act { flags, net_join, sysctls, wanted };
        act.run()?
    } else {
        Held::default()
    };
    if !late.is_empty() {
        let plain = Wanted { net_join: wanted.net_join, ..Wanted::default() };
        Act { flags: 0, net_join: wanted.net_join, sysctls: late, wanted: &plain }.run()?;
    }
    Ok(held)
}

/// A user namespace with this mapping and nothing else.
pub(crate) fn mapped(maps: &IdMaps) -> Result<OwnedFd, Error> {
    let held = hold(&Wanted { user: Some(maps), ..Wanted::default() })?;
    Ok(held.user.ok_or(Errno::NOENT).at(Step::Namespace, "user")?)
}

/// One short-lived child.
struct Act<'a> {
    flags: u64,
    net_join: Option<BorrowedFd<'a>>,
    sysctls: Vec<Sysctl>,
    wanted: &'a Wanted<'a>,
}

impl Act<'_> {
    fn run(&self) -> Result<Held, Error> {
        let procfs = if self.sysctls.is_empty() { None } else { Some(sysctl::procfs()?) };
        let (parent, child) = Channel::pair().at(Step::Channel, "namespace child")?;
        // SAFETY: the crate's contract is one thread; the child leaves by `kernel::exit` below.
        let cloned = unsafe { kernel::clone(self.flags, None) }.at(Step::Clone, "namespace child")?;
        let (pid, pidfd) = match cloned {
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
            Cloned::Child => {
                drop(parent);
                kernel::never_return(|| {
                    let done = self.child(&child, procfs.as_ref().map(OwnedFd::as_fd));
                    let _ = child.send(&done.map_or_else(Report::Failed, |()| Report::Ready));
                    // The parent opens what it wants to keep, then kills us.
                    let _ = child.wait();
                })
            }
        };
        drop(child);
        let held = self.parent(pid, &parent);
        kernel::kill_and_reap(&pidfd);
        held
    }

    fn child(&self, channel: &Channel, procfs: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        channel.wait().at(Step::Wait, "namespace child")?;
        kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Descriptors, "namespace child")?;
        // A mapping that only shifts the ids of a mount need not have a root.
        let has_root = |maps: &IdMaps| maps.host_uid(0).is_ok() && maps.host_gid(0).is_ok();
        if self.flags & CLONE_NEWUSER != 0 && self.wanted.user.is_some_and(has_root) {
            crate::init::user::become_root()?;
        }
        if let Some(net) = self.net_join {
            setns(net, CLONE_NEWNET).at(Step::Namespace, "network")?;
        }
        if self.flags & CLONE_NEWNET != 0 {
            loopback_up().at(Step::Loopback, "lo")?;
        }
        if self.flags & CLONE_NEWUTS != 0 {
            name_host(self.wanted.hostname, self.wanted.domainname)?;
        }
        match procfs {
            Some(procfs) => sysctl::apply(procfs, &self.sysctls),
            None => Ok(()),
        }
    }

    fn parent(&self, pid: u32, channel: &Channel) -> Result<Held, Error> {
        if let Some(maps) = self.wanted.user.filter(|_| self.flags & CLONE_NEWUSER != 0) {
            write_maps(pid, maps)?;
        }
        channel.go().at(Step::Channel, "namespace child")?;
        crate::create::poll(channel.as_fd(), LIMIT).at(Step::Wait, "namespace child")?;
        match channel.receive().at(Step::Wait, "namespace child")? {
            Some(Report::Ready) => {}
            Some(Report::Failed(failure)) => return Err(failure.into()),
            _ => return Err(Error::Died { waiting_for: "ready" }),
        }
        let open = |flag: u64, kind: &str| -> Result<Option<OwnedFd>, Failure> {
            if self.flags & flag == 0 {
                return Ok(None);
            }
            kernel::open_host(Path::new(&format!("/proc/{pid}/ns/{kind}")))
                .at(Step::Namespace, kind)
                .map(Some)
        };
        Ok(Held {
            user: open(CLONE_NEWUSER, "user")?,
            ipc: open(CLONE_NEWIPC, "ipc")?,
            uts: open(CLONE_NEWUTS, "uts")?,
            net: open(CLONE_NEWNET, "net")?,
        })
    }
}

/// Writes the mapping of a child's new user namespace, with the host's rights (user_namespaces(7)).
fn write_maps(pid: u32, maps: &IdMaps) -> Result<(), Failure> {
    for (file, map) in [("uid_map", &maps.uid), ("gid_map", &maps.gid)] {
        let mut text = String::new();
        for IdMapping { container_id, host_id, size } in map {
            let _ = writeln!(text, "{container_id} {host_id} {size}");
        }
        write_proc(pid, file, &text).at(Step::IdMap, format_args!("process {pid}, {file}"))?;
    }
    Ok(())
}

/// The mapping of a user namespace, as its members and we see it.
fn read_maps(user: BorrowedFd<'_>) -> Result<IdMaps, Error> {
    let (parent, child) = Channel::pair().at(Step::Channel, "namespace child")?;
    // SAFETY: the crate's contract is one thread; the child leaves by `kernel::exit` below.
    let cloned = unsafe { kernel::clone(0, None) }.at(Step::Clone, "namespace child")?;
    let (pid, pidfd) = match cloned {
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
        Cloned::Child => {
            drop(parent);
            kernel::never_return(|| {
                let joined = setns(user, CLONE_NEWUSER).at(Step::Namespace, "user");
                let _ = child.send(&joined.map_or_else(Report::Failed, |()| Report::Ready));
                let _ = child.wait();
            })
        }
    };
    drop(child);
    let read = || {
        crate::create::poll(parent.as_fd(), LIMIT).at(Step::Wait, "namespace child")?;
        match parent.receive().at(Step::Wait, "namespace child")? {
            Some(Report::Ready) => {}
            Some(Report::Failed(failure)) => return Err(failure.into()),
            _ => return Err(Error::Died { waiting_for: "ready" }),
        }
        let map = |file: &str| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
                .at(Step::IdMap, file)?;
            Ok::<_, Error>(text.lines().take(LINES).filter_map(map_line).collect())
        };
        Ok(IdMaps { uid: map("uid_map")?, gid: map("gid_map")? })
    };
    let maps = read();
    kernel::kill_and_reap(&pidfd);
    maps
}

fn map_line(line: &str) -> Option<IdMapping> {
    let mut numbers = line.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(IdMapping { container_id: next()?, host_id: next()?, size: next()? })
}

/// Writes a file of another process below our own, trusted `/proc`.
pub(crate) fn write_proc(pid: u32, file: &str, text: &str) -> Result<(), Errno> {
    let path = format!("/proc/{pid}/{file}");
    let fd = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&fd, text.as_bytes()).map(drop)
}

/// Sets the names of this uts namespace; empty ones stay.
pub(crate) fn name_host(host: &str, domain: &str) -> Result<(), Failure> {
    if !host.is_empty() {
        rustix::system::sethostname(host.as_bytes()).at(Step::Hostname, host)?;
    }
    if !domain.is_empty() {
        rustix::system::setdomainname(domain.as_bytes()).at(Step::Hostname, domain)?;
    }
    Ok(())
}

/// Brings up `lo` of this network namespace (netdevice(7)).
fn loopback_up() -> Result<(), Errno> {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }
    const { assert!(size_of::<Request>() == 40) };
    let mut name = [0; 16];
    name[..2].copy_from_slice(b"lo");
    let request = Request { name, flags: (libc::IFF_UP | libc::IFF_RUNNING) as i16, rest: [0; 22] };
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: SIOCSIFFLAGS reads a `struct ifreq`, which ours has the size and the layout of.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }.into())
        .map(drop)
}

/// Namespaces that the caller holds and that a container joins, whatever its specification says.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Join<'a> {
    pub user: Option<BorrowedFd<'a>>,
    pub ipc: Option<BorrowedFd<'a>>,
    pub uts: Option<BorrowedFd<'a>>,
    pub net: Option<BorrowedFd<'a>>,
    pub pid: Option<BorrowedFd<'a>>,
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// What a container does about each kind of namespace. The host's are simply not mentioned.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Flags of namespaces to be made at the clone.
    pub(crate) make: u64,
    /// Joined by the child.
    pub(crate) join: Vec<(OwnedFd, u64, &'static str)>,
    /// Joined by way of the parent, since only children enter a pid namespace.
    pub(crate) pid: Option<OwnedFd>,
    /// The container's user namespace. It is made before the container when it is new, so that mounts can be
    /// shifted by it while we still have the host's rights.
    pub(crate) user: Option<OwnedFd>,
    pub(crate) maps: Option<IdMaps>,
    /// A new cgroup namespace, once the process is in its cgroup.
    pub(crate) cgroup: bool,
    /// The uts namespace is the container's to name.
    pub(crate) names_host: bool,
    pub(crate) has: sysctl::Has,
}

const KINDS: [(NamespaceKind, u64, &str); 5] = [
    (NamespaceKind::Ipc, CLONE_NEWIPC, "ipc"),
    (NamespaceKind::Uts, CLONE_NEWUTS, "uts"),
    (NamespaceKind::Network, CLONE_NEWNET, "network"),
    (NamespaceKind::Cgroup, CLONE_NEWCGROUP, "cgroup"),
    (NamespaceKind::Pid, CLONE_NEWPID, "pid"),
];

impl Plan {
    pub(crate) fn new(spec: &Spec, join: &Join<'_>) -> Result<Plan, Error> {
        match spec.namespace(NamespaceKind::Mount) {
            Some(mount) if mount.path.is_empty() => {}
            Some(_) => return Err(Error::Invalid("joining a mount namespace is not supported".into())),
            None => return Err(Error::Invalid("a container needs a mount namespace of its own".into())),
        }
        if spec.namespace(NamespaceKind::Time).is_some() {
            return Err(Error::Invalid("time namespaces are not supported".into()));
        }
        let mut plan = Plan {
            make: CLONE_NEWNS,
            join: Vec::new(),
            pid: None,
            user: None,
            maps: None,
            cgroup: false,
            names_host: false,
            has: sysctl::Has::default(),
        };
        for (kind, flag, name) in KINDS {
            match find(spec, join, kind)? {
                Found::Host => continue,
                Found::New => match kind {
                    NamespaceKind::Cgroup => plan.cgroup = true,
                    _ => plan.make |= flag,
                },
                Found::Join(fd) => match kind {
                    NamespaceKind::Pid => plan.pid = Some(fd),
                    _ => plan.join.push((fd, flag, name)),
                },
            }
            match kind {
                NamespaceKind::Ipc => plan.has.ipc = true,
                NamespaceKind::Network => plan.has.net = true,
                NamespaceKind::Uts => {
                    plan.has.uts = true;
                    plan.names_host = join.uts.is_none();
                }
                _ => {}
            }
        }
        plan.user(spec, join)?;
        let named = !spec.hostname.is_empty() || !spec.domainname.is_empty();
        if named && !plan.has.uts {
            return Err(Error::Invalid("a host name without a uts namespace would rename the host".into()));
        }
        Ok(plan)
    }

    fn user(&mut self, spec: &Spec, join: &Join<'_>) -> Result<(), Error> {
        let maps = IdMaps { uid: spec.linux.uid_mappings.clone(), gid: spec.linux.gid_mappings.clone() };
        match find(spec, join, NamespaceKind::User)? {
            Found::Host => return Ok(()),
            Found::New => {
                self.user = Some(mapped(&maps)?);
                self.maps = Some(maps);
            }
            Found::Join(fd) => {
                self.maps = Some(if maps.uid.is_empty() { read_maps(fd.as_fd())? } else { maps });
                self.user = Some(fd);
            }
        }
        Ok(())
    }

    /// Descriptors that the child needs.
    pub(crate) fn descriptors(&self, keep: &mut Vec<RawFd>) {
        keep.extend(self.join.iter().map(|(fd, ..)| fd.as_raw_fd()));
        keep.extend(self.user.as_ref().map(AsRawFd::as_raw_fd));
    }

    /// Joins what is to be joined, apart from the user namespace: with the host's rights any of them may be
    /// entered, whoever owns it.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        self.join.iter().try_for_each(|(fd, flag, name)| setns(fd.as_fd(), *flag).at(Step::Namespace, name))
    }
}

enum Found {
    Host,
    New,
    Join(OwnedFd),
}

fn find(spec: &Spec, join: &Join<'_>, kind: NamespaceKind) -> Result<Found, Error> {
    let given = match kind {
        NamespaceKind::User => join.user,
        NamespaceKind::Ipc => join.ipc,
        NamespaceKind::Uts => join.uts,
        NamespaceKind::Network => join.net,
        NamespaceKind::Pid => join.pid,
        NamespaceKind::Cgroup => join.cgroup,
        NamespaceKind::Mount | NamespaceKind::Time => None,
    };
    if let Some(fd) = given {
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3).at(Step::Namespace, format_args!("{kind:?}"))?;
        return Ok(Found::Join(fd));
    }
    match spec.namespace(kind) {
        None => Ok(Found::Host),
        Some(namespace) if namespace.path.is_empty() => Ok(Found::New),
        Some(namespace) => {
            let fd = kernel::open_host(Path::new(&namespace.path)).at(Step::Namespace, &namespace.path)?;
            Ok(Found::Join(fd))
        }
    }
}

/// Clones with `pid` as the pid namespace of the child, and ours for later children again.
///
/// # Safety
/// As [`kernel::clone`].
pub(crate) unsafe fn clone_into(
    pid: Option<BorrowedFd<'_>>,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Cloned, Failure> {
    let Some(pid) = pid else {
        // SAFETY: the caller's promise.
        return unsafe { kernel::clone(flags, cgroup) }.at(Step::Clone, "container process");
    };
    let ours = kernel::own_namespace("pid").at(Step::Namespace, "pid")?;
    setns(pid, CLONE_NEWPID).at(Step::Namespace, "pid")?;
    // SAFETY: the caller's promise.
    let cloned = unsafe { kernel::clone(flags, cgroup) };
    if matches!(cloned, Ok(Cloned::Child)) {
        return Ok(Cloned::Child);
    }
    let restored = setns(ours.as_fd(), CLONE_NEWPID).at(Step::Namespace, "pid, our own");
    if let (Err(_), Ok(Cloned::Parent { pidfd, .. })) = (&restored, &cloned) {
        kernel::kill_and_reap(pidfd);
    }
    restored.and(cloned.at(Step::Clone, "container process"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping { container_id, host_id, size }
    }

    #[test]
    fn ids_are_mapped_line_by_line() {
        let maps = IdMaps { uid: vec![line(0, 100_000, 10), line(10, 500, 1)], gid: vec![line(0, 7, 1)] };
        assert_eq!(maps.host_uid(9).unwrap(), 100_009);
        assert_eq!(maps.host_uid(10).unwrap(), 500);
        assert!(maps.host_uid(11).is_err());
        assert_eq!(maps.host_gid(0).unwrap(), 7);
    }

    #[test]
    fn mappings_that_wrap_or_are_too_many_are_refused() {
        let one = vec![line(0, 1, 1)];
        for uid in [vec![], vec![line(0, u32::MAX, 1)], vec![line(0, 1, 0)], vec![line(0, 1, 1); 1_000_000]] {
            assert!(IdMaps { uid, gid: one.clone() }.check().is_err());
        }
        assert!(IdMaps { uid: one.clone(), gid: one }.check().is_ok());
    }

    #[test]
    fn a_container_without_its_own_mounts_or_that_renames_the_host_is_refused() {
        let join = Join::default();
        assert!(matches!(Plan::new(&Spec::default(), &join), Err(Error::Invalid(_))));
        let spec = Spec::from_json(br#"{"hostname":"x","linux":{"namespaces":[{"type":"mount"}]}}"#).unwrap();
        assert!(matches!(Plan::new(&spec, &join), Err(Error::Invalid(_))));
    }
}
