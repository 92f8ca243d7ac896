//! Runs one CNI plugin: finds and distrusts its program, gives it a clean environment and a deadline, reads what it
//! answers. What to ask it is the business of the module above.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tracing::debug;

use super::conf::trusted;
use crate::error::Error;

/// An answer is some kilobytes. A plugin that writes more than this is broken.
const MAX_OUTPUT: usize = 1 << 20;
/// So much of what it complains about is kept.
const MAX_COMPLAINT: usize = 64 << 10;
/// And so much of that goes into an error.
const MAX_QUOTE: usize = 1 << 10;
/// How long we go on reading after the plugin ended: a child that it left behind may hold the pipe.
const GRACE: Duration = Duration::from_millis(500);
/// How often, and how long apart, a program is tried that somebody is still writing (ETXTBSY).
const BUSY: (u32, Duration) = (20, Duration::from_millis(25));
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One call of one plugin.
pub(crate) struct Call<'a> {
    pub(crate) plugin: &'a str,
    pub(crate) command: &'static str,
    pub(crate) dirs: &'a [PathBuf],
    /// `CNI_*` beside the command and the path.
    pub(crate) environment: &'a [(&'static str, String)],
    pub(crate) input: Vec<u8>,
    pub(crate) limit: Duration,
}

impl Call<'_> {
    /// Runs the plugin and returns what it wrote to its standard output.
    pub(crate) async fn run(&self) -> Result<Vec<u8>, Error> {
        let program = find(self.plugin, self.dirs)?;
        let mut child = self.spawn(&program).await?;
        let group = Group(child.id().and_then(|id| Pid::from_raw(id as i32)));
        match timeout(self.limit, self.talk(&mut child)).await {
            Ok(Ok(finished)) => {
                group.forget();
                self.judge(finished)
            }
            // Dropping the group kills whatever the plugin started, dropping the child reaps it.
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Timeout {
                plugin: self.plugin.to_owned(),
                command: self.command,
                limit: self.limit,
            }),
        }
    }

    async fn spawn(&self, program: &Path) -> Result<Child, Error> {
        let path = std::env::var_os("PATH").filter(|path| !path.is_empty());
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", path.unwrap_or_else(|| PATH.into()))
            .env("CNI_COMMAND", self.command)
            .env("CNI_PATH", std::env::join_paths(self.dirs).unwrap_or_default())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut tries = BUSY.0;
        loop {
            match command.spawn() {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries > 0 => tries -= 1,
                result => return result.map_err(|e| self.failed(format!("run {}: {e}", program.display()))),
            }
            tokio::time::sleep(BUSY.1).await;
        }
    }

    async fn talk(&self, child: &mut Child) -> Result<Finished, Error> {
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (mut answer, mut complaint) = (Vec::new(), Vec::new());
        let status = {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // A plugin may well answer without having read everything.
                    let _ = stdin.write_all(&self.input).await;
                }
                true
            };
            let read = async { collect(stdout, &mut answer, MAX_OUTPUT, Overflow::Stop).await };
            let listen = async { collect(stderr, &mut complaint, MAX_COMPLAINT, Overflow::Drop).await };
            let exchange = async { tokio::join!(write, read, listen).1 };
            tokio::pin!(exchange);
            let mut within = None;
            let status = loop {
                tokio::select! {
                    fits = &mut exchange, if within.is_none() => {
                        if !fits {
                            return Err(self.failed(format!("it wrote more than {MAX_OUTPUT} bytes")));
                        }
                        within = Some(());
                    }
                    status = child.wait() => break status.map_err(|e| self.failed(format!("wait: {e}")))?,
                }
            };
            if within.is_none() && timeout(GRACE, &mut exchange).await == Ok(false) {
                return Err(self.failed(format!("it wrote more than {MAX_OUTPUT} bytes")));
            }
            status
        };
        Ok(Finished { status, answer, complaint })
    }

    fn judge(&self, finished: Finished) -> Result<Vec<u8>, Error> {
        let complaint = quote(&finished.complaint);
        if !complaint.is_empty() {
            debug!(plugin = self.plugin, command = self.command, stderr = %complaint, "CNI plugin wrote");
        }
        if finished.status.success() {
            return Ok(finished.answer);
        }
        match serde_json::from_slice::<Answer>(&finished.answer) {
            Ok(answer) if answer.code != 0 || !answer.msg.is_empty() => Err(Error::Plugin {
                plugin: self.plugin.to_owned(),
                command: self.command,
                code: answer.code,
                msg: answer.msg,
                details: answer.details,
            }),
            _ if complaint.is_empty() => {
                Err(self.failed(format!("{}: {:?}", finished.status, quote(&finished.answer))))
            }
            _ => Err(self.failed(format!("{}: {complaint}", finished.status))),
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::Run { plugin: self.plugin.to_owned(), command: self.command, reason }
    }
}

/// Finds the program of a plugin type, and refuses one that somebody else than root could have written.
pub(crate) fn find(plugin: &str, dirs: &[PathBuf]) -> Result<PathBuf, Error> {
    let refused = |reason: String| Error::Binary { plugin: plugin.to_owned(), reason };
    if plugin.is_empty() || plugin.contains('/') || plugin == "." || plugin == ".." {
        return Err(refused("not a name of a program".into()));
    }
    for dir in dirs {
        let path = dir.join(plugin);
        let Ok(stat) = fs::metadata(&path) else { continue };
        if !stat.is_file() || stat.permissions().mode() & 0o111 == 0 {
            continue;
        }
        // The link in the plugin directory and the program it leads to must both be out of others' reach.
        let real = fs::canonicalize(&path).map_err(|e| refused(format!("{}: {e}", path.display())))?;
        for holder in [Some(dir.as_path()), real.parent()].into_iter().flatten() {
            let stat = fs::metadata(holder).map_err(|e| refused(format!("{}: {e}", holder.display())))?;
            trusted(&stat).map_err(|reason| refused(format!("{} is {reason}", holder.display())))?;
        }
        trusted(&stat).map_err(|reason| refused(format!("{} is {reason}", path.display())))?;
        return Ok(path);
    }
    let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    Err(refused(format!("not found in {}", dirs.join(", "))))
}

struct Finished {
    status: ExitStatus,
    answer: Vec<u8>,
    complaint: Vec<u8>,
}

/// An error as plugins write it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    code: u64,
    msg: String,
    details: String,
}

/// Kills a plugin with everything that it started, unless it ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // The leader is not reaped before the child is dropped, after us: the number is still its own.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

enum Overflow {
    Stop,
    Drop,
}

/// Reads to the end, keeping `max` bytes at most. Returns false when it stopped because of too many.
async fn collect(
    from: Option<impl AsyncRead + Unpin>,
    into: &mut Vec<u8>,
    max: usize,
    overflow: Overflow,
) -> bool {
    let Some(mut from) = from else { return true };
    let mut chunk = vec![0; 8 << 10];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return true,
            Ok(n) => {
                let room = max - into.len();
                into.extend_from_slice(&chunk[..n.min(room)]);
                if n > room && matches!(overflow, Overflow::Stop) {
                    return false;
                }
            }
        }
    }
}

fn quote(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_QUOTE)]).trim().to_owned()
}
