//! Where things are: the repository, the cache that outlives a run, the programs under test.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the repository that this program was built from.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned()
}

/// Files of this package that are not Rust: Go modules, small programs.
pub fn package() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// What one run leaves for the next: `$CRISP_CACHE`, or `~/.cache/crisp`.
pub fn cache() -> Result<PathBuf> {
    let dir = match std::env::var_os("CRISP_CACHE").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = std::env::var_os("HOME").filter(|v| !v.is_empty()).unwrap_or_else(|| "/root".into());
            PathBuf::from(home).join(".cache/crisp")
        }
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("create cache {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("find cache {}", dir.display()))
}

/// Programs built with the Go toolchain.
pub fn go_bin() -> Result<PathBuf> {
    Ok(cache()?.join("go/bin"))
}

/// CNI plugins built with the Go toolchain.
pub fn go_cni() -> Result<PathBuf> {
    Ok(cache()?.join("go/cni"))
}

/// Files of Debian packages that are unpacked and never installed, because installing would start a service.
pub fn debian() -> Result<PathBuf> {
    Ok(cache()?.join("debian"))
}

/// Where cargo builds what is tested.
pub fn target() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR").filter(|v| !v.is_empty()) {
        Some(dir) => Ok(dir.into()),
        None => Ok(cache()?.join("target")),
    }
}

/// A private directory with a short path (a unix socket's has at most 107 bytes), removed when dropped.
pub fn scratch(prefix: &str) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(prefix)
        .rand_bytes(5)
        .tempdir_in("/tmp")
        .context("create a private directory")
}

/// A program on PATH or in the directories where root's programs are.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    std::env::split_paths(&path)
        .chain(extra.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
