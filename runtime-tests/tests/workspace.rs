//! The workspace as a whole: who may know whom, and that what is documented is what is built.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use runtime_tests::{build, place, run};
use serde_json::Value;

/// The arrows of src/README.md. What is not here must not be in a Cargo.toml.
const ARROWS: &[(&str, &[&str])] = &[
    ("crispd", &["crisp-cri-api", "crisp-shim-api", "crisp-image", "crisp-network", "crisp-streaming"]),
    ("crisp-shim", &["crisp-shim-api", "crisp-container"]),
    ("crisp-oci", &["crisp-container"]),
    ("crisp-runtime-tests", &["crisp-cri-api", "crisp-shim-api"]),
];

/// What other runtimes of this kind are called or made of; we use none of their code.
const FOREIGN: &[&str] =
    &["libcontainer", "libcgroups", "oci-client", "oci-distribution", "bollard", "youki", "runc"];

fn metadata() -> Result<Value> {
    let mut cargo = build::cargo_command(&[
        "metadata",
        "--format-version=1",
        "--offline",
        // What only other platforms need is not here.
        "--filter-platform=x86_64-unknown-linux-gnu",
    ])?;
    Ok(serde_json::from_str(&run::stdout(&mut cargo, Duration::from_secs(60))?)?)
}

#[test]
fn rooms_know_only_those_they_may_know() -> Result<()> {
    let metadata = metadata()?;
    let members: BTreeSet<&str> =
        metadata["workspace_members"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut rooms: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let packages = || metadata["packages"].as_array().into_iter().flatten();
    let ours: BTreeSet<&str> = packages()
        .filter(|p| p["id"].as_str().is_some_and(|id| members.contains(id)))
        .filter_map(|p| p["name"].as_str())
        .collect();
    for package in packages().filter(|p| p["name"].as_str().is_some_and(|name| ours.contains(name))) {
        let known = rooms.entry(package["name"].as_str().unwrap_or_default()).or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            known.extend(dependency["name"].as_str().filter(|name| ours.contains(name)));
        }
    }
    assert!(rooms.len() > 5, "cargo metadata names only {rooms:?}");
    for (room, known) in rooms {
        let allowed: BTreeSet<&str> =
            ARROWS.iter().filter(|(name, _)| *name == room).flat_map(|(_, to)| to.iter().copied()).collect();
        let forbidden: Vec<_> = known.difference(&allowed).collect();
        assert!(forbidden.is_empty(), "{room} must not know {forbidden:?}");
    }
    Ok(())
}

#[test]
fn no_other_runtime_is_a_dependency() -> Result<()> {
    let metadata = metadata()?;
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().context("a package without a name")?;
        assert!(!FOREIGN.contains(&name), "{name} is a dependency");
    }
    Ok(())
}

#[test]
fn the_example_configuration_is_what_the_daemon_prints() -> Result<()> {
    let example = std::fs::read_to_string(place::repository().join("config.toml.example"))?;
    let printed = run::stdout(
        Command::new(build::programs()?.daemon).args(["config", "default"]),
        Duration::from_secs(10),
    )?;
    assert_eq!(printed, example);
    Ok(())
}

#[test]
fn the_shim_is_static_and_small() -> Result<()> {
    let shim = build::programs()?.shim;
    let bytes = std::fs::read(&shim)?;
    assert!(bytes.starts_with(b"\x7fELF"));
    // A program that needs a loader names it in a segment of its own (elf(5), PT_INTERP).
    assert!(!bytes.windows(8).any(|w| w == b"ld-linux" || w == b"ld-musl-"), "the shim needs a loader");
    assert!(bytes.len() < 8 << 20, "the shim has {} bytes", bytes.len());
    Ok(())
}

#[test]
fn every_file_says_what_it_is() -> Result<()> {
    let mut open = vec![place::repository().join("src"), place::repository().join("runtime-tests")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if path.is_dir() && name != "target" && name != "generated" {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path)?;
                assert!(text.starts_with("//! "), "{} does not open with what it does", path.display());
            }
        }
    }
    Ok(())
}
