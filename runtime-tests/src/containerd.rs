//! containerd in a private place, with runc and CNI plugins: what crisp is measured against, and the proof that the
//! images and the drivers are right when crisp is not.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::daemon::{clear, cni, network_names};
use crate::image::catalog;
use crate::traces::Marks;
use crate::{place, registry, run, setup};

/// An instance of containerd.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    marks: Marks,
    dir: tempfile::TempDir,
}

impl Containerd {
    /// Starts an instance whose images come from a registry.
    pub fn start(from: SocketAddr) -> Result<Containerd> {
        let dir = place::scratch("cd-")?;
        let (bridge, subnet) = network_names()?;
        let mut marks = Marks { dir: dir.path().to_owned(), names: BTreeSet::new() };
        marks.note(&bridge);
        registry::mirrors(&dir.path().join("certs.d"), from)?;
        cni(&dir.path().join("net.d"), &dir.path().join("ipam"), &bridge, &subnet)?;
        let at = dir.path().display();
        let config = format!(
            "version = 3\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\n\
             [grpc]\naddress = \"{at}/containerd.sock\"\n\n\
             [ttrpc]\naddress = \"{at}/containerd.ttrpc\"\n\n\
             [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{}\"\n\n\
             [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"{at}/certs.d\"\n\n\
             [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\n\
             [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\n\
             [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nBinaryName = \"{}\"\n\n\
             [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = [\"{}\"]\nconf_dir = \"{at}/net.d\"\n\n\
             [plugins.'io.containerd.nri.v1.nri']\ndisable = true\n\n\
             [plugins.'io.containerd.internal.v1.opt']\npath = \"{at}/opt\"\n",
            catalog::PAUSE,
            setup::go_program("runc")?.display(),
            place::go_cni()?.display(),
        );
        std::fs::write(dir.path().join("config.toml"), config)?;
        let log = std::fs::File::create(dir.path().join("containerd.log"))?;
        let path = std::env::join_paths(
            std::iter::once(place::go_bin()?)
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
        )?;
        let child = Command::new(setup::go_program("containerd")?)
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .env("PATH", path)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start containerd")?;
        let containerd = Containerd { child, marks, dir };
        let socket = containerd.socket();
        run::until("containerd answers", Duration::from_secs(30), || {
            Ok(UnixStream::connect(&socket).is_ok().then_some(()))
        })
        .with_context(|| containerd.tail())?;
        Ok(containerd)
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// The end of the log, for a message.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("containerd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("end of containerd's log:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let socket = self.socket();
        std::thread::spawn(move || clear(&socket)).join().ok();
        self.child.kill().ok();
        self.child.wait().ok();
        self.marks.wipe();
    }
}
