//! Makes a container in a ready pod: checks the request, lays a writable layer over the image, writes the OCI spec.
//! Nothing of it runs and nothing is mounted yet.

use std::{collections::BTreeMap, fs, os::unix::fs::DirBuilderExt, path::PathBuf, sync::Arc};

use cri_api::v1::{self, ContainerEventType};
use image::Image;
use tokio::{
    sync::Semaphore,
    time::{Duration, timeout},
};
use tracing::{info, warn};

use super::{Container, Facts, record, spec};
use crate::{
    config::Config,
    daemon::{Birth, Daemon, blocking, now},
    error::{Fault, Result},
    events,
    pods::Pod,
    store::{Change, Kind},
};

/// How long looking at the host's files may take: a mount source can lie on a file system that hangs.
const LOOK: Duration = Duration::from_secs(60);
/// Longest command line, environment and other lists of a request, in bytes: more than the kernel takes for one exec.
const LONGEST: usize = 6 << 20;

/// Returns the id of the new container. A repeated request joins the one in flight, and gets the container of one
/// that was done already: whether its answer arrived is more than we can know.
pub async fn create(daemon: &Arc<Daemon>, request: v1::CreateContainerRequest) -> Result<String> {
    let pod = daemon.pod(&request.pod_sandbox_id)?;
    let config = request.config.ok_or_else(|| Fault::invalid("config is missing"))?;
    check(&config)?;
    let metadata = config.metadata.clone().unwrap_or_default();
    let name = format!("container {}/{}/{}", pod.id, metadata.name, metadata.attempt);
    let (worker, taken) = (daemon.clone(), name.clone());
    daemon.calls.join(name, move || make(worker, pod, config, taken)).await
}

async fn make(
    daemon: Arc<Daemon>,
    pod: Arc<Pod>,
    config: v1::ContainerConfig,
    name: String,
) -> Result<String> {
    if !pod.ready() {
        return Err(Fault::PodNotReady(pod.id.clone()).into());
    }
    let same = |other: &Container| other.pod.id == pod.id && other.config.metadata == config.metadata;
    if let Some(other) = daemon.containers.with(same).first() {
        return match other.phase() == super::Phase::Created && other.config == config {
            true => Ok(other.id.clone()),
            false => Err(Fault::Taken(name, format!("container {}", other.id)).into()),
        };
    }
    let birth = Birth::new(&daemon)?;
    let id = birth.id.clone();
    match build(&daemon, &pod, config, &id).await {
        Ok(container) => {
            let container = Arc::new(container);
            daemon.containers.insert(&id, container.clone());
            // Looked at again when all can see the container: a stop or removal of the pod either sees it too, or
            // has told by now that there is no pod to be in.
            if !pod.ready() {
                daemon.containers.remove(&id);
                unmake(&daemon, &pod, &id).await;
                return Err(Fault::PodNotReady(pod.id.clone()).into());
            }
            events::emit(&daemon, ContainerEventType::ContainerCreatedEvent, &container);
            info!(container = %id, pod = %pod.id, name = container.metadata().name, "container created");
            Ok(id)
        }
        Err(error) => {
            unmake(&daemon, &pod, &id).await;
            Err(error)
        }
    }
}

/// Pid mode TARGET reaches a running container of the same pod and nobody else's. The start looks again.
fn check_target(daemon: &Daemon, pod: &Pod, target: &str) -> Result<()> {
    if target.is_empty() {
        return Ok(());
    }
    match daemon.containers.get(target).filter(|container| container.pod.id == pod.id) {
        Some(container) => container.check_phase(super::Phase::Running),
        None => Err(Fault::invalid(format!("pid target {target} is no container of pod {}", pod.id))),
    }
}

async fn build(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    config: v1::ContainerConfig,
    id: &str,
) -> Result<Container> {
    let wanted = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    let image = daemon.images.find(wanted).ok_or_else(|| Fault::NoImage(wanted.into()))?;
    let settings = daemon.config();
    let image_name = name_of(config.image.as_ref(), &image);

    let snapshot = daemon.images.prepare(&image.id, id).await.map_err(Fault::image("make writable layer"))?;
    let mounted = mounted(daemon, &config, id).await?;
    let mounts = mounted.iter().map(|(name, image)| (name.clone(), image.id.clone())).collect();
    let parts = parts(image_name.clone(), &image, snapshot.lower);
    let made = {
        let (pod, config, id, settings) = (pod.clone(), config.clone(), id.to_string(), settings.clone());
        let seats = [daemon.looks.clone(), pod.looks.clone()];
        bounded(seats, move || look(&pod, &config, &id, &parts, &mounted, &settings)).await??
    };

    check_target(daemon, pod, &made.joins.pid_of)?;

    let user = made.user.to_cri().linux.unwrap_or_default();
    let facts = Facts {
        image_id: image.id.clone(),
        image_ref: image.digests.first().unwrap_or(&image.id).clone(),
        image_name,
        cgroup: spec::cgroup(pod, id),
        stop_signal: spec::signal::to_cri(made.stop_signal).into(),
        uid: user.uid,
        gid: user.gid,
        groups: user.supplemental_groups,
        mounts,
        joins: made.joins,
    };
    let container = Container::new(id.into(), pod.clone(), config, now(), facts);
    let json = serde_json::to_vec(&made.spec).map_err(|e| Fault::invalid(e.to_string()))?;
    let bundle = container.bundle();
    fs::DirBuilder::new().mode(0o700).create(&bundle).map_err(Fault::io("make", bundle))?;
    container.write_spec(&json)?;
    daemon.store.put(record::row(&container)).await?;
    Ok(container)
}

/// Takes back what `build` made, in reverse.
async fn unmake(daemon: &Arc<Daemon>, pod: &Pod, id: &str) {
    let bundle = pod.dir.join(shim_api::rundir::CONTAINERS).join(id);
    let (root, own) = (daemon.config().root.clone(), id.to_string());
    let removed = blocking(move || {
        let _ = fs::remove_dir_all(bundle);
        spec::volumes::remove(&root, &own)
    })
    .await;
    if let Err(e) = removed {
        warn!(container = id, error = %e, "undoing a failed container: its volumes stay until the next start");
    }
    daemon.store.forget(vec![Change::Drop(Kind::Container, id.into())]).await;
    if let Err(e) = daemon.images.release(id).await {
        warn!(container = id, error = %e, "undoing a failed container: its writable layer stays until the next start");
    }
}

/// Looks at the host. One that hangs costs a thread until it does not, and never the call; how many a pod and all
/// together may cost is bounded by the seats, which a hung one keeps.
async fn bounded<T: Send + 'static>(
    seats: [Arc<Semaphore>; 2],
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let looking = async {
        let [all, pod] = seats;
        // Semaphores of ours are never closed. The pod's first: one that waits takes no seat from others.
        let taken = (pod.acquire_owned().await, all.acquire_owned().await);
        blocking(move || {
            let _taken = taken;
            work()
        })
        .await
    };
    timeout(LOOK, looking)
        .await
        .map_err(|_| Fault::Deadline { act: "looking at the sources of mounts".into(), after: LOOK }.into())
}

fn look(
    pod: &Pod,
    config: &v1::ContainerConfig,
    id: &str,
    image: &spec::Image,
    mounted: &BTreeMap<String, spec::Mounted>,
    settings: &Config,
) -> Result<spec::Made> {
    let host = spec::host::get();
    spec::make(&spec::Request { id, pod, config, image, mounted, settings, host })
        .map_err(|e| Fault::Spec(e).into())
}

/// What users call the image: what the pod said, else what the client said, unless that is only an id.
fn name_of(spec: Option<&v1::ImageSpec>, image: &Image) -> String {
    let asked = spec.cloned().unwrap_or_default();
    let names = [asked.user_specified_image, asked.image];
    let by_name = |name: &&String| !name.is_empty() && !image.id.ends_with(name.as_str());
    let known = names.iter().find(by_name).or(image.tags.first()).or(image.digests.first());
    known.unwrap_or(&image.id).clone()
}

fn parts(name: String, image: &Image, layers: Vec<PathBuf>) -> spec::Image {
    let config = &image.config;
    spec::Image {
        name,
        user: config.user.clone(),
        env: config.env.clone(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        working_dir: config.working_dir.clone(),
        stop_signal: Some(config.stop_signal.clone()).filter(|signal| !signal.is_empty()),
        volumes: config.volumes.iter().cloned().collect(),
        layers,
    }
}

/// The images that the config mounts, by the name that it has for them. They stay as long as the container.
async fn mounted(
    daemon: &Daemon,
    config: &v1::ContainerConfig,
    id: &str,
) -> Result<BTreeMap<String, spec::Mounted>> {
    let mut images = BTreeMap::new();
    let names = config.mounts.iter().filter_map(|mount| Some(mount.image.as_ref()?.image.as_str()));
    for name in names.filter(|name| !name.is_empty()) {
        let missing = || Fault::Spec(spec::Error::ImageMissing(name.into()));
        let image = daemon.images.find(name).ok_or_else(missing)?;
        let layers = daemon.images.view(&image.id, id).await.map_err(Fault::image("look into an image"))?;
        images.insert(name.into(), spec::Mounted { id: image.id.clone(), layers });
    }
    Ok(images)
}

/// What can be refused by looking at the request alone; the parts of the spec check theirs.
fn check(config: &v1::ContainerConfig) -> Result<()> {
    let metadata = config.metadata.as_ref().ok_or_else(|| Fault::invalid("config.metadata is missing"))?;
    if metadata.name.is_empty() {
        return Err(Fault::invalid("config.metadata.name is missing"));
    }
    if config.image.as_ref().is_none_or(|image| image.image.is_empty()) {
        return Err(Fault::invalid("config.image is missing"));
    }
    let log = &config.log_path;
    if log.starts_with('/') || log.contains('\0') || log.split('/').any(|part| part == "..") {
        return Err(Fault::invalid(format!("log_path {log:?} is not a path below the pod's log directory")));
    }
    let texts = config.command.iter().chain(&config.args).map(String::len);
    let envs = config.envs.iter().map(|env| env.key.len() + env.value.len());
    if texts.chain(envs).sum::<usize>() > LONGEST {
        return Err(Fault::invalid("command, args and envs are together larger than the kernel takes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "web".into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn s58_a_log_path_stays_below_its_directory() {
        for (path, good) in [
            ("", true),
            ("web/0.log", true),
            ("web..0.log", true),
            ("/etc/cron.d/x", false),
            ("../x", false),
            ("web/../../x", false),
            ("a\0b", false),
        ] {
            assert_eq!(
                check(&v1::ContainerConfig { log_path: path.into(), ..config() }).is_ok(),
                good,
                "{path:?}"
            );
        }
    }

    #[test]
    fn s18_ten_megabytes_of_environment_are_refused() {
        let env = v1::KeyValue { key: "A".into(), value: vec![b'x'; 10 << 20] };
        assert!(check(&v1::ContainerConfig { envs: vec![env], ..config() }).is_err());
    }

    #[test]
    fn a_container_needs_a_name_and_an_image() {
        assert!(check(&config()).is_ok());
        assert!(check(&v1::ContainerConfig { metadata: None, ..config() }).is_err());
        assert!(check(&v1::ContainerConfig { image: None, ..config() }).is_err());
    }
}
