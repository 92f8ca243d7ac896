//! Tells subscribers of GetContainerEvents what happened to containers and pods. One bounded ring for all: who
//! reads too slowly is told so and cut off, and lists anew; nobody waits for a reader.

use std::sync::Arc;

use cri_api::v1;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::broadcast::{self, error::RecvError};
use tonic::Status;
use tracing::warn;

use crate::{
    containers::Container,
    daemon::{Daemon, now},
    lock::Lock,
    pods::Pod,
};

/// Events that a subscriber may be behind: some seconds of a node that starts all its pods at once.
const RING: usize = 1024;

/// Who listens.
pub struct Events {
    /// None once the daemon drains: all streams have ended.
    sender: Lock<Option<broadcast::Sender<Arc<v1::ContainerEventResponse>>>>,
}

/// What one subscriber gets.
pub type Stream = BoxStream<'static, Result<v1::ContainerEventResponse, Status>>;

impl Default for Events {
    fn default() -> Events {
        Events { sender: Lock::new(Some(broadcast::Sender::new(RING))) }
    }
}

impl Events {
    /// Ends all streams, so that the server can.
    pub fn close(&self) {
        *self.sender.write() = None;
    }

    fn heard(&self) -> bool {
        self.sender.read().as_ref().is_some_and(|sender| sender.receiver_count() > 0)
    }

    fn send(&self, event: v1::ContainerEventResponse) {
        if let Some(sender) = self.sender.read().as_ref() {
            // Without a subscriber there is nobody to tell.
            let _ = sender.send(Arc::new(event));
        }
    }

    fn subscribe(&self) -> Stream {
        let Some(receiver) = self.sender.read().as_ref().map(broadcast::Sender::subscribe) else {
            return stream::empty().boxed();
        };
        stream::unfold(Some(receiver), |receiver| async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Ok(event) => Some((Ok(Arc::unwrap_or_clone(event)), Some(receiver))),
                Err(RecvError::Closed) => None,
                Err(RecvError::Lagged(missed)) => {
                    warn!(missed, "a subscriber of container events is too slow: its stream ends");
                    let why = format!("{missed} events were missed: list the containers and subscribe again");
                    Some((Err(Status::resource_exhausted(why)), None))
                }
            }
        })
        .boxed()
    }
}

/// Tells all subscribers of a container; never waits for one.
pub fn emit(daemon: &Daemon, kind: v1::ContainerEventType, container: &Arc<Container>) {
    if daemon.events.heard() {
        daemon.events.send(event(daemon, kind, &container.id, &container.pod));
    }
}

/// Tells all subscribers of a pod itself, under the pod's id.
pub fn emit_pod(daemon: &Daemon, kind: v1::ContainerEventType, pod: &Arc<Pod>) {
    if daemon.events.heard() {
        daemon.events.send(event(daemon, kind, &pod.id, pod));
    }
}

/// What happens from now on.
pub fn subscribe(daemon: &Daemon) -> Stream {
    daemon.events.subscribe()
}

fn event(daemon: &Daemon, kind: v1::ContainerEventType, id: &str, pod: &Pod) -> v1::ContainerEventResponse {
    let containers = daemon.containers_of(pod);
    v1::ContainerEventResponse {
        container_id: id.to_owned(),
        container_event_type: kind.into(),
        created_at: now(),
        pod_sandbox_status: Some(crate::pods::status::of(pod)),
        containers_statuses: containers
            .iter()
            .map(|container| crate::containers::status::of(container))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(number: usize) -> v1::ContainerEventResponse {
        v1::ContainerEventResponse { container_id: number.to_string(), ..Default::default() }
    }

    #[tokio::test]
    async fn every_subscriber_gets_every_event_from_its_beginning_on() {
        let events = Events::default();
        assert!(!events.heard());
        events.send(numbered(0));
        let mut one = events.subscribe();
        events.send(numbered(1));
        let mut two = events.subscribe();
        events.send(numbered(2));
        assert!(events.heard());
        for (stream, expected) in [(&mut one, vec!["1", "2"]), (&mut two, vec!["2"])] {
            for id in expected {
                assert_eq!(stream.next().await.unwrap().unwrap().container_id, id);
            }
        }
        events.close();
        assert!(one.next().await.is_none() && two.next().await.is_none());
        assert!(events.subscribe().next().await.is_none());
    }

    #[tokio::test]
    async fn a_slow_subscriber_is_cut_off_and_hinders_nobody() {
        let events = Events::default();
        let (mut slow, mut quick) = (events.subscribe(), events.subscribe());
        for number in 0..=RING {
            events.send(numbered(number));
            assert_eq!(quick.next().await.unwrap().unwrap().container_id, number.to_string());
        }
        let cut = slow.next().await.unwrap().unwrap_err();
        assert_eq!(cut.code(), tonic::Code::ResourceExhausted);
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn who_goes_away_is_forgotten() {
        let events = Events::default();
        drop(events.subscribe());
        assert!(!events.heard());
    }
}
