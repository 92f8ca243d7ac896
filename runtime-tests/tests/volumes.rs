//! What is mounted into containers: images as volumes, and the modes, options and propagation of what the host has.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, Pod, said, wait_log};
use runtime_tests::client::{self, Client, container, image, mount, refused, refused_with, security};
use runtime_tests::image::{Packing, Process, Store, Tree, catalog, debian};
use tonic::Code;

/// An image to be mounted: two layers, and links that would lead out if the host followed them.
const DATA: &str = "crisp.test/data:1";
/// An image to run.
const SHELL: &str = "crisp.test/shell:1";

/// The directory holds what the registry serves.
async fn bed() -> Result<(Bed, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let mut store = Store::create(dir.path())?;
    let shell = store.layer(&debian::busybox()?, Packing::OciZstd)?;
    store.image(&[SHELL], &[shell], &Process::default(), Packing::OciZstd)?;
    let mut first = Tree::default();
    first.file("top", 0o644, b"top\n").file("data/file", 0o644, b"first\n").file("data/gone", 0o644, b"x");
    first.file("data/deep/inner", 0o644, b"inner\n").owner("data/deep/inner", 7, 8);
    first.file("data/run", 0o755, b"#!/bin/sh\necho ran\n").file("etc/passwd", 0o644, b"the image's\n");
    for (link, target) in [
        ("inside", "data/deep"),
        ("absolute", "/etc"),
        ("climbing", "../../../../../../../../etc"),
        ("data/loop", "loop"),
        ("nowhere", "/not/there"),
    ] {
        first.symlink(link, target);
    }
    let mut second = Tree::default();
    second.file("data/file", 0o644, b"second\n").file("data/.wh.gone", 0o644, b"");
    let layers = [store.layer(&first, Packing::OciGzip)?, store.layer(&second, Packing::OciZstd)?];
    store.image(&[DATA], &layers, &Process::default(), Packing::OciGzip)?;
    let bed = Bed::with(store, |_| {}).await?;
    bed.client.pull(SHELL).await?;
    Ok((bed, dir))
}

/// A read-only mount of an image, or of a part of it.
fn part(of: &str, sub_path: &str, inside: &str) -> Mount {
    Mount {
        container_path: inside.to_owned(),
        image: Some(image(of)),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..Mount::default()
    }
}

fn with(name: &str, script: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..container(name, SHELL, script) }
}

#[tokio::test]
async fn an_image_is_a_volume_whole_or_in_part_and_only_to_be_read() -> Result<()> {
    let (mut bed, _store) = bed().await?;
    let id = bed.client.pull(DATA).await?;
    let pod = bed.host_pod("images").await?;
    pod.output(&with("first", "true", vec![part(DATA, "", "/all")])).await?;
    let before = bed.daemon.traces();
    let script = "cat /all/top /all/data/file /dir/file /file /link/inner /passwd; ls /dir; /dir/run; \
                  stat -c %u:%g /link/inner; \
                  for path in /all/new /dir/new /link/inner; do touch $path 2>&1; done; echo x > /file; exec sleep 1000";
    let mounts = vec![
        part(DATA, "", "/all"),
        part(DATA, "data", "/dir"),
        part(DATA, "./data/file", "/file"),
        part(&id, "inside", "/link"),
        part(DATA, "climbing/passwd", "/passwd"),
    ];
    let config = with("c", script, mounts.clone());
    let made = pod.start_with(&config).await?;
    runtime_tests::run::until("five refusals", Duration::from_secs(10), || {
        let text = said(&pod.log("c"))?;
        Ok((text.matches("Read-only file system").count() == 4).then_some(()))
    })?;
    let text = said(&pod.log("c"))?;
    let read = "top\nsecond\nsecond\nsecond\ninner\nthe image's\ndeep\nfile\nloop\nrun\nran\n7:8\n";
    ensure!(text.starts_with(read), "{text}");

    // The kubelet spares images from collection whose id it finds here.
    let shown = bed.client.status(&made).await?.mounts;
    assert_eq!(shown.len(), mounts.len());
    for (shown, asked) in shown.iter().zip(&mounts) {
        let image = shown.image.as_ref().context("no image")?;
        assert_eq!((image.image.as_str(), image.image_ref.as_str()), (id.as_str(), id.as_str()));
        assert_eq!(
            (&shown.container_path, &shown.image_sub_path, shown.readonly, shown.host_path.as_str()),
            (&asked.container_path, &asked.image_sub_path, true, "")
        );
    }
    // Also by a daemon that was not there when it was made.
    bed.daemon.kill()?;
    bed.restart().await?;
    assert_eq!(bed.client.status(&made).await?.mounts, shown);
    bed.client.remove(&made).await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn who_may_mount_can_still_not_change_an_image() -> Result<()> {
    let (bed, _store) = bed().await?;
    bed.client.pull(DATA).await?;
    let mut config = client::host_pod("remounting");
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let map = || vec![IdMapping { host_id: 300_000, container_id: 0, length: 65_536 }];
    let users = UserNamespace { mode: NamespaceMode::Pod as i32, uids: map(), gids: map() };
    for own in [None, Some(users)] {
        let name = if own.is_some() { "own" } else { "host" };
        config.metadata.get_or_insert_default().name = name.into();
        client::namespaces(&mut config, |options| options.userns_options = own.clone());
        let pod = bed.run(config.clone()).await?;
        let script = "for at in /all /dir /file; do mount -o remount,bind,rw $at; mount -o remount,rw $at; done 2>/dev/null; \
                      for file in /all/top /dir/file /file; do echo changed > $file; done 2>&1; echo done";
        let mut inner = with(
            "c",
            script,
            vec![part(DATA, "", "/all"), part(DATA, "data", "/dir"), part(DATA, "data/file", "/file")],
        );
        security(&mut inner).privileged = true;
        security(&mut inner).namespace_options.get_or_insert_default().userns_options = own;
        let (_, text) = pod.output(&inner).await?;
        ensure!(text.matches("Read-only file system").count() == 3, "{name}: {text}");
        let look = with("look", "cat /all/top /all/data/file", vec![part(DATA, "", "/all")]);
        let plain = bed.host_pod(&format!("after-{name}")).await?;
        assert_eq!(plain.output(&look).await?.1, "top\nsecond\n", "{name}: the image was changed");
    }
    Ok(())
}

#[tokio::test]
async fn an_image_that_was_removed_stays_readable_where_it_is_mounted() -> Result<()> {
    let (bed, _store) = bed().await?;
    bed.client.pull(DATA).await?;
    let pod = bed.host_pod("removed").await?;
    let config = |name: &str| with(name, "exec sleep 1000", vec![part(DATA, "", "/all")]);
    let running = pod.start_with(&config("running")).await?;
    let created = bed.client.create(&pod.id, &config("created"), &pod.config).await?;
    bed.client.remove_image(DATA).await?;
    ensure!(bed.client.image_status(DATA).await?.is_none(), "it is still listed");
    bed.client.start(&created).await?;
    for id in [&running, &created] {
        assert_eq!(bed.client.sh(id, "cat /all/top /all/data/deep/inner").await?, "top\ninner");
    }
    let layers = || std::fs::read_dir(bed.daemon.dir().join("root/images/layers")).map(Iterator::count);
    let used = layers()?;
    bed.client.remove(&running).await?;
    assert_eq!(layers()?, used, "another container has it mounted");
    bed.client.remove(&created).await?;
    runtime_tests::run::until("its layers are gone", Duration::from_secs(5), || {
        Ok((layers()? == used - 2).then_some(()))
    })
}

#[tokio::test]
async fn a_retried_creation_with_an_image_volume_finds_the_first() -> Result<()> {
    let (mut bed, _store) = bed().await?;
    bed.client.pull(DATA).await?;
    let pod = bed.host_pod("again").await?;
    let config = with("c", "exec sleep 1000", vec![part(DATA, "", "/all"), part(DATA, "data", "/dir")]);
    let first = bed.client.create(&pod.id, &config, &pod.config).await?;
    assert_eq!(bed.client.create(&pod.id, &config, &pod.config).await?, first);
    bed.daemon.kill()?;
    bed.restart().await?;
    assert_eq!(bed.client.create(&pod.id, &config, &pod.config).await?, first);
    let mut other = config.clone();
    other.mounts[1].image_sub_path.clear();
    refused_with(bed.client.create(&pod.id, &other, &pod.config).await, Code::AlreadyExists, "taken")
}

#[tokio::test]
async fn image_volumes_that_cannot_be_are_refused() -> Result<()> {
    let (bed, _store) = bed().await?;
    bed.client.pull(DATA).await?;
    let pod = bed.host_pod("refused").await?;
    let create = |mount: Mount| {
        let (client, pod) = (bed.client.clone(), pod.clone());
        async move { client.create(&pod.id, &with("c", "true", vec![mount]), &pod.config).await }
    };
    // Links are followed inside the image only: neither the host's files nor the container's.
    for path in
        ["none", "data/none", "data/gone", "data/file/x", "absolute/shadow", "climbing/hostname", "nowhere"]
    {
        let status = refused(create(part(DATA, path, "/v")).await)?;
        ensure!(status.message().starts_with("ImageVolumeMountFailed"), "{path}: {status:?}");
    }
    refused(create(part(DATA, "data/loop", "/v")).await)?;
    for path in ["../etc", "data/../../etc", "/etc", "data/..", "a\0b"] {
        refused_with(create(part(DATA, path, "/v")).await, Code::InvalidArgument, "image_sub_path")?;
    }
    let absent = refused(create(part("crisp.test/absent:1", "", "/v")).await)?;
    ensure!(absent.message().starts_with("ImageVolumeMountFailed"), "{absent:?}");
    let writable = Mount { readonly: false, ..part(DATA, "", "/v") };
    refused_with(create(writable).await, Code::InvalidArgument, "readonly")?;
    let both = Mount { host_path: "/tmp".into(), ..part(DATA, "", "/v") };
    refused_with(create(both).await, Code::InvalidArgument, "exclude")?;
    for propagation in
        [MountPropagation::PropagationHostToContainer, MountPropagation::PropagationBidirectional]
    {
        let mount = Mount { propagation: propagation as i32, ..part(DATA, "", "/v") };
        refused_with(create(mount).await, Code::InvalidArgument, "propagation")?;
    }
    let options = Mount { mount_options: vec!["noexec".into()], ..part(DATA, "", "/v") };
    refused_with(create(options).await, Code::InvalidArgument, "mount_options")?;
    assert!(bed.client.containers(None).await?.is_empty());
    Ok(())
}

/// A tmpfs of the test's own on the host, which goes with all that is mounted below it.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: PathBuf) -> Result<Tmpfs> {
        std::fs::create_dir_all(&at)?;
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &at, "tmpfs", none, None)
            .with_context(|| format!("mount {}", at.display()))?;
        Ok(Tmpfs(at))
    }

    /// One whose mounts travel.
    fn shared(at: PathBuf) -> Result<Tmpfs> {
        let made = Tmpfs::new(at)?;
        rustix::mount::mount_change(&made.0, rustix::mount::MountPropagationFlags::SHARED)?;
        Ok(made)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).ok();
    }
}

#[tokio::test]
async fn read_only_reaches_the_mounts_below_when_it_is_recursive() -> Result<()> {
    let bed = Bed::new().await?;
    let features = bed.client.runtime_status().await?.runtime_handlers;
    ensure!(!features.is_empty());
    for handler in &features {
        let can = handler.features.is_some_and(|f| f.recursive_read_only_mounts);
        ensure!(can, "handler {:?} does not tell of recursive read-only mounts", handler.name);
    }
    let pod = bed.host_pod("recursive").await?;
    let dir = bed.daemon.dir().join("volume");
    std::fs::create_dir(&dir)?;
    let _below = Tmpfs::new(dir.join("below"))?;
    let mut config = container(
        "c",
        catalog::SMALL,
        "for at in /rw /ro /rro; do touch $at/x && echo $at; touch $at/below/x && echo $at/below; done 2>&1",
    );
    config.mounts = vec![
        mount(&dir, "/rw"),
        Mount { readonly: true, ..mount(&dir, "/ro") },
        Mount { readonly: true, recursive_read_only: true, ..mount(&dir, "/rro") },
    ];
    let (_, text) = pod.output(&config).await?;
    let could: Vec<_> = text.lines().filter(|line| line.starts_with('/')).collect();
    assert_eq!(could, ["/rw", "/rw/below", "/ro/below"], "{text}");
    let reported = bed.client.status(&bed.client.containers(None).await?[0].id).await?.mounts;
    assert!(reported.iter().any(|mount| mount.recursive_read_only && mount.container_path == "/rro"));
    Ok(())
}

/// Runs a privileged container with a host directory at /v; gives its id.
async fn privileged(bed: &Bed, pod: &Pod, dir: &Path, propagation: MountPropagation) -> Result<String> {
    let name = format!("{propagation:?}").to_lowercase();
    let mut config = container(&name, catalog::SMALL, "echo up; exec sleep 1000");
    security(&mut config).privileged = true;
    config.mounts = vec![Mount { propagation: propagation as i32, ..mount(dir, "/v") }];
    let id = pod.start_with(&config).await?;
    wait_log(&pod.log(&name), "up")?;
    let reported = bed.client.status(&id).await?.mounts;
    assert_eq!(reported[0].propagation, propagation as i32);
    Ok(id)
}

async fn sees(client: &Client, id: &str, path: &str) -> Result<bool> {
    Ok(client.sh(id, &format!("[ -e {path} ] && echo yes || echo no")).await? == "yes")
}

#[tokio::test]
async fn mounts_travel_as_far_as_the_propagation_says() -> Result<()> {
    use MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
    let bed = Bed::new().await?;
    let mut config = client::host_pod("travelling");
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let pod = bed.run(config).await?;
    let shared = Tmpfs::shared(bed.daemon.dir().join("shared"))?;
    let dir = &shared.0;
    for (propagation, comes_in, goes_out) in [
        (PropagationPrivate, false, false),
        (PropagationHostToContainer, true, false),
        (PropagationBidirectional, true, true),
    ] {
        let id = privileged(&bed, &pod, dir, propagation).await?;
        let host = Tmpfs::new(dir.join("by-host"))?;
        std::fs::write(host.0.join("mark"), "")?;
        assert_eq!(sees(&bed.client, &id, "/v/by-host/mark").await?, comes_in, "{propagation:?}");
        let script =
            "mkdir -p /v/by-container && mount -t tmpfs none /v/by-container && touch /v/by-container/mark";
        bed.client.sh(&id, script).await?;
        assert_eq!(dir.join("by-container/mark").exists(), goes_out, "{propagation:?}");
        // And gone on the host, it is gone inside.
        drop(host);
        ensure!(
            !sees(&bed.client, &id, "/v/by-host/mark").await?,
            "{propagation:?}: an unmount did not travel"
        );
        bed.client.sh(&id, "umount /v/by-container").await?;
        ensure!(!dir.join("by-container/mark").exists(), "{propagation:?}: an unmount did not travel out");
        bed.client.remove(&id).await?;
    }

    // A mount that is not shared cannot give what is asked for.
    let own = Tmpfs::new(bed.daemon.dir().join("own"))?;
    for (propagation, says) in
        [(PropagationHostToContainer, "shared or slave"), (PropagationBidirectional, "shared")]
    {
        let mut config = container("c", catalog::SMALL, "true");
        config.mounts = vec![Mount { propagation: propagation as i32, ..mount(&own.0, "/v") }];
        let reply = bed.client.create(&pod.id, &config, &pod.config).await;
        refused_with(reply, Code::InvalidArgument, &format!("is not on a {says} mount"))?;
    }
    Ok(())
}

#[tokio::test]
async fn mount_options_take_programs_devices_and_set_user_ids_away() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    ensure!(bed.client.runtime_status().await?.features.is_some_and(|f| f.mount_options), "no feature flag");
    let pod = bed.host_pod("options").await?;
    // nosuid and nodev are refused by the mount of the volume, not by that of the host: that may have them too.
    let dir = Tmpfs::new(bed.daemon.dir().join("volume"))?;
    let filler = Mount { ..mount(&dir.0, "/v") };
    let mut fill = container("fill", catalog::TOOLS, "cp -p /bin/nnp /v/nnp && mknod -m 666 /v/null c 1 3");
    fill.mounts = vec![filler];
    assert_eq!(pod.output(&fill).await?.0, 0);
    let script = "/v/nnp || echo no program; echo x > /v/null || echo no device";
    for (options, said) in [
        (&[][..], "Effective uid: 0\n"),
        (&["nosuid"][..], "Effective uid: 1000\n"),
        (&["nodev"][..], "Effective uid: 0\nno device\n"),
        (&["noexec"][..], "no program\n"),
        (&["noexec", "nodev", "nosuid"][..], "no program\nno device\n"),
    ] {
        let name = format!("c{}", options.concat());
        let mut config = container(&name, catalog::TOOLS, &format!("({script}) 2>/dev/null"));
        security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        let mount_options = options.iter().map(|o| (*o).to_owned()).collect();
        config.mounts = vec![Mount { mount_options, ..mount(&dir.0, "/v") }];
        assert_eq!(pod.output(&config).await?.1, said, "{options:?}");
    }
    for option in ["suid", "exec", "ro", "remount", "", "noexec,nodev"] {
        let mut config = container("bad", catalog::TOOLS, "true");
        config.mounts = vec![Mount { mount_options: vec![option.into()], ..mount(&dir.0, "/v") }];
        let reply = bed.client.create(&pod.id, &config, &pod.config).await;
        refused_with(reply, Code::InvalidArgument, "mount_options")?;
    }
    Ok(())
}
