//! crispd, the daemon: answers the kubelet and owns what is remembered. Here: arguments, configuration, log,
//! recovery, serving and draining. No decisions.

// A program has no outside: what is `pub` here is so for the other modules.
#![allow(unreachable_pub)]

mod calls;
mod config;
mod containers;
mod cri;
mod daemon;
mod error;
mod events;
mod lock;
mod metrics;
mod open;
mod pods;
mod recover;
mod serve;
mod shim;
mod stats;
mod status;
mod store;
mod streams;
mod table;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use config::{Config, Format};
use daemon::{Daemon, Parts};
use store::Store;

/// The Kubernetes container runtime.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of what lasts, in place of the configured one.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of what a reboot clears, in place of the configured one.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// CRI socket, in place of the configured one.
    #[arg(long, value_name = "PATH")]
    address: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// About the configuration.
    Config {
        #[command(subcommand)]
        what: About,
    },
    /// Unpacks one layer; run by the daemon.
    #[command(hide = true)]
    Unpack {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        rest: Vec<String>,
    },
}

#[derive(Subcommand)]
enum About {
    /// Prints every key with its default.
    Default,
}

/// Read when no file is named, if it is there.
const CONFIG: &str = "/etc/crisp/config.toml";

fn main() -> Result<()> {
    // First of all: nothing that is made without a mode of its own is for others.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Unpack { .. }) => image::unpack_main(),
        Some(Command::Config { what: About::Default }) => {
            print!("{}", include_str!("../../../config.toml.example"));
            Ok(())
        }
        None => {
            let config = load(&arguments)?;
            log(&config)?;
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(workers())
                .enable_all()
                .build()
                .context("start the runtime")?
                .block_on(run(arguments, config))
        }
    }
}

/// As many as there are processors, up to what a node's worth of calls can use: each costs memory.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8)
}

fn load(arguments: &Arguments) -> Result<Config> {
    let default = PathBuf::from(CONFIG);
    let file = arguments.config.clone().or_else(|| default.exists().then_some(default));
    let mut config = match file {
        Some(file) => Config::load(&file).context("configuration")?,
        None => Config::default(),
    };
    for (value, key) in [
        (&arguments.root, &mut config.root),
        (&arguments.state, &mut config.state),
        (&arguments.address, &mut config.grpc.address),
    ] {
        if let Some(value) = value {
            *key = std::path::absolute(value).context("arguments")?;
        }
    }
    Ok(config)
}

fn log(config: &Config) -> Result<()> {
    // A bare level is ours: those below it would show every frame of HTTP/2.
    let filter = match config.debug.level.as_str() {
        level @ ("debug" | "trace") => format!("info,crispd={level},image={level},network={level}"),
        other => other.into(),
    };
    let filter = EnvFilter::try_new(filter).context("debug.level")?;
    let output =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match config.debug.format {
        Format::Text => output.with_ansi(false).init(),
        Format::Json => output.json().init(),
    }
    Ok(())
}

async fn run(arguments: Arguments, config: Config) -> Result<()> {
    limits(&config);
    let _locks = open::directories(&config)?;
    recover::sweep(&config.state).context("empty the directory of FIFOs")?;
    let (store, rows) = Store::open(&open::database(&config))?;
    let parts = Parts {
        store,
        images: open::images(&config).await?,
        network: open::network(&config)?,
        programs: open::programs(&config)?,
    };
    let address = config.address();
    let daemon = Arc::new(Daemon::new(config, parts));
    recover::run(&daemon, rows).await;

    let (streams, streaming) = streams::open(daemon.clone()).await?;
    tokio::spawn(streaming);
    let listener = serve::bind(&address, &daemon.config().grpc)?;
    tokio::spawn(import(daemon.clone()));
    tokio::spawn(reload(daemon.clone(), arguments));
    tokio::spawn(watchdog());
    notify(&[sd_notify::NotifyState::Ready]);
    info!(version = env!("CARGO_PKG_VERSION"), address = %address.display(), "serving");
    serve::run(daemon, Arc::new(streams), listener, asked_to_end()?).await?;
    info!("ended, pods run on");
    Ok(())
}

/// More descriptors than a shell gives, and a place in the queue of the OOM killer; both as far as permitted.
fn limits(config: &Config) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    shim::descriptors(before);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, ..before }) {
        warn!(error = %e, "raise the limit of descriptors");
    }
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", config.oom_score.to_string()) {
        warn!(score = config.oom_score, error = %e, "the daemon's OOM score stays as it is");
    }
}

fn asked_to_end() -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        notify(&[sd_notify::NotifyState::Stopping]);
        info!("asked to end");
    })
}

/// Takes in images that need no registry. Beside the serving: a large layout must not make the kubelet wait.
async fn import(daemon: Arc<Daemon>) {
    for dir in daemon.config().images.import_dirs.clone() {
        match daemon.images.import(&dir).await {
            Ok(images) => info!(dir = %dir.display(), images = images.len(), "images imported"),
            Err(e) => warn!(dir = %dir.display(), error = %e, "images not imported"),
        }
    }
}

/// Takes over what can change, on each SIGHUP. A file that is not good changes nothing.
async fn reload(daemon: Arc<Daemon>, arguments: Arguments) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        match reloaded(&daemon, &arguments) {
            Ok(()) => {
                info!("configuration reloaded");
                tokio::spawn(import(daemon.clone()));
            }
            Err(e) => {
                error!(error = format!("{e:#}"), "configuration is not good: the old one stays in force")
            }
        }
    }
}

fn reloaded(daemon: &Daemon, arguments: &Arguments) -> Result<()> {
    let config = daemon.config().live(load(arguments)?);
    let programs = open::programs(&config)?;
    daemon.network.reconfigure(open::of_network(&config)?).context("network")?;
    daemon.images.reconfigure(open::of_images(&config));
    daemon.set_config(config, programs);
    Ok(())
}

/// Tells systemd that the runtime's threads still turn.
async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut ticks = tokio::time::interval((period / 2).max(Duration::from_millis(100)));
    loop {
        ticks.tick().await;
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // Without systemd nobody listens.
    let _ = sd_notify::notify(states);
}
