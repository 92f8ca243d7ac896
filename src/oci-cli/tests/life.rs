//! The lives of containers, through the command line, on this kernel. The root file system is made of the host's
//! programs, bound read-only.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{IoSliceMut, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A state directory and a bundle of our own. All containers in it end with it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(args: &[&str]) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(place.bundle().join("rootfs")).unwrap();
        place.configure(args, |_| {});
        place
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    fn state_of(&self, id: &str) -> PathBuf {
        self.dir.path().join("state").join(id)
    }

    fn configure(&self, args: &[&str], change: impl FnOnce(&mut Value)) {
        let name = self.dir.path().file_name().unwrap().to_string_lossy().into_owned();
        let bound = ["/bin", "/lib", "/lib64", "/usr"].map(
            |path| json!({ "destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"] }),
        );
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }),
            json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] }),
        ];
        mounts.extend(bound);
        let mut config = json!({
            "ociVersion": "1.2.0",
            "process": {
                "args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": { "uid": 0, "gid": 0 },
            },
            "root": { "path": "rootfs" },
            "mounts": mounts,
            "annotations": { "a": "b" },
            "linux": {
                "cgroupsPath": format!("/crisp-oci-test{name}/c"),
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network" },
                ],
            },
        });
        change(&mut config);
        fs::write(self.bundle().join("config.json"), config.to_string()).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crisp-oci"));
        command.arg("--root").arg(self.dir.path().join("state")).args(args).current_dir(self.bundle());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// The same without a pipe of ours in the container's hands.
    fn quiet(&self, args: &[&str]) -> bool {
        let mut command = self.command(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    }

    fn state(&self, id: &str) -> Value {
        let output = self.call(&["state", id]);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn status(&self, id: &str) -> String {
        self.state(id)["status"].as_str().unwrap().to_owned()
    }

    fn until(&self, id: &str, status: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.status(id) != status {
            assert!(Instant::now() < end, "{id} did not become {status}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let left = self.call(&["list", "--quiet"]);
        for id in String::from_utf8_lossy(&left.stdout).lines() {
            self.call(&["delete", "--force", id]);
        }
        let name = format!("crisp-oci-test{}", self.dir.path().file_name().unwrap().to_string_lossy());
        for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(tree.path().join(&name));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&name));
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

#[test]
fn run_shows_output_and_exit_code_and_leaves_nothing() {
    let place = Place::new(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    let output = place.call(&["run", "one"]);
    assert_eq!(output.status.code(), Some(7), "{}", said(&output));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert!(!place.state_of("one").exists());
    assert!(!place.call(&["state", "one"]).status.success());
}

#[test]
fn a_process_that_a_signal_ended_counts_from_128() {
    // The first process of a pid namespace is immune to itself; its child is not.
    let place = Place::new(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]);
    assert_eq!(place.call(&["run", "one"]).status.code(), Some(137));
}

#[test]
fn a_life_in_steps() {
    let place = Place::new(&["sleep", "1000"]);
    let pid_file = place.dir.path().join("pid");
    assert!(place.quiet(&["create", "--pid-file", pid_file.to_str().unwrap(), "one"]));
    let state = place.state("one");
    assert_eq!((&state["status"], &state["annotations"]["a"]), (&json!("created"), &json!("b")));
    assert_eq!(state["bundle"], json!(place.bundle().canonicalize().unwrap()));
    let pid = fs::read_to_string(&pid_file).unwrap();
    assert_eq!(state["pid"].to_string(), pid);
    assert!(said(&place.call(&["create", "one"])).contains("exists already"));
    assert!(said(&place.call(&["delete", "one"])).contains("created, not stopped"));
    assert!(said(&place.call(&["exec", "one", "true"])).contains("not running"));

    assert!(place.quiet(&["start", "one"]));
    assert_eq!(place.status("one"), "running");
    assert!(said(&place.call(&["start", "one"])).contains("running, not created"));
    assert!(said(&place.call(&["delete", "one"])).contains("running, not stopped"));
    let list = place.call(&["list", "--format", "json"]);
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!((&list[0]["id"], &list[0]["pid"].to_string()), (&json!("one"), &pid));

    assert!(place.quiet(&["kill", "one", "KILL"]));
    place.until("one", "stopped");
    assert!(place.state("one").get("pid").is_none());
    assert!(!place.quiet(&["kill", "one", "KILL"]));
    assert!(place.quiet(&["delete", "one"]));
    assert!(!place.quiet(&["delete", "one"]));
    assert!(place.quiet(&["delete", "--force", "one"]), "nothing is left to do");
}

#[test]
fn an_exec_shares_the_container_and_has_its_own_exit_code() {
    let place = Place::new(&["sleep", "1000"]);
    assert!(place.quiet(&["run", "--detach", "one"]));
    let output =
        place.call(&["exec", "-e", "X=y", "--cwd", "/usr", "one", "sh", "-c", "echo $X $PWD; exit 5"]);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(5), &b"y /usr\n"[..]),
        "{}",
        said(&output)
    );
    let output = place.call(&["exec", "one", "sh", "-c", "cat /proc/1/comm; id -u"]);
    assert_eq!(output.stdout, b"sleep\n0\n");
    let output = place.call(&["exec", "--user", "65534:65534", "one", "id", "-u"]);
    assert_eq!(output.stdout, b"65534\n", "{}", said(&output));

    let process = place.dir.path().join("process.json");
    fs::write(
        &process,
        r#"{"args":["/usr/bin/env"],"cwd":"/","env":["ONLY=this"],"user":{"uid":0,"gid":0}}"#,
    )
    .unwrap();
    let output = place.call(&["exec", "--process", process.to_str().unwrap(), "one"]);
    assert!(output.stdout.starts_with(b"ONLY=this\n"), "{}", said(&output));

    let output = place.call(&["exec", "one", "/no/such/program"]);
    assert!(
        said(&output).ends_with("exec \"/no/such/program\": no such file or directory"),
        "{}",
        said(&output)
    );

    let pid_file = place.dir.path().join("exec.pid");
    assert!(place.quiet(&[
        "exec",
        "--detach",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "one",
        "sleep",
        "999"
    ]));
    let pid = fs::read_to_string(pid_file).unwrap();
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "sleep\n");
    assert!(place.quiet(&["kill", "--all", "one", "KILL"]));
    place.until("one", "stopped");
}

#[test]
fn a_program_that_is_not_there_fails_the_start() {
    let place = Place::new(&["/no/such/program"]);
    assert!(place.quiet(&["create", "one"]));
    let output = place.call(&["start", "one"]);
    assert!(
        said(&output).ends_with("exec \"/no/such/program\": no such file or directory"),
        "{}",
        said(&output)
    );
    place.until("one", "stopped");
    assert!(place.quiet(&["delete", "one"]));
}

#[test]
fn a_failed_create_leaves_nothing_and_goes_to_the_log() {
    let place = Place::new(&["true"]);
    place.configure(&["true"], |config| config["root"]["path"] = json!("nowhere"));
    let log = place.dir.path().join("log");
    let output = place.call(&["--log", log.to_str().unwrap(), "--log-format", "json", "create", "one"]);
    assert_eq!(output.status.code(), Some(1));
    let line: Value = serde_json::from_str(fs::read_to_string(log).unwrap().trim()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(said(&output).ends_with(line["msg"].as_str().unwrap()));
    assert!(!place.state_of("one").exists());
    for (config, why) in [("not json", "read config.json"), (r#"{"ociVersion":"2.0.0"}"#, "ociVersion")] {
        fs::write(place.bundle().join("config.json"), config).unwrap();
        let output = place.call(&["create", "one"]);
        assert!(said(&output).contains(why), "{}", said(&output));
    }
}

#[test]
fn a_created_container_that_is_killed_is_stopped_and_its_keeper_gone() {
    let place = Place::new(&["sleep", "1000"]);
    assert!(place.quiet(&["create", "one"]));
    assert!(place.quiet(&["kill", "one", "9"]));
    place.until("one", "stopped");
    assert!(said(&place.call(&["start", "one"])).contains("stopped, not created"));
    let id = place.dir.path().to_string_lossy().into_owned();
    let end = Instant::now() + Duration::from_secs(10);
    while processes_with(&id) > 0 {
        assert!(Instant::now() < end, "the keeper stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn processes_with(text: &str) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| find(&line, text.as_bytes())))
        .count()
}

fn find(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn force_deletes_a_running_container_with_all_its_processes() {
    let place = Place::new(&["sh", "-c", "sleep 1001 & sleep 1002 & wait"]);
    assert!(place.quiet(&["run", "--detach", "one"]));
    let pid = place.state("one")["pid"].to_string();
    assert!(place.quiet(&["delete", "--force", "one"]));
    assert!(!place.state_of("one").exists());
    // Whoever inherited it may not have taken its exit status yet; then it has no command line.
    assert!(
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty())
            || !Path::new(&format!("/proc/{pid}")).exists()
    );
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let place = Place::new(&[]);
    place.configure(&["sh", "-c", "read x; test -t 0 && tty && echo $x"], |config| {
        config["process"]["terminal"] = json!(true);
    });
    assert!(said(&place.call(&["create", "one"])).contains("--console-socket"));
    let path = place.dir.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    assert!(place.quiet(&["create", "--console-socket", path.to_str().unwrap(), "one"]));
    let (stream, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 64];
    let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags).unwrap();
    let mut terminal = ancillary
        .drain()
        .find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .map(fs::File::from)
        .unwrap();
    assert!(place.quiet(&["start", "one"]));
    terminal.write_all(b"hello\n").unwrap();
    let mut text = Vec::new();
    let mut chunk = [0; 256];
    // A terminal whose other side is closed ends with an error.
    while let Ok(n @ 1..) = terminal.read(&mut chunk) {
        text.extend(&chunk[..n]);
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("/dev/pts/0") || text.contains("/dev/console"), "{text:?}");
    assert_eq!(text.matches("hello").count(), 2, "echoed and printed: {text:?}");
}

#[test]
fn a_poststart_hook_that_fails_ends_the_container() {
    let place = Place::new(&["sleep", "1000"]);
    place.configure(&["sleep", "1000"], |config| {
        config["hooks"] = json!({ "poststart": [{ "path": "/bin/false" }] });
    });
    assert!(place.quiet(&["create", "one"]));
    let output = place.call(&["start", "one"]);
    assert!(said(&output).contains("poststart hook"), "{}", said(&output));
    place.until("one", "stopped");
}
