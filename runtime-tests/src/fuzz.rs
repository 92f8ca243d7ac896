//! Runs the fuzz targets in `fuzz/`, one after the other. What they found stays in the cache for the next run; what
//! is committed in `fuzz/seeds` is where a fresh machine begins.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{place, run, setup};

/// What is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seconds for each target.
    pub seconds: u64,
    /// Only this one.
    pub target: Option<String>,
}

/// The longest input. Nothing that is read becomes different beyond it, only slower.
const LONGEST: usize = 16 << 10;

/// Builds and runs them. All are run, whatever one finds.
pub fn run(options: &Options) -> Result<()> {
    let program = setup::for_fuzzing()?;
    let cargo_fuzz = |args: &[&str]| -> Result<Command> {
        let mut command = Command::new(&program);
        command.arg("fuzz").args(args).current_dir(place::repository().join("fuzz"));
        Ok(command)
    };
    let all = run::stdout(&mut cargo_fuzz(&["list"])?, Duration::from_secs(60))?;
    let targets: Vec<&str> =
        all.lines().filter(|name| options.target.as_ref().is_none_or(|wanted| wanted == name)).collect();
    ensure!(!targets.is_empty(), "there is no such target; there are: {}", all.replace('\n', " "));
    let build = place::target()?.join("fuzz").display().to_string();
    let mut failed = Vec::new();
    for target in targets {
        let found = place::cache()?.join("fuzz").join(target);
        let seeds = place::repository().join("fuzz/seeds").join(target);
        std::fs::create_dir_all(&found).with_context(|| format!("make {}", found.display()))?;
        // Without a sanitizer, which takes a nightly compiler: nothing that is fuzzed is unsafe code of ours.
        let mut fuzz = cargo_fuzz(&["run", "--sanitizer", "none", "--target-dir", &build, target])?;
        fuzz.args([&found, &seeds]).arg("--").args([
            format!("-max_total_time={}", options.seconds),
            format!("-max_len={LONGEST}"),
            "-timeout=5".into(),
            "-rss_limit_mb=1024".into(),
            "-print_final_stats=1".into(),
        ]);
        println!("\n==== {target}");
        if let Err(error) = run::status(&mut fuzz, Duration::from_secs(options.seconds + 3600)) {
            println!("{target}: {error:#}");
            failed.push(target);
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("found something: {}", failed.join(" ")) }
}
