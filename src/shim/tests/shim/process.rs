//! The shim as a process, and what it passes on.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;
use shim_api::{rundir, shim::PodOptions};

use crate::fixture::{Made, Shim, program, run, until};

#[test]
fn the_shim_has_one_thread_and_is_small() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "echo hello; sleep 60").await;
        for _ in 0..20 {
            shim.exec("a", &["true"], "").await.unwrap();
        }
        assert_eq!(shim.status("Threads"), "1");
        assert_eq!(shim.status("Umask"), "0077");
        // What a container must not inherit.
        assert_eq!(shim.status("Seccomp"), "0");
        assert_eq!(shim.status("NoNewPrivs"), "0");
    });
}

#[test]
fn many_shims_share_what_they_can() {
    run(async {
        let mut shims = Vec::new();
        for _ in 0..10 {
            let shim = Shim::usual().await;
            shim.sh("a", "echo hello; sleep 60").await;
            shim.exec("a", &["true"], "").await.unwrap();
            shims.push(shim);
        }
        // By then the buffers of the first words are given back.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let pss = |shim: &Shim| {
            let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", shim.child.id())).unwrap();
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
            line.trim_end_matches("kB").trim().parse::<u64>().unwrap()
        };
        let each = shims.iter().map(pss).sum::<u64>() / 10;
        println!("PSS of one of ten shims: {each} KiB");
        // cargo builds tests without optimisation and linked to glibc; that one is not what ships.
        assert!(each < 600 || std::env::var_os("CRISP_SHIM").is_none(), "{each} KiB");
    });
}

#[test]
fn the_times_of_a_start_and_an_exec() {
    run(async {
        let shim = Shim::usual().await;
        let mut starts = Vec::new();
        for i in 0..20 {
            let request = shim.bundle_with(&format!("c{i}"), &["sleep", "60"], Made::default());
            let began = Instant::now();
            shim.pod.run(crate::fixture::soon(), &request).await.unwrap();
            starts.push(began.elapsed());
        }
        let mut execs = Vec::new();
        for _ in 0..50 {
            let began = Instant::now();
            shim.exec("c0", &["true"], "").await.unwrap();
            execs.push(began.elapsed());
        }
        starts.sort();
        execs.sort();
        println!("create+start: median {:?}, least {:?}", starts[10], starts[0]);
        println!("exec: median {:?}, least {:?}", execs[25], execs[0]);
    });
}

#[test]
fn a_process_has_three_descriptors_and_clean_signals() {
    run(async {
        let shim = Shim::usual().await;
        let pid = shim.run("a", &["sleep", "60"]).await;
        let exec = {
            let (pod, id) = (shim.pod.clone(), "a".to_owned());
            tokio::spawn(async move {
                let request = shim_api::shim::RunExecRequest {
                    container_id: id,
                    exec_id: "e".into(),
                    process: serde_json::to_vec(&crate::fixture::process(&["sleep", "61"])).unwrap(),
                    ..Default::default()
                };
                let _ = pod.run_exec(crate::fixture::soon(), &request).await;
            })
        };
        let procs = || {
            let text = fs::read_to_string(shim.cgroups()[0].join("a/cgroup.procs")).unwrap();
            text.lines().map(|pid| pid.parse::<u32>().unwrap()).collect::<Vec<_>>()
        };
        let running =
            |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep"));
        until("the exec", || procs().len() == 2 && procs().iter().all(running)).await;
        assert!(procs().contains(&pid));
        for pid in procs() {
            let mut fds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .map(|fd| fd.unwrap().file_name().into_string().unwrap())
                .collect();
            fds.sort();
            assert_eq!(fds, ["0", "1", "2"]);
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            for name in ["SigBlk", "SigIgn", "SigCgt"] {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                assert!(line.ends_with("0000000000000000"), "{line}");
            }
        }
        exec.abort();
    });
}

#[test]
fn orphans_are_collected() {
    run(async {
        let shim = Shim::usual().await;
        // In the host's pid namespace orphans come to the subreaper.
        let spec = json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]}});
        let script = "i=0; while [ $i -lt 500 ]; do (sleep 0 &); i=$((i+1)); done; exec sleep 60";
        let pid = shim.try_run("a", &["sh", "-c", script], Made { spec, ..Made::default() }).await.unwrap();
        let lines = |path: &str| fs::read_to_string(path).unwrap().split_whitespace().count();
        let procs = shim.cgroups()[0].join("a/cgroup.procs").display().to_string();
        let children = format!("/proc/{0}/task/{0}/children", shim.child.id());
        until("the end of the loop", || {
            fs::read(format!("/proc/{pid}/cmdline")).unwrap().starts_with(b"sleep")
        })
        .await;
        // One by one they end, and are collected.
        until("the end of the orphans", || lines(&procs) == 1 && lines(&children) == 1).await;
    });
}

#[test]
fn a_shim_that_is_killed_takes_its_pod_along_and_delete_says_so() {
    run(async {
        let mut shim = Shim::pod(PodOptions { new_pid: true, ..PodOptions::default() }).await;
        let pid = shim.sh("a", "sleep 60").await;
        shim.sh("b", "exit 3").await;
        shim.wait("b").await;
        let options = shim_api::shim::ContainerOptions { join_pid: true, ..Default::default() };
        shim.try_run("c", &["sleep", "60"], Made { options, ..Made::default() }).await.unwrap();
        shim.bundle_with("never", &["true"], Made::default());
        let copies = || {
            // Of the first process of the pod's pid namespace too, which is a copy of the shim.
            let find = Command::new("pgrep").args(["-f", &format!("k8s.io -id {} serve", shim.id)]).output();
            String::from_utf8(find.unwrap().stdout).unwrap().lines().count()
        };
        assert_eq!(copies(), 2);
        shim.child.kill().unwrap();
        shim.child.wait().unwrap();
        until("the end of the pod's first process", || copies() == 0).await;
        let delete = || {
            let delete = Command::new(program())
                .args(["-namespace", "k8s.io", "-id", &shim.id, "-bundle"])
                .arg(shim.state.path())
                .arg("delete")
                .output()
                .unwrap();
            assert!(delete.status.success(), "{delete:?}");
        };
        delete();
        let exit = shim.exit("a");
        assert_eq!((exit.code, exit.known), (137, false));
        // What was known stays; what never ran has no end.
        assert_eq!((shim.exit("b").code, shim.exit("b").known), (3, true));
        assert!(!shim.bundle("never").join(rundir::EXIT).exists());
        assert!(!std::path::Path::new(&format!("/proc/{pid}/cwd")).exists() || zombie(pid));
        assert_eq!(shim.cgroups().iter().filter(|dir| dir.join("a").exists()).count(), 0);
        delete();
        assert_eq!(shim.exit("a").exited_at, exit.exited_at);
    });
}

fn zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[test]
fn clients_that_are_not_root_are_refused() {
    run(async {
        let shim = Shim::spawn().await;
        let socket = shim.state.path().join(rundir::SOCKET);
        fs::set_permissions(shim.state.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        // Perl is everywhere where Debian is, and can drop root before it connects.
        let script = "use Socket; alarm 10; $> = 65534; socket(S, AF_UNIX, SOCK_STREAM, 0); \
                      connect(S, sockaddr_un($ARGV[0])) or exit 7; exit(defined(sysread(S, $b, 1)) && length $b ? 1 : 0)";
        let status = tokio::task::spawn_blocking(move || {
            Command::new("perl").args(["-e", script]).arg(&socket).status().unwrap()
        });
        // Connected, and hung up on.
        assert_eq!(status.await.unwrap().code(), Some(0));
        let log = fs::read_to_string(shim.state.path().join(rundir::LOG)).unwrap();
        assert!(log.contains("refused a client with uid 65534"), "{log}");
    });
}

#[test]
fn a_request_to_terminate_is_not_followed() {
    run(async {
        let mut shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        for signal in ["TERM", "INT", "HUP"] {
            let kill = Command::new("/bin/kill")
                .args([&format!("-{signal}"), &shim.child.id().to_string()])
                .status();
            assert!(kill.unwrap().success());
        }
        shim.exec("a", &["true"], "").await.unwrap();
        assert!(shim.child.try_wait().unwrap().is_none());
        shim.shutdown().await;
    });
}

#[test]
fn the_shim_says_who_it_is() {
    run(async {
        let shim = Shim::usual().await;
        let bytes = fs::read(shim.state.path().join(rundir::SHIM)).unwrap();
        let record: rundir::Shim = rundir::decode(&bytes).unwrap();
        assert_eq!(record.process.pid, shim.child.id());
        assert!(record.process.start_ticks > 0);
        let abstract_sockets = fs::read_to_string("/proc/net/unix").unwrap();
        assert!(!abstract_sockets.lines().any(|line| line.contains('@') && line.contains("crisp")));
    });
}
