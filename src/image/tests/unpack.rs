//! The unpack helper as a real process: what it may reach, what it makes of good layers and of hostile ones. A
//! program of its own, because the helper is this very program, started with `unpack` as first argument.

// A test without the harness is no test to clippy.
#![allow(clippy::unwrap_used, clippy::type_complexity)]

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use image::unpack::{Compression, Error, Unpacked, Unpacker};
use tokio::io::AsyncWriteExt;

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "unpack") {
        std::process::exit(image::unpack::main(arguments));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tests: [(&str, fn(&tokio::runtime::Runtime)); 6] = [
        ("every_compression_gives_the_same_layer_and_digest", every_compression),
        ("s35_a_layer_out_of_all_proportion_is_refused", bomb),
        ("a_layer_cannot_write_outside_its_directory", outside),
        ("a_dropped_unpacking_leaves_no_process", dropped),
        ("what_is_no_archive_is_refused", rubbish),
        ("h40_the_helper_has_nothing_that_it_does_not_need", confined),
    ];
    for (name, test) in tests {
        test(&runtime);
        println!("test {name} ... ok");
    }
    println!("\ntest result: ok. {} passed; 0 failed; 0 ignored; 0 measured; 0 filtered out", tests.len());
}

fn unpacker() -> Unpacker {
    Unpacker::new(vec![std::env::current_exe().unwrap().into(), "unpack".into()])
}

async fn unpack(directory: &Path, compression: Compression, bytes: &[u8]) -> Result<Unpacked, Error> {
    let mut unpacking = unpacker().start(directory, compression, "sha256")?;
    // A child that gives up early closes the pipe; finish says why.
    let _ = unpacking.stdin().unwrap().write_all(bytes).await;
    unpacking.finish(Duration::from_secs(60)).await
}

/// Output of a filter that reads `input`.
fn filtered(program: &str, input: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    output.stdout
}

fn archive() -> Vec<u8> {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("bin")).unwrap();
    fs::write(source.path().join("bin/tool"), vec![42; 300_000]).unwrap();
    Command::new("tar").arg("-c").arg("-C").arg(source.path()).arg(".").output().unwrap().stdout
}

fn sha256(bytes: &[u8]) -> String {
    let output = filtered_sum(bytes);
    format!("sha256:{}", output.split(' ').next().unwrap())
}

fn filtered_sum(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

fn every_compression(runtime: &tokio::runtime::Runtime) {
    let plain = archive();
    let gzip = filtered("gzip", &plain);
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    // Members one after another are one stream (RFC 1952).
    let (first, second) = plain.split_at(plain.len() / 2);
    let members = [filtered("gzip", first), filtered("gzip", second)].concat();
    for (compression, bytes) in [
        (Compression::Plain, &plain),
        (Compression::Gzip, &gzip),
        (Compression::Gzip, &members),
        (Compression::Zstd, &zstd),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let unpacked = runtime.block_on(unpack(directory.path(), compression, bytes)).unwrap();
        assert_eq!(unpacked.diff_id, sha256(&plain));
        assert_eq!(fs::metadata(directory.path().join("bin/tool")).unwrap().len(), 300_000);
        assert!(unpacked.bytes >= 300_000 && unpacked.inodes == 2, "{unpacked:?}");
    }
}

fn bomb(runtime: &tokio::runtime::Runtime) {
    // Four gigabytes of nothing in four megabytes: a file that large in the archive, so that extraction reads it all.
    let mut header = [0u8; 512];
    header[..4].copy_from_slice(b"zero");
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..124].copy_from_slice(b"0000000\x000000000\0");
    header[124..136].copy_from_slice(b"77777777777\0");
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(&header).unwrap();
    let zeros = vec![0; 1 << 20];
    (0..4096).for_each(|_| encoder.write_all(&zeros).unwrap());
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 8 << 20);
    let directory = tempfile::tempdir().unwrap();
    let refused = runtime.block_on(unpack(directory.path(), Compression::Zstd, &bomb)).unwrap_err();
    assert!(matches!(refused, Error::Exhausted(_)), "{refused:?}");
}

fn outside(runtime: &tokio::runtime::Runtime) {
    let place = tempfile::tempdir().unwrap();
    let layer = place.path().join("layer");
    fs::create_dir(&layer).unwrap();
    let canary = place.path().join("canary");
    fs::write(&canary, "untouched").unwrap();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("x"), "gone").unwrap();
    for name in ["../canary".to_owned(), canary.display().to_string()] {
        let archive = Command::new("tar")
            .args(["-c", "-P", "--transform", &format!("s|.*|{name}|"), "-C"])
            .arg(source.path())
            .arg("x")
            .output()
            .unwrap()
            .stdout;
        let _ = runtime.block_on(unpack(&layer, Compression::Plain, &archive));
        assert_eq!(fs::read(&canary).unwrap(), b"untouched", "{name}");
    }
    assert_eq!(fs::metadata(place.path()).unwrap().nlink(), 3);
}

fn dropped(runtime: &tokio::runtime::Runtime) {
    let directory = tempfile::tempdir().unwrap();
    let unpacking =
        runtime.block_on(async { unpacker().start(directory.path(), Compression::Gzip, "sha256").unwrap() });
    let running = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        let needle = directory.path().as_os_str().as_encoded_bytes().to_vec();
        lines.filter(|line| line.windows(needle.len()).any(|part| part == needle)).count()
    };
    let started = std::time::Instant::now();
    // Between the fork and the exec its arguments are still ours.
    while running() != 1 {
        assert!(started.elapsed() < Duration::from_secs(10), "the helper runs");
        std::thread::sleep(Duration::from_millis(1));
    }
    runtime.block_on(async {
        drop(unpacking);
        let gone = async {
            while running() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), gone).await.expect("the helper is killed");
    });
}

fn rubbish(runtime: &tokio::runtime::Runtime) {
    for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
        let directory = tempfile::tempdir().unwrap();
        let refused = runtime.block_on(unpack(directory.path(), compression, &[0x55; 4000])).unwrap_err();
        assert!(matches!(refused, Error::Malformed(_)), "{refused:?}");
    }
}

/// What the kernel says of a helper that waits for its input.
fn confined(runtime: &tokio::runtime::Runtime) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("mark"), "").unwrap();
    let unpacking =
        runtime.block_on(async { unpacker().start(directory.path(), Compression::Plain, "sha256").unwrap() });
    let needle = directory.path().as_os_str().as_encoded_bytes().to_vec();
    let find = || {
        fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).find(|path| {
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            line.windows(needle.len()).any(|part| part == needle)
        })
    };
    let started = std::time::Instant::now();
    let proc = loop {
        match find() {
            Some(proc) => break proc,
            None => assert!(started.elapsed() < Duration::from_secs(10), "the helper runs"),
        }
    };
    let status = || fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let text = status();
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
    };
    while field("Seccomp:") != "2" || field("Threads:") != "2" {
        assert!(started.elapsed() < Duration::from_secs(10), "{}", status());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN, MKNOD, SETFCAP; see capabilities(7) for the numbers.
    let needed = [0u64, 1, 3, 4, 21, 27, 31].iter().fold(0, |set, bit| set | 1 << bit);
    for set in ["CapEff:", "CapPrm:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap() & !needed, 0, "{set}");
    }
    assert_eq!(field("CapInh:").trim_start_matches('0'), "");
    for space in ["mnt", "net", "ipc", "uts"] {
        let of = |path: &Path| fs::read_link(path.join("ns").join(space)).unwrap();
        assert_ne!(of(&proc), of(Path::new("/proc/self")), "{space}");
    }
    // Its root is the layer, and nothing else is mounted.
    assert!(proc.join("root/mark").exists());
    assert_eq!(fs::read_to_string(proc.join("mountinfo")).unwrap().lines().count(), 1);
    let mut open: Vec<_> = fs::read_dir(proc.join("fd")).unwrap().map(|fd| fd.unwrap().path()).collect();
    open.sort();
    let beyond: Vec<_> = open.iter().skip(3).map(|fd| fs::read_link(fd).unwrap()).collect();
    assert!(beyond.iter().all(|target| target == directory.path() || target == Path::new("/")), "{beyond:?}");
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    for name in ["Max address space", "Max file size", "Max cpu time", "Max core file size"] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(!line.contains("unlimited"), "{line}");
    }
    drop(unpacking);
}
