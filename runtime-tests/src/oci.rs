//! Drives the validation suite of opencontainers/runtime-tools against our OCI command line, and counts what it says.
//! The suite is a program for each property; it writes TAP, and wraps the TAP of a program that it runs in the
//! container into that.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{place, run};

const PACKAGE: &str = "github.com/opencontainers/runtime-tools";

/// Programs that are not run, and why. The suite is older than the specification in places; where they differ we
/// follow the specification (1.3), as runc and crun do.
const PROGRAMS: &[(&str, &str)] = &[
    ("hooks", "can never pass: its hooks write `post-start1 called` and it looks for `post-start1`"),
    ("prestart", "wants prestart hooks at `start`; config.md has them in `create`"),
    ("poststart_fail", "wants a warning; runtime.md, step 9 of the lifecycle, wants an error"),
    ("process_capabilities_fail", "wants an error for an unknown capability; config.md wants a warning"),
    ("pidfile", "signals a container whose `true` has ended long ago, which must be an error"),
    ("linux_ns_itype", "a container without a mount namespace of its own is refused"),
];

/// Programs that are not run when this host lacks something, by the file that would be there.
const HOST: &[(&str, &str, &str)] = &[
    ("linux_cgroups_hugetlb", "/sys/fs/cgroup/hugetlb", "no hugetlb controller on v1"),
    ("linux_cgroups_relative_hugetlb", "/sys/fs/cgroup/hugetlb", "no hugetlb controller on v1"),
    ("linux_cgroups_network", "/sys/fs/cgroup/net_cls", "no net_cls controller"),
    ("linux_cgroups_relative_network", "/sys/fs/cgroup/net_cls", "no net_cls controller"),
    ("linux_cgroups_blkio", "/sys/fs/cgroup/blkio/blkio.leaf_weight", "no CFQ since Linux 5.0"),
    ("linux_cgroups_relative_blkio", "/sys/fs/cgroup/blkio/blkio.leaf_weight", "no CFQ since Linux 5.0"),
    ("linux_process_apparmor_profile", "/sys/kernel/security/apparmor", "no AppArmor"),
    ("linux_mount_label", "/sys/fs/selinux", "no SELinux"),
];

/// Assertions that do not count when they fail: the program (empty: any), a part of the text, and why.
const ASSERTIONS: &[(&str, &str, &str)] = &[
    (
        "",
        "found in order",
        "takes the order of mountinfo for that of mounting; since 6.8 it is that of creation, and ours are \
         created detached before the first is attached",
    ),
    ("", "pids limit is set correctly", "compares the address of the limit"),
    ("hooks_stdin", "passed to \"prestart\"", "wants status `created` while the container is being created"),
    ("linux_cgroups_memory", "memory kernel is", "kernel memory has had no limit since Linux 5.16"),
    ("linux_cgroups_relative_memory", "memory kernel is", "kernel memory has had no limit since Linux 5.16"),
    ("linux_ns_path", "set mnt namespace by path", "a container has a mount namespace of its own"),
    ("misc_props", "unknown annotation key", "starts a program that is not in its bundle"),
    ("process_capabilities", "CAP_SYS_RESOURCE", "not ours to give on a host without it"),
    ("process_rlimits", "soft RLIMIT_NOFILE", "Go raises its own limit before its program can look"),
    ("start", "exit status 1", "wants `create` to take a container without a process"),
];

/// How long one program may take: most wait for whole seconds, several times.
const LIMIT: Duration = Duration::from_secs(120);

/// What became of the assertions.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Held.
    pub passed: usize,
    /// Program and text of those that did not.
    pub failed: Vec<(String, String)>,
    /// Skipped by the suite itself: properties that a bundle does not set.
    pub skipped: usize,
    /// Program or program and text, and why.
    pub left_out: Vec<(String, &'static str)>,
    /// Programs that were run.
    pub programs: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (what, why) in &self.left_out {
            reasons.entry(why).or_default().push(what);
        }
        for (why, what) in reasons {
            let others = match what.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            writeln!(f, "oci: left out: {}{others}: {why}", what.first().unwrap_or(&""))?;
        }
        for (program, what) in &self.failed {
            writeln!(f, "oci: FAILED: {program}: {what}")?;
        }
        write!(
            f,
            "oci: {} programs, {} assertions passed, {} failed, {} left out, {} not applicable",
            self.programs,
            self.passed,
            self.failed.len(),
            self.left_out.len(),
            self.skipped
        )
    }
}

/// Builds the suite into `cache`, runs it against `crisp_oci`, and prints the sum. Failed assertions are in the result.
pub fn run(crisp_oci: &Path, cache: &Path) -> Result<Summary> {
    let suite = build(cache)?;
    let place = place::scratch("crisp-oci-")?;
    let wrapper = wrap(crisp_oci, place.path())?;
    let mut summary = Summary::default();
    for program in programs(&suite.join("bin"))? {
        let missing = HOST.iter().find(|(name, path, _)| *name == program && !Path::new(path).exists());
        let unwanted = PROGRAMS.iter().find(|(name, _)| *name == program).map(|(_, why)| *why);
        if let Some(why) = unwanted.or(missing.map(|(.., why)| *why)) {
            summary.left_out.push((program, why));
            continue;
        }
        summary.programs += 1;
        let bundles = place.path().join("bundles");
        std::fs::create_dir_all(&bundles)?;
        let mut command = Command::new(suite.join("bin").join(&program));
        command.current_dir(&suite).env("RUNTIME", &wrapper).env("TMPDIR", &bundles);
        match run::output(&mut command, LIMIT) {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout);
                count(&program, &text, &mut summary);
                if !output.status.success() {
                    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                    summary.failed.push((program.clone(), format!("{}: {said}", run::how(output.status))));
                }
            }
            Err(error) => summary.failed.push((program.clone(), format!("{error:#}"))),
        }
        clean(&wrapper, &bundles)?;
    }
    println!("{summary}");
    Ok(summary)
}

/// The suite's programs, what they run in containers, and the root file system of their bundles.
fn build(cache: &Path) -> Result<PathBuf> {
    let source = place::package().join("go/oci-validation");
    let output = cache.join("go/oci-validation");
    let version = run::stdout(
        go(&source).args(["list", "-mod=readonly", "-m", "-f", "{{.Version}} {{.GoVersion}}", PACKAGE]),
        Duration::from_secs(300),
    )
    .context("the suite is built with the Go toolchain, version 1.26 or later")?;
    let mark = output.join("version");
    if std::fs::read_to_string(&mark).is_ok_and(|old| old == version) {
        return Ok(output);
    }
    println!("oci: building the validation suite with Go");
    std::fs::create_dir_all(output.join("bin"))?;
    let limit = Duration::from_secs(1800);
    let mut all = go(&source);
    all.args(["build", "-trimpath", "-mod=readonly", "-ldflags", "-s -w", "-o"]).arg(output.join("bin/"));
    run::status(all.arg(format!("{PACKAGE}/validation/...")), limit)?;
    let mut inner = go(&source);
    inner.args(["build", "-trimpath", "-mod=readonly", "-ldflags", "-s -w", "-o"]);
    inner.arg(output.join("runtimetest")).arg(format!("{PACKAGE}/cmd/runtimetest"));
    run::status(&mut inner, limit)?;
    let module =
        run::stdout(go(&source).args(["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", PACKAGE]), limit)?;
    let archive = "rootfs-amd64.tar.gz";
    let bytes = std::fs::read(Path::new(module.trim()).join(archive)).context("read the suite's rootfs")?;
    std::fs::write(output.join(archive), bytes)?;
    std::fs::write(&mark, version)?;
    Ok(output)
}

fn go(source: &Path) -> Command {
    let mut go = Command::new("nice");
    go.args(["-n", "5", "go"]).env("CGO_ENABLED", "0").current_dir(source);
    go
}

/// The suite calls the runtime without options, so its own state directory goes into a script.
fn wrap(crisp_oci: &Path, place: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let crisp_oci = crisp_oci.canonicalize().with_context(|| format!("find {}", crisp_oci.display()))?;
    let path = place.join("runtime");
    let script = format!(
        "#!/bin/sh\nexec '{}' --root '{}' \"$@\"\n",
        crisp_oci.display(),
        place.join("state").display()
    );
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn programs(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    if names.is_empty() {
        bail!("{} holds no programs", dir.display());
    }
    Ok(names)
}

/// Removes what a program left behind, which those that fail do.
fn clean(runtime: &Path, bundles: &Path) -> Result<()> {
    let limit = Duration::from_secs(60);
    let left = run::stdout(Command::new(runtime).args(["list", "--quiet"]), limit)?;
    for id in left.lines() {
        run::status(Command::new(runtime).args(["delete", "--force", id]), limit)?;
    }
    std::fs::remove_dir_all(bundles).with_context(|| format!("remove {}", bundles.display()))
}

/// Takes the TAP of one program apart.
///
/// An outer assertion that wraps a run in a container has the inner TAP before it, in quotes. Then the inner ones
/// count, and the outer one says nothing more.
fn count(program: &str, text: &str, summary: &mut Summary) {
    let mut wrapped = false;
    for line in text.lines() {
        if line.trim_start().starts_with("\"stdout\":") && line.contains("TAP version") {
            wrapped = true;
            let inner = line.replace("\\n", "\n");
            inner.lines().filter_map(assertion).for_each(|found| judge(program, found, summary));
        } else if let Some(found) = assertion(line)
            && (!std::mem::take(&mut wrapped) || matches!(found, Found::Passed))
        {
            judge(program, found, summary);
        }
    }
}

enum Found<'a> {
    Passed,
    Skipped,
    Failed(&'a str),
}

fn assertion(line: &str) -> Option<Found<'_>> {
    let (held, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let text = rest.split_once(" - ").map_or(rest, |(_, text)| text);
    match (held, text.contains("# SKIP") || text.contains("# TODO")) {
        (_, true) => Some(Found::Skipped),
        (true, false) => Some(Found::Passed),
        (false, false) => Some(Found::Failed(text)),
    }
}

fn judge(program: &str, found: Found, summary: &mut Summary) {
    match found {
        Found::Passed => summary.passed += 1,
        Found::Skipped => summary.skipped += 1,
        Found::Failed(text) => {
            let known = ASSERTIONS
                .iter()
                .find(|(name, part, _)| (name.is_empty() || *name == program) && text.contains(part));
            match known {
                Some((.., why)) => summary.left_out.push((format!("{program}: {text}"), why)),
                None => summary.failed.push((program.to_owned(), text.to_owned())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_assertions_count_in_place_of_their_wrapper() {
        let text = "TAP version 13\n  ---\n  {\n    \"stdout\": \"TAP version 13\\nok 1 - a\\nnot ok 2 - b\\n\"\n  }\n  ...\n\
                    not ok 1 - wrapper\nok 2 - plain\nok 3 # SKIP c\nnot ok 4 - mounts[1] (/dev) found in order\n1..4\n";
        let mut summary = Summary::default();
        count("x", text, &mut summary);
        assert_eq!(summary.passed, 2);
        assert_eq!(summary.failed, [("x".to_owned(), "b".to_owned())]);
        assert_eq!((summary.skipped, summary.left_out.len()), (1, 1));
    }

    #[test]
    fn what_is_left_out_for_one_program_counts_for_another() {
        let mut summary = Summary::default();
        judge("state", Found::Failed("exit status 1"), &mut summary);
        judge("start", Found::Failed("exit status 1"), &mut summary);
        assert_eq!((summary.failed.len(), summary.left_out.len()), (1, 1));
    }
}
