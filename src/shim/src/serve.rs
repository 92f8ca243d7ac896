//! The shim as a process: hardened, one thread, a socket, until it is told to end. What is served is in
//! `service`.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use rustix::process::{DumpableBehavior, set_child_subreaper, set_dumpable_behavior};
use shim_api::{
    rundir,
    ttrpc::r#async::{Server, transport::Listener},
};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    time::{self, Sleep},
};

use crate::{
    error::{Act, Error},
    events::Events,
    kernel,
    pod::Pod,
    reap::{self, Reaper},
    record, service,
};

/// How long replies may take to leave when the shim ends.
const LAST_REPLIES: Duration = Duration::from_secs(2);
/// Pause after a connection that could not be accepted: out of descriptors, most likely.
const REFUSED: Duration = Duration::from_millis(50);

/// What a shim needs to know of its place.
pub(crate) struct Place {
    pub(crate) id: String,
    pub(crate) namespace: String,
    /// Where containerd takes events; crispd needs none.
    pub(crate) events: Option<String>,
    /// Spawned by `start` for another daemon than crispd.
    pub(crate) foreign: bool,
}

/// Serves a pod until its shutdown.
pub(crate) fn serve(place: Place, listener: OwnedFd) -> Result<(), Error> {
    // Before anything of the pod is in our memory. Undone by no exec, since the shim makes none.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).act("make the shim non-dumpable")?;
    set_child_subreaper(Some(rustix::process::getpid())).act("become a subreaper")?;
    // Executed by descriptor, its name would be a number.
    let _ = rustix::thread::set_name(c"containerd-shim");
    let signals = reap::signals().act("take signals")?;
    let dir = std::env::current_dir().act("find the run directory")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.act("start the event loop")?.block_on(async {
        let signals = kernel::watch(signals).act("take signals")?;
        run(place, dir, listener, signals).await
    })
}

async fn run(place: Place, dir: PathBuf, listener: OwnedFd, signals: AsyncFd<OwnedFd>) -> Result<(), Error> {
    let reaper = Arc::new(Reaper::default());
    let events = Events::to(place.events, place.namespace);
    let pod = Arc::new(Pod::new(place.id, dir, place.foreign, reaper.clone(), events));
    let door = Door::new(listener).act("listen")?;
    let socket = door.listener.local_addr().ok().and_then(|address| Some(address.as_pathname()?.to_owned()));
    let mut server = service::register(Server::new().add_listener(Listener::new(door)), &pod);
    if !pod.foreign {
        let process = record::process(std::process::id()).act("look at the shim's process")?;
        let shim = rundir::Shim { version: rundir::VERSION, process };
        record::write(&pod.dir, rundir::SHIM, &shim).act("record the shim")?;
    }
    tokio::spawn(async move { reaper.run(signals).await });
    server
        .start()
        .await
        .map_err(|cause| Error::Io { act: "serve".into(), cause: io::Error::other(cause.to_string()) })?;
    pod.shutdown.notified().await;
    // The reply to the call that ended us is among those that have to leave.
    let _ = time::timeout(LAST_REPLIES, server.shutdown()).await;
    if let Some(socket) = socket.filter(|_| pod.foreign) {
        let _ = fs::remove_file(socket);
    }
    Ok(())
}

/// Accepts root and nobody else, whatever the socket's mode and directory say (CVE-2020-15257).
struct Door {
    listener: tokio::net::UnixListener,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Door {
    fn new(listener: OwnedFd) -> io::Result<Door> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        Ok(Door { listener: tokio::net::UnixListener::from_std(listener)?, pause: None })
    }
}

impl Stream for Door {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                std::task::ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match std::task::ready!(self.listener.poll_accept(cx)) {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == 0 => return Poll::Ready(Some(Ok(stream))),
                    Ok(peer) => log::warn!("refused a client with uid {}", peer.uid()),
                    Err(cause) => log::warn!("refused a client: {cause}"),
                },
                Err(cause) => {
                    // Told to the server it would be asked again at once, for ever.
                    log::warn!("accept a client: {cause}");
                    self.pause = Some(Box::pin(time::sleep(REFUSED)));
                }
            }
        }
    }
}
