//! crictl's exec and attach at a real terminal: sizes, control characters, hanging up.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use runtime_tests::bed::Bed;
use runtime_tests::client::container;
use runtime_tests::crictl::Crictl;
use runtime_tests::image::catalog;
use runtime_tests::run;
use runtime_tests::streams::TRANSPORTS;
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// crictl at a terminal that we hold the other side of.
struct Seat {
    child: Child,
    pty: File,
    seen: Arc<Mutex<String>>,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Seat {
    fn at(crictl: &Crictl, args: &[&str]) -> Result<Seat> {
        let pty = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?);
        unlockpt(&pty)?;
        tcsetwinsize(&pty, size(80, 24))?;
        let name = ptsname(&pty, Vec::new())?.into_string()?;
        let side = || -> Result<Stdio> { Ok(File::options().read(true).write(true).open(&name)?.into()) };
        let mut command = crictl.command(args);
        command.stdin(side()?).stdout(side()?).stderr(side()?);
        let child = command.spawn()?;
        let seen = Arc::<Mutex<String>>::default();
        let (mut reader, text) = (pty.try_clone()?, seen.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // EIO: nobody has the other side any more.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                let piece = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()).into_owned();
                text.lock().unwrap_or_else(|e| e.into_inner()).push_str(&piece);
            }
        });
        Ok(Seat { child, pty, seen })
    }

    fn seen(&self) -> String {
        self.seen.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.pty.write_all(text.as_bytes())?)
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        tcsetwinsize(&self.pty, size(columns, rows))?;
        // The terminal is nobody's controlling one, so the kernel tells no one.
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH)?)
    }

    fn sees(&self, part: &str) -> Result<()> {
        run::until(&format!("the terminal shows {part:?}"), Duration::from_secs(10), || {
            ensure!(self.seen().contains(part), "it shows {:?}", self.seen());
            Ok(Some(()))
        })
    }

    /// Asks for the size until the new one is there: it and the question go different ways.
    fn has_size(&mut self, size: &str) -> Result<()> {
        for _ in 0..50 {
            self.type_in("stty size\r")?;
            std::thread::sleep(Duration::from_millis(100));
            if self.seen().contains(size) {
                return Ok(());
            }
        }
        anyhow::bail!("no {size:?}: {:?}", self.seen())
    }

    fn ends(&mut self) -> Result<Option<i32>> {
        let child = &mut self.child;
        let status = run::until("crictl ends", Duration::from_secs(10), || Ok(child.try_wait()?));
        Ok(status.map_err(|e| e.context(format!("the terminal shows {:?}", self.seen())))?.code())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_shell_at_a_terminal_knows_its_size_and_is_interrupted() -> Result<()> {
    let bed = Bed::new().await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let pod = bed.host_pod("shell").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    for transport in TRANSPORTS {
        let mut seat = Seat::at(&crictl, &["exec", "-r", transport, "-i", "-t", &id, "sh"])?;
        seat.has_size("24 80")?;
        seat.resize(133, 44)?;
        seat.has_size("44 133")?;
        seat.type_in("echo $TERM; sleep 1000; echo interrupted $?\r")?;
        seat.sees("xterm\r\n")?;
        seat.type_in("\x03")?;
        seat.sees("^C")?;
        // The shell takes the whole line back with the command.
        seat.type_in("echo on $((40 + 2))\r")?;
        seat.sees("on 42\r\n")?;
        seat.type_in("exit 7\r")?;
        ensure!(seat.ends()? != Some(0), "{transport}: {}", seat.seen());
        seat.sees("exit code 7")?;
    }
    Ok(())
}

#[tokio::test]
async fn a_terminal_of_a_container_is_attached_to_and_left() -> Result<()> {
    let bed = Bed::new().await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let pod = bed.host_pod("attached").await?;
    let mut config = container("c", catalog::SMALL, "exec sh");
    (config.stdin, config.tty) = (true, true);
    let id = pod.start_with(&config).await?;
    for transport in TRANSPORTS {
        let mut seat = Seat::at(&crictl, &["attach", "-r", transport, "-i", "-t", &id])?;
        seat.has_size("24 80")?;
        seat.resize(99, 31)?;
        seat.has_size("31 99")?;
        // Docker's keys to leave; the container stays.
        seat.type_in("\x10\x11")?;
        seat.ends()?;
        bed.client.sh(&id, "true").await?;
    }
    let mut seat = Seat::at(&crictl, &["attach", "-i", "-t", &id])?;
    seat.type_in("exit 5\r")?;
    seat.ends()?;
    assert_eq!(bed.client.wait_exit(&id).await?.exit_code, 5);
    Ok(())
}
