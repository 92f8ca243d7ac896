//! create, start, run: a container from its bundle to its first process.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use container::cgroup::Host;
use container::{Created, Join, Request, Rootfs, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};

use crate::keeper::{self, Answer, REPORT};
use crate::state::{Home, Record, Status, begun, now, replace};
use crate::{remove, terminal, wait};

/// Hooks have a minute each; a container that is not up after this is given up.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

pub(crate) fn create(root: &Path, wanted: &crate::Create) -> Result<u8> {
    reserve(root, wanted, |home| through_keeper(root, home, wanted))?;
    Ok(0)
}

pub(crate) fn start(root: &Path, id: &str) -> Result<u8> {
    let home = Home::open(root, id)?;
    match home.created()?.status() {
        Status::Created => keeper::call(&home)?,
        status => bail!("container {id} is {}, not created", status.name()),
    }
    Ok(0)
}

pub(crate) fn run(root: &Path, wanted: &crate::Create, detach: bool) -> Result<u8> {
    if detach {
        create(root, wanted)?;
        return start(root, &wanted.id).inspect_err(|_| {
            let _ = remove::delete(root, &wanted.id, true);
        });
    }
    let (home, (mut created, mut record)) = reserve(root, wanted, |home| begin(home, wanted, true))?;
    let done = write_pid(wanted.pid_file.as_deref(), created.pid).and_then(|()| {
        for warning in &created.warnings {
            eprintln!("crisp-oci: warning: {warning}");
        }
        keeper::start(&home, &mut created, &mut record)?;
        wait::follow(created.pidfd.as_fd(), created.pty.take())
    });
    let removed = remove::delete(root, &wanted.id, true);
    let code = done?;
    removed?;
    Ok(code)
}

/// Makes the container's directory and fills it, or leaves nothing.
fn reserve<T>(
    root: &Path,
    wanted: &crate::Create,
    fill: impl FnOnce(&Home) -> Result<T>,
) -> Result<(Home, T)> {
    let home = Home::make(root, &wanted.id)?;
    match fill(&home) {
        Ok(filled) => Ok((home, filled)),
        Err(error) => {
            let _ = home.remove();
            Err(error)
        }
    }
}

/// Starts a keeper and waits until it has created the container.
fn through_keeper(root: &Path, home: &Home, wanted: &crate::Create) -> Result<()> {
    let path = home.path.join(REPORT);
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, mode, 0).context("make the report")?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut report =
        fs::File::from(rustix::fs::open(&path, flags, Mode::empty()).context("open the report")?);
    let mut command = Command::new("/proc/self/exe");
    command.arg0("crisp-oci").arg("--root").arg(root).arg("keep").arg("--bundle").arg(&wanted.bundle);
    if let Some(socket) = &wanted.console_socket {
        command.arg("--console-socket").arg(socket);
    }
    // Its own group: what a terminal sends to ours is not meant for the container.
    let mut keeper = command.arg("--").arg(&wanted.id).process_group(0).spawn().context("start a keeper")?;
    let answer = read_report(&mut report, &mut keeper);
    let _ = fs::remove_file(&path);
    let answer = answer.inspect_err(|_| {
        let _ = keeper.kill();
        let _ = keeper.wait();
    })?;
    if let Some(error) = answer.error {
        let _ = keeper.wait();
        bail!(error);
    }
    for warning in answer.warnings {
        eprintln!("crisp-oci: warning: {warning}");
    }
    write_pid(wanted.pid_file.as_deref(), home.created()?.pid)
}

fn read_report(report: &mut fs::File, keeper: &mut Child) -> Result<Answer> {
    let until = Instant::now() + LIMIT;
    let mut text = Vec::new();
    loop {
        let slice = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let ready = poll(&mut [PollFd::new(report, PollFlags::IN)], Some(&slice)).unwrap_or(0) > 0;
        let ended = !ready && keeper.try_wait()?.is_some();
        if ready || ended {
            let mut buffer = [0; 4096];
            match report.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => text.extend(&buffer[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && !ended => {}
                Err(error) => return Err(error).context("read the report"),
            }
        }
        if Instant::now() > until {
            bail!("container was not created within {} s", LIMIT.as_secs());
        }
    }
    serde_json::from_slice(&text).context("the keeper ended without a word")
}

/// Creates the container from this process and records it. In the foreground its terminal can be shown on ours.
pub(crate) fn begin(home: &Home, wanted: &crate::Create, foreground: bool) -> Result<(Created, Record)> {
    let bundle = fs::canonicalize(&wanted.bundle)
        .with_context(|| format!("open bundle {}", wanted.bundle.display()))?;
    let text = fs::read(bundle.join("config.json")).context("read config.json")?;
    let spec = Spec::from_json(&text).context("read config.json")?;
    check(&spec)?;
    home.keep_spec(&text)?;
    let process = spec.process.as_ref().context("config.json has no process")?;
    if process.terminal && !foreground && wanted.console_socket.is_none() {
        bail!("process.terminal needs --console-socket");
    }
    let cgroups = Host::detect()?;
    let request = Request {
        id: &home.id,
        spec: &spec,
        bundle: &bundle,
        rootfs: Rootfs::Bundle,
        join: Join::default(),
        trees: Vec::new(),
        stdio: terminal::stdio(process),
        cgroups: &cgroups,
    };
    let mut created = container::create(request)?.finish(Instant::now() + LIMIT)?;
    let record = Record {
        id: home.id.clone(),
        bundle,
        pid: created.pid,
        begun: begun(created.pid).unwrap_or(0),
        created: now(),
        started: false,
    };
    let sent = match (&created.pty, &wanted.console_socket) {
        (Some(pty), Some(socket)) => terminal::send(pty.as_fd(), socket).map(|()| created.pty = None),
        _ => Ok(()),
    };
    if let Err(error) = sent.and_then(|()| home.write(&record)) {
        let _ = created.cgroup.kill();
        let _ = created.cgroup.remove(Duration::from_secs(2));
        return Err(error);
    }
    Ok((created, record))
}

/// What the specification demands of a runtime before anything is made.
fn check(spec: &Spec) -> Result<()> {
    let mut parts = spec.oci_version.splitn(3, '.');
    if parts.next() != Some("1") || parts.next().is_none_or(|minor| minor.parse::<u32>().is_err()) {
        bail!("ociVersion {:?} is not 1.x", spec.oci_version);
    }
    if spec.root.is_none() {
        bail!("config.json has no root");
    }
    Ok(())
}

pub(crate) fn write_pid(file: Option<&Path>, pid: u32) -> Result<()> {
    match file {
        Some(file) => replace(file, pid.to_string().as_bytes()).context("write the pid file"),
        None => Ok(()),
    }
}
