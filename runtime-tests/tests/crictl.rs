//! Every command of crictl that a person at a node uses, against the real daemon.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use runtime_tests::bed::Bed;
use runtime_tests::crictl::Crictl;
use runtime_tests::image::catalog;
use runtime_tests::run;
use serde_json::json;

struct Files {
    dir: PathBuf,
}

impl Files {
    fn write(&self, name: &str, value: &serde_json::Value) -> Result<String> {
        let path = self.dir.join(name);
        std::fs::write(&path, serde_json::to_vec(value)?)?;
        Ok(path.display().to_string())
    }

    fn pod(&self, name: &str, logs: &Path) -> Result<String> {
        self.write(
            &format!("{name}.json"),
            &json!({
                "metadata": {"name": name, "uid": format!("uid-{name}"), "namespace": "default", "attempt": 1},
                "hostname": name, "log_directory": logs, "labels": {"app": name}, "linux": {},
            }),
        )
    }

    fn container(&self, name: &str, script: &str) -> Result<String> {
        self.write(
            &format!("{name}-container.json"),
            &json!({
                "metadata": {"name": name}, "image": {"image": catalog::SMALL},
                "command": ["/bin/sh", "-c", script], "log_path": format!("{name}.log"), "linux": {},
            }),
        )
    }
}

async fn bed() -> Result<(Bed, Crictl, Files)> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let crictl = Crictl::new(&bed.daemon.socket())?;
    let dir = bed.daemon.dir().join("crictl");
    std::fs::create_dir(&dir)?;
    Ok((bed, crictl, Files { dir }))
}

#[tokio::test]
async fn the_runtime_describes_itself() -> Result<()> {
    let (_bed, crictl, _) = bed().await?;
    let version = crictl.run(&["version"])?;
    for line in ["Version:  0.1.0", "RuntimeName:  crisp", "RuntimeApiVersion:  v1"] {
        ensure!(version.lines().any(|l| l == line), "version says {version}");
    }
    let info = crictl.json("info", &[])?;
    let conditions = info["status"]["conditions"].as_array().context("no conditions")?.clone();
    for wanted in ["RuntimeReady", "NetworkReady"] {
        ensure!(conditions.iter().any(|c| c["type"] == wanted && c["status"] == true), "{wanted}: {info}");
    }
    let config = crictl.run(&["runtime-config"])?;
    ensure!(config.contains("CGROUPFS") || config.contains("SYSTEMD"), "runtime-config says {config}");
    Ok(())
}

#[tokio::test]
async fn images_are_pulled_listed_inspected_and_removed() -> Result<()> {
    let (_bed, crictl, _) = bed().await?;
    crictl.run(&["pull", catalog::SMALL])?;
    let images = crictl.json("images", &[])?;
    let image = &images["images"][0];
    assert_eq!(image["repoTags"], json!([catalog::SMALL]));
    let id = image["id"].as_str().context("no id")?;
    let inspected = crictl.json("inspecti", &[catalog::SMALL])?;
    assert_eq!(inspected["status"]["id"], id);
    let short = crictl.run(&["images", "-q"])?;
    ensure!(id.contains(short.trim_start_matches("sha256:")), "{short} is not {id}");
    // crictl prints thirteen characters; what it prints must be understood.
    let prefix: String = id.trim_start_matches("sha256:").chars().take(13).collect();
    assert_eq!(crictl.json("inspecti", &[&prefix])?["status"]["id"], id);
    let fs = crictl.json("imagefsinfo", &[])?;
    let used = &fs["status"]["imageFilesystems"][0]["usedBytes"]["value"];
    ensure!(
        used.as_str().is_some_and(|n| n.parse::<u64>().is_ok_and(|n| n > 1 << 20)),
        "imagefsinfo says {fs}"
    );
    crictl.run(&["rmi", catalog::SMALL])?;
    assert_eq!(crictl.json("images", &[])?["images"], json!([]));
    ensure!(
        !crictl.output(&["inspecti", catalog::SMALL])?.status.success(),
        "a removed image can be inspected"
    );
    Ok(())
}

#[tokio::test]
async fn a_pod_and_a_container_live_from_runp_to_rmp() -> Result<()> {
    let (mut bed, crictl, files) = bed().await?;
    crictl.run(&["pull", catalog::SMALL])?;
    let before = bed.daemon.traces();
    let logs = bed.daemon.logs("life")?;
    let pod_config = files.pod("life", &logs)?;
    let script = "echo to stdout; echo to stderr >&2; exec sleep 1000";
    let container_config = files.container("sleeper", script)?;

    let pod = crictl.run(&["runp", &pod_config])?;
    let prefix: String = pod.chars().take(13).collect();
    assert_eq!(crictl.run(&["pods", "-q"])?, pod);
    assert_eq!(
        crictl.run(&["pods", "-q", "--label", "app=life", "--state", "ready", "--name", "life"])?,
        pod
    );
    assert_eq!(crictl.run(&["pods", "-q", "--label", "app=other"])?, "");
    let inspected = crictl.json("inspectp", &[&prefix])?;
    assert_eq!(inspected["status"]["state"], "SANDBOX_READY");
    ensure!(
        inspected["status"]["network"]["ip"].as_str().is_some_and(|ip| !ip.is_empty()),
        "no address: {inspected}"
    );

    let container = crictl.run(&["create", &prefix, &container_config, &pod_config])?;
    assert_eq!(crictl.json("inspect", &[&container])?["status"]["state"], "CONTAINER_CREATED");
    assert_eq!(crictl.run(&["ps", "-q"])?, "");
    assert_eq!(crictl.run(&["ps", "-a", "-q", "--pod", &prefix])?, container);
    crictl.run(&["start", &container])?;
    assert_eq!(crictl.run(&["ps", "-q", "--name", "sleeper"])?, container);
    assert_eq!(crictl.json("inspect", &[&container])?["status"]["state"], "CONTAINER_RUNNING");

    assert_eq!(crictl.run(&["exec", "-s", &container, "echo", "from exec"])?, "from exec");
    let failed = crictl.output(&["exec", "-s", &container, "sh", "-c", "exit 3"])?;
    ensure!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains('3'), "{failed:?}");
    let said = crictl.output(&["logs", &container])?;
    assert_eq!(String::from_utf8_lossy(&said.stdout), "to stdout\n");
    assert_eq!(String::from_utf8_lossy(&said.stderr), "to stderr\n");

    let stats = crictl.json("stats", &["-a", &container])?;
    assert_eq!(stats["stats"][0]["attributes"]["id"], container.as_str());
    let stats = crictl.json("statsp", &[&prefix])?;
    assert_eq!(stats["stats"][0]["attributes"]["id"], pod.as_str());
    crictl.run(&["update", "--memory", "33554432", "--cpu-share", "512", &container])?;
    let resources = crictl.json("inspect", &[&container])?["status"]["resources"]["linux"].clone();
    assert_eq!(resources["memoryLimitInBytes"].to_string().trim_matches('"'), "33554432");
    assert_eq!(resources["cpuShares"].to_string().trim_matches('"'), "512");

    crictl.run(&["stop", "--timeout", "0", &container])?;
    let status = crictl.json("inspect", &[&container])?["status"].clone();
    assert_eq!((&status["state"], &status["exitCode"]), (&json!("CONTAINER_EXITED"), &json!(137)));
    crictl.run(&["rm", &container])?;
    assert_eq!(crictl.run(&["ps", "-a", "-q"])?, "");
    crictl.run(&["stopp", &pod])?;
    assert_eq!(crictl.run(&["pods", "-q", "--state", "notready"])?, pod);
    crictl.run(&["rmp", &pod])?;
    assert_eq!(crictl.run(&["pods", "-q"])?, "");
    bed.nothing_left(&before)
}

#[tokio::test]
async fn run_does_pull_runp_create_and_start_at_once() -> Result<()> {
    let (bed, crictl, files) = bed().await?;
    let pod_config = files.pod("once", &bed.daemon.logs("once")?)?;
    let container_config = files.container("quick", "echo done; exit 4")?;
    let container = crictl.run(&["run", "--with-pull", &container_config, &pod_config])?;
    let status = bed.client.wait_exit(&container).await?;
    assert_eq!(status.exit_code, 4);
    assert_eq!(crictl.run(&["logs", &container])?, "done");
    crictl.run(&["rmp", "-f", &crictl.run(&["pods", "-q"])?])?;
    assert_eq!(crictl.run(&["ps", "-a", "-q"])?, "");
    Ok(())
}

#[tokio::test]
async fn events_tell_of_creation_start_stop_and_removal() -> Result<()> {
    let (bed, crictl, files) = bed().await?;
    crictl.run(&["pull", catalog::SMALL])?;
    let out = files.dir.join("events");
    let mut child = crictl.command(&["events"]).stdout(std::fs::File::create(&out)?).spawn()?;
    let work = async {
        // The stream has no greeting; a pod that comes before it is open is not told of. So pods go by until one is.
        let end = Instant::now() + Duration::from_secs(20);
        for number in 0.. {
            ensure!(Instant::now() < end, "no event came");
            let name = format!("event{number}");
            let pod_config = files.pod(&name, &bed.daemon.logs(&name)?)?;
            let container_config = files.container("short", "exit 0")?;
            let pod = crictl.run(&["runp", &pod_config])?;
            let container = crictl.run(&["create", &pod, &container_config, &pod_config])?;
            crictl.run(&["start", &container])?;
            bed.client.wait_exit(&container).await?;
            crictl.run(&["rm", &container])?;
            crictl.run(&["rmp", "-f", &pod])?;
            let all_there = || -> Result<Option<()>> {
                let text = std::fs::read_to_string(&out)?;
                let told = |kind: &str| text.contains(&format!("CONTAINER_{kind}_EVENT"));
                let kinds = ["CREATED", "STARTED", "STOPPED", "DELETED"];
                Ok((text.contains(&container) && kinds.into_iter().all(told)).then_some(()))
            };
            if run::until("four events", Duration::from_secs(2), all_there).is_ok() {
                return Ok(());
            }
        }
        Ok(())
    };
    let outcome = work.await;
    child.kill()?;
    child.wait()?;
    outcome.with_context(|| std::fs::read_to_string(&out).unwrap_or_default())
}
