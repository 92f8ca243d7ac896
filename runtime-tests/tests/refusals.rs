//! Bad input of every kind: a clear error with the right code, nothing made, nothing left, the daemon unmoved.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{self, Reply, container, mount, namespaces, refused, refused_with, security};
use runtime_tests::image::tree::header;
use runtime_tests::image::{Packing, Process, Store, Tree, catalog};
use runtime_tests::registry::Fault;
use tonic::Code;

/// Runs refused calls between two looks at the machine.
struct Watch {
    bed: Bed,
    pid: u32,
    before: std::collections::BTreeSet<String>,
}

impl Watch {
    fn over(mut bed: Bed) -> Watch {
        let (pid, before) = (bed.daemon.pid(), bed.daemon.traces());
        Watch { bed, pid, before }
    }

    async fn end(mut self, pods: usize, containers: usize) -> Result<()> {
        let (found, inner) = (self.bed.client.pods(None).await?, self.bed.client.containers(None).await?);
        ensure!(found.len() == pods, "pods were made: {found:?}");
        ensure!(inner.len() == containers, "containers were made: {inner:?}");
        self.bed.unmoved(self.pid)?;
        self.bed.nothing_left(&self.before)
    }
}

#[tokio::test]
async fn malformed_image_references() -> Result<()> {
    let watch = Watch::over(Bed::with(catalog::ensure()?, |_| {}).await?);
    let long = format!("crisp.test/{}:1", "a".repeat(300));
    let bad = [
        "",
        " ",
        "crisp.test/UPPER:1",
        "crisp.test/x:",
        "crisp.test/x:-tag",
        "crisp.test//x:1",
        "/x:1",
        "crisp.test/x@",
        "crisp.test/x@sha256:12",
        "crisp.test/x@md5:d41d8cd98f00b204e9800998ecf8427e",
        "crisp.test/../x:1",
        "crisp.test/x y:1",
        "crisp.test/x\0:1",
        "http://crisp.test/x:1",
        "crisp.test:99999999/x:1",
        "crisp.test/\u{e9}:1",
        &long,
    ];
    for reference in bad {
        let status = refused(watch.bed.client.pull(reference).await)?;
        ensure!(status.code() == Code::InvalidArgument, "{reference:?}: {status:?}");
        ensure!(!status.message().is_empty(), "{reference:?}: no message");
    }
    ensure!(
        watch.bed.registry.requests().is_empty(),
        "asked the registry: {:?}",
        watch.bed.registry.requests()
    );
    watch.end(0, 0).await
}

#[tokio::test]
async fn images_and_hosts_that_are_not_there() -> Result<()> {
    let watch = Watch::over(Bed::with(catalog::ensure()?, |_| {}).await?);
    let client = &watch.bed.client;
    refused_with(client.pull("crisp.test/absent:1").await, Code::NotFound, "absent")?;
    refused_with(client.pull("crisp.test/small:absent").await, Code::NotFound, "absent")?;
    let digest = format!("crisp.test/small@sha256:{}", "0".repeat(64));
    refused_with(client.pull(&digest).await, Code::NotFound, "")?;
    // Nothing listens there; the kubelet knows this by the prefix and the code.
    let status = refused(client.pull("127.0.0.1:1/x:1").await)?;
    ensure!(
        status.code() == Code::Unknown && status.message().starts_with("RegistryUnavailable"),
        "{status:?}"
    );
    let status = refused(client.pull("no-such-host.invalid/x:1").await)?;
    ensure!(status.message().starts_with("RegistryUnavailable"), "{status:?}");
    for code in [401, 403] {
        watch.bed.registry.fail("/small/", Fault::Status(code), None);
        let status = refused(client.pull(catalog::SMALL).await)?;
        ensure!(!matches!(status.code(), Code::Ok | Code::Internal), "{code}: {status:?}");
        watch.bed.registry.heal();
    }
    client.pull(catalog::SMALL).await?;
    client.remove_image(catalog::SMALL).await?;
    watch.end(0, 0).await
}

#[tokio::test]
async fn content_that_is_not_what_its_digest_says() -> Result<()> {
    let store = catalog::ensure()?;
    let manifest = store.references[catalog::SMALL].digest.clone();
    let blobs: Vec<String> = store
        .closure(&store.references[catalog::SMALL])?
        .into_iter()
        .map(|b| b.digest)
        .filter(|d| *d != manifest)
        .collect();
    let layer = store.read(&blobs[0])?;
    let watch = Watch::over(Bed::with(store, |_| {}).await?);
    let (client, registry) = (&watch.bed.client, &watch.bed.registry);
    let mut flipped = layer.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for blob in &blobs {
        for wrong in [flipped.clone(), Vec::new(), layer[..100].to_vec(), [layer.clone(), vec![0]].concat()] {
            registry.fail(blob, Fault::Replace(wrong), None);
            let status = refused(client.pull(catalog::SMALL).await)?;
            ensure!(!status.message().is_empty(), "{status:?}");
            registry.heal();
            ensure!(client.image_status(catalog::SMALL).await?.is_none(), "a damaged image is listed");
        }
    }
    for junk in [
        &b""[..],
        b"{",
        b"null",
        b"[]",
        b"{\"schemaVersion\":1}",
        b"{\"schemaVersion\":2,\"layers\":3}",
        &[0xff; 64],
    ] {
        registry.fail("/manifests/", Fault::Replace(junk.to_vec()), None);
        refused(client.pull(catalog::SMALL).await)?;
        registry.heal();
    }
    client.pull(catalog::SMALL).await?;
    client.remove_image(catalog::SMALL).await?;
    watch.end(0, 0).await
}

/// A layer as bytes, and what is wrong with it.
fn hostile_layers() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let end = [0u8; 1024];
    let entry = |name: &str, kind: u8, target: &str, content: &[u8]| -> Result<Vec<u8>> {
        let mut bytes = header(name, kind, 0o644, (0, 0), content.len() as u64, target)?.to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(bytes)
    };
    let with_end = |parts: &[Vec<u8>]| [parts.concat(), end.to_vec()].concat();
    let mut torn = header("x", b'0', 0o644, (0, 0), 5000, "")?.to_vec();
    torn.extend_from_slice(b"short");
    let mut checksum = entry("x", b'0', "", b"y")?;
    checksum[148] ^= 1;
    let mut size = entry("x", b'0', "", b"")?;
    // Base 256, negative (tar(5)).
    size[124..136].fill(0xff);
    Ok(vec![
        ("no tar at all", b"this is not a tar file, nor will it ever be one".repeat(100)),
        ("file cut short", torn),
        ("wrong checksum", with_end(&[checksum])),
        ("negative size", with_end(&[size])),
        ("hard link to nothing", with_end(&[entry("x", b'1', "absent", b"")?])),
    ])
}

#[tokio::test]
async fn layers_that_cannot_be_unpacked() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut store = Store::create(dir.path())?;
    let mut names = Vec::new();
    for (at, (what, tar)) in hostile_layers()?.into_iter().enumerate() {
        for packing in [Packing::OciPlain, Packing::OciGzip, Packing::OciZstd] {
            let name = format!("crisp.test/bad{at}-{packing:?}:1").to_lowercase();
            let layer = store.layer_of_tar(&tar, packing)?;
            store.image(&[&name], &[layer], &Process::default(), packing)?;
            names.push((what, name));
        }
    }
    let watch = Watch::over(Bed::with(store, |_| {}).await?);
    for (what, name) in names {
        let status = refused(watch.bed.client.pull(&name).await)?;
        ensure!(!status.message().is_empty() && status.code() != Code::NotFound, "{what}: {status:?}");
    }
    watch.end(0, 0).await
}

/// Layers that try to write outside: either refused, or what they write stays inside.
#[tokio::test]
async fn layers_that_climb_out() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let target = dir.path().join("target");
    std::fs::create_dir(&target)?;
    let outside = target.display().to_string();
    let up = "../".repeat(20) + outside.trim_start_matches('/');
    let mut store = Store::create(&dir.path().join("store"))?;
    let base = store.layer(&runtime_tests::image::debian::busybox()?, Packing::OciZstd)?;
    let entry = |name: &str, kind: u8, link: &str, content: &[u8]| -> Result<Vec<u8>> {
        let mut bytes = header(name, kind, 0o644, (0, 0), content.len() as u64, link)?.to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(bytes)
    };
    let attacks = [
        ("dots", vec![entry(&format!("{up}/dots"), b'0', "", b"x")?]),
        ("absolute", vec![entry(&format!("{outside}/absolute"), b'0', "", b"x")?]),
        ("symlink", vec![entry("out", b'2', &outside, b"")?, entry("out/symlink", b'0', "", b"x")?]),
        ("relative", vec![entry("out", b'2', &up, b"")?, entry("out/relative", b'0', "", b"x")?]),
        ("whiteout", vec![entry("out", b'2', &outside, b"")?, entry("out/.wh.precious", b'0', "", b"")?]),
    ];
    std::fs::write(target.join("precious"), "kept")?;
    let mut names = Vec::new();
    for (name, parts) in attacks {
        let tar = [parts.concat(), vec![0; 1024]].concat();
        let layer = store.layer_of_tar(&tar, Packing::OciGzip)?;
        let name = format!("crisp.test/climb-{name}:1");
        store.image(&[&name], &[base.clone(), layer], &Process::default(), Packing::OciGzip)?;
        names.push(name);
    }
    let bed = Bed::with(store, |_| {}).await?;
    let pod = bed.host_pod("climb").await?;
    for name in names {
        if bed.client.pull(&name).await.is_ok() {
            let inner = name.replace(['/', ':', '.'], "-");
            pod.output(&container(&inner, &name, "true")).await?;
        }
        let found: Vec<_> =
            std::fs::read_dir(&target)?.filter_map(|e| e.ok().map(|e| e.file_name())).collect();
        ensure!(found == ["precious"], "{name} reached the host: {found:?}");
    }
    Ok(())
}

#[tokio::test]
async fn pods_that_cannot_be() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let watch = Watch::over(bed);
    let client = &watch.bed.client;
    let no_metadata = PodSandboxConfig { metadata: None, ..client::pod("x") };
    refused_with(client.run_pod(&no_metadata).await, Code::InvalidArgument, "metadata")?;
    for (field, change) in [
        ("name", (|m: &mut PodSandboxMetadata| m.name.clear()) as fn(&mut PodSandboxMetadata)),
        ("uid", |m| m.uid.clear()),
        ("namespace", |m| m.namespace.clear()),
    ] {
        let mut config = client::pod("x");
        config.metadata.iter_mut().for_each(change);
        refused_with(client.run_pod(&config).await, Code::InvalidArgument, field)?;
    }
    let unknown = client.run_pod_with(&client::pod("x"), "no-such-handler").await;
    refused_with(unknown, Code::InvalidArgument, "no-such-handler")?;

    let sysctl = |name: &str, value: &str| {
        let mut config = client::pod("x");
        config.linux.get_or_insert_default().sysctls = HashMap::from([(name.to_owned(), value.to_owned())]);
        config
    };
    for config in [
        sysctl("kernel.no_such_thing", "1"),
        sysctl("vm.swappiness", "1"),
        sysctl("../../etc/passwd", "1"),
        sysctl("net/../vm/swappiness", "1"),
        sysctl("kernel.shmmax", "many"),
    ] {
        let status = refused(client.run_pod(&config).await)?;
        ensure!(!status.message().is_empty(), "{status:?}");
    }

    let mapped = |uids: Vec<IdMapping>, mode: NamespaceMode| {
        let mut config = client::pod("x");
        namespaces(&mut config, |options| {
            options.userns_options =
                Some(UserNamespace { mode: mode as i32, uids: uids.clone(), gids: uids });
        });
        config
    };
    let map = |container_id, host_id, length| IdMapping { host_id, container_id, length };
    for config in [
        mapped(vec![], NamespaceMode::Pod),
        mapped(vec![map(0, 100_000, 0)], NamespaceMode::Pod),
        mapped(vec![map(0, 100_000, 10), map(10, 200_000, 10)], NamespaceMode::Pod),
        mapped(vec![map(0, u32::MAX, 65536)], NamespaceMode::Pod),
        mapped(vec![map(0, 100_000, 65536)], NamespaceMode::Container),
        mapped(vec![map(0, 100_000, 65536)], NamespaceMode::Target),
    ] {
        let status = refused(client.run_pod(&config).await)?;
        ensure!(matches!(status.code(), Code::InvalidArgument), "{status:?}");
    }

    let mut ports = client::pod("x");
    ports.port_mappings =
        vec![PortMapping { container_port: 70_000, host_port: 70_000, ..PortMapping::default() }];
    refused(client.run_pod(&ports).await)?;
    ports.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 20_080,
        host_ip: "not an address".into(),
        ..PortMapping::default()
    }];
    refused(client.run_pod(&ports).await)?;
    let mut parent = client::pod("x");
    parent.linux.get_or_insert_default().cgroup_parent = "/../../escape".into();
    refused(client.run_pod(&parent).await)?;
    let mut name = client::pod("x");
    name.hostname = "h".repeat(65);
    refused(client.run_pod(&name).await)?;
    watch.end(0, 0).await
}

#[tokio::test]
async fn containers_that_cannot_be() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("refuses").await?;
    pod.output(&container("first", catalog::SMALL, "true")).await?;
    bed.client.remove(&bed.client.containers(None).await?[0].id).await?;
    let watch = Watch::over(bed);
    let client = &watch.bed.client;
    let plain = || container("c", catalog::SMALL, "exec sleep 1000");
    let changed = |change: &dyn Fn(&mut ContainerConfig)| {
        let mut config = plain();
        change(&mut config);
        config
    };
    let create = |config: ContainerConfig| {
        let (client, pod) = (client.clone(), pod.clone());
        async move { client.create(&pod.id, &config, &pod.config).await }
    };

    refused_with(client.create(&"e".repeat(64), &plain(), &pod.config).await, Code::NotFound, "")?;
    refused_with(client.create("../../etc", &plain(), &pod.config).await, Code::NotFound, "")?;
    refused_with(create(changed(&|c| c.metadata = None)).await, Code::InvalidArgument, "metadata")?;
    refused_with(create(changed(&|c| c.image = None)).await, Code::InvalidArgument, "image")?;
    refused_with(
        create(changed(&|c| c.image = Some(client::image("crisp.test/absent:1")))).await,
        Code::NotFound,
        "absent",
    )?;

    for path in ["../escape.log", "/../escape.log", "a/../../escape.log", "..", "c\0.log"] {
        let status = refused(create(changed(&|c| c.log_path = path.to_owned())).await)?;
        ensure!(status.code() == Code::InvalidArgument, "log path {path:?}: {status:?}");
    }
    for (key, value) in [("", &b"x"[..]), ("A=B", b"x"), ("A", b"x\0y"), ("A\0", b"x")] {
        let env = vec![KeyValue { key: key.to_owned(), value: value.to_vec() }];
        refused_with(create(changed(&|c| c.envs = env.clone())).await, Code::InvalidArgument, "")?;
    }
    refused(create(changed(&|c| c.working_dir = "relative".into())).await)?;
    refused(create(changed(&|c| c.command = vec!["nul\0byte".into()])).await)?;

    let number = |value| Some(Int64Value { value });
    refused_with(
        create(changed(&|c| security(c).run_as_group = number(5))).await,
        Code::InvalidArgument,
        "",
    )?;
    refused(
        create(changed(&|c| {
            security(c).run_as_user = number(-1);
        }))
        .await,
    )?;
    refused(
        create(changed(&|c| {
            security(c).run_as_user = number(1 << 40);
        }))
        .await,
    )?;
    refused(create(changed(&|c| security(c).run_as_username = "nobody-knows-me".into())).await)?;
    let both = changed(&|c| {
        security(c).run_as_user = number(5);
        security(c).run_as_username = "nobody".into();
    });
    refused_with(create(both).await, Code::InvalidArgument, "")?;
    // The pod does not say privileged.
    refused_with(
        create(changed(&|c| security(c).privileged = true)).await,
        Code::InvalidArgument,
        "privileged",
    )?;
    let capability = |names: &[&str]| Capability {
        add_capabilities: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Capability::default()
    };
    refused(create(changed(&|c| security(c).capabilities = Some(capability(&["FLY"])))).await)?;
    let profile =
        |kind, path: &str| Some(SecurityProfile { profile_type: kind, localhost_ref: path.to_owned() });
    let local = security_profile::ProfileType::Localhost as i32;
    refused(create(changed(&|c| security(c).seccomp = profile(local, "/no/such/profile.json"))).await)?;
    refused(create(changed(&|c| security(c).seccomp = profile(local, "/etc/passwd"))).await)?;
    refused(create(changed(&|c| security(c).seccomp = profile(77, ""))).await)?;
    refused(create(changed(&|c| security(c).apparmor = profile(local, "no-such-profile"))).await)?;
    let target = changed(&|c| {
        let options = security(c).namespace_options.get_or_insert_default();
        options.pid = NamespaceMode::Target as i32;
        options.target_id = "f".repeat(64);
    });
    refused(create(target).await)?;

    let mounted = |mount: Mount| changed(&move |c| c.mounts = vec![mount.clone()]);
    let tmp = Path::new("/tmp");
    let recursive = Mount { recursive_read_only: true, ..mount(tmp, "/m") };
    refused_with(create(mounted(recursive)).await, Code::InvalidArgument, "")?;
    refused(create(mounted(Mount { propagation: 9, ..mount(tmp, "/m") })).await)?;
    let two = Mount { image: Some(client::image(catalog::SMALL)), ..mount(tmp, "/m") };
    refused_with(create(mounted(two)).await, Code::InvalidArgument, "")?;
    refused(create(mounted(Mount::default())).await)?;
    refused(create(mounted(mount(Path::new("relative"), "/m"))).await)?;
    let device = Device {
        host_path: "/dev/no-such-device".into(),
        container_path: "/dev/x".into(),
        permissions: "rwm".into(),
    };
    refused(create(changed(&|c| c.devices = vec![device.clone()])).await)?;
    refused(
        create(changed(&|c| c.cdi_devices = vec![CdiDevice { name: "nobody.com/makes=this".into() }])).await,
    )?;

    // Refused by whichever call notices; gone afterwards.
    let start = |config: ContainerConfig| {
        let (client, pod) = (client.clone(), pod.clone());
        async move {
            let id = client.create(&pod.id, &config, &pod.config).await?;
            let started: Reply<()> = client.start(&id).await;
            client.remove(&id).await?;
            started
        }
    };
    let huge = vec![KeyValue { key: "HUGE".into(), value: vec![b'x'; 3 << 20] }];
    refused(start(changed(&|c| c.envs = huge.clone())).await)?;
    let absent = start(changed(&|c| c.command = vec!["/no/such/program".into()])).await;
    refused_with(absent, Code::Unknown, "no such file")?;
    let directory = start(changed(&|c| c.command = vec!["/tmp".into()])).await;
    refused_with(directory, Code::Unknown, "is a directory")?;
    let not_a_program = start(changed(&|c| c.command = vec!["/etc/passwd".into()])).await;
    refused(not_a_program)?;
    let file = Mount { ..mount(Path::new("/etc/passwd"), "/tmp") };
    refused(start(mounted(file)).await)?;
    refused(
        start(changed(&|c| {
            c.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
                cpuset_cpus: "9999".into(),
                ..LinuxContainerResources::default()
            })
        }))
        .await,
    )?;

    // After all that the pod still works.
    let id = pod.start("c", "exit 0").await?;
    client.wait_exit(&id).await?;
    client.remove(&id).await?;
    watch.end(1, 0).await
}

#[tokio::test]
async fn ids_with_slashes_dots_and_worse() -> Result<()> {
    let bed = Bed::new().await?;
    bed.host_pod("ids").await?;
    let watch = Watch::over(bed);
    let client = &watch.bed.client;
    let long = "a".repeat(100_000);
    for id in [
        "",
        ".",
        "..",
        "../p",
        "/",
        "/etc/passwd",
        "a/b",
        "*",
        "\n",
        "\0",
        "%",
        "'; drop table pods; --",
        &long,
    ] {
        refused_with(client.pod_status(id).await, Code::NotFound, "")?;
        refused_with(client.status(id).await, Code::NotFound, "")?;
        refused_with(client.exec(id, &["true"], 1).await, Code::NotFound, "")?;
        client.stop_pod(id).await?;
        client.remove_pod(id).await?;
        client.stop(id, 1).await?;
        client.remove(id).await?;
    }
    watch.end(1, 0).await
}

#[tokio::test]
async fn commands_that_cannot_be_executed() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("exec").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let watch = Watch::over(bed);
    let client = &watch.bed.client;
    refused_with(client.exec(&id, &[], 5).await, Code::InvalidArgument, "")?;
    let absent = client.exec(&id, &["/no/such/program"], 5).await;
    refused_with(absent, Code::Unknown, "no such file")?;
    refused(client.exec(&id, &["/etc/passwd"], 5).await)?;
    refused(client.exec(&id, &["nul\0byte"], 5).await)?;
    let huge = "x".repeat(3 << 20);
    refused(client.exec(&id, &["/bin/true", &huge], 5).await)?;
    let status = refused(client.exec(&id, &["/bin/sleep", "1000.625"], 1).await)?;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    tokio::time::sleep(Duration::from_millis(100)).await;
    ensure!(!runtime_tests::bed::alive("sleep 1000.625"), "the command outlived its deadline");
    watch.end(1, 1).await
}

#[tokio::test]
async fn images_whose_config_cannot_be_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut store = Store::create(dir.path())?;
    let layer = store.layer(&runtime_tests::image::debian::busybox()?, Packing::OciZstd)?;
    let user = Process { user: "stranger".into(), ..Process::default() };
    store.image(&["crisp.test/stranger:1"], std::slice::from_ref(&layer), &user, Packing::OciZstd)?;
    let sh = vec!["/bin/sh".to_owned()];
    let volume =
        Process { volumes: vec!["../../../../tmp/volume".into()], cmd: sh.clone(), ..Process::default() };
    store.image(&["crisp.test/volume:1"], std::slice::from_ref(&layer), &volume, Packing::OciZstd)?;
    let mut tree = Tree::default();
    tree.symlink("etc", "/no/where");
    let dangling = store.layer(&tree, Packing::OciZstd)?;
    store.image(&["crisp.test/dangling:1"], &[dangling], &Process::default(), Packing::OciZstd)?;
    let bed = Bed::with(store, |_| {}).await?;
    let pod = bed.host_pod("configs").await?;
    for name in ["stranger", "volume", "dangling"] {
        bed.client.pull(&format!("crisp.test/{name}:1")).await?;
    }
    // A volume that points outside is made inside. Also, the first container of a pod brings what stays until it goes.
    let id = pod.start_with(&container("first", "crisp.test/volume:1", "exit 0")).await?;
    bed.client.wait_exit(&id).await?;
    bed.client.remove(&id).await?;
    ensure!(!Path::new("/tmp/volume").exists(), "an image's volume was made on the host");
    let watch = Watch::over(bed);
    let client = &watch.bed.client;
    let stranger = container("c", "crisp.test/stranger:1", "true");
    refused_with(client.create(&pod.id, &stranger, &pod.config).await, Code::InvalidArgument, "stranger")?;
    let mut nothing = container("c", "crisp.test/dangling:1", "true");
    nothing.command.clear();
    refused_with(client.create(&pod.id, &nothing, &pod.config).await, Code::InvalidArgument, "")?;
    watch.end(1, 0).await
}
