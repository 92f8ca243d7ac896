//! Between `create` and `start` somebody has to hold the library's end of the channel to the waiting process. That is
//! a process of its own, which `create` leaves behind and which ends with `start`.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use container::Created;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use crate::create::{LIMIT, begin};
use crate::state::{Home, Record};

/// What the keeper answers, to `create` once and to `start` once.
#[derive(Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) error: Option<String>,
    pub(crate) warnings: Vec<String>,
}

/// The pipe on which `create` waits, and the socket on which `start` calls.
pub(crate) const REPORT: &str = "report";
pub(crate) const DOOR: &str = "door";

/// The keeper's life.
pub(crate) fn keep(root: &Path, wanted: &crate::Create) -> Result<u8> {
    let home = Home::open(root, &wanted.id)?;
    let mut report = std::fs::File::from(
        rustix::fs::open(home.path.join(REPORT), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .context("open the report")?,
    );
    let made = begin(&home, wanted, false).and_then(|(created, record)| {
        let (_dir, path) = home.short(DOOR)?;
        let door = UnixListener::bind(path).context("open a door for start")?;
        Ok((created, record, door))
    });
    let answer = match &made {
        Ok((created, ..)) => Answer { error: None, warnings: created.warnings.clone() },
        Err(error) => Answer { error: Some(format!("{error:#}")), warnings: Vec::new() },
    };
    report.write_all(&serde_json::to_vec(&answer)?).context("report")?;
    drop(report);
    let Ok((created, record, door)) = made else { return Ok(1) };
    // The container has these now, and whoever reads them waits for the last one to let go.
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    hold(&home, created, record, &door)
}

/// Waits for a start, or for the end of the container.
fn hold(home: &Home, mut created: Created, mut record: Record, door: &UnixListener) -> Result<u8> {
    loop {
        let mut fds = [
            PollFd::new(door, PollFlags::IN),
            PollFd::from_borrowed_fd(created.pidfd.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait"),
        }
        if !fds[1].revents().is_empty() {
            let _ = waitid(WaitId::PidFd(created.pidfd.as_fd()), WaitIdOptions::EXITED);
            return Ok(0);
        }
        if !fds[0].revents().is_empty() {
            let (mut caller, _) = door.accept().context("open the door")?;
            let _ = std::fs::remove_file(home.path.join(DOOR));
            let started = start(home, &mut created, &mut record);
            let error = started.err().map(|error| format!("{error:#}"));
            let failed = error.is_some();
            let answer = Answer { error, warnings: Vec::new() };
            let _ = caller.write_all(&serde_json::to_vec(&answer)?);
            if failed {
                // A poststart hook fails after the program has begun, and ends it: runtime.md, "Lifecycle".
                let _ = created.cgroup.kill();
                // Nobody else could take its exit status.
                let _ = waitid(WaitId::PidFd(created.pidfd.as_fd()), WaitIdOptions::EXITED);
            }
            return Ok(u8::from(failed));
        }
    }
}

/// Lets the process go, and records that.
pub(crate) fn start(home: &Home, created: &mut Created, record: &mut Record) -> Result<()> {
    // Recorded first: the process may end before anybody could look.
    record.started = true;
    home.write(record)?;
    created.start()?.finish(Instant::now() + LIMIT)?;
    Ok(())
}

/// The other side of the door.
pub(crate) fn call(home: &Home) -> Result<()> {
    let (_dir, path) = home.short(DOOR)?;
    let door = UnixStream::connect(path).context("call the keeper")?;
    door.set_read_timeout(Some(LIMIT + Duration::from_secs(5)))?;
    let mut text = Vec::new();
    door.take(1 << 20).read_to_end(&mut text).context("wait for the keeper")?;
    let answer: Answer = serde_json::from_slice(&text).context("the keeper is gone")?;
    match answer.error {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}
