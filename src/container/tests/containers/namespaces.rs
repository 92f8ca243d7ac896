//! Namespaces made, joined, held for a pod; user namespaces and what they own.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use container::init::reaper;
use container::namespace::{IdMaps, Wanted, hold};
use container::spec::{IdMapping, Mount, Namespace, NamespaceKind};
use container::{Error, Join, Rootfs, Stdio, rootfs};
use rustix::process::{Signal, pidfd_send_signal};

use crate::lab::{Container, Lab, wait};
use crate::mounts::mount;

fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let meta = fs::metadata(path).unwrap();
    (meta.dev(), meta.ino())
}

fn of(fd: &OwnedFd) -> (u64, u64) {
    identity(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn without(mut namespaces: Vec<Namespace>, kind: NamespaceKind) -> Vec<Namespace> {
    namespaces.retain(|namespace| namespace.kind != kind);
    namespaces
}

pub(crate) fn what_is_not_listed_is_the_hosts(lab: &Lab) {
    let container = lab.container(&["sleep", "1000"]).with(|spec| {
        spec.linux.namespaces = vec![Namespace { kind: NamespaceKind::Mount, path: String::new() }];
        spec.hostname.clear();
        spec.mounts.retain(|mount| mount.kind != "mqueue");
    });
    let (running, _created) = container.start().unwrap();
    for (kind, ours) in
        [("pid", true), ("ipc", true), ("uts", true), ("net", true), ("cgroup", true), ("mnt", false)]
    {
        let same =
            identity(format!("/proc/{}/ns/{kind}", running.pid)) == identity(format!("/proc/self/ns/{kind}"));
        assert_eq!(same, ours, "{kind}");
    }
    assert_eq!(running.exec_says("cat /proc/self/comm"), "cat");
}

pub(crate) fn the_namespaces_of_a_pod_outlive_who_made_them(lab: &Lab) {
    let sysctls = BTreeMap::from([
        ("net.ipv4.ip_unprivileged_port_start".to_owned(), "77".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ]);
    let held = hold(&Wanted {
        ipc: true,
        uts: true,
        net: true,
        hostname: "pod",
        domainname: "example",
        sysctls: Some(&sysctls),
        ..Wanted::default()
    })
    .unwrap();
    lab.assert_no_children();
    let [ipc, uts, net] = [&held.ipc, &held.uts, &held.net].map(|fd| fd.as_ref().unwrap());
    let join =
        Join { ipc: Some(ipc.as_fd()), uts: Some(uts.as_fd()), net: Some(net.as_fd()), ..Join::default() };
    let script = "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; ip link show lo | head -n 1";
    for _ in 0..2 {
        let mut container = lab.sh(script);
        container.join = join;
        let said = container.says();
        assert!(said.starts_with("pod\nexample\n77\n1\n"), "{said}");
        assert!(said.contains("UP"), "{said}");
    }
    assert_ne!(fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap().trim(), "77");
}

pub(crate) fn sysctls_reach_a_network_namespace_that_exists(lab: &Lab) {
    let net = hold(&Wanted { net: true, ..Wanted::default() }).unwrap().net.unwrap();
    let sysctls = BTreeMap::from([("net.core.somaxconn".to_owned(), "1234".to_owned())]);
    let maps = maps();
    for user in [None, Some(&maps)] {
        hold(&Wanted { net_join: Some(net.as_fd()), sysctls: Some(&sysctls), user, ..Wanted::default() })
            .unwrap();
    }
    let mut container = lab.sh("cat /proc/sys/net/core/somaxconn");
    container.join = Join { net: Some(net.as_fd()), ..Join::default() };
    assert_eq!(container.says(), "1234");
}

pub(crate) fn s15_sysctls_stay_in_the_container(lab: &Lab) {
    let before = snapshot();
    let with = |name: &str, value: &str, change: fn(&mut container::Spec)| {
        let container = lab.sh(&format!("cat /proc/sys/{}", name.replace('.', "/")));
        container.with(|spec| drop(spec.linux.sysctl.insert(name.into(), value.into()))).with(change).run()
    };
    let output = with("net.ipv4.ip_unprivileged_port_start", "99", |_| {}).unwrap();
    assert_eq!(output.stdout, "99\n");
    assert_eq!(with("kernel.shmmni", "100", |_| {}).unwrap().stdout, "100\n");
    for (name, value) in [
        ("kernel.core_pattern", "|/x"),
        ("net.ipv4/../../kernel/core_pattern", "|/x"),
        ("kernel.shm_rmid_forced", "1\n0"),
        ("kernel.sem\0", "1"),
        ("vm.swappiness", "1"),
    ] {
        let error = with(name, value, |_| {}).unwrap_err();
        assert!(error.is_invalid(), "{name}: {error}");
    }
    let error = with("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x", |_| {}).unwrap_err();
    assert!(matches!(error, Error::Failed { step: container::error::Step::Sysctl, .. }), "{error}");
    for (name, kind) in
        [("net.ipv4.ip_forward", NamespaceKind::Network), ("kernel.shmmax", NamespaceKind::Ipc)]
    {
        let change: fn(&mut container::Spec) = match kind {
            NamespaceKind::Ipc => |spec| {
                spec.linux.namespaces =
                    without(std::mem::take(&mut spec.linux.namespaces), NamespaceKind::Ipc);
            },
            _ => |spec| {
                spec.linux.namespaces =
                    without(std::mem::take(&mut spec.linux.namespaces), NamespaceKind::Network);
            },
        };
        assert!(with(name, "1", change).unwrap_err().is_invalid(), "{name}");
    }
    assert_eq!(snapshot(), before);
}

/// What of the host's `/proc/sys` the attacks above aim at.
fn snapshot() -> Vec<String> {
    [
        "kernel/core_pattern",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
        "kernel/hostname",
        "kernel/domainname",
        "net/ipv4/ip_forward",
        "net/ipv4/ip_unprivileged_port_start",
        "vm/swappiness",
    ]
    .iter()
    .map(|file| fs::read_to_string(format!("/proc/sys/{file}")).unwrap())
    .collect()
}

pub(crate) fn namespaces_are_joined_by_path(lab: &Lab) {
    let (first, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    let pid = first.pid;
    let container = lab.sh("hostname; readlink /proc/self/ns/net; cat /proc/1/comm").with(|spec| {
        spec.hostname.clear();
        for namespace in &mut spec.linux.namespaces {
            let kind = match namespace.kind {
                NamespaceKind::Network => "net",
                NamespaceKind::Uts => "uts",
                NamespaceKind::Ipc => "ipc",
                NamespaceKind::Pid => "pid",
                _ => continue,
            };
            namespace.path = format!("/proc/{pid}/ns/{kind}");
        }
    });
    let net = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(container.says(), format!("box\n{}\nsleep", net.display()));
}

pub(crate) fn a_shared_pid_namespace_has_a_reaper(lab: &Lab) {
    let reaper = reaper::spawn(None).unwrap();
    let mut container = lab.container(&["sleep", "1000"]);
    container.join = Join { pid: Some(reaper.pid_namespace.as_fd()), ..Join::default() };
    let (running, _created) = container.start().unwrap();
    assert_eq!(running.exec_says("cat /proc/1/comm"), "reaper");
    assert_eq!(
        identity("/proc/self/ns/pid_for_children"),
        identity("/proc/self/ns/pid"),
        "ours was not restored"
    );

    // An orphan ends as a zombie unless the first process reaps it.
    running.exec_says("sh -c 'sleep 0.05 & echo'");
    running.wait_for("! ps | grep -q '[s]leep 0.05'");
    assert_eq!(running.exec_says("ps -o stat | grep -c Z || true"), "0");

    // Nothing in the namespace can end it, look into it or borrow from it.
    let script = "kill -9 1; kill -15 1; kill -2 1; ls /proc/1/fd /proc/1/root/ 2>&1 | grep -c denied; cat /proc/1/environ 2>&1 | grep -c denied";
    assert_eq!(running.exec_says(script), "1\n1");
    assert_eq!(running.exec_says("grep -c 'Cap.*0000000000000000' /proc/1/status"), "5");
    assert_eq!(fs::read_dir(format!("/proc/{}/fd", reaper.pid)).unwrap().count(), 0);
    assert_eq!(fs::read_dir(format!("/proc/{}/root/", reaper.pid)).unwrap().count(), 0);

    // Its end is that of the namespace.
    pidfd_send_signal(&reaper.pidfd, Signal::KILL).unwrap();
    assert_eq!(wait(running.pidfd.as_fd()), Some(137));
    assert_eq!(wait(reaper.pidfd.as_fd()), Some(137));
}

fn maps() -> IdMaps {
    let line = vec![IdMapping { container_id: 0, host_id: 300_000, size: 65_536 }];
    IdMaps { uid: line.clone(), gid: line }
}

/// A container with a user namespace, its layers shifted.
fn shifted<'a>(lab: &'a Lab, args: &[&str]) -> Container<'a> {
    let mut container = lab.container(args).with(|spec| {
        let maps = maps();
        (spec.linux.uid_mappings, spec.linux.gid_mappings) = (maps.uid, maps.gid);
        spec.linux.namespaces.push(Namespace { kind: NamespaceKind::User, path: String::new() });
    });
    if let Rootfs::Mounts(mounts) = &mut container.rootfs {
        mounts[0].options.push("idmap".into());
    }
    container
}

/// The user namespace that owns a namespace (ioctl_nsfs(2)).
fn owner(path: &str) -> (u64, u64) {
    const NS_GET_USERNS: u64 = 0xb701;
    let file = fs::File::open(path).unwrap();
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let fd = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_USERNS as _) };
    assert!(fd >= 0, "{path}");
    // SAFETY: the descriptor is new and nobody else's.
    of(&unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn a_user_namespace_owns_all_that_is_new_and_ids_are_shifted(lab: &Lab) {
    let container = shifted(lab, &["sleep", "1000"]);
    let upper = container.upper();
    let (running, _created) = container.start().unwrap();
    let status = running.proc("status");
    assert!(status.contains("Uid:\t300000\t300000"), "{status}");
    let user = identity(format!("/proc/{}/ns/user", running.pid));
    assert_ne!(user, identity("/proc/self/ns/user"));
    for kind in ["pid", "mnt", "ipc", "uts", "net", "cgroup"] {
        assert_eq!(owner(&format!("/proc/{}/ns/{kind}", running.pid)), user, "{kind}");
    }
    let script = "id -u; stat -c %u /bin/busybox /etc /dev /dev/null /dev/pts; echo x > /dev/null && echo null; head -c 1 /dev/zero | wc -c; echo y > /made; chown 1000 /made; stat -c %u /made; cat /proc/self/uid_map";
    let said = running.exec_says(script);
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>().join(" "),
        "0 0 0 0 0 0 null 1 1000 0 300000 65536"
    );
    // On disk the layers stay as an image has them.
    assert_eq!(fs::metadata(upper.join("made")).unwrap().uid(), 1000);
    assert_eq!(running.exec_says("mknod /tmp/disk b 8 0 2>&1 | grep -c permitted"), "1");
}

pub(crate) fn a_container_joins_the_user_namespace_of_its_pod(lab: &Lab) {
    let maps = maps();
    let held = hold(&Wanted {
        ipc: true,
        uts: true,
        net: true,
        user: Some(&maps),
        hostname: "pod",
        ..Wanted::default()
    })
    .unwrap();
    let [user, ipc, uts, net] = [&held.user, &held.ipc, &held.uts, &held.net].map(|fd| fd.as_ref().unwrap());
    for fd in [ipc, uts, net] {
        assert_eq!(owner(&format!("/proc/self/fd/{}", fd.as_raw_fd())), of(user));
    }
    let reaper = reaper::spawn(Some(user.as_fd())).unwrap();
    assert_eq!(owner(&format!("/proc/{}/ns/pid", reaper.pid)), of(user));
    let shm = rootfs::shm(1 << 20, (300_000, 300_000), &lab.directory()).unwrap();
    for mappings in [true, false] {
        let mut container = shifted(lab, &["sleep", "1000"]).with(|spec| {
            spec.process.as_mut().unwrap().oom_score_adj = Some(77);
            if !mappings {
                spec.linux.uid_mappings.clear();
                spec.linux.gid_mappings.clear();
            }
        });
        container.join = Join {
            user: Some(user.as_fd()),
            ipc: Some(ipc.as_fd()),
            uts: Some(uts.as_fd()),
            net: Some(net.as_fd()),
            pid: Some(reaper.pid_namespace.as_fd()),
            cgroup: None,
        };
        container.trees.push(("/dev/shm".into(), shm.tree().unwrap()));
        let (running, _created) = container.start().unwrap();
        assert_eq!(identity(format!("/proc/{}/ns/user", running.pid)), of(user));
        let script = "hostname; cat /proc/1/comm; stat -c %u /dev/shm /dev/null; touch /dev/shm/x && stat -c %u /dev/shm/x; cat /proc/self/oom_score_adj; ip link add dummy0 type dummy 2>/dev/null; cat /proc/self/cgroup | grep -vc ':/$'";
        let output = running.exec(&running.like_init(&["/bin/sh", "-c", script])).unwrap();
        assert_eq!(
            output.stdout.split_whitespace().collect::<Vec<_>>().join(" "),
            "pod reaper 0 0 0 77 0",
            "{output:?}"
        );
    }
    pidfd_send_signal(&reaper.pidfd, Signal::KILL).unwrap();
    assert_eq!(wait(reaper.pidfd.as_fd()), Some(137));
}

pub(crate) fn volumes_of_a_user_namespace_are_shifted_when_asked(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("f"), "").unwrap();
    std::os::unix::fs::chown(volume.join("f"), Some(42), Some(43)).unwrap();
    // What the container's root could not even reach.
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let shift = |mut mount: Mount| {
        (mount.uid_mappings, mount.gid_mappings) = (maps().uid, maps().gid);
        mount
    };
    let container =
        shifted(lab, &["/bin/sh", "-c", "stat -c '%u %g' /v/f /w/f; touch /v/new"]).with(|spec| {
            spec.mounts.push(shift(mount("/v", "bind", &volume, &["rbind"])));
            spec.mounts.push(mount("/w", "bind", volume.join("f"), &["bind"]));
            spec.mounts.last_mut().unwrap().destination = "/w/f".into();
        });
    assert_eq!(container.says(), "42 43\n65534 65534");
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 0);
}

pub(crate) fn a_user_namespace_works_with_the_hosts_network(lab: &Lab) {
    let container =
        shifted(lab, &["/bin/sh", "-c", "ls -d /sys/class/net/lo; touch /sys/x 2>&1 | grep -c Read-only"]);
    let container = container.with(|spec| {
        spec.linux.namespaces = without(std::mem::take(&mut spec.linux.namespaces), NamespaceKind::Network);
    });
    assert_eq!(container.says(), "/sys/class/net/lo\n1");
}

pub(crate) fn a_user_namespace_has_terminals(lab: &Lab) {
    let mut container = shifted(lab, &["/bin/sh", "-c", "tty; stat -c %u /dev/console"]);
    container.spec.process.as_mut().unwrap().terminal = true;
    let (_running, mut created) = container.create(Stdio::Terminal { width: 80, height: 24 }).unwrap();
    let pty = created.pty.take().unwrap();
    created.start().unwrap().finish(crate::lab::soon()).unwrap();
    assert_eq!(crate::lab::read(pty, crate::lab::soon()), "/dev/pts/0\r\n0\r\n");
}

pub(crate) fn a_mapping_that_makes_no_sense_is_refused(lab: &Lab) {
    for uid in [vec![], vec![IdMapping { container_id: 0, host_id: u32::MAX, size: 2 }]] {
        let gid = maps().gid;
        let error = hold(&Wanted { user: Some(&IdMaps { uid, gid }), ..Wanted::default() }).unwrap_err();
        assert!(error.is_invalid(), "{error}");
    }
    lab.assert_no_children();
}
