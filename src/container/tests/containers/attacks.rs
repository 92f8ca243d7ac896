//! What went wrong elsewhere (the rows S01 to S09 of the threat table), tried on us. A test here asserts what
//! happened to the host, not only what was answered.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use container::spec::NamespaceKind;
use container::{Error, Stdio};

use crate::lab::{Container, Lab};
use crate::mounts::mount;

/// A tree of the host that must not change.
struct Canary {
    path: PathBuf,
    before: Vec<String>,
}

impl Canary {
    fn new(lab: &Lab) -> Canary {
        let path = lab.directory();
        fs::write(path.join("file"), "untouched").unwrap();
        fs::create_dir(path.join("sub")).unwrap();
        let before = walk(&path);
        Canary { path, before }
    }

    #[track_caller]
    fn assert_unchanged(&self) {
        assert_eq!(walk(&self.path), self.before);
    }
}

fn walk(path: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut all = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.path().symlink_metadata().unwrap();
        all.push(format!(
            "{:?} {:o} {} {}.{}",
            entry.path(),
            meta.mode(),
            meta.uid(),
            meta.ctime(),
            meta.ctime_nsec()
        ));
        if meta.is_dir() {
            all.extend(walk(&entry.path()));
        }
    }
    all.sort();
    all
}

/// Puts a link into the image of this container.
fn link(container: &Container<'_>, from: &str, to: impl AsRef<Path>) {
    let place = container.upper().join(from);
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    symlink(to, place).unwrap();
}

pub(crate) fn s01_proc_and_sys_behind_a_link_are_refused(lab: &Lab) {
    let canary = Canary::new(lab);
    for (name, to) in
        [("proc", "/evil"), ("sys", "/evil"), ("proc", canary.path.to_str().unwrap()), ("sys", "tmp")]
    {
        let container = lab.sh("true");
        link(&container, name, to);
        let upper = container.upper();
        let error = container.run().unwrap_err().to_string();
        assert!(error.contains("must be mounted on an ordinary directory"), "{error}");
        assert!(!upper.join("evil").exists(), "mount point made behind the link");
    }
    canary.assert_unchanged();
}

pub(crate) fn s01_volumes_on_and_in_proc_and_on_sys_are_refused(lab: &Lab) {
    let volume = lab.directory();
    for name in ["self", "sys", "1"] {
        fs::create_dir(volume.join(name)).unwrap();
    }
    for destination in
        ["/proc", "/proc/self", "/proc/sys", "/proc/1/attr", "/x/../proc", "/sys", "/proc/self/attr"]
    {
        for first in [true, false] {
            let container = lab.sh("true").with(|spec| {
                let index = if first { 0 } else { spec.mounts.len() };
                spec.mounts.insert(index, mount(destination, "bind", &volume, &["rbind"]));
            });
            let error = container.run();
            assert!(
                matches!(error, Err(Error::Failed { .. } | Error::Invalid(_))),
                "{destination}, first {first}: {error:?}"
            );
        }
    }
    let container = lab.sh("true").with(|spec| spec.mounts.push(mount("/proc", "tmpfs", "tmpfs", &[])));
    assert!(container.run().is_err());
    // By another name.
    let container =
        lab.sh("true").with(|spec| spec.mounts.push(mount("/alias/self", "bind", &volume, &["rbind"])));
    link(&container, "alias", "/proc");
    assert!(matches!(container.run(), Err(Error::Failed { .. })));
}

pub(crate) fn a_file_that_programs_replace_in_proc_may_be_replaced(lab: &Lab) {
    let volume = lab.directory();
    fs::write(volume.join("m"), "fake").unwrap();
    let container = lab
        .sh("cat /proc/meminfo")
        .with(|spec| spec.mounts.push(mount("/proc/meminfo", "bind", volume.join("m"), &["rbind"])));
    assert_eq!(container.says(), "fake");
}

pub(crate) fn s03_mount_points_are_never_made_outside(lab: &Lab) {
    let canary = Canary::new(lab);
    let volume = lab.directory();
    for destination in ["/out/new", "/out/sub/new/deep", "/chain/new", "/up/new", "/x/../../../../../../new"]
    {
        let container =
            lab.sh("true").with(|spec| spec.mounts.push(mount(destination, "bind", &volume, &["rbind"])));
        link(&container, "out", &canary.path);
        link(&container, "chain", "out");
        link(&container, "up", format!("../../../../../../../../../..{}", canary.path.display()));
        // Links end at the container's root, so the same path is made in there.
        let output = container.run();
        canary.assert_unchanged();
        assert_eq!(output.unwrap().code, 0, "{destination}");
    }
}

/// A neighbour swaps a directory of a shared volume for a link while mount points are made in it.
pub(crate) fn s02_s03_a_racing_neighbour_gets_nothing_out_of_the_root(lab: &Lab) {
    let canary = Canary::new(lab);
    let volume = lab.directory();
    let other = lab.directory();
    fs::create_dir(volume.join("real")).unwrap();
    symlink(&canary.path, volume.join("fake")).unwrap();
    let racer = Racer::new(&volume.join("real"), &volume.join("fake"));
    let mut landed = 0;
    for index in 0..300 {
        let container =
            lab.sh(&format!("grep -c ' /v/[a-z]*/new{index} ' /proc/self/mountinfo")).with(|spec| {
                spec.mounts.push(mount("/v", "bind", &volume, &["rbind"]));
                spec.mounts.push(mount(&format!("/v/real/new{index}"), "bind", &other, &["rbind"]));
            });
        if let Ok(output) = container.run() {
            landed += usize::from(output.stdout.trim() == "1");
        }
    }
    drop(racer);
    canary.assert_unchanged();
    assert!(landed > 0, "the racer always won, which proves nothing");
}

/// A process that exchanges two names for as long as it lives.
struct Racer(rustix::process::Pid);

impl Racer {
    fn new(one: &Path, other: &Path) -> Racer {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        // SAFETY: this process has one thread; the child only makes system calls.
        match unsafe { libc::fork() } {
            0 => loop {
                let _ = renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE);
                // SAFETY: takes no arguments.
                if unsafe { libc::getppid() } == 1 {
                    // SAFETY: always sound.
                    unsafe { libc::_exit(0) };
                }
            },
            pid => Racer(rustix::process::Pid::from_raw(pid).unwrap()),
        }
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.0), rustix::process::WaitOptions::empty());
    }
}

pub(crate) fn s04_masks_are_made_of_our_own_null_device(lab: &Lab) {
    let volume = lab.directory();
    let core_pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    // The container's /dev is a volume whose null is a link into procfs, or missing.
    for null in [Some("/proc/sys/kernel/core_pattern"), None] {
        let _ = fs::remove_file(volume.join("null"));
        if let Some(target) = null {
            symlink(target, volume.join("null")).unwrap();
        }
        let container = lab.container(&["sleep", "1000"]).with(|spec| {
            spec.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
            spec.mounts.push(mount("/dev", "bind", &volume, &["rbind"]));
            spec.linux.masked_paths.push("/etc/passwd".into());
        });
        let (running, _created) = container.start().unwrap();
        for masked in ["/etc/passwd", "/proc/keys"] {
            let path = format!("/proc/{}/root{masked}", running.pid);
            let stat = rustix::fs::stat(&path).unwrap();
            let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            assert_eq!(number, (1, 3), "{masked}");
        }
        assert_eq!(
            running.exec(&running.like_init(&["/bin/sh", "-c", "echo evil > /etc/passwd"])).unwrap().code,
            0
        );
    }
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), core_pattern);
}

pub(crate) fn s07_links_in_place_of_dev_or_its_nodes_lead_nowhere(lab: &Lab) {
    let canary = Canary::new(lab);
    let relative = format!("../../../../../../../../..{}", canary.path.display());
    for (name, to) in [
        ("dev", canary.path.to_str().unwrap().to_owned()),
        ("dev", relative.clone()),
        ("dev", "hop".to_owned()),
        ("dev/console", canary.path.join("file").to_str().unwrap().to_owned()),
        ("dev/null", canary.path.join("file").to_str().unwrap().to_owned()),
        ("dev/pts", relative),
        ("dev/shm", canary.path.to_str().unwrap().to_owned()),
    ] {
        for (tmpfs, terminal) in [(true, false), (false, false), (true, true)] {
            let container = lab.sh("echo x > /dev/null; echo y > /dev/console; true").with(|spec| {
                spec.process.as_mut().unwrap().terminal = terminal;
                if !tmpfs {
                    spec.mounts.retain(|mount| mount.destination != "/dev");
                }
            });
            link(&container, name, &to);
            link(&container, "hop", &canary.path);
            let stdio = if terminal { Stdio::Terminal { width: 0, height: 0 } } else { Stdio::null() };
            let started = container.create(stdio).and_then(|(running, mut created)| {
                created.start()?.finish(crate::lab::soon())?;
                crate::lab::wait(std::os::fd::AsFd::as_fd(&running.pidfd));
                Ok(())
            });
            assert_eq!(started.is_err(), name == "dev", "{name} -> {to}: {started:?}");
            canary.assert_unchanged();
        }
    }
}

pub(crate) fn s14_the_process_is_in_its_cgroup_and_so_is_every_exec(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    let exec = running.spawn(&running.like_init(&["sleep", "1000"]), Stdio::null()).unwrap();
    for pid in [running.pid, exec.pid] {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        for line in text.lines() {
            assert!(line.ends_with(&running.spec.linux.cgroups_path), "{line}");
        }
    }
}

/// A node may be made, as every runtime allows, but it is of no use.
pub(crate) fn s17_devices_that_were_not_allowed_cannot_be_opened(lab: &Lab) {
    let script = "mknod /tmp/d b 8 0; mknod /tmp/m c 1 1; mknod /tmp/f c 10 229; for n in d m f; do cat /tmp/$n; done; cat /dev/null";
    let output = lab.sh(script).run().unwrap();
    assert_eq!(output.stderr.matches("can't open").count(), 3, "{output:?}");
    assert_eq!(output.stderr.matches("Operation not permitted").count(), 3, "{output:?}");
    assert_eq!(output.code, 0);
}

pub(crate) fn nothing_of_the_host_is_left_in_the_mount_table(lab: &Lab) {
    let canary = Canary::new(lab);
    let table = lab.sh("cat /proc/self/mountinfo").says();
    let points: Vec<_> = table.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
    assert_eq!(points.iter().filter(|point| **point == "/").count(), 1, "{table}");
    let known =
        |point: &str| point == "/" || ["/proc", "/dev", "/sys"].iter().any(|top| point.starts_with(top));
    assert!(points.iter().all(|point| known(point)), "{table}");
    canary.assert_unchanged();
    // And nothing spreads when the host shares its mounts with everybody, as systemd makes it.
    let shared = crate::lab::Shared::new(lab);
    let before = lab.mounts();
    let mut container = lab.container(&["sleep", "1000"]);
    let root = shared.path.join("rootfs");
    assert!(
        std::process::Command::new("cp")
            .arg("-a")
            .args([lab.image(), root.clone()])
            .status()
            .unwrap()
            .success()
    );
    container.rootfs = container::Rootfs::Bundle;
    container.spec.root.as_mut().unwrap().path = root.to_str().unwrap().into();
    let (running, _created) = container.start().unwrap();
    assert_eq!(lab.mounts(), before);
    assert!(running.spec.namespace(NamespaceKind::Mount).is_some());
}
