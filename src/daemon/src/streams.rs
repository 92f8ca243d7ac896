//! Exec, attach and port-forward: what is asked becomes a URL, and what a client of that URL sends and gets is copied
//! between it and FIFOs or a socket. How clients talk is the business of `streaming`, what runs that of the shim.

use std::{io, sync::Arc, time::Duration};

use anyhow::Context;
use cri_api::v1;
use rustix::pipe::fcntl_setpipe_size;
use streaming::{Limits, Reader, Server, Size, Streams, Wanted, Writer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::mpsc,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    containers::{self, Phase},
    daemon::Daemon,
    error::{Fault, Result},
    pods,
    shim::{self, Shim},
};

/// How much is read at once: little, until there is more.
const CHUNK: usize = 8 << 10;
const MOST_CHUNK: usize = 256 << 10;
/// Size of the pipe of a process that prints faster than is read, or is fed.
pub const PIPE: usize = 1 << 20;
/// So long after the end of a process that nothing more comes, its output has ended: a child that it left behind may
/// hold the pipe for ever.
const QUIET: Duration = Duration::from_secs(1);
/// How long a client may take to read the last of the output.
pub const LAST: Duration = Duration::from_secs(30);
/// A terminal is there soon after its process was asked for; until then its size waits.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(25);

/// What streams of clients are connected to.
pub struct Backend(Arc<Daemon>);

/// The streaming server.
pub type Streaming = Server<Backend>;

/// Binds the server's address; the future serves.
pub async fn open(daemon: Arc<Daemon>) -> anyhow::Result<(Streaming, impl Future<Output = ()> + Send)> {
    let keys = daemon.config().stream.clone();
    let pair = &keys.x509_key_pair_streaming;
    let tls =
        keys.enable_tls_streaming.then(|| streaming::tls::load(&pair.tls_cert_file, &pair.tls_key_file));
    let tls = tls.transpose().context("TLS for streaming")?;
    let address = (keys.stream_server_address, keys.stream_server_port).into();
    let limits = Limits { idle: keys.stream_idle_timeout.0, ..Limits::default() };
    let backend = Arc::new(Backend(daemon));
    let opened = Server::bind(address, tls, limits, backend).await;
    opened.with_context(|| format!("listen for streaming on {address}"))
}

/// The URL of a command that is to be run.
pub fn exec(daemon: &Daemon, server: &Streaming, request: v1::ExecRequest) -> Result<String> {
    if request.cmd.is_empty() {
        return Err(Fault::invalid("cmd is empty"));
    }
    let streams =
        Wanted { tty: request.tty, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
    check(streams)?;
    let container = daemon.container(&request.container_id)?;
    container.check_phase(Phase::Running)?;
    let exec = streaming::Exec { container: container.id.clone(), command: request.cmd, streams };
    Ok(server.exec(exec).map_err(Fault::Full)?)
}

/// The URL of a container's own streams.
pub fn attach(daemon: &Daemon, server: &Streaming, request: &v1::AttachRequest) -> Result<String> {
    let streams =
        Wanted { tty: request.tty, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
    check(streams)?;
    let container = daemon.container(&request.container_id)?;
    container.check_phase(Phase::Running)?;
    if container.config.tty != request.tty {
        let has = if container.config.tty { "a" } else { "no" };
        return Err(Fault::invalid(format!("container {} has {has} terminal", container.id)));
    }
    let attach = streaming::Attach { container: container.id.clone(), streams };
    Ok(server.attach(attach).map_err(Fault::Full)?)
}

/// The URL of connections to a pod's ports; which ones, clients may also say later.
pub fn port_forward(daemon: &Daemon, server: &Streaming, request: &v1::PortForwardRequest) -> Result<String> {
    let pod = daemon.pod(&request.pod_sandbox_id)?;
    if !pod.ready() {
        return Err(Fault::PodNotReady(pod.id.clone()).into());
    }
    let ports: std::result::Result<Vec<u16>, _> =
        request.port.iter().map(|port| u16::try_from(*port)).collect();
    let ports = ports.map_err(|_| Fault::invalid("a port is none"))?;
    Ok(server.port_forward(pod.id.clone(), ports).map_err(Fault::Full)?)
}

fn check(streams: Wanted) -> Result<()> {
    if streams.tty && streams.stderr {
        return Err(Fault::invalid("tty and stderr: a terminal has one stream of output"));
    }
    if !(streams.stdin || streams.stdout || streams.stderr) {
        return Err(Fault::invalid("none of stdin, stdout and stderr is wanted"));
    }
    Ok(())
}

impl streaming::Backend for Backend {
    async fn exec(&self, request: streaming::Exec, streams: Streams) -> std::result::Result<i32, String> {
        containers::exec::stream(&self.0, request, streams).await.map_err(|e| e.to_string())
    }

    async fn attach(&self, request: streaming::Attach, streams: Streams) -> std::result::Result<(), String> {
        containers::attach::stream(&self.0, request, streams).await.map_err(|e| e.to_string())
    }

    async fn connect(&self, pod: &str, port: u16) -> io::Result<(Reader, Writer)> {
        let pod = self.0.pod(pod).map_err(io::Error::other)?;
        if !pod.ready() {
            return Err(io::Error::other(Fault::PodNotReady(pod.id.clone())));
        }
        let (reader, writer) = pods::forward::connect(&pod, port).await?.into_split();
        Ok((Box::pin(reader), Box::pin(writer)))
    }
}

/// From a process to its client. Ends with the output, or when the process is `over` and nothing more comes. When the
/// client has `left` or closed the stream, the rest is read all the same: the process must not notice.
pub async fn output(
    mut from: Option<pipe::Receiver>,
    mut to: Option<Writer>,
    left: CancellationToken,
    over: CancellationToken,
) {
    let Some(from) = &mut from else { return };
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            biased;
            read = from.read(&mut chunk) => read,
            () = quiet(&over) => break,
        };
        let Ok(count @ 1..) = read else { break };
        if let Some(client) = &mut to {
            let bytes = chunk.get(..count).unwrap_or_default();
            let written = tokio::select! {
                biased;
                () = left.cancelled() => false,
                written = client.write_all(bytes) => written.is_ok(),
            };
            if !written {
                to = None;
            }
        }
        if count == chunk.len() && count < MOST_CHUNK {
            chunk.resize(2 * count, 0);
            // A smaller pipe works as well.
            let _ = fcntl_setpipe_size(&*from, PIPE);
        }
    }
    if let Some(mut client) = to {
        let _ = client.shutdown().await;
    }
}

async fn quiet(over: &CancellationToken) {
    over.cancelled().await;
    sleep(QUIET).await;
}

/// From a client to a process. Closes the FIFO when the client has ended its input or `left`. True when the client
/// ended it.
pub async fn input(from: Option<Reader>, to: Option<pipe::Sender>, left: CancellationToken) -> bool {
    let Some(mut from) = from else { return false };
    let copy = async {
        match to {
            Some(mut to) => streaming::copy(&mut from, &mut to).await.is_ok(),
            // There is nobody to read it.
            None => streaming::copy(&mut from, &mut tokio::io::sink()).await.is_ok(),
        }
    };
    tokio::select! {
        ended = copy => ended,
        () = left.cancelled() => false,
    }
}

/// Gives the sizes of the client's terminal to that of the process. Ends when the client leaves.
pub async fn sizes(shim: &Shim, container: &str, exec: &str, sizes: &mut mpsc::Receiver<Size>) {
    while let Some(mut size) = sizes.recv().await {
        for _ in 0..TRIES {
            match shim.resize(container, exec, size.width, size.height).await {
                Err(shim::Error::State(_) | shim::Error::NotFound(_)) => sleep(PAUSE).await,
                _ => break,
            }
            while let Ok(newer) = sizes.try_recv() {
                size = newer;
            }
        }
    }
}
