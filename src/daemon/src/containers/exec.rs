//! Runs a command in a container from start to end, and collects its output or streams it to a client. The command
//! writes into FIFOs whose read ends are here, so that its output passes through nobody else.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cri_api::v1;
use rustix::fs::OFlags;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use streaming::Streams;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{Container, Phase};
use crate::{
    daemon::{Daemon, IO, mint},
    error::{Fault, Result},
    shim::{Paths, Shim},
    streams,
};

/// What an answer holds at most, in both streams together: clients take 16 MiB for a whole message.
const OUTPUT: usize = (16 << 20) - (64 << 10);
/// How much is read at once; the size of a pipe.
const CHUNK: usize = 64 << 10;
/// How long a command may take to end after SIGKILL before it is left to the shim.
const DEATH: Duration = Duration::from_secs(1);
const SIGKILL: u32 = 9;

/// Answers with output and exit code; a timeout in seconds of 0 means none.
pub async fn sync(daemon: &Arc<Daemon>, request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse> {
    if request.cmd.is_empty() {
        return Err(Fault::invalid("cmd is empty"));
    }
    let limit = u64::try_from(request.timeout).map_err(|_| Fault::invalid("timeout is negative"))?;
    let limit = (limit > 0).then(|| Duration::from_secs(limit));
    let container = daemon.container(&request.container_id)?;
    container.check_phase(Phase::Running)?;
    let shim = container.pod.shim().ok_or_else(|| Fault::PodNotReady(container.pod.id.clone()))?;
    let process = process(&container, request.cmd, false)?;
    let config = daemon.config();

    let id = mint()?;
    let io = config.state.join(IO);
    let (mut out, mut err) = (Fifo::open(&io, &id, "out")?, Fifo::open(&io, &id, "err")?);
    let room = AtomicUsize::new(OUTPUT);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let exit = {
        let paths = paths(None, Some(&out), Some(&err));
        let mut guard = Guard { shim: &shim, container: &container.id, id: &id, armed: true };
        let mut run = std::pin::pin!(shim.exec(&container.id, &id, process, paths));
        let mut reads = std::pin::pin!(async {
            tokio::join!(read(out.take(), &room, &mut stdout), read(err.take(), &room, &mut stderr));
        });
        let mut late = std::pin::pin!(elapsed(limit));
        let mut drained = false;
        let exit = loop {
            tokio::select! {
                exit = &mut run => break exit,
                () = &mut reads, if !drained => drained = true,
                () = &mut late => {
                    // The guard kills it. A shim that does not answer must not hold the caller.
                    drop(guard);
                    let _ = timeout(DEATH, &mut run).await;
                    let after = limit.unwrap_or_default();
                    return Err(Fault::Deadline { act: format!("command in container {}", container.id), after }.into());
                }
            }
        };
        guard.armed = false;
        let exit = exit.map_err(Fault::shim(format!("exec in container {}", container.id)))?;
        if !drained {
            // A child that the command left behind may hold the pipe for ever.
            let _ = timeout(config.exec.drain_exec_sync_io_timeout.0, reads).await;
        }
        exit
    };
    Ok(v1::ExecSyncResponse { stdout, stderr, exit_code: i32::try_from(exit.code).unwrap_or(255) })
}

/// Runs a command whose streams are a client's; answers with its exit code. A client that leaves ends its input, not
/// the command.
pub async fn stream(daemon: &Arc<Daemon>, request: streaming::Exec, client: Streams) -> Result<i32> {
    let left = CancellationToken::new();
    let run = tokio::spawn(run(daemon.clone(), request, client, left.clone()));
    let _left = left.drop_guard();
    run.await.unwrap_or_else(|_| Err(Fault::Panicked("Exec").into()))
}

async fn run(
    daemon: Arc<Daemon>,
    request: streaming::Exec,
    client: Streams,
    left: CancellationToken,
) -> Result<i32> {
    let container = daemon.container(&request.container)?;
    container.check_phase(Phase::Running)?;
    let shim = container.pod.shim().ok_or_else(|| Fault::PodNotReady(container.pod.id.clone()))?;
    let wanted = request.streams;
    let process = process(&container, request.command, wanted.tty)?;
    let (io, id) = (daemon.config().state.join(IO), mint()?);
    let fifo = |wanted: bool, name| wanted.then(|| Fifo::open(&io, &id, name)).transpose();
    let mut out = fifo(wanted.stdout, "out")?;
    let mut err = fifo(wanted.stderr && !wanted.tty, "err")?;
    let mut feed = wanted.stdin.then(|| Feed::open(&io, &id)).transpose()?;
    let paths = paths(feed.as_ref(), out.as_ref(), err.as_ref());

    let over = CancellationToken::new();
    let Streams { stdin, stdout, stderr, mut resize } = client;
    let mut command = std::pin::pin!(shim.exec(&container.id, &id, process, paths));
    let mut outputs = std::pin::pin!(async {
        tokio::join!(
            streams::output(out.as_mut().and_then(Fifo::take), stdout, left.clone(), over.clone()),
            streams::output(err.as_mut().and_then(Fifo::take), stderr, left.clone(), over.clone()),
        );
    });
    let mut beside = std::pin::pin!(async {
        tokio::join!(
            streams::input(stdin, feed.as_mut().and_then(Feed::take), left.clone()),
            streams::sizes(&shim, &container.id, &id, &mut resize),
        );
    });
    let (mut drained, mut done) = (false, false);
    let exit = loop {
        tokio::select! {
            exit = &mut command => break exit,
            () = &mut outputs, if !drained => drained = true,
            () = &mut beside, if !done => done = true,
        }
    };
    let exit = exit.map_err(Fault::shim(format!("exec in container {}", container.id)))?;
    over.cancel();
    if !drained {
        let _ = timeout(streams::LAST, outputs).await;
    }
    Ok(i32::try_from(exit.code).unwrap_or(255))
}

/// The container's own process with another command line, with or without a terminal.
fn process(container: &Container, command: Vec<String>, terminal: bool) -> Result<Vec<u8>> {
    let mut process = container.process()?;
    process["args"] = command.into();
    process["terminal"] = Value::Bool(terminal);
    if terminal && let Some(env) = process["env"].as_array_mut() {
        let named = env.iter().filter_map(Value::as_str).any(|one| one.starts_with("TERM="));
        if !named {
            env.push(json!("TERM=xterm"));
        }
    }
    serde_json::to_vec(&process).map_err(|e| Fault::invalid(e.to_string()))
}

async fn elapsed(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Reads to the end. What finds no room is dropped, and the command goes on.
async fn read(from: Option<pipe::Receiver>, room: &AtomicUsize, to: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let before =
            room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| Some(room.saturating_sub(count)));
        let fits = before.unwrap_or_default().min(count);
        to.extend_from_slice(chunk.get(..fits).unwrap_or_default());
    }
}

/// Kills a command whose time is over or whose caller went away.
struct Guard<'a> {
    shim: &'a Arc<Shim>,
    container: &'a str,
    id: &'a str,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.armed {
            let (shim, container, id) = (self.shim.clone(), self.container.to_string(), self.id.to_string());
            tokio::spawn(async move {
                // A command that has just ended is unknown by now.
                let _ = shim.signal(&container, &id, SIGKILL, true).await;
            });
        }
    }
}

/// What the shim is told of FIFOs.
pub fn paths(stdin: Option<&Feed>, stdout: Option<&Fifo>, stderr: Option<&Fifo>) -> Paths {
    let name = |path: Option<&PathBuf>| path.map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
    Paths {
        stdin: name(stdin.map(|feed| &feed.path)),
        stdout: name(stdout.map(|fifo| &fifo.path)),
        stderr: name(stderr.map(|fifo| &fifo.path)),
    }
}

/// A FIFO and its write end. It is also held open for reading, so that what was written before the reader came is
/// not lost when the writer has gone by then.
pub struct Feed {
    path: PathBuf,
    end: Option<pipe::Sender>,
    _held: OwnedFd,
}

impl Feed {
    pub fn open(dir: &Path, id: &str) -> Result<Feed> {
        let path = make(dir, id, "in")?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(std::io::Error::from);
        let opened = opened.and_then(|held| Ok((pipe::OpenOptions::new().open_sender(&path)?, held)));
        match opened {
            Ok((end, held)) => {
                // A smaller pipe works as well.
                let _ = rustix::pipe::fcntl_setpipe_size(&end, streams::PIPE);
                Ok(Feed { path, end: Some(end), _held: held })
            }
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                Err(Fault::io("open FIFO", path)(e))
            }
        }
    }

    /// The write end, once.
    pub fn take(&mut self) -> Option<pipe::Sender> {
        self.end.take()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn make(dir: &Path, id: &str, stream: &str) -> Result<PathBuf> {
    let path = dir.join(format!("{id}.{stream}"));
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .map_err(|e| Fault::io("make FIFO", &path)(e.into()))?;
    Ok(path)
}

/// A FIFO and its read end, opened before anyone writes: a writer that finds no reader would wait.
pub struct Fifo {
    path: PathBuf,
    end: Option<pipe::Receiver>,
}

impl Fifo {
    pub fn open(dir: &Path, id: &str, stream: &str) -> Result<Fifo> {
        let path = make(dir, id, stream)?;
        match pipe::OpenOptions::new().open_receiver(&path) {
            Ok(end) => Ok(Fifo { path, end: Some(end) }),
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                Err(Fault::io("open FIFO", path)(e))
            }
        }
    }

    /// The read end, once.
    pub fn take(&mut self) -> Option<pipe::Receiver> {
        self.end.take()
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn output_beyond_the_room_of_both_streams_is_dropped_and_the_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut fifo = Fifo::open(dir.path(), "x", "out").unwrap();
        let path = fifo.path.clone();
        let writer = std::thread::spawn(move || {
            std::fs::File::options().write(true).open(path).unwrap().write_all(&[7; 300_000]).unwrap();
        });
        let room = AtomicUsize::new(100_001);
        let mut got = Vec::new();
        read(fifo.take(), &room, &mut got).await;
        writer.join().unwrap();
        assert_eq!(got, vec![7; 100_001]);
        assert_eq!(room.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_has_written_to_is_not_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut fifo = Fifo::open(dir.path(), "x", "out").unwrap();
        let mut chunk = [0; 1];
        let mut end = fifo.take().unwrap();
        assert!(timeout(Duration::from_millis(50), end.read(&mut chunk)).await.is_err());
        drop(std::fs::File::options().write(true).open(&fifo.path).unwrap());
        assert_eq!(end.read(&mut chunk).await.unwrap(), 0);
        let path = fifo.path.clone();
        drop(fifo);
        assert!(!path.exists());
    }
}
