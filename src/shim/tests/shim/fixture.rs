//! A shim with its run directory, a client, and containers made from busybox. Dropping it leaves nothing.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::symlink, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shim_api::{
    containerd::{
        api::{KillRequest, WaitRequest},
        sandbox_api::{
            CreateSandboxRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
        },
        sandbox_async::SandboxClient,
        shim_async::TaskClient,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
    rundir,
    shim::{ContainerOptions, PodOptions, RunExecRequest, RunExecResponse, RunRequest},
    shim_ttrpc::PodClient,
    ttrpc::{self, r#async::Client, context, context::Context},
};

/// Runs a test's future; each has its own event loop.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), test).await.unwrap() });
}

/// A deadline for one call.
pub(crate) fn soon() -> Context {
    context::with_timeout(60_000_000_000)
}

pub(crate) fn program() -> PathBuf {
    std::env::var_os("CRISP_SHIM")
        .map_or_else(|| env!("CARGO_BIN_EXE_containerd-shim-crisp-v1").into(), PathBuf::from)
}

/// Waits for a condition, within a bound.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < end, "{what} did not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A root directory with busybox and what it is linked to, shared by all tests and kept in the target directory.
pub(crate) fn rootfs() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("busybox");
        if made.exists() {
            return made;
        }
        let root = made.with_extension(std::process::id().to_string());
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let linked = Command::new("ldd").arg("/bin/busybox").output().unwrap();
        let linked = String::from_utf8(linked.stdout).unwrap();
        for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
            let to = root.join(&library[1..]);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(library, to).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        let applets = Command::new("/bin/busybox").arg("--list").output().unwrap();
        for applet in String::from_utf8(applets.stdout).unwrap().lines() {
            let _ = symlink("busybox", root.join("bin").join(applet));
        }
        let line = "012345678901234567890123456789012345678901234567890123456789012\n";
        fs::write(root.join("flood"), line.repeat((16 << 20) / 64)).unwrap();
        // Whoever is second at this takes the first one's.
        if fs::rename(&root, &made).is_err() {
            fs::remove_dir_all(&root).unwrap();
        }
        made
    })
}

pub(crate) struct Shim {
    pub(crate) child: Child,
    pub(crate) id: String,
    pub(crate) state: tempfile::TempDir,
    pub(crate) cgroup: String,
    pub(crate) task: TaskClient,
    pub(crate) sandbox: SandboxClient,
    pub(crate) pod: PodClient,
}

/// What differs from the usual container.
#[derive(Default)]
pub(crate) struct Made {
    pub(crate) options: ContainerOptions,
    /// Merged over the usual config.json.
    pub(crate) spec: Value,
}

impl Shim {
    /// A shim that serves an empty pod.
    pub(crate) async fn spawn() -> Shim {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("{:x}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let state = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(state.path().join(rundir::SOCKET)).unwrap();
        let log = fs::File::create(state.path().join(rundir::LOG)).unwrap();
        // The shell moves the socket to the descriptor where the shim looks for it.
        let child = Command::new("/bin/sh")
            .args(["-c", "exec \"$@\" 3<&0 0</dev/null", "sh"])
            .arg(program())
            .args(["-namespace", "k8s.io", "-id", &id, "serve"])
            .current_dir(state.path())
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let client = connect(state.path()).await;
        Shim {
            cgroup: format!("/crisp-shim-test-{id}"),
            child,
            id,
            state,
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client.clone()),
            pod: PodClient::new(client),
        }
    }

    /// A shim with a pod.
    pub(crate) async fn pod(options: PodOptions) -> Shim {
        let shim = Shim::spawn().await;
        shim.create(options, "").await.unwrap();
        shim
    }

    /// A shim with the pod that most tests want.
    pub(crate) async fn usual() -> Shim {
        Shim::pod(PodOptions {
            hostname: "pod".into(),
            new_ipc: true,
            new_uts: true,
            shm_size: 64 << 20,
            ..PodOptions::default()
        })
        .await
    }

    pub(crate) async fn create(&self, mut options: PodOptions, netns: &str) -> ttrpc::Result<()> {
        options.own_cgroup_parent.clone_from(&self.cgroup);
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.state.path().display().to_string(),
            netns_path: netns.into(),
            options: MessageField::some(any("crisp.shim.v1.PodOptions", &options)),
            ..CreateSandboxRequest::default()
        };
        self.sandbox.create_sandbox(soon(), &request).await?;
        let request = StartSandboxRequest { sandbox_id: self.id.clone(), ..StartSandboxRequest::default() };
        self.sandbox.start_sandbox(soon(), &request).await.map(drop)
    }

    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.state.path().join(rundir::CONTAINERS).join(id)
    }

    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.state.path().join("logs").join(format!("{id}.log"))
    }

    /// The records of a container's log: stream, tag, content.
    pub(crate) fn records(&self, id: &str) -> Vec<(String, char, Vec<u8>)> {
        records(&fs::read(self.log(id)).unwrap())
    }

    /// What a container printed, as text.
    pub(crate) fn printed(&self, id: &str) -> String {
        let records = self.records(id).into_iter();
        records.map(|(_, _, content)| String::from_utf8_lossy(&content).into_owned() + "\n").collect()
    }

    /// Writes a bundle; its container logs to `log(id)`.
    pub(crate) fn bundle_with(&self, id: &str, args: &[&str], made: Made) -> RunRequest {
        let bundle = self.bundle(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::create_dir_all(self.state.path().join("logs")).unwrap();
        let mut spec = spec(args);
        spec["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.cgroup));
        merge(&mut spec, made.spec);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        let options = ContainerOptions {
            log_directory: self.state.path().join("logs").display().to_string(),
            log_path: format!("{id}.log"),
            ..made.options
        };
        RunRequest {
            container_id: id.into(),
            bundle: bundle.display().to_string(),
            options: MessageField::some(options),
            ..RunRequest::default()
        }
    }

    pub(crate) async fn try_run(&self, id: &str, args: &[&str], made: Made) -> ttrpc::Result<u32> {
        let request = self.bundle_with(id, args, made);
        self.pod.run(soon(), &request).await.map(|response| response.pid)
    }

    pub(crate) async fn run(&self, id: &str, args: &[&str]) -> u32 {
        self.try_run(id, args, Made::default()).await.unwrap()
    }

    /// Runs a shell script in a container.
    pub(crate) async fn sh(&self, id: &str, script: &str) -> u32 {
        self.run(id, &["sh", "-c", script]).await
    }

    pub(crate) async fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest { id: id.into(), ..WaitRequest::default() };
        self.task.wait(soon(), &request).await.unwrap().exit_status
    }

    pub(crate) async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest { id: id.into(), signal, ..KillRequest::default() };
        self.task.kill(soon(), &request).await.map(drop)
    }

    pub(crate) async fn exec(&self, id: &str, args: &[&str], stdout: &str) -> ttrpc::Result<RunExecResponse> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let request = RunExecRequest {
            container_id: id.into(),
            exec_id: format!("e{}", COUNT.fetch_add(1, Ordering::Relaxed)),
            process: serde_json::to_vec(&process(args)).unwrap(),
            stdout: stdout.into(),
            ..RunExecRequest::default()
        };
        self.pod.run_exec(soon(), &request).await
    }

    pub(crate) fn exit(&self, id: &str) -> rundir::Exit {
        rundir::decode(&fs::read(self.bundle(id).join(rundir::EXIT)).unwrap()).unwrap()
    }

    /// A value of the shim's `/proc/<pid>/status`.
    pub(crate) fn status(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name} in {status}")).trim().to_owned()
    }

    /// Seconds that the shim has computed, in user mode and in the kernel.
    pub(crate) fn cpu(&self) -> [f64; 2] {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        [11, 12].map(|i| fields[i].parse::<f64>().unwrap() / 100.0)
    }

    pub(crate) async fn stop(&self) -> ttrpc::Result<()> {
        let request = StopSandboxRequest { sandbox_id: self.id.clone(), ..StopSandboxRequest::default() };
        self.sandbox.stop_sandbox(soon(), &request).await.map(drop)
    }

    /// Ends the pod and its shim in order.
    pub(crate) async fn shutdown(&mut self) {
        let request =
            ShutdownSandboxRequest { sandbox_id: self.id.clone(), ..ShutdownSandboxRequest::default() };
        self.sandbox.shutdown_sandbox(soon(), &request).await.unwrap();
        let child = &mut self.child;
        until("the end of the shim", || child.try_wait().unwrap().is_some()).await;
        assert!(child.wait().unwrap().success());
    }

    /// Directories of the pod's cgroups that are left.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let trees = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|tree| tree.path());
        let roots = trees.chain([PathBuf::from("/sys/fs/cgroup")]);
        roots.map(|root| root.join(&self.cgroup[1..])).filter(|dir| dir.exists()).collect()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let delete = Command::new(program())
            .args(["-namespace", "k8s.io", "-id", &self.id, "-bundle"])
            .arg(self.state.path())
            .arg("delete")
            .output()
            .unwrap();
        for dir in self.cgroups() {
            let _ = fs::remove_dir(dir);
        }
        if !std::thread::panicking() {
            assert!(delete.status.success(), "{delete:?}");
            assert_eq!(self.cgroups(), Vec::<PathBuf>::new());
        } else {
            eprintln!("{}", fs::read_to_string(self.state.path().join(rundir::LOG)).unwrap_or_default());
        }
    }
}

pub(crate) async fn connect(dir: &Path) -> Client {
    Client::connect(&format!("unix://{}", dir.join(rundir::SOCKET).display())).await.unwrap()
}

pub(crate) fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: name.into(), value: message.write_to_bytes().unwrap(), ..Any::default() }
}

pub(crate) fn records(log: &[u8]) -> Vec<(String, char, Vec<u8>)> {
    log.split_inclusive(|b| *b == b'\n')
        .map(|line| {
            let line = line.strip_suffix(b"\n").unwrap_or_else(|| panic!("torn: {line:?}"));
            assert_eq!((line[10], line[29], line[30], line[37], line[39]), (b'T', b'Z', b' ', b' ', b' '));
            let stream = String::from_utf8(line[31..37].to_vec()).unwrap();
            (stream, char::from(line[38]), line[40..].to_vec())
        })
        .collect()
}

pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "user": { "uid": 0, "gid": 0 },
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL", "CAP_CHOWN"],
            "permitted": ["CAP_KILL", "CAP_CHOWN"],
        },
    })
}

fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": { "path": rootfs(), "readonly": false },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmp" },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "network" }, { "type": "cgroup" },
            ],
        },
    })
}

/// The objects of the second over those of the first.
fn merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                merge(to.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (to, from) => *to = from,
    }
}
