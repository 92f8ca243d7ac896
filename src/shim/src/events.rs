//! Tells containerd what happens to tasks, over the ttrpc socket that it names in `TTRPC_ADDRESS`. crispd
//! names none and learns the same from its own calls and from the records, so nothing here costs a pod of
//! crispd anything. What happened is decided elsewhere; an event that cannot be delivered is dropped after a
//! few tries, since the records and Wait hold the facts.

use std::time::Duration;

use shim_api::{
    containerd::{
        api::ForwardRequest,
        events::task::{
            TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
            TaskResumed, TaskStart,
        },
        shim::event::Envelope,
        shim_async::{Client, EventsClient},
        topics,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
    ttrpc::context,
};
use tokio::{sync::mpsc, time};

use crate::{record, service::timestamp};

/// Events that wait for a containerd that is restarting. The oldest would be of no use to it.
const WAITING: usize = 256;
/// One try to deliver an event.
const TRY: Duration = Duration::from_secs(5);
/// Tries until an event is given up.
const TRIES: u32 = 5;

/// What happened.
pub(crate) enum Event {
    Created(TaskCreate),
    Started { id: String, pid: u32 },
    ExecAdded { id: String, exec: String },
    ExecStarted { id: String, exec: String, pid: u32 },
    Exited { id: String, process: String, pid: u32, code: u32, at: i64 },
    Oom { id: String },
    Paused { id: String },
    Resumed { id: String },
    Deleted { id: String, process: String, pid: u32, code: u32, at: i64 },
}

/// Where events go.
#[derive(Clone)]
pub(crate) struct Events {
    queue: Option<mpsc::Sender<Envelope>>,
    namespace: String,
}

impl Events {
    /// To the ttrpc socket of a containerd, or to nobody.
    pub(crate) fn to(address: Option<String>, namespace: String) -> Events {
        let queue = address.filter(|address| !address.is_empty()).map(|address| {
            let (queue, events) = mpsc::channel(WAITING);
            tokio::spawn(forward(address, events));
            queue
        });
        Events { queue, namespace }
    }

    /// Whether anybody is told.
    pub(crate) fn heard(&self) -> bool {
        self.queue.is_some()
    }

    /// Sends in the order of the calls. Never waits: a containerd that does not listen loses events.
    pub(crate) fn send(&self, event: Event) {
        let Some(queue) = &self.queue else { return };
        let (topic, event) = envelope(event);
        let sent = queue.try_send(Envelope {
            timestamp: MessageField::some(timestamp(record::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        });
        if sent.is_err() {
            log::warn!("event {topic} dropped: containerd does not take events");
        }
    }
}

/// The paths of a task's streams, for its create event.
pub(crate) fn streams(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> MessageField<TaskIO> {
    MessageField::some(TaskIO {
        stdin: stdin.to_owned(),
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
        terminal,
        ..TaskIO::default()
    })
}

fn envelope(event: Event) -> (&'static str, Any) {
    match event {
        Event::Created(event) => (topics::TASK_CREATE_EVENT_TOPIC, any("TaskCreate", &event)),
        Event::Started { id: container_id, pid } => (
            topics::TASK_START_EVENT_TOPIC,
            any("TaskStart", &TaskStart { container_id, pid, ..TaskStart::default() }),
        ),
        Event::ExecAdded { id: container_id, exec: exec_id } => (
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            any("TaskExecAdded", &TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() }),
        ),
        Event::ExecStarted { id: container_id, exec: exec_id, pid } => (
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            any(
                "TaskExecStarted",
                &TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() },
            ),
        ),
        Event::Exited { id: container_id, process: id, pid, code: exit_status, at } => (
            topics::TASK_EXIT_EVENT_TOPIC,
            any(
                "TaskExit",
                &TaskExit {
                    container_id,
                    id,
                    pid,
                    exit_status,
                    exited_at: MessageField::some(timestamp(at)),
                    ..TaskExit::default()
                },
            ),
        ),
        Event::Oom { id: container_id } => {
            (topics::TASK_OOM_EVENT_TOPIC, any("TaskOOM", &TaskOOM { container_id, ..TaskOOM::default() }))
        }
        Event::Paused { id: container_id } => (
            topics::TASK_PAUSED_EVENT_TOPIC,
            any("TaskPaused", &TaskPaused { container_id, ..TaskPaused::default() }),
        ),
        Event::Resumed { id: container_id } => (
            topics::TASK_RESUMED_EVENT_TOPIC,
            any("TaskResumed", &TaskResumed { container_id, ..TaskResumed::default() }),
        ),
        Event::Deleted { id: container_id, process: id, pid, code: exit_status, at } => (
            topics::TASK_DELETE_EVENT_TOPIC,
            any(
                "TaskDelete",
                &TaskDelete {
                    container_id,
                    id,
                    pid,
                    exit_status,
                    exited_at: MessageField::some(timestamp(at)),
                    ..TaskDelete::default()
                },
            ),
        ),
    }
}

/// containerd's type URLs are bare message names.
fn any(name: &str, event: &impl Message) -> Any {
    Any {
        type_url: format!("containerd.events.{name}"),
        // Only a message without its required fields fails, and these have none.
        value: event.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

async fn forward(address: String, mut events: mpsc::Receiver<Envelope>) {
    let address = match address.starts_with("unix://") {
        true => address,
        false => format!("unix://{address}"),
    };
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        let mut pause = Duration::from_millis(100);
        for left in (0..TRIES).rev() {
            match deliver(&mut client, &address, &request).await {
                Ok(()) => break,
                Err(why) if left == 0 => log::warn!("event given up: {why}"),
                Err(_) => {
                    client = None;
                    time::sleep(pause).await;
                    pause *= 4;
                }
            }
        }
    }
}

async fn deliver(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> shim_api::ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let deadline = i64::try_from(TRY.as_nanos()).unwrap_or(i64::MAX);
    connected.forward(context::with_timeout(deadline), request).await.map(drop)
}
