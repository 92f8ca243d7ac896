//! Connects a pod to its network and takes it off again. What was attempted is on record before the attempt, and
//! stays there until it is undone: a failed undoing is tried again for as long as it takes.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use network::{Attached, Attachment, netns};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Pod, wish::Wish};
use crate::{
    daemon::{Daemon, blocking},
    error::{Fault, Result},
    store::{Change, Kind, Row},
};

/// What pods have of the network, by the pod's id.
#[derive(Default)]
pub struct Attachments {
    held: Mutex<BTreeMap<String, Arc<Held>>>,
    /// Pods whose detaching is tried again in the background.
    retried: Mutex<HashSet<String>>,
}

/// One pod's attachment.
pub struct Held {
    wish: Attachment,
    got: Mutex<Option<Attached>>,
    /// One plugin call at a time.
    act: tokio::sync::Mutex<()>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    wish: Attachment,
    got: Option<Attached>,
}

/// How long a pod waits for a network that is not ready: on a node that boots, its plugin is a pod itself.
const READY: Duration = Duration::from_secs(20);
/// First pause between tries to detach; doubled until it reaches the last.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);

impl Attachments {
    /// Pods that have something of the network.
    pub fn pods(&self) -> Vec<String> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Takes up an attachment that an earlier daemon recorded.
    pub fn restore(&self, row: &Row) -> Result<(), String> {
        let record: Record = serde_json::from_slice(&row.state).map_err(|e| e.to_string())?;
        if record.wish.pod_id != row.id {
            return Err(format!("names pod {:?}", record.wish.pod_id));
        }
        self.insert(record.wish, record.got);
        Ok(())
    }

    fn get(&self, pod: &str) -> Option<Arc<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).get(pod).cloned()
    }

    fn insert(&self, wish: Attachment, got: Option<Attached>) -> Arc<Held> {
        let id = wish.pod_id.clone();
        let held = Arc::new(Held { wish, got: Mutex::new(got), act: tokio::sync::Mutex::default() });
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(id, held.clone());
        held
    }

    fn remove(&self, pod: &str) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(pod);
    }
}

impl Held {
    fn row(&self) -> Row {
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let record = Record { wish: self.wish.clone(), got };
        Row {
            kind: Kind::Attachment,
            id: self.wish.pod_id.clone(),
            config: Vec::new(),
            state: serde_json::to_vec(&record).unwrap_or_default(),
        }
    }
}

/// Connects a pod whose namespace is pinned; returns its addresses, preferred first.
pub async fn attach(daemon: &Daemon, pod: &Pod, wish: &Wish) -> Result<Vec<String>> {
    let Some(netns) = &pod.netns else { return Ok(Vec::new()) };
    let metadata = pod.metadata();
    let held = daemon.attachments.insert(
        Attachment {
            pod_id: pod.id.clone(),
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            netns: netns.clone(),
            ports: wish.ports.clone(),
            bandwidth: wish.bandwidth,
            dns: wish.dns(),
        },
        None,
    );
    let _act = held.act.lock().await;
    daemon.store.put(held.row()).await?;
    daemon.network.ready(READY).await.map_err(Fault::network("wait for the network"))?;
    let got = daemon.network.attach(&held.wish).await.map_err(Fault::network("attach pod to the network"))?;
    let ips = got.ips.iter().map(ToString::to_string).collect();
    *held.got.lock().unwrap_or_else(PoisonError::into_inner) = Some(got);
    // The attempt is on record already; what it gave makes undoing easier and is not worth waiting for.
    daemon.store.put_later(held.row());
    Ok(ips)
}

/// Takes a pod off the network and removes its namespace. Succeeds when nothing is left to do.
pub async fn release(daemon: &Daemon, pod: &str) -> Result<()> {
    if let Some(held) = daemon.attachments.get(pod) {
        let _act = held.act.lock().await;
        let got = held.got.lock().unwrap_or_else(PoisonError::into_inner).clone();
        daemon
            .network
            .detach(&held.wish, got.as_ref())
            .await
            .map_err(Fault::network("detach pod from the network"))?;
        daemon.store.forget(vec![Change::Drop(Kind::Attachment, pod.into())]).await;
        daemon.attachments.remove(pod);
    }
    if let Some(path) = daemon.place(pod, true).netns {
        blocking(move || netns::remove(&path)).await.map_err(Fault::network("remove network namespace"))?;
    }
    Ok(())
}

/// As [`release`], again and again until it succeeds.
pub fn release_later(daemon: &Arc<Daemon>, pod: &str) {
    let (daemon, pod) = (daemon.clone(), pod.to_string());
    if !daemon.attachments.retried.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.clone()) {
        return;
    }
    tokio::spawn(async move {
        let mut pause = PAUSE;
        while let Err(e) = release(&daemon, &pod).await {
            warn!(pod, error = %e, again = ?pause, "network is not released yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
        }
        daemon.attachments.retried.lock().unwrap_or_else(PoisonError::into_inner).remove(&pod);
        info!(pod, "network released");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_comes_back_from_its_row() {
        let all = Attachments::default();
        let wish = Attachment { pod_id: "a".into(), netns: "/n/a".into(), ..Attachment::default() };
        let got = Attached { interface: "eth0".into(), ..Attached::default() };
        let row = all.insert(wish, Some(got)).row();
        let back = Attachments::default();
        back.restore(&row).unwrap();
        assert_eq!(back.pods(), ["a"]);
        assert_eq!(back.get("a").unwrap().row(), row);
        assert!(back.restore(&Row { id: "b".into(), ..row }).is_err());
    }
}
