//! Makes a machine ready: Debian packages, the musl target, cargo's helpers, the Go programs that crisp is measured with.
//! Does nothing that was done before, and says what it does. What it builds from our own sources is `build`'s.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{place, run};

/// A file whose presence tells that the package is there, and the package.
type Wanted = (&'static str, &'static str);

/// Needed to build and to run crisp at all.
const TO_BUILD: &[Wanted] = &[("cc", "gcc"), ("pkg-config", "pkg-config")];

/// Needed by the tests on the host.
const TO_TEST: &[Wanted] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("brctl", "bridge-utils"),
    ("strace", "strace"),
    ("pgrep", "procps"),
    ("ipcmk", "util-linux"),
    ("nsenter", "util-linux"),
    ("dpkg-deb", "dpkg"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("/usr/lib/x86_64-linux-gnu/libpcre2-8.so.0", "libpcre2-8-0"),
    ("/usr/lib/x86_64-linux-gnu/libssl.so.3", "libssl3"),
    ("/usr/include/seccomp.h", "libseccomp-dev"),
];

/// Unpacked into the cache and never installed: installing them would start services, or put a shell of
/// another build in the place of the host's.
const TO_UNPACK: &[Wanted] =
    &[("busybox", "busybox"), ("nginx", "nginx"), ("docker-registry", "docker-registry")];

/// Programs that cargo builds from crates.io: name, package and version.
const CARGO: &[(&str, &str, &str)] = &[
    ("cargo-deny", "cargo-deny", "0.20.2"),
    ("cargo-fuzz", "cargo-fuzz", "0.13.2"),
    ("typos", "typos-cli", "1.52.0"),
];

const MUSL: &str = "x86_64-unknown-linux-musl";

/// One program and how Go makes it.
struct Tool {
    output: &'static str,
    package: &'static str,
    /// A package that holds only test files is built by `go test -c`.
    test: bool,
    cgo: bool,
    tags: &'static str,
    variables: &'static str,
}

const PLAIN: Tool = Tool { output: "", package: "", test: false, cgo: false, tags: "", variables: "" };

/// A Go module of ours under `runtime-tests/go`, and the programs that come from its dependencies or itself.
struct Module {
    name: &'static str,
    tools: &'static [Tool],
}

const CRI_TOOLS_VERSION: &str = "-X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0";

const MODULES: &[Module] = &[
    Module {
        name: "cri-tools",
        tools: &[
            Tool {
                output: "bin/crictl",
                package: "sigs.k8s.io/cri-tools/cmd/crictl",
                variables: CRI_TOOLS_VERSION,
                ..PLAIN
            },
            Tool {
                output: "bin/critest",
                package: "sigs.k8s.io/cri-tools/cmd/critest",
                test: true,
                variables: CRI_TOOLS_VERSION,
                ..PLAIN
            },
        ],
    },
    Module { name: "streaming", tools: &[Tool { output: "bin/streams", package: ".", ..PLAIN }] },
    Module {
        name: "peers",
        tools: &[
            Tool {
                output: "bin/containerd",
                package: "github.com/containerd/containerd/v2/cmd/containerd",
                variables: "-X github.com/containerd/containerd/v2/version.Version=v2.4.2",
                ..PLAIN
            },
            Tool {
                output: "bin/containerd-shim-runc-v2",
                package: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                ..PLAIN
            },
            Tool {
                output: "bin/runc",
                package: "github.com/opencontainers/runc",
                cgo: true,
                tags: "seccomp",
                variables: "-X main.version=1.5.2",
                ..PLAIN
            },
            Tool {
                output: "cni/bridge",
                package: "github.com/containernetworking/plugins/plugins/main/bridge",
                ..PLAIN
            },
            Tool {
                output: "cni/host-local",
                package: "github.com/containernetworking/plugins/plugins/ipam/host-local",
                ..PLAIN
            },
            Tool {
                output: "cni/portmap",
                package: "github.com/containernetworking/plugins/plugins/meta/portmap",
                ..PLAIN
            },
            Tool {
                output: "cni/loopback",
                package: "github.com/containernetworking/plugins/plugins/main/loopback",
                ..PLAIN
            },
            Tool {
                output: "cni/bandwidth",
                package: "github.com/containernetworking/plugins/plugins/meta/bandwidth",
                ..PLAIN
            },
            Tool {
                output: "cni/firewall",
                package: "github.com/containernetworking/plugins/plugins/meta/firewall",
                ..PLAIN
            },
            Tool {
                output: "cni/tuning",
                package: "github.com/containernetworking/plugins/plugins/meta/tuning",
                ..PLAIN
            },
        ],
    },
    Module {
        name: "kubelet",
        tools: &[Tool {
            output: "bin/kubelet",
            package: "k8s.io/kubernetes/cmd/kubelet",
            variables: "-X k8s.io/component-base/version.gitVersion=v1.37.2 \
                        -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37",
            ..PLAIN
        }],
    },
];

/// What it takes to build crisp and show it: no Go, nothing unpacked but one shell.
pub fn for_demo() -> Result<()> {
    packages(TO_BUILD)?;
    unpack(&TO_UNPACK[..1])?;
    musl()
}

/// Parts of the Rust toolchain that a minimal one lacks, and what looks at names, licences and advisories.
pub fn for_style() -> Result<()> {
    for (probe, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let there = run::output(Command::new("cargo").args([probe, "--version"]), Duration::from_secs(30))?;
        if !there.status.success() {
            println!("setup: adding the Rust component {component}");
            let mut add = Command::new("rustup");
            run::status(add.args(["component", "add", component]), Duration::from_secs(300))?;
        }
    }
    cargo_program("cargo-deny")?;
    cargo_program("typos")?;
    Ok(())
}

/// The C++ compiler that libFuzzer takes, and the program that builds and runs targets.
pub fn for_fuzzing() -> Result<PathBuf> {
    packages(&[("c++", "g++")])?;
    cargo_program("cargo-fuzz")
}

/// A program that cargo builds from crates.io, built when it is missing. Unoptimised: that takes half of the time,
/// and none of them has much to do.
pub fn cargo_program(name: &str) -> Result<PathBuf> {
    let known = CARGO.iter().find(|(program, ..)| *program == name);
    let (program, package, version) = known.with_context(|| format!("no program named {name}"))?;
    let root = place::cache()?.join("cargo");
    let path = root.join("bin").join(program);
    let installed = std::fs::read_to_string(root.join(".crates.toml")).unwrap_or_default();
    if path.is_file() && installed.contains(&format!("\"{package} {version} ")) {
        return Ok(path);
    }
    println!("setup: building {program} with cargo");
    let mut install = Command::new("nice");
    install.args(["-n", "5", "cargo", "install", "--quiet", "--locked", "--debug", "--force", "--root"]);
    install.arg(&root).args([*package, "--version", version]);
    // In a directory that goes afterwards, and not among what is built of crisp.
    install.env_remove("CARGO_TARGET_DIR");
    run::status(&mut install, Duration::from_secs(1800))?;
    Ok(path)
}

/// What it takes to run the tests that need no upstream program.
pub fn for_tests() -> Result<()> {
    packages(&[TO_BUILD, TO_TEST].concat())?;
    unpack(TO_UNPACK)?;
    musl()
}

/// Everything.
pub fn everything() -> Result<()> {
    for_tests()?;
    for_style()?;
    for module in MODULES {
        go(module)?;
    }
    Ok(())
}

/// Everything of one Go module: `cri-tools`, `streaming`, `peers` or `kubelet`.
pub fn go_module(name: &str) -> Result<()> {
    match MODULES.iter().find(|m| m.name == name) {
        Some(module) => go(module),
        None => bail!("no Go module named {name}"),
    }
}

/// A program of an unpacked Debian package. Where it lies in the package differs between releases.
pub fn unpacked(program: &str) -> Result<PathBuf> {
    let root = place::debian()?;
    let places = ["usr/bin", "usr/sbin", "bin"].map(|dir| root.join(dir).join(program));
    places
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{program} is not below {}: run `make setup`", root.display()))
}

/// A program that `setup` built with Go.
pub fn go_program(name: &str) -> Result<PathBuf> {
    let path = place::go_bin()?.join(name);
    if !path.exists() {
        bail!("{} is missing: run `make setup`", path.display());
    }
    Ok(path)
}

fn present(probe: &str) -> bool {
    if probe.starts_with('/') { Path::new(probe).exists() } else { place::program(probe).is_some() }
}

fn packages(wanted: &[Wanted]) -> Result<()> {
    let missing: BTreeSet<&str> =
        wanted.iter().filter(|(probe, _)| !present(probe)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("setup: installing {}", missing.iter().copied().collect::<Vec<_>>().join(" "));
    let mut install = apt();
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    if run::status(&mut install, Duration::from_secs(600)).is_err() {
        // A fresh machine has no package lists yet.
        run::status(apt().args(["update", "-qq"]), Duration::from_secs(300))?;
        run::status(&mut install, Duration::from_secs(600))?;
    }
    for (probe, package) in wanted {
        if !present(probe) {
            bail!("{package} is installed, but {probe} is not there");
        }
    }
    Ok(())
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args([
        "-o",
        "DPkg::Lock::Timeout=120",
        "-o",
        "APT::Sandbox::User=root",
    ]);
    apt
}

fn unpack(wanted: &[Wanted]) -> Result<()> {
    let root = place::debian()?;
    std::fs::create_dir_all(&root)?;
    for (program, package) in wanted {
        if unpacked(program).is_ok() {
            continue;
        }
        println!("setup: unpacking {package} into {}", root.display());
        let dir = place::scratch("crisp-deb-")?;
        let download = || {
            run::status(
                apt().args(["download", "-qq", package]).current_dir(dir.path()),
                Duration::from_secs(300),
            )
        };
        if download().is_err() {
            run::status(apt().args(["update", "-qq"]), Duration::from_secs(300))?;
            download()?;
        }
        let deb = std::fs::read_dir(dir.path())?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .with_context(|| format!("{package}: no file was downloaded"))?;
        run::status(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&root), Duration::from_secs(60))?;
        unpacked(program)?;
    }
    Ok(())
}

fn musl() -> Result<()> {
    let libdir = run::stdout(
        Command::new("rustc").args(["--print", "target-libdir", "--target", MUSL]),
        Duration::from_secs(30),
    )?;
    if Path::new(libdir.trim()).is_dir() {
        return Ok(());
    }
    println!("setup: adding the Rust target {MUSL}");
    run::status(Command::new("rustup").args(["target", "add", MUSL]), Duration::from_secs(300)).context(
        "the shim is a static program and needs the Rust target x86_64-unknown-linux-musl; \
         install it with rustup, or with your distribution's rust-std package, and run this again",
    )
}

fn go(module: &Module) -> Result<()> {
    let source = place::package().join("go").join(module.name);
    let output = place::cache()?.join("go");
    let key = key(module, &source)?;
    let mark = output.join(format!("{}.key", module.name));
    let all_there = module.tools.iter().all(|tool| output.join(tool.output).is_file());
    if all_there && std::fs::read_to_string(&mark).is_ok_and(|old| old == key) {
        return Ok(());
    }
    for tool in module.tools {
        println!("setup: building {} with Go", tool.output);
        let started = Instant::now();
        build(tool, &source, &output.join(tool.output))?;
        println!("setup: {} took {:.0} s", tool.output, started.elapsed().as_secs_f64());
    }
    std::fs::write(&mark, key).with_context(|| format!("write {}", mark.display()))
}

/// The Go files of a package.
fn sources(package: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(package)?.collect::<Result<Vec<_>, _>>()?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "go"));
    files.sort();
    Ok(files)
}

/// Changes when anything that decides about the result does: module versions, our sources, flags, the toolchain.
fn key(module: &Module, source: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"] {
        let path = source.join(file);
        hash.update(std::fs::read(&path).with_context(|| format!("read {}", path.display()))?);
    }
    let ours = module.tools.iter().any(|tool| tool.package.starts_with('.'));
    for file in if ours { sources(source)? } else { Vec::new() } {
        hash.update(std::fs::read(&file).with_context(|| format!("read {}", file.display()))?);
    }
    for tool in module.tools {
        hash.update(format!(
            "{:?}",
            (tool.output, tool.package, tool.test, tool.cgo, tool.tags, tool.variables)
        ));
    }
    let version = run::stdout(Command::new("go").arg("version").current_dir(source), Duration::from_secs(60))
        .context("the upstream tools are built with the Go toolchain, version 1.26 or later")?;
    hash.update(version);
    Ok(crate::image::hex(&hash.finalize()))
}

fn build(tool: &Tool, source: &Path, output: &Path) -> Result<()> {
    if let Some(dir) = output.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // A half-written program never bears the final name.
    let staging = output.with_extension("new");
    let mut go = Command::new("nice");
    go.args(["-n", "5", "go"]);
    go.args(if tool.test { &["test", "-c"][..] } else { &["build"][..] });
    go.args(["-trimpath", "-buildvcs=false", "-mod=readonly"]);
    if !tool.tags.is_empty() {
        go.args(["-tags", tool.tags]);
    }
    go.arg("-ldflags").arg(format!("-s -w {}", tool.variables)).arg("-o").arg(&staging).arg(tool.package);
    go.env("CGO_ENABLED", if tool.cgo { "1" } else { "0" }).current_dir(source);
    run::status(&mut go, Duration::from_secs(1800))?;
    std::fs::rename(&staging, output).with_context(|| format!("rename {}", staging.display()))
}
