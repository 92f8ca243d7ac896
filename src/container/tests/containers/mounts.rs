//! Mounts of the specification, `/dev`, masks, and the root itself.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use container::cgroup::Host;
use container::error::{Errno, Step};
use container::spec::{Device, IdMapping, Mount};
use container::{Error, Rootfs, rootfs};
use rustix::fs::StatVfsMountFlags;

use crate::lab::{Lab, Shared};

pub(crate) fn mount(destination: &str, kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: source.as_ref().to_str().unwrap().into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

/// The lines of mountinfo about one mount point, as the container sees them.
fn info(container: crate::lab::Container<'_>, point: &str) -> String {
    let text = container
        .with(|spec| spec.process.as_mut().unwrap().args = vec!["cat".into(), "/proc/self/mountinfo".into()])
        .says();
    let lines: Vec<_> = text.lines().filter(|line| line.split(' ').nth(4) == Some(point)).collect();
    lines.join("\n")
}

pub(crate) fn binds_show_the_host_and_obey_their_attributes(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("f"), "from the host").unwrap();
    let with = |options: &[&str], script: &str| {
        let container = lab.sh(script);
        container.with(|spec| spec.mounts.push(mount("/v", "bind", &volume, options))).run().unwrap()
    };
    assert_eq!(with(&["rbind"], "cat /v/f; echo back > /v/g").stdout, "from the host");
    assert_eq!(fs::read_to_string(volume.join("g")).unwrap(), "back\n");
    assert!(with(&["rbind", "ro"], "touch /v/x").stderr.contains("Read-only"));
    assert!(with(&["bind", "noexec"], "cp /bin/busybox /v/b; /v/b true").stderr.contains("denied"));
    let flags = info(
        lab.sh("").with(|spec| {
            spec.mounts.push(mount("/v", "bind", &volume, &["rbind", "nosuid", "nodev", "noexec", "noatime"]))
        }),
        "/v",
    );
    assert!(flags.contains(" rw,nosuid,nodev,noexec,noatime "), "{flags}");
}

pub(crate) fn a_file_is_bound_on_a_file_that_is_made_for_it(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("f"), "hosts").unwrap();
    let container = lab
        .sh("cat /etc/new/hosts")
        .with(|spec| spec.mounts.push(mount("/etc/new/hosts", "", volume.join("f"), &["bind"])));
    assert_eq!(container.says(), "hosts");
}

pub(crate) fn sources_are_relative_to_the_bundle(lab: &Lab) {
    let container = lab.sh("cat /v").with(|spec| spec.mounts.push(mount("/v", "bind", "note", &["rbind"])));
    fs::write(container.bundle.join("note"), "in the bundle").unwrap();
    assert_eq!(container.says(), "in the bundle");
}

pub(crate) fn a_missing_source_is_named(lab: &Lab) {
    let container =
        lab.sh("true").with(|spec| spec.mounts.push(mount("/v", "bind", "/no/such/volume", &["rbind"])));
    let error = container.run().unwrap_err();
    assert!(matches!(error, Error::Failed { step: Step::Source, errno: Errno::NOENT, .. }));
    assert_eq!(error.to_string(), "open mount source /no/such/volume: no such file or directory");
}

pub(crate) fn recursive_attributes_reach_the_mounts_below(lab: &Lab) {
    let shared = Shared::new(lab);
    shared.mount_below("below");
    for (options, writable) in [(["rbind", "ro"], true), (["rbind", "rro"], false)] {
        let container =
            lab.sh("touch /v/x 2>/dev/null && echo top; touch /v/below/x 2>/dev/null && echo below; true");
        let said =
            container.with(|spec| spec.mounts.push(mount("/v", "bind", &shared.path, &options))).says();
        assert_eq!(said, if writable { "below" } else { "" }, "{options:?}");
    }
    let container =
        lab.sh("ls /v/below").with(|spec| spec.mounts.push(mount("/v", "bind", &shared.path, &["bind"])));
    assert_eq!(container.says(), "", "bind is not recursive");
}

pub(crate) fn propagation_is_private_slave_or_shared_as_asked(lab: &Lab) {
    let shared = Shared::new(lab);
    for (index, (word, arrives, leaves)) in
        [("rprivate", false, false), ("rslave", true, false), ("rshared", true, true)].iter().enumerate()
    {
        let container = lab.container(&["sleep", "1000"]).with(|spec| {
            spec.mounts.push(mount("/v", "bind", &shared.path, &["rbind", word]));
            let capabilities = spec.process.as_mut().unwrap().capabilities.as_mut().unwrap();
            for set in [&mut capabilities.bounding, &mut capabilities.permitted, &mut capabilities.effective]
            {
                set.push("CAP_SYS_ADMIN".into());
            }
        });
        let (running, _created) = container.start().unwrap();
        let later = format!("later{index}");
        shared.mount_below(&later);
        let seen = running.exec_says(&format!("grep -c ' /v/{later} ' /proc/self/mountinfo || true"));
        assert_eq!(seen == "1", *arrives, "{word}: the host's mount in the container");
        running.exec_says(&format!("mkdir /v/inner{index} && mount -t tmpfs none /v/inner{index}"));
        let inner = shared.path.join(format!("inner{index}"));
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(
            table.contains(inner.to_str().unwrap()),
            *leaves,
            "{word}: the container's mount on the host"
        );
    }
}

pub(crate) fn file_systems_take_their_parameters(lab: &Lab) {
    let said = info(
        lab.sh("").with(|spec| {
            spec.mounts.push(mount("/t", "tmpfs", "tmpfs", &["nosuid", "size=64k", "mode=700"]))
        }),
        "/t",
    );
    assert!(said.contains(" rw,nosuid,relatime ") && said.contains("size=64k,mode=700"), "{said}");
}

pub(crate) fn a_parameter_that_does_not_exist_is_named_by_the_kernel(lab: &Lab) {
    let container =
        lab.sh("true").with(|spec| spec.mounts.push(mount("/t", "tmpfs", "tmpfs", &["sise=64k"])));
    assert_eq!(
        container.run().unwrap_err().to_string(),
        "mount tmpfs on /t (tmpfs: Unknown parameter 'sise'): invalid argument"
    );
}

pub(crate) fn the_usual_file_systems_are_there(lab: &Lab) {
    let kinds = lab.sh("awk '{print $5, $(NF-2)}' /proc/self/mountinfo").says();
    for line in [
        "/ overlay",
        "/proc proc",
        "/sys sysfs",
        "/dev tmpfs",
        "/dev/pts devpts",
        "/dev/mqueue mqueue",
        "/dev/shm tmpfs",
    ] {
        assert!(kinds.lines().any(|kind| kind == line), "{line} in {kinds}");
    }
}

pub(crate) fn dangling_links_at_mount_points_lead_inside(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("r"), "nameserver").unwrap();
    let container = lab.sh("cat /run/stub/resolv.conf").with(|spec| {
        spec.mounts.push(mount("/etc/resolv.conf", "bind", volume.join("r"), &["rbind"]));
    });
    fs::create_dir(container.upper().join("etc")).unwrap();
    symlink("../../../../run/stub/resolv.conf", container.upper().join("etc/resolv.conf")).unwrap();
    assert_eq!(container.says(), "nameserver");
}

pub(crate) fn dev_has_the_usual_nodes_and_none_of_the_images(lab: &Lab) {
    let container = lab.sh(
        "cd /dev; stat -c '%n %F %t:%T %a' full null random tty urandom zero; for l in core fd ptmx stdin stdout stderr; do echo $l $(readlink $l); done; ls /dev/evil /dev/null2 2>&1; echo x > /dev/null; head -c 2 /dev/zero | wc -c",
    );
    fs::create_dir(container.upper().join("dev")).unwrap();
    fs::write(container.upper().join("dev/evil"), "").unwrap();
    fs::write(container.upper().join("dev/null"), "").unwrap();
    let said = container.says();
    let wanted = "full character special file 1:7 666\nnull character special file 1:3 666\nrandom character special file 1:8 666\ntty character special file 5:0 666\nurandom character special file 1:9 666\nzero character special file 1:5 666\ncore /proc/kcore\nfd /proc/self/fd\nptmx pts/ptmx\nstdin /proc/self/fd/0\nstdout /proc/self/fd/1\nstderr /proc/self/fd/2\n";
    assert!(said.starts_with(wanted), "{said}");
    assert!(said.contains("/dev/evil: No such file") && said.ends_with("\n2"), "{said}");
}

pub(crate) fn devices_are_made_as_asked(lab: &Lab) {
    let device = Device {
        path: "/dev/net/tun".into(),
        kind: "c".into(),
        major: 10,
        minor: 200,
        file_mode: Some(0o640),
        uid: Some(7),
        gid: Some(8),
    };
    let fifo = Device { path: "/dev/pipe".into(), kind: "p".into(), ..Device::default() };
    let container = lab.sh("stat -c '%F %t:%T %a %u %g' /dev/net/tun /dev/pipe");
    let said = container.with(|spec| spec.linux.devices = vec![device, fifo]).says();
    assert_eq!(said, "character special file a:c8 640 7 8\nfifo 0:0 666 0 0");
}

pub(crate) fn a_container_without_a_dev_gets_one(lab: &Lab) {
    let container = lab.sh("stat -c %F /dev/null; readlink /dev/fd").with(|spec| {
        spec.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
    });
    assert_eq!(container.says(), "character special file\n/proc/self/fd");
}

pub(crate) fn ids_of_a_volume_are_shifted(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("f"), "").unwrap();
    std::os::unix::fs::chown(volume.join("f"), Some(5000), Some(6000)).unwrap();
    let line = |host_id, container_id| vec![IdMapping { container_id, host_id, size: 1000 }];
    let container = lab.sh("stat -c '%u %g' /v/f").with(|spec| {
        let mut mount = mount("/v", "bind", &volume, &["rbind"]);
        mount.uid_mappings = line(1000, 5000);
        mount.gid_mappings = line(2000, 6000);
        spec.mounts.push(mount);
    });
    assert_eq!(container.says(), "1000 2000");
    assert_eq!(fs::metadata(volume.join("f")).unwrap().uid(), 5000);
}

pub(crate) fn shared_memory_is_shared(lab: &Lab) {
    let shm = rootfs::shm(1 << 20, (0, 0), &lab.directory()).unwrap();
    let with = |script: &str| {
        let mut container = lab.sh(script);
        container.trees.push(("/dev/shm".into(), shm.tree().unwrap()));
        container
    };
    with("echo one > /dev/shm/f").says();
    assert_eq!(
        with("cat /dev/shm/f; stat -c %a /dev/shm; df -k /dev/shm | awk 'END{print $2}'").says(),
        "one\n1777\n1024"
    );
}

pub(crate) fn masked_paths_are_empty_and_closed(lab: &Lab) {
    let container = lab.sh("cat /etc/passwd; ls /home; touch /home/x 2>&1; cat /proc/kcore; echo x > /etc/passwd; cat /etc/passwd; wc -c < /proc/keys").with(|spec| {
        spec.linux.masked_paths.extend(["/etc/passwd".into(), "/home".into(), "/no/such/path".into()]);
    });
    assert_eq!(container.says(), "touch: /home/x: Read-only file system\n0");
}

pub(crate) fn read_only_paths_refuse_writes(lab: &Lab) {
    let container = lab.sh("echo 1 > /proc/sys/vm/drop_caches; touch /etc/x; touch /tmp/x").with(|spec| {
        spec.linux.readonly_paths.extend(["/etc".into(), "/nowhere".into()]);
        let capabilities = spec.process.as_mut().unwrap().capabilities.as_mut().unwrap();
        capabilities.bounding.push("CAP_SYS_ADMIN".into());
    });
    let output = container.run().unwrap();
    assert_eq!(output.stderr.matches("Read-only file system").count(), 2, "{output:?}");
    assert_eq!(output.code, 0);
}

pub(crate) fn s09_a_read_only_root_is_read_only_from_the_hosts_side_too(lab: &Lab) {
    let volume = lab.directory();
    let container = lab.container(&["sleep", "1000"]).with(|spec| {
        spec.root.as_mut().unwrap().readonly = true;
        spec.mounts.push(mount("/deep/volume", "bind", &volume, &["rbind"]));
        spec.process.as_mut().unwrap().cwd = "/made/for/it".into();
    });
    let (running, _created) = container.start().unwrap();
    let flags = |path: &str| {
        rustix::fs::statvfs(format!("/proc/{}/root{path}", running.pid))
            .unwrap()
            .f_flag
            .contains(StatVfsMountFlags::RDONLY)
    };
    assert!(flags("/") && flags("/proc/sys") && flags("/sys"));
    assert!(!flags("/deep/volume") && !flags("/dev"));
    assert_eq!(
        running.exec_says("pwd; touch /x 2>&1 || true"),
        "/made/for/it\ntouch: /x: Read-only file system"
    );
}

pub(crate) fn the_bundles_own_root_is_used_in_place(lab: &Lab) {
    let mut container = lab.sh("touch /made-here; ls /");
    container.rootfs = Rootfs::Bundle;
    let root = container.bundle.join("rootfs");
    assert!(
        std::process::Command::new("cp")
            .arg("-a")
            .args([lab.image(), root.clone()])
            .status()
            .unwrap()
            .success()
    );
    container.says();
    assert!(root.join("made-here").exists());
}

pub(crate) fn a_root_that_is_bound_obeys_its_options(lab: &Lab) {
    let mut container = lab.sh("touch /x 2>&1 | grep -c Read-only");
    container.rootfs = Rootfs::Mounts(vec![rootfs::Mount {
        kind: "bind".into(),
        source: lab.image().to_str().unwrap().into(),
        options: vec!["rbind".into(), "ro".into()],
    }]);
    container.spec.mounts.retain(|mount| !["/dev/shm", "/dev/mqueue"].contains(&mount.destination.as_str()));
    assert_eq!(container.says(), "1");
}

pub(crate) fn layers_lie_on_each_other(lab: &Lab) {
    let top = lab.directory();
    fs::create_dir(top.join("etc")).unwrap();
    fs::write(top.join("etc/layer"), "top\n").unwrap();
    let container = lab.sh("cat /etc/layer; cat /etc/group | head -n 1; echo w > /etc/layer");
    let mut container = container;
    if let Rootfs::Mounts(mounts) = &mut container.rootfs {
        mounts[0].options[0] = format!("lowerdir={}:{}", top.display(), lab.image().display());
    }
    let upper = container.upper();
    assert_eq!(container.says(), "top\nroot:x:0:");
    assert_eq!(fs::read_to_string(upper.join("etc/layer")).unwrap(), "w\n");
    assert_eq!(fs::read_to_string(top.join("etc/layer")).unwrap(), "top\n");
}

pub(crate) fn the_root_propagates_as_asked(lab: &Lab) {
    for (word, wanted) in [("", ""), ("rprivate", ""), ("shared", "shared:"), ("unbindable", "unbindable")] {
        let said = info(lab.sh("").with(|spec| spec.linux.rootfs_propagation = word.into()), "/");
        let tags = said.split(" - ").next().unwrap().split(' ').skip(6).collect::<Vec<_>>().join(" ");
        assert!(tags.starts_with(wanted) && tags.is_empty() == wanted.is_empty(), "{word}: {said}");
    }
}

/// On a host that has cgroup v2 alone, which its tree on a hybrid host can stand for.
pub(crate) fn the_container_is_born_in_its_cgroup_and_sees_it_as_the_root(lab: &Lab) {
    let Some(tree) = lab.host.trees().iter().find(|tree| tree.unified) else { return };
    let host = Host::unified_at(&tree.mount).unwrap();
    let script = "cat /proc/self/cgroup | grep ^0; grep ' /sys/fs/cgroup ' /proc/self/mountinfo; cd /sys/fs/cgroup; grep -cx 1 cgroup.procs; touch x 2>&1; mkdir y 2>&1; echo 1 2>&1 > cgroup.procs";
    let mut container = lab.sh(script);
    container.host = host;
    let output = container.run().unwrap();
    let (said, refused) = (output.stdout, output.stderr);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!((lines[0], lines[2]), ("0::/", "1"), "{said}");
    assert!(lines[1].contains(" ro,nosuid,nodev,noexec,relatime - cgroup2 "), "{said}");
    assert_eq!(
        said.matches("Read-only").count() + refused.matches("Read-only").count(),
        3,
        "{said}{refused}"
    );
}

pub(crate) fn the_container_sees_its_own_cgroup_and_cannot_write(lab: &Lab) {
    let script = "cat /proc/self/cgroup; cd /sys/fs/cgroup; for d in *; do test -L $d || test -f $d || grep -qx $$ $d/cgroup.procs || echo not in $d; touch $d/x 2>&1 | grep -v 'Read-only'; mkdir $d/y 2>&1 | grep -v 'Read-only'; done; test -f cgroup.procs && grep -x 1 cgroup.procs >/dev/null; touch y 2>&1";
    let said = lab.sh(script).run().unwrap().stdout;
    for line in said.lines().filter(|line| line.contains(':') && !line.contains("Read-only")) {
        assert!(line.ends_with(":/"), "not the root of the cgroup namespace: {line}");
    }
    assert!(!said.contains("not in"), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
}
