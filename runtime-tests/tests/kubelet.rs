//! A real kubelet on crisp's socket.

use anyhow::{Context, Result};
use runtime_tests::daemon::Daemon;
use runtime_tests::image::catalog;
use runtime_tests::kubelet;
use runtime_tests::registry::Own;

#[test]
fn a_static_pod_comes_is_healed_and_goes_without_a_trace() -> Result<()> {
    let images = Own::serve(catalog::ensure()?)?;
    let mut daemon = Daemon::start(images.address())?;
    let before = daemon.traces();
    for step in kubelet::scenario(&daemon.socket()).with_context(|| daemon.tail())? {
        println!("ok: {step}");
    }
    // The kubelet keeps the images; nothing else may stay.
    let after: std::collections::BTreeSet<String> =
        daemon.traces().into_iter().filter(|line| !line.starts_with("root: file images")).collect();
    runtime_tests::traces::nothing_new(&before, &after)
}
