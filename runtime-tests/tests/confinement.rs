//! AppArmor and SELinux: used where the host has them, told clearly where it has not.

use anyhow::{Context, Result, ensure};
use cri_api::v1::security_profile::ProfileType;
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, mount, refused_with, security};
use runtime_tests::image::catalog;
use runtime_tests::run::skipped;
use serde_json::Value;
use tonic::Code;

fn apparmor() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|on| on.starts_with('Y'))
}

fn selinux() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").exists()
}

#[tokio::test]
async fn the_status_tells_what_this_host_can_do() -> Result<()> {
    let bed = Bed::new().await?;
    let info = bed.client.runtime_status().await?.info;
    let host: Value = serde_json::from_str(info.get("host").context("no host in the info")?)?;
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    for (key, value) in [("apparmor", apparmor()), ("selinux", selinux()), ("cgroupV2", v2)] {
        assert_eq!(host[key], Value::Bool(value), "{key}");
    }
    for key in ["swapAccounted", "hugetlb"] {
        ensure!(host[key].is_boolean(), "{key} is missing: {host}");
    }
    ensure!(host["kernel"].as_str().is_some_and(|kernel| kernel.contains('.')), "{host}");
    Ok(())
}

#[tokio::test]
async fn an_apparmor_profile_is_applied_or_refused_and_never_forgotten() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("apparmor").await?;
    let profile = |name: &str, kind: ProfileType, reference: &str| {
        let mut config =
            container(name, catalog::SMALL, "cat /proc/self/attr/current 2>/dev/null || echo none");
        security(&mut config).apparmor =
            Some(SecurityProfile { profile_type: kind as i32, localhost_ref: reference.into() });
        config
    };
    // A wish that a container be confined is no wish for the best that can be had.
    let says = if apparmor() { "not loaded" } else { "AppArmor is off on this host" };
    for reference in ["no-such-profile", "localhost/no-such-profile"] {
        let config = profile("local", ProfileType::Localhost, reference);
        refused_with(bed.client.create(&pod.id, &config, &pod.config).await, Code::InvalidArgument, says)?;
    }
    #[allow(deprecated)]
    for text in ["localhost/no-such-profile", "nonsense"] {
        let mut config = container("old", catalog::SMALL, "true");
        security(&mut config).apparmor_profile = text.into();
        refused_with(
            bed.client.create(&pod.id, &config, &pod.config).await,
            Code::InvalidArgument,
            "AppArmor",
        )?;
    }
    let nameless = profile("nameless", ProfileType::Localhost, "");
    refused_with(
        bed.client.create(&pod.id, &nameless, &pod.config).await,
        Code::InvalidArgument,
        "localhost/",
    )?;
    for (name, kind) in [("default", ProfileType::RuntimeDefault), ("unconfined", ProfileType::Unconfined)] {
        let (code, _) = pod.output(&profile(name, kind, "")).await?;
        assert_eq!(code, 0, "{name}");
    }
    if !apparmor() {
        skipped("AppArmor profiles that are applied", "this host has no AppArmor");
        return Ok(());
    }
    let (_, label) = pod.output(&profile("free", ProfileType::Unconfined, "")).await?;
    assert_eq!(label, "unconfined\n");
    Ok(())
}

#[tokio::test]
async fn selinux_labels_are_applied_or_have_no_meaning() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("selinux").await?;
    let dir = bed.daemon.dir().join("volume");
    std::fs::create_dir(&dir)?;
    let script = "touch /v/new && cat /proc/self/attr/current 2>/dev/null || echo none";
    let mut config = container("c", catalog::SMALL, script);
    security(&mut config).selinux_options = Some(SeLinuxOption {
        user: "system_u".into(),
        role: "system_r".into(),
        r#type: "container_t".into(),
        level: "s0:c1,c2".into(),
    });
    // The kubelet asks for new labels of its volumes on every host.
    config.mounts = vec![Mount { selinux_relabel: true, ..mount(&dir, "/v") }];
    let (code, label) = pod.output(&config).await?;
    assert_eq!(code, 0);
    ensure!(dir.join("new").exists());
    let id = &bed.client.containers(None).await?[0].id;
    ensure!(
        bed.client.status(id).await?.mounts[0].selinux_relabel,
        "the mount is not reported as it was asked for"
    );
    match selinux() {
        true => ensure!(label.contains("container_t:s0:c1,c2"), "{label}"),
        false => skipped("SELinux labels that are applied", "this host has no SELinux"),
    }
    Ok(())
}
