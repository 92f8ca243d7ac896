//! Runs a command in a container from start to end and collects its output. The command writes into FIFOs whose read
//! ends are here, so that its output passes through nobody else.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cri_api::v1;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::{Container, Phase};
use crate::{
    daemon::{Daemon, IO, mint},
    error::{Fault, Result},
    shim::Shim,
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
    let process = process(&container, request.cmd)?;
    let config = daemon.config();

    let id = mint()?;
    let io = config.state.join(IO);
    let (mut out, mut err) = (Fifo::open(&io, &id, "out")?, Fifo::open(&io, &id, "err")?);
    let room = AtomicUsize::new(OUTPUT);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let exit = {
        let (out_path, err_path) = (out.path.clone(), err.path.clone());
        let mut guard = Guard { shim: &shim, container: &container.id, id: &id, armed: true };
        let mut run = std::pin::pin!(shim.exec(&container.id, &id, process, &out_path, &err_path));
        let mut reads = std::pin::pin!(async {
            tokio::join!(read(&mut out.end, &room, &mut stdout), read(&mut err.end, &room, &mut stderr));
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

/// The container's own process with another command line and without a terminal.
fn process(container: &Container, command: Vec<String>) -> Result<Vec<u8>> {
    let mut process = container.process()?;
    process["args"] = command.into();
    process["terminal"] = Value::Bool(false);
    serde_json::to_vec(&process).map_err(|e| Fault::invalid(e.to_string()))
}

async fn elapsed(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Reads to the end. What finds no room is dropped, and the command goes on.
async fn read(from: &mut pipe::Receiver, room: &AtomicUsize, to: &mut Vec<u8>) {
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

/// A FIFO and its read end, opened before anyone writes: a writer that finds no reader would wait.
struct Fifo {
    path: PathBuf,
    end: pipe::Receiver,
}

impl Fifo {
    fn open(dir: &Path, id: &str, stream: &str) -> Result<Fifo> {
        let path = dir.join(format!("{id}.{stream}"));
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .map_err(|e| Fault::io("make FIFO", &path)(e.into()))?;
        match pipe::OpenOptions::new().open_receiver(&path) {
            Ok(end) => Ok(Fifo { path, end }),
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                Err(Fault::io("open FIFO", path)(e))
            }
        }
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
        read(&mut fifo.end, &room, &mut got).await;
        writer.join().unwrap();
        assert_eq!(got, vec![7; 100_001]);
        assert_eq!(room.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_has_written_to_is_not_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut fifo = Fifo::open(dir.path(), "x", "out").unwrap();
        let mut chunk = [0; 1];
        assert!(timeout(Duration::from_millis(50), fifo.end.read(&mut chunk)).await.is_err());
        drop(std::fs::File::options().write(true).open(&fifo.path).unwrap());
        assert_eq!(fifo.end.read(&mut chunk).await.unwrap(), 0);
        let path = fifo.path.clone();
        drop(fifo);
        assert!(!path.exists());
    }
}
