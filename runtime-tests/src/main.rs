//! lab: everything that is done with crisp beside building it. Here: arguments. The work is the library's.

use std::path::Path;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use runtime_tests::image::catalog;
use runtime_tests::{bench, build, containerd, critest, daemon, demo, fuzz, kubelet, registry, setup, suite};

#[derive(Parser)]
#[command(name = "lab", about = "Sets up, tests and measures crisp")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing and build the upstream programs.
    Setup {
        /// Only this Go module: cri-tools, streaming, peers or kubelet.
        module: Option<String>,
    },
    /// Build crispd and its shim as they are shipped.
    Build,
    /// Run what is quick: format, spelling, clippy, unit tests, documentation, dependencies.
    Check,
    /// Run everything; the last line of stdout is the sum.
    Test,
    /// Run the CRI conformance suite.
    Critest {
        /// Only specs whose name matches this expression.
        #[arg(long)]
        focus: Option<String>,
        /// Show every spec.
        #[arg(short, long)]
        verbose: bool,
        /// Exec, attach and port-forward over WebSocket in place of SPDY.
        #[arg(long)]
        websocket: bool,
        /// Run critest's own benchmarks in place of its tests.
        #[arg(long)]
        benchmark: bool,
        /// Test containerd in place of crisp, to see what this machine can pass.
        #[arg(long)]
        containerd: bool,
    },
    /// Run a kubelet with a static pod.
    Kubelet {
        /// On containerd in place of crisp.
        #[arg(long)]
        containerd: bool,
    },
    /// Fuzz what reads the bytes of strangers.
    Fuzz {
        /// For how long each target.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Only this target.
        target: Option<String>,
    },
    /// Show crisp at work.
    Demo,
    /// Measure crisp beside containerd and the sockets in PEERS (name=socket ...).
    Bench {
        /// Lives of one pod on each network.
        #[arg(long, default_value_t = 30)]
        rounds: usize,
        /// Pods that stand at the same time.
        #[arg(long, default_value_t = 60)]
        pods: usize,
        /// Pulls of the large image.
        #[arg(long, default_value_t = 3)]
        pulls: usize,
        /// Lines that one container logs.
        #[arg(long, default_value_t = 8_000_000)]
        lines: usize,
        /// Only this one: crisp or containerd.
        #[arg(long)]
        only: Option<String>,
        /// Only exec, attach and port-forward.
        #[arg(long)]
        streaming: bool,
    },
}

fn main() -> std::process::ExitCode {
    match work() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn work() -> Result<()> {
    match Arguments::parse().command {
        Command::Setup { module: None } => setup::everything(),
        Command::Setup { module: Some(module) } => setup::go_module(&module),
        Command::Build => {
            setup::for_demo()?;
            let programs = build::programs()?;
            println!("{}\n{}", programs.daemon.display(), programs.shim.display());
            Ok(())
        }
        Command::Check => suite::check(),
        Command::Test => suite::test(),
        Command::Critest { benchmark: true, containerd, .. } => {
            with_runtime(containerd, "cri-tools", |socket| {
                println!("| median (95th percentile) | ms |\n|---|---|");
                for (operation, times) in critest::benchmark(socket)? {
                    println!(
                        "| {operation} | {:.2} ({:.2}) |",
                        bench::at(&times, 0.5),
                        bench::at(&times, 0.95)
                    );
                }
                Ok(())
            })
        }
        Command::Critest { focus, verbose, websocket, containerd, .. } => {
            let options = critest::Options { focus, verbose, websocket };
            let outcome = with_runtime(containerd, "cri-tools", |socket| {
                critest::prepare_host()?;
                critest::run(socket, &options)
            })?;
            outcome.print();
            if !outcome.failed.is_empty() {
                bail!("{} specs failed", outcome.failed.len());
            }
            Ok(())
        }
        Command::Kubelet { containerd } => {
            let seen = with_runtime(containerd, "kubelet", kubelet::scenario)?;
            seen.iter().for_each(|step| println!("ok: {step}"));
            Ok(())
        }
        Command::Fuzz { seconds, target } => fuzz::run(&fuzz::Options { seconds, target }),
        Command::Demo => demo::run(),
        Command::Bench { rounds, pods, pulls, lines, only, streaming } => {
            bench::run(&bench::Options { rounds, pods, pulls, lines, only, streaming })
        }
    }
}

/// Starts crisp, or containerd in its place, for a program of a Go module.
fn with_runtime<T>(peer: bool, module: &str, act: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    setup::for_tests()?;
    setup::go_module(module)?;
    let images = registry::Docker::start(&catalog::ensure()?)?;
    if peer {
        setup::go_module("peers")?;
        act(&containerd::Containerd::start(images.address())?.socket())
    } else {
        act(&daemon::Daemon::start(images.address())?.socket())
    }
}
