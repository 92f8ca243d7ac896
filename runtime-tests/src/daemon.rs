//! crispd in a private place: own directories, own socket, own bridge, registries replaced by a local one. Whatever
//! becomes of the test, nothing of it stays behind.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::traces::{self, Marks};
use crate::{build, place, registry, run};

/// Where the pods of an instance get their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// The bridge that is built in.
    Bridge,
    /// CNI plugins (bridge, host-local, portmap) in a directory.
    Cni(PathBuf),
}

/// What differs between instances.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bridge or CNI.
    pub network: Network,
    /// The registry that stands in for all hosts of the test images.
    pub registry: Option<SocketAddr>,
    /// More lines of the table `images`.
    pub images: String,
    /// Level of the log.
    pub debug: &'static str,
    /// More lines of config.toml: whole tables that are not written otherwise.
    pub extra: String,
}

impl Options {
    /// The built-in bridge and a registry.
    pub fn new(registry: SocketAddr) -> Options {
        Options {
            network: Network::Bridge,
            registry: Some(registry),
            images: String::new(),
            debug: "debug",
            extra: String::new(),
        }
    }
}

/// An instance of crispd.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    program: PathBuf,
    marks: Marks,
    bridge: String,
    // Last: the directory goes when everything that used it is gone.
    dir: tempfile::TempDir,
}

impl Daemon {
    /// Starts an instance with the built-in bridge, its images coming from a registry.
    pub fn start(registry: SocketAddr) -> Result<Daemon> {
        Daemon::start_with(&Options::new(registry))
    }

    /// Starts an instance.
    pub fn start_with(options: &Options) -> Result<Daemon> {
        let programs = build::programs()?;
        let dir = place::scratch("cr-")?;
        let (bridge, subnet) = network_names()?;
        let mut marks = Marks { dir: dir.path().to_owned(), names: BTreeSet::new() };
        marks.note(&bridge);
        if let Some(registry) = options.registry {
            registry::mirrors(&dir.path().join("certs.d"), registry)?;
        }
        std::fs::create_dir_all(dir.path().join("logs"))?;
        let network = match &options.network {
            Network::Bridge => {
                format!(
                    "plugin = \"bridge\"\n[network.bridge]\nname = \"{bridge}\"\nsubnets = [\"{subnet}\"]\n"
                )
            }
            Network::Cni(plugins) => {
                cni(&dir.path().join("net.d"), &dir.path().join("ipam"), &bridge, &subnet)?;
                format!(
                    "plugin = \"cni\"\n[network.cni]\nbin_dirs = [\"{}\"]\nconf_dir = \"{}\"\n",
                    plugins.display(),
                    dir.path().join("net.d").display()
                )
            }
        };
        let at = dir.path().display();
        let config = format!(
            "version = 1\nimports = []\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\n\
             [grpc]\naddress = \"{at}/crispd.sock\"\n\n\
             [images]\nconfig_path = [\"{at}/certs.d\"]\nproxy = \"\"\n{}\n\n\
             [runtimes.crisp]\nruntime_path = \"{}\"\n\n\
             [debug]\nlevel = \"{}\"\n\n\
             [network]\n{network}\n{}",
            options.images,
            programs.shim.display(),
            options.debug,
            options.extra
        );
        std::fs::write(dir.path().join("config.toml"), config)?;
        let mut daemon = Daemon { child: None, program: programs.daemon, marks, bridge, dir };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts the program again on the same state; returns when it answers.
    pub fn restart(&mut self) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let child = Command::new(&self.program)
            .arg("--config")
            .arg(self.dir.path().join("config.toml"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        let socket = self.socket();
        let child = self.child.as_mut();
        let up = child.context("no child").and_then(|child| {
            run::until("crispd answers", Duration::from_secs(20), || {
                if let Some(status) = child.try_wait()? {
                    return Ok(Some(Err(anyhow::anyhow!("crispd ended at once: {}", run::how(status)))));
                }
                Ok(answers(&socket).then_some(Ok(())))
            })?
        });
        up.with_context(|| self.tail())
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("crispd.sock")
    }

    /// The private directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The state directory: pods' run directories are below it.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The name of the bridge, whoever makes it.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// A directory for the logs of one pod.
    pub fn logs(&self, pod: &str) -> Result<PathBuf> {
        let dir = self.dir.path().join("logs").join(pod);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// The daemon's process id; 0 when it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Whether the process that was started last still runs.
    pub fn running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The process of a pod's shim, by its record.
    pub fn shim(&self, pod: &str) -> Result<u32> {
        let record = self.state().join("p").join(pod).join(shim_api::rundir::SHIM);
        let bytes = std::fs::read(&record).with_context(|| format!("read {}", record.display()))?;
        let shim: shim_api::rundir::Shim = shim_api::rundir::decode(&bytes)?;
        Ok(shim.process.pid)
    }

    /// A client of this instance.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.socket()).await
    }

    /// kill -9, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and waits for the end; an error when it does not come or is no success.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        match run::wait(&mut child, Duration::from_secs(15))? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("crispd: {}", run::how(status)),
            None => bail!("crispd does not end on SIGTERM"),
        }
    }

    /// Everything there is of this instance beside the daemon itself: see `traces`. Files of root and state included,
    /// without the database, whose auxiliary files come and go.
    pub fn traces(&mut self) -> BTreeSet<String> {
        self.learn();
        let mut found = self.marks.traces(&[self.pid()]);
        for dir in ["root", "state", "ipam"] {
            let files = traces::files(&self.dir.path().join(dir));
            found
                .extend(files.into_iter().filter(|f| !f.contains("crisp.db")).map(|f| format!("{dir}: {f}")));
        }
        found
    }

    /// The end of the log, for a message.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("end of crispd's log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
    }

    /// The whole log.
    pub fn log(&self) -> PathBuf {
        self.dir.path().join("crispd.log")
    }

    /// Takes note of the pods and containers that have a directory now.
    fn learn(&mut self) {
        for pod in names(&self.state().join("p")) {
            for container in names(&self.state().join("p").join(&pod).join("c")) {
                self.marks.note(&container);
            }
            self.marks.note(&pod);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
        self.learn();
        if self.running() {
            // The orderly way first: only CNI plugins know how to undo what they did.
            let socket = self.socket();
            std::thread::spawn(move || clear(&socket)).join().ok();
        }
        self.kill().ok();
        self.marks.wipe();
    }
}

/// Whether a whole call is answered. A connection alone proves nothing: a child that the daemon left between fork and
/// exec when it was killed keeps the old socket listening for a moment.
fn answers(socket: &Path) -> bool {
    if UnixStream::connect(socket).is_err() {
        return false;
    }
    let socket = socket.to_owned();
    let ask = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let version = async { Client::connect(&socket).await.ok()?.version().await.ok() };
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(2), version).await.ok()? })
    };
    std::thread::spawn(ask).join().is_ok_and(|reply| reply.is_some())
}

/// Removes all pods of a socket, for at most 20 s.
pub fn clear(socket: &Path) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let work = async {
        let client = Client::connect(socket).await?;
        client.remove_all_pods().await
    };
    // What does not go this way is removed by force afterwards.
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), work).await.ok() });
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// A bridge name and a subnet that no other instance has, most likely.
pub fn network_names() -> Result<(String, String)> {
    let id = place::scratch("crisp-id-")?;
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in id.path().to_string_lossy().bytes().chain(std::process::id().to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let (second, third) = (100 + (hash >> 8) % 150, (hash >> 24) % 256);
    Ok((format!("crt{:08x}", hash as u32), format!("10.{second}.{third}.0/24")))
}

/// A CNI configuration of bridge, host-local and portmap.
pub fn cni(dir: &Path, ipam: &Path, bridge: &str, subnet: &str) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let list = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": bridge,
        "plugins": [
            {
                "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": ipam,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    Ok(std::fs::write(dir.join("10-crisp.conflist"), serde_json::to_vec_pretty(&list)?)?)
}
