//! A test bed: one daemon of its own, one registry of its own in this process, one client. What most tests start with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cri_api::v1::{ContainerConfig, PodSandboxConfig};

use crate::client::{self, Client};
use crate::daemon::{Daemon, Options};
use crate::image::{Store, catalog};
use crate::registry::Own;
use crate::{run, traces};

/// Daemon, registry and client.
#[derive(Debug)]
pub struct Bed {
    /// A connection to the daemon.
    pub client: Client,
    /// The daemon, in a private place.
    pub daemon: Daemon,
    /// Stands in for every registry.
    pub registry: Own,
}

impl Bed {
    /// With the images of the catalogue and the built-in bridge; busybox is there already.
    pub async fn new() -> Result<Bed> {
        let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
        bed.client.pull(catalog::SMALL).await?;
        bed.first().await?;
        Ok(bed)
    }

    /// One pod with one container of busybox, which brings what stays for all others.
    pub async fn first(&self) -> Result<()> {
        let pod = self.host_pod("first").await?;
        pod.output(&client::container("c", catalog::SMALL, "true")).await?;
        pod.remove().await
    }

    /// With other images or another configuration.
    pub async fn with(store: Store, change: impl FnOnce(&mut Options)) -> Result<Bed> {
        let registry = Own::serve(store)?;
        let mut options = Options::new(registry.address());
        change(&mut options);
        let daemon = Daemon::start_with(&options)?;
        let client = daemon.client().await.with_context(|| daemon.tail())?;
        let bed = Bed { client, daemon, registry };
        // The first pod brings what stays for all others: the bridge, its packet filter, files of address plugins.
        bed.run(client::pod("first")).await.with_context(|| bed.daemon.tail())?.remove().await?;
        Ok(bed)
    }

    /// The daemon again after it was killed, on a new connection.
    pub async fn restart(&mut self) -> Result<()> {
        self.daemon.restart()?;
        self.client = self.daemon.client().await?;
        Ok(())
    }

    /// Runs a pod with a network of its own.
    pub async fn pod(&self, name: &str) -> Result<Pod> {
        self.run(client::pod(name)).await
    }

    /// Runs a pod on the host's network.
    pub async fn host_pod(&self, name: &str) -> Result<Pod> {
        self.run(client::host_pod(name)).await
    }

    /// Runs a pod with a log directory.
    pub async fn run(&self, mut config: PodSandboxConfig) -> Result<Pod> {
        let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        config.log_directory = self.daemon.logs(&name)?.display().to_string();
        let id = self.client.run_pod(&config).await?;
        Ok(Pod { id, config, client: self.client.clone() })
    }

    /// Fails when the daemon is not the process it was.
    pub fn unmoved(&mut self, pid: u32) -> Result<()> {
        anyhow::ensure!(
            self.daemon.running() && self.daemon.pid() == pid,
            "crispd ended: {}",
            self.daemon.tail()
        );
        Ok(())
    }

    /// Waits until the instance has nothing that it had not before.
    pub fn nothing_left(&mut self, before: &std::collections::BTreeSet<String>) -> Result<()> {
        run::until("everything is as before", Duration::from_secs(10), || {
            traces::nothing_new(before, &self.daemon.traces()).map(Some)
        })
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
    client: Client,
}

impl Pod {
    /// Creates and starts a container of busybox that runs a script; gives its id.
    pub async fn start(&self, name: &str, script: &str) -> Result<String> {
        self.start_with(&client::container(name, catalog::SMALL, script)).await
    }

    /// Creates and starts a container.
    pub async fn start_with(&self, container: &ContainerConfig) -> Result<String> {
        Ok(self.client.run(&self.id, container, &self.config).await?)
    }

    /// Runs a container to its end; gives its exit code and what it wrote.
    pub async fn output(&self, container: &ContainerConfig) -> Result<(i32, String)> {
        let id = self.start_with(container).await?;
        let status = self.client.wait_exit(&id).await?;
        let name = container.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        Ok((status.exit_code, said(&self.log(&name))?))
    }

    /// Where the log of a container is.
    pub fn log(&self, container: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(format!("{container}.log"))
    }

    /// Stops and removes it.
    pub async fn remove(&self) -> Result<()> {
        self.client.stop_pod(&self.id).await?;
        Ok(self.client.remove_pod(&self.id).await?)
    }
}

/// One line of a CRI log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 with nanoseconds.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// A whole line (F) or the beginning of one (P).
    pub whole: bool,
    /// What was written.
    pub text: String,
}

/// Reads a CRI log; a line that is not in its form is an error.
pub fn lines(log: &Path) -> Result<Vec<Line>> {
    let bytes = std::fs::read(log).with_context(|| format!("read {}", log.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let parse = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        let (time, stream, tag, text) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let whole = match tag.split(':').next()? {
            "F" => true,
            "P" => false,
            _ => return None,
        };
        (matches!(stream, "stdout" | "stderr") && time.contains('T')).then(|| Line {
            time: time.to_owned(),
            stream: stream.to_owned(),
            whole,
            text: text.to_owned(),
        })
    };
    text.lines()
        .map(|line| parse(line).with_context(|| format!("not a line of a CRI log: {line:?}")))
        .collect()
}

/// What a container wrote, both streams, as it wrote it.
pub fn said(log: &Path) -> Result<String> {
    Ok(lines(log)?.into_iter().map(|line| if line.whole { line.text + "\n" } else { line.text }).collect())
}

/// Waits until a log says something.
pub fn wait_log(log: &Path, part: &str) -> Result<()> {
    run::until(&format!("{} says {part:?}", log.display()), Duration::from_secs(20), || {
        Ok(said(log)?.contains(part).then_some(()))
    })
}

/// The host's id of the only process whose arguments contain a part, waiting for it: a shell has the same words, and
/// while a program is being executed there are none.
pub fn process(part: &str) -> Result<u32> {
    run::until(
        &format!("exactly one process with {part:?} among its arguments"),
        Duration::from_secs(5),
        || {
            let mut found = traces::all_processes().filter(|pid| traces::command_line(*pid).contains(part));
            Ok(found.next().filter(|_| found.next().is_none()))
        },
    )
}

/// Whether any process has a part among its arguments now.
pub fn alive(part: &str) -> bool {
    traces::all_processes().any(|pid| traces::command_line(pid).contains(part))
}
