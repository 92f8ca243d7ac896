//! The log files of containers.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;
use shim_api::{
    shim::{ContainerOptions, ReopenLogRequest},
    ttrpc::Error,
};

use crate::fixture::{Made, Shim, records, run, soon, until};

async fn reopen(shim: &Shim, id: &str) -> Result<(), Error> {
    let request = ReopenLogRequest { container_id: id.into(), ..ReopenLogRequest::default() };
    shim.pod.reopen_log(soon(), &request).await.map(drop)
}

#[test]
fn both_streams_are_cut_into_records() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh(
            "a",
            "printf 'one\\n\\ntwo\\r\\n'; printf 'oops\\n' >&2; printf '\\0\\377\\033\\n'; printf end",
        )
        .await;
        assert_eq!(shim.wait("a").await, 0);
        let of = |stream: &str| -> Vec<_> {
            let records = shim.records("a").into_iter();
            records.filter(|(name, ..)| name == stream).map(|(_, tag, content)| (tag, content)).collect()
        };
        let wanted: Vec<(char, &[u8])> =
            vec![('F', b"one"), ('F', b""), ('F', b"two"), ('F', b"\0\xff\x1b"), ('P', b"end")];
        assert_eq!(of("stdout"), wanted.into_iter().map(|(t, c)| (t, c.to_vec())).collect::<Vec<_>>());
        assert_eq!(of("stderr"), [('F', b"oops".to_vec())]);
    });
}

#[test]
fn a_line_of_many_records_comes_back_whole() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh(
            "a",
            "head -c 100000 /dev/zero | tr '\\0' x; echo; head -c 16384 /dev/zero | tr '\\0' y; echo",
        )
        .await;
        assert_eq!(shim.wait("a").await, 0);
        let records = shim.records("a");
        let tags: String = records.iter().map(|(_, tag, _)| *tag).collect();
        assert_eq!(tags, "PPPPPPFF");
        assert!(records.iter().all(|(.., content)| content.len() <= 16384));
        let whole: usize = records[..7].iter().map(|(.., content)| content.len()).sum();
        assert_eq!((whole, records[7].2.len()), (100_000, 16384));
    });
}

#[test]
fn the_longest_record_can_be_chosen() {
    run(async {
        let shim = Shim::usual().await;
        let options = ContainerOptions { max_log_record: 4, ..ContainerOptions::default() };
        let made = Made { options, ..Made::default() };
        shim.try_run("a", &["echo", "0123456789"], made).await.unwrap();
        shim.wait("a").await;
        let records: Vec<_> = shim.records("a").into_iter().map(|(_, tag, content)| (tag, content)).collect();
        assert_eq!(records, [('P', b"0123".to_vec()), ('P', b"4567".to_vec()), ('F', b"89".to_vec())]);
    });
}

#[test]
fn a_flood_is_logged_whole_in_bounded_memory() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "true").await;
        shim.wait("a").await;
        let kib = |value: String| value.trim_end_matches(" kB").trim().parse::<u64>().unwrap();
        let before = kib(shim.status("VmHWM"));
        // Some times 16 MiB in lines of 64 bytes, and one line of 32 MiB.
        let times: usize = std::env::var("CRISP_FLOOD").map_or(8, |times| times.parse().unwrap());
        let script = format!("i=0; while [ $i -lt {times} ]; do cat /flood; i=$((i+1)); done");
        let (began, cpu) = (Instant::now(), shim.cpu());
        shim.sh("b", &script).await;
        assert_eq!(shim.wait("b").await, 0);
        let grown = kib(shim.status("VmHWM")) - before;
        let took = began.elapsed().as_secs_f64();
        let [user, system] = std::array::from_fn(|i| shim.cpu()[i] - cpu[i]);
        let gigabytes = (times << 24) as f64 / 1e9;
        println!(
            "log: {:.0} MB/s, CPU per GB {:.2} s and {:.2} s in the kernel, shim grew by {grown} KiB",
            gigabytes * 1e3 / took,
            user / gigabytes,
            system / gigabytes
        );
        assert!(grown < 1024, "{grown} KiB");
        shim.sh("c", "head -c 33554432 /dev/zero; echo").await;
        assert_eq!(shim.wait("c").await, 0);
        assert!(kib(shim.status("VmHWM")) - before < 1024);
        let log = fs::read(shim.log("b")).unwrap();
        assert!(log.chunks(40 + 64).all(|line| line[29] == b'Z' && line[40] == b'0' && line[103] == b'\n'));
        assert_eq!(log.len(), (40 + 64) * (times << 24) / 64);
        let long: usize = shim.records("c").iter().map(|(.., content)| content.len()).sum();
        assert_eq!(long, 33_554_432);
    });
}

#[test]
fn reopening_in_a_flood_loses_no_line() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "seq 1 1000000000").await;
        until("the flood", || fs::metadata(shim.log("a")).is_ok_and(|log| log.len() > 0)).await;
        let mut parts = Vec::new();
        for part in 0..100 {
            let to: PathBuf = shim.log("a").with_extension(part.to_string());
            // Sometimes somebody else has taken the file away.
            if part % 10 == 3 {
                fs::rename(shim.log("a"), &to).unwrap();
                File::create(shim.log("a")).unwrap();
            } else {
                fs::rename(shim.log("a"), &to).unwrap();
            }
            parts.push(to);
            reopen(&shim, "a").await.unwrap();
            assert!(shim.log("a").exists());
        }
        shim.kill("a", 9).await.unwrap();
        assert_eq!(shim.wait("a").await, 137);
        // After the exit, too.
        reopen(&shim, "a").await.unwrap();
        parts.push(shim.log("a"));
        let mut next = 1u32;
        let mut beginning = Vec::new();
        for part in &parts {
            for (_, tag, content) in records(&fs::read(part).unwrap()) {
                beginning.extend(content);
                if tag == 'F' {
                    assert_eq!(String::from_utf8(std::mem::take(&mut beginning)).unwrap(), next.to_string());
                    next += 1;
                }
            }
        }
        // The last number may be cut by the kill.
        assert!(next.to_string().as_bytes().starts_with(&beginning));
        assert!(next > 1000, "{next}");
        let filled = parts.iter().filter(|part| fs::metadata(part).unwrap().len() > 0).count();
        assert!(filled > 1, "the flood was over before the first reopen");
    });
}

#[test]
fn only_a_plain_file_is_taken_for_a_log() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "while :; do echo x; sleep 0.01; done").await;
        let log = shim.log("a");
        let away = log.with_extension("old");
        fs::rename(&log, &away).unwrap();
        let canary = shim.state.path().join("canary");
        std::os::unix::fs::symlink(&canary, &log).unwrap();
        reopen(&shim, "a").await.unwrap_err();
        fs::remove_file(&log).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &log, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        reopen(&shim, "a").await.unwrap_err();
        assert!(!canary.exists());
        // The old one is written on.
        let before = fs::metadata(&away).unwrap().len();
        until("more lines", || fs::metadata(&away).unwrap().len() > before).await;

        for path in ["../../x.log", "/tmp/x.log", "link/x.log"] {
            let mut request = shim.bundle_with("b", &["true"], Made::default());
            let _ = std::os::unix::fs::symlink("/tmp", shim.state.path().join("logs/link"));
            request.options.as_mut().unwrap().log_path = path.into();
            let refused = shim.pod.run(soon(), &request).await.unwrap_err();
            assert!(refused.to_string().contains("open log file"), "{refused}");
        }
    });
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_stops_no_container_and_what_is_lost_is_said() {
    run(async {
        let shim = Shim::usual().await;
        let logs = shim.state.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&logs).status();
        assert!(mount.unwrap().success());
        let mounted = Mounted(logs.clone());
        shim.sh("a", "i=0; while :; do echo line $i; i=$((i+1)); done").await;
        until("a full disk", || fs::metadata(shim.log("a")).unwrap().len() >= 60_000).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        // The marker is tried again and again, and taken back as long as it does not fit.
        let mut kept = Vec::new();
        until("a moment without a half marker", || {
            kept = fs::read(shim.log("a")).unwrap();
            kept.ends_with(b"\n")
        })
        .await;
        fs::rename(shim.log("a"), logs.join("rotated")).unwrap();
        fs::remove_file(logs.join("rotated")).unwrap();
        reopen(&shim, "a").await.unwrap();
        until("a new line", || fs::metadata(shim.log("a")).unwrap().len() > 1000).await;
        shim.kill("a", 9).await.unwrap();
        assert_eq!(shim.wait("a").await, 137);
        // Nothing is torn, before and after.
        assert!(records(&kept).len() > 100);
        let found = fs::read(shim.log("a")).unwrap();
        let marker = String::from_utf8(records(&found)[0].2.clone()).unwrap();
        assert!(
            marker.starts_with("[crisp: ") && marker.ends_with("No space left on device (os error 28)]"),
            "{marker}"
        );
        drop(mounted);
    });
}

#[test]
fn a_terminal_is_logged_as_stdout() {
    run(async {
        let shim = Shim::usual().await;
        let options = ContainerOptions { terminal: true, ..ContainerOptions::default() };
        let spec = json!({"process": {"terminal": true, "consoleSize": {"height": 21, "width": 83}}});
        let args = ["sh", "-c", "tty; stty size; echo err >&2; exit 2"];
        shim.try_run("a", &args, Made { options, spec }).await.unwrap();
        assert_eq!(shim.wait("a").await, 2);
        assert_eq!(shim.printed("a"), "/dev/pts/0\n21 83\nerr\n");
        let streams: HashMap<_, _> = shim.records("a").into_iter().map(|(stream, ..)| (stream, ())).collect();
        assert_eq!(streams.into_keys().collect::<Vec<_>>(), ["stdout"]);
    });
}

#[test]
fn a_terminal_that_was_hung_up_and_opened_again_is_waited_for_and_not_spun_on() {
    run(async {
        let shim = Shim::usual().await;
        let options = ContainerOptions { terminal: true, ..ContainerOptions::default() };
        let spec = json!({"process": {"terminal": true}});
        let script =
            "exec </dev/null >/dev/null 2>&1; sleep 0.2; exec >/dev/console; echo again; exec sleep 60";
        shim.try_run("a", &["sh", "-c", script], Made { options, spec }).await.unwrap();
        until("a word after the hang-up", || shim.printed("a") == "again\n").await;
        let before = shim.cpu();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let spent: f64 = shim.cpu().iter().sum::<f64>() - before.iter().sum::<f64>();
        assert!(spent < 0.2, "{spent} s of computing in a second of quiet");
    });
}

#[test]
fn a_container_without_stdin_reads_nothing_and_one_with_it_waits() {
    run(async {
        let shim = Shim::usual().await;
        shim.run("a", &["cat"]).await;
        assert_eq!(shim.wait("a").await, 0);
        let options = ContainerOptions { stdin: true, ..ContainerOptions::default() };
        shim.try_run("b", &["cat"], Made { options, ..Made::default() }).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!shim.bundle("b").join("exit").exists());
        let close =
            shim_api::containerd::api::CloseIORequest { id: "b".into(), stdin: true, ..Default::default() };
        shim.task.close_io(soon(), &close).await.unwrap();
        assert_eq!(shim.wait("b").await, 0);
    });
}
