//! Brings a new daemon to where the last one was: reads what is on record, meets the shims that live, compares, goes
//! on with what was begun, and collects what has no owner. Decides nothing for a shim that is slow: whether its
//! process lives is the kernel's word, not the shim's.
//!
//! What clients see is right when [`run`] returns; what takes time goes on behind.

use std::{collections::HashSet, fs, io, path::Path, sync::Arc, time::Duration};

use futures_util::future::join_all;
use network::netns;
use shim_api::rundir::{self, Shim as Record};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::{
    containers::{self, Container, exit},
    daemon::{Birth, Daemon, IO, NETNS, PODS, blocking, is_id, now},
    pods::{self, Phase, Pod, network as net},
    shim::{self, Shim},
    store::{Change, Kind, Row},
};

/// How long the first answer waits for the shims' clean-up of what died while nobody looked.
const CLEAN: Duration = Duration::from_secs(5);
/// How long a shim's answer is waited for: one that is frozen must not hold up the others.
const ANSWER: Duration = Duration::from_secs(1);
/// How often a start under way is looked at.
const STARTING: Duration = Duration::from_millis(10);

/// Restores all objects, and begins what is left to do.
pub async fn run(daemon: &Arc<Daemon>, rows: Vec<Row>) {
    let begun = std::time::Instant::now();
    read(daemon, &rows).await;
    meet(daemon).await;
    starts(daemon).await;
    let (ended, left) = (settle(daemon).await, unfinished(daemon));
    info!(
        pods = daemon.pods.all().len(),
        containers = daemon.containers.all().len(),
        ended,
        unfinished = left,
        took = ?begun.elapsed(),
        "recovered"
    );
    let daemon = daemon.clone();
    tokio::spawn(async move { collect(&daemon).await });
}

/// Rows become objects; one that cannot be understood is set aside.
async fn read(daemon: &Arc<Daemon>, rows: &[Row]) {
    let of = |kind| rows.iter().filter(move |row| row.kind == kind);
    for row in of(Kind::Attachment) {
        if let Err(why) = daemon.attachments.restore(row) {
            set_aside(daemon, row, why).await;
        }
    }
    for row in of(Kind::Pod) {
        match pods::record::read(row, |id, network| daemon.place(id, network)) {
            Ok(pod) => daemon.pods.insert(&row.id, Arc::new(pod)),
            Err(why) => set_aside(daemon, row, why).await,
        }
    }
    for row in of(Kind::Container) {
        match containers::record::read(row, |id| daemon.pods.get(id)) {
            Ok(container) => daemon.containers.insert(&row.id, Arc::new(container)),
            Err(why) => set_aside(daemon, row, why).await,
        }
    }
}

async fn set_aside(daemon: &Daemon, row: &Row, why: String) {
    error!(table = %row.kind, id = row.id, why, "record cannot be understood: quarantined");
    let change = Change::Quarantine(row.kind, row.id.clone(), why);
    if let Err(e) = daemon.store.apply(vec![change]).await {
        error!(table = %row.kind, id = row.id, error = %e, "quarantine");
    }
}

/// Connects to every shim whose process lives.
async fn meet(daemon: &Arc<Daemon>) {
    let all = daemon.pods.all();
    join_all(all.iter().map(|pod| async move {
        match find(&pod.dir).await {
            Ok(Some(shim)) => {
                let shim = Arc::new(shim);
                pod.set_shim(Some(shim.clone()));
                // That a stop was begun is not written before it is, so only the shim knows of one.
                if let Ok(Ok(false)) = timeout(ANSWER, shim.is_ready(&pod.id)).await {
                    pod.change(|state| match state.phase {
                        Phase::Ready => state.phase = Phase::Stopping,
                        Phase::Creating | Phase::Stopping | Phase::Stopped => {}
                    });
                }
            }
            Ok(None) => {}
            Err(e) => warn!(pod = %pod.id, error = %e, "shim lives and cannot be reached: it is tried again"),
        }
    }))
    .await;
}

/// The shim of a run directory, if the process lives that its record names.
async fn find(dir: &Path) -> Result<Option<Shim>, shim::Error> {
    let failed = |e| shim::Error::Connect(dir.into(), e);
    let Some(process) = record_of(dir) else { return Ok(None) };
    match shim::find(&process).map_err(failed)? {
        Some(pidfd) => Shim::meet(dir, process, pidfd).await.map(Some),
        None => Ok(None),
    }
}

fn record_of(dir: &Path) -> Option<rundir::Process> {
    let path = dir.join(rundir::SHIM);
    match rundir::decode::<Record>(&fs::read(&path).ok()?) {
        Ok(record) => Some(record.process),
        Err(e) => {
            error!(record = %path.display(), error = %e, "set aside");
            None
        }
    }
}

/// Waits for the starts that the last daemon had asked for. A shim goes on with them, and records nothing before the
/// program runs: until then the container looks as if nobody had begun.
async fn starts(daemon: &Daemon) {
    let created = daemon.containers.all().into_iter().filter(|c| c.phase() == containers::Phase::Created);
    let waits = created.filter_map(|container| Some((container.pod.shim()?, container)));
    let done = join_all(waits.map(|(shim, container)| async move {
        // An error is its end as well: the shim does not know the container.
        while shim.is_starting(&container.id).await.unwrap_or(false) {
            tokio::time::sleep(STARTING).await;
        }
    }));
    if timeout(CLEAN, done).await.is_err() {
        warn!("a container's start that the last daemon asked for takes long");
    }
}

/// What the last daemon thought and what is the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it was.
    Same,
    /// Runs, whatever the row says: the shim recorded a start.
    Runs,
    /// Has ended, by its record or without one.
    Ended,
}

/// The run directory knows more than the row: it was written by the one who saw it.
fn judge(phase: containers::Phase, started: bool, exited: bool, shim: bool) -> Verdict {
    use containers::Phase::{Created, Exited, Running};
    match (phase, started, exited, shim) {
        (Exited, ..) => Verdict::Same,
        (Created, false, false, _) => Verdict::Same,
        (_, _, true, _) => Verdict::Ended,
        (Created, true, false, true) | (Running, _, false, true) => Verdict::Runs,
        (Created, true, false, false) | (Running, _, false, false) => Verdict::Ended,
    }
}

/// Corrects the states of containers and pods; returns how many containers had ended.
async fn settle(daemon: &Arc<Daemon>) -> usize {
    // The dead shims' clean-up writes the exit records that the next step reads.
    let dead: Vec<Arc<Pod>> = daemon.pods.with(|pod| pod.shim().is_none() && alive_on_record(pod));
    let cleaned = join_all(dead.iter().map(|pod| async move {
        if record_of(&pod.dir).is_some_and(|process| shim::find(&process).is_ok_and(|found| found.is_some()))
        {
            return;
        }
        if pod.dir.exists() {
            pods::watch::clean_run_directory(daemon, pod).await;
        }
    }));
    if timeout(CLEAN, cleaned).await.is_err() {
        warn!("cleaning up after dead shims takes long, it goes on behind");
    }
    let mut ended = 0;
    for container in daemon.containers.all() {
        let (init, exit) = (exit::init_record(&container), exit::exit_record(&container));
        let started = init.as_ref().is_some_and(|init| init.started_at != 0);
        match judge(container.phase(), started, exit.is_some(), container.pod.shim().is_some()) {
            Verdict::Same => {}
            verdict => {
                container.change(|state| {
                    state.phase = containers::Phase::Running;
                    if let Some(init) = &init {
                        (state.pid, state.started_at) = (init.process.pid, init.started_at);
                    }
                });
                if verdict == Verdict::Ended {
                    ended += 1;
                    exit::settle(daemon, &container);
                }
            }
        }
    }
    ended
}

fn alive_on_record(pod: &Pod) -> bool {
    pod.look(|state| matches!(state.phase, Phase::Creating | Phase::Ready | Phase::Stopping))
}

/// Begins what the last daemon had begun; returns how much of it there is.
fn unfinished(daemon: &Arc<Daemon>) -> usize {
    let mut count = 0;
    for container in daemon.containers.all() {
        if let (containers::Phase::Running, Some(shim)) = (container.phase(), container.pod.shim()) {
            exit::watch(daemon, &container, shim);
        }
        count += usize::from(resume_container(daemon, &container));
    }
    for pod in daemon.pods.all() {
        count += usize::from(resume_pod(daemon, &pod));
    }
    let orphaned = |id: &String| daemon.pods.get(id).is_none();
    for id in daemon.attachments.pods().iter().filter(|id| orphaned(id)) {
        net::release_later(daemon, id);
        count += 1;
    }
    count
}

fn resume_container(daemon: &Arc<Daemon>, container: &Arc<Container>) -> bool {
    let (removing, stop_by) = container.look(|state| (state.removing, state.stop_by));
    let (daemon, container) = (daemon.clone(), container.clone());
    if removing {
        tokio::spawn(async move {
            if let Err(e) = containers::remove::forget(&daemon, &container).await {
                warn!(container = %container.id, error = %e, "continue removal");
            }
        });
        return true;
    }
    let Some(by) = stop_by.filter(|_| container.phase() == containers::Phase::Running) else { return false };
    let grace = Duration::from_nanos(u64::try_from(by.saturating_sub(now())).unwrap_or(0));
    tokio::spawn(async move {
        if let Err(e) = containers::stop::end(&daemon, &container, grace).await {
            warn!(container = %container.id, error = %e, "continue stop");
        }
    });
    true
}

/// A pod that was being made has no one who waits for it. A ready one goes on, unless its shim has died. One whose
/// shim lives but cannot be reached stays as it is, and is tried again.
fn resume_pod(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> bool {
    let phase = pod.look(|state| state.phase);
    let (daemon, pod) = (daemon.clone(), pod.clone());
    match (phase, pod.shim().is_some()) {
        (Phase::Creating, _) => {
            let birth = Birth::of(&daemon, pod.id.clone());
            daemon.pods.remove(&pod.id);
            tokio::spawn(async move {
                pods::run::unmake(&daemon, &pod).await;
                drop(birth);
            });
        }
        (Phase::Ready, true) => {
            pods::watch::begin(&daemon, &pod);
            return false;
        }
        (Phase::Ready, false)
            if record_of(&pod.dir).is_some_and(|p| matches!(shim::find(&p), Ok(Some(_)))) =>
        {
            tokio::spawn(async move { reach(&daemon, &pod).await });
        }
        (Phase::Ready | Phase::Stopping, _) => {
            pod.change(|state| state.phase = Phase::Stopping);
            tokio::spawn(async move {
                let _act = pod.act.lock().await;
                if let Err(e) = pods::stop::halt(&daemon, &pod).await {
                    warn!(pod = %pod.id, error = %e, "continue stop");
                    net::release_later(&daemon, &pod.id);
                }
            });
        }
        (Phase::Stopped, _) => return false,
    }
    true
}

/// Tries a shim that lives until it can be reached or has ended.
async fn reach(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        match find(&pod.dir).await {
            Ok(Some(shim)) => {
                let shim = Arc::new(shim);
                pod.set_shim(Some(shim.clone()));
                pods::watch::begin(daemon, pod);
                for container in daemon.containers_of(pod) {
                    if container.phase() == containers::Phase::Running {
                        exit::watch(daemon, &container, shim.clone());
                    }
                }
                return;
            }
            Ok(None) => {
                let _act = pod.act.lock().await;
                pods::watch::clean(daemon, pod).await;
                if let Err(e) = pods::stop::halt(daemon, pod).await {
                    warn!(pod = %pod.id, error = %e, "stop a pod whose shim has died");
                }
                return;
            }
            Err(e) => warn!(pod = %pod.id, error = %e, "shim lives and cannot be reached"),
        }
    }
}

/// Removes what belongs to nobody: the remains of work whose record was never written, or is damaged. What is being
/// made is asked for first: an object is in its table before it ceases to be made.
async fn collect(daemon: &Arc<Daemon>) {
    let state = daemon.config().state.clone();
    for id in strangers(&state.join(PODS), |id| daemon.making(id) || daemon.pods.get(id).is_some()).await {
        orphan(daemon, &state.join(PODS).join(&id), &id).await;
    }
    let held: HashSet<String> = daemon.attachments.pods().into_iter().collect();
    let owned = |id: &str| daemon.making(id) || daemon.pods.get(id).is_some() || held.contains(id);
    for id in strangers(&state.join(NETNS), owned).await {
        let path = state.join(NETNS).join(&id);
        match blocking(move || netns::remove(&path)).await {
            Ok(()) => info!(pod = id, "network namespace of nobody removed"),
            Err(e) => warn!(pod = id, error = %e, "remove network namespace of nobody"),
        }
    }
    for key in daemon.images.snapshots() {
        if !daemon.making(&key) && daemon.containers.get(&key).is_none() {
            match daemon.images.release(&key).await {
                Ok(()) => info!(container = key, "writable layer of nobody removed"),
                Err(e) => warn!(container = key, error = %e, "remove writable layer of nobody"),
            }
        }
    }
    volumes(daemon).await;
    // A stopped pod has given its address back, which its network may not have done with when the last daemon died.
    let connected = daemon.pods.with(|pod| pod.look(|state| state.phase) != Phase::Stopped);
    let mut live: Vec<String> = connected.iter().map(|pod| pod.id.clone()).collect();
    live.extend(daemon.attachments.pods());
    if let Err(e) = daemon.network.gc(&live).await {
        warn!(error = %e, "collect addresses of nobody");
    }
}

/// Directories of image volumes without a container.
async fn volumes(daemon: &Arc<Daemon>) {
    let root = daemon.config().root.clone();
    let owned = |id: &str| daemon.making(id) || daemon.containers.get(id).is_some();
    for id in strangers(&root.join("volumes"), owned).await {
        let root = root.clone();
        if let Err(e) = blocking(move || containers::spec::volumes::remove(&root, &id)).await {
            warn!(error = %e, "remove volumes of nobody");
        }
    }
}

/// Names in a directory that are ids of ours and that nobody owns.
async fn strangers(dir: &Path, owned: impl Fn(&str) -> bool) -> Vec<String> {
    let list = |dir: &Path| -> io::Result<Vec<String>> {
        let names = fs::read_dir(dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| is_id(name)).collect())
    };
    let names = list(dir).unwrap_or_default();
    names.into_iter().filter(|name| !owned(name)).collect()
}

/// A run directory without a record: its shim, if one lives, is ended with all that it holds.
async fn orphan(daemon: &Arc<Daemon>, dir: &Path, id: &str) {
    warn!(pod = id, "run directory of nobody: ending what is in it");
    match find(dir).await {
        Ok(Some(shim)) => {
            if shim.stop_pod(id).await.is_err() || shim.shut_down(id).await.is_err() {
                shim.kill();
            }
            let _ = timeout(CLEAN, shim.ended()).await;
        }
        Ok(None) => {}
        Err(e) => warn!(pod = id, error = %e, "shim of nobody"),
    }
    if let Ok(program) = daemon.program("")
        && let Err(e) = program.clean(dir, id).await
    {
        warn!(pod = id, error = %e, "clean up after a shim of nobody");
    }
    let dir = dir.to_path_buf();
    if let Err(e) = blocking(move || fs::remove_dir_all(dir)).await {
        warn!(pod = id, error = %e, "remove run directory of nobody");
    }
}

/// Empties a directory of what an earlier daemon left in it.
pub fn sweep(state: &Path) -> io::Result<()> {
    for entry in fs::read_dir(state.join(IO))? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_directory_knows_more_than_the_row() {
        use containers::Phase::{Created, Exited, Running};
        for (phase, started, exited, shim, expected) in [
            (Created, false, false, true, Verdict::Same),
            (Created, false, false, false, Verdict::Same),
            (Created, true, false, true, Verdict::Runs),
            (Created, true, true, true, Verdict::Ended),
            (Created, true, false, false, Verdict::Ended),
            (Created, false, true, true, Verdict::Ended),
            (Running, true, false, true, Verdict::Runs),
            (Running, true, true, true, Verdict::Ended),
            (Running, true, true, false, Verdict::Ended),
            (Running, false, false, false, Verdict::Ended),
            (Running, false, false, true, Verdict::Runs),
            (Exited, true, false, true, Verdict::Same),
            (Exited, true, true, false, Verdict::Same),
        ] {
            assert_eq!(judge(phase, started, exited, shim), expected, "{phase:?} {started} {exited} {shim}");
        }
    }

    #[tokio::test]
    async fn only_names_that_are_ids_and_have_no_owner_are_collected() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = ("a".repeat(64), "b".repeat(64));
        for name in [mine.as_str(), other.as_str(), "empty", "crispd.sock"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(strangers(dir.path(), |id| id == mine).await, [other]);
    }
}
