//! Processes that join a container.

use std::{
    fs::File,
    io::{Read, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use shim_api::{
    containerd::api::{
        CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest,
        WaitRequest,
    },
    protobuf::{MessageField, well_known_types::any::Any},
    shim::RunExecRequest,
    ttrpc::{Code, Error, context},
};

use crate::fixture::{Shim, process, run, soon, until};

/// A FIFO that we read from until its writers are gone.
struct Fifo {
    path: PathBuf,
    file: Option<File>,
}

impl Fifo {
    fn new(shim: &Shim, name: &str, write: bool) -> Fifo {
        let path = shim.state.path().join(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        // As the daemon does it: a writer of both ways finds its partner in itself, and a reader that did not
        // wait at the open is not hung up on before the first writer has come and gone.
        let file = match write {
            true => File::options().read(true).write(true).open(&path).unwrap(),
            false => {
                let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
                let file = File::from(rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap());
                rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::empty()).unwrap();
                file
            }
        };
        Fifo { path, file: Some(file) }
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Reads to the end on another thread, so that the client's loop goes on.
    fn text(&mut self) -> std::thread::JoinHandle<String> {
        let mut file = self.file.take().unwrap();
        std::thread::spawn(move || {
            // Before the first writer a read says end of file; a poll waits.
            let mut fds = [rustix::event::PollFd::new(&file, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            text
        })
    }
}

#[test]
fn an_exec_in_one_exchange_returns_its_output_and_code() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let mut out = Fifo::new(&shim, "out", false);
        let text = out.text();
        let answer = shim.exec("a", &["sh", "-c", "echo hi; pwd; exit 9"], out.path()).await.unwrap();
        assert_eq!(answer.exit_status, 9);
        assert!(answer.exited_at > 0);
        assert_eq!(text.join().unwrap(), "hi\n/\n");
    });
}

#[test]
fn an_exec_of_nothing_says_what_is_missing() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let Err(Error::RpcStatus(status)) = shim.exec("a", &["/nope"], "").await else { panic!() };
        assert_eq!(status.message, "exec \"/nope\": no such file or directory");
        let Err(Error::RpcStatus(status)) = shim.exec("b", &["true"], "").await else { panic!() };
        assert_eq!(status.code(), Code::NOT_FOUND);
        shim.kill("a", 9).await.unwrap();
        shim.wait("a").await;
        let Err(Error::RpcStatus(status)) = shim.exec("a", &["true"], "").await else { panic!() };
        assert_eq!(
            (status.code(), status.message.as_str()),
            (Code::FAILED_PRECONDITION, "container a is stopped")
        );
    });
}

#[test]
fn an_exec_ends_with_its_first_process_whoever_holds_its_output() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let out = Fifo::new(&shim, "out", false);
        let began = Instant::now();
        shim.exec("a", &["sh", "-c", "sleep 59 & exit 0"], out.path()).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn an_exec_whose_client_gives_up_is_killed() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let request = RunExecRequest {
            container_id: "a".into(),
            exec_id: "e".into(),
            process: serde_json::to_vec(&process(&["sleep", "4711"])).unwrap(),
            ..RunExecRequest::default()
        };
        let Err(error) = shim.pod.run_exec(context::with_timeout(300_000_000), &request).await else {
            panic!()
        };
        drop(error);
        let count = || {
            let procs = std::fs::read_to_string(shim.cgroups()[0].join("a/cgroup.procs")).unwrap();
            procs.lines().count()
        };
        until("the end of the exec", || count() == 1).await;
        // And forgotten: the id is free.
        let again = RunExecRequest { process: serde_json::to_vec(&process(&["true"])).unwrap(), ..request };
        assert_eq!(shim.pod.run_exec(soon(), &again).await.unwrap().exit_status, 0);
    });
}

fn spec(args: &[&str]) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: serde_json::to_vec(&process(args)).unwrap(),
        ..Any::default()
    })
}

/// Adds the exec `e` to the container `a`, and starts it; gives its pid.
async fn begin(shim: &Shim, exec: ExecProcessRequest) -> u32 {
    let exec = ExecProcessRequest { id: "a".into(), exec_id: "e".into(), ..exec };
    shim.task.exec(soon(), &exec).await.unwrap();
    let start = StartRequest { id: "a".into(), exec_id: "e".into(), ..StartRequest::default() };
    shim.task.start(soon(), &start).await.unwrap().pid
}

/// Waits for its end.
async fn code(shim: &Shim) -> u32 {
    let wait = WaitRequest { id: "a".into(), exec_id: "e".into(), ..WaitRequest::default() };
    shim.task.wait(soon(), &wait).await.unwrap().exit_status
}

#[test]
fn an_exec_in_steps_reads_its_stdin_to_the_end() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let mut input = Fifo::new(&shim, "in", true);
        let mut out = Fifo::new(&shim, "out", false);
        let text = out.text();
        let exec = ExecProcessRequest {
            stdin: input.path().into(),
            stdout: out.path().into(),
            spec: spec(&["cat"]),
            ..ExecProcessRequest::default()
        };
        assert!(begin(&shim, exec).await > 1);
        input.file.as_mut().unwrap().write_all(b"through\n").unwrap();
        input.file = None;
        assert_eq!(code(&shim).await, 0);
        assert_eq!(text.join().unwrap(), "through\n");
        let delete = DeleteRequest { id: "a".into(), exec_id: "e".into(), ..DeleteRequest::default() };
        assert_eq!(shim.task.delete(soon(), &delete).await.unwrap().exit_status, 0);
        let Err(Error::RpcStatus(status)) = shim.task.delete(soon(), &delete).await else { panic!() };
        assert_eq!(status.code(), Code::NOT_FOUND);
    });
}

#[test]
fn an_exec_with_a_terminal_is_copied_and_resized() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let mut input = Fifo::new(&shim, "in", true);
        let mut out = Fifo::new(&shim, "out", false);
        let text = out.text();
        let exec = ExecProcessRequest {
            terminal: true,
            stdin: input.path().into(),
            stdout: out.path().into(),
            spec: spec(&["sh", "-c", "tty; read line; stty size; echo got $line; exit 8"]),
            ..ExecProcessRequest::default()
        };
        begin(&shim, exec).await;
        let resize = ResizePtyRequest {
            id: "a".into(),
            exec_id: "e".into(),
            width: 91,
            height: 33,
            ..ResizePtyRequest::default()
        };
        shim.task.resize_pty(soon(), &resize).await.unwrap();
        input.file.as_mut().unwrap().write_all(b"word\n").unwrap();
        assert_eq!(code(&shim).await, 8);
        let close =
            CloseIORequest { id: "a".into(), exec_id: "e".into(), stdin: true, ..CloseIORequest::default() };
        shim.task.close_io(soon(), &close).await.unwrap();
        let text = text.join().unwrap();
        let lines: Vec<_> = text.lines().collect();
        // What was typed is echoed, before or after the first answer.
        for line in ["/dev/pts/0", "word", "33 91", "got word"] {
            assert!(lines.contains(&line), "{text}");
        }
    });
}

#[test]
fn an_exec_can_be_killed_by_its_id() {
    run(async {
        let shim = Shim::usual().await;
        shim.sh("a", "sleep 60").await;
        let exec = ExecProcessRequest { spec: spec(&["sleep", "60"]), ..ExecProcessRequest::default() };
        begin(&shim, exec).await;
        let kill = KillRequest { id: "a".into(), exec_id: "e".into(), signal: 9, ..KillRequest::default() };
        shim.task.kill(soon(), &kill).await.unwrap();
        assert_eq!(code(&shim).await, 137);
        // The container itself runs on.
        shim.exec("a", &["true"], "").await.unwrap();
    });
}
