//! A real kubelet on crisp's socket.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use runtime_tests::bed::Bed;
use runtime_tests::image::catalog;
use runtime_tests::{kubelet, traces};

#[tokio::test]
async fn a_static_pod_comes_is_healed_and_goes_without_a_trace() -> Result<()> {
    let mut bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let before = bed.daemon.traces();
    let socket = bed.daemon.socket();
    let seen = tokio::task::spawn_blocking(move || kubelet::scenario(&socket)).await?;
    for step in seen.with_context(|| bed.daemon.tail())? {
        println!("ok: {step}");
    }
    // The kubelet keeps the images; nothing else may stay.
    let after: BTreeSet<String> =
        bed.daemon.traces().into_iter().filter(|line| !line.starts_with("root: file images")).collect();
    traces::nothing_new(&before, &after)
}
