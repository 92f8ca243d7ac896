//! Drives critest, the conformance suite of the CRI, against one socket, and counts what it says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{place, run, setup};

/// Specs that are not run, each by a part of its name, and why.
pub const LEFT_OUT: &[(&str, &str)] = &[(
    "public image with digest",
    "its image is known by a digest only the original registry has the bytes for",
)];

/// What became of the specs.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Passed.
    pub passed: usize,
    /// Name and message of those that failed.
    pub failed: Vec<(String, String)>,
    /// Name and reason of those that critest skipped or we left out.
    pub skipped: Vec<(String, String)>,
    /// How long it took.
    pub seconds: f64,
}

/// How to run it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only specs whose name matches.
    pub focus: Option<String>,
    /// Print every spec as it goes.
    pub verbose: bool,
    /// Exec, attach and port-forward go over WebSocket; without, over SPDY.
    pub websocket: bool,
}

/// Runs the suite. An error means that it could not be run; failed specs are in the outcome.
pub fn run(socket: &Path, options: &Options) -> Result<Outcome> {
    let program = setup::go_program("critest")?;
    let dir = place::scratch("critest-")?;
    let report = dir.path().join("report.json");
    let mut critest = Command::new(program);
    critest
        .arg(format!("--runtime-endpoint=unix://{}", socket.display()))
        .arg(format!(
            "--ginkgo.skip={}",
            LEFT_OUT.iter().map(|(name, _)| *name).collect::<Vec<_>>().join("|")
        ))
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .args(["--ginkgo.no-color", "--ginkgo.timeout=20m"])
        .current_dir(dir.path());
    if let Some(focus) = &options.focus {
        critest.arg(format!("--ginkgo.focus={focus}"));
    }
    if options.verbose {
        critest.arg("--ginkgo.v");
    }
    if options.websocket {
        critest.args(["--websocket-exec", "--websocket-attach", "--websocket-portforward"]);
    }
    let ended = run::output(&mut critest, Duration::from_secs(25 * 60))?;
    if options.verbose {
        print!("{}", String::from_utf8_lossy(&ended.stdout));
    }
    let text = std::fs::read(&report).with_context(|| {
        let said = String::from_utf8_lossy(&ended.stdout);
        format!(
            "critest wrote no report: {}\n{}",
            run::how(ended.status),
            &said[said.len().saturating_sub(3000)..]
        )
    })?;
    let mut outcome = read(&serde_json::from_slice(&text)?, options.focus.is_some())?;
    if !ended.status.success() && outcome.failed.is_empty() {
        outcome.failed.push(("critest itself".into(), run::how(ended.status)));
    }
    Ok(outcome)
}

/// How much critest's own benchmarks do; one at a time, so that an operation's time is its own.
const BENCHMARK: &str = "containersNumber: 100
containersNumberParallel: 1
containerBenchmarkTimeoutSeconds: 30
podsNumber: 50
podsNumberParallel: 1
podBenchmarkTimeoutSeconds: 30
imagesNumber: 20
imagesNumberParallel: 1
imageBenchmarkTimeoutSeconds: 30
podContainerStartBenchmarkTimeoutSeconds: 30
imagePullingBenchmarkImage: crisp.test/small:1
imageListingBenchmarkImages: [crisp.test/small:1]
";

/// An operation of a benchmark, and the milliseconds of every time it was done, sorted.
pub type Operation = (String, Vec<f64>);

/// Runs critest's own benchmarks.
pub fn benchmark(socket: &Path) -> Result<Vec<Operation>> {
    let dir = place::scratch("critest-")?;
    let (params, results) = (dir.path().join("params.yaml"), dir.path().join("results"));
    std::fs::write(&params, BENCHMARK)?;
    std::fs::create_dir(&results)?;
    let mut critest = Command::new(setup::go_program("critest")?);
    critest
        .arg(format!("--runtime-endpoint=unix://{}", socket.display()))
        .arg("--benchmark")
        .arg(format!("--benchmarking-params-file={}", params.display()))
        .arg(format!("--benchmarking-output-dir={}", results.display()))
        .args(["--ginkgo.no-color", "--ginkgo.timeout=10m"])
        .current_dir(dir.path());
    let said = run::stdout(&mut critest, Duration::from_secs(11 * 60))?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(&results)?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    ensure!(!files.is_empty(), "critest measured nothing: {said}");
    let mut operations = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        operations.extend(durations(&name, &serde_json::from_slice(&std::fs::read(&file)?)?)?);
    }
    Ok(operations)
}

/// The operations of one results file.
fn durations(benchmark: &str, results: &Value) -> Result<Vec<Operation>> {
    let names = results["operationsNames"].as_array().context("no names of operations")?;
    let points = results["datapoints"].as_array().context("no datapoints")?;
    let operation = |(number, name): (usize, &Value)| {
        let name = format!("{benchmark}: {}", name.as_str().unwrap_or_default());
        let nanoseconds = points.iter().filter_map(|point| point["operationsDurationsNs"][number].as_f64());
        let mut times: Vec<f64> = nanoseconds.map(|n| n / 1e6).collect();
        times.sort_by(f64::total_cmp);
        ensure!(!times.is_empty(), "{name} was never done");
        Ok((name, times))
    };
    names.iter().enumerate().map(operation).collect()
}

/// Reads ginkgo's JSON report.
fn read(report: &Value, focused: bool) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let suite = report.get(0).context("the report is empty")?;
    outcome.seconds = suite["RunTime"].as_f64().unwrap_or_default() / 1e9;
    for spec in suite["SpecReports"].as_array().into_iter().flatten() {
        let mut name: Vec<&str> = spec["ContainerHierarchyTexts"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        name.extend(spec["LeafNodeText"].as_str());
        let name = name.join(" ").replace("[k8s.io] ", "");
        let kind = spec["LeafNodeType"].as_str().unwrap_or_default();
        let state = spec["State"].as_str().unwrap_or_default();
        let message = spec["Failure"]["Message"].as_str().unwrap_or_default().trim().to_owned();
        match (kind, state) {
            ("It", "passed") => outcome.passed += 1,
            ("It", "skipped" | "pending") => {
                let reason =
                    LEFT_OUT.iter().find(|(part, _)| name.contains(part)).map(|(_, why)| (*why).to_owned());
                let benchmark =
                    name.contains("benchmark").then(|| "a benchmark, run by flag only".to_owned());
                match reason.or(benchmark).or_else(|| (!message.is_empty()).then_some(message)) {
                    Some(why) => outcome.skipped.push((name, why)),
                    // Outside the focus: not part of this run.
                    None if focused => {}
                    None => outcome.skipped.push((name, "no reason given".into())),
                }
            }
            (_, "passed" | "skipped" | "pending") => {}
            (_, _) => outcome.failed.push((name, message)),
        }
    }
    Ok(outcome)
}

impl Outcome {
    /// Prints what failed and what was skipped, with reasons, and last the counts.
    pub fn print(&self) {
        for (name, message) in &self.failed {
            println!("FAILED {name}\n    {}", message.replace('\n', "\n    "));
        }
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, why) in &self.skipped {
            reasons.entry(why).or_default().push(name);
        }
        for (why, names) in reasons {
            println!("skipped {} because: {why}", names.len());
            for name in names {
                println!("    {name}");
            }
        }
        println!(
            "critest: {} passed, {} failed, {} skipped in {:.0} s",
            self.passed,
            self.failed.len(),
            self.skipped.len(),
            self.seconds
        );
    }
}

/// Settings of the host without which some specs cannot pass on any runtime; changed only when they are other.
pub fn prepare_host() -> Result<()> {
    for (file, value) in
        [("/proc/sys/net/ipv4/ip_forward", "1"), ("/proc/sys/net/ipv4/conf/all/route_localnet", "1")]
    {
        let path = PathBuf::from(file);
        let now = std::fs::read_to_string(&path).with_context(|| format!("read {file}"))?;
        if now.trim() != value {
            std::fs::write(&path, value).with_context(|| format!("write {value} to {file}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_operation_of_a_benchmark_has_its_times() {
        let results = json!({"operationsNames": ["Create", "Remove"], "datapoints": [
            {"operationsDurationsNs": [3e6, 1e6]}, {"operationsDurationsNs": [2e6, 5e6]},
        ]});
        let read = durations("pod", &results).unwrap();
        assert_eq!(
            read,
            [("pod: Create".to_owned(), vec![2.0, 3.0]), ("pod: Remove".to_owned(), vec![1.0, 5.0])]
        );
        assert!(durations("pod", &json!({"operationsNames": ["Create"], "datapoints": []})).is_err());
    }

    #[test]
    fn the_report_is_counted_and_every_skip_has_a_reason() {
        let spec = |text: &str, kind: &str, state: &str, message: &str| {
            json!({"ContainerHierarchyTexts": ["[k8s.io] Group"], "LeafNodeText": text, "LeafNodeType": kind,
                   "State": state, "Failure": {"Message": message}})
        };
        let report = json!([{"RunTime": 2.5e9, "SpecReports": [
            spec("", "BeforeSuite", "passed", ""),
            spec("a", "It", "passed", ""),
            spec("b", "It", "failed", "expected x"),
            spec("public image with digest", "It", "skipped", ""),
            spec("c", "It", "skipped", "no AppArmor"),
            spec("d", "It", "skipped", ""),
        ]}]);
        let outcome = read(&report, false).unwrap();
        assert_eq!((outcome.passed, outcome.skipped.len()), (1, 3));
        assert_eq!(outcome.failed, [("Group b".to_owned(), "expected x".to_owned())]);
        assert_eq!(outcome.skipped[0].1, LEFT_OUT[0].1);
        assert_eq!(read(&report, true).unwrap().skipped.len(), 2);
    }
}
