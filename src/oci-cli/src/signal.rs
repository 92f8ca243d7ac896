//! kill: a signal to a container.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, pidfd_send_signal};

use crate::state::{Home, Status};

pub(crate) fn kill(root: &Path, id: &str, name: &str, all: bool) -> Result<u8> {
    let signal = parse(name)?;
    let home = Home::open(root, id)?;
    let record = home.created()?;
    if all {
        let cgroup = home.cgroup(&home.spec()?)?;
        if signal == Signal::KILL {
            cgroup.kill()?;
            return Ok(0);
        }
        for pid in cgroup.pids()? {
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                // One that has ended meanwhile needs no signal.
                let _ = kill_process(pid, signal);
            }
        }
        return Ok(0);
    }
    match record.status() {
        Status::Created | Status::Running => {}
        status => bail!("container {id} is {}", status.name()),
    }
    let process = record.process()?;
    pidfd_send_signal(process.as_fd(), signal).with_context(|| format!("send {name} to container {id}"))?;
    Ok(0)
}

/// `TERM`, `SIGTERM`, `sigterm` or `15`.
fn parse(name: &str) -> Result<Signal> {
    let number = match name.parse::<i32>() {
        Ok(number) => number,
        Err(_) => {
            let upper = name.to_ascii_uppercase();
            let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
            full.parse::<nix::sys::signal::Signal>().with_context(|| format!("{name:?} is no signal"))? as i32
        }
    };
    Signal::from_named_raw(number).with_context(|| format!("{name:?} is no signal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_many_spellings() {
        for name in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(parse(name).unwrap(), Signal::TERM, "{name}");
        }
        for bad in ["", "NOPE", "0", "999", "-9"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
