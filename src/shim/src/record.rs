//! Writes the records of a pod's run directory, each by rename, so that a reader finds the old one or the
//! new one. What the records say is described in `shim_api::rundir`; when to write one is others' business.

use std::{
    fs, io,
    path::Path,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Serialize, de::DeserializeOwned};
use shim_api::rundir::{self, Process};

/// Puts a record in its place. Not synced: the directory is on tmpfs, and no process outlives a power cut.
pub(crate) fn write<T: Serialize>(dir: &Path, name: &str, record: &T) -> io::Result<()> {
    let bytes = rundir::encode(record)?;
    let new = dir.join(format!(".{name}.new"));
    fs::write(&new, bytes)?;
    fs::rename(&new, dir.join(name))
}

/// A record, or None when there is none that can be believed.
pub(crate) fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Option<T> {
    rundir::decode(&fs::read(dir.join(name)).ok()?).ok()
}

/// How a process is told from a later one with the same pid.
pub(crate) fn process(pid: u32) -> io::Result<Process> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let start_ticks =
        start_ticks(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))?;
    Ok(Process { pid, start_ticks, boot_id: boot_id().to_owned() })
}

/// Nanoseconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The command's name may hold spaces and brackets, so the fields are counted from its last bracket:
/// proc(5) numbers it 2, the start time 22.
fn start_ticks(stat: &[u8]) -> Option<u64> {
    let end = memchr::memrchr(b')', stat)?;
    let fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        id.trim_end().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_cannot_forge_the_start_time() {
        let stat =
            b"7 (a) R 1 2) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0 18446744073709551615\n";
        assert_eq!(start_ticks(stat), Some(4711));
        assert_eq!(start_ticks(b"7 (a"), None);
        assert_eq!(start_ticks(b"7 (a) R 1 2"), None);
    }

    #[test]
    fn our_own_process_can_be_named() {
        let me = process(std::process::id()).unwrap();
        assert!(me.start_ticks > 0 && me.boot_id.len() == 36);
    }

    #[test]
    fn a_record_replaces_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut exit = rundir::Exit { version: 1, code: 3, exited_at: 9, oom: false, known: true };
        write(dir.path(), rundir::EXIT, &exit).unwrap();
        exit.code = 4;
        write(dir.path(), rundir::EXIT, &exit).unwrap();
        assert_eq!(read(dir.path(), rundir::EXIT), Some(exit));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("exit"), b"{}\n00000000\n").unwrap();
        assert_eq!(read::<rundir::Exit>(dir.path(), "exit"), None);
    }
}
