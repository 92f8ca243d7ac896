//! URLs of exec, attach and port-forward, and the clients that come with them: the program `streams`, which is
//! client-go's executors and dialers.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use cri_api::v1::*;

use crate::client::{Client, Reply};
use crate::{run, setup};

/// How clients talk.
pub const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Exec of a shell script with stdout and stderr, and stdin when wanted.
pub async fn exec(client: &Client, container: &str, stdin: bool, script: &str) -> Reply<String> {
    let request = ExecRequest {
        container_id: container.to_owned(),
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        stdin,
        stdout: true,
        stderr: true,
        tty: false,
    };
    Ok(client.runtime.clone().exec(request).await?.into_inner().url)
}

/// Exec of a shell script on a terminal.
pub async fn exec_tty(client: &Client, container: &str, script: &str) -> Reply<String> {
    let request = ExecRequest {
        container_id: container.to_owned(),
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: false,
        tty: true,
    };
    Ok(client.runtime.clone().exec(request).await?.into_inner().url)
}

/// Attach with stdout, stderr when there is no terminal, and stdin when wanted.
pub async fn attach(client: &Client, container: &str, stdin: bool, tty: bool) -> Reply<String> {
    let request =
        AttachRequest { container_id: container.to_owned(), stdin, tty, stdout: true, stderr: !tty };
    Ok(client.runtime.clone().attach(request).await?.into_inner().url)
}

/// PortForward that names no port.
pub async fn forward(client: &Client, pod: &str) -> Reply<String> {
    let request = PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: Vec::new() };
    Ok(client.runtime.clone().port_forward(request).await?.into_inner().url)
}

/// The program `streams` with arguments.
pub fn command(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(setup::go_program("streams")?);
    command.args(args);
    Ok(command)
}

/// A child that does not outlive the test.
#[derive(Debug)]
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Killed {
    /// Starts a command with pipes for stdin and stdout.
    pub fn spawn(command: &mut Command) -> Result<Killed> {
        Ok(Killed(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?))
    }
}

/// What a program said and its exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// None: a signal ended it.
    pub code: Option<i32>,
    /// Its stdout.
    pub out: String,
    /// Its stderr.
    pub err: String,
}

/// Runs to the end, with some input whose end it sees.
pub fn fed(command: &mut Command, input: &[u8]) -> Result<Said> {
    fed_within(command, input, Duration::from_secs(60))
}

/// The same with a limit of its own.
pub fn fed_within(command: &mut Command, input: &[u8], limit: Duration) -> Result<Said> {
    let mut input_file = tempfile::tempfile()?;
    input_file.write_all(input)?;
    std::io::Seek::rewind(&mut input_file)?;
    let mut child = Killed(command.stdin(input_file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                // What came before an error is still worth showing.
                pipe.read_to_end(&mut bytes).ok();
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.0.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = read(child.0.stderr.take().map(|pipe| Box::new(pipe) as _));
    let status = run::wait(&mut child.0, limit)?;
    let joined = |text: std::thread::JoinHandle<String>| text.join().ok().context("output lost");
    let (out, err) = (joined(out)?, joined(err)?);
    let status = status.with_context(|| format!("not at its end within {limit:?}: {out}{err}"))?;
    Ok(Said { code: status.code(), out, err })
}

/// A server for the program's port-forwards: it says hello, hangs up its own side at a line "enough", and otherwise echoes. Tells what came after
/// it had hung up.
pub fn server() -> Result<(u16, Receiver<String>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let (heard, hears) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let heard = heard.clone();
            std::thread::spawn(move || serve(stream, &heard).ok());
        }
    });
    Ok((port, hears))
}

fn serve(mut stream: TcpStream, heard: &Sender<String>) -> Result<()> {
    stream.write_all(b"hello\n")?;
    let mut bytes = vec![0; 1 << 18];
    loop {
        let count = stream.read(&mut bytes)?;
        let piece = bytes.get(..count).unwrap_or_default();
        if piece == b"enough\n" {
            stream.shutdown(Shutdown::Write)?;
            let mut rest = String::new();
            stream.read_to_string(&mut rest)?;
            return Ok(heard.send(rest)?);
        }
        if count == 0 {
            return Ok(());
        }
        stream.write_all(piece)?;
    }
}
