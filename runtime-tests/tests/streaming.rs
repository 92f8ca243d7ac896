//! Exec, attach and port-forward as the clients of Kubernetes have them: client-go's own executors and dialers over
//! SPDY and WebSocket. Terminals are in `terminals.rs`, clients that do what they must not in `bad_clients.rs`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use runtime_tests::bed::{Bed, wait_log};
use runtime_tests::client::container;
use runtime_tests::crictl::Crictl;
use runtime_tests::image::catalog;
use runtime_tests::streams::{self, Killed, TRANSPORTS, fed, fed_within};
use runtime_tests::{run, traces};
use rustix::fs::{CWD, FileType, Mode, mknodat};

/// Lines of 64 KiB that are poured each way: a quarter of a gibibyte, or what CRISP_POUR says in MiB.
fn lines() -> Result<usize> {
    Ok(match std::env::var("CRISP_POUR") {
        Ok(mebibytes) => mebibytes.parse::<usize>()? * 16,
        Err(_) => 256 * 16,
    })
}

#[tokio::test]
async fn a_command_has_the_streams_and_the_exit_code_of_its_client() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("exec").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    for transport in ["spdy", "websocket", "fallback"] {
        for (end, code) in [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)] {
            // The half-close of stdin is what ends cat.
            let url = streams::exec(&bed.client, &id, true, &format!("cat; echo err >&2; {end}")).await?;
            let said = fed(&mut streams::command(&["exec", "-r", transport, "-i", &url])?, b"some input\n")?;
            assert_eq!((said.code, said.out.as_str()), (Some(code), "some input\n"), "{transport}: {said:?}");
            assert!(said.err.starts_with("err\n"), "{transport}: {said:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_end_of_a_command_is_told_whatever_holds_its_streams() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("ends").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    for transport in TRANSPORTS {
        // A child that holds the pipes, with nothing to say.
        let url = streams::exec(&bed.client, &id, false, "sleep 1000 & echo begun; exit 4").await?;
        let said = fed(&mut streams::command(&["exec", "-r", transport, &url])?, b"")?;
        assert_eq!((said.code, said.out.as_str()), (Some(4), "begun\n"), "{transport}");
        // One that has: it comes before the end is told.
        let url = streams::exec(&bed.client, &id, false, "(sleep 0.5; echo late) & exit 5").await?;
        let said = fed(&mut streams::command(&["exec", "-r", transport, &url])?, b"")?;
        assert_eq!((said.code, said.out.as_str()), (Some(5), "late\n"), "{transport}");
        // A client whose stdin is open.
        let url = streams::exec(&bed.client, &id, true, "exit 6").await?;
        let mut client = Killed::spawn(&mut streams::command(&["exec", "-r", transport, "-i", &url])?)?;
        let status = run::until("the client ends", Duration::from_secs(10), || Ok(client.0.try_wait()?))?;
        assert_eq!(status.code(), Some(6), "{transport}");
    }
    Ok(())
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_input_of_its_command() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("leaves").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    for transport in TRANSPORTS {
        let script = format!("echo begun; cat; echo said to nobody; echo over > /{transport}");
        let url = streams::exec(&bed.client, &id, true, &script).await?;
        let mut client = Killed::spawn(&mut streams::command(&["exec", "-r", transport, "-i", &url])?)?;
        let mut line = String::new();
        BufReader::new(client.0.stdout.take().context("no stdout")?).read_line(&mut line)?;
        assert_eq!(line, "begun\n");
        drop(client);
        let mut said = None;
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            said = bed.client.sh(&id, &format!("cat /{transport}")).await.ok();
            if said.is_some() {
                break;
            }
        }
        assert_eq!(said.as_deref(), Some("over"), "{transport}");
    }
    fifos_gone(&bed)
}

#[tokio::test]
async fn the_first_attached_input_is_the_only_one_with_stdin_once() -> Result<()> {
    let bed = Bed::new().await?;
    for transport in TRANSPORTS {
        let pod = bed.host_pod("attach").await?;
        let script = "while read line; do echo got $line; done; echo over";
        let mut config = container("c", catalog::SMALL, script);
        (config.stdin, config.stdin_once) = (true, true);
        let id = pod.start_with(&config).await?;
        let url = streams::attach(&bed.client, &id, true, false).await?;
        let said = fed(&mut streams::command(&["exec", "-r", transport, "-i", &url])?, b"one\ntwo\n")?;
        assert_eq!((said.code, said.out.as_str()), (Some(0), "got one\ngot two\nover\n"), "{transport}");
        // The log has it too.
        wait_log(&pod.log("c"), "over\n")?;
        pod.remove().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_terminal_has_the_size_of_its_client() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("sizes").await?;
    let script = "while read line; do echo $line $(stty size); done";
    let mut config = container("c", catalog::SMALL, script);
    (config.stdin, config.tty) = (true, true);
    let id = pod.start_with(&config).await?;
    for transport in TRANSPORTS {
        for attach in [false, true] {
            let url = match attach {
                true => streams::attach(&bed.client, &id, true, true).await?,
                false => streams::exec_tty(&bed.client, &id, script).await?,
            };
            let dir = tempfile::tempdir()?;
            let sizes = dir.path().join("sizes");
            mknodat(CWD, &sizes, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            let named = sizes.to_string_lossy();
            let args = ["exec", "-r", transport, "-t", &named, "-i", &url];
            let mut client = Killed::spawn(&mut streams::command(&args)?)?;
            let mut size = std::fs::File::options().write(true).open(&sizes)?;
            let mut stdin = client.0.stdin.take().context("no stdin")?;
            let mut out = BufReader::new(client.0.stdout.take().context("no stdout")?);
            for (say, expect) in [("80x24\n", "24 80"), ("101x33\n", "33 101")] {
                size.write_all(say.as_bytes())?;
                let mut line = String::new();
                // A size overtakes input and the other way round: asked until it is there.
                let end = Instant::now() + Duration::from_secs(10);
                while !line.contains(expect) {
                    ensure!(Instant::now() < end, "{transport}: no {expect}, last {line:?}");
                    stdin.write_all(b"size\n")?;
                    for _ in 0..2 {
                        line.clear();
                        out.read_line(&mut line)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_byte_arrives_both_ways() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("pour").await?;
    let id = pod.start_with(&container("c", catalog::TOOLS, "exec sleep 1000")).await?;
    let lines = lines()?;
    let limit = Duration::from_secs(120);
    let (count, bytes) = (lines.to_string(), lines << 16);
    let flood = format!("exec flood {count} 65536");
    let url = streams::exec(&bed.client, &id, false, &format!("{flood} | sha256sum")).await?;
    let sum = fed_within(&mut streams::command(&["exec", &url])?, b"", limit)?.out;
    let sum = sum.split(' ').next().context("no sum")?;
    ensure!(sum.len() == 64, "sum {sum:?}");
    for transport in TRANSPORTS {
        let clock = Instant::now();
        let url = streams::exec(&bed.client, &id, true, "sha256sum").await?;
        let mut command = streams::command(&["exec", "-r", transport, "-lines", &count, &url])?;
        let said = fed_within(&mut command, b"", limit)?;
        assert_eq!(said.out.split(' ').next(), Some(sum), "in, {transport}: {}", said.err);
        println!("in, {transport}: {bytes} bytes, {:.1} s", clock.elapsed().as_secs_f64());

        let clock = Instant::now();
        let url = streams::exec(&bed.client, &id, false, &flood).await?;
        let said = fed_within(&mut streams::command(&["exec", "-r", transport, "-sum", &url])?, b"", limit)?;
        assert_eq!(said.out.trim(), format!("{bytes} {sum}"), "out, {transport}: {}", said.err);
        println!("out, {transport}: {bytes} bytes, {:.1} s", clock.elapsed().as_secs_f64());
    }
    Ok(())
}

#[tokio::test]
async fn a_client_that_reads_gets_all_of_a_container_that_prints_fast() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    for transport in TRANSPORTS {
        let pod = bed.host_pod("fast").await?;
        let mut config =
            container("c", catalog::TOOLS, "read begin; flood 800000 64 | tee /sum; sha256sum < /sum");
        (config.stdin, config.stdin_once) = (true, true);
        let id = pod.start_with(&config).await?;
        let url = streams::attach(&bed.client, &id, true, false).await?;
        let said = fed(&mut streams::command(&["exec", "-r", transport, "-i", "-sum", &url])?, b"go\n")?;
        // And the line of the sum itself.
        let length = 800_000 * 64 + 64 + " -\n".len() + 1;
        ensure!(said.out.starts_with(&format!("{length} ")), "{transport}: {said:?}");
        pod.remove().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_thousand_commands_at_once_leave_nothing_behind() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("many").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let (daemon, shim) = (bed.daemon.pid(), bed.daemon.shim(&pod.id)?);
    let many = async |transport: &str, count: usize, at: usize, script: &str| -> Result<()> {
        let mut urls = String::new();
        for _ in 0..count {
            urls += &streams::exec(&bed.client, &id, false, script).await?;
            urls.push('\n');
        }
        let mut command = streams::command(&["many", "-r", transport, "-at", &at.to_string()])?;
        let said = fed_within(&mut command, urls.as_bytes(), Duration::from_secs(120))?;
        let good = said.out.lines().filter(|line| line.starts_with("3 ")).count();
        ensure!(good == count, "{transport}: {good} of {count}: {said:?}");
        Ok(())
    };
    // What is made once and stays.
    many("spdy", 64, 64, "echo ok").await?;
    let before = bed.daemon.traces();
    let descriptors = |pid| traces::descriptors(pid);
    let open = (descriptors(daemon), descriptors(shim));
    for (transport, at) in [("spdy", 8), ("spdy", 64), ("websocket", 64)] {
        many(transport, 200, at, "echo ok").await?;
    }
    // All of them open at the same time.
    many("spdy", 1000, 1000, "echo ok; sleep 3").await?;
    bed.nothing_left(&before)?;
    run::until("descriptors are given back", Duration::from_secs(10), || {
        let now = (descriptors(daemon), descriptors(shim));
        ensure!(now.0 <= open.0 + 2 && now.1 <= open.1, "{open:?} before, {now:?} after");
        Ok(Some(()))
    })?;
    bed.unmoved(daemon)
}

#[tokio::test]
async fn forwarded_connections_live_side_by_side_and_hang_up_one_way_at_a_time() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("forwards").await?;
    let (port, hears) = streams::server()?;
    let port = port.to_string();
    let refused = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let before = traces::descriptors(bed.daemon.pid());
    for transport in TRANSPORTS {
        let url = streams::forward(&bed.client, &pod.id).await?;
        let args = ["forward", "-r", transport, "-refused", &refused, "-parallel", "200", &url, &port];
        let said = fed(&mut streams::command(&args)?, b"")?;
        assert_eq!(said.code, Some(0), "{transport}: {said:?}");
        ensure!(said.out.starts_with("refused: ") && said.out.contains(&refused), "{transport}: {said:?}");
        assert_eq!(hears.recv_timeout(Duration::from_secs(5))?, "still heard", "{transport}");
    }
    run::until("the connections are gone", Duration::from_secs(10), || {
        let now = traces::descriptors(bed.daemon.pid());
        ensure!(now <= before + 2, "{before} descriptors before, {now} after");
        Ok(Some(()))
    })
}

#[tokio::test]
async fn a_forwarded_port_is_one_of_the_pod() -> Result<()> {
    let bed = Bed::new().await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let pod = bed.pod("forward").await?;
    let id = pod.start("c", "while true; do echo from the pod | nc -l -p 7777 127.0.0.1; done").await?;
    for transport in TRANSPORTS {
        // A client gives up at the first refusal.
        while bed.client.sh(&id, "grep '0100007F:1E61 00000000:0000 0A' /proc/net/tcp").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let _forward = Killed(
            crictl
                .command(&["port-forward", "-r", transport, &pod.id, &format!("{port}:7777")])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?,
        );
        run::until("the port answers", Duration::from_secs(20), || {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return Ok(None) };
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut said = vec![0; 13];
            Ok(stream.read_exact(&mut said).is_ok_and(|()| said == b"from the pod\n").then_some(()))
        })?;
    }
    Ok(())
}

/// Waits until no FIFO of a command or a client is there any more.
fn fifos_gone(bed: &Bed) -> Result<()> {
    run::until("no FIFO is left", Duration::from_secs(10), || {
        let left = traces::files(&bed.daemon.state().join("io"));
        ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
}
