//! Who a container is: user namespaces and what files look like in them, and the groups of its user.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, Pod};
use runtime_tests::client::{self, container, mount, namespaces, refused_with, security};
use runtime_tests::image::{Packing, Process, Store, Tree, catalog, debian};
use tonic::Code;

/// First id of the pods' user namespaces on the host, and how many there are.
const HOST: u32 = 200_000;
const LENGTH: u32 = 65_536;

/// Its root file system has files of several owners, and so has the image that is mounted.
const OWNED: &str = "crisp.test/owned:1";
/// critest's image of a user in a group of /etc/group.
const GROUPS: &str = "gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest";

fn map(container_id: u32, host_id: u32, length: u32) -> IdMapping {
    IdMapping { host_id, container_id, length }
}

fn userns(mode: NamespaceMode, uids: &[IdMapping], gids: &[IdMapping]) -> UserNamespace {
    UserNamespace { mode: mode as i32, uids: uids.to_vec(), gids: gids.to_vec() }
}

fn usual() -> UserNamespace {
    let map = [map(0, HOST, LENGTH)];
    userns(NamespaceMode::Pod, &map, &map)
}

/// A container in the user namespace of its pod.
fn inside(name: &str, reference: &str, script: &str) -> ContainerConfig {
    let mut config = container(name, reference, script);
    security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(usual());
    config
}

async fn pod(bed: &Bed, name: &str, change: impl FnOnce(&mut NamespaceOption)) -> Result<Pod> {
    let mut config = client::pod(name);
    namespaces(&mut config, |options| {
        options.userns_options = Some(usual());
        change(options);
    });
    bed.run(config).await
}

async fn owned() -> Result<Bed> {
    let dir = tempfile::tempdir()?;
    let mut store = Store::create(dir.path())?;
    let shell = store.layer(&debian::busybox()?, Packing::OciZstd)?;
    let mut tree = Tree::default();
    for dir in ["files", "declared"] {
        let user = format!("{dir}/user");
        tree.file(&format!("{dir}/root"), 0o600, b"").file(&user, 0o600, b"").owner(&user, 1000, 2000);
    }
    let layer = store.layer(&tree, Packing::OciZstd)?;
    let process = Process { volumes: vec!["/declared".into()], ..Process::default() };
    store.image(&[OWNED], &[shell, layer], &process, Packing::OciZstd)?;
    let bed = Bed::with(store, |_| {}).await?;
    bed.client.pull(OWNED).await?;
    Ok(bed)
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let meta = std::fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok((meta.uid(), meta.gid()))
}

#[tokio::test]
async fn files_belong_to_the_same_ids_inside_whatever_they_are_on_the_host() -> Result<()> {
    let bed = owned().await?;
    let pod = pod(&bed, "owners", |_| {}).await?;
    let dir = bed.daemon.dir().join("volumes");
    for name in ["mapped", "plain"] {
        std::fs::create_dir_all(dir.join(name))?;
        std::fs::write(dir.join(name).join("root"), "")?;
        std::fs::write(dir.join(name).join("user"), "")?;
        chown(dir.join(name).join("user"), Some(1000), Some(2000))?;
        std::fs::write(dir.join(name).join("namespace"), "")?;
        chown(dir.join(name).join("namespace"), Some(HOST), Some(HOST))?;
    }
    let mut config = inside("c", OWNED, "exec sleep 1000");
    let map = vec![map(0, HOST, LENGTH)];
    config.mounts = vec![
        Mount { uid_mappings: map.clone(), gid_mappings: map, ..mount(&dir.join("mapped"), "/mapped") },
        mount(&dir.join("plain"), "/plain"),
        Mount {
            container_path: "/image".into(),
            image: Some(client::image(OWNED)),
            readonly: true,
            ..Mount::default()
        },
    ];
    let id = pod.start_with(&config).await?;
    let owners = async |dir: &str| {
        bed.client.sh(&id, &format!("cd {dir} && stat -c '%n %u:%g' * | tr '\\n' ' '")).await
    };
    // The root file system, a volume that the image declares, an image that is mounted, and a volume of the host that
    // is id-mapped have the ids that they were made with.
    for dir in ["/files", "/declared", "/image/files"] {
        assert_eq!(owners(dir).await?, "root 0:0 user 1000:2000 ", "{dir}");
    }
    assert_eq!(owners("/mapped").await?, "namespace 65534:65534 root 0:0 user 1000:2000 ");
    // One that is not mapped belongs to nobody here, but for what the namespace itself owns.
    assert_eq!(owners("/plain").await?, "namespace 0:0 root 65534:65534 user 65534:65534 ");

    // What is written belongs on the host to whom it belongs inside.
    let write =
        "for at in / /declared/ /mapped/; do touch ${at}new ${at}given; chown 1000:2000 ${at}given; done";
    bed.client.sh(&id, write).await?;
    let snapshot = bed.daemon.dir().join("root/images/snapshots").join(&id).join("fs");
    for at in [&snapshot, &dir.join("mapped")] {
        assert_eq!(owner(&at.join("new"))?, (0, 0), "{}", at.display());
        assert_eq!(owner(&at.join("given"))?, (1000, 2000), "{}", at.display());
    }
    assert_eq!(owners("/declared").await?, "given 1000:2000 new 0:0 root 0:0 user 1000:2000 ");
    let refused = bed.client.exec(&id, &["touch", "/plain/new"], 5).await?;
    ensure!(refused.exit_code != 0, "root of the namespace wrote to a directory of the host's root");

    let process = bed.client.sh(&id, "cat /proc/self/uid_map | tr -s ' '").await?;
    assert_eq!(process.trim(), format!("0 {HOST} {LENGTH}"));
    // The pod's own files can be read, its /dev/shm written.
    bed.client
        .sh(&id, "cat /etc/hosts /etc/hostname /etc/resolv.conf >/dev/null && touch /dev/shm/x")
        .await?;
    Ok(())
}

#[tokio::test]
async fn root_of_a_user_namespace_rules_its_pod_and_nothing_else() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = client::pod("ruler");
    namespaces(&mut config, |options| options.userns_options = Some(usual()));
    config
        .linux
        .get_or_insert_default()
        .sysctls
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "81".into());
    let pod = bed.run(config).await?;
    let mut able = inside("able", catalog::SMALL, "exec sleep 1000.1875");
    security(&mut able).capabilities = Some(Capability {
        add_capabilities: vec!["SYS_ADMIN".into(), "NET_ADMIN".into(), "MKNOD".into(), "SYS_BOOT".into()],
        ..Capability::default()
    });
    let id = pod.start_with(&able).await?;
    // Every namespace of the pod belongs to it.
    bed.client.sh(&id, "ip link set lo mtu 1400 && ip addr add 10.9.9.9/32 dev lo").await?;
    bed.client.sh(&id, "hostname elsewhere && [ $(hostname) = elsewhere ]").await?;
    bed.client.sh(&id, "mount -t tmpfs none /mnt || { mkdir /mnt && mount -t tmpfs none /mnt; }").await?;
    assert_eq!(bed.client.sh(&id, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await?, "81");
    // The host does not.
    for script in [
        "mknod /tmp/disk b 8 0 && cat /tmp/disk",
        "echo 1 > /proc/sys/kernel/panic",
        "echo x > /proc/sysrq-trigger",
        "mount -o remount,rw /sys && echo 1 > /sys/kernel/uevent_seqnum",
    ] {
        let reply = bed.client.exec(&id, &["sh", "-c", script], 10).await?;
        ensure!(reply.exit_code != 0, "{script}: {}", String::from_utf8_lossy(&reply.stdout));
    }
    let process = runtime_tests::bed::process("sleep 1000.1875")?;
    assert_eq!(owner(Path::new(&format!("/proc/{process}")))?, (HOST, HOST));
    let host = std::fs::read_link("/proc/self/ns/user")?;
    ensure!(
        std::fs::read_link(format!("/proc/{process}/ns/user"))? != host,
        "it is in the host's user namespace"
    );
    Ok(())
}

#[tokio::test]
async fn every_kind_of_container_runs_in_a_user_namespace() -> Result<()> {
    let bed = owned().await?;
    let mut config = client::pod("kinds");
    namespaces(&mut config, |options| {
        options.userns_options = Some(usual());
        options.pid = NamespaceMode::Pod as i32;
    });
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let pod = bed.run(config).await?;
    let target = pod.start_with(&inside("target", OWNED, "exec sleep 1000.9375")).await?;
    type Change<'a> = Box<dyn Fn(&mut ContainerConfig) + 'a>;
    let device = Device {
        host_path: "/dev/full".into(),
        container_path: "/dev/brim".into(),
        permissions: "rw".into(),
    };
    let part = |sub_path: &str, at: &str| Mount {
        container_path: at.into(),
        image: Some(client::image(OWNED)),
        image_sub_path: sub_path.into(),
        readonly: true,
        ..Mount::default()
    };
    let of_pod = |mode: NamespaceMode, target: &str| {
        let target = target.to_owned();
        move |c: &mut ContainerConfig| {
            let options = security(c).namespace_options.get_or_insert_default();
            (options.pid, options.target_id) = (mode as i32, target.clone());
        }
    };
    let kinds: Vec<(&str, &str, Change<'_>, &str)> = vec![
        ("plain", "echo x > /dev/null && head -c 2 /dev/zero | wc -c", Box::new(|_| {}), "2\n"),
        ("terminal", "tty; stat -c %g $(tty)", Box::new(|c| c.tty = true), "/dev/pts/0\n5\n"),
        (
            "somebody",
            "touch /tmp/x && stat -c %u:%g /tmp/x",
            Box::new(|c| {
                security(c).run_as_user = Some(Int64Value { value: 1000 });
                security(c).run_as_group = Some(Int64Value { value: 2000 });
            }),
            "1000:2000\n",
        ),
        (
            "frozen",
            "touch /x 2>/dev/null || echo frozen; touch /dev/shm/x && echo shm",
            Box::new(|c| {
                security(c).readonly_rootfs = true;
            }),
            "frozen\nshm\n",
        ),
        (
            "device",
            "echo x 2>/dev/null > /dev/brim || echo full",
            Box::new(|c| c.devices = vec![device.clone()]),
            "full\n",
        ),
        (
            "masked",
            "wc -c < /proc/version; ls /proc/fs | wc -l; echo 1 2>/dev/null > /proc/sys/kernel/panic || echo no",
            Box::new(|c| {
                security(c).masked_paths = vec!["/proc/version".into(), "/proc/fs".into()];
                security(c).readonly_paths = vec!["/proc/sys".into()];
            }),
            "0\n0\nno\n",
        ),
        (
            "filtered",
            "sed -n 's/^Seccomp:.//p' /proc/self/status",
            Box::new(|c| {
                security(c).seccomp = Some(SecurityProfile::default());
            }),
            "2\n",
        ),
        (
            "parts",
            "stat -c %u:%g /dir/user /one",
            Box::new(|c| {
                c.mounts = vec![part("files", "/dir"), part("files/user", "/one")];
            }),
            "1000:2000\n1000:2000\n",
        ),
        (
            "privileged",
            "mkdir /m && mount -t tmpfs none /m && [ -w /sys ] && ls /dev/kmsg",
            Box::new(|c| {
                security(c).privileged = true;
            }),
            "/dev/kmsg\n",
        ),
        (
            "together",
            "[ $$ = 1 ] || echo not the first",
            Box::new(of_pod(NamespaceMode::Pod, "")),
            "not the first\n",
        ),
        (
            "alone",
            "ps -o args | grep -c '^sleep 1000.9375'",
            Box::new(of_pod(NamespaceMode::Container, "")),
            "0\n",
        ),
        (
            "debugger",
            "ps -o args | grep -c '^sleep 1000.9375'",
            Box::new(of_pod(NamespaceMode::Target, &target)),
            "1\n",
        ),
    ];
    let mut wrong = Vec::new();
    for (name, script, change, says) in kinds {
        let mut config = inside(name, OWNED, script);
        change(&mut config);
        match pod.output(&config).await {
            Ok((_, said)) if said == says => {}
            Ok((code, said)) => wrong.push(format!("{name} ended with {code} and said {said:?}")),
            Err(error) => wrong.push(format!("{name}: {error:#}")),
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    // A terminal for a command that is executed later belongs to its user too.
    assert_eq!(bed.client.sh(&target, "id -u; touch /made && stat -c %u /made").await?, "0\n0");
    Ok(())
}

#[tokio::test]
async fn a_user_namespace_goes_with_the_hosts_other_namespaces() -> Result<()> {
    let bed = Bed::new().await?;
    let status = bed.client.runtime_status().await?;
    let host_network = status.features.context("no features")?.user_namespaces_host_network;
    for handler in status.runtime_handlers {
        let can = handler.features.is_some_and(|features| features.user_namespaces);
        ensure!(can && host_network, "handler {:?} does not tell of user namespaces", handler.name);
    }
    let node = NamespaceMode::Node as i32;
    let pod = pod(&bed, "mixed", |options| {
        (options.network, options.ipc, options.pid) = (node, node, node);
    })
    .await?;
    let mut config = inside("c", catalog::SMALL, "exec sleep 1000.3125");
    let options = security(&mut config).namespace_options.get_or_insert_default();
    (options.network, options.ipc, options.pid) = (node, node, node);
    security(&mut config).capabilities = Some(Capability {
        add_capabilities: vec!["NET_ADMIN".into(), "SYS_ADMIN".into()],
        ..Capability::default()
    });
    let id = pod.start_with(&config).await?;
    for kind in ["net", "ipc", "pid"] {
        let inside = bed.client.sh(&id, &format!("readlink /proc/self/ns/{kind}")).await?;
        assert_eq!(inside, std::fs::read_link(format!("/proc/self/ns/{kind}"))?.display().to_string());
    }
    assert_eq!(
        bed.client.sh(&id, "id -u; cat /proc/self/uid_map | tr -s ' '").await?,
        format!("0\n 0 {HOST} {LENGTH}")
    );
    // The names are the host's, the rights are not.
    bed.client.sh(&id, "ls /sys/class/net/lo && ps | grep -q 'sleep 1000.3125'").await?;
    for script in
        ["ip link set lo mtu 65536", "kill -0 1", "echo 1 > /sys/class/net/lo/mtu", "hostname taken"]
    {
        let reply = bed.client.exec(&id, &["sh", "-c", script], 10).await?;
        ensure!(reply.exit_code != 0, "{script} was allowed on the host");
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_with_users_of_its_own_is_on_the_network_like_any_other() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let port = runtime_tests::registry::free_port()?;
    let mut config = client::pod("reachable");
    namespaces(&mut config, |options| options.userns_options = Some(usual()));
    config.port_mappings =
        vec![PortMapping { container_port: 80, host_port: i32::from(port), ..PortMapping::default() }];
    let pod = bed.run(config).await?;
    let script = "mkdir /www; echo page > /www/index.html; echo up; exec httpd -f -p 80 -h /www";
    let id = pod.start_with(&inside("web", catalog::SMALL, script)).await?;
    runtime_tests::bed::wait_log(&pod.log("web"), "up")?;
    let ip = bed.client.pod_status(&pod.id).await?.network.context("no network in the status")?.ip;
    for to in [format!("{ip}:80"), format!("127.0.0.1:{port}")] {
        let page = runtime_tests::run::until("the page", std::time::Duration::from_secs(5), || {
            Ok(runtime_tests::http::Request::new("GET", "/").send(to.parse()?).ok())
        })?;
        assert_eq!(page.text(), "page\n", "{to}");
    }
    // And it reaches others.
    let other = bed.pod("other").await?;
    other.start_with(&container("web", catalog::SMALL, script)).await?;
    runtime_tests::bed::wait_log(&other.log("web"), "up")?;
    let ip = bed.client.pod_status(&other.id).await?.network.context("no network in the status")?.ip;
    let fetch = format!("for n in $(seq 50); do wget -qO- http://{ip}/ && exit; sleep 0.1; done; exit 1");
    assert_eq!(bed.client.sh(&id, &fetch).await?, "page");
    pod.remove().await?;
    other.remove().await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn user_namespaces_that_cannot_be_are_refused() -> Result<()> {
    use NamespaceMode::{Container, Node, Pod, Target};
    let bed = Bed::new().await?;
    let one = [map(0, HOST, LENGTH)];
    for (what, options) in [
        ("no mapping", userns(Pod, &[], &[])),
        ("no gid mapping", userns(Pod, &one, &[])),
        ("no uid mapping", userns(Pod, &[], &one)),
        ("two mappings", userns(Pod, &[map(0, HOST, 10), map(10, HOST + 10, 10)], &one)),
        ("overlapping mappings", userns(Pod, &[map(0, HOST, 10), map(5, HOST, 10)], &one)),
        ("too many mappings", userns(Pod, &vec![map(0, HOST, 1); 400], &one)),
        ("length zero", userns(Pod, &[map(0, HOST, 0)], &one)),
        ("root is not mapped", userns(Pod, &[map(1, HOST, 10)], &one)),
        ("out of range outside", userns(Pod, &[map(0, u32::MAX - 5, 10)], &one)),
        ("mappings without a namespace", userns(Node, &one, &one)),
        ("mode CONTAINER", userns(Container, &one, &one)),
        ("mode TARGET", userns(Target, &one, &one)),
        ("no known mode", UserNamespace { mode: 9, ..userns(Pod, &one, &one) }),
    ] {
        let mut config = client::host_pod("bad");
        namespaces(&mut config, |o| o.userns_options = Some(options));
        let status = client::refused(bed.client.run_pod(&config).await).context(what)?;
        ensure!(status.code() == Code::InvalidArgument, "{what}: {status:?}");
    }
    assert!(bed.client.pods(None).await?.is_empty());

    // A container is not told that it has ids which its pod does not have.
    let mapped = pod(&bed, "mapped", |_| {}).await?;
    let plain = bed.host_pod("plain").await?;
    let other = [map(0, HOST + 1, LENGTH)];
    for (pod, what, options) in [
        (&plain, "a namespace in a pod without", usual()),
        (&mapped, "other uids", userns(Pod, &other, &one)),
        (&mapped, "other gids", userns(Pod, &one, &other)),
        (&mapped, "no ids", userns(Pod, &[], &[])),
        (&mapped, "the host's", userns(Node, &[], &[])),
        (&mapped, "mode CONTAINER", userns(Container, &one, &one)),
        (&mapped, "mode TARGET", userns(Target, &one, &one)),
    ] {
        let mut config = container("c", catalog::SMALL, "true");
        security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(options);
        let reply = bed.client.create(&pod.id, &config, &pod.config).await;
        refused_with(reply, Code::InvalidArgument, "namespace").context(what)?;
    }
    // Nor that it can be somebody who is not in it.
    for (user, group, more) in [(LENGTH, 0, 0), (0, LENGTH, 0), (0, 0, LENGTH)] {
        let mut config = inside("c", catalog::SMALL, "true");
        let context = security(&mut config);
        context.run_as_user = Some(Int64Value { value: user.into() });
        context.run_as_group = Some(Int64Value { value: group.into() });
        context.supplemental_groups = vec![more.into()];
        let reply = bed.client.create(&mapped.id, &config, &mapped.config).await;
        refused_with(reply, Code::InvalidArgument, &format!("{LENGTH} is not mapped"))?;
    }
    // So with volumes.
    for (what, uids, gids) in [
        ("no gids", one.to_vec(), vec![]),
        ("no uids", vec![], one.to_vec()),
        ("length zero", vec![map(0, HOST, 0)], one.to_vec()),
        ("out of range", vec![map(0, u32::MAX, 2)], one.to_vec()),
        ("overlap inside", vec![map(0, HOST, 10), map(9, HOST + 10, 10)], one.to_vec()),
        ("overlap outside", vec![map(0, HOST, 10), map(10, HOST + 9, 10)], one.to_vec()),
        ("too many", (0..400).map(|n| map(n, HOST + n, 1)).collect(), one.to_vec()),
    ] {
        let mut config = inside("c", catalog::SMALL, "true");
        let volume = mount(bed.daemon.dir(), "/v");
        config.mounts = vec![Mount { uid_mappings: uids, gid_mappings: gids, ..volume }];
        let reply = bed.client.create(&mapped.id, &config, &mapped.config).await;
        refused_with(reply, Code::InvalidArgument, "mapping").context(what)?;
    }
    assert!(bed.client.containers(None).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn supplemental_groups_are_merged_with_the_images_or_not() -> Result<()> {
    let bed = Bed::new().await?;
    ensure!(
        bed.client.runtime_status().await?.features.is_some_and(|f| f.supplemental_groups_policy),
        "the feature is not told"
    );
    bed.client.pull(GROUPS).await?;
    let pod = bed.host_pod("groups").await?;
    use SupplementalGroupsPolicy::{Merge, Strict};
    for (name, policy, asked, groups) in [
        ("merge", Merge, vec![1234], vec![1000, 1234, 50000]),
        ("strict", Strict, vec![1234], vec![1000, 1234]),
        ("merge-none", Merge, vec![], vec![1000, 50000]),
        ("strict-none", Strict, vec![], vec![1000]),
        ("merge-twice", Merge, vec![1234, 50000, 1234], vec![1000, 1234, 50000]),
    ] {
        let mut config = container(name, GROUPS, "exec sleep 1000");
        let context = security(&mut config);
        (context.supplemental_groups, context.supplemental_groups_policy) = (asked, policy as i32);
        let id = pod.start_with(&config).await?;
        let user =
            bed.client.status(&id).await?.user.and_then(|u| u.linux).context("no user in the status")?;
        assert_eq!((user.uid, user.gid, &user.supplemental_groups), (1000, 1000, &groups), "{name}");
        // In the first process and in one that is executed beside it.
        let said: Vec<i64> = bed
            .client
            .sh(&id, "sed -n 's/^Groups:.//p' /proc/1/status; id -G")
            .await?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let count = |group: &i64| said.iter().filter(|g| *g == group).count();
        ensure!(
            groups.iter().all(|group| count(group) == 2) && said.len() == 2 * groups.len(),
            "{name}: {said:?}"
        );
    }
    // The primary group is the one asked for; /etc/group is asked by the user's name all the same.
    let mut config = container("group", GROUPS, "id -G");
    let context = security(&mut config);
    context.run_as_user = Some(Int64Value { value: 1000 });
    context.run_as_group = Some(Int64Value { value: 7 });
    assert_eq!(pod.output(&config).await?.1, "7 50000\n");

    let mut odd = container("odd", GROUPS, "true");
    security(&mut odd).supplemental_groups_policy = 7;
    refused_with(bed.client.create(&pod.id, &odd, &pod.config).await, Code::InvalidArgument, "policy 7")?;
    let mut odd = container("odd", GROUPS, "true");
    security(&mut odd).supplemental_groups = vec![-1];
    refused_with(bed.client.create(&pod.id, &odd, &pod.config).await, Code::InvalidArgument, "-1")
}
