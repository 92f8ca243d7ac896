//! Finds the program of a process as execvp(3) would, in the container and as its user, so that a missing one is
//! reported while we still can: after the seccomp filter is in place, even saying so may be forbidden.

use std::ffi::CString;

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, statat};
use rustix::io::Errno;

use crate::kernel::Result;

/// Where to look when the environment says nothing.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file to execute. Names without a slash are looked for in `path`.
pub(super) fn find(name: &[u8], path: Option<&[u8]>) -> Result<CString> {
    if name.contains(&b'/') {
        return executable(name);
    }
    let mut answer = Errno::NOENT;
    for directory in path.unwrap_or(PATH).split(|byte| *byte == b':') {
        // An empty entry means the working directory.
        let directory = if directory.is_empty() { b"." } else { directory };
        match executable(&[directory, b"/", name].concat()) {
            // One that may not be executed is passed over, but remembered.
            Err(Errno::ACCESS | Errno::ISDIR) => answer = Errno::ACCESS,
            Err(_) => {}
            found => return found,
        }
    }
    Err(answer)
}

fn executable(path: &[u8]) -> Result<CString> {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let stat = statat(CWD, &path, AtFlags::empty())?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ => return Err(Errno::ACCESS),
    }
    accessat(CWD, &path, Access::EXEC_OK, AtFlags::EACCESS)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_executable_in_the_path_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap().to_owned();
        for (name, mode) in [("a", 0o644), ("b", 0o755)] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            let file = dir.path().join(name).join("tool");
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        }
        let find = |path: String| find(b"tool", Some(path.as_bytes()));
        let found = find(format!("{root}/none:{root}/a:{root}/b")).unwrap();
        assert_eq!(found.to_str().unwrap(), format!("{root}/b/tool"));
        assert_eq!(find(format!("{root}/a")), Err(Errno::ACCESS));
        assert_eq!(find(format!("{root}/none")), Err(Errno::NOENT));
    }

    #[test]
    fn a_directory_is_no_program() {
        assert_eq!(find(b"/usr", None), Err(Errno::ISDIR));
        assert_eq!(find(b"/usr/bin/env/x", None), Err(Errno::NOTDIR));
    }
}
