//! `HOME` for a user, from the container's `/etc/passwd`. The file is the image's and may be anything: only a
//! regular file is read, and not for ever (CVE-2025-4437).

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use crate::kernel;

/// As much of the file as is read, containerd's cap as well.
const LIMIT: u64 = 10 << 20;

/// `HOME=…`, which is the root when the user is not listed.
pub(super) fn find(uid: u32) -> CString {
    let home = open().and_then(|file| search(file, uid)).unwrap_or_else(|| b"/".to_vec());
    CString::new([b"HOME=".as_slice(), &home].concat()).unwrap_or_else(|_| c"HOME=/".into())
}

fn open() -> Option<File> {
    let root = kernel::open_path(Path::new("/")).ok()?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // A path first: opening a device or a FIFO can have effects.
    let path = openat2(&root, "etc/passwd", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?;
    let regular =
        |fd: &_| fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    if !regular(&path) {
        return None;
    }
    let file = openat2(&root, "etc/passwd", flags, Mode::empty(), resolve).ok()?;
    regular(&file).then(|| File::from(file))
}

/// The sixth field of the first line whose third is the id (passwd(5)).
fn search(file: impl Read, uid: u32) -> Option<Vec<u8>> {
    let wanted = uid.to_string();
    let mut lines = BufReader::with_capacity(16 << 10, file.take(LIMIT));
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).ok()? > 0 {
        let mut fields = line.trim_ascii_end().split(|byte| *byte == b':');
        if fields.nth(2) == Some(wanted.as_bytes()) {
            let home = fields.nth(2).unwrap_or_default();
            return (home.first() == Some(&b'/')).then(|| home.to_vec());
        }
        line.clear();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_with_the_id_counts() {
        let file =
            b"# x\nroot:x:0:0:root:/root:/bin/sh\na:x:5:5::/home/a:\nb:x:5:5::/b:\nshort:x:6\n".as_slice();
        assert_eq!(search(file, 0), Some(b"/root".to_vec()));
        assert_eq!(search(file, 5), Some(b"/home/a".to_vec()));
        assert_eq!(search(file, 6), None);
        assert_eq!(search(file, 7), None);
    }

    #[test]
    fn a_home_that_is_not_absolute_does_not_count() {
        assert_eq!(search(b"a:x:5:5::x=y:/bin/sh".as_slice(), 5), None);
    }

    #[test]
    fn a_file_without_end_is_not_read_to_its_end() {
        assert_eq!(search(std::io::repeat(b'a'), 5), None);
    }
}
