//! Clients of streams that do what they must not, or cannot go on: nothing of it holds up a container, its log, other
//! clients or the daemon.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use runtime_tests::bed::{Bed, said};
use runtime_tests::client::container;
use runtime_tests::crictl::Crictl;
use runtime_tests::image::catalog;
use runtime_tests::streams::{self, Killed, TRANSPORTS, fed};
use runtime_tests::{run, traces};

/// Status line of a POST without a body.
fn post(url: &str) -> Result<String> {
    let (host, path) =
        url.trim_start_matches("http://").split_once('/').with_context(|| format!("URL {url}"))?;
    let mut socket = TcpStream::connect(host)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        socket,
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

#[tokio::test]
async fn a_url_works_once() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("tokens").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let url = streams::exec(&bed.client, &id, false, "true").await?;
    ensure!(post(&format!("{url}x"))?.contains(" 404 "));
    ensure!(post(&url)?.contains(" 101 "));
    ensure!(post(&url)?.contains(" 404 "));
    Ok(())
}

#[tokio::test]
async fn a_client_that_stops_reading_holds_up_nobody() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    for transport in TRANSPORTS {
        let pod = bed.host_pod(&format!("stuck-{transport}")).await?;
        let lines = 600_000;
        let script = format!("read begin; exec flood {lines} 64");
        let mut config = container("c", catalog::TOOLS, &script);
        (config.stdin, config.stdin_once) = (true, true);
        let id = pod.start_with(&config).await?;
        // What they would print stays in their pipes.
        let mut stuck = Vec::new();
        for _ in 0..3 {
            let url = streams::attach(&bed.client, &id, false, false).await?;
            stuck.push(Killed::spawn(&mut streams::command(&["exec", "-r", transport, &url])?)?);
        }
        // Until all of them are there; their connections are not seen from outside.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = resident(bed.daemon.pid())?;
        let url = streams::attach(&bed.client, &id, true, false).await?;
        let good = fed(&mut streams::command(&["exec", "-r", transport, "-i", "-sum", &url])?, b"go\n")?;
        ensure!(good.out.starts_with(&format!("{} ", lines * 64)), "{transport}: {good:?}");
        assert_eq!(bed.client.wait_exit(&id).await?.exit_code, 0);
        let text = said(&pod.log("c"))?;
        assert_eq!(text.len(), lines * 64, "{transport}: the log is not whole");
        let grown = resident(bed.daemon.pid())?.saturating_sub(before);
        ensure!(grown < 16 << 20, "{transport}: the daemon has grown by {grown} bytes");
        drop(stuck);
        pod.remove().await?;
    }
    fifos_gone(&bed)
}

#[tokio::test]
async fn a_command_whose_client_vanishes_runs_to_its_end() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("vanished").await?;
    let id = pod.start_with(&container("c", catalog::TOOLS, "exec sleep 1000")).await?;
    let before = traces::descriptors(bed.daemon.pid());
    for transport in TRANSPORTS {
        let script = format!("flood 1600 65536; echo $? > /{transport}");
        let url = streams::exec(&bed.client, &id, false, &script).await?;
        let mut client = Killed::spawn(&mut streams::command(&["exec", "-r", transport, &url])?)?;
        let mut some = vec![0; 1 << 16];
        client.0.stdout.as_mut().context("no stdout")?.read_exact(&mut some)?;
        // With bytes on the way that nobody reads, the kernel resets the connection.
        drop(client);
        let end = Instant::now() + Duration::from_secs(10);
        while bed.client.sh(&id, &format!("grep -x 0 /{transport}")).await.is_err() {
            ensure!(Instant::now() < end, "{transport}: the command has not ended well");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    fifos_gone(&bed)?;
    run::until("descriptors are given back", Duration::from_secs(10), || {
        let now = traces::descriptors(bed.daemon.pid());
        ensure!(now <= before + 2, "{before} before, {now} after");
        Ok(Some(()))
    })
}

#[tokio::test]
async fn the_keys_of_the_configuration_are_obeyed() -> Result<()> {
    let port = std::net::TcpListener::bind("127.0.0.2:0")?.local_addr()?.port();
    let bed = Bed::with(catalog::ensure()?, |options| {
        options.extra = format!(
            "[stream]\nstream_server_address = \"127.0.0.2\"\nstream_server_port = {port}\n\
             stream_idle_timeout = \"1s\"\n"
        );
    })
    .await?;
    bed.client.pull(catalog::SMALL).await?;
    let pod = bed.host_pod("keys").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let url = streams::exec(&bed.client, &id, false, "sleep 4; echo late").await?;
    ensure!(url.starts_with(&format!("http://127.0.0.2:{port}/exec/")), "{url}");
    let said = fed(&mut streams::command(&["exec", &url])?, b"")?;
    ensure!(said.code != Some(0) && said.out.is_empty() && said.err.contains("idle"), "{said:?}");
    Ok(())
}

#[tokio::test]
async fn with_tls_only_those_who_trust_the_certificate_are_served() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (certificate, key) = (at("cert.pem"), at("key.pem"));
    let mut make = std::process::Command::new("openssl");
    make.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ])
    .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
    .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", &key, "-out", &certificate]);
    let made = run::output(&mut make, Duration::from_secs(30))?;
    ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    let bed = Bed::with(catalog::ensure()?, |options| {
        options.extra = format!(
            "[stream]\nenable_tls_streaming = true\n[stream.x509_key_pair_streaming]\n\
             tls_cert_file = {certificate:?}\ntls_key_file = {key:?}\n"
        );
    })
    .await?;
    bed.client.pull(catalog::SMALL).await?;
    let pod = bed.host_pod("tls").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    for transport in TRANSPORTS {
        let url = streams::exec(&bed.client, &id, true, "cat; exit 3").await?;
        ensure!(url.starts_with("https://"), "{url}");
        let args = ["exec", "-r", transport, "-ca", &certificate, "-i", &url];
        let said = fed(&mut streams::command(&args)?, b"secret\n")?;
        assert_eq!((said.code, said.out.as_str()), (Some(3), "secret\n"), "{transport}: {said:?}");
        let url = streams::exec(&bed.client, &id, false, "echo seen").await?;
        let said = fed(&mut streams::command(&["exec", "-r", transport, &url])?, b"")?;
        ensure!(said.out.is_empty() && said.err.contains("certificate"), "{transport}: {said:?}");
        // crictl wants a certificate of its own as well, which nobody asks it for.
        let flags = ["exec", "-r", transport, "--tls-ca", &certificate, "--tls-cert", &certificate];
        let args = [&flags[..], &["--tls-key", &key, &id, "echo", "by crictl"]].concat();
        assert_eq!(crictl.run(&args)?, "by crictl", "{transport}");
        // A whole mebibyte, so that records and frames do not match.
        let url = streams::exec(&bed.client, &id, true, "cat").await?;
        let args = ["exec", "-r", transport, "-ca", &certificate, "-lines", "64", "-sum", &url];
        let said = fed(&mut streams::command(&args)?, b"")?;
        ensure!(said.out.starts_with("4194304 "), "{transport}: {said:?}");
    }
    Ok(())
}

// The client answers the daemon's goodbye while the test waits for its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn clients_are_told_when_the_daemon_ends_and_the_container_runs_on() -> Result<()> {
    for transport in TRANSPORTS {
        let mut bed = Bed::new().await?;
        let pod = bed.host_pod(&format!("ending-{transport}")).await?;
        let mut config = container("c", catalog::SMALL, "while read line; do echo $line; done; echo closed");
        config.stdin = true;
        let id = pod.start_with(&config).await?;
        let url = streams::attach(&bed.client, &id, true, false).await?;
        let mut attached = Killed::spawn(&mut streams::command(&["exec", "-r", transport, "-i", &url])?)?;
        let url = streams::exec(&bed.client, &id, true, "cat; true").await?;
        let mut command = Killed::spawn(&mut streams::command(&["exec", "-r", transport, "-i", &url])?)?;
        command.0.stdin.as_mut().context("no stdin")?.write_all(b"a")?;
        let mut byte = [0];
        command.0.stdout.as_mut().context("no stdout")?.read_exact(&mut byte)?;
        let clock = Instant::now();
        bed.daemon.stop()?;
        ensure!(clock.elapsed() < Duration::from_secs(5), "the end took {:?}", clock.elapsed());
        for client in [&mut attached, &mut command] {
            let status = run::until("a client ends", Duration::from_secs(10), || Ok(client.0.try_wait()?))?;
            ensure!(status.code() != Some(0), "{transport}: a client thinks that all went well");
        }
        bed.restart().await?;
        // The command is gone; the container is not, and its stdin is open.
        bed.client.sh(&id, "while pidof cat; do sleep 0.1; done").await?;
        ensure!(!said(&pod.log("c"))?.contains("closed"), "{transport}: the container's stdin was closed");
        ensure!(fifos_gone(&bed).is_ok());
    }
    Ok(())
}

/// Bytes of memory that are a process's own.
fn resident(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("0 kB");
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Waits until no FIFO of a command or a client is there any more.
fn fifos_gone(bed: &Bed) -> Result<()> {
    run::until("no FIFO is left", Duration::from_secs(10), || {
        let left = traces::files(&bed.daemon.state().join("io"));
        ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
}
