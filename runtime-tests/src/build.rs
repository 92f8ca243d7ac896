//! The programs under test: built from this repository, once per process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{place, run};

/// The daemon and the shim.
#[derive(Clone, Debug)]
pub struct Programs {
    /// crispd.
    pub daemon: PathBuf,
    /// containerd-shim-crisp-v1.
    pub shim: PathBuf,
}

/// Builds both as they are shipped, or takes those in the directory that `CRISP_BIN` names.
pub fn programs() -> Result<Programs> {
    static DONE: Mutex<Option<Programs>> = Mutex::new(None);
    let mut done = DONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(programs) = done.as_ref() {
        return Ok(programs.clone());
    }
    let programs = match std::env::var_os("CRISP_BIN").filter(|dir| !dir.is_empty()) {
        Some(dir) => in_directory(Path::new(&dir)),
        None => from_source()?,
    };
    for program in [&programs.daemon, &programs.shim] {
        ensure!(program.is_file(), "{} is not there", program.display());
    }
    *done = Some(programs.clone());
    Ok(programs)
}

fn in_directory(dir: &Path) -> Programs {
    Programs { daemon: dir.join("crispd"), shim: dir.join("containerd-shim-crisp-v1") }
}

fn from_source() -> Result<Programs> {
    let target = place::target()?;
    cargo(&["build", "--release", "--quiet", "-p", "crispd"]).context("build the daemon")?;
    cargo(&["build", "--profile", "shim", "--target", MUSL, "--quiet", "-p", "crisp-shim"])
        .context("build the shim")?;
    Ok(Programs {
        daemon: target.join("release/crispd"),
        shim: target.join(MUSL).join("shim/containerd-shim-crisp-v1"),
    })
}

const MUSL: &str = "x86_64-unknown-linux-musl";

/// Runs cargo in the repository with our target directory.
pub fn cargo(args: &[&str]) -> Result<()> {
    run::status(&mut cargo_command(args)?, Duration::from_secs(3600))
}

/// cargo in the repository with our target directory, to be run.
pub fn cargo_command(args: &[&str]) -> Result<Command> {
    let mut cargo = Command::new("cargo");
    cargo.args(args).current_dir(place::repository()).env("CARGO_TARGET_DIR", place::target()?);
    // Set by a cargo that runs us; they would make this one build everything anew.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_BIN_") || name == "CARGO_MANIFEST_DIR" {
            cargo.env_remove(name);
        }
    }
    Ok(cargo)
}
