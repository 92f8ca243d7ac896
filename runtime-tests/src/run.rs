//! Runs programs to their end, with a deadline, and says what failed.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Waits until `done` gives something, asking every 20 ms, for at most `limit`.
pub fn until<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        let last = match done() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > end {
            let why = last.map(|e| format!(": {e:#}")).unwrap_or_default();
            bail!("{what}: not within {limit:?}{why}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs to the end; output goes where ours goes.
pub fn status(command: &mut Command, limit: Duration) -> Result<()> {
    let said = describe(command);
    let mut child = command.stdin(Stdio::null()).spawn().with_context(|| format!("start {said}"))?;
    match wait(&mut child, limit)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("{said}: {}", how(status)),
        None => bail!("{said}: still running after {limit:?}, killed"),
    }
}

/// Runs to the end and keeps the output, whatever the exit code.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let said = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {said}"))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let Some(status) = wait(&mut child, limit)? else {
        bail!("{said}: still running after {limit:?}, killed");
    };
    let collect =
        |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().map_err(|_| anyhow!("{said}: output lost"));
    Ok(Output { status, stdout: collect(stdout)?, stderr: collect(stderr)? })
}

/// Runs to the end and gives stdout; a failure is an error with what was said on stderr.
pub fn stdout(command: &mut Command, limit: Duration) -> Result<String> {
    let said = describe(command);
    let output = output(command, limit)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{said}: {}: {text}", how(output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for a child; kills it at the limit and gives None.
pub fn wait(child: &mut std::process::Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > end {
            child.kill().ok();
            child.wait().ok();
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// How a process ended, in words.
pub fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text.chars().take(300).collect()
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            pipe.read_to_end(&mut kept).ok();
        }
        kept
    })
}

/// Says which part of a test was not run, and why. Past the harness, which shows nothing of tests that pass: the suite
/// counts these lines.
pub fn skipped(what: &str, why: &str) {
    use std::io::Write;
    // Whatever the harness has written of its line ends here.
    writeln!(std::io::stdout().lock(), "\nskipped: {what}: {why}").ok();
}
