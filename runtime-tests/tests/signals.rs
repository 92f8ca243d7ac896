//! The signal that asks a container to stop: the caller's, the image's, or SIGTERM; told in the status, obeyed or not.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, wait_log};
use runtime_tests::client::{container, refused_with};
use runtime_tests::image::{Packing, Process, Store, debian};
use tonic::Code;

/// An image for each way to write a STOPSIGNAL.
fn store(dir: &std::path::Path) -> Result<Store> {
    let mut store = Store::create(dir)?;
    let layer = store.layer(&debian::busybox()?, Packing::OciZstd)?;
    for (name, stop_signal) in IMAGES {
        let process = Process { stop_signal: stop_signal.to_owned(), ..Process::default() };
        store.image(&[&reference(name)], std::slice::from_ref(&layer), &process, Packing::OciZstd)?;
    }
    Ok(store)
}

const IMAGES: [(&str, &str); 5] =
    [("silent", ""), ("quit", "SIGQUIT"), ("short", "usr1"), ("realtime", "SIGRTMIN+3"), ("number", "37")];

fn reference(name: &str) -> String {
    format!("crisp.test/{name}:1")
}

/// Ends with a code that tells the signal.
const SCRIPT: &str = "for n in 1 2 3 10 12 15 34 37 62 64; do trap \"exit $((100 + n))\" $n; done; echo set; \
                      while :; do sleep 0.05; done";

#[tokio::test]
async fn every_stop_signal_arrives_and_is_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut bed = Bed::with(store(dir.path())?, |_| {}).await?;
    for (name, _) in IMAGES {
        bed.client.pull(&reference(name)).await?;
    }
    let pod = bed.host_pod("signals").await?;
    let mut all = Vec::new();
    for (image, asked, number, told) in [
        ("silent", Signal::RuntimeDefault, 15, Signal::Sigterm),
        ("quit", Signal::RuntimeDefault, 3, Signal::Sigquit),
        ("short", Signal::RuntimeDefault, 10, Signal::Sigusr1),
        ("realtime", Signal::RuntimeDefault, 37, Signal::Sigrtminplus3),
        ("number", Signal::RuntimeDefault, 37, Signal::Sigrtminplus3),
        ("silent", Signal::Sigint, 2, Signal::Sigint),
        ("silent", Signal::Sigrtminplus3, 37, Signal::Sigrtminplus3),
        ("silent", Signal::Sigrtmin, 34, Signal::Sigrtmin),
        ("silent", Signal::Sigrtmax, 64, Signal::Sigrtmax),
        ("silent", Signal::Sigrtmaxminus2, 62, Signal::Sigrtmaxminus2),
        // The caller's counts more than the image's.
        ("realtime", Signal::Sighup, 1, Signal::Sighup),
        ("quit", Signal::Sigterm, 15, Signal::Sigterm),
    ] {
        let name = format!("{image}-{}", asked as i32);
        let config =
            ContainerConfig { stop_signal: asked as i32, ..container(&name, &reference(image), SCRIPT) };
        let id = pod.start_with(&config).await?;
        assert_eq!(bed.client.status(&id).await?.stop_signal, told as i32, "{name}");
        all.push((name, id, number, told));
    }
    // Known to a daemon too that was not there when it was decided.
    bed.daemon.kill()?;
    bed.restart().await?;
    for (name, id, number, told) in all {
        wait_log(&pod.log(&name), "set")?;
        bed.client.stop(&id, 10).await?;
        let status = bed.client.status(&id).await?;
        assert_eq!((status.exit_code, status.stop_signal), (100 + number, told as i32), "{name}");
    }
    let odd = ContainerConfig { stop_signal: 66, ..container("odd", &reference("silent"), "true") };
    refused_with(bed.client.create(&pod.id, &odd, &pod.config).await, Code::InvalidArgument, "stop signal 66")
}

#[tokio::test]
async fn who_ignores_a_realtime_signal_is_killed_after_the_grace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bed = Bed::with(store(dir.path())?, |_| {}).await?;
    bed.client.pull(&reference("realtime")).await?;
    let pod = bed.host_pod("deaf").await?;
    let script = "trap '' 37; trap 'exit 15' TERM; echo set; while :; do sleep 0.05; done";
    let id = pod.start_with(&container("c", &reference("realtime"), script)).await?;
    wait_log(&pod.log("c"), "set")?;
    let clock = Instant::now();
    bed.client.stop(&id, 1).await?;
    let took = clock.elapsed();
    assert_eq!(bed.client.status(&id).await?.exit_code, 137);
    ensure!(took >= Duration::from_millis(900) && took < Duration::from_secs(4), "stop took {took:?}");
    Ok(())
}
