//! The files of one pod's run directory, which the shim writes and the daemon reads when it starts.
//! Says names and contents; writing by rename and the decision what to believe are left to the two programs.
//!
//! ```text
//! <state>/p/<pod id>/            0700, made by the daemon; the shim's working directory
//!   shim.sock                    ttrpc, bound by the daemon, its listening fd handed to the shim as fd 3
//!   shim                         Shim: who serves here
//!   shim.log                     stderr of the shim
//!   c/<container id>/            bundle, made by the daemon
//!     config.json                OCI runtime spec
//!     init                       Init: the first process
//!     exit                       Exit: written before anyone is told of the exit
//! ```
//! A record is one line of JSON followed by a line with the CRC-32 of the first, so that a torn or damaged
//! file is recognised and set aside.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Names within a pod's run directory.
pub const SOCKET: &str = "shim.sock";
/// Record of the shim itself.
pub const SHIM: &str = "shim";
/// Where the shim's stderr goes.
pub const LOG: &str = "shim.log";
/// Directory of bundles.
pub const CONTAINERS: &str = "c";
/// Record of a container's first process, within its bundle.
pub const INIT: &str = "init";
/// Record of a container's end, within its bundle.
pub const EXIT: &str = "exit";
/// The descriptor on which a shim that crispd spawned finds its listening socket.
pub const LISTEN_FD: i32 = 3;

/// A process that can be told from a later one with the same pid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the host's pid namespace.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat` (proc(5)): start time in clock ticks since boot.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// Who serves a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shim {
    /// Version of these files; [`VERSION`].
    pub version: u32,
    /// The shim's process.
    pub process: Process,
}

/// The first process of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// Version of these files.
    pub version: u32,
    /// The first process.
    pub process: Process,
    /// Set by Task.Start, in nanoseconds since 1970.
    pub started_at: i64,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Version of these files.
    pub version: u32,
    /// Exit code, or 128 plus the signal; 255 when nobody knows.
    pub code: u32,
    /// Nanoseconds since 1970.
    pub exited_at: i64,
    /// The kernel's OOM killer took a process of the container.
    pub oom: bool,
    /// False when the code is a guess because the shim was gone when the process ended.
    pub known: bool,
}

/// Version of the records.
pub const VERSION: u32 = 1;

/// Why a record could not be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Damaged {
    /// The two lines are not both there.
    Torn,
    /// The checksum does not fit.
    Checksum,
    /// The checksum fits but the content is not this record.
    Content(String),
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Damaged::Torn => f.write_str("record is torn"),
            Damaged::Checksum => f.write_str("record does not match its checksum"),
            Damaged::Content(why) => write!(f, "record cannot be understood: {why}"),
        }
    }
}

impl std::error::Error for Damaged {}

/// The bytes of a record's file.
pub fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = serde_json::to_vec(record)?;
    let sum = crc32(&bytes);
    bytes.extend_from_slice(format!("\n{sum:08x}\n").as_bytes());
    Ok(bytes)
}

/// A record from the bytes of its file.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Damaged> {
    let mut lines = bytes.split(|b| *b == b'\n');
    let (Some(body), Some(sum), Some(b"")) = (lines.next(), lines.next(), lines.next()) else {
        return Err(Damaged::Torn);
    };
    if sum != format!("{:08x}", crc32(body)).as_bytes() {
        return Err(Damaged::Checksum);
    }
    serde_json::from_slice(body).map_err(|e| Damaged::Content(e.to_string()))
}

/// CRC-32 as in IEEE 802.3, bit by bit: records are a few hundred bytes, a table would cost the shim more.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0xEDB8_8320 & (c & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit() -> Exit {
        Exit { version: VERSION, code: 137, exited_at: 5, oom: true, known: true }
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        assert_eq!(decode::<Exit>(&encode(&exit()).unwrap()), Ok(exit()));
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_noticed() {
        let good = encode(&exit()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode::<Exit>(&bad).is_err(), "flip at {at}");
            assert!(decode::<Exit>(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
