//! Measures runtimes side by side through their CRI sockets: the same calls, interleaved in one run, so that whatever
//! the machine does meanwhile hits all of them. Prints Markdown.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use futures_util::StreamExt;

use crate::client::{Client, container, host_pod, pod};
use crate::image::{catalog, large, push};
use crate::{containerd, daemon, place, registry, setup, spdy, streams, traces};

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Lives of one pod on each network.
    pub rounds: usize,
    /// Pods that stand at the same time.
    pub pods: usize,
    /// Pulls of the large image.
    pub pulls: usize,
    /// Lines of 64 bytes that one container logs.
    pub lines: usize,
    /// Only the peer of this name.
    pub only: Option<String>,
    /// Only exec, attach and port-forward.
    pub streaming: bool,
}

/// A runtime under measurement.
struct Peer {
    name: String,
    socket: PathBuf,
    client: Client,
    /// What stands before repository and tag of the images.
    prefix: String,
    /// The process that listens on the socket.
    daemon: u32,
    figures: BTreeMap<&'static str, Vec<f64>>,
}

/// Rows of the table in order: name, unit, whether more is better.
const ROWS: &[(&str, &str, bool)] = &[
    ("pod + container up, host network", "ms", false),
    ("pod + container up, pod network", "ms", false),
    ("RunPodSandbox, host network", "ms", false),
    ("RunPodSandbox, pod network", "ms", false),
    ("CreateContainer", "ms", false),
    ("StartContainer", "ms", false),
    ("ExecSync true", "ms", false),
    ("StopContainer, grace 0", "ms", false),
    ("RemoveContainer", "ms", false),
    ("stop + remove pod, host network", "ms", false),
    ("stop + remove pod, pod network", "ms", false),
    ("pods/s, 8 at a time", "1/s", true),
    ("memory beside the containers, per pod (PSS)", "MiB", false),
    ("daemon with all pods (PSS)", "MiB", false),
    ("ListPodSandbox + ListContainers, all pods", "ms", false),
    ("ListContainerStats, all pods", "ms", false),
    ("pull of 9 layers, 900 MB", "s", false),
    ("log throughput, 64-byte lines", "MB/s", true),
    ("CPU per GB of log, daemon and shim", "s", false),
    (FIRST_BYTE, "ms", false),
    ("exec stream, out", "MB/s", true),
    ("exec stream, in", "MB/s", true),
    ("attach, out", "MB/s", true),
    ("port-forward, there and back", "MB/s", true),
    ("port-forward, new connections", "1/s", true),
    ("CPU per GB of streams, daemon and shim", "s", false),
];

const FIRST_BYTE: &str = "exec stream, first byte";
/// Lines of 64 KiB through every stream, a quarter of a gibibyte.
const POURED: usize = 4096;
const FORWARDED: usize = 500;

/// Measures crisp, containerd and every `name=socket` in the environment variable `PEERS`.
pub fn run(options: &Options) -> Result<()> {
    setup::for_tests()?;
    setup::go_module("streaming")?;
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let store = registry::with_large(catalog::ensure()?)?;
    let images = registry::Docker::start(&store)?;
    let crisp = if wanted("crisp") {
        let options = daemon::Options { debug: "warn", ..daemon::Options::new(images.address()) };
        Some(daemon::Daemon::start_with(&options)?)
    } else {
        None
    };
    let containerd = if wanted("containerd") {
        setup::go_module("peers")?;
        Some(containerd::Containerd::start(images.address())?)
    } else {
        None
    };

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut peers = Vec::new();
        if let Some(crisp) = &crisp {
            peers.push(Peer::open("crisp", &crisp.socket(), "crisp.test/").await?);
        }
        if let Some(containerd) = &containerd {
            peers.push(Peer::open("containerd", &containerd.socket(), "crisp.test/").await?);
        }
        for entry in std::env::var("PEERS").unwrap_or_default().split_whitespace() {
            let (name, socket) = entry.split_once('=').context("PEERS is a list of name=socket")?;
            // A runtime that is not ours has no mirror for the test names; every runtime takes loopback as plain HTTP.
            peers.push(Peer::open(name, Path::new(socket), &format!("{}/", images.address())).await?);
        }
        measure(&mut peers, options).await?;
        print(&mut peers, options).await
    })
}

async fn measure(peers: &mut [Peer], options: &Options) -> Result<()> {
    for peer in peers.iter() {
        for image in [catalog::TOOLS, catalog::SMALL] {
            peer.client.pull(&peer.image(image)?).await.with_context(|| format!("{}: pull", peer.name))?;
        }
    }
    if options.streaming {
        return stream(peers).await;
    }
    // The first life warms caches and is not counted.
    for round in 0..=options.rounds {
        for peer in peers.iter_mut() {
            for host in [true, false] {
                peer.life(host, round > 0).await.with_context(|| format!("{}: one pod", peer.name))?;
            }
        }
        progress("lives", round, options.rounds);
    }
    for peer in peers.iter_mut() {
        peer.crowd(options.pods).await.with_context(|| format!("{}: many pods", peer.name))?;
    }
    progress("many pods", 1, 1);
    for pull in 0..options.pulls {
        for peer in peers.iter_mut() {
            peer.pull().await.with_context(|| format!("{}: large pull", peer.name))?;
        }
        progress("pulls", pull + 1, options.pulls);
    }
    for round in 0..3 {
        for peer in peers.iter_mut() {
            peer.logs(options.lines).await.with_context(|| format!("{}: logs", peer.name))?;
        }
        progress("logs", round + 1, 3);
    }
    stream(peers).await
}

/// Exec, attach and port-forward, all by SPDY: over WebSocket not every runtime speaks what clients speak today.
async fn stream(peers: &mut [Peer]) -> Result<()> {
    for round in 0..5 {
        for peer in peers.iter_mut() {
            peer.streams().await.with_context(|| format!("{}: streams", peer.name))?;
        }
        progress("streams", round + 1, 5);
    }
    Ok(())
}

fn progress(what: &str, done: usize, of: usize) {
    eprintln!("bench: {what} {done}/{of}");
}

impl Peer {
    async fn open(name: &str, socket: &Path, prefix: &str) -> Result<Peer> {
        let client = Client::connect(socket).await.with_context(|| format!("peer {name}"))?;
        let stream = UnixStream::connect(socket)?;
        let listener = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)?;
        Ok(Peer {
            name: name.to_owned(),
            socket: socket.to_owned(),
            client,
            prefix: prefix.to_owned(),
            daemon: listener.pid().cast_unsigned(),
            figures: BTreeMap::new(),
        })
    }

    fn image(&self, reference: &str) -> Result<String> {
        let (repository, tag) = push::split(reference)?;
        Ok(format!("{}{repository}:{tag}", self.prefix))
    }

    fn note(&mut self, row: &'static str, figure: f64) {
        self.figures.entry(row).or_default().push(figure);
    }

    /// One pod from start to end, every call timed.
    async fn life(&mut self, host: bool, counted: bool) -> Result<()> {
        let client = self.client.clone();
        let config = if host { host_pod("bench") } else { pod("bench") };
        let mut idle = container("idle", &self.image(catalog::TOOLS)?, "");
        idle.command = vec!["/bin/pause".to_owned()];
        idle.log_path.clear();
        let mut times = Vec::new();
        let mut clock = Instant::now();
        let mut lap = |row: &'static str| {
            times.push((row, clock.elapsed().as_secs_f64() * 1e3));
            clock = Instant::now();
        };
        let id = client.run_pod(&config).await?;
        lap(if host { "RunPodSandbox, host network" } else { "RunPodSandbox, pod network" });
        let inner = client.create(&id, &idle, &config).await?;
        lap("CreateContainer");
        client.start(&inner).await?;
        lap("StartContainer");
        for _ in 0..3 {
            let reply = client.exec(&inner, &["/bin/true"], 10).await?;
            lap("ExecSync true");
            ensure!(reply.exit_code == 0, "true says {}", reply.exit_code);
        }
        client.stop(&inner, 0).await?;
        lap("StopContainer, grace 0");
        client.remove(&inner).await?;
        lap("RemoveContainer");
        client.stop_pod(&id).await?;
        client.remove_pod(&id).await?;
        lap(if host { "stop + remove pod, host network" } else { "stop + remove pod, pod network" });
        if counted {
            let up: f64 = times.iter().take(3).map(|(_, ms)| ms).sum();
            self.note(
                if host { "pod + container up, host network" } else { "pod + container up, pod network" },
                up,
            );
            times.into_iter().for_each(|(row, ms)| self.note(row, ms));
        }
        Ok(())
    }

    /// Many pods at the same time: how fast they come, what they cost, how long lists take.
    async fn crowd(&mut self, count: usize) -> Result<()> {
        let image = self.image(catalog::TOOLS)?;
        let started = Instant::now();
        let pods: Vec<Result<String>> = futures_util::stream::iter(0..count)
            .map(|number| {
                let (client, image) = (self.client.clone(), image.clone());
                async move {
                    let config = pod(&format!("crowd{number}"));
                    let mut idle = container("idle", &image, "");
                    idle.command = vec!["/bin/pause".to_owned()];
                    idle.log_path.clear();
                    let id = client.run_pod(&config).await?;
                    client.run(&id, &idle, &config).await?;
                    Ok(id)
                }
            })
            .buffer_unordered(8)
            .collect()
            .await;
        let pods = pods.into_iter().collect::<Result<Vec<String>>>()?;
        self.note("pods/s, 8 at a time", count as f64 / started.elapsed().as_secs_f64());

        self.note("memory beside the containers, per pod (PSS)", self.beside(&pods).await? / count as f64);
        self.note("daemon with all pods (PSS)", pss(self.daemon));
        for _ in 0..10 {
            let clock = Instant::now();
            let (listed, containers) = (self.client.pods(None).await?, self.client.containers(None).await?);
            self.note("ListPodSandbox + ListContainers, all pods", clock.elapsed().as_secs_f64() * 1e3);
            ensure!(listed.len() >= count && containers.len() >= count, "the lists are short");
            let clock = Instant::now();
            let stats = self.client.list_stats().await?;
            self.note("ListContainerStats, all pods", clock.elapsed().as_secs_f64() * 1e3);
            ensure!(stats.len() >= count, "the statistics are short: {}", stats.len());
        }

        let gone: Vec<Result<()>> = futures_util::stream::iter(pods)
            .map(|id| {
                let client = self.client.clone();
                async move {
                    client.stop_pod(&id).await?;
                    Ok(client.remove_pod(&id).await?)
                }
            })
            .buffer_unordered(8)
            .collect()
            .await;
        gone.into_iter().collect()
    }

    /// MiB of all processes that serve these pods and are not their containers: shims and monitors name an id among
    /// their arguments, a pause process lives in the pod's own cgroup.
    async fn beside(&self, pods: &[String]) -> Result<f64> {
        let mut ids = pods.to_vec();
        ids.extend(self.client.containers(None).await?.into_iter().map(|c| c.id));
        let mut total = 0.0;
        for pid in traces::all_processes().filter(|pid| *pid != self.daemon) {
            let arguments = traces::command_line(pid);
            let group = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            if ids.iter().any(|id| arguments.contains(id.as_str()))
                || pods.iter().any(|id| group.contains(id.as_str()))
            {
                total += pss(pid);
            }
        }
        Ok(total)
    }

    async fn pull(&mut self) -> Result<()> {
        let reference = self.image(large::REFERENCE)?;
        self.client.remove_image(&reference).await?;
        let clock = Instant::now();
        self.client.pull(&reference).await?;
        self.note("pull of 9 layers, 900 MB", clock.elapsed().as_secs_f64());
        self.client.remove_image(&reference).await?;
        Ok(())
    }

    /// One container that writes as fast as its log is taken.
    async fn logs(&mut self, lines: usize) -> Result<()> {
        let dir = place::scratch("bench-log-")?;
        let mut config = host_pod("flood");
        config.log_directory = dir.path().display().to_string();
        let mut flood = container("flood", &self.image(catalog::TOOLS)?, "");
        flood.command = vec!["/bin/flood".to_owned(), lines.to_string(), "64".to_owned()];
        let id = self.client.run_pod(&config).await?;
        let inner = self.client.create(&id, &flood, &config).await?;
        let before = self.cpu(&id);
        let clock = Instant::now();
        self.client.start(&inner).await?;
        let status =
            self.client.wait_for(&inner, ContainerState::ContainerExited, Duration::from_secs(300)).await?;
        let seconds = clock.elapsed().as_secs_f64();
        let after = self.cpu(&id);
        ensure!(status.exit_code == 0, "the writer says {}", status.exit_code);
        let megabytes = lines as f64 * 64.0 / 1e6;
        self.note("log throughput, 64-byte lines", megabytes / seconds);
        self.note("CPU per GB of log, daemon and shim", (after - before) / (megabytes / 1e3));
        self.client.stop_pod(&id).await?;
        self.client.remove_pod(&id).await?;
        Ok(())
    }

    /// Output comes to client-go's client, whose own work is in its figures; input and connections are a thin one's.
    async fn streams(&mut self) -> Result<()> {
        let client = self.client.clone();
        let image = self.image(catalog::TOOLS)?;
        let dir = place::scratch("bench-streams-")?;
        let mut config = host_pod("streams");
        config.log_directory = dir.path().display().to_string();
        let pod = client.run_pod(&config).await?;
        let idle = client.run(&pod, &container("idle", &image, "exec sleep 1000"), &config).await?;

        let mut urls = String::new();
        for _ in 0..50 {
            urls += &(streams::exec(&client, &idle, false, "echo x").await? + "\n");
        }
        for line in streamed(&["many"], &urls)?.lines() {
            self.note(FIRST_BYTE, field(line, 1)? * 1e3);
        }
        let before = self.cpu(&pod);
        let flood = format!("flood {POURED} 65536");
        let url = streams::exec(&client, &idle, false, &flood).await?;
        self.rate("exec stream, out", &streamed(&["exec", "-count", &url], "")?)?;
        let url =
            streams::exec(&client, &idle, true, "dd bs=65536 of=/dev/null 2>/dev/null; echo done").await?;
        self.note("exec stream, in", megabytes(poured()) / spdy::pour(&url, poured())?);

        let mut config_in = container("attached", &image, &format!("read begin; exec {flood}"));
        (config_in.stdin, config_in.stdin_once) = (true, true);
        let attached = client.run(&pod, &config_in, &config).await?;
        let url = streams::attach(&client, &attached, true, false).await?;
        self.rate("attach, out", &streamed(&["exec", "-i", "-count", &url], "go\n")?)?;

        let port = streams::server()?.0.to_string();
        let url = streams::forward(&client, &pod).await?;
        self.note("port-forward, there and back", megabytes(poured()) / spdy::echo(&url, &port, poured())?);
        // Out, in, out again, there and back.
        let gigabytes = 5.0 * megabytes(poured()) / 1e3;
        self.note("CPU per GB of streams, daemon and shim", (self.cpu(&pod) - before) / gigabytes);
        let url = streams::forward(&client, &pod).await?;
        self.note("port-forward, new connections", FORWARDED as f64 / spdy::connect(&url, &port, FORWARDED)?);

        client.stop_pod(&pod).await?;
        Ok(client.remove_pod(&pod).await?)
    }

    /// Notes megabytes a second of what a client says: bytes and seconds.
    fn rate(&mut self, row: &'static str, said: &str) -> Result<()> {
        let bytes = field(said, 0)?;
        ensure!(bytes >= poured() as f64, "{row}: only {bytes} bytes came");
        self.note(row, bytes / 1e6 / field(said, 1)?);
        Ok(())
    }

    /// Seconds of CPU that the daemon and the processes beside one pod have used.
    fn cpu(&self, pod: &str) -> f64 {
        let shims = traces::all_processes().filter(|pid| traces::command_line(*pid).contains(pod));
        shims.chain([self.daemon]).map(cpu).sum()
    }
}

/// What the program `streams` says.
fn streamed(args: &[&str], input: &str) -> Result<String> {
    let said = streams::fed_within(&mut streams::command(args)?, input.as_bytes(), Duration::from_secs(300))?;
    ensure!(said.code == Some(0), "streams {}: {said:?}", args.join(" "));
    Ok(said.out)
}

fn poured() -> usize {
    POURED * 65536
}

fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

/// A number of a line, with or without a word before them.
fn field(line: &str, number: usize) -> Result<f64> {
    let numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
    numbers.into_iter().nth(number).with_context(|| format!("no number {number} in {line:?}"))
}

async fn print(peers: &mut [Peer], options: &Options) -> Result<()> {
    for peer in peers.iter() {
        let version = peer.client.version().await?;
        println!(
            "- {}: {} {}, {}",
            peer.name,
            version.runtime_name,
            version.runtime_version,
            peer.socket.display()
        );
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("- {cores} cores, Linux {}, {} rounds, {} pods\n", kernel.trim(), options.rounds, options.pods);
    let names: Vec<String> = peers.iter().map(|peer| peer.name.clone()).collect();
    let against = names.iter().skip(1).map(|name| format!("better than {name}"));
    let head: Vec<String> = names.iter().cloned().chain(against).collect();
    println!("| median (95th percentile) | {} |", head.join(" | "));
    println!("|---{}|", "|---".repeat(head.len()));
    for (row, unit, more) in ROWS {
        let mut cells = Vec::new();
        let mut medians = Vec::new();
        for peer in peers.iter_mut() {
            let Some(figures) = peer.figures.get_mut(row) else { continue };
            figures.sort_by(f64::total_cmp);
            let (median, high) = (at(figures, 0.5), at(figures, 0.95));
            let spread = if figures.len() > 3 { format!(" ({high:.2})") } else { String::new() };
            cells.push(format!("{median:.2} {unit}{spread}"));
            medians.push(median);
        }
        let Some((ours, others)) = medians.split_first() else { continue };
        cells.extend(
            others.iter().map(|other| format!("{:.1} x", if *more { ours / other } else { other / ours })),
        );
        println!("| {row} | {} |", cells.join(" | "));
    }
    Ok(())
}

/// The figure below which a part of all is.
pub fn at(sorted: &[f64], part: f64) -> f64 {
    let index = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// Proportional set size in MiB, 0 for a process that is gone.
fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: f64 =
        line.and_then(|l| l.trim().split(' ').next()).and_then(|n| n.parse().ok()).unwrap_or_default();
    kib / 1024.0
}

/// Seconds of CPU that a process and the children it waited for have used (proc_pid_stat(5), fields 14 to 17).
fn cpu(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = text.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    // USER_HZ is 100 on every architecture that Linux runs containers on.
    ticks as f64 / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let sorted: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!((at(&sorted, 0.5), at(&sorted, 0.95)), (10.0, 19.0));
        assert_eq!(at(&[7.0], 0.95), 7.0);
        assert!(at(&[], 0.5).is_nan());
    }

    #[test]
    fn our_own_memory_and_time_can_be_read() {
        assert!(pss(std::process::id()) > 0.1);
        assert!(cpu(1) >= 0.0);
    }
}
