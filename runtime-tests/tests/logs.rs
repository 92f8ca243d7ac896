//! The log files that the kubelet reads.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use cri_api::v1::ContainerState;
use runtime_tests::bed::{self, Bed};
use runtime_tests::client::{container, refused};
use runtime_tests::image::catalog;

#[tokio::test]
async fn lines_have_time_stream_and_tag() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("lines").await?;
    let script = "echo one; echo two >&2; printf 'no end'";
    let (_, said) = pod.output(&container("c", catalog::SMALL, script)).await?;
    ensure!(said.contains("one\n") && said.contains("two\n") && said.ends_with("no end"), "{said:?}");
    let lines = bed::lines(&pod.log("c"))?;
    assert_eq!(lines.len(), 3);
    let last = lines.iter().find(|l| l.text == "no end");
    assert_eq!(last.map(|l| (l.stream.as_str(), l.whole)), Some(("stdout", false)));
    assert_eq!(
        lines.iter().filter(|l| l.stream == "stderr").map(|l| l.text.as_str()).collect::<Vec<_>>(),
        ["two"]
    );
    for line in &lines {
        // 2026-01-02T03:04:05.123456789Z, or with an offset.
        ensure!(line.time.len() >= 30 && line.time.as_bytes()[19] == b'.', "{:?}", line.time);
    }
    assert_eq!(std::fs::metadata(pod.log("c"))?.permissions().mode() & 0o777, 0o640);
    Ok(())
}

#[tokio::test]
async fn long_lines_are_cut_and_can_be_joined() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("long").await?;
    let script =
        "head -c 100000 /dev/zero | tr '\\0' x; echo; head -c 16384 /dev/zero | tr '\\0' y; echo; echo short";
    let (_, said) = pod.output(&container("c", catalog::SMALL, script)).await?;
    assert_eq!(said, format!("{}\n{}\nshort\n", "x".repeat(100_000), "y".repeat(16_384)));
    let lines = bed::lines(&pod.log("c"))?;
    ensure!(lines.iter().all(|l| l.text.len() <= 16_384), "a record is longer than 16 KiB");
    ensure!(lines.iter().any(|l| !l.whole), "nothing was cut");
    Ok(())
}

#[tokio::test]
async fn no_line_is_lost_or_doubled_in_a_flood_with_reopening() -> Result<()> {
    const LINES: usize = 200_000;
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("flood").await?;
    let id =
        pod.start_with(&container("c", catalog::TOOLS, &format!("sleep 0.1; exec flood {LINES} 64"))).await?;
    let mut parts = Vec::new();
    for number in 0..20 {
        let old = pod.log("c").with_extension(format!("{number}"));
        std::fs::rename(pod.log("c"), &old)?;
        match bed.client.reopen_log(&id).await {
            Ok(()) => ensure!(pod.log("c").exists(), "no new file after reopening"),
            Err(_) => {
                // It has ended: what was renamed is the last part.
                let status = bed.client.status(&id).await?;
                assert_eq!(status.state, ContainerState::ContainerExited as i32);
                parts.push(old);
                break;
            }
        }
        parts.push(old);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bed.client.wait_exit(&id).await?;
    if pod.log("c").exists() {
        parts.push(pod.log("c"));
    }
    let mut next = 0;
    for part in parts {
        for line in bed::lines(&part)? {
            let number: usize = line.text.split(' ').next().unwrap_or_default().parse()?;
            ensure!(number == next && line.text.len() == 63, "line {next} is {:?}", line.text);
            next += 1;
        }
    }
    assert_eq!(next, LINES);
    Ok(())
}

#[tokio::test]
async fn reopening_the_log_of_a_dead_container_fails_and_makes_no_file() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("dead").await?;
    let id = pod.start("c", "exit 0").await?;
    bed.client.wait_exit(&id).await?;
    std::fs::remove_file(pod.log("c"))?;
    refused(bed.client.reopen_log(&id).await)?;
    ensure!(!pod.log("c").exists(), "a file appeared");
    Ok(())
}

#[tokio::test]
async fn what_stands_at_the_log_path_is_not_followed() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("planted").await?;
    let victim = bed.daemon.dir().join("victim");
    std::fs::write(&victim, "untouched")?;
    std::os::unix::fs::symlink(&victim, pod.log("link"))?;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, pod.log("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    for name in ["link", "fifo"] {
        let work = async {
            let id = bed
                .client
                .create(&pod.id, &container(name, catalog::SMALL, "echo written"), &pod.config)
                .await?;
            bed.client.start(&id).await
        };
        // Refused or written elsewhere; never waiting for a reader, never through the link.
        drop(tokio::time::timeout(Duration::from_secs(10), work).await?);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(std::fs::read_to_string(&victim)?, "untouched");
    Ok(())
}

#[tokio::test]
async fn output_of_a_container_that_nobody_logs_goes_nowhere() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("silent").await?;
    let mut config = container("c", catalog::SMALL, "head -c 5000000 /dev/zero; exit 8");
    config.log_path.clear();
    let id = pod.start_with(&config).await?;
    assert_eq!(bed.client.wait_exit(&id).await?.exit_code, 8);
    assert_eq!(std::fs::read_dir(&pod.config.log_directory)?.count(), 0);
    Ok(())
}
