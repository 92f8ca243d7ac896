//! A real kubelet on crisp's socket.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use runtime_tests::bed::Bed;
use runtime_tests::image::catalog;
use runtime_tests::{kubelet, traces};

/// Runs a scenario, and looks what it has left.
async fn whole(scenario: fn(&Path) -> Result<Vec<String>>) -> Result<()> {
    let mut bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let before = bed.daemon.traces();
    let socket = bed.daemon.socket();
    let seen = tokio::task::spawn_blocking(move || scenario(&socket)).await?;
    for step in seen.with_context(|| bed.daemon.tail())? {
        println!("ok: {step}");
    }
    // The kubelet keeps the images, and overlays of one layer their empty second; nothing else may stay.
    let kept = |line: &String| {
        line.starts_with("root: file images")
            || ["root: file volumes", "root: file volumes/empty"].contains(&line.as_str())
    };
    let after: BTreeSet<String> = bed.daemon.traces().into_iter().filter(|line| !kept(line)).collect();
    traces::nothing_new(&before, &after)
}

#[tokio::test]
async fn a_static_pod_comes_is_healed_and_goes_without_a_trace() -> Result<()> {
    whole(kubelet::scenario).await
}

#[tokio::test]
async fn a_pod_of_todays_kind_gets_what_it_asks_for() -> Result<()> {
    whole(kubelet::modern).await
}
