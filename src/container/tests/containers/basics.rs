//! A container comes up, runs, and ends; or does not come up, and says why.

use std::time::{Duration, Instant};

use container::error::Reason;
use container::{Error, Stdio, spec};

use crate::lab::{Lab, soon, wait};

pub(crate) fn a_container_runs_its_program(lab: &Lab) {
    let output = lab.sh("echo out; echo err >&2; exit 7").run().unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("out\n", "err\n", 7));
}

pub(crate) fn an_exec_sees_the_container(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    assert_eq!(
        running.exec_says("hostname; cat /proc/1/comm; cat /proc/self/cgroup | wc -l >/dev/null"),
        "box\nsleep"
    );
    for kind in ["pid", "mnt", "ipc", "uts", "net", "cgroup"] {
        let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        let exec = running.spawn(&running.like_init(&["sleep", "1000"]), Stdio::null()).unwrap();
        assert_eq!(link(&exec.pid.to_string()), link(&running.pid.to_string()), "{kind}");
        assert_ne!(link(&exec.pid.to_string()), link("self"), "{kind}");
        rustix::process::pidfd_send_signal(&exec.pidfd, rustix::process::Signal::KILL).unwrap();
        assert_eq!(wait(std::os::fd::AsFd::as_fd(&exec.pidfd)), Some(137));
    }
}

const BROKEN: [(&str, Reason, &str); 7] = [
    ("/nope", Reason::NotFound, "exec \"/nope\": no such file or directory"),
    ("nope", Reason::NotFound, "exec \"nope\": no such file or directory"),
    ("/etc/passwd/x", Reason::NotFound, "exec \"/etc/passwd/x\": not a directory"),
    ("/bin/script", Reason::NotFound, "exec \"/bin/script\": no such file or directory"),
    ("/bin/plain", Reason::Permission, "exec \"/bin/plain\": permission denied"),
    ("/etc", Reason::Permission, "exec \"/etc\": is a directory"),
    ("/bin/garbage", Reason::Format, "exec \"/bin/garbage\": exec format error"),
];

pub(crate) fn a_program_that_cannot_be_executed_fails_the_start(lab: &Lab) {
    for (program, wanted, text) in BROKEN {
        let error = lab.container(&[program]).run().unwrap_err();
        assert!(matches!(&error, Error::Exec { reason, .. } if *reason == wanted), "{error:?}");
        assert_eq!(error.to_string(), text);
    }
}

pub(crate) fn a_program_that_cannot_be_executed_fails_the_exec(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    for (program, wanted, text) in BROKEN {
        let error = running.exec(&running.like_init(&[program])).unwrap_err();
        assert!(matches!(&error, Error::Exec { reason, .. } if *reason == wanted), "{error:?}");
        assert_eq!(error.to_string(), text);
    }
}

/// The reports cross the filter, which knows neither sendmsg nor anything else but the exec.
pub(crate) fn a_missing_program_is_reported_under_the_strictest_filter(lab: &Lab) {
    let container = lab.container(&["/nope"]).with(|spec| {
        spec.linux.seccomp = Some(spec::Seccomp {
            default_action: "SCMP_ACT_KILL_PROCESS".into(),
            syscalls: vec![spec::SeccompSyscall {
                names: vec!["execve".into()],
                action: "SCMP_ACT_ALLOW".into(),
                ..spec::SeccompSyscall::default()
            }],
            ..spec::Seccomp::default()
        });
    });
    assert!(matches!(container.run(), Err(Error::Exec { reason: Reason::NotFound, .. })));
}

pub(crate) fn an_exec_in_a_container_that_has_ended_fails(lab: &Lab) {
    let (running, _created) = lab.container(&["true"]).start().unwrap();
    crate::lab::readable(std::os::fd::AsFd::as_fd(&running.pidfd), soon());
    let error = running.exec(&running.like_init(&["true"])).unwrap_err();
    assert!(matches!(error, Error::Failed { step: container::error::Step::Namespace, .. }), "{error}");
}

pub(crate) fn a_container_that_was_not_waited_for_leaves_nothing(lab: &Lab) {
    let (pending, _, spec) = lab.container(&["true"]).begin(Stdio::null()).unwrap();
    let cgroup = container::cgroup::Cgroup::open(&lab.host, &spec.linux.cgroups_path).unwrap();
    assert!(cgroup.exists());
    drop(pending);
    let cgroup = container::cgroup::Cgroup::open(&lab.host, &spec.linux.cgroups_path).unwrap();
    assert!(!cgroup.exists());
    lab.assert_no_children();
}

pub(crate) fn a_container_that_was_never_started_ends_by_itself(lab: &Lab) {
    let (running, created) = lab.container(&["true"]).create(Stdio::null()).unwrap();
    drop(created);
    assert_eq!(wait(std::os::fd::AsFd::as_fd(&running.pidfd)), Some(127));
}

pub(crate) fn a_child_that_is_killed_on_its_way_is_told_from_one_that_failed(lab: &Lab) {
    let (running, mut created) = lab.container(&["true"]).create(Stdio::null()).unwrap();
    rustix::process::pidfd_send_signal(&running.pidfd, rustix::process::Signal::KILL).unwrap();
    crate::lab::readable(std::os::fd::AsFd::as_fd(&running.pidfd), soon());
    let started = created.start().and_then(|starting| starting.finish(soon()));
    assert!(matches!(started, Err(Error::Died { .. } | Error::Failed { .. })), "{started:?}");
}

pub(crate) fn a_child_that_takes_too_long_is_ended(lab: &Lab) {
    // Stands for a mount source that hangs.
    let hook = spec::Hook {
        path: "/bin/sleep".into(),
        args: vec!["sleep".into(), "1000".into()],
        ..spec::Hook::default()
    };
    let hooks = spec::Hooks { create_container: vec![hook], ..spec::Hooks::default() };
    let begun = Instant::now();
    let container = lab.container(&["true"]).with(|spec| spec.hooks = Some(hooks));
    let (pending, ..) = container.begin(Stdio::null()).unwrap();
    let error = pending.finish(begun + Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, Error::Deadline { waiting_for: "ready" }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    lab.reap_strays();
    lab.assert_no_children();
}

pub(crate) fn what_can_never_work_is_told_before_anything_is_made(lab: &Lab) {
    type Change = fn(&mut container::Spec);
    let refused: [(&str, Change); 6] = [
        ("no process", |spec| spec.process = None),
        ("no mount namespace", |spec| spec.linux.namespaces.clear()),
        ("a relative destination", |spec| spec.mounts[0].destination = "proc".into()),
        ("a mount on the root", |spec| spec.mounts[0].destination = "/x/..".into()),
        ("a relative mask", |spec| spec.linux.masked_paths = vec!["proc".into()]),
        ("a device elsewhere", |spec| {
            spec.linux.devices =
                vec![spec::Device { path: "/etc/x".into(), kind: "c".into(), ..spec::Device::default() }];
        }),
    ];
    for (what, change) in refused {
        let error = lab.sh("true").with(change).run().unwrap_err();
        assert!(error.is_invalid(), "{what}: {error}");
    }
    lab.assert_no_children();
}
