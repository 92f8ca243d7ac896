//! Connects a client to the first process of a container, by FIFOs that the shim fills beside the log.

use std::{sync::Arc, time::Duration};

use streaming::Streams;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    Phase,
    exec::{Feed, Fifo, paths},
};
use crate::{
    daemon::{Daemon, IO, mint},
    error::{Fault, Result},
    streams,
};

/// Between the end of output and the news of the container's end.
const NEWS: Duration = Duration::from_secs(10);

/// Serves one client until the container ends. Dropping it disconnects the client, and its input ends.
pub async fn stream(daemon: &Arc<Daemon>, request: streaming::Attach, client: Streams) -> Result<()> {
    let container = daemon.container(&request.container)?;
    container.check_phase(Phase::Running)?;
    let shim = container.pod.shim().ok_or_else(|| Fault::PodNotReady(container.pod.id.clone()))?;
    let (io, id) = (daemon.config().state.join(IO), mint()?);
    let fifo = |wanted: bool, name| wanted.then(|| Fifo::open(&io, &id, name)).transpose();
    let mut out = fifo(request.streams.stdout, "out")?;
    let mut err = fifo(request.streams.stderr && !request.streams.tty, "err")?;
    let takes = request.streams.stdin && container.config.stdin;
    let mut feed = takes.then(|| Feed::open(&io, &id)).transpose()?;
    let connected = shim.attach(&container.id, paths(feed.as_ref(), out.as_ref(), err.as_ref())).await;
    connected.map_err(Fault::shim(format!("attach to container {}", container.id)))?;

    let (left, over) = (CancellationToken::new(), CancellationToken::new());
    let prints = out.is_some() || err.is_some();
    let Streams { stdin, stdout, stderr, mut resize } = client;
    let mut outputs = std::pin::pin!(async {
        tokio::join!(
            streams::output(out.as_mut().and_then(Fifo::take), stdout, left.clone(), over.clone()),
            streams::output(err.as_mut().and_then(Fifo::take), stderr, left.clone(), over.clone()),
        );
        if !prints {
            std::future::pending::<()>().await;
        }
    });
    let tty = request.streams.tty;
    let mut detached = std::pin::pin!(async {
        let ended = streams::input(stdin, feed.as_mut().and_then(Feed::take), left.clone()).await;
        // Keys that detach are the client's business: all that is seen of them is the end of a terminal's input.
        if !(tty && ended) {
            std::future::pending::<()>().await;
        }
    });
    let mut sizes = std::pin::pin!(async {
        streams::sizes(&shim, &container.id, "", &mut resize).await;
        std::future::pending::<()>().await;
    });
    tokio::select! {
        () = container.ended() => {
            over.cancel();
            if prints {
                let _ = timeout(streams::LAST, outputs).await;
            }
            return Ok(());
        }
        () = &mut detached => return Ok(()),
        () = &mut sizes => {}
        () = &mut outputs => {}
    }
    // The shim closes them at the end of the container, or when they are not read for too long.
    match timeout(NEWS, container.ended()).await {
        Ok(()) => Ok(()),
        Err(_) => Err(Fault::Slow(container.id.clone()).into()),
    }
}
