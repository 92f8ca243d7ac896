//! All checks in one run, as CI makes it: style, unit tests, runtime tests, the upstream suites. Every part runs even
//! when one before it failed; the counts of all are added up, and the sum is the last line.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::daemon::Daemon;
use crate::image::catalog;
use crate::{build, critest, oci, place, registry, run, setup};

/// Counts of one part or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// What passed.
    pub passed: usize,
    /// What failed.
    pub failed: usize,
    /// What was not run, for a reason that was printed.
    pub skipped: usize,
}

/// What a part gives: its counts, or why it could not be run, which counts as one failure.
type Part = fn() -> Result<Counts>;

const QUICK: &[(&str, Part)] = &[
    ("format", format),
    ("spelling", spelling),
    ("clippy", clippy),
    ("unit tests", unit_tests),
    ("documentation", documentation),
    ("dependencies", dependencies),
];

const REST: &[(&str, Part)] = &[
    ("seccomp oracle", seccomp_oracle),
    ("runtime tests", runtime_tests),
    ("oci validation", oci_part),
    ("critest, streaming by SPDY", || critest_part(false)),
    ("critest, streaming by WebSocket", || critest_part(true)),
];

/// What is quick: no pod is made.
pub fn check() -> Result<()> {
    setup::for_demo()?;
    setup::for_style()?;
    parts(QUICK)
}

/// Everything.
pub fn test() -> Result<()> {
    setup::everything().context("make the machine ready")?;
    parts(&[QUICK, REST].concat())
}

fn parts(list: &[(&str, Part)]) -> Result<()> {
    let mut lines = Vec::new();
    let mut sum = Counts::default();
    for (name, part) in list {
        println!("\n==== {name}");
        let started = Instant::now();
        let counts = part().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Counts { failed: 1, ..Counts::default() }
        });
        lines.push(format!(
            "{:<16} {:>5} passed {:>5} failed {:>5} skipped {:>6.0} s",
            name,
            counts.passed,
            counts.failed,
            counts.skipped,
            started.elapsed().as_secs_f64()
        ));
        sum.passed += counts.passed;
        sum.failed += counts.failed;
        sum.skipped += counts.skipped;
    }
    println!("\n==== summary");
    lines.iter().for_each(|line| println!("{line}"));
    // On stdout and last of all: scripts read this line. It is kept in a file too, because make adds a line of its own
    // when something failed.
    let line = format!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    std::fs::write(place::cache()?.join("summary"), format!("{line}\n"))?;
    println!("{line}");
    if sum.failed > 0 { std::process::exit(1) } else { Ok(()) }
}

fn format() -> Result<Counts> {
    whole(&["fmt", "--all", "--check"], &[])
}

fn clippy() -> Result<Counts> {
    whole(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])
}

fn documentation() -> Result<Counts> {
    whole(
        &["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    )
}

fn unit_tests() -> Result<Counts> {
    counted(&[
        "test",
        "--workspace",
        "--exclude",
        "crisp-runtime-tests",
        "--no-fail-fast",
        "--",
        "--test-threads=2",
    ])
}

fn runtime_tests() -> Result<Counts> {
    // Built before, so that no test's deadline runs while cargo does.
    build::programs()?;
    catalog::ensure()?;
    counted(&["test", "-p", "crisp-runtime-tests", "--no-fail-fast", "--", "--test-threads=2"])
}

/// Licences, bans and sources; and advisories where their database can be had, which is a repository on GitHub.
fn dependencies() -> Result<Counts> {
    let deny = |args: &[&str]| {
        let mut deny = Command::new(setup::cargo_program("cargo-deny")?);
        deny.args(args).current_dir(place::repository());
        run::status(&mut deny, Duration::from_secs(300))
    };
    deny(&["check", "licenses", "bans", "sources"])?;
    if let Err(error) = deny(&["fetch", "db"]) {
        println!("skipped: advisories: their database cannot be fetched: {error:#}");
        return Ok(Counts { passed: 1, skipped: 1, ..Counts::default() });
    }
    deny(&["--offline", "check", "advisories"])?;
    Ok(Counts { passed: 2, ..Counts::default() })
}

fn spelling() -> Result<Counts> {
    let mut typos = Command::new(setup::cargo_program("typos")?);
    run::status(typos.current_dir(place::repository()), Duration::from_secs(60))?;
    Ok(Counts { passed: 1, ..Counts::default() })
}

/// Our seccomp programs beside those of libseccomp, which not every machine has.
fn seccomp_oracle() -> Result<Counts> {
    counted(&["test", "-p", "crisp-container", "--lib", "--features", "oracle", "seccomp"])
}

fn oci_part() -> Result<Counts> {
    build::cargo(&["build", "--release", "--quiet", "-p", "crisp-oci"])?;
    let summary = oci::run(&place::target()?.join("release/crisp-oci"), &place::cache()?)?;
    Ok(Counts { passed: summary.passed, failed: summary.failed.len(), skipped: summary.left_out.len() })
}

fn critest_part(websocket: bool) -> Result<Counts> {
    critest::prepare_host()?;
    let images = registry::Docker::start(&catalog::ensure()?)?;
    let daemon = Daemon::start(images.address())?;
    let outcome = critest::run(&daemon.socket(), &critest::Options { websocket, ..Default::default() })?;
    outcome.print();
    if !outcome.failed.is_empty() {
        println!("{}", daemon.tail());
    }
    Ok(Counts { passed: outcome.passed, failed: outcome.failed.len(), skipped: outcome.skipped.len() })
}

/// A cargo command that passes or fails as a whole.
fn whole(args: &[&str], env: &[(&str, &str)]) -> Result<Counts> {
    let mut cargo = build::cargo_command(args)?;
    cargo.envs(env.iter().copied()).stdin(Stdio::null());
    let status = cargo.status().context("start cargo")?;
    if !status.success() {
        bail!("cargo {}: {}", args.join(" "), run::how(status));
    }
    Ok(Counts { passed: 1, ..Counts::default() })
}

/// A cargo test command, its results counted while they are shown.
fn counted(args: &[&str]) -> Result<Counts> {
    let mut cargo: Command = build::cargo_command(args)?;
    let mut child = cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start cargo")?;
    let mut counts = Counts::default();
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines() {
            let line = line?;
            println!("{line}");
            counts.skipped += usize::from(line.starts_with("skipped: "));
            if let Some(some) = result_line(&line) {
                counts.passed += some.passed;
                counts.failed += some.failed;
                counts.skipped += some.skipped;
            }
        }
    }
    let status = child.wait()?;
    // A test program that does not compile or dies has no result line.
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    Ok(counts)
}

/// Reads "test result: ok. 3 passed; 0 failed; 1 ignored; …".
fn result_line(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |word: &str| {
        rest.split("; ").find_map(|part| part.strip_suffix(word)).and_then(|n| n.trim().parse::<usize>().ok())
    };
    Some(Counts { passed: number(" passed")?, failed: number(" failed")?, skipped: number(" ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_of_cargo_are_understood() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.11s";
        assert_eq!(result_line(line), Some(Counts { passed: 12, failed: 2, skipped: 1 }));
        assert_eq!(result_line("test a::b ... ok"), None);
    }
}
