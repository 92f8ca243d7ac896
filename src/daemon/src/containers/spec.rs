//! The OCI runtime spec of a container, from what CRI, image and configuration say. One file per part of it; here the
//! order of the parts and what they have in common. Looks things up on the host and in the image's layers, makes the
//! directories of volumes, starts nothing.
//!
//! ```text
//!  check the request ─▶ look up (users, mounts, devices, profile) ─▶ decide each part ─▶ one JSON document
//! ```

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use cri_api::v1::{self, NamespaceMode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{config::Config, pods::Pod};

pub mod capability;
pub mod cdi;
pub mod devices;
pub mod host;
pub mod layers;
pub mod lsm;
pub mod mounts;
pub mod process;
pub mod resources;
pub mod seccomp;
mod seccomp_default;
pub mod signal;
pub mod user;
pub mod volumes;

pub use host::Host;
use mounts::{Source, Wanted};

/// Largest passwd or group file of an image that is read (CVE-2025-4437).
const USER_FILE: u64 = 10 << 20;

/// What of an image a container is made from.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// What users call it.
    pub name: String,
    pub user: String,
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub working_dir: String,
    pub stop_signal: Option<String>,
    /// Paths that it declares as volumes.
    pub volumes: Vec<String>,
    /// Directories of its layers, topmost first.
    pub layers: Vec<PathBuf>,
}

/// An image that a container mounts.
#[derive(Clone, Debug, Default)]
pub struct Mounted {
    /// Config digest.
    pub id: String,
    /// Directories of its layers, topmost first.
    pub layers: Vec<PathBuf>,
}

/// What a container is asked to be.
pub struct Request<'a> {
    /// Of the container.
    pub id: &'a str,
    pub pod: &'a Pod,
    pub config: &'a v1::ContainerConfig,
    pub image: &'a Image,
    /// The images that the config mounts, by the name that it has for them.
    pub mounted: &'a BTreeMap<String, Mounted>,
    pub settings: &'a Config,
    pub host: &'a Host,
}

/// What was decided.
#[derive(Debug)]
pub struct Made {
    /// config.json.
    pub spec: Value,
    pub user: user::User,
    /// Number of the signal that asks it to stop, as Linux counts.
    pub stop_signal: i32,
    pub joins: Joins,
}

/// Namespaces of the pod that a container takes part in; the shim holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joins {
    pub user: bool,
    pub net: bool,
    pub ipc: bool,
    pub uts: bool,
    pub pid: bool,
    /// The container whose pid namespace is joined; empty for none.
    pub pid_of: String,
    /// /dev/shm is the pod's.
    pub shm: bool,
}

/// Why a container cannot be made. All but [`Error::Look`] and those about files of the node are the client's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no command is given, neither by the container nor by its image")]
    NoCommand,
    #[error("{0} contains a NUL character")]
    Nul(&'static str),
    #[error("{0} is too long")]
    TooLong(&'static str),
    #[error("{0:?} is not a name of an environment variable")]
    EnvName(String),
    #[error("working directory {0:?} is not absolute")]
    RelativeCwd(String),
    #[error("run_as_user and run_as_username exclude each other")]
    UserTwice,
    #[error("run_as_group needs run_as_user or run_as_username")]
    GroupWithoutUser,
    #[error("{0} is not a user or group id: ids are from 0 to 2147483647")]
    IdRange(String),
    #[error("{0:?} is not a user name")]
    UserName(String),
    #[error("user {0:?} is not in the image's /etc/passwd")]
    UnknownUser(String),
    #[error("{0} {1} is not mapped in the user namespace of the pod")]
    NotMapped(&'static str, u32),
    #[error("supplemental groups policy {0} is not known")]
    GroupsPolicy(i32),
    #[error("group {0:?} is not in the image's /etc/group")]
    UnknownGroup(String),
    #[error("capability {0:?} is not known")]
    UnknownCapability(String),
    #[error("capability {0} cannot be given: this host or the runtime itself does not have it")]
    CapabilityMissing(String),
    #[error("profile type {0} is not known")]
    ProfileType(i32),
    #[error("seccomp profile {0:?} is none of runtime/default, unconfined, localhost/<path>")]
    SeccompText(String),
    #[error("seccomp profile {0:?} is not an absolute path")]
    SeccompPath(String),
    #[error("seccomp profile {path}: {why}")]
    SeccompFile { path: PathBuf, why: String },
    #[error("AppArmor profile {0:?} is none of runtime/default, unconfined, localhost/<name>")]
    AppArmorText(String),
    #[error("an AppArmor profile is asked for, but AppArmor is off on this host")]
    AppArmorOff,
    #[error("AppArmor profile {0:?} is not loaded")]
    AppArmorNotLoaded(String),
    #[error("SELinux label part {0:?} is malformed")]
    SelinuxLabel(String),
    #[error("{0} {1}")]
    Resource(&'static str, String),
    #[error("device {0:?} at {1:?}: paths are absolute and without \"..\", that inside is below /dev")]
    DevicePath(String, String),
    #[error("device permissions {0:?} are not some of rwm")]
    DeviceAccess(String),
    #[error("CDI device {0:?} is not a name like vendor/class=device")]
    CdiName(String),
    #[error("CDI device {0:?} is in no spec of this node")]
    CdiMissing(String),
    #[error("CDI is switched off on this node")]
    CdiOff,
    #[error("CDI device {name:?}: {why}")]
    Cdi { name: String, why: String },
    #[error("{0} is neither a device nor a directory of devices")]
    NotADevice(PathBuf),
    #[error("mount at {path}: {why}")]
    Mount { path: String, why: &'static str },
    #[error("mount source {0} is absent and must not be made")]
    AbsentSource(PathBuf),
    #[error("{0} is not on a {1} mount")]
    NotShared(PathBuf, &'static str),
    #[error("ImageVolumeMountFailed: {path:?} is not in image {image}")]
    ImageSubPath { image: String, path: String },
    #[error("ImageVolumeMountFailed: image {0} is not there")]
    ImageMissing(String),
    #[error("{0} is not an absolute path")]
    RelativePath(&'static str),
    #[error("a privileged container needs a privileged pod")]
    Privileged,
    #[error("namespaces: {0}")]
    Namespaces(&'static str),
    #[error("stop signal {0} is not known")]
    StopSignal(i32),
    #[error("default_ulimits {0:?} of the configuration is malformed")]
    Ulimit(String),
    #[error("look up {what} {path}: {source}")]
    Look { what: &'static str, path: PathBuf, source: io::Error },
}

/// Makes the spec. Blocking: host paths may lie on file systems that take their time.
pub fn make(request: &Request<'_>) -> Result<Made, Error> {
    let Request { config, host, image, settings, pod, .. } = *request;
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    let options = security.namespace_options.clone().unwrap_or_default();
    let handler = settings.handler(&pod.runtime_handler).map(|(_, handler)| handler);

    // What can be refused without a look at anything
    let pod_security = pod.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.privileged && !pod_security.is_some_and(|pod| pod.privileged) {
        return Err(Error::Privileged);
    }
    let (joins, namespaces) = namespaces(pod, &options)?;
    let stop_signal = signal::stop(config.stop_signal, image.stop_signal.as_deref())
        .ok_or(Error::StopSignal(config.stop_signal))?;
    for (paths, what) in
        [(&security.masked_paths, "a masked path"), (&security.readonly_paths, "a read-only path")]
    {
        if paths.iter().any(|path| !path.starts_with('/') || path.contains('\0')) {
            return Err(Error::RelativePath(what));
        }
    }
    config.devices.iter().try_for_each(devices::check)?;
    // Better no container than one without the device that it was made for.
    if !settings.cdi.enable_cdi && !config.cdi_devices.is_empty() {
        return Err(Error::CdiOff);
    }
    let destinations =
        config.mounts.iter().map(|mount| mounts::check(mount, host)).collect::<Result<Vec<_>, Error>>()?;
    let args = process::args(&config.command, &config.args, &image.entrypoint, &image.cmd)?;
    let cwd = process::cwd(&config.working_dir, &image.working_dir)?;
    let capabilities = capabilities(&security, settings, host)?;
    let resources = resources(&linux, settings, host)?;

    // Users
    let policy = v1::SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy)
        .map_err(|_| Error::GroupsPolicy(security.supplemental_groups_policy))?;
    let mut user = user::resolve(&user::Wish {
        uid: security.run_as_user.map(|uid| uid.value),
        gid: security.run_as_group.map(|gid| gid.value),
        name: &security.run_as_username,
        groups: &security.supplemental_groups,
        strict: policy == v1::SupplementalGroupsPolicy::Strict,
        image: &image.user,
        passwd: &user_file(&image.layers, "etc/passwd")?,
        group: &user_file(&image.layers, "etc/group")?,
    })?;
    let hostname = match pod.config.hostname.as_str() {
        "" => host.hostname.as_str(),
        name => name,
    };
    let names: Vec<String> = config.cdi_devices.iter().map(|device| device.name.clone()).collect();
    let cdi = cdi::edits(&names, &settings.cdi.cdi_spec_dirs)?;
    user.join(&cdi.groups);
    check_mapped(&user, pod)?;
    let env = process::env(
        &image.env,
        &settings.defaults.default_env,
        hostname,
        config.tty,
        user.home.as_deref().unwrap_or("/"),
        &config.envs,
        &cdi.env,
    )?;

    // Security modules
    let seccomp = seccomp(&security, settings, &capabilities)?;
    let apparmor = apparmor(&security, settings, host)?;
    let selinux = lsm::selinux(
        security.selinux_options.as_ref().or(pod_security.and_then(|pod| pod.selinux_options.as_ref())),
        security.privileged,
        host.selinux && settings.security.enable_selinux,
        &pod.id,
    )?;

    // Devices and mounts
    let mut nodes = Vec::new();
    for wanted in &config.devices {
        nodes.extend(devices::look(wanted)?);
    }
    if settings.security.device_ownership_from_security_context {
        for device in &mut nodes {
            device.uid = if security.run_as_user.is_some() { user.uid } else { device.uid };
            device.gid = if security.run_as_group.is_some() { user.gid } else { device.gid };
        }
    }
    nodes.extend(cdi.devices);
    let open = security.privileged && !handler.is_some_and(|handler| handler.privileged_without_host_devices);
    if open {
        let listed: Vec<String> = nodes.iter().map(|device| device.path.clone()).collect();
        let others =
            devices::all().map_err(|source| Error::Look { what: "devices", path: "/dev".into(), source })?;
        nodes.extend(others.into_iter().filter(|device| !listed.contains(&device.path)));
    }
    let mut rules = if open { devices::open_rules() } else { devices::default_rules() };
    if !open {
        rules.extend(nodes.iter().map(devices::Device::rule));
    }
    let sources = sources(request)?;
    let volumes = volumes::make(request, &destinations)?;
    let blank: Vec<v1::Mount> = volumes.iter().map(volumes::Volume::mount).collect();
    let mut wanted: Vec<Wanted<'_>> = destinations
        .into_iter()
        .zip(&config.mounts)
        .zip(&sources)
        .map(|((destination, mount), source)| {
            let map = mount.image.as_ref().and_then(|_| pod.user_namespace());
            Wanted { destination, mount, source, map }
        })
        .collect();
    wanted.extend(volumes.iter().zip(&blank).map(|(volume, mount)| Wanted {
        destination: volume.destination.clone(),
        mount,
        source: &volume.source,
        map: pod.user_namespace(),
    }));
    let setting = mounts::Setting {
        privileged: security.privileged,
        cgroup_writable: handler.is_some_and(|handler| handler.cgroup_writable),
        host_pid: !namespaces.contains(&"pid") && !joins.pid && joins.pid_of.is_empty(),
        host_ipc: !joins.ipc,
        host_network: !joins.net,
        host_mqueue: Path::new("/dev/mqueue").is_dir(),
        user_namespace: pod.user_namespace().map(|(_, gids)| gids.length),
    };
    let mut files = files(pod, security.readonly_rootfs)?;
    files.extend(cdi.mounts);
    let (mounts, propagation) =
        mounts::order(mounts::defaults(setting), files, &wanted, &volumes::empty(settings));
    let joins =
        Joins { shm: joins.ipc && !wanted.iter().any(|wanted| wanted.destination == "/dev/shm"), ..joins };

    // The document
    let mut process = json!({
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": args,
        "cwd": cwd,
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": resources::oom_score_adj(linux.resources.as_ref().map_or(0, |r| r.oom_score_adj), host),
        "capabilities": {
            "bounding": capabilities.bounding,
            "effective": capabilities.bounding,
            "permitted": capabilities.bounding,
            "inheritable": capabilities.ambient,
            "ambient": capabilities.ambient,
        },
    });
    put_env(&mut process, env);
    let limits = rlimits(settings)?;
    if !limits.is_empty() {
        process["rlimits"] = limits.into();
    }
    if let Some(profile) = apparmor {
        process["apparmorProfile"] = profile.into();
    }
    let mut linux = json!({
        "namespaces": namespaces.iter().map(|kind| json!({"type": kind})).collect::<Vec<_>>(),
        "cgroupsPath": cgroup(pod, request.id),
        "resources": resources,
        "devices": nodes.iter().map(devices::Device::node).collect::<Vec<_>>(),
        "maskedPaths": if security.privileged { &[] } else { security.masked_paths.as_slice() },
        "readonlyPaths": if security.privileged { &[] } else { security.readonly_paths.as_slice() },
    });
    linux["resources"]["devices"] = rules.into();
    if let Some(seccomp) = seccomp {
        linux["seccomp"] = seccomp;
    }
    if let Some(propagation) = propagation {
        linux["rootfsPropagation"] = propagation.into();
    }
    if let Some((uids, gids)) = pod.user_namespace() {
        linux["uidMappings"] = mounts::mappings(&[uids]);
        linux["gidMappings"] = mounts::mappings(&[gids]);
    }
    if let Some(labels) = selinux {
        process["selinuxLabel"] = labels.process.into();
        linux["mountLabel"] = labels.mount.into();
    }
    let mut spec = json!({
        "ociVersion": "1.2.1",
        "process": process,
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "mounts": mounts,
        "annotations": annotations(request),
        "linux": linux,
    });
    if !cdi.hooks.is_empty() {
        spec["hooks"] = json!(cdi.hooks);
    }
    Ok(Made { spec, user, stop_signal, joins })
}

/// Place of a container's cgroup, relative to the root of the hierarchies.
pub fn cgroup(pod: &Pod, id: &str) -> String {
    format!("{}/{id}", pod.cgroup_parent().trim_end_matches('/'))
}

/// Which namespaces a pod has of its own, for those who make it and those who join it.
pub fn of_pod(pod: &Pod) -> Joins {
    let options = pod.namespaces();
    let net = options.network() != NamespaceMode::Node;
    let ipc = options.ipc() != NamespaceMode::Node;
    Joins {
        user: pod.user_namespace().is_some(),
        net,
        ipc,
        // With the host's network a pod has the host's name as well.
        uts: net,
        pid: options.pid() == NamespaceMode::Pod,
        pid_of: String::new(),
        shm: ipc,
    }
}

/// What a container joins, and the namespaces in its spec: those that it joins or makes. The host's are left out.
fn namespaces(pod: &Pod, options: &v1::NamespaceOption) -> Result<(Joins, Vec<&'static str>), Error> {
    if let Some(user) = &options.userns_options {
        match NamespaceMode::try_from(user.mode) {
            Ok(NamespaceMode::Pod) if pod.user_namespace().is_none() => {
                return Err(Error::Namespaces(
                    "the container asks for a user namespace that its pod does not have",
                ));
            }
            // It gets the pod's: one that it did not ask for would surprise it.
            Ok(NamespaceMode::Pod) if pod.namespaces().userns_options.is_some_and(|own| own != *user) => {
                return Err(Error::Namespaces("the id mappings of the container are not those of its pod"));
            }
            Ok(NamespaceMode::Node) if pod.user_namespace().is_some() => {
                return Err(Error::Namespaces(
                    "the container asks for the host's users in a pod with its own",
                ));
            }
            Ok(NamespaceMode::Pod | NamespaceMode::Node) => (),
            _ => return Err(Error::Namespaces("user namespaces are of mode POD or NODE")),
        }
    }
    let mut joins = of_pod(pod);
    let mode =
        NamespaceMode::try_from(options.pid).map_err(|_| Error::Namespaces("the pid mode is unknown"))?;
    // A pod with the host's pid namespace has none to share: POD means the host's then.
    let host = match mode {
        NamespaceMode::Node => true,
        NamespaceMode::Pod => pod.namespaces().pid() == NamespaceMode::Node,
        NamespaceMode::Container | NamespaceMode::Target => false,
    };
    joins.pid = joins.pid && mode == NamespaceMode::Pod;
    if mode == NamespaceMode::Target {
        if options.target_id.is_empty() {
            return Err(Error::Namespaces("pid mode TARGET needs target_id"));
        }
        joins.pid_of = options.target_id.clone();
    }
    let mut list = vec!["mount", "cgroup"];
    for (kind, wanted) in
        [("user", joins.user), ("network", joins.net), ("ipc", joins.ipc), ("uts", joins.uts), ("pid", !host)]
    {
        if wanted {
            list.push(kind);
        }
    }
    Ok((joins, list))
}

/// Refuses ids that the pod's user namespace does not have, of which the kernel would say only that something is
/// invalid.
fn check_mapped(user: &user::User, pod: &Pod) -> Result<(), Error> {
    let Some((uids, gids)) = pod.user_namespace() else { return Ok(()) };
    let outside =
        |map: &v1::IdMapping, id: u32| id.checked_sub(map.container_id).is_none_or(|at| at >= map.length);
    if outside(&uids, user.uid) {
        return Err(Error::NotMapped("user", user.uid));
    }
    // The primary group is among them.
    match user.groups.iter().find(|group| outside(&gids, **group)) {
        Some(group) => Err(Error::NotMapped("group", *group)),
        None => Ok(()),
    }
}

fn capabilities(
    security: &v1::LinuxContainerSecurityContext,
    settings: &Config,
    host: &Host,
) -> Result<capability::Sets, Error> {
    let usual: Vec<String>;
    let default = match settings.defaults.default_capabilities.as_slice() {
        [] => {
            usual = capability::DEFAULT.iter().map(|name| (*name).to_owned()).collect();
            usual.as_slice()
        }
        list => list,
    };
    capability::decide(security.capabilities.as_ref(), security.privileged, default, &host.capability_names())
}

fn resources(linux: &v1::LinuxContainerConfig, settings: &Config, host: &Host) -> Result<Value, Error> {
    let mut resources = resources::linux(&linux.resources.clone().unwrap_or_default(), host)?;
    if settings.defaults.pids_limit > 0 {
        resources["pids"] = json!({"limit": settings.defaults.pids_limit});
    }
    Ok(resources)
}

fn rlimits(settings: &Config) -> Result<Vec<Value>, Error> {
    let texts = settings.defaults.default_ulimits.iter();
    texts
        .map(|text| {
            let (kind, soft, hard) = process::ulimit(text).ok_or_else(|| Error::Ulimit(text.clone()))?;
            Ok(json!({"type": kind, "soft": soft, "hard": hard}))
        })
        .collect()
}

/// JSON holds text only: entries that are not go to a field of our own, in base64.
fn put_env(process: &mut Value, env: Vec<Vec<u8>>) {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let (mut text, mut bytes) = (Vec::with_capacity(env.len()), Vec::new());
    for entry in env {
        match String::from_utf8(entry) {
            Ok(entry) => text.push(entry),
            Err(e) => bytes.push(STANDARD.encode(e.as_bytes())),
        }
    }
    process["env"] = text.into();
    if !bytes.is_empty() {
        process["crispEnv"] = bytes.into();
    }
}

#[allow(deprecated)]
fn seccomp(
    security: &v1::LinuxContainerSecurityContext,
    settings: &Config,
    capabilities: &capability::Sets,
) -> Result<Option<Value>, Error> {
    let unset = &settings.security.unset_seccomp_profile;
    let file = |path: &Path| {
        let bad = |why: String| Error::SeccompFile { path: path.to_owned(), why };
        let bytes = read(path, seccomp::FILE_LIMIT).map_err(|e| bad(e.to_string()))?;
        seccomp::parse(path, &bytes, capabilities).map(Some)
    };
    match seccomp::choose(
        security.seccomp.as_ref(),
        &security.seccomp_profile_path,
        unset,
        security.privileged,
    )? {
        seccomp::Choice::Unconfined => Ok(None),
        seccomp::Choice::Default if settings.security.seccomp_profile.as_os_str().is_empty() => {
            Ok(Some(seccomp::default_profile(capabilities)))
        }
        seccomp::Choice::Default => file(&settings.security.seccomp_profile),
        seccomp::Choice::File(path) => file(&path),
    }
}

#[allow(deprecated)]
fn apparmor(
    security: &v1::LinuxContainerSecurityContext,
    settings: &Config,
    host: &Host,
) -> Result<Option<String>, Error> {
    let on = host.apparmor && !settings.security.disable_apparmor;
    // The list changes while we run: it is read for each container.
    let list = if on {
        fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default()
    } else {
        String::new()
    };
    let default = match settings.security.apparmor_profile.as_str() {
        "" => lsm::DEFAULT_PROFILE,
        name => name,
    };
    let host = lsm::AppArmor { on, loaded: &|name| lsm::is_loaded(&list, name), default };
    lsm::apparmor(security.apparmor.as_ref(), &security.apparmor_profile, security.privileged, &host)
}

/// Sources of the client's mounts, in their order.
fn sources(request: &Request<'_>) -> Result<Vec<Source>, Error> {
    let mut mountinfo = None;
    request.config.mounts.iter().map(|mount| source(request, mount, &mut mountinfo)).collect()
}

fn source(request: &Request<'_>, mount: &v1::Mount, mountinfo: &mut Option<String>) -> Result<Source, Error> {
    if let Some(image) = &mount.image {
        let mounted =
            request.mounted.get(&image.image).ok_or_else(|| Error::ImageMissing(image.image.clone()))?;
        return image_source(&image.image, &mounted.layers, &mount.image_sub_path);
    }
    let path = mounts::look(&mount.host_path, &request.settings.security.absent_mount_sources_to_reject)?;
    if mount.propagation != v1::MountPropagation::PropagationPrivate as i32 {
        let text = match mountinfo {
            Some(text) => text,
            None => mountinfo.insert(fs::read_to_string("/proc/self/mountinfo").map_err(|source| {
                Error::Look { what: "mounts", path: "/proc/self/mountinfo".into(), source }
            })?),
        };
        mounts::check_peers(mount, &path, text)?;
    }
    Ok(Source::Host(path))
}

fn image_source(image: &str, layers: &[PathBuf], sub_path: &str) -> Result<Source, Error> {
    let below = mounts::sub_path(sub_path).unwrap_or_default();
    let failed = |source| Error::Look { what: "path of an image", path: below.clone(), source };
    match layers::find(layers, &below).map_err(failed)? {
        layers::Found::Directory { parts, .. } => Ok(Source::Layers(parts)),
        layers::Found::File(path) => Ok(Source::File(path)),
        layers::Found::Nothing | layers::Found::Other => {
            Err(Error::ImageSubPath { image: image.to_owned(), path: sub_path.to_owned() })
        }
    }
}

/// Files that the pod gives to all its containers, unless the client mounts something there.
fn files(pod: &Pod, readonly: bool) -> Result<Vec<Value>, Error> {
    let hosts = pod.dir.join("hosts");
    if !hosts.exists() {
        copy_hosts(Path::new("/etc/hosts"), &hosts)?;
    }
    let all = [
        ("/etc/resolv.conf", pod.resolv_conf()),
        ("/etc/hostname", pod.hostname_file()),
        ("/etc/hosts", hosts),
    ];
    let there = all.iter().filter(|(_, path)| path.exists());
    Ok(there.map(|(place, path)| mounts::file(place, path, readonly)).collect())
}

/// The kubelet brings its own /etc/hosts. For clients that do not, the pod's containers share a copy of the host's.
fn copy_hosts(from: &Path, to: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let text = read(from, 1 << 20).unwrap_or_else(|_| b"127.0.0.1\tlocalhost\n::1\tlocalhost\n".to_vec());
    let failed = |source| Error::Look { what: "hosts file", path: to.to_owned(), source };
    let part = to.with_extension(format!("{:?}", std::thread::current().id()));
    fs::write(&part, text).map_err(failed)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o644)).map_err(failed)?;
    fs::rename(&part, to).map_err(failed)
}

/// A file of an image as far as it can be one of users: regular and of bounded size. None and others are empty.
fn user_file(layers: &[PathBuf], name: &str) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Look { what: "user file of the image", path: name.into(), source };
    match layers::find(layers, Path::new(name)) {
        Ok(layers::Found::File(path)) => read(&path, USER_FILE).map_err(failed),
        Ok(_) => Ok(Vec::new()),
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => Ok(Vec::new()),
        Err(e) => Err(failed(e)),
    }
}

/// Reads a regular file of at most so many bytes, without following a last link and without waiting for a FIFO.
fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes"))),
        false => Ok(bytes),
    }
}

/// What hooks and VM runtimes read by containerd's convention. Annotations of the client never come here: they would
/// steer what happens on the host (CVE-2024-3154).
fn annotations(request: &Request<'_>) -> Value {
    let (pod, container) = (request.pod.metadata(), request.config.metadata.clone().unwrap_or_default());
    json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": container.name,
        "io.kubernetes.cri.image-name": request.image.name,
        "io.kubernetes.cri.sandbox-id": request.pod.id,
        "io.kubernetes.cri.sandbox-name": pod.name,
        "io.kubernetes.cri.sandbox-namespace": pod.namespace,
        "io.kubernetes.cri.sandbox-uid": pod.uid,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::pods::Place;

    /// A host that has everything, for tables.
    pub fn host() -> Host {
        Host {
            capabilities: (1 << 41) - 1,
            apparmor: false,
            selinux: false,
            unified: true,
            hugetlb: false,
            swap: true,
            oom_floor: -1000,
            release: (6, 18),
            user_namespaces: true,
            hostname: "node-1".into(),
        }
    }

    /// One pod, one container, one image, in a directory of their own.
    struct World {
        dir: tempfile::TempDir,
        pod: v1::PodSandboxConfig,
        config: v1::ContainerConfig,
        image: Image,
        mounted: BTreeMap<String, Mounted>,
        settings: Config,
        host: Host,
    }

    fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir_all(layer.join("etc")).unwrap();
        fs::write(
            layer.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        fs::write(layer.join("etc/group"), "extra:x:50000:user\n").unwrap();
        let pod = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "pod".into(),
                uid: "u-1".into(),
                namespace: "ns".into(),
                attempt: 0,
            }),
            hostname: "pod-host".into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/podx".into(),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "ctr".into(), attempt: 0 }),
            linux: Some(v1::LinuxContainerConfig {
                resources: None,
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    masked_paths: vec!["/proc/kcore".into()],
                    readonly_paths: vec!["/proc/sys".into()],
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let image =
            Image { name: "img:1".into(), cmd: vec!["sh".into()], layers: vec![layer], ..Default::default() };
        let settings = Config { root: dir.path().join("root"), ..Config::default() };
        World { dir, pod, config, image, mounted: BTreeMap::new(), settings, host: host() }
    }

    impl World {
        fn security(&mut self) -> &mut v1::LinuxContainerSecurityContext {
            self.config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
        }

        fn pod_security(&mut self) -> &mut v1::LinuxSandboxSecurityContext {
            self.pod.linux.as_mut().unwrap().security_context.as_mut().unwrap()
        }

        fn options(&mut self, change: impl Fn(&mut v1::NamespaceOption)) {
            change(self.pod_security().namespace_options.as_mut().unwrap());
            change(self.security().namespace_options.as_mut().unwrap());
        }

        fn make(&self) -> Result<Made, Error> {
            let dir = self.dir.path().join("pod");
            fs::create_dir_all(&dir).unwrap();
            for name in ["resolv.conf", "hostname"] {
                fs::write(dir.join(name), "").unwrap();
            }
            let place = Place { dir, netns: None };
            let pod = Pod::new("p".repeat(64), self.pod.clone(), String::new(), 1, place);
            make(&Request {
                id: "c1",
                pod: &pod,
                config: &self.config,
                image: &self.image,
                mounted: &self.mounted,
                settings: &self.settings,
                host: &self.host,
            })
        }

        /// As the library of the specification's authors reads it.
        fn spec(&self) -> oci_spec::runtime::Spec {
            serde_json::from_value(self.make().unwrap().spec).unwrap()
        }

        fn namespaces(&self) -> Vec<String> {
            let made = self.make().unwrap();
            let list = made.spec["linux"]["namespaces"].as_array().unwrap().clone();
            let mut names: Vec<String> =
                list.iter().map(|n| n["type"].as_str().unwrap().to_owned()).collect();
            names.sort();
            names
        }
    }

    fn mount(inside: &str, outside: &Path) -> v1::Mount {
        v1::Mount {
            container_path: inside.into(),
            host_path: outside.to_str().unwrap().into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_specifications_own_library_reads_what_is_written() {
        let mut world = world();
        world.security().run_as_user = Some(v1::Int64Value { value: 1000 });
        world.security().seccomp = Some(v1::SecurityProfile::default());
        world.security().no_new_privs = true;
        world.config.linux.as_mut().unwrap().resources =
            Some(v1::LinuxContainerResources { cpu_shares: 512, oom_score_adj: 900, ..Default::default() });
        let spec = world.spec();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["sh"]);
        assert_eq!(process.cwd(), Path::new("/"));
        assert_eq!(process.no_new_privileges(), Some(true));
        assert_eq!(process.oom_score_adj(), Some(900));
        assert_eq!((process.user().uid(), process.user().gid()), (1000, 1000));
        assert_eq!(process.user().additional_gids().as_deref(), Some([1000, 50000].as_slice()));
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"HOSTNAME=pod-host".to_owned()) && env.contains(&"HOME=/home/user".to_owned()));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 14);
        assert!(capabilities.inheritable().as_ref().unwrap().is_empty());
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kubepods/podx/c1")));
        assert_eq!(linux.masked_paths().as_deref(), Some(["/proc/kcore".to_owned()].as_slice()));
        assert_eq!(linux.resources().as_ref().unwrap().cpu().as_ref().unwrap().shares(), Some(512));
        assert!(!linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        assert!(linux.seccomp().is_some());
        let mounts: Vec<_> =
            spec.mounts().as_ref().unwrap().iter().map(|m| m.destination().clone()).collect();
        assert!(mounts.contains(&"/etc/resolv.conf".into()) && mounts.contains(&"/sys/fs/cgroup".into()));
        assert!(mounts.contains(&"/etc/hosts".into()));
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "container");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-uid"], "u-1");
    }

    #[test]
    fn annotations_of_the_client_change_nothing() {
        let plain = world();
        let mut noisy = world();
        for key in [
            "org.systemd.property.TimeoutStopUSec",
            "run.oci.keep_original_groups",
            "io.containerd.runc.v2.group",
            "io.kubernetes.cri-o.Devices",
            "cdi.k8s.io/x",
            "io.katacontainers.config.hypervisor.path",
            "io.kubernetes.cri.container-type",
        ] {
            noisy.config.annotations.insert(key.into(), "evil".into());
            noisy.pod.annotations.insert(key.into(), "evil".into());
            noisy.config.labels.insert(key.into(), "evil".into());
        }
        let text = |world: &World| {
            world.make().unwrap().spec.to_string().replace(world.dir.path().to_str().unwrap(), "")
        };
        assert_eq!(text(&plain), text(&noisy));
    }

    #[test]
    fn a_privileged_container_is_unmasked_and_open_and_needs_a_privileged_pod() {
        let mut world = world();
        world.security().privileged = true;
        world.security().seccomp = Some(v1::SecurityProfile::default());
        assert!(matches!(world.make(), Err(Error::Privileged)));
        world.pod_security().privileged = true;
        let spec = world.make().unwrap().spec;
        assert_eq!(spec["linux"]["maskedPaths"], json!([]));
        assert_eq!(spec["linux"]["readonlyPaths"], json!([]));
        assert!(spec["linux"]["seccomp"].is_null());
        assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow": true, "access": "rwm"}]));
        assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 41);
        assert_eq!(spec["process"]["capabilities"]["inheritable"], json!([]));
    }

    #[test]
    fn namespaces_are_made_joined_or_the_hosts() {
        use NamespaceMode::{Container, Node, Pod as Whole, Target};
        let mut world = world();
        assert_eq!(world.namespaces(), ["cgroup", "ipc", "mount", "network", "pid", "uts"]);
        assert_eq!(
            world.make().unwrap().joins,
            Joins { net: true, ipc: true, uts: true, shm: true, ..Joins::default() }
        );
        world.options(|options| options.set_network(Node));
        assert_eq!(world.namespaces(), ["cgroup", "ipc", "mount", "pid"]);
        world.options(|options| options.set_ipc(Node));
        assert_eq!(world.namespaces(), ["cgroup", "mount", "pid"]);
        assert!(!world.make().unwrap().joins.shm);
        for (pod, container, joins, of, listed) in [
            (Whole, Whole, true, "", true),
            (Whole, Container, false, "", true),
            (Container, Whole, false, "", true),
            (Node, Whole, false, "", false),
            (Node, Node, false, "", false),
            (Container, Target, false, "other", true),
        ] {
            world.pod_security().namespace_options.as_mut().unwrap().set_pid(pod);
            let options = world.security().namespace_options.as_mut().unwrap();
            options.set_pid(container);
            options.target_id = of.into();
            let made = world.make().unwrap();
            assert_eq!((made.joins.pid, made.joins.pid_of.as_str()), (joins, of), "{pod:?} {container:?}");
            assert_eq!(world.namespaces().contains(&"pid".to_owned()), listed, "{pod:?} {container:?}");
        }
        world.security().namespace_options.as_mut().unwrap().set_pid(Target);
        world.security().namespace_options.as_mut().unwrap().target_id.clear();
        assert!(matches!(world.make(), Err(Error::Namespaces(_))));
    }

    #[test]
    fn a_user_namespace_maps_the_container_and_its_volumes() {
        let mut world = world();
        let user = v1::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![v1::IdMapping { host_id: 1000, container_id: 0, length: 100_000 }],
            gids: vec![v1::IdMapping { host_id: 1000, container_id: 0, length: 100_000 }],
        };
        world.options(|options| options.userns_options = Some(user.clone()));
        world.image.volumes = vec!["/data".into()];
        let made = world.make().unwrap();
        assert!(made.joins.user);
        let map = json!([{"containerID": 0, "hostID": 1000, "size": 100_000}]);
        assert_eq!(made.spec["linux"]["uidMappings"], map);
        let volume =
            made.spec["mounts"].as_array().unwrap().iter().find(|m| m["destination"] == "/data").unwrap();
        assert_eq!(volume["gidMappings"], map);
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            let options = world.security().namespace_options.as_mut().unwrap();
            options.userns_options.as_mut().unwrap().mode = mode.into();
            assert!(matches!(world.make(), Err(Error::Namespaces(_))), "{mode:?}");
        }
        world.pod_security().namespace_options.as_mut().unwrap().userns_options = None;
        world.security().namespace_options.as_mut().unwrap().userns_options.as_mut().unwrap().mode = 0;
        assert!(matches!(world.make(), Err(Error::Namespaces(_))));
    }

    #[test]
    fn bytes_that_are_no_text_go_to_their_own_field() {
        let mut world = world();
        world.config.envs = vec![v1::KeyValue { key: "RAW".into(), value: vec![0xff, b'x'] }];
        let spec = world.make().unwrap().spec;
        assert_eq!(spec["process"]["crispEnv"], json!(["UkFXPf94"]));
        assert!(!spec["process"]["env"].to_string().contains("RAW"));
    }

    #[test]
    fn mounts_of_the_client_are_found_and_ordered() {
        let mut world = world();
        let host = world.dir.path().join("host");
        fs::create_dir(&host).unwrap();
        world.config.mounts = vec![mount("/a/b", &host), mount("/a", &host), mount("/etc/hosts", &host)];
        let spec = world.make().unwrap().spec;
        let places: Vec<&str> =
            spec["mounts"].as_array().unwrap().iter().map(|m| m["destination"].as_str().unwrap()).collect();
        let at = |place: &str| places.iter().position(|p| *p == place).unwrap();
        assert!(at("/a") < at("/a/b"));
        assert_eq!(places.iter().filter(|place| **place == "/etc/hosts").count(), 1);
        assert!(spec["linux"]["rootfsPropagation"].is_null());
    }

    #[test]
    fn an_image_is_mounted_whole_or_in_part() {
        let mut world = world();
        let layer = world.dir.path().join("other");
        fs::create_dir_all(layer.join("sub")).unwrap();
        fs::write(layer.join("file"), "x").unwrap();
        let mounted = Mounted { id: "sha256:9".into(), layers: vec![layer.clone()] };
        world.mounted.insert("sha256:9".into(), mounted);
        let image = |id: &str, sub: &str| v1::Mount {
            container_path: "/img".into(),
            image: Some(v1::ImageSpec { image: id.into(), ..Default::default() }),
            image_sub_path: sub.into(),
            readonly: true,
            ..Default::default()
        };
        let found = |world: &World| {
            let spec = world.make().unwrap().spec;
            spec["mounts"].as_array().unwrap().iter().find(|m| m["destination"] == "/img").unwrap().clone()
        };
        world.config.mounts = vec![image("sha256:9", "")];
        assert_eq!(found(&world)["type"], "overlay");
        assert!(volumes::empty(&world.settings).is_dir());
        world.config.mounts = vec![image("sha256:9", "sub")];
        assert!(found(&world)["options"][0].as_str().unwrap().contains("other/sub"));
        world.config.mounts = vec![image("sha256:9", "file")];
        let options = found(&world)["options"].to_string();
        assert!(options.contains("/other:") && options.contains("crisp.file=file"), "{options}");
        world.config.mounts = vec![image("sha256:9", "none")];
        let error = world.make().unwrap_err().to_string();
        assert!(error.starts_with("ImageVolumeMountFailed"), "{error}");
        world.config.mounts = vec![image("sha256:8", "")];
        assert!(matches!(world.make(), Err(Error::ImageMissing(_))));
    }

    #[test]
    fn volumes_of_the_image_give_way_to_mounts_and_can_be_ignored() {
        let mut world = world();
        let host = world.dir.path().to_owned();
        world.image.volumes =
            vec!["/data".into(), "/data/".into(), "rel".into(), "/".into(), "/taken".into()];
        world.config.mounts = vec![mount("/taken", &host)];
        let places = |world: &World| -> Vec<String> {
            let spec = world.make().unwrap().spec;
            let list = spec["mounts"].as_array().unwrap().clone();
            let own = list.iter().filter(|m| m["source"].as_str().unwrap().contains("/volumes/"));
            own.map(|m| m["destination"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(places(&world), ["/data", "/rel"]);
        world.settings.security.ignore_image_defined_volumes = true;
        assert!(places(&world).is_empty());
    }

    #[test]
    fn a_hostile_passwd_is_passed_over_or_refused_quickly() {
        let world = world();
        let etc = world.image.layers[0].join("etc");
        let name = etc.join("passwd");
        fs::remove_file(&name).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &name,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert_eq!(world.make().unwrap().user.uid, 0);
        fs::remove_file(&name).unwrap();
        std::os::unix::fs::symlink("passwd", &name).unwrap();
        assert_eq!(world.make().unwrap().user.uid, 0);
        fs::remove_file(&name).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &name).unwrap();
        assert_eq!(world.make().unwrap().user.uid, 0);
        fs::remove_file(&name).unwrap();
        fs::File::create(&name).unwrap().set_len(8 << 30).unwrap();
        assert!(matches!(world.make(), Err(Error::Look { .. })));
    }

    #[test]
    fn a_profile_that_is_asked_for_is_there_or_an_error() {
        let mut world = world();
        let file = world.dir.path().join("p.json");
        let set = |world: &mut World, reference: &str| {
            world.security().seccomp = Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: reference.into(),
            });
        };
        for reference in ["", "rel.json", file.to_str().unwrap(), "/dev/zero", "/"] {
            set(&mut world, reference);
            assert!(world.make().is_err(), "{reference}");
        }
        fs::write(&file, "{\"defaultAction\": \"SCMP_ACT_ALLOW\"}").unwrap();
        set(&mut world, file.to_str().unwrap());
        assert_eq!(world.make().unwrap().spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ALLOW");
        world.security().seccomp = None;
        assert!(world.make().unwrap().spec["linux"]["seccomp"].is_null());
        world.settings.security.unset_seccomp_profile = "runtime/default".into();
        assert!(world.make().unwrap().spec["linux"]["seccomp"].is_object());
    }

    #[test]
    fn settings_reach_the_spec() {
        let mut world = world();
        world.settings.defaults.default_ulimits = vec!["nofile=10:20".into()];
        world.settings.defaults.default_env = vec!["PROXY=x".into()];
        world.settings.defaults.default_capabilities = vec!["CHOWN".into()];
        world.settings.defaults.pids_limit = 77;
        let spec = world.make().unwrap().spec;
        assert_eq!(spec["process"]["rlimits"], json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]));
        assert!(spec["process"]["env"].to_string().contains("PROXY=x"));
        assert_eq!(spec["process"]["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 77);
        world.settings.defaults.default_ulimits = vec!["nonsense".into()];
        assert!(matches!(world.make(), Err(Error::Ulimit(_))));
    }

    #[test]
    fn devices_are_nodes_and_rules() {
        let mut world = world();
        world.config.devices = vec![v1::Device {
            container_path: "/dev/x".into(),
            host_path: "/dev/null".into(),
            permissions: "rw".into(),
        }];
        world.security().run_as_user = Some(v1::Int64Value { value: 1000 });
        let spec = world.make().unwrap().spec;
        assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/x");
        assert_eq!(spec["linux"]["devices"][0]["uid"], 0);
        let rules = spec["linux"]["resources"]["devices"].as_array().unwrap().clone();
        assert_eq!(rules.last().unwrap()["access"], "rw");
        world.settings.security.device_ownership_from_security_context = true;
        assert_eq!(world.make().unwrap().spec["linux"]["devices"][0]["uid"], 1000);
    }

    #[test]
    fn the_stop_signal_is_a_number_of_linux() {
        let mut world = world();
        world.image.stop_signal = Some("SIGRTMIN+3".into());
        assert_eq!(world.make().unwrap().stop_signal, 37);
        world.config.stop_signal = v1::Signal::Sigusr1.into();
        assert_eq!(world.make().unwrap().stop_signal, libc::SIGUSR1);
        world.config.stop_signal = 99;
        assert!(matches!(world.make(), Err(Error::StopSignal(99))));
    }

    #[test]
    fn a_megabyte_of_working_directory_is_refused() {
        let mut world = world();
        world.config.working_dir = format!("/{}", "x".repeat(1 << 20));
        assert!(matches!(world.make(), Err(Error::TooLong(_))));
    }
}
