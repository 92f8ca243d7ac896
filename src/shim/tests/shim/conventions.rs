//! The command line that containerd calls, and a container as it makes one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
};

use shim_api::{
    containerd::{
        api::{
            ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ForwardRequest,
            KillRequest, ShutdownRequest, StartRequest, WaitRequest,
        },
        shim_async::{Client, Events, TaskClient, create_events},
        types::introspection::RuntimeInfo,
    },
    protobuf::Message,
    ttrpc::{
        self,
        asynchronous::{Server, TtrpcContext},
    },
};

use crate::fixture::{Made, Shim, program, run, soon, until};

#[test]
fn it_introduces_itself() {
    let version = Command::new(program()).arg("-v").output().unwrap();
    assert!(String::from_utf8(version.stdout).unwrap().starts_with("containerd-shim-crisp-v1 "));
    let info = Command::new(program()).arg("-info").stdin(Stdio::null()).output().unwrap();
    assert_eq!(RuntimeInfo::parse_from_bytes(&info.stdout).unwrap().name, "io.containerd.crisp.v1");
    assert!(!Command::new(program()).arg("dance").output().unwrap().status.success());
}

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

#[async_trait::async_trait]
impl Events for Heard {
    async fn forward(&self, _: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = req.envelope.unwrap();
        assert_eq!(envelope.namespace, "test");
        self.0.lock().unwrap().push(envelope.topic);
        Ok(Empty::default())
    }
}

/// As containerd starts a shim for a bundle.
fn start(bundle: &Path, id: &str, sockets: &Path, events: &str) -> Output {
    let mut child = Command::new(program())
        .args([
            "-namespace",
            "test",
            "-address",
            "/run/none.sock",
            "-publish-binary",
            "/bin/true",
            "-id",
            id,
            "start",
        ])
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", events)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let params = serde_json::json!({
        "instance_id": id, "namespace": "test", "socket_dir": sockets, "containerd_ttrpc_address": events,
    });
    serde_json::to_writer(child.stdin.take().unwrap(), &params).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn containerd_runs_a_container_with_it() {
    run(async {
        // Only its directories and its bundles are used.
        let fixture = Shim::spawn().await;
        let bundle = fixture.bundle("a");
        fixture.bundle_with("a", &["sh", "-c", "echo out; echo err >&2; exit 4"], Made::default());
        let dir = fixture.state.path();
        let heard = Heard::default();
        let events = format!("unix://{}/events.sock", dir.display());
        let mut server =
            Server::new().bind(&events).unwrap().register_service(create_events(Arc::new(heard.clone())));
        server.start().await.unwrap();

        let started = start(&bundle, "a", dir, &events["unix://".len()..]);
        assert!(started.status.success(), "{started:?}");
        assert!(started.stderr.is_empty(), "{started:?}");
        let answer: HashMap<String, serde_json::Value> = serde_json::from_slice(&started.stdout).unwrap();
        assert_eq!((answer["version"].as_i64(), answer["protocol"].as_str()), (Some(3), Some("ttrpc")));
        let address = answer["address"].as_str().unwrap().to_owned();
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        let socket = Path::new(&address["unix://".len()..]);
        assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);

        let task = TaskClient::new(Client::connect(&address).await.unwrap());
        let connect = ConnectRequest { id: "a".into(), ..ConnectRequest::default() };
        let shim = task.connect(soon(), &connect).await.unwrap().shim_pid;
        let program = fs::read_link(format!("/proc/{shim}/exe")).unwrap();
        assert!(program.to_str().unwrap().starts_with("/memfd:"), "{program:?}");

        let fifo = |name: &str| {
            let path = dir.join(name);
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            path
        };
        let (out, err) = (fifo("out"), fifo("err"));
        let create = CreateTaskRequest {
            id: "a".into(),
            bundle: bundle.display().to_string(),
            stdout: out.display().to_string(),
            stderr: err.display().to_string(),
            ..CreateTaskRequest::default()
        };
        // As containerd does it: the reader waits in open for the shim, however late it is.
        let readers = [out, err].map(|path| {
            std::thread::spawn(move || {
                let mut text = String::new();
                File::open(path).unwrap().read_to_string(&mut text).unwrap();
                text
            })
        });
        task.create(soon(), &create).await.unwrap();
        let start_request = StartRequest { id: "a".into(), ..StartRequest::default() };
        task.start(soon(), &start_request).await.unwrap();
        let wait = WaitRequest { id: "a".into(), ..WaitRequest::default() };
        assert_eq!(task.wait(soon(), &wait).await.unwrap().exit_status, 4);
        assert_eq!(readers.map(|reader| reader.join().unwrap()), ["out\n", "err\n"]);
        let delete = DeleteRequest { id: "a".into(), ..DeleteRequest::default() };
        task.delete(soon(), &delete).await.unwrap();
        let topics = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
        until("all events", || heard.0.lock().unwrap().len() >= topics.len()).await;
        assert_eq!(*heard.0.lock().unwrap(), topics);

        task.shutdown(soon(), &ShutdownRequest { id: "a".into(), ..ShutdownRequest::default() })
            .await
            .unwrap();
        until("the end of the shim", || !Path::new(&format!("/proc/{shim}")).exists()).await;
        assert!(!socket.exists());
    });
}

#[test]
fn an_oom_kill_is_told_while_the_container_lives_on() {
    run(async {
        let fixture = Shim::spawn().await;
        let limit =
            serde_json::json!({"linux": {"resources": {"memory": {"limit": 15 << 20, "swap": 15 << 20}}}});
        let hungry = "dd if=/dev/zero of=/dev/null bs=20M count=1; sleep 60";
        fixture.bundle_with("a", &["sh", "-c", hungry], Made { spec: limit, ..Made::default() });
        let (bundle, dir) = (fixture.bundle("a"), fixture.state.path());
        let heard = Heard::default();
        let events = format!("unix://{}/events.sock", dir.display());
        let mut server =
            Server::new().bind(&events).unwrap().register_service(create_events(Arc::new(heard.clone())));
        server.start().await.unwrap();
        let started = start(&bundle, "a", dir, &events["unix://".len()..]);
        let answer: HashMap<String, serde_json::Value> = serde_json::from_slice(&started.stdout).unwrap();
        let task = TaskClient::new(Client::connect(answer["address"].as_str().unwrap()).await.unwrap());
        let bundle = bundle.display().to_string();
        let create = CreateTaskRequest { id: "a".into(), bundle, ..CreateTaskRequest::default() };
        task.create(soon(), &create).await.unwrap();
        task.start(soon(), &StartRequest { id: "a".into(), ..StartRequest::default() }).await.unwrap();
        let told = || heard.0.lock().unwrap().iter().filter(|topic| *topic == "/tasks/oom").count();
        until("the news of the kill", || told() == 1).await;
        assert!(!heard.0.lock().unwrap().contains(&"/tasks/exit".to_owned()));

        let kill = KillRequest { id: "a".into(), signal: 9, ..KillRequest::default() };
        task.kill(soon(), &kill).await.unwrap();
        until("its end", || heard.0.lock().unwrap().contains(&"/tasks/exit".to_owned())).await;
        assert_eq!(told(), 1, "the same kill was told again");
        task.delete(soon(), &DeleteRequest { id: "a".into(), ..DeleteRequest::default() }).await.unwrap();
        let shutdown = ShutdownRequest { id: "a".into(), ..ShutdownRequest::default() };
        task.shutdown(soon(), &shutdown).await.unwrap();
    });
}

#[test]
fn containers_of_a_pod_share_a_shim_and_delete_cleans_up_after_it() {
    run(async {
        let fixture = Shim::spawn().await;
        let annotated = || Made {
            spec: serde_json::json!({"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}),
            ..Made::default()
        };
        let dir = fixture.state.path();
        let [one, two] = ["pod", "b"].map(|id| {
            fixture.bundle_with(id, &["sleep", "60"], annotated());
            let started = start(&fixture.bundle(id), id, dir, "");
            assert!(started.status.success(), "{started:?}");
            let answer: serde_json::Value = serde_json::from_slice(&started.stdout).unwrap();
            answer["address"].as_str().unwrap().to_owned()
        });
        assert_eq!(one, two);
        let task = TaskClient::new(Client::connect(&one).await.unwrap());
        for id in ["pod", "b"] {
            let create = CreateTaskRequest {
                id: id.into(),
                bundle: fixture.bundle(id).display().to_string(),
                ..CreateTaskRequest::default()
            };
            task.create(soon(), &create).await.unwrap();
            task.start(soon(), &StartRequest { id: id.into(), ..StartRequest::default() }).await.unwrap();
        }
        let shim = task
            .connect(soon(), &ConnectRequest { id: "b".into(), ..ConnectRequest::default() })
            .await
            .unwrap()
            .shim_pid;
        let pid = rustix::process::Pid::from_raw(shim.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        until("the end of the shim", || {
            fs::read_to_string(format!("/proc/{shim}/stat")).map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
        for id in ["pod", "b"] {
            let deleted = Command::new(program())
                .args(["-namespace", "test", "-id", id, "-bundle"])
                .arg(fixture.bundle(id))
                .arg("delete")
                .current_dir(fixture.bundle(id))
                .output()
                .unwrap();
            assert!(deleted.status.success() && deleted.stderr.is_empty(), "{deleted:?}");
            let response = DeleteResponse::parse_from_bytes(&deleted.stdout).unwrap();
            assert_eq!(response.exit_status, 137);
            assert!(response.pid > 1 && response.exited_at.is_some());
        }
        assert!(!Path::new(&one["unix://".len()..]).exists());
    });
}
