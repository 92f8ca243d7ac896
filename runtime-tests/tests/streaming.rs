//! Exec, attach and port-forward as crictl's users have them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use runtime_tests::bed::Bed;
use runtime_tests::client::container;
use runtime_tests::crictl::Crictl;
use runtime_tests::image::catalog;
use runtime_tests::run;

/// A child that does not outlive the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs to the end with some input.
fn fed(command: &mut Command, input: &[u8]) -> Result<(Option<i32>, String)> {
    let mut child =
        Killed(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    child.0.stdin.take().context("no stdin")?.write_all(input)?;
    let status = run::until("crictl ends", Duration::from_secs(30), || Ok(child.0.try_wait()?))?;
    let mut said = String::new();
    child.0.stdout.take().context("no stdout")?.read_to_string(&mut said)?;
    child.0.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
    Ok((status.code(), said))
}

#[tokio::test]
async fn a_command_has_the_streams_and_the_exit_code_of_its_client() -> Result<()> {
    for transport in ["spdy", "websocket"] {
        let bed = Bed::new().await?;
        let crictl = Crictl::new(&bed.daemon.socket())?;
        let pod = bed.host_pod("exec").await?;
        let id = pod.start("c", "exec sleep 1000").await?;
        let exec = |flags: &[&str], script: &str, input: &[u8]| {
            let head = ["exec", "-r", transport];
            fed(&mut crictl.command(&[&head, flags, &[&id, "sh", "-c", script]].concat()), input)
        };
        let (code, said) = exec(&["-i"], "cat; echo end", b"some input\n")?;
        assert_eq!((code, said.as_str()), (Some(0), "some input\nend\n"), "{transport}");
        let (_, said) = exec(&[], "echo out; echo err >&2; exit 3", b"")?;
        assert!(said.contains("out\n") && said.contains("err\n") && said.contains("exit code 3"), "{said}");
        pod.remove().await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_attached_client_is_heard_and_hears() -> Result<()> {
    let bed = Bed::new().await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let pod = bed.host_pod("attach").await?;
    let mut config = container("c", catalog::SMALL, "while read line; do echo got $line; done; echo over");
    (config.stdin, config.stdin_once) = (true, true);
    let id = pod.start_with(&config).await?;
    let (code, said) = fed(&mut crictl.command(&["attach", "-i", &id]), b"one\ntwo\n")?;
    assert_eq!((code, said.as_str()), (Some(0), "got one\ngot two\nover\n"));
    // The log has it too.
    runtime_tests::bed::wait_log(&pod.log("c"), "over\n")?;
    Ok(())
}

#[tokio::test]
async fn a_forwarded_port_is_one_of_the_pod() -> Result<()> {
    let bed = Bed::new().await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let pod = bed.pod("forward").await?;
    pod.start("c", "while true; do echo from the pod | nc -l -p 7777 127.0.0.1; done").await?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let _forward = Killed(
        crictl
            .command(&["port-forward", &pod.id, &format!("{port}:7777")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    run::until("the port answers", Duration::from_secs(20), || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return Ok(None) };
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut said = vec![0; 13];
        Ok(stream.read_exact(&mut said).is_ok_and(|()| said == b"from the pod\n").then_some(()))
    })
}
