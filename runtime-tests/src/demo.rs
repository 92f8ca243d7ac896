//! Shows crisp at work: one daemon in a private place with the built-in bridge, one pod of two containers that talk
//! over localhost, an exec, logs. Needs Rust and a Debian busybox, nothing else.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::{Client, container, pod};
use crate::daemon::{Daemon, Network, Options};
use crate::image::{Packing, Process, Store, debian};
use crate::{build, place, run, setup};

const IMAGE: &str = "crisp.demo/shell:1";

/// Runs the demonstration; leaves nothing behind.
pub fn run() -> Result<()> {
    let mut clock = Clock(Instant::now());
    setup::for_demo()?;
    clock.step("made the machine ready");
    build::programs()?;
    clock.step("built crispd and its shim");

    let dir = place::scratch("demo-")?;
    let layout = dir.path().join("layout");
    make_image(&dir.path().join("store"), &layout)?;
    clock.step(&format!("made the image {IMAGE}"));

    let daemon = Daemon::start_with(&Options {
        network: Network::Bridge,
        registry: None,
        images: format!("import_dirs = [\"{}\"]", layout.display()),
        debug: "info",
        extra: String::new(),
    })?;
    clock.step(&format!("started crispd; socket {}", daemon.socket().display()));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { pod_of_two(&daemon, &mut clock).await }).with_context(|| daemon.tail())?;
    drop(daemon);
    clock.step("cleaned up");
    println!("\nDone. `make test` runs everything, `make bench` measures it.");
    Ok(())
}

async fn pod_of_two(daemon: &Daemon, clock: &mut Clock) -> Result<()> {
    let client = Client::connect(&daemon.socket()).await?;
    imported(&client).await?;
    clock.step("crispd has imported the image");
    let mut config = pod("demo");
    config.log_directory = daemon.logs("demo")?.display().to_string();
    let id = client.run_pod(&config).await?;
    let status = client.pod_status(&id).await?;
    let address = status.network.map(|network| network.ip).unwrap_or_default();
    ensure!(!address.is_empty(), "the pod has no address");
    clock.step(&format!("ran pod {}, address {address}", &id[..12]));

    let server = "echo hello from the server > /tmp/index.html; exec httpd -f -p 8080 -h /tmp";
    let server = client.run(&id, &container("server", IMAGE, server), &config).await?;
    clock.step(&format!("ran container {}, a web server", &server[..12]));
    let reader = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.05; done; exec sleep 1000";
    let reader = client.run(&id, &container("reader", IMAGE, reader), &config).await?;
    clock.step(&format!("ran container {}, which reads from it over localhost", &reader[..12]));

    let said = client.sh(&server, "echo $(hostname) has $(ls /proc | grep -c '^[0-9]*$') processes").await?;
    clock.step(&format!("executed a command: {said:?}"));

    let log = Path::new(&config.log_directory).join("reader.log");
    let line = run::until("the reader has logged", Duration::from_secs(10), || {
        Ok(std::fs::read_to_string(&log)?.lines().next().map(str::to_owned))
    })?;
    clock.step(&format!("read the log: {line:?}"));

    for container in [&server, &reader] {
        client.stop(container, 0).await?;
        client.remove(container).await?;
    }
    client.stop_pod(&id).await?;
    client.remove_pod(&id).await?;
    clock.step("stopped and removed containers and pod");
    Ok(())
}

/// The import goes on beside the serving.
async fn imported(client: &Client) -> Result<()> {
    for _ in 0..2000 {
        if client.image_status(IMAGE).await?.is_some() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    anyhow::bail!("{IMAGE} was not imported")
}

fn make_image(store: &Path, layout: &Path) -> Result<()> {
    let mut store = Store::create(store)?;
    let layer = store.layer(&debian::busybox()?, Packing::OciZstd)?;
    let process = Process { cmd: vec!["sh".to_owned()], ..Process::default() };
    store.image(&[IMAGE], &[layer], &process, Packing::OciZstd)?;
    store.layout(IMAGE, layout)
}

struct Clock(Instant);

impl Clock {
    fn step(&mut self, what: &str) {
        println!("{:>9.1} ms  {what}", self.0.elapsed().as_secs_f64() * 1e3);
        self.0 = Instant::now();
    }
}
