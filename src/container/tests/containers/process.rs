//! The process is as the specification says, the first one and every exec.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;

use container::spec::{self, Base64, Capabilities, Process, Rlimit};
use container::{Error, Stdio};

use crate::lab::{Lab, pipes, read, soon};
use crate::mounts::mount;

/// One line of `/proc/<pid>/status` as the process itself sees it.
fn status(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// What the first process and an exec say to the same question.
fn both(lab: &Lab, change: impl Fn(&mut Process), script: &str) -> [String; 2] {
    let first = lab.sh(script).process(&change).says();
    let (running, _created) = lab.container(&["sleep", "1000"]).process(&change).start().unwrap();
    [first, running.exec_says(script)]
}

pub(crate) fn the_user_and_all_groups_are_as_asked(lab: &Lab) {
    let answers = both(
        lab,
        |process| {
            process.user =
                spec::User { uid: 1000, gid: 1001, umask: Some(0o027), additional_gids: vec![5, 6] }
        },
        "id -u; id -g; id -G; umask; touch /tmp/x && stat -c %a /tmp/x; grep Groups /proc/self/status",
    );
    for answer in answers {
        // S13: the primary group is in the supplementary list itself, not only in what id(1) prints.
        let wanted = "1000\n1001\n1001 5 6\n0027\n";
        assert!(answer.starts_with(wanted), "{answer}");
        assert_eq!(status(&answer, "Groups"), "5 6 1001");
    }
}

pub(crate) fn values_that_are_not_text_arrive_as_they_are(lab: &Lab) {
    let container = lab.sh("printf %s \"$RAW\" | od -An -tx1; echo $LATER").process(|process| {
        process.env.push("LATER=text".into());
        process.env_bytes = vec![Base64(b"RAW=\xff\xfe\n\x01".to_vec())];
    });
    assert_eq!(container.says().trim(), "ff fe 0a 01\ntext");
}

pub(crate) fn home_comes_from_passwd_unless_it_is_given(lab: &Lab) {
    for (uid, given, wanted) in [
        (0, None, "/root"),
        (1000, None, "/home/user"),
        (4242, None, "/"),
        (1000, Some("HOME=/given"), "/given"),
    ] {
        let answers = both(
            lab,
            |process| {
                process.user.uid = uid;
                process.env.extend(given.map(str::to_owned));
            },
            "echo $HOME",
        );
        assert_eq!(answers, [wanted, wanted]);
    }
}

pub(crate) fn a_hostile_passwd_costs_neither_time_nor_the_start(lab: &Lab) {
    for make in
        ["rm /etc/passwd; mkfifo /etc/passwd", "ln -sf /dev/zero /etc/passwd", "ln -sf passwd /etc/passwd"]
    {
        let (running, _created) = lab.sh(&format!("{make}; sleep 1000")).start().unwrap();
        running.wait_for("test ! -f /etc/passwd");
        assert_eq!(running.exec_says("echo $HOME"), "/", "{make}");
    }
}

pub(crate) fn a_missing_working_directory_is_made(lab: &Lab) {
    let container = lab.sh("pwd; stat -c %a .").process(|process| process.cwd = "/new/deep".into());
    assert_eq!(container.says(), "/new/deep\n755");
}

pub(crate) fn a_working_directory_that_only_the_user_may_enter_is_entered(lab: &Lab) {
    let (running, _created) =
        lab.sh("mkdir /own && chmod 700 /own && chown 1000 /own && sleep 1000").start().unwrap();
    running.wait_for("test \"$(stat -c %u /own)\" = 1000");
    let mut process = running.like_init(&["pwd"]);
    process.cwd = "/own".into();
    process.user.uid = 1000;
    assert_eq!(running.exec(&process).unwrap().stdout, "/own\n");
}

pub(crate) fn the_exec_of_a_missing_working_directory_fails(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    let mut process = running.like_init(&["pwd"]);
    process.cwd = "/missing".into();
    let error = running.exec(&process).unwrap_err();
    assert_eq!(error.to_string(), "change directory to /missing: no such file or directory");
}

pub(crate) fn limits_are_set_or_clamped_with_a_warning(lab: &Lab) {
    let nofile = |soft, hard| vec![Rlimit { kind: "RLIMIT_NOFILE".into(), soft, hard }];
    let answers = both(lab, |process| process.rlimits = nofile(100, 200), "ulimit -n; ulimit -Hn");
    assert_eq!(answers, ["100\n200", "100\n200"]);

    // Fewer descriptors than we use ourselves.
    let answers = both(lab, |process| process.rlimits = nofile(8, 8), "ulimit -n");
    assert_eq!(answers, ["8", "8"]);

    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if own > 1 << 30 {
        return;
    }
    let (ours, stdio) = pipes();
    let container = lab.sh("ulimit -Hn").process(|process| process.rlimits = nofile(100, own + 1));
    let (_running, mut created) = container.create(stdio).unwrap();
    created.start().unwrap().finish(soon()).unwrap();
    let [out, _err] = ours;
    let limit: u64 = read(out, soon()).trim().parse().unwrap();
    match lab.has_sys_resource() {
        true => assert_eq!((limit, created.warnings.len()), (own + 1, 0)),
        false => assert_eq!((limit, created.warnings.len()), (own, 1)),
    }
}

pub(crate) fn the_oom_score_is_set_or_left_with_a_warning(lab: &Lab) {
    let answers = both(lab, |process| process.oom_score_adj = Some(321), "cat /proc/self/oom_score_adj");
    assert_eq!(answers, ["321", "321"]);

    let container = lab.sh("true").process(|process| process.oom_score_adj = Some(-321));
    let (running, created) = container.create(Stdio::null()).unwrap();
    let score = running.proc("oom_score_adj");
    match lab.has_sys_resource() {
        true => assert_eq!((score.trim(), created.warnings.len()), ("-321", 0)),
        false => assert_eq!((score.trim(), created.warnings.len()), ("0", 1)),
    }
}

/// CAP_CHOWN, CAP_KILL and CAP_NET_BIND_SERVICE, by number.
const CHOWN: u64 = 1;
const KILL: u64 = 1 << 5;
const BIND: u64 = 1 << 10;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// `CapInh` and its kin, in the order of the list.
fn capability_sets(text: &str) -> [u64; 5] {
    let set = |name: &str| u64::from_str_radix(&status(text, name), 16).unwrap();
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(set)
}

pub(crate) fn root_has_its_bounding_set_and_s12_nothing_to_inherit(lab: &Lab) {
    let wanted = Capabilities {
        bounding: names(&["CAP_CHOWN", "CAP_KILL"]),
        effective: names(&["CAP_CHOWN"]),
        permitted: names(&["CAP_CHOWN"]),
        // What old runtimes filled in here gave file capabilities power over the container's processes.
        inheritable: names(&["CAP_CHOWN", "CAP_KILL"]),
        ambient: vec![],
    };
    let set = |process: &mut Process| process.capabilities = Some(wanted.clone());
    for answer in both(lab, set, "cat /proc/self/status") {
        assert_eq!(capability_sets(&answer), [0, CHOWN, CHOWN, CHOWN | KILL, 0]);
    }
    // capabilities(7): the exec of root gives it the bounding set, unless no_new_privs forbids to gain.
    let set = |process: &mut Process| {
        set(process);
        process.no_new_privileges = false;
    };
    for answer in both(lab, set, "cat /proc/self/status") {
        assert_eq!(capability_sets(&answer), [0, CHOWN | KILL, CHOWN | KILL, CHOWN | KILL, 0]);
    }
}

pub(crate) fn a_user_has_the_ambient_set_and_no_more(lab: &Lab) {
    let all = names(&["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
    let wanted = Capabilities {
        bounding: all.clone(),
        effective: all.clone(),
        permitted: all.clone(),
        inheritable: all,
        ambient: names(&["CAP_NET_BIND_SERVICE"]),
    };
    let set = |process: &mut Process| {
        process.user.uid = 1000;
        process.capabilities = Some(wanted.clone());
    };
    for answer in both(lab, set, "cat /proc/self/status") {
        assert_eq!(capability_sets(&answer), [BIND, BIND, BIND, CHOWN | BIND, BIND]);
    }
    let plain = |process: &mut Process| {
        process.user.uid = 1000;
        process.capabilities = Some(Capabilities { ambient: vec![], inheritable: vec![], ..wanted.clone() });
    };
    for answer in both(lab, plain, "cat /proc/self/status") {
        assert_eq!(capability_sets(&answer), [0, 0, 0, CHOWN | BIND, 0]);
    }
}

pub(crate) fn no_capabilities_means_none(lab: &Lab) {
    for answer in both(lab, |process| process.capabilities = None, "cat /proc/self/status") {
        assert_eq!(capability_sets(&answer), [0; 5]);
    }
}

pub(crate) fn no_new_privileges_is_as_asked(lab: &Lab) {
    for (asked, wanted) in [(true, "1"), (false, "0")] {
        for answer in both(lab, |process| process.no_new_privileges = asked, "cat /proc/self/status") {
            assert_eq!(status(&answer, "NoNewPrivs"), wanted);
        }
    }
}

pub(crate) fn signals_and_session_are_fresh(lab: &Lab) {
    for answer in both(lab, |_| {}, "cat /proc/self/status; cut -d' ' -f 1,6 /proc/$$/stat") {
        for name in ["SigBlk", "SigIgn"] {
            assert_eq!(u64::from_str_radix(&status(&answer, name), 16), Ok(0), "{name}");
        }
        let last = answer.lines().last().unwrap();
        let (pid, session) = last.split_once(' ').unwrap();
        assert_eq!(pid, session);
    }
}

fn filter() -> spec::Seccomp {
    let deny = spec::SeccompSyscall {
        names: names(&["mkdir", "mkdirat"]),
        action: "SCMP_ACT_ERRNO".into(),
        errno_ret: Some(libc::ENOTSUP as u32),
        ..spec::SeccompSyscall::default()
    };
    spec::Seccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        syscalls: vec![deny],
        ..spec::Seccomp::default()
    }
}

/// Without no_new_privs the filter takes CAP_SYS_ADMIN, of which nothing may be left.
pub(crate) fn the_seccomp_filter_is_in_force_with_and_without_no_new_privileges(lab: &Lab) {
    for no_new_privileges in [true, false] {
        for uid in [0, 1000] {
            let script = "mkdir /tmp/x 2>&1; cat /proc/self/status";
            let change = |process: &mut Process| {
                process.no_new_privileges = no_new_privileges;
                process.user.uid = uid;
            };
            let first =
                lab.sh(script).process(change).with(|spec| spec.linux.seccomp = Some(filter())).says();
            let container = lab.container(&["sleep", "1000"]).process(change);
            let (running, _created) =
                container.with(|spec| spec.linux.seccomp = Some(filter())).start().unwrap();
            for answer in [first, running.exec_says(script)] {
                assert_eq!(status(&answer, "Seccomp"), "2");
                assert!(answer.contains("not supported"), "{answer}");
                let [inheritable, permitted, effective, bounding, ambient] = capability_sets(&answer);
                let any = inheritable | permitted | effective | bounding | ambient;
                assert_eq!(any & 1 << 21, 0, "CAP_SYS_ADMIN stayed");
            }
        }
    }
}

pub(crate) fn a_filter_that_does_not_compile_is_an_invalid_specification(lab: &Lab) {
    let error = lab
        .sh("true")
        .with(|spec| {
            spec.linux.seccomp =
                Some(spec::Seccomp { default_action: "SCMP_ACT_NEVER".into(), ..spec::Seccomp::default() });
        })
        .run()
        .unwrap_err();
    assert!(error.is_invalid(), "{error}");
}

/// Descriptors that the parent forgot to mark are no concern of the container's.
pub(crate) fn s10_only_the_standard_streams_are_open(lab: &Lab) {
    let leaky: Vec<_> = (0..50)
        .map(|_| rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap())
        .collect();
    let first = lab.container(&["sleep", "1000"]).start();
    let (running, _created) = first.unwrap();
    let exec = running.spawn(&running.like_init(&["sleep", "1000"]), Stdio::null()).unwrap();
    for pid in [running.pid, exec.pid] {
        let mut open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        open.sort();
        assert_eq!(open, ["0", "1", "2"]);
    }
    drop(leaky);
}

pub(crate) fn s10_a_working_directory_behind_a_descriptor_is_refused(lab: &Lab) {
    let leaky: Vec<_> = (0..20)
        .map(|_| rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap())
        .collect();
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    for fd in 3..40 {
        let cwd = format!("/proc/self/fd/{fd}");
        let error = lab.sh("pwd; ls").process(|process| process.cwd = cwd.clone()).run();
        assert!(matches!(error, Err(Error::Failed { .. })), "first process in {cwd}: {error:?}");
        let mut process = running.like_init(&["pwd"]);
        process.cwd = cwd.clone();
        let error = running.exec(&process);
        assert!(matches!(error, Err(Error::Failed { .. })), "exec in {cwd}: {error:?}");
    }
    drop(leaky);
}

pub(crate) fn the_process_can_open_its_own_streams_again(lab: &Lab) {
    let container = lab
        .sh("echo again > /dev/stdout; echo wrong > /dev/stderr")
        .process(|process| process.user.uid = 1000);
    let output = container.run().unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("again\n", "wrong\n", 0));
}

pub(crate) fn s08_streams_that_nobody_gave_are_the_null_device_of_the_host(lab: &Lab) {
    // In the container's /dev, which is a volume, null is a file of the host.
    let volume = lab.directory();
    fs::write(volume.join("file"), "untouched").unwrap();
    symlink("file", volume.join("null")).unwrap();
    let container = lab.container(&["sleep", "1000"]).process(|process| process.user.uid = 1000);
    let container = container.with(|spec| {
        spec.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
        spec.mounts.push(mount("/dev", "bind", &volume, &["rbind"]));
    });
    let (running, _created) = container.start().unwrap();
    let exec = running.spawn(&running.like_init(&["sleep", "1000"]), Stdio::null()).unwrap();
    for pid in [running.pid, exec.pid] {
        for fd in 0..3 {
            let stat = rustix::fs::stat(format!("/proc/{pid}/fd/{fd}")).unwrap();
            let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            assert_eq!(number, (1, 3), "stream {fd}");
        }
    }
    assert_eq!(rustix::fs::stat(volume.join("file")).unwrap().st_uid, 0);
}

pub(crate) fn scheduling_is_as_asked(lab: &Lab) {
    let change = |process: &mut Process| {
        process.io_priority = Some(spec::IoPriority { class: "IOPRIO_CLASS_BE".into(), priority: 6 });
        process.scheduler =
            Some(spec::Scheduler { policy: "SCHED_BATCH".into(), nice: 7, ..spec::Scheduler::default() });
    };
    // Fields 19 and 41 of proc(5)'s stat: nice value and policy.
    for answer in both(lab, change, "ionice; cut -d' ' -f 19,41 /proc/self/stat") {
        assert_eq!(answer, "best-effort: prio 6\n7 3");
    }
}

pub(crate) fn the_personality_is_as_asked(lab: &Lab) {
    let change = |spec: &mut container::Spec| {
        spec.linux.personality = Some(spec::Personality { domain: "LINUX32".into(), flags: vec![] });
    };
    assert_eq!(lab.sh("cat /proc/self/personality").with(change).says(), "00000008");
    let (running, _created) = lab.container(&["sleep", "1000"]).with(change).start().unwrap();
    assert_eq!(running.exec_says("cat /proc/self/personality"), "00000008");
}

pub(crate) fn an_exec_runs_on_the_cpus_it_asks_for(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    let mut process = running.like_init(&["cat", "/proc/self/status"]);
    process.exec_cpu_affinity = Some(spec::CpuAffinity { initial: "0".into(), last: "0".into() });
    let output = running.exec(&process).unwrap();
    assert_eq!(status(&output.stdout, "Cpus_allowed_list"), "0");
}

/// From the clone to the exec nobody in a container may trace us: the parent's memory is a copy away.
pub(crate) fn s11_the_child_cannot_be_traced_before_its_exec(lab: &Lab) {
    let (running, _created) =
        lab.container(&["true"]).process(|process| process.user.uid = 1000).create(Stdio::null()).unwrap();
    // The directory of a process that is not dumpable belongs to the host's root (proc(5)).
    let stat = rustix::fs::stat(format!("/proc/{}/environ", running.pid)).unwrap();
    assert_eq!((stat.st_uid, running.proc("status").contains("Uid:\t1000")), (0, true));
}

pub(crate) fn a_terminal_is_the_containers_own(lab: &Lab) {
    let script = "tty; stty size; ls -l /dev/console; test /dev/console -ef /dev/pts/0 && echo same; id -u";
    let container = lab.sh(script).process(|process| process.terminal = true);
    let (running, mut created) = container.create(Stdio::Terminal { width: 101, height: 37 }).unwrap();
    let pty = created.pty.take().unwrap();
    created.start().unwrap().finish(soon()).unwrap();
    let said = read(pty, soon()).replace("\r\n", "\n");
    assert!(said.starts_with("/dev/pts/0\n37 101\ncrw-"), "{said}");
    assert!(said.contains("136,"), "{said}");
    assert!(said.contains("same\n0"), "{said}");
    drop(running);
}

pub(crate) fn an_exec_gets_a_terminal_of_the_container(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    let mut process = running.like_init(&["/bin/sh", "-c", "tty; stty size; echo hi > /dev/tty"]);
    process.terminal = true;
    process.user.uid = 1000;
    let mut exec = running.spawn(&process, Stdio::Terminal { width: 80, height: 25 }).unwrap();
    let said = read(exec.pty.take().unwrap(), soon());
    assert_eq!(said, "/dev/pts/0\r\n25 80\r\nhi\r\n");
    assert_eq!(crate::lab::wait(exec.pidfd.as_fd()), Some(0));
}

pub(crate) fn streams_and_specification_must_agree_about_the_terminal(lab: &Lab) {
    let container = lab.sh("true").process(|process| process.terminal = true);
    assert!(container.create(Stdio::null()).is_err_and(|error| error.is_invalid()));
    let container = lab.sh("true");
    let terminal = Stdio::Terminal { width: 0, height: 0 };
    assert!(container.create(terminal).is_err_and(|error| error.is_invalid()));
}
