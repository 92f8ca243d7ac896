//! The writable part of a container's root: an upper and a work directory beside the image's layers.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, mkdirat, openat};

use crate::error::{Error, Result, sys};
use crate::layers::Attributes;
use crate::tree::DIRECTORY;

/// What overlayfs is to be mounted from. This library does not mount it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The layers, topmost first.
    pub lower: Vec<PathBuf>,
    /// What the container writes.
    pub upper: PathBuf,
    /// overlayfs's own.
    pub work: PathBuf,
}

/// Whether a key may be a directory name.
pub(crate) fn check_key(key: &str) -> Result<CString> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if key.is_empty() || key.len() > 200 || key.starts_with('.') || !key.bytes().all(fine) {
        return Err(Error::InvalidArgument(format!(
            "snapshot key {:?}",
            key.chars().take(80).collect::<String>()
        )));
    }
    CString::new(key).map_err(|_| Error::InvalidArgument("snapshot key".into()))
}

/// Makes the directories. The upper one gets the attributes of the image's root, because in a mounted overlay the
/// root looks like the upper directory.
pub(crate) fn make(
    snapshots: BorrowedFd<'_>,
    key: &CString,
    layers: BorrowedFd<'_>,
    topmost: Option<&str>,
) -> Result<()> {
    let failed = |errno| sys(format!("make snapshot {}", key.to_string_lossy()))(errno);
    let root = match topmost {
        Some(name) => {
            let layer = openat(layers, name, DIRECTORY, Mode::empty()).map_err(failed)?;
            Some(Attributes::read(layer.as_fd()).map_err(failed)?)
        }
        None => None,
    };
    mkdirat(snapshots, key.as_c_str(), Mode::from_raw_mode(0o700)).map_err(failed)?;
    let directory = openat(snapshots, key.as_c_str(), DIRECTORY, Mode::empty()).map_err(failed)?;
    mkdirat(&directory, c"work", Mode::from_raw_mode(0o711)).map_err(failed)?;
    mkdirat(&directory, c"fs", Mode::from_raw_mode(0o755)).map_err(failed)?;
    let upper = openat(&directory, c"fs", DIRECTORY, Mode::empty()).map_err(failed)?;
    match root {
        Some(root) => {
            root.apply(upper.as_fd()).map_err(failed)?;
            root.apply_times(upper.as_fd()).map_err(failed)
        }
        // The mode is given apart from the umask.
        None => rustix::fs::fchmod(&upper, Mode::from_raw_mode(0o755)).map_err(failed),
    }
}
