//! exec: one more process in a running container.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use container::spec::Process;

use crate::create::{LIMIT, write_pid};
use crate::state::{Home, Status};
use crate::{terminal, wait};

pub(crate) fn exec(root: &Path, wanted: &crate::Exec) -> Result<u8> {
    let home = Home::open(root, &wanted.id)?;
    let record = home.created()?;
    if record.status() != Status::Running {
        bail!("container {} is {}, not running", wanted.id, record.status().name());
    }
    let spec = home.spec()?;
    let process = process(wanted, spec.process.as_ref())?;
    if process.terminal && wanted.detach && wanted.console_socket.is_none() {
        bail!("a terminal for a detached process needs --console-socket");
    }
    let init = record.process()?;
    let cgroup = home.cgroup(&spec)?;
    let request = container::exec::Request {
        init: init.as_fd(),
        init_pid: record.pid,
        spec: &spec,
        process: &process,
        cgroup: &cgroup,
        stdio: terminal::stdio(&process),
    };
    let mut running = container::exec::spawn(request)?.finish(Instant::now() + LIMIT)?;
    for warning in &running.warnings {
        eprintln!("crisp-oci: warning: {warning}");
    }
    if let (Some(pty), Some(socket)) = (&running.pty, &wanted.console_socket) {
        terminal::send(pty.as_fd(), socket)?;
        running.pty = None;
    }
    write_pid(wanted.pid_file.as_deref(), running.pid)?;
    if wanted.detach {
        return Ok(0);
    }
    wait::follow(running.pidfd.as_fd(), running.pty)
}

/// The process as given, or the container's own with what the arguments change.
fn process(wanted: &crate::Exec, own: Option<&Process>) -> Result<Process> {
    let mut process = match &wanted.process {
        Some(path) => {
            let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
            serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?
        }
        None => {
            let mut process = own.context("the container has no process")?.clone();
            process.terminal = false;
            process.args.clone_from(&wanted.args);
            process
        }
    };
    process.terminal |= wanted.tty;
    process.env.extend(wanted.env.iter().cloned());
    if let Some(cwd) = &wanted.cwd {
        process.cwd.clone_from(cwd);
    }
    if let Some(user) = &wanted.user {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        process.user.uid = uid.parse().with_context(|| format!("{uid:?} is no uid"))?;
        if !gid.is_empty() {
            process.user.gid = gid.parse().with_context(|| format!("{gid:?} is no gid"))?;
        }
    }
    if process.args.is_empty() {
        bail!("no program given");
    }
    Ok(process)
}
