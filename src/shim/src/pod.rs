//! The pod of this shim: the namespaces that its containers share, which are open descriptors and nothing
//! else, and the containers themselves. What one container goes through is in `container`.
//!
//! ```text
//!   empty ── create ──► ready ── stop ──► stopped ── shutdown ──► the shim ends
//! ```
//! Under plain containerd nobody creates a pod: containers come to the empty one, and the shim ends after the
//! last.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use container::{
    cgroup::{Cgroup, Host},
    init::reaper,
    namespace::{self, Held, IdMaps},
    rootfs::Shm,
    spec::IdMapping,
};
use rustix::{
    fs::{Mode, OFlags},
    process::{Signal, pidfd_send_signal},
};
use shim_api::shim::PodOptions;
use tokio::{
    sync::{Notify, oneshot, watch},
    time,
};

use crate::{
    container::Container,
    error::{Act, Error},
    events::Events,
    lock,
    reap::{Ended, Reaper},
    record,
};

/// How long the end of all processes is waited for when nobody says.
pub(crate) const STOP: Duration = Duration::from_secs(10);

/// A name from the wire that is fit to be part of a path.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let fits = (1..=128).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && id != "."
        && id != "..";
    if fits { Ok(()) } else { Err(Error::Id(id.chars().take(128).collect())) }
}

/// What all of the shim's services work on.
pub(crate) struct Pod {
    pub(crate) id: String,
    /// Run directory; the bundle of the first container under plain containerd.
    pub(crate) dir: PathBuf,
    /// The daemon is not crispd: streams are kept alive for it while it restarts.
    pub(crate) foreign: bool,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) events: Events,
    /// True from the first attempt to stop.
    pub(crate) stopping: watch::Sender<bool>,
    /// How the pod ended, once it has.
    pub(crate) over: watch::Sender<Option<Ended>>,
    /// The shim is to end.
    pub(crate) shutdown: Notify,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    shared: Option<Arc<Shared>>,
    created_at: i64,
    options: Option<Kept>,
    containers: BTreeMap<String, Arc<Container>>,
    host: Option<Host>,
}

/// What is still needed of the options after the pod exists.
struct Kept {
    own_cgroup_parent: String,
}

/// What the containers of a pod have in common.
#[derive(Default)]
pub(crate) struct Shared {
    held: Held,
    /// A network namespace that others made.
    network: Option<OwnedFd>,
    init: Option<reaper::Reaper>,
    shm: Option<Shm>,
}

impl Shared {
    pub(crate) fn user(&self) -> Option<BorrowedFd<'_>> {
        self.held.user.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn ipc(&self) -> Option<BorrowedFd<'_>> {
        self.held.ipc.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn uts(&self) -> Option<BorrowedFd<'_>> {
        self.held.uts.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn net(&self) -> Option<BorrowedFd<'_>> {
        self.held.net.as_ref().or(self.network.as_ref()).map(AsFd::as_fd)
    }

    pub(crate) fn pid(&self) -> Option<BorrowedFd<'_>> {
        self.init.as_ref().map(|init| init.pid_namespace.as_fd())
    }

    /// The pod's /dev/shm, for one container.
    pub(crate) fn shm(&self) -> Result<Option<OwnedFd>, Error> {
        Ok(self.shm.as_ref().map(Shm::tree).transpose()?)
    }
}

impl Pod {
    pub(crate) fn new(id: String, dir: PathBuf, foreign: bool, reaper: Arc<Reaper>, events: Events) -> Pod {
        Pod {
            id,
            dir,
            foreign,
            reaper,
            events,
            stopping: watch::Sender::new(false),
            over: watch::Sender::new(None),
            shutdown: Notify::new(),
            inner: Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Makes the pod's namespaces. A second attempt after a failure starts anew.
    pub(crate) fn create(&self, options: PodOptions, netns: &str) -> Result<(), Error> {
        if self.inner().shared.is_some() {
            return Err(Error::Exists { what: "pod", id: self.id.clone() });
        }
        if *self.stopping.borrow() {
            return Err(Error::Stopping);
        }
        settle_shim(&options, &self.host()?)?;
        let shared = self.make_shared(&options, netns)?;
        let mut inner = self.inner();
        inner.shared = Some(Arc::new(shared));
        inner.created_at = record::now();
        inner.options = Some(Kept { own_cgroup_parent: options.own_cgroup_parent });
        Ok(())
    }

    fn make_shared(&self, options: &PodOptions, netns: &str) -> Result<Shared, Error> {
        let network = match netns {
            "" => None,
            path => Some(
                rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
                    .act(format!("open network namespace {path}"))?,
            ),
        };
        let maps = maps(options);
        let sysctls: BTreeMap<String, String> = options.sysctls.clone().into_iter().collect();
        let held = namespace::hold(&namespace::Wanted {
            ipc: options.new_ipc,
            uts: options.new_uts,
            net: options.new_net,
            user: maps.as_ref(),
            hostname: &options.hostname,
            domainname: "",
            sysctls: Some(&sysctls).filter(|sysctls| !sysctls.is_empty()),
            net_join: network.as_ref().map(AsFd::as_fd),
        })?;
        let shm = match u64::try_from(options.shm_size) {
            Ok(0) | Err(_) => None,
            Ok(size) => Some(self.make_shm(size, maps.as_ref())?),
        };
        let init = match options.new_pid {
            true => Some(self.make_init(held.user.as_ref().map(AsFd::as_fd))?),
            false => None,
        };
        Ok(Shared { held, network, init, shm })
    }

    fn make_shm(&self, size: u64, maps: Option<&IdMaps>) -> Result<Shm, Error> {
        let owner = match maps {
            Some(maps) => (maps.host_uid(0)?, maps.host_gid(0)?),
            None => (0, 0),
        };
        let directory = self.dir.join("shm");
        match container::rootfs::shm(size, owner, &directory) {
            Ok(shm) => Ok(shm),
            // An older kernel needs the directory that no other has a use for.
            Err(_) => {
                let _ = fs::create_dir(&directory);
                Ok(container::rootfs::shm(size, owner, &directory)?)
            }
        }
    }

    /// The first process of a pid namespace that the containers share. Its end takes them with it.
    fn make_init(&self, user: Option<BorrowedFd<'_>>) -> Result<reaper::Reaper, Error> {
        let birth = self.reaper.birth();
        let init = reaper::spawn(user)?;
        let ended = birth.claim(init.pid, init.pidfd.as_fd());
        let mut stopping = self.stopping.subscribe();
        tokio::spawn(async move {
            if ended.await.is_ok() && !*stopping.borrow_and_update() {
                ::log::error!("the first process of the pod's pid namespace was killed");
            }
        });
        Ok(init)
    }

    /// The pod exists and takes containers.
    pub(crate) fn ready(&self) -> Result<i64, Error> {
        let inner = self.inner();
        match inner.shared.is_some() {
            true => Ok(inner.created_at),
            false => Err(Error::Unknown { what: "pod", id: self.id.clone() }),
        }
    }

    /// State for containerd: whether the pod is ready, and when it was made.
    pub(crate) fn status(&self) -> (bool, i64) {
        let inner = self.inner();
        (inner.shared.is_some() && !*self.stopping.borrow(), inner.created_at)
    }

    /// Namespaces as numbers of our descriptors.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.inner().shared.clone().unwrap_or_default()
    }

    /// The cgroup hierarchies of this host, found once.
    pub(crate) fn host(&self) -> Result<Host, Error> {
        if let Some(host) = &self.inner().host {
            return Ok(host.clone());
        }
        let host = Host::detect()?;
        self.inner().host = Some(host.clone());
        Ok(host)
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        check_id(id)?;
        let found = self.inner().containers.get(id).cloned();
        found.ok_or_else(|| Error::Unknown { what: "container", id: id.to_owned() })
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.inner().containers.values().cloned().collect()
    }

    /// Takes a container's id.
    pub(crate) fn insert(&self, container: &Arc<Container>) -> Result<(), Error> {
        if *self.stopping.borrow() {
            return Err(Error::Stopping);
        }
        let mut inner = self.inner();
        if inner.containers.contains_key(&container.id) {
            return Err(Error::Exists { what: "container", id: container.id.clone() });
        }
        inner.containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) {
        self.inner().containers.remove(id);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inner().containers.is_empty()
    }

    /// Ends everything in the pod and lets go of its namespaces. Can be called again, also when nothing is
    /// left to do.
    pub(crate) async fn stop(&self, bound: Duration) -> Result<(), Error> {
        self.stopping.send_replace(true);
        let deadline = time::Instant::now() + bound;
        let containers = self.containers();
        for container in &containers {
            container.kill_all();
        }
        for container in &containers {
            let ended = time::timeout_at(deadline, container.wait()).await;
            ended.map_err(|_| Error::Deadline { act: "the end of the pod's processes" })?;
        }
        drop(containers);
        let (shared, parent) = {
            let mut inner = self.inner();
            (inner.shared.replace(Arc::default()), inner.options.take().map(|kept| kept.own_cgroup_parent))
        };
        if let Some(init) = shared.as_ref().and_then(|shared| shared.init.as_ref()) {
            let _ = pidfd_send_signal(&init.pidfd, Signal::KILL);
        }
        drop(shared);
        let _ = fs::remove_dir(self.dir.join("shm"));
        if let Some(parent) = parent.filter(|parent| !parent.is_empty()) {
            let cgroup = Cgroup::open(&self.host()?, &parent)?;
            remove_cgroup(&cgroup, deadline).await?;
        }
        self.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert(Ended { code: 0, at: record::now() });
            first
        });
        Ok(())
    }

    /// The cgroup that the pod's containers lie in, as far as the shim can know.
    pub(crate) fn parent_cgroup(&self) -> Result<Option<Cgroup>, Error> {
        let Some(path) = self.containers().iter().find_map(|container| container.cgroup_path()) else {
            return Ok(None);
        };
        match Path::new(&path).parent().and_then(Path::to_str) {
            None | Some("") => Ok(None),
            Some(parent) => Ok(Some(Cgroup::open(&self.host()?, parent)?)),
        }
    }
}

/// Removes a cgroup as soon as its last process is collected, which the reaper does between our tries.
pub(crate) async fn remove_cgroup(cgroup: &Cgroup, deadline: time::Instant) -> Result<(), Error> {
    let mut pause = Duration::from_micros(200);
    loop {
        match cgroup.remove(Duration::ZERO) {
            Ok(()) => return Ok(()),
            Err(cause) if time::Instant::now() >= deadline => return Err(cause.into()),
            Err(_) => {}
        }
        let _ = cgroup.kill();
        time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn maps(options: &PodOptions) -> Option<IdMaps> {
    if options.uid_mappings.is_empty() && options.gid_mappings.is_empty() {
        return None;
    }
    let lines = |lines: &[shim_api::shim::IdMapping]| {
        let line = |line: &shim_api::shim::IdMapping| IdMapping {
            container_id: line.container_id,
            host_id: line.host_id,
            size: line.size,
        };
        lines.iter().map(line).collect()
    };
    Some(IdMaps { uid: lines(&options.uid_mappings), gid: lines(&options.gid_mappings) })
}

/// Puts the shim itself where the pod's options want it. Not everything can be had everywhere: to lower the
/// score takes CAP_SYS_RESOURCE, and then the one that was inherited stays.
fn settle_shim(options: &PodOptions, host: &Host) -> Result<(), Error> {
    if !options.shim_cgroup.is_empty() {
        // Other shims are in it, which `create` refuses; and one may make it while we look.
        let found = Cgroup::open(host, &options.shim_cgroup)?;
        let cgroup = match found.exists() {
            true => Ok(found),
            false => Cgroup::create(host, &options.shim_cgroup),
        };
        cgroup.or_else(|_| Cgroup::open(host, &options.shim_cgroup))?.enter()?;
    }
    if options.oom_score_adj != 0 {
        let score = options.oom_score_adj.clamp(-1000, 1000);
        if let Err(cause) = fs::write("/proc/self/oom_score_adj", score.to_string()) {
            ::log::info!("oom_score_adj {score} of the shim: {cause}");
        }
    }
    Ok(())
}

/// Exec ids and the like, by name.
pub(crate) type Names<T> = HashMap<String, Arc<T>>;

/// A promise of an end that never comes when the shim goes down before.
pub(crate) async fn end(told: oneshot::Receiver<Ended>) -> Ended {
    // The sender lives as long as the reaper, and it as long as the shim.
    told.await.unwrap_or_else(|_| Ended { code: 255, at: record::now() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_file_name() {
        for good in ["a", "A-b_c.9", &"x".repeat(128)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "../x", "a b", "a\0", "ä", "a\n", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }
}
