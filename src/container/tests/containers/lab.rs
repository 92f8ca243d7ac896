//! A small root file system, a specification to start from, and containers that clean up after themselves.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use container::cgroup::{Cgroup, Host};
use container::spec::{self, Spec};
use container::{Created, Error, Join, Pending, Request, Rootfs, Stdio, create, exec, rootfs};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// Longer than anything here takes, shorter than anybody waits.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn soon() -> Instant {
    Instant::now() + LIMIT
}

/// What all tests share: the image and a parent cgroup.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
    pub(crate) host: Host,
    parent: String,
    next: Cell<u32>,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        // Children of children come to us, as they come to a shim.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let dir = tempfile::Builder::new().prefix("crisp-container-").tempdir().unwrap();
        make_image(&dir.path().join("image"));
        let parent = format!("crisp-container-test-{}", std::process::id());
        let host = Host::detect().unwrap();
        Lab { dir, host, parent, next: Cell::new(0) }
    }

    /// A new empty directory.
    pub(crate) fn directory(&self) -> PathBuf {
        let path = self.dir.path().join(format!("d{}", self.number()));
        fs::create_dir(&path).unwrap();
        path
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn number(&self) -> u32 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    /// A container of the shared image, as a kubelet would ask for it.
    pub(crate) fn container(&self, args: &[&str]) -> Container<'_> {
        let id = format!("c{}", self.number());
        let bundle = self.directory();
        for name in ["fs", "work"] {
            fs::create_dir(bundle.join(name)).unwrap();
        }
        let mut spec = Spec::from_json(SPEC.as_bytes()).unwrap();
        spec.linux.cgroups_path = format!("/{}/{id}", self.parent);
        spec.process.as_mut().unwrap().args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let rootfs = Rootfs::Mounts(vec![rootfs::Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={}", self.image().display()),
                format!("upperdir={}/fs", bundle.display()),
                format!("workdir={}/work", bundle.display()),
            ],
        }]);
        Container {
            lab: self,
            id,
            bundle,
            spec,
            rootfs,
            join: Join::default(),
            trees: Vec::new(),
            host: self.host.clone(),
        }
    }

    /// A shell command in a container.
    pub(crate) fn sh(&self, script: &str) -> Container<'_> {
        self.container(&["/bin/sh", "-c", script])
    }

    /// Ends what a failed test left.
    pub(crate) fn reap_strays(&self) {
        if let Ok(all) = Cgroup::open(&self.host, &self.parent) {
            let _ = all.kill();
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(Some(_)) => {}
                Err(_) => break,
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Whether this process may raise hard limits and lower OOM scores.
    pub(crate) fn has_sys_resource(&self) -> bool {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap() & 1 << 24 != 0
    }

    #[track_caller]
    pub(crate) fn assert_no_children(&self) {
        let child = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        assert!(child.is_err(), "a child is left: {child:?}");
    }

    /// The host's mounts that have to do with us.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let ours = self.dir.path().to_str().unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(ours)).map(str::to_owned).collect()
    }

    /// What is still there: mounts, cgroups, children.
    pub(crate) fn close(self) -> Vec<String> {
        let mut left = Vec::new();
        left.extend(self.mounts().into_iter().map(|mount| format!("mount {mount}")));
        if waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG).is_ok() {
            left.push("a child".to_owned());
        }
        let all = Cgroup::open(&self.host, &self.parent).unwrap();
        for (tree, children) in
            self.host.trees().iter().map(|tree| (&tree.name, tree.mount.join(&self.parent)))
        {
            for entry in fs::read_dir(children).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    left.push(format!("cgroup {tree}: {:?}", entry.file_name()));
                }
            }
        }
        all.remove(Duration::from_secs(2)).unwrap();
        left
    }
}

/// A container to be.
pub(crate) struct Container<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) spec: Spec,
    pub(crate) rootfs: Rootfs,
    pub(crate) join: Join<'a>,
    pub(crate) trees: Vec<(PathBuf, OwnedFd)>,
    pub(crate) host: Host,
}

impl<'a> Container<'a> {
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Spec)) -> Self {
        change(&mut self.spec);
        self
    }

    pub(crate) fn process(self, change: impl FnOnce(&mut spec::Process)) -> Self {
        self.with(|spec| change(spec.process.as_mut().unwrap()))
    }

    /// The upper layer: what the container's root differs in.
    pub(crate) fn upper(&self) -> PathBuf {
        self.bundle.join("fs")
    }

    /// Clones its first process; also says its id and specification.
    pub(crate) fn begin(self, stdio: Stdio) -> Result<(Pending, String, Spec), Error> {
        let Container { id, bundle, spec, rootfs, join, trees, host, .. } = self;
        let request =
            Request { id: &id, spec: &spec, bundle: &bundle, rootfs, join, trees, stdio, cgroups: &host };
        Ok((create(request)?, id, spec))
    }

    pub(crate) fn create(self, stdio: Stdio) -> Result<(Running<'a>, Created), Error> {
        let lab = self.lab;
        let (pending, id, spec) = self.begin(stdio)?;
        let created = pending.finish(soon())?;
        let pidfd = rustix::io::dup(&created.pidfd).unwrap();
        let running = Running { lab, id, spec, pid: created.pid, pidfd };
        Ok((running, created))
    }

    /// Starts it and keeps it running, with its output going nowhere.
    pub(crate) fn start(self) -> Result<(Running<'a>, Created), Error> {
        let (running, mut created) = self.create(Stdio::null())?;
        created.start()?.finish(soon())?;
        Ok((running, created))
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Result<Output, Error> {
        let (ours, stdio) = pipes();
        let (running, mut created) = self.create(stdio)?;
        created.start()?.finish(soon())?;
        drop(created);
        Ok(running.output(ours))
    }

    /// Runs it to its end and expects that to be a good one.
    #[track_caller]
    pub(crate) fn says(self) -> String {
        let output = self.run().unwrap();
        assert_eq!(output.code, 0, "{output:?}");
        output.stdout.trim_end().to_owned()
    }
}

/// A container that runs, or waits to be started. Dropping it removes it.
pub(crate) struct Running<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) id: String,
    pub(crate) spec: Spec,
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
}

impl Running<'_> {
    pub(crate) fn cgroup(&self) -> Cgroup {
        Cgroup::open(&self.lab.host, &self.spec.linux.cgroups_path).unwrap()
    }

    /// A process like the first one, with other arguments.
    pub(crate) fn like_init(&self, args: &[&str]) -> spec::Process {
        let mut process = self.spec.process.clone().unwrap();
        process.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        process
    }

    /// One more process in it, which is ended and reaped when the value is dropped: a pid namespace does not end
    /// before its last process is reaped, those of other parents included.
    pub(crate) fn spawn(&self, process: &spec::Process, stdio: Stdio) -> Result<Spawned, Error> {
        let cgroup = self.cgroup();
        let request = exec::Request {
            init: self.pidfd.as_fd(),
            init_pid: self.pid,
            spec: &self.spec,
            process,
            cgroup: &cgroup,
            stdio,
        };
        exec::spawn(request)?.finish(soon()).map(Spawned)
    }

    /// Runs a process in it to its end.
    pub(crate) fn exec(&self, process: &spec::Process) -> Result<Output, Error> {
        let (ours, stdio) = pipes();
        let running = self.spawn(process, stdio)?;
        Ok(collect(ours, running.pidfd.as_fd()))
    }

    #[track_caller]
    pub(crate) fn exec_says(&self, script: &str) -> String {
        let output = self.exec(&self.like_init(&["/bin/sh", "-c", script])).unwrap();
        assert_eq!(output.code, 0, "{output:?}");
        output.stdout.trim_end().to_owned()
    }

    /// Waits until a command succeeds in it.
    #[track_caller]
    pub(crate) fn wait_for(&self, script: &str) {
        let deadline = soon();
        while self.exec(&self.like_init(&["/bin/sh", "-c", script])).unwrap().code != 0 {
            assert!(Instant::now() < deadline, "never true: {script}");
        }
    }

    fn output(self, pipes: [OwnedFd; 2]) -> Output {
        collect(pipes, self.pidfd.as_fd())
    }

    /// A file of the first process below the host's `/proc`.
    pub(crate) fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid)).unwrap()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let cgroup = self.cgroup();
        let _ = cgroup.kill();
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        let _ = wait(self.pidfd.as_fd());
        if let Err(error) = cgroup.remove(Duration::from_secs(5)) {
            println!("{}: {error}", self.id);
        }
    }
}

/// A directory of the host's that is a shared mount. Goes away with all that was mounted below it.
pub(crate) struct Shared {
    pub(crate) path: PathBuf,
}

impl Shared {
    pub(crate) fn new(lab: &Lab) -> Shared {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        let path = lab.directory();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        let shared = Shared { path };
        mount_change(&shared.path, MountPropagationFlags::SHARED).unwrap();
        shared
    }

    pub(crate) fn mount_below(&self, name: &str) {
        let path = self.path.join(name);
        fs::create_dir(&path).unwrap();
        rustix::mount::mount("tmpfs", &path, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A process in a container.
pub(crate) struct Spawned(exec::Running);

impl std::ops::Deref for Spawned {
    type Target = exec::Running;

    fn deref(&self) -> &exec::Running {
        &self.0
    }
}

impl std::ops::DerefMut for Spawned {
    fn deref_mut(&mut self) -> &mut exec::Running {
        &mut self.0
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.0.pidfd, rustix::process::Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.0.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

/// What a process said, and how it ended: its exit code, or 128 plus the signal.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: i32,
}

/// Our ends of stdout and stderr, and the process's streams.
pub(crate) fn pipes() -> ([OwnedFd; 2], Stdio) {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((out, stdout), (err, stderr)) = (pipe(), pipe());
    ([out, err], Stdio::Fds { stdin: None, stdout: Some(stdout), stderr: Some(stderr) })
}

fn collect([out, err]: [OwnedFd; 2], pidfd: BorrowedFd<'_>) -> Output {
    let deadline = soon();
    let stdout = read(out, deadline);
    let stderr = read(err, deadline);
    Output { stdout, stderr, code: wait(pidfd).unwrap() }
}

/// All of a stream, up to its end.
pub(crate) fn read(fd: OwnedFd, deadline: Instant) -> String {
    let mut file = File::from(fd);
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        readable(file.as_fd(), deadline);
        match file.read(&mut chunk) {
            // A terminal answers with an error when its other side is closed.
            Ok(0) | Err(_) => return String::from_utf8_lossy(&bytes).into_owned(),
            Ok(length) => bytes.extend(&chunk[..length]),
        }
    }
}

#[track_caller]
pub(crate) fn readable(fd: BorrowedFd<'_>, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)), Ok(1), "nothing came in time");
}

/// Reaps a child.
pub(crate) fn wait(pidfd: BorrowedFd<'_>) -> Option<i32> {
    readable(pidfd, soon());
    let status = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED).ok()??;
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

/// busybox, its libraries, and its names.
fn make_image(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/user", "usr/bin"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let listed = Command::new("ldd").arg("/bin/busybox").output().unwrap();
    let libraries = String::from_utf8(listed.stdout).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain(["/bin/busybox"]) {
        let to = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    let names = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for name in String::from_utf8(names.stdout).unwrap().lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
    fs::write(root.join("bin/script"), "#!/no/such/interpreter\n").unwrap();
    fs::write(root.join("bin/garbage"), "\u{1}\u{2}\u{3} no program").unwrap();
    fs::write(root.join("bin/plain"), "no program either").unwrap();
    for (name, mode) in [("script", 0o755), ("garbage", 0o755), ("plain", 0o644)] {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(root.join("bin").join(name), permissions).unwrap();
    }
}

const SPEC: &str = r#"{
  "ociVersion": "1.2.0",
  "process": {
    "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": [],
    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    "noNewPrivileges": true,
    "capabilities": {
      "bounding": ["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"],
      "effective": ["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"],
      "permitted": ["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]
    }
  },
  "root": {"path": "rootfs"},
  "hostname": "box",
  "mounts": [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid","noexec","nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid","strictatime","mode=755","size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid","noexec","nodev"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid","noexec","nodev","mode=1777","size=65536k"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid","noexec","nodev","ro"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid","noexec","nodev","relatime","ro"]}
  ],
  "linux": {
    "namespaces": [{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"},{"type":"cgroup"}],
    "maskedPaths": ["/proc/acpi","/proc/asound","/proc/kcore","/proc/keys","/proc/latency_stats","/proc/timer_list","/proc/timer_stats","/proc/sched_debug","/sys/firmware","/proc/scsi"],
    "readonlyPaths": ["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"],
    "resources": {"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 7, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 8, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm"}, {"allow": true, "type": "c", "major": 5, "minor": 0, "access": "rwm"}, {"allow": true, "type": "c", "major": 5, "minor": 2, "access": "rwm"}, {"allow": true, "type": "c", "major": 136, "access": "rwm"}]}
  }
}"#;
