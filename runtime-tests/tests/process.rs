//! The process in the container: its environment, users, rights, files, and the commands executed beside it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, mount, namespaces, security};
use runtime_tests::image::catalog;

fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

#[tokio::test]
async fn the_environment_is_bytes_and_stays_so() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("environment").await?;
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    let raw = [0x66, 0xff, 0xfe, 0x0a, 0x80, 0x22];
    config.envs = vec![
        KeyValue { key: "PLAIN".into(), value: b"some text".to_vec() },
        KeyValue { key: "RAW".into(), value: raw.to_vec() },
        KeyValue { key: "EMPTY".into(), value: Vec::new() },
        KeyValue { key: "UTF8".into(), value: "\u{fc}\u{20ac}".into() },
        KeyValue { key: "EQUALS".into(), value: b"a=b=c".to_vec() },
    ];
    let id = pod.start_with(&config).await?;
    let environment = bed.client.exec(&id, &["cat", "/proc/1/environ"], 5).await?.stdout;
    for wanted in [
        &b"PLAIN=some text\0"[..],
        b"RAW=f\xff\xfe\n\x80\"\0",
        b"EMPTY=\0",
        "UTF8=\u{fc}\u{20ac}\0".as_bytes(),
        b"EQUALS=a=b=c\0",
    ] {
        let there = environment.windows(wanted.len()).any(|w| w == wanted);
        ensure!(
            there,
            "{:?} is not in {:?}",
            String::from_utf8_lossy(wanted),
            String::from_utf8_lossy(&environment)
        );
    }
    // A command executed later has the same.
    let output = bed.client.exec(&id, &["sh", "-c", "printf %s \"$RAW\""], 5).await?;
    assert_eq!(output.stdout, raw);
    Ok(())
}

#[tokio::test]
async fn image_config_and_pod_config_meet_as_kubernetes_says() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::CONFIGURED).await?;
    let pod = bed.host_pod("meeting").await?;
    // Neither command nor args: all from the image.
    let mut config = container("image", catalog::CONFIGURED, "");
    config.command.clear();
    let id = pod.start_with(&config).await?;
    runtime_tests::bed::wait_log(&pod.log("image"), "from the image\n")?;
    let facts = bed.client.sh(&id, "echo $COLOUR $SHAPE; pwd; id -un; ls -d /data").await?;
    assert_eq!(facts, "green round\n/work/here\nnobody\n/data");
    // Args alone replace the image's command and keep its entrypoint.
    let mut config = container("args", catalog::CONFIGURED, "");
    config.command.clear();
    config.args = vec!["echo only args".into()];
    assert_eq!(pod.output(&config).await?, (0, "only args\n".into()));
    // A command replaces both.
    let mut config = container("command", catalog::CONFIGURED, "");
    config.command = vec!["/bin/echo".into()];
    assert_eq!(pod.output(&config).await?, (0, "\n".into()));
    let mut config = container("set", catalog::CONFIGURED, "echo $COLOUR $SHAPE; pwd");
    config.envs = vec![KeyValue { key: "COLOUR".into(), value: b"red".to_vec() }];
    config.working_dir = "/made/on/the/way".into();
    assert_eq!(pod.output(&config).await?, (0, "red round\n/made/on/the/way\n".into()));
    Ok(())
}

#[tokio::test]
async fn users_and_groups_are_those_asked_for() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("users").await?;
    let who = "id -u; id -g; id -G";
    let mut config = container("ids", catalog::SMALL, who);
    let context = security(&mut config);
    (context.run_as_user, context.run_as_group) = (number(1234), number(2345));
    context.supplemental_groups = vec![3456, 4567];
    assert_eq!(pod.output(&config).await?.1, "1234\n2345\n2345 3456 4567\n");
    let mut config = container("name", catalog::SMALL, who);
    security(&mut config).run_as_username = "www-data".into();
    let (code, said) = pod.output(&config).await?;
    ensure!(code == 0 && said.starts_with("33\n33\n"), "{said}");
    // A number that no file knows has group 0.
    let mut config = container("stranger", catalog::SMALL, who);
    security(&mut config).run_as_user = number(987_654);
    assert_eq!(pod.output(&config).await?.1, "987654\n0\n0\n");
    Ok(())
}

#[tokio::test]
async fn capabilities_and_no_new_privileges_are_as_asked() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("rights").await?;
    let read = "sed -n 's/^CapEff:.//p;s/^CapBnd:.//p;s/^NoNewPrivs:.//p' /proc/self/status";
    let (_, usual) = pod.output(&container("usual", catalog::SMALL, read)).await?;
    assert_eq!(usual, "00000000a80425fb\n00000000a80425fb\n0\n", "the usual fourteen");
    let mut none = container("none", catalog::SMALL, read);
    let drop = Capability { drop_capabilities: vec!["ALL".into()], ..Capability::default() };
    security(&mut none).capabilities = Some(drop);
    security(&mut none).no_new_privs = true;
    assert_eq!(pod.output(&none).await?.1, "0000000000000000\n0000000000000000\n1\n");
    let mut one = container("one", catalog::SMALL, read);
    security(&mut one).capabilities = Some(Capability {
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["NET_ADMIN".into()],
        ..Capability::default()
    });
    assert_eq!(pod.output(&one).await?.1, "0000000000001000\n0000000000001000\n0\n");
    for (name, no_new_privs, effective) in [("setuid", false, 0), ("kept", true, 1000)] {
        let mut config = container(name, catalog::TOOLS, "nnp");
        security(&mut config).run_as_user = number(1000);
        security(&mut config).no_new_privs = no_new_privs;
        assert_eq!(pod.output(&config).await?.1, format!("Effective uid: {effective}\n"));
    }
    Ok(())
}

#[tokio::test]
async fn seccomp_masks_and_read_only_paths_are_in_force() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("confined").await?;
    let mode = "sed -n 's/^Seccomp:.//p' /proc/self/status";
    assert_eq!(pod.output(&container("absent", catalog::SMALL, mode)).await?.1, "0\n");
    let mut config =
        container("default", catalog::SMALL, &format!("{mode}; unshare -U true || echo refused"));
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: security_profile::ProfileType::RuntimeDefault as i32,
        ..SecurityProfile::default()
    });
    let (_, said) = pod.output(&config).await?;
    ensure!(said.starts_with("2\n") && said.ends_with("refused\n"), "{said}");

    let profile = bed.daemon.dir().join("profile.json");
    std::fs::write(
        &profile,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}"#,
    )?;
    let mut config = container("local", catalog::SMALL, "mkdir /tmp/x 2>&1 || touch /tmp/y");
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: security_profile::ProfileType::Localhost as i32,
        localhost_ref: profile.display().to_string(),
    });
    let (code, said) = pod.output(&config).await?;
    ensure!(code == 0 && said.contains("not supported"), "{said}");

    let script = "wc -c < /proc/version; ls /proc/fs | wc -l; echo x > /proc/sys/kernel/domainname";
    let mut config = container("masked", catalog::SMALL, script);
    security(&mut config).masked_paths =
        vec!["/proc/version".into(), "/proc/fs".into(), "/proc/not-there".into()];
    security(&mut config).readonly_paths = vec!["/proc/sys".into(), "/proc/not-there".into()];
    let (_, said) = pod.output(&config).await?;
    ensure!(said.starts_with("0\n0\n") && said.contains("Read-only file system"), "{said}");
    let mut config = container("frozen", catalog::SMALL, "touch /x; touch /dev/shm/y && echo shm");
    security(&mut config).readonly_rootfs = true;
    let (_, said) = pod.output(&config).await?;
    ensure!(said.contains("Read-only file system") && said.ends_with("shm\n"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_privileged_container_has_everything() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = runtime_tests::client::pod("privileged");
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let pod = bed.run(config).await?;
    let mut inner = container(
        "c",
        catalog::SMALL,
        "mount -t tmpfs none /mnt 2>&1; mkdir -p /mnt; mount -t tmpfs none /mnt && ls /dev/kmsg; sed -n 's/^Seccomp:.//p' /proc/self/status; [ -w /sys/kernel ] && echo sys",
    );
    security(&mut inner).privileged = true;
    let (_, said) = pod.output(&inner).await?;
    ensure!(said.ends_with("/dev/kmsg\n0\nsys\n"), "{said}");
    Ok(())
}

#[tokio::test]
async fn mounts_are_made_as_asked_and_reported() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("mounts").await?;
    let dir = bed.daemon.dir().join("volume");
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("file"), "from the host\n")?;
    std::os::unix::fs::symlink(&dir, bed.daemon.dir().join("link"))?;
    let absent = bed.daemon.dir().join("made/by/crisp");
    let script = "cat /v/file /l/file /f; echo back > /v/new; touch /r/x 2>&1; ls -d /a; exec sleep 1000";
    let mut config = container("c", catalog::SMALL, script);
    config.mounts = vec![
        mount(&dir, "/v"),
        mount(&bed.daemon.dir().join("link"), "/l"),
        mount(&dir.join("file"), "/f"),
        Mount { readonly: true, ..mount(&dir, "/r") },
        mount(&absent, "/a"),
    ];
    let id = pod.start_with(&config).await?;
    runtime_tests::bed::wait_log(&pod.log("c"), "/a\n")?;
    let said = runtime_tests::bed::said(&pod.log("c"))?;
    ensure!(
        said.starts_with(&"from the host\n".repeat(3)) && said.contains("Read-only file system"),
        "{said}"
    );
    assert_eq!(std::fs::read_to_string(dir.join("new"))?, "back\n");
    let made = std::fs::metadata(&absent)?;
    assert_eq!((made.permissions().mode() & 0o777, made.uid()), (0o755, 0));
    let reported = bed.client.status(&id).await?.mounts;
    assert_eq!(reported.len(), config.mounts.len(), "only what was asked for is listed");
    assert_eq!(reported[0].host_path, config.mounts[0].host_path);
    // Nothing of it is seen on the host.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains("volume"), "a container's mount is in the host's table");
    Ok(())
}

#[tokio::test]
async fn pid_namespaces_are_private_shared_the_hosts_or_that_of_another() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = runtime_tests::client::host_pod("pids");
    namespaces(&mut config, |o| o.pid = NamespaceMode::Pod as i32);
    let shared = bed.run(config).await?;
    let mode = |name: &str, script: &str, mode: NamespaceMode, target: &str| {
        let mut config = container(name, catalog::SMALL, script);
        let options = security(&mut config).namespace_options.get_or_insert_default();
        (options.pid, options.target_id) = (mode as i32, target.to_owned());
        config
    };
    let first = shared.start_with(&mode("first", "exec sleep 1000.25", NamespaceMode::Pod, "")).await?;
    let second = shared.start_with(&mode("second", "exec sleep 1000.25", NamespaceMode::Pod, "")).await?;
    assert_eq!(bed.client.sh(&second, "pidof sleep | wc -w").await?, "2");
    // An orphan is reaped by the first process of the pod.
    bed.client.sh(&first, "sh -c '(sleep 0.1 &)' >/dev/null 2>&1; sleep 0.4").await?;
    assert_eq!(bed.client.sh(&first, "ps -o stat | grep -c '^Z' || true").await?, "0");

    let own = bed.host_pod("own").await?;
    let target = own.start("target", "exec sleep 1000.25").await?;
    assert_eq!(bed.client.sh(&target, "cat /proc/1/cmdline | tr '\\0' ' '").await?, "sleep 1000.25 ");
    let debug = own.start_with(&mode("debug", "exec sleep 1000", NamespaceMode::Target, &target)).await?;
    assert_eq!(bed.client.sh(&debug, "cat /proc/1/cmdline | tr '\\0' ' '").await?, "sleep 1000.25 ");

    let mut config = runtime_tests::client::host_pod("hostpid");
    namespaces(&mut config, |o| o.pid = NamespaceMode::Node as i32);
    let host = bed.run(config).await?;
    let id = host.start_with(&mode("c", "exec sleep 1000", NamespaceMode::Node, "")).await?;
    let inside = bed.client.sh(&id, "readlink /proc/self/ns/pid").await?;
    assert_eq!(inside, std::fs::read_link("/proc/self/ns/pid")?.display().to_string());
    Ok(())
}

#[tokio::test]
async fn a_user_namespace_maps_root_to_nobody_special() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = runtime_tests::client::pod("mapped");
    let map = || vec![IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let userns = UserNamespace { mode: NamespaceMode::Pod as i32, uids: map(), gids: map() };
    namespaces(&mut config, |o| o.userns_options = Some(userns.clone()));
    let pod = bed.run(config).await?;
    let mut inner = container("c", catalog::SMALL, "exec sleep 1000.875");
    security(&mut inner).namespace_options.get_or_insert_default().userns_options = Some(userns);
    let id = pod.start_with(&inner).await?;
    let map = bed
        .client
        .sh(&id, "cat /proc/self/uid_map | tr -s ' '; id -u; touch /tmp/mine; stat -c %u /etc/passwd")
        .await?;
    assert_eq!(map.trim(), "0 100000 65536\n0\n0");
    let process = runtime_tests::bed::process("sleep 1000.875")?;
    assert_eq!(std::fs::metadata(format!("/proc/{process}"))?.uid(), 100_000);
    Ok(())
}

#[tokio::test]
async fn executed_commands_keep_output_streams_and_codes_apart() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("exec").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let reply = bed.client.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 77"], 10).await?;
    assert_eq!(
        (reply.stdout.as_slice(), reply.stderr.as_slice(), reply.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 77)
    );
    let reply = bed.client.exec(&id, &["sh", "-c", "kill -9 $$"], 10).await?;
    assert_eq!(reply.exit_code, 137);
    let megabytes = bed
        .client
        .exec(&id, &["sh", "-c", "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2"], 30)
        .await?;
    assert_eq!((megabytes.stdout.len(), megabytes.stderr.len()), (3_000_000, 2_000_000));
    // What is above the bound of a reply is dropped, and the command runs to its end.
    let flood = bed.client.exec(&id, &["sh", "-c", "head -c 40000000 /dev/zero; exit 5"], 60).await?;
    ensure!(flood.exit_code == 5 && flood.stdout.len() <= 16 << 20, "{} bytes", flood.stdout.len());
    // A child that keeps the pipe does not keep the caller.
    let clock = Instant::now();
    let reply = bed.client.exec(&id, &["sh", "-c", "sleep 300 & echo gone"], 20).await?;
    assert_eq!(reply.stdout, b"gone\n");
    ensure!(clock.elapsed() < Duration::from_secs(4), "waited {:?} for a child", clock.elapsed());
    Ok(())
}

#[tokio::test]
async fn many_commands_at_once_are_all_answered() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("parallel").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let before = bed.daemon.traces();
    let calls = (0..40).map(|n| {
        let (client, id) = (bed.client.clone(), id.clone());
        tokio::spawn(async move { client.sh(&id, &format!("echo {n}; exit 0")).await.map(|said| (n, said)) })
    });
    for call in calls.collect::<Vec<_>>() {
        let (n, said) = call.await??;
        assert_eq!(said, n.to_string());
    }
    bed.nothing_left(&before)?;
    let shim = bed.daemon.shim(&pod.id)?;
    ensure!(runtime_tests::traces::zombies_of(shim).is_empty(), "the shim has zombies");
    Ok(())
}

#[tokio::test]
async fn a_terminal_is_a_terminal() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("terminal").await?;
    let mut config =
        container("c", catalog::SMALL, "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all three");
    config.tty = true;
    let (code, said) = pod.output(&config).await.context("with a terminal")?;
    ensure!(code == 0 && said.contains("/dev/pts/0") && said.contains("all three"), "{said}");
    Ok(())
}
