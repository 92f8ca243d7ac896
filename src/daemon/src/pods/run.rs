//! Makes and starts a pod. What one step needs of another decides the order, the rest runs side by side; a failure
//! undoes all of it, and what cannot be undone now stays on record.

use std::sync::Arc;

use cri_api::v1::{self, ContainerEventType};
use network::netns;
use tracing::{info, warn};

use super::{Phase, Pod, files, network as net, record, stop, watch, wish::Wish};
use crate::{
    daemon::{Birth, Daemon, blocking, now},
    error::{Fault, Result},
    events,
    shim::Shim,
    store::{Change, Kind},
};

/// Returns the id of the pod when it is ready. A repeated request joins the one in flight, and gets the pod of one
/// that was done already: whether its answer arrived is more than we can know.
pub async fn run(daemon: &Arc<Daemon>, request: v1::RunPodSandboxRequest) -> Result<String> {
    let wish = Wish::check(&daemon.config(), &daemon.hostname, request)?;
    let worker = daemon.clone();
    daemon.calls.join(wish.name(), move || make(worker, wish)).await
}

async fn make(daemon: Arc<Daemon>, wish: Wish) -> Result<String> {
    if let Some(pod) = daemon.pods.with(|pod| pod.config.metadata == wish.config.metadata).first() {
        return match pod.ready() && pod.config == wish.config && pod.runtime_handler == wish.handler {
            true => Ok(pod.id.clone()),
            false => Err(Fault::Taken(wish.name(), format!("pod {}", pod.id)).into()),
        };
    }
    let birth = Birth::new(&daemon)?;
    let place = daemon.place(&birth.id, wish.network);
    let pod = Arc::new(Pod::new(birth.id.clone(), wish.config.clone(), wish.handler.clone(), now(), place));
    match build(&daemon, &pod, &wish).await {
        Ok(()) => {
            daemon.pods.insert(&pod.id, pod.clone());
            watch::begin(&daemon, &pod);
            events::emit_pod(&daemon, ContainerEventType::ContainerCreatedEvent, &pod);
            events::emit_pod(&daemon, ContainerEventType::ContainerStartedEvent, &pod);
            info!(pod = %pod.id, name = wish.name(), "pod ready");
            Ok(pod.id.clone())
        }
        Err(error) => {
            unmake(&daemon, &pod).await;
            Err(error)
        }
    }
}

async fn build(daemon: &Arc<Daemon>, pod: &Arc<Pod>, wish: &Wish) -> Result<()> {
    let program = daemon.program(&wish.handler)?;
    files::directory(&pod.dir).map_err(Fault::io("make", &pod.dir))?;

    let (recorded, namespace, written, shim) = tokio::join!(
        daemon.store.put(record::row(pod)),
        make_namespace(pod, wish),
        write_files(pod, wish),
        Shim::start(&program, &pod.dir, &pod.id),
    );
    // Before any error is looked at: what runs must be known to be undone.
    let shim = shim.map(Arc::new);
    pod.set_shim(shim.as_ref().ok().cloned());
    recorded?;
    namespace?;
    written?;
    let shim = shim.map_err(Fault::shim("start the pod's shim"))?;

    let ips = match wish.options.new_net {
        // The namespace must belong to the pod's user namespace, so the shim makes it.
        true => {
            create(daemon, pod, wish, &shim).await?;
            pin_namespace(pod, &shim).await?;
            net::attach(daemon, pod, wish).await?
        }
        false => {
            let (created, ips) =
                tokio::join!(create(daemon, pod, wish, &shim), net::attach(daemon, pod, wish));
            created?;
            ips?
        }
    };
    pod.change(|state| (state.phase, state.ips) = (Phase::Ready, ips));
    daemon.store.put(record::row(pod)).await?;
    Ok(())
}

async fn create(daemon: &Daemon, pod: &Pod, wish: &Wish, shim: &Shim) -> Result<()> {
    let mut options = wish.options.clone();
    if pod.cgroup_parent() == pod.own_cgroup_parent() {
        options.own_cgroup_parent = pod.own_cgroup_parent();
    }
    options.shim_cgroup = daemon.config().cgroup.shim_cgroup.clone();
    let netns = if wish.options.new_net { None } else { pod.netns.as_deref() };
    shim.create_pod(&pod.id, &pod.dir, netns, &options).await.map_err(Fault::shim("create pod"))
}

async fn make_namespace(pod: &Pod, wish: &Wish) -> Result<()> {
    match pod.netns.clone() {
        Some(path) if !wish.options.new_net => {
            blocking(move || netns::create(&path)).await.map_err(Fault::network("make network namespace"))
        }
        _ => Ok(()),
    }
}

async fn pin_namespace(pod: &Pod, shim: &Shim) -> Result<()> {
    let Some(path) = pod.netns.clone() else { return Ok(()) };
    let from = shim.network_namespace().await.map_err(Fault::shim("find the pod's network namespace"))?;
    blocking(move || {
        let file = std::fs::File::open(&from).map_err(Fault::io("open", from))?;
        netns::pin(std::os::fd::AsFd::as_fd(&file), &path).map_err(Fault::network("pin network namespace"))
    })
    .await
}

async fn write_files(pod: &Pod, wish: &Wish) -> Result<()> {
    let (dir, dns, hostname) = (pod.dir.clone(), pod.config.dns_config.clone(), wish.hostname.clone());
    let log = std::path::PathBuf::from(&pod.config.log_directory);
    blocking(move || {
        files::write(&dir, dns.as_ref(), &hostname).map_err(Fault::io("write files of the pod in", dir))?;
        files::log_directory(&log).map_err(Fault::io("make", log))
    })
    .await
}

/// Takes back what `build` made, in reverse. The name is free afterwards, whatever happens here.
pub async fn unmake(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    if let Err(e) = stop::end_processes(daemon, pod).await {
        warn!(pod = %pod.id, error = %e, "undoing a failed pod: its shim does not end, killing it");
        stop::kill_shim(daemon, pod).await;
    }
    if let Err(e) = net::release(daemon, &pod.id).await {
        warn!(pod = %pod.id, error = %e, "undoing a failed pod: its network stays on record");
        net::release_later(daemon, &pod.id);
    }
    let dir = pod.dir.clone();
    if let Err(e) = blocking(move || std::fs::remove_dir_all(dir)).await
        && e.kind() != std::io::ErrorKind::NotFound
    {
        warn!(pod = %pod.id, error = %e, "undoing a failed pod: its directory stays until the next start");
    }
    daemon.store.forget(vec![Change::Drop(Kind::Pod, pod.id.clone())]).await;
}
