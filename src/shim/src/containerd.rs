//! containerd's conventions for a shim's command line: `start` leaves a serving shim behind and says where it
//! is, `delete` cleans up after a dead one, `-info` introduces itself. crispd uses `delete` too.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use container::{
    cgroup::{Cgroup, Host},
    spec::Spec,
};
use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use serde::{Deserialize, Serialize};
use shim_api::{
    containerd::{
        api::DeleteResponse,
        types::introspection::{RuntimeInfo, RuntimeVersion},
    },
    protobuf::{Message, MessageField},
    rundir::{self, Exit, Init},
};

use crate::{
    Arguments,
    container::read_spec,
    error::{Act, Error},
    pod::check_id,
    reap::has_ended,
    record, service,
};

/// Where sockets are unless containerd says otherwise; short, since a socket's path has 107 bytes at most.
const SOCKETS: &str = "/run/containerd/s";
/// Annotations that name the container whose shim a container belongs to.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
/// File in the bundle that says where the shim listens.
const ADDRESS: &str = "address";
/// Most of stdin that is looked at.
const PARAMS: u64 = 1 << 20;
/// How long killed processes may take to leave their cgroup.
const REMOVAL: Duration = Duration::from_secs(5);

/// What containerd tells a shim that it starts, on stdin. Older versions use flags and the environment, and
/// put something else there.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Params {
    instance_id: String,
    namespace: String,
    containerd_ttrpc_address: String,
    socket_dir: String,
}

/// The answer to `start`.
#[derive(Serialize)]
struct Started<'a> {
    version: i32,
    address: &'a str,
    protocol: &'static str,
}

/// Starts a shim for the bundle in the current directory, or finds the one that serves its pod already.
pub(crate) fn start(arguments: &Arguments) -> Result<(), Error> {
    let params = params();
    let or = |first: &str, second: String| if first.is_empty() { second } else { first.to_owned() };
    let id = or(&params.instance_id, arguments.id.clone());
    check_id(&id)?;
    let namespace = or(&params.namespace, arguments.namespace.clone());
    let directory = PathBuf::from(or(&params.socket_dir, variable("CONTAINERD_SOCKET_DIR", SOCKETS)));
    let group = read_spec(Path::new(".")).ok().and_then(|spec| group(&spec)).unwrap_or_else(|| id.clone());
    let path = directory.join(name(&[&arguments.address, &namespace, &group]));
    let address = format!("unix://{}", path.display());
    if UnixStream::connect(&path).is_err() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).act("make socket directory")?;
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).act(format!("bind {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).act("protect the socket")?;
        let events = or(&params.containerd_ttrpc_address, variable("TTRPC_ADDRESS", ""));
        if let Err(error) = spawn(&id, &namespace, &events, listener) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
    }
    fs::write(ADDRESS, &address).act("write the address")?;
    let started = Started { version: 3, address: &address, protocol: "ttrpc" };
    let answer = serde_json::to_vec(&started).map_err(io::Error::from).act("answer")?;
    io::stdout().write_all(&answer).act("answer")
}

fn params() -> Params {
    let mut text = Vec::new();
    let read = io::stdin().lock().take(PARAMS).read_to_end(&mut text);
    read.ok().and_then(|_| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn variable(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// Containers of one pod share a shim.
fn group(spec: &Spec) -> Option<String> {
    GROUPS.iter().find_map(|name| spec.annotations.get(*name)).filter(|id| check_id(id).is_ok()).cloned()
}

/// A short file name for a shim, the same each time: FNV-1a in 128 bits. It need not withstand malice; root
/// names all of its parts.
fn name(parts: &[&str]) -> String {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in parts.iter().flat_map(|part| part.bytes().chain([0])) {
        hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B);
    }
    format!("{hash:032x}")
}

/// Leaves a serving shim behind, in a session of its own. It runs from a sealed copy of the program, which no
/// container can write to (CVE-2019-5736).
fn spawn(id: &str, namespace: &str, events: &str, listener: UnixListener) -> Result<(), Error> {
    let (_copy, program) = match sealed() {
        Ok(copy) => {
            let program = format!("/proc/self/fd/{}", copy.as_raw_fd());
            (Some(copy), program)
        }
        Err(_) => (None, "/proc/self/exe".to_owned()),
    };
    Command::new(program)
        .arg0("containerd-shim-crisp-v1")
        .args(["-namespace", namespace, "-id", id, "-events", events, "serve-stdin"])
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(shim_log())
        .spawn()
        .map(drop)
        .act("spawn the shim")
}

/// containerd reads what a shim logs from a FIFO in the bundle.
fn shim_log() -> Stdio {
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits();
    let log = File::options().write(true).custom_flags(i32::try_from(flags).unwrap_or(0)).open("log");
    log.map_or_else(|_| Stdio::null(), Stdio::from)
}

fn sealed() -> io::Result<OwnedFd> {
    let mut from = File::open("/proc/self/exe")?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // A host may refuse programs that do not say that they are (vm.memfd_noexec).
    let copy = rustix::fs::memfd_create("containerd-shim-crisp-v1", flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create("containerd-shim-crisp-v1", flags))?;
    let mut copy = File::from(copy);
    io::copy(&mut from, &mut copy)?;
    copy.rewind()?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(copy.into())
}

/// Ends what a dead shim has left of its containers, and records how they ended as far as that can be known.
/// Takes a bundle, or the run directory of a pod with the bundles in it.
pub(crate) fn delete(arguments: &Arguments) -> Result<(), Error> {
    let bundle = match arguments.bundle.as_str() {
        "" => PathBuf::from("."),
        bundle => PathBuf::from(bundle),
    };
    let host = Host::detect()?;
    let mut response = DeleteResponse {
        exit_status: 137,
        exited_at: MessageField::some(service::timestamp(record::now())),
        ..DeleteResponse::default()
    };
    let mut failed = None;
    for (id, bundle) in bundles(&arguments.id, &bundle) {
        match end(&host, &id, &bundle, &arguments.id) {
            Ok(Some((pid, exit))) => {
                response.pid = pid;
                response.exit_status = exit.code;
                response.exited_at = MessageField::some(service::timestamp(exit.exited_at));
            }
            Ok(None) => {}
            // One that cannot be cleaned up does not keep the others from it.
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Ok(address) = fs::read_to_string(bundle.join(ADDRESS))
        && let Some(path) = address.strip_prefix("unix://")
        // Another container of the pod may have a shim that lives.
        && UnixStream::connect(path).is_err()
    {
        let _ = fs::remove_file(path);
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let answer = response.write_to_bytes().map_err(io::Error::other).act("answer")?;
    io::stdout().write_all(&answer).act("answer")
}

fn bundles(id: &str, dir: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    if dir.join("config.json").exists() {
        found.push((id.to_owned(), dir.to_owned()));
    }
    for entry in fs::read_dir(dir.join(rundir::CONTAINERS)).into_iter().flatten().flatten() {
        if let Ok(id) = entry.file_name().into_string()
            && check_id(&id).is_ok()
        {
            found.push((id, entry.path()));
        }
    }
    found
}

/// Ends one container; None when it never was one.
fn end(host: &Host, id: &str, bundle: &Path, pod: &str) -> Result<Option<(u32, Exit)>, Error> {
    let spec = read_spec(bundle)?;
    let path = match spec.linux.cgroups_path.as_str() {
        "" => id,
        path => path,
    };
    let cgroup = Cgroup::open(host, path)?;
    let init: Option<Init> = record::read(bundle, rundir::INIT);
    let existed = cgroup.exists();
    let oom = cgroup.oom_count().unwrap_or(0) > 0;
    let alive = init.as_ref().is_some_and(kill) || cgroup.pids().is_ok_and(|pids| !pids.is_empty());
    if existed {
        cgroup.kill()?;
        cgroup.remove(REMOVAL)?;
    }
    remove_own_parent(host, path, pod);
    if let Some(exit) = record::read::<Exit>(bundle, rundir::EXIT) {
        return Ok(Some((init.map_or(0, |init| init.process.pid), exit)));
    }
    if init.is_none() && !existed {
        return Ok(None);
    }
    // Nobody collected the process for us, so its code is lost; a killed one is at least known to be that.
    let code = if alive { 137 } else { 255 };
    let exit = Exit { version: rundir::VERSION, code, exited_at: record::now(), oom, known: false };
    record::write(bundle, rundir::EXIT, &exit).act(format!("record the exit of {id}"))?;
    Ok(Some((init.map_or(0, |init| init.process.pid), exit)))
}

/// Kills the first process of a container if it is still that one; says whether it was.
fn kill(init: &Init) -> bool {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    let Some(pid) = i32::try_from(init.process.pid).ok().and_then(Pid::from_raw) else { return false };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    let same = record::process(init.process.pid).is_ok_and(|process| process == init.process);
    same && !has_ended(pidfd.as_fd()) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok()
}

/// The cgroup that crispd makes up for a pod for which its client names none.
fn remove_own_parent(host: &Host, path: &str, pod: &str) {
    let own = pod.get(..12).map(|short| format!("crisp-{short}"));
    let parent = path.trim_start_matches('/').split('/').next();
    if let (Some(own), Some(parent)) = (own, parent)
        && own == parent
        && let Ok(cgroup) = Cgroup::open(host, parent)
        // With other containers in it this fails, and the last of them removes it.
        && cgroup.pids().is_ok_and(|pids| pids.is_empty())
    {
        let _ = cgroup.remove(Duration::ZERO);
    }
}

/// Says on stdout who we are.
pub(crate) fn info() -> Result<(), Error> {
    let info = RuntimeInfo {
        name: "io.containerd.crisp.v1".into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..RuntimeVersion::default()
        }),
        ..RuntimeInfo::default()
    };
    let answer = info.write_to_bytes().map_err(io::Error::other).act("answer")?;
    io::stdout().write_all(&answer).act("answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_has_the_same_socket_each_time_and_no_other_has_it() {
        let one = name(&["/run/containerd/containerd.sock", "k8s.io", "a"]);
        assert_eq!(one, name(&["/run/containerd/containerd.sock", "k8s.io", "a"]));
        assert_ne!(one, name(&["/run/containerd/containerd.sock", "k8s.io", "b"]));
        assert_ne!(name(&["ab", "c"]), name(&["a", "bc"]));
        assert_eq!(one.len(), 32);
    }

    #[test]
    fn containers_of_a_pod_name_their_group() {
        let spec = |text: &str| Spec::from_json(text.as_bytes()).unwrap();
        let named = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p1"}}"#);
        assert_eq!(group(&named).as_deref(), Some("p1"));
        assert_eq!(group(&spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../x"}}"#)), None);
        assert_eq!(group(&spec("{}")), None);
    }
}
