//! Who sees whose processes, who reaps them, and what the capabilities of a user that is not root are worth.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, Pod, process};
use runtime_tests::client::{self, container, namespaces, refused_with, security};
use runtime_tests::image::catalog;
use runtime_tests::{run, traces};
use tonic::Code;

fn in_mode(name: &str, script: &str, mode: NamespaceMode, target: &str) -> ContainerConfig {
    let mut config = container(name, catalog::SMALL, script);
    let options = security(&mut config).namespace_options.get_or_insert_default();
    (options.pid, options.target_id) = (mode as i32, target.to_owned());
    config
}

async fn shared(bed: &Bed, name: &str) -> Result<Pod> {
    let mut config = client::host_pod(name);
    namespaces(&mut config, |options| options.pid = NamespaceMode::Pod as i32);
    bed.run(config).await
}

#[tokio::test]
async fn containers_of_a_shared_namespace_see_each_other_and_end_alone() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = shared(&bed, "shared").await?;
    let mode = NamespaceMode::Pod;
    let first = pod.start_with(&in_mode("first", "exec sleep 1000.0625", mode, "")).await?;
    let second = pod.start_with(&in_mode("second", "exec sleep 1001.0625", mode, "")).await?;
    for id in [&first, &second] {
        let seen = bed.client.sh(id, "ps -o args | grep -v grep").await?;
        for part in ["sleep 1000.0625", "sleep 1001.0625"] {
            ensure!(seen.contains(part), "{part} is not in {seen}");
        }
        // The first process is neither: it is the one that reaps.
        let init = bed.client.sh(id, "tr '\\0' ' ' < /proc/1/cmdline").await?;
        ensure!(!init.contains("sleep"), "process 1 is {init}");
    }
    // One may signal the other as it is the same user, and the end of one is not the end of the pod.
    let kill =
        "for at in /proc/[0-9]*; do grep -q '^sleep.1000.0625' $at/cmdline && kill ${at#/proc/}; done; true";
    bed.client.sh(&second, kill).await?;
    assert_eq!(bed.client.wait_exit(&first).await?.exit_code, 143);
    assert_eq!(bed.client.sh(&second, "ps -o args | grep -c '^sleep'").await?, "1");
    // A container that comes later is seen too, and it can take the name of the one that ended.
    bed.client.remove(&first).await?;
    pod.start_with(&in_mode("first", "exec sleep 1002.0625", mode, "")).await?;
    ensure!(bed.client.sh(&second, "ps -o args").await?.contains("sleep 1002.0625"), "the third is not seen");
    // Nobody can end the namespace by its first process.
    for signal in ["TERM", "INT", "KILL", "HUP"] {
        bed.client.exec(&second, &["kill", &format!("-{signal}"), "1"], 5).await?;
    }
    assert_eq!(bed.client.status(&second).await?.state, ContainerState::ContainerRunning as i32);
    Ok(())
}

#[tokio::test]
async fn orphans_of_a_shared_namespace_are_reaped() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = shared(&bed, "orphans").await?;
    let id = pod.start_with(&in_mode("c", "exec sleep 1000", NamespaceMode::Pod, "")).await?;
    // Each is left by its parent before it ends.
    bed.client.sh(&id, "for i in $(seq 50); do sh -c 'sleep 0.1 &'; done >/dev/null 2>&1").await?;
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let left = bed.client.sh(&id, "ps -o stat,args | grep -c -e '^Z' -e 'sleep 0.1$' || true").await?;
        if left == "0" {
            break;
        }
        ensure!(tokio::time::Instant::now() < end, "{left} orphans are there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What a container leaves behind goes with it, though the namespace stays.
    let family = "for i in 1 2 3; do setsid sleep 2000.0625 & done; exec sleep 1000";
    let parent = pod.start_with(&in_mode("family", family, NamespaceMode::Pod, "")).await?;
    let all =
        || traces::all_processes().filter(|pid| traces::command_line(*pid) == "sleep 2000.0625").count();
    run::until("three children", Duration::from_secs(5), || Ok((all() == 3).then_some(())))?;
    bed.client.stop(&parent, 0).await?;
    run::until("no children", Duration::from_secs(2), || Ok((all() == 0).then_some(())))?;
    assert_eq!(bed.client.status(&id).await?.state, ContainerState::ContainerRunning as i32);
    Ok(())
}

#[tokio::test]
async fn a_debugger_joins_a_container_that_runs_and_no_other() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("target").await?;
    let target = pod.start("target", "exec sleep 1000.6875").await?;
    let debug = |name: &str| in_mode(name, "exec sleep 1000", NamespaceMode::Target, &target);
    let id = pod.start_with(&debug("debug")).await?;
    let pid = bed.client.sh(&id, "tr '\\0' ' ' < /proc/1/cmdline; readlink /proc/self/ns/pid").await?;
    let own = std::fs::read_link(format!("/proc/{}/ns/pid", process("sleep 1000.6875")?))?;
    assert_eq!(pid, format!("sleep 1000.6875 {}", own.display()));
    // Another's files and network are not part of it; the pod's network is shared anyway.
    bed.client.sh(&target, "touch /tmp/of-the-target").await?;
    bed.client.sh(&id, "[ ! -e /tmp/of-the-target ] && ls /proc/1/root/tmp/of-the-target").await?;

    let elsewhere = bed.host_pod("elsewhere").await?;
    let reply = bed.client.create(&elsewhere.id, &debug("c"), &elsewhere.config).await;
    refused_with(reply, Code::InvalidArgument, "no container of pod")?;
    let none = in_mode("none", "true", NamespaceMode::Target, "");
    refused_with(bed.client.create(&pod.id, &none, &pod.config).await, Code::InvalidArgument, "target_id")?;
    let unstarted = bed.client.create(&pod.id, &container("u", catalog::SMALL, "true"), &pod.config).await?;
    let early = in_mode("early", "true", NamespaceMode::Target, &unstarted);
    refused_with(bed.client.create(&pod.id, &early, &pod.config).await, Code::FailedPrecondition, "created")?;

    // Between creation and start the target may end; with it ends its namespace, and the debugger in it.
    let late = bed.client.create(&pod.id, &debug("late"), &pod.config).await?;
    bed.client.stop(&target, 0).await?;
    assert_eq!(bed.client.wait_exit(&id).await?.exit_code, 137);
    refused_with(bed.client.start(&late).await, Code::FailedPrecondition, "exited")?;
    let after = bed.client.create(&pod.id, &debug("after"), &pod.config).await;
    refused_with(after, Code::FailedPrecondition, "exited")?;
    bed.client.remove(&target).await?;
    let after = bed.client.create(&pod.id, &debug("after"), &pod.config).await;
    refused_with(after, Code::InvalidArgument, "no container of pod")
}

#[tokio::test]
async fn the_hosts_processes_are_seen_by_whom_it_is_granted() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = client::host_pod("host");
    namespaces(&mut config, |options| options.pid = NamespaceMode::Node as i32);
    let pod = bed.run(config).await?;
    let id = pod.start_with(&in_mode("c", "exec sleep 1000.8125", NamespaceMode::Node, "")).await?;
    let own = process("sleep 1000.8125")?;
    // The same number inside and outside, and the daemon is among those that are seen.
    let seen = bed
        .client
        .sh(&id, &format!("tr '\\0' ' ' < /proc/{own}/cmdline; ls -d /proc/{}", bed.daemon.pid()))
        .await?;
    assert_eq!(seen, format!("sleep 1000.8125 /proc/{}", bed.daemon.pid()));
    bed.client.stop(&id, 0).await?;
    ensure!(traces::command_line(own).is_empty(), "the process survived its container");
    // A container may have processes of its own in such a pod.
    let alone = pod.start_with(&in_mode("alone", "exec sleep 1000", NamespaceMode::Container, "")).await?;
    assert_eq!(bed.client.sh(&alone, "cat /proc/1/cmdline | tr '\\0' ' '").await?, "sleep 1000 ");
    Ok(())
}

/// The five sets of a process, in hexadecimal digits.
const SETS: &str = "sed -n 's/^Cap\\(...\\):.0*\\(.*\\)/\\1 \\2/p' /proc/self/status | tr '\\n' ' '";

#[tokio::test]
async fn ambient_capabilities_reach_a_user_that_is_not_root() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.pod("ambient").await?;
    let of = |name: &str, add: &[&str], ambient: &[&str], drop: &[&str]| {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let script = format!("{SETS}; ip link set lo mtu 1400 2>/dev/null && echo made");
        let mut config = container(name, catalog::SMALL, &script);
        security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        security(&mut config).capabilities = Some(Capability {
            add_capabilities: list(add),
            add_ambient_capabilities: list(ambient),
            drop_capabilities: list(drop),
        });
        config
    };
    // NET_ADMIN is bit 12, NET_RAW 13.
    for (config, said) in [
        // Added alone it is lost with the change of the user.
        (of("added", &["NET_ADMIN"], &[], &["ALL"]), "Inh  Prm  Eff  Bnd 1000 Amb  "),
        (of("ambient", &[], &["NET_ADMIN"], &["ALL"]), "Inh 1000 Prm 1000 Eff 1000 Bnd 1000 Amb 1000 made\n"),
        (
            of("both", &["NET_RAW"], &["CAP_NET_ADMIN"], &["ALL"]),
            "Inh 1000 Prm 1000 Eff 1000 Bnd 3000 Amb 1000 made\n",
        ),
        (of("none", &[], &[], &["ALL"]), "Inh  Prm  Eff  Bnd  Amb  "),
    ] {
        let name = config.metadata.clone().context("no name")?.name;
        let (_, text) = pod.output(&config).await?;
        assert_eq!(text.trim_end_matches('\n'), said.trim_end_matches('\n'), "{name}");
    }
    // Beside the first process too.
    let mut config = of("beside", &[], &["NET_ADMIN"], &["ALL"]);
    config.command = vec!["sleep".into(), "1000".into()];
    let id = pod.start_with(&config).await?;
    let text = bed.client.sh(&id, SETS).await?;
    assert_eq!(text.trim(), "Inh 1000 Prm 1000 Eff 1000 Bnd 1000 Amb 1000");
    let odd = of("odd", &[], &["FLY"], &[]);
    refused_with(bed.client.create(&pod.id, &odd, &pod.config).await, Code::InvalidArgument, "FLY")
}
