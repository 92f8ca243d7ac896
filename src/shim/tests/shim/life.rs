//! What a pod and its containers go through.

use std::{fs, time::Duration};

use serde_json::json;
use shim_api::{
    containerd::{
        api::{
            CreateTaskRequest, DeleteRequest, KillRequest, PauseRequest, PidsRequest, ResumeRequest,
            StartRequest, StateRequest, Status, UpdateTaskRequest, WaitRequest,
        },
        sandbox_api::{SandboxStatusRequest, WaitSandboxRequest},
        shim_async::TaskClient,
    },
    protobuf::{MessageField, well_known_types::any::Any},
    rundir,
    shim::{ContainerOptions, IdMapping, NamespacesRequest, PodOptions},
    ttrpc::{Code, Error, context},
};

use crate::fixture::{Made, Shim, any, connect, run, soon, until};

fn code<T>(answer: Result<T, Error>) -> (Code, String) {
    match answer {
        Err(Error::RpcStatus(status)) => (status.code(), status.message),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("succeeded"),
    }
}

async fn state(shim: &Shim, id: &str) -> Status {
    let request = StateRequest { id: id.into(), ..StateRequest::default() };
    shim.task.state(soon(), &request).await.unwrap().status.unwrap()
}

async fn delete(shim: &Shim, id: &str) -> Result<u32, Error> {
    let request = DeleteRequest { id: id.into(), ..DeleteRequest::default() };
    shim.task.delete(soon(), &request).await.map(|response| response.exit_status)
}

#[test]
fn a_pod_of_two_containers_from_begin_to_end() {
    run(async {
        let mut shim = Shim::usual().await;
        let first = Made {
            options: ContainerOptions {
                join_ipc: true,
                join_uts: true,
                pod_shm: true,
                ..ContainerOptions::default()
            },
            ..Made::default()
        };
        shim.try_run("a", &["sh", "-c", "hostname; echo shared > /dev/shm/x; sleep 60"], first)
            .await
            .unwrap();
        until("the first word", || fs::read(shim.log("a")).is_ok_and(|log| !log.is_empty())).await;
        assert_eq!(shim.printed("a"), "pod\n");
        let second = Made {
            options: ContainerOptions {
                join_ipc: true,
                join_uts: true,
                pod_shm: true,
                ..ContainerOptions::default()
            },
            ..Made::default()
        };
        let script = "until [ -s /dev/shm/x ]; do sleep 0.01; done; cat /dev/shm/x; exit 3";
        shim.try_run("b", &["sh", "-c", script], second).await.unwrap();
        assert_eq!(shim.wait("b").await, 3);
        assert_eq!(shim.printed("b"), "shared\n");
        let exit = shim.exit("b");
        assert_eq!((exit.code, exit.oom, exit.known), (3, false, true));
        assert!(exit.exited_at > 0);
        let init: rundir::Init =
            rundir::decode(&fs::read(shim.bundle("a").join(rundir::INIT)).unwrap()).unwrap();
        assert!(init.started_at > 0 && init.process.start_ticks > 0);

        assert_eq!(state(&shim, "a").await, Status::RUNNING);
        assert_eq!(state(&shim, "b").await, Status::STOPPED);
        assert_eq!(code(delete(&shim, "a").await).0, Code::FAILED_PRECONDITION);
        assert_eq!(delete(&shim, "b").await.unwrap(), 3);
        assert_eq!(code(delete(&shim, "b").await).0, Code::NOT_FOUND);

        let over = WaitSandboxRequest { sandbox_id: shim.id.clone(), ..WaitSandboxRequest::default() };
        let over = {
            let sandbox = shim.sandbox.clone();
            tokio::spawn(async move { sandbox.wait_sandbox(soon(), &over).await })
        };
        shim.stop().await.unwrap();
        shim.stop().await.unwrap();
        over.await.unwrap().unwrap();
        assert_eq!(shim.exit("a").code, 137);
        assert_eq!(state(&shim, "a").await, Status::STOPPED);
        assert_eq!(shim.cgroups(), Vec::<std::path::PathBuf>::new());
        let status = SandboxStatusRequest { sandbox_id: shim.id.clone(), ..SandboxStatusRequest::default() };
        assert_eq!(shim.sandbox.sandbox_status(soon(), &status).await.unwrap().state, "SANDBOX_NOTREADY");
        shim.shutdown().await;
    });
}

#[test]
fn wait_after_the_exit_answers_at_once() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "exit 7").await;
        assert_eq!(shim.wait("a").await, 7);
        assert_eq!(shim.wait("a").await, 7);
    });
}

#[test]
fn a_killed_container_exits_with_the_signal() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        shim.kill("a", 9).await.unwrap();
        assert_eq!(shim.wait("a").await, 137);
        assert_eq!(code(shim.kill("a", 9).await).0, Code::NOT_FOUND);
        assert_eq!(code(shim.kill("nobody", 9).await).0, Code::NOT_FOUND);
        assert_eq!(code(shim.kill("../a", 9).await).0, Code::INVALID_ARGUMENT);
        shim.sh("b", "trap 'exit 9' 37; while :; do sleep 0.01; done").await;
        // The trap has to be set before the signal arrives; a real-time signal has no default that spares.
        until("the trap", || caught(&shim, "b", 37)).await;
        shim.kill("b", 37).await.unwrap();
        assert_eq!(shim.wait("b").await, 9);
    });
}

fn caught(shim: &Shim, id: &str, signal: u32) -> bool {
    let init: rundir::Init = rundir::decode(&fs::read(shim.bundle(id).join(rundir::INIT)).unwrap()).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", init.process.pid)).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t")).unwrap();
    u64::from_str_radix(mask, 16).unwrap() & (1 << (signal - 1)) != 0
}

#[test]
fn kill_all_reaches_every_process() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60 & sleep 60 & trap '' TERM; wait; wait; echo ended; exit 4").await;
        until("all three", || shim_pids(&shim, "a") == 3).await;
        let request = KillRequest { id: "a".into(), signal: 15, all: true, ..KillRequest::default() };
        shim.task.kill(soon(), &request).await.unwrap();
        assert_eq!(shim.wait("a").await, 4);
        assert_eq!(shim.printed("a"), "ended\n");
    });
}

fn shim_pids(shim: &Shim, id: &str) -> usize {
    let procs = shim.cgroups()[0].join(id).join("cgroup.procs");
    fs::read_to_string(procs).map_or(0, |pids| pids.lines().count())
}

#[test]
fn create_and_start_are_two_steps_too() {
    run(async {
        let shim = Shim::usual().await;
        let made = shim.bundle_with("a", &["sh", "-c", "exit 5"], Made::default());
        let create = CreateTaskRequest {
            id: "a".into(),
            bundle: made.bundle,
            options: MessageField::some(any(
                "crisp.shim.v1.ContainerOptions",
                made.options.as_ref().unwrap(),
            )),
            ..CreateTaskRequest::default()
        };
        let pid = shim.task.create(soon(), &create).await.unwrap().pid;
        assert!(pid > 1);
        assert_eq!(state(&shim, "a").await, Status::CREATED);
        assert_eq!(code(shim.task.create(soon(), &create).await).0, Code::ALREADY_EXISTS);
        let start = StartRequest { id: "a".into(), ..StartRequest::default() };
        assert_eq!(shim.task.start(soon(), &start).await.unwrap().pid, pid);
        assert_eq!(code(shim.task.start(soon(), &start).await).0, Code::FAILED_PRECONDITION);
        assert_eq!(shim.wait("a").await, 5);

        // One that is never started can be killed and deleted.
        let made = shim.bundle_with("b", &["true"], Made::default());
        let create =
            CreateTaskRequest { id: "b".into(), bundle: made.bundle, ..CreateTaskRequest::default() };
        shim.task.create(soon(), &create).await.unwrap();
        shim.kill("b", 9).await.unwrap();
        assert_eq!(shim.wait("b").await, 137);
        delete(&shim, "b").await.unwrap();
    });
}

#[test]
fn a_program_that_is_not_there_is_told_by_name() {
    run(async {
        let shim = Shim::usual().await;
        let (status, text) = code(shim.try_run("a", &["/nope"], Made::default()).await);
        assert_eq!((status, text.as_str()), (Code::UNKNOWN, "exec \"/nope\": no such file or directory"));
        // Nothing of it is left, so the same id is free.
        shim.sh("a", "exit 0").await;
        assert_eq!(shim.wait("a").await, 0);
        let (status, _) = code(shim.try_run("b", &[], Made::default()).await);
        assert_eq!(status, Code::INVALID_ARGUMENT);
    });
}

#[test]
fn ids_that_are_no_file_names_are_refused() {
    run(async {
        let shim = Shim::usual().await;
        let mut request = shim.bundle_with("a", &["true"], Made::default());
        for id in ["../a", "", ".", "a/b", "a b", &"x".repeat(129)] {
            request.container_id = id.into();
            assert_eq!(code(shim.pod.run(soon(), &request).await).0, Code::INVALID_ARGUMENT, "{id}");
        }
    });
}

#[test]
fn an_oom_kill_is_recorded() {
    run(async {
        let shim = Shim::usual().await;
        let spec = json!({"linux": {"resources": {"memory": {"limit": 15 << 20, "swap": 15 << 20}}}});
        let made = Made { spec, ..Made::default() };
        shim.try_run("a", &["dd", "if=/dev/zero", "of=/dev/null", "bs=20M", "count=1"], made).await.unwrap();
        assert_eq!(shim.wait("a").await, 137);
        let exit = shim.exit("a");
        assert_eq!((exit.code, exit.oom), (137, true));
    });
}

#[test]
fn the_exit_is_told_when_the_first_process_ends_whoever_holds_its_output() {
    run(async {
        let shim = Shim::usual().await;
        // In the host's pid namespace the child outlives its parent, until the shim ends it.
        let spec = json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]}});
        let made = Made { spec, ..Made::default() };
        shim.try_run("a", &["sh", "-c", "echo before; sleep 86399 & exit 6"], made).await.unwrap();
        let began = std::time::Instant::now();
        assert_eq!(shim.wait("a").await, 6);
        assert!(began.elapsed() < Duration::from_secs(3));
        assert_eq!(shim.printed("a"), "before\n");
    });
}

#[test]
fn a_shared_pid_namespace_has_a_first_process_that_reaps() {
    run(async {
        let mut shim = Shim::pod(PodOptions { new_pid: true, ..PodOptions::default() }).await;
        let made = || Made {
            options: ContainerOptions { join_pid: true, ..ContainerOptions::default() },
            ..Made::default()
        };
        // Each inner shell leaves its child behind, for the first process to collect.
        let script = "for i in 1 2 3 4 5 6 7 8 9; do sh -c 'sh -c \"sleep 0.02\" & exit 0'; done; sleep 0.5; \
                      grep -s '^State:.Z' /proc/[0-9]*/status; echo $$; cat /proc/1/comm";
        shim.try_run("a", &["sh", "-c", script], made()).await.unwrap();
        assert_eq!(shim.wait("a").await, 0);
        let printed = shim.printed("a");
        let lines: Vec<_> = printed.lines().collect();
        assert!(lines.len() == 2 && lines[0] != "1", "{printed}");
        // It can see the other, and cannot be killed from within.
        shim.try_run("b", &["sh", "-c", "sleep 60"], made()).await.unwrap();
        shim.try_run("c", &["sh", "-c", "kill -9 1; sleep 0.1; pidof sleep"], made()).await.unwrap();
        assert_eq!(shim.wait("c").await, 0);
        shim.stop().await.unwrap();
        assert_eq!(shim.exit("b").code, 137);
        shim.shutdown().await;
    });
}

#[test]
fn a_container_can_take_part_in_the_pid_namespace_of_another() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 77").await;
        let options = ContainerOptions { join_pid_of: "a".into(), ..ContainerOptions::default() };
        shim.try_run("b", &["cat", "/proc/1/cmdline"], Made { options, ..Made::default() }).await.unwrap();
        assert_eq!(shim.wait("b").await, 0);
        assert!(shim.printed("b").starts_with("sleep\u{0}77"), "{}", shim.printed("b"));
        shim.kill("a", 9).await.unwrap();
        shim.wait("a").await;
        let options = ContainerOptions { join_pid_of: "a".into(), ..ContainerOptions::default() };
        let refused = shim.try_run("c", &["true"], Made { options, ..Made::default() }).await;
        assert_eq!(code(refused).0, Code::FAILED_PRECONDITION);
    });
}

#[test]
fn a_pod_with_a_user_namespace_owns_its_network() {
    run(async {
        let map = |host_id| vec![IdMapping { container_id: 0, host_id, size: 65536, ..IdMapping::default() }];
        let shim = Shim::pod(PodOptions {
            new_ipc: true,
            new_uts: true,
            new_net: true,
            uid_mappings: map(200_000),
            gid_mappings: map(200_000),
            ..PodOptions::default()
        })
        .await;
        let held = shim.pod.namespaces(soon(), &NamespacesRequest::new()).await.unwrap();
        assert_eq!(held.pid, shim.child.id());
        for fd in [held.user_fd, held.net_fd, held.ipc_fd, held.uts_fd] {
            let link = fs::read_link(format!("/proc/{}/fd/{fd}", held.pid)).unwrap();
            assert!(link.to_str().unwrap().contains(":["), "{link:?}");
        }
        assert_eq!(held.pid_fd, 0);
        let options = ContainerOptions {
            join_user: true,
            join_net: true,
            join_ipc: true,
            join_uts: true,
            ..ContainerOptions::default()
        };
        let lines = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
        let spec = json!({"linux": {"uidMappings": lines, "gidMappings": lines, "namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"},
            {"type": "cgroup"}, {"type": "user"}]}});
        let pid = shim
            .try_run(
                "a",
                &["sh", "-c", "cat /proc/self/uid_map; echo hello > /dev/stderr; sleep 60"],
                Made { options, spec },
            )
            .await
            .unwrap();
        until("both lines", || shim.log("a").exists() && shim.records("a").len() == 2).await;
        let printed = shim.printed("a");
        assert_eq!(printed.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536", "hello"]);
        let theirs = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_eq!(theirs, fs::read_link(format!("/proc/{}/fd/{}", held.pid, held.net_fd)).unwrap());
    });
}

#[test]
fn pause_stops_and_resume_continues() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let pause = PauseRequest { id: "a".into(), ..PauseRequest::default() };
        let resume = ResumeRequest { id: "a".into(), ..ResumeRequest::default() };
        shim.task.pause(soon(), &pause).await.unwrap();
        assert_eq!(state(&shim, "a").await, Status::PAUSED);
        assert_eq!(code(shim.task.pause(soon(), &pause).await).0, Code::FAILED_PRECONDITION);
        shim.task.resume(soon(), &resume).await.unwrap();
        assert_eq!(state(&shim, "a").await, Status::RUNNING);
        // A paused container can be killed all the same.
        shim.task.pause(soon(), &pause).await.unwrap();
        shim.kill("a", 9).await.unwrap();
        assert_eq!(shim.wait("a").await, 137);
    });
}

#[test]
fn limits_can_be_changed_and_processes_listed() {
    run(async {
        let shim = Shim::usual().await;
        let pid = shim.sh("a", "sleep 60").await;
        let pids = PidsRequest { id: "a".into(), ..PidsRequest::default() };
        let pids = shim.task.pids(soon(), &pids).await.unwrap().processes;
        assert!(pids.iter().any(|process| process.pid == pid));
        let update = UpdateTaskRequest {
            id: "a".into(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: br#"{"pids":{"limit":77}}"#.to_vec(),
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        shim.task.update(soon(), &update).await.unwrap();
        let limits = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .map(|root| fs::read_to_string(format!("{root}{}/a/pids.max", shim.cgroup)).unwrap_or_default());
        assert!(limits.iter().any(|limit| limit == "77\n"), "{limits:?}");
        let stats = shim_api::containerd::api::StatsRequest { id: "a".into(), ..Default::default() };
        let stats = shim.task.stats(soon(), &stats).await.unwrap().stats.unwrap();
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        let stats: shim_api::containerd::cgroups_v2::metrics::Metrics =
            shim_api::protobuf::Message::parse_from_bytes(&stats.value).unwrap();
        assert_eq!(stats.pids.limit, 77);
    });
}

/// A container whose own process does not come to an end of setting itself up, as with a mount that hangs.
fn hanging() -> Made {
    let hook = json!({"path": "/bin/sleep", "args": ["sleep", "600"]});
    Made { spec: json!({"hooks": {"createContainer": [hook]}}), ..Made::default() }
}

#[test]
fn a_container_that_hangs_while_it_is_made_holds_up_nobody() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let request = shim.bundle_with("b", &["true"], hanging());
        let pod = shim.pod.clone();
        let began = std::time::Instant::now();
        let call = tokio::spawn(async move { pod.run(context::with_timeout(1_500_000_000), &request).await });
        until("its cgroup", || shim.cgroups().iter().any(|dir| dir.join("b").exists())).await;
        shim.exec("a", &["true"], "").await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1400), "{:?}", began.elapsed());
        assert!(call.await.unwrap().is_err());
        until("the end of its cgroup", || !shim.cgroups().iter().any(|dir| dir.join("b").exists())).await;
        shim.exec("a", &["true"], "").await.unwrap();
        // The id is free again.
        shim.sh("b", "exit 0").await;
    });
}

#[test]
fn a_pod_can_be_stopped_while_a_container_is_made() {
    run(async {
        let shim = Shim::usual().await;
        let request = shim.bundle_with("a", &["true"], hanging());
        let pod = shim.pod.clone();
        let call = tokio::spawn(async move { pod.run(soon(), &request).await });
        until("its cgroup", || shim.cgroups().iter().any(|dir| dir.join("a").exists())).await;
        shim.stop().await.unwrap();
        assert_eq!(code(call.await.unwrap()), (Code::FAILED_PRECONDITION, "the pod is stopping".into()));
        assert_eq!(shim.cgroups(), Vec::<std::path::PathBuf>::new());
        let refused = shim.try_run("b", &["true"], Made::default()).await;
        assert_eq!(code(refused).0, Code::FAILED_PRECONDITION);
    });
}

#[test]
fn the_death_of_the_client_changes_nothing() {
    run(async {
        let shim = Shim::usual().await;
        // A client of its own, that goes away in the middle of a call.
        let client = TaskClient::new(connect(shim.state.path()).await);
        shim.sh("a", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done").await;
        let wait = WaitRequest { id: "a".into(), ..WaitRequest::default() };
        let call = tokio::spawn(async move { client.wait(soon(), &wait).await.map(drop) });
        tokio::time::sleep(Duration::from_millis(50)).await;
        call.abort();
        let _ = call.await;
        let before = shim.records("a").len();
        until("more lines", || shim.records("a").len() > before + 5).await;
        let printed = shim.printed("a");
        for (number, line) in printed.lines().enumerate() {
            assert_eq!(line, number.to_string());
        }
        assert_eq!(state(&shim, "a").await, Status::RUNNING);
    });
}
