//! Programs are run in an interpreter and held against what the profile says, read in the plainest way; with feature
//! `oracle` also against libseccomp; and a few against this kernel.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// `struct seccomp_data`, without the instruction pointer.
#[derive(Debug, Clone, Copy)]
struct Call {
    arch: Arch,
    number: u32,
    arguments: [u64; 6],
}

fn run(program: &[sock_filter], call: &Call) -> u32 {
    let word = |offset: u32| match offset {
        NUMBER => call.number,
        ARCHITECTURE => call.arch.token(),
        16..64 => {
            let argument = call.arguments[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
        }
        _ => panic!("load of {offset}"),
    };
    let mut a = 0;
    let mut at = 0;
    loop {
        let i = &program[at];
        let test = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
        at += 1 + match i.code {
            0x20 => {
                a = word(i.k);
                0
            }
            0x54 => {
                a &= i.k;
                0
            }
            0x05 => i.k as usize,
            0x15 => test(a == i.k),
            0x25 => test(a > i.k),
            0x35 => test(a >= i.k),
            0x45 => test(a & i.k != 0),
            0x06 => return i.k,
            other => panic!("unknown instruction {other:#x}"),
        };
    }
}

/// The numbers of one entry, and the calls that it is behind.
type Numbers = (HashSet<u32>, HashSet<(u32, u32)>);

/// A profile, with its names looked up once.
struct Plain<'a> {
    profile: &'a spec::Seccomp,
    native: Arch,
    /// For each architecture and entry: its numbers, and what it says of calls behind another.
    named: Vec<(Arch, Vec<Numbers>)>,
}

impl<'a> Plain<'a> {
    fn new(profile: &'a spec::Seccomp, native: Arch) -> Plain<'a> {
        let named = [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64, Arch::Arm].map(|arch| {
            let entries = profile.syscalls.iter().map(|entry| {
                let numbers = entry.names.iter().filter_map(|n| arch.number(&Name::new(n))).collect();
                let behind = entry.names.iter().filter_map(|n| arch::behind(&Name::new(n)));
                (numbers, behind.filter(|_| arch == Arch::X86).collect())
            });
            (arch, entries.collect())
        });
        Plain { profile, native, named: named.into() }
    }

    fn abi(&self, call: &Call) -> Arch {
        let x32 = call.arch == Arch::X86_64 && call.number >= X32_BIT && call.number != u32::MAX;
        if x32 { Arch::X32 } else { call.arch }
    }

    fn named(&self, arch: Arch) -> &[Numbers] {
        &self.named.iter().find(|(a, _)| *a == arch).unwrap().1
    }

    /// Actions of all rules that speak of a call, in order, the default last; none when the profile does not list
    /// the ABI.
    fn matching(&self, call: &Call) -> Option<Vec<u32>> {
        let profile = self.profile;
        let default = action(&profile.default_action, profile.default_errno_ret).unwrap();
        let arch = self.abi(call);
        if arch != self.native && !profile.architectures.iter().any(|a| Arch::parse(a) == Some(Some(arch))) {
            return None;
        }
        let mut found = Vec::new();
        for (entry, (numbers, behind)) in profile.syscalls.iter().zip(self.named(arch)) {
            let action = action(&entry.action, entry.errno_ret).unwrap();
            if action == default {
                continue;
            }
            let holds = entry.args.iter().map(|arg| holds(arg, arch, call)).collect::<Vec<_>>();
            let matches = holds.is_empty()
                || if alternatives(entry) { holds.contains(&true) } else { holds.iter().all(|&h| h) };
            if matches && numbers.contains(&call.number) {
                found.push(action);
            }
            #[allow(clippy::cast_possible_truncation)]
            let which = (call.arguments[0] & 0xffff) as u32;
            let permits = matches!(action & KIND, ALLOW | LOG);
            if behind.contains(&(call.number, which)) && (holds.is_empty() || !permits) {
                found.push(action);
            }
        }
        found.push(default);
        Some(found)
    }

    /// Whether a call is newer than all, ARM's private ones aside, that the profile names on its ABI.
    fn newer(&self, call: &Call) -> bool {
        let arch = self.abi(call);
        let base = if arch == Arch::X32 { X32_BIT } else { 0 };
        let numbers = self.named(arch).iter().flat_map(|(numbers, _)| numbers);
        let last = numbers.filter(|n| **n < base + 0x1_0000).max();
        last.is_some_and(|&last| call.number > last)
            && !(arch == Arch::X86_64 && call.number == u32::MAX)
            && !(arch == Arch::Arm && call.number > 0xf_0000)
    }

    fn expected(&self, call: &Call) -> u32 {
        let Some(actions) = self.matching(call) else { return KILL_PROCESS };
        let permits = matches!(actions[0] & KIND, ALLOW | LOG | TRACE);
        if actions.len() == 1 && !permits && self.newer(call) {
            ERRNO | libc::ENOSYS as u32
        } else {
            actions[0]
        }
    }
}

/// Whether an entry has two conditions on one argument.
fn alternatives(entry: &spec::SeccompSyscall) -> bool {
    (0..6).any(|i| entry.args.iter().filter(|a| a.index == i).count() > 1)
}

fn holds(arg: &spec::SeccompArg, arch: Arch, call: &Call) -> bool {
    let cut = |v: u64| if arch.narrow() { v & 0xffff_ffff } else { v };
    let (is, value, second) = (cut(call.arguments[arg.index as usize]), cut(arg.value), cut(arg.value_two));
    match arg.op.as_str() {
        "SCMP_CMP_EQ" => is == value,
        "SCMP_CMP_NE" => is != value,
        "SCMP_CMP_GT" => is > value,
        "SCMP_CMP_GE" => is >= value,
        "SCMP_CMP_LT" => is < value,
        "SCMP_CMP_LE" => is <= value,
        _ => is & value == second & value,
    }
}

fn numbers(arch: Arch) -> Vec<u32> {
    let mut all: Vec<u32> = (0..600).chain([1000, 0x3fff_ffff]).collect();
    match arch {
        Arch::X86_64 => all.extend((X32_BIT..X32_BIT + 600).chain([u32::MAX, u32::MAX - 1])),
        Arch::Arm => all.extend(0xf_0001..0xf_0006),
        _ => {}
    }
    all
}

const ARGUMENTS_TO_TRY: [[u64; 6]; 14] = [
    [0; 6],
    [1; 6],
    [2, 1, 2, 3, 4, 5],
    [3, 2, 1, 0, 0, 0],
    [38, 3, 0, 0, 0, 0],
    [40, 3, 0, 0, 0, 0],
    [8, 0, 0, 0, 0, 0],
    [0x20000, 0x20008, 0, 0, 0, 0],
    [0xffff_ffff, 0xffff_ffff, 0, 0, 0, 0],
    [0x7e02_0000, 0x7e02_0000, 7, 7, 7, 7],
    [0x1_0000_0000, 1, 1 << 33, 0, 0, 0],
    [0x1_0000_0001, 2, 2, 0, 0, 0],
    [u64::MAX, u64::MAX, u64::MAX, 0, 0, 0],
    [u64::MAX - 1, 7, 9, 11, 13, 15],
];

fn profile(json: &str) -> spec::Seccomp {
    serde_json::from_str(json).unwrap()
}

/// In size and shape the profile that Docker and containerd made the common one.
fn usual() -> spec::Seccomp {
    let mut profile = profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
        "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
        "syscalls":[
        {"names":[],"action":"SCMP_ACT_ALLOW"},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":131072,"op":"SCMP_CMP_EQ"}]},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":131080,"op":"SCMP_CMP_EQ"}]},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":4294967295,"op":"SCMP_CMP_EQ"}]},
        {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
        {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":38,"op":"SCMP_CMP_LT"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":39,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":40,"op":"SCMP_CMP_GT"}]},
        {"names":["setns"],"action":"SCMP_ACT_ERRNO","errnoRet":13},
        {"names":["setns"],"action":"SCMP_ACT_ALLOW"}
        ]}"#,
    );
    let refused = [
        "personality",
        "clone",
        "clone3",
        "socket",
        "setns",
        "mount",
        "umount2",
        "ptrace",
        "bpf",
        "init_module",
        "finit_module",
        "delete_module",
        "kexec_load",
        "kexec_file_load",
        "reboot",
        "swapon",
        "swapoff",
        "keyctl",
        "add_key",
        "request_key",
        "unshare",
        "pivot_root",
        "open_by_handle_at",
        "perf_event_open",
        "userfaultfd",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "socketcall",
        "acct",
        "settimeofday",
        "iopl",
        "ioperm",
        "syslog",
        "vhangup",
        "quotactl",
        "lookup_dcookie",
        "nfsservctl",
        "mbind",
        "move_pages",
    ];
    let mut names: Vec<String> = Vec::new();
    for id in 0..500 {
        let of = |name: Option<&'static str>| name.filter(|n| !refused.contains(n)).map(str::to_owned);
        names.extend(of(syscalls::x86_64::Sysno::new(id).map(|s| s.name())));
        names.extend(of(syscalls::x86::Sysno::new(id).map(|s| s.name())));
    }
    names.sort();
    names.dedup();
    profile.syscalls[0].names = names;
    profile
}

fn arm(mut profile: spec::Seccomp) -> spec::Seccomp {
    profile.architectures = vec!["SCMP_ARCH_AARCH64".into(), "SCMP_ARCH_ARM".into()];
    profile.syscalls[0].names.extend(["breakpoint".into(), "set_tls".into(), "cacheflush".into()]);
    profile
}

fn check(profile: &spec::Seccomp, native: Arch, arches: &[Arch]) -> Vec<sock_filter> {
    let program = compile_for(native, profile).unwrap();
    let plain = Plain::new(profile, native);
    for &arch in arches {
        for number in numbers(arch) {
            for arguments in ARGUMENTS_TO_TRY {
                let call = Call { arch, number, arguments };
                assert_eq!(run(&program, &call), plain.expected(&call), "{call:x?}");
            }
        }
    }
    program
}

#[test]
fn the_usual_profile_does_what_it_says() {
    let program = check(&usual(), Arch::X86_64, &[Arch::X86_64, Arch::X86, Arch::Aarch64]);
    assert!(program.len() < 1000, "{} instructions", program.len());
    check(&arm(usual()), Arch::Aarch64, &[Arch::Aarch64, Arch::Arm, Arch::X86_64]);
}

#[test]
fn an_abi_that_is_not_listed_is_killed() {
    let mut one = usual();
    one.architectures.clear();
    let program = compile_for(Arch::X86_64, &one).unwrap();
    let read = |arch, number| run(&program, &Call { arch, number, arguments: [0; 6] });
    assert_eq!(read(Arch::X86_64, 0), ALLOW);
    assert_eq!(read(Arch::X86, 3), KILL_PROCESS);
    assert_eq!(read(Arch::X86_64, X32_BIT), KILL_PROCESS);
    assert_eq!(read(Arch::X86_64, u32::MAX), ERRNO | 1);
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = profile(
        r#"{"defaultAction":"SCMP_ACT_KILL","syscalls":[
        {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":97,"args":[{"index":0,"value":38,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW"},
        {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#,
    );
    let program = compile_for(Arch::X86_64, &rules).unwrap();
    let socket =
        |family| run(&program, &Call { arch: Arch::X86_64, number: 41, arguments: [family, 0, 0, 0, 0, 0] });
    assert_eq!((socket(38), socket(2)), (ERRNO | 97, ALLOW));
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let rules = profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
        {"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
    );
    let program = check(&rules, Arch::X86_64, &[Arch::X86_64]);
    let personality = |value| run(&program, &Call { arch: Arch::X86_64, number: 135, arguments: [value; 6] });
    assert_eq!([0, 8, 9].map(personality), [ALLOW, ALLOW, ERRNO | 1]);
}

#[test]
fn new_calls_are_unknown_not_forbidden() {
    let program = compile_for(Arch::X86_64, &usual()).unwrap();
    let call = |number| run(&program, &Call { arch: Arch::X86_64, number, arguments: [0; 6] });
    assert_eq!(call(5000), ERRNO | libc::ENOSYS as u32);
    assert_eq!(call(165), ERRNO | 1, "mount is known and refused");
    let open = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_KILL"}]}"#,
    );
    let program = compile_for(Arch::X86_64, &open).unwrap();
    assert_eq!(run(&program, &Call { arch: Arch::X86_64, number: 5000, arguments: [0; 6] }), ALLOW);
}

#[test]
fn a_socket_family_that_is_refused_is_refused_through_socketcall_too() {
    for (default, action, through) in [
        ("ERRNO", "ALLOW", ERRNO | 1),
        ("ALLOW", "ERRNO", ERRNO | 1),
        ("ALLOW", "KILL_PROCESS", KILL_PROCESS),
    ] {
        let rules = profile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_{default}","architectures":["SCMP_ARCH_X86"],
            "syscalls":[{{"names":["socket"],"action":"SCMP_ACT_{action}",
            "args":[{{"index":0,"value":38,"op":"SCMP_CMP_EQ"}}]}},
            {{"names":["close_range"],"action":"SCMP_ACT_{action}"}}]}}"#,
        ));
        let program = check(&rules, Arch::X86_64, &[Arch::X86]);
        // The second argument is a pointer to what socket(2) would be given. A version in the upper half hides nothing.
        for first in [1, 0x1_0001] {
            let call = Call { arch: Arch::X86, number: 102, arguments: [first, 0xdead, 0, 0, 0, 0] };
            assert_eq!(run(&program, &call), through, "{default} {action}");
        }
    }
}

#[test]
fn programs_longer_than_a_jump_reach_their_ends() {
    // Every second call gets conditions of its own, so nothing is shared and everything is far.
    let mut syscalls = Vec::new();
    for id in (0..330).step_by(2) {
        let name = syscalls::x86_64::Sysno::new(id).unwrap().name();
        syscalls.push(format!(
            r#"{{"names":["{name}"],"action":"SCMP_ACT_ERRNO","errnoRet":{},
            "args":[{{"index":1,"value":{},"op":"SCMP_CMP_GT"}},{{"index":0,"value":{id},"op":"SCMP_CMP_NE"}}]}}"#,
            id + 1,
            (id as u64) << 31 | 1
        ));
    }
    let rules =
        profile(&format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{}]}}"#, syscalls.join(",")));
    let program = check(&rules, Arch::X86_64, &[Arch::X86_64]);
    assert!(program.len() > 1000, "{}", program.len());
}

#[test]
fn programs_that_the_kernel_would_refuse_are_refused() {
    let args: Vec<String> = (0..1200)
        .map(|v| format!(r#"{{"index":0,"value":{},"op":"SCMP_CMP_EQ"}}"#, v * 3_000_000_000_u64))
        .collect();
    let rules = profile(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{}]}}]}}"#,
        args.join(",")
    ));
    assert!(matches!(compile_for(Arch::X86_64, &rules), Err(Error::TooLong(4097..))));
}

#[test]
fn nonsense_is_refused() {
    for (json, error) in [
        (r#"{"defaultAction":"SCMP_ACT_MAYBE"}"#, Error::Action("SCMP_ACT_MAYBE".into())),
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, Error::Notify),
        (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":4096}"#, Error::Errno(4096)),
        (r#"{"defaultAction":"SCMP_ACT_KILL","architectures":["Z80"]}"#, Error::Architecture("Z80".into())),
        (r#"{"defaultAction":"SCMP_ACT_KILL","flags":["X"]}"#, Error::Flag("X".into())),
        (
            r#"{"defaultAction":"SCMP_ACT_KILL","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            Error::Argument(6),
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_KILL","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"~"}]}]}"#,
            Error::Operator("~".into()),
        ),
    ] {
        assert_eq!(compile(&profile(json)).unwrap_err(), error);
    }
    assert!(
        compile(&profile(r#"{"defaultAction":"SCMP_ACT_KILL","architectures":["SCMP_ARCH_S390X"]}"#)).is_ok()
    );
}

#[test]
fn flags_are_passed_on() {
    let flags = |json: &str| compile(&profile(json)).unwrap().flags;
    assert_eq!(flags(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#), FLAG_SPEC_ALLOW);
    assert_eq!(
        flags(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_TSYNC","SECCOMP_FILTER_FLAG_LOG"]}"#
        ),
        3
    );
}

fn any_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..6u64,
        Just(0x1_0000_0000),
        Just(0x1_0000_0001),
        Just(u64::MAX),
        Just(0xffff_ffff),
        any::<u64>()
    ]
}

fn any_arg() -> impl Strategy<Value = spec::SeccompArg> {
    let op = prop::sample::select(vec!["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"]);
    (0..3u32, any_value(), any_value(), op).prop_map(|(index, value, value_two, op)| spec::SeccompArg {
        index,
        value,
        value_two,
        op: format!("SCMP_CMP_{op}"),
    })
}

fn any_entry() -> impl Strategy<Value = spec::SeccompSyscall> {
    let names = vec![
        "read", "write", "open", "close", "ioctl", "socket", "bind", "clone", "shmat", "execve", "openat2",
    ];
    let names = prop::collection::vec(prop::sample::select(names).prop_map(str::to_owned), 1..4);
    let action = prop::sample::select(vec!["ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "TRAP", "LOG", "TRACE"]);
    (names, action, prop::option::of(0..100u32), prop::collection::vec(any_arg(), 0..4)).prop_map(
        |(names, action, errno_ret, args)| spec::SeccompSyscall {
            names,
            action: format!("SCMP_ACT_{action}"),
            errno_ret,
            args,
        },
    )
}

fn any_profile() -> impl Strategy<Value = spec::Seccomp> {
    let default = prop::sample::select(vec!["ALLOW", "ERRNO", "KILL_PROCESS", "LOG"]);
    let arches = prop::sample::subsequence(vec!["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], 0..=3);
    (default, arches, prop::collection::vec(any_entry(), 0..10)).prop_map(|(default, arches, syscalls)| {
        spec::Seccomp {
            default_action: format!("SCMP_ACT_{default}"),
            architectures: arches.into_iter().map(str::to_owned).collect(),
            syscalls,
            ..spec::Seccomp::default()
        }
    })
}

/// Calls that the names of `any_entry` have somewhere, with neighbours.
fn interesting(arch: Arch) -> Vec<u32> {
    let x86_64 = [0, 1, 2, 3, 4, 16, 30, 41, 49, 56, 59, 437, 438];
    match arch {
        Arch::X86_64 => x86_64.into_iter().chain([514, 520]).flat_map(|n| [n, n | X32_BIT]).collect(),
        Arch::X86 => vec![3, 4, 5, 6, 11, 54, 102, 117, 120, 359, 361, 397, 437, 438],
        _ => x86_64.to_vec(),
    }
}

proptest! {
    #[test]
    fn any_profile_does_what_it_says(
        profile in any_profile(),
        more in prop::collection::vec(prop::array::uniform6(any_value()), 4),
    ) {
        let program = compile_for(Arch::X86_64, &profile).unwrap();
        let plain = Plain::new(&profile, Arch::X86_64);
        for arch in [Arch::X86_64, Arch::X86] {
            for number in interesting(arch) {
                for arguments in ARGUMENTS_TO_TRY.into_iter().chain(more.iter().copied()) {
                    let call = Call { arch, number, arguments };
                    prop_assert_eq!(run(&program, &call), plain.expected(&call), "{:x?}", call);
                }
            }
        }
    }
}

#[test]
fn the_kernel_obeys() {
    let rules = profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["getppid"],"action":"SCMP_ACT_ERRNO","errnoRet":77},
        {"names":["lseek"],"action":"SCMP_ACT_ERRNO","errnoRet":78,"args":[
            {"index":0,"value":4294967296,"op":"SCMP_CMP_GE"},{"index":1,"value":5,"valueTwo":4,"op":"SCMP_CMP_MASKED_EQ"}]},
        {"names":["getpgid"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#,
    );
    let program = compile(&rules).unwrap();
    // SAFETY: the child, a copy of a process with threads, makes only system calls and leaves by _exit.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            let errno = || *libc::__errno_location();
            let fails = |result: libc::c_long, with: i32| result == -1 && errno() == with;
            let ok = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && program.install().is_ok()
                && libc::syscall(libc::SYS_getpid) > 0
                && fails(libc::syscall(libc::SYS_getppid), 77)
                && fails(libc::syscall(libc::SYS_lseek, 1_u64 << 32, 6, 0), 78)
                && fails(libc::syscall(libc::SYS_lseek, 1_u64 << 40 | 9999, 7, 0), libc::EBADF)
                && fails(libc::syscall(libc::SYS_lseek, 9999, 6, 0), libc::EBADF);
            if !ok {
                libc::_exit(1);
            }
            libc::syscall(libc::SYS_getpgid, 0);
            libc::_exit(2);
        }
        assert!(child > 0);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    };
    assert!(libc::WIFSIGNALED(status), "exited with {}", libc::WEXITSTATUS(status));
    assert_eq!(libc::WTERMSIG(status), libc::SIGSYS);
}

#[test]
fn the_kernel_takes_the_usual_profile() {
    let program = compile(&usual()).unwrap();
    // SAFETY: as above.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            let ok = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && program.install().is_ok()
                && libc::syscall(libc::SYS_socket, 38, 5, 0) == -1
                && *libc::__errno_location() == libc::EPERM
                && libc::syscall(5000) == -1
                && *libc::__errno_location() == libc::ENOSYS;
            libc::_exit(i32::from(!ok));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    };
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
}

/// The best of many is printed for people; the assertion only catches a slip of an order of magnitude.
#[test]
fn compiling_takes_microseconds() {
    let profile = usual();
    let best = (0..200)
        .map(|_| {
            let begun = std::time::Instant::now();
            compile(&profile).unwrap();
            begun.elapsed()
        })
        .min()
        .unwrap();
    println!("{best:?} for {} instructions", compile(&profile).unwrap().filters.len());
    assert!(best < std::time::Duration::from_millis(20), "{best:?}");
}

/// The same profiles through libseccomp (LGPL, hence for development only).
#[cfg(feature = "oracle")]
mod oracle {
    use std::ffi::{CString, c_char, c_int, c_uint, c_void};
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;

    use super::*;

    #[repr(C)]
    struct Comparison {
        argument: c_uint,
        operator: c_int,
        a: u64,
        b: u64,
    }

    #[link(name = "seccomp")]
    unsafe extern "C" {
        fn seccomp_init(default: u32) -> *mut c_void;
        fn seccomp_release(context: *mut c_void);
        fn seccomp_arch_add(context: *mut c_void, token: u32) -> c_int;
        fn seccomp_arch_remove(context: *mut c_void, token: u32) -> c_int;
        fn seccomp_syscall_resolve_name(name: *const c_char) -> c_int;
        fn seccomp_syscall_resolve_name_arch(token: u32, name: *const c_char) -> c_int;
        fn seccomp_rule_add_array(
            context: *mut c_void,
            action: u32,
            number: c_int,
            count: c_uint,
            comparisons: *const Comparison,
        ) -> c_int;
        fn seccomp_export_bpf(context: *const c_void, fd: c_int) -> c_int;
    }

    fn token(arch: Arch) -> u32 {
        if arch == Arch::X32 { 0x4000_003e } else { arch.token() }
    }

    fn knows(name: &str) -> bool {
        let name = CString::new(name).unwrap();
        // SAFETY: a string that ends in zero.
        unsafe { seccomp_syscall_resolve_name(name.as_ptr()) != -1 }
    }

    /// None when libseccomp does not take the profile.
    fn compiled(native: Arch, profile: &spec::Seccomp) -> Option<Vec<sock_filter>> {
        let default = action(&profile.default_action, profile.default_errno_ret).unwrap();
        // SAFETY: the library is used as its manual says; `context` is released at the end.
        unsafe {
            let context = seccomp_init(default);
            if native != Arch::X86_64 {
                assert_eq!(seccomp_arch_add(context, token(native)), 0);
                assert_eq!(seccomp_arch_remove(context, token(Arch::X86_64)), 0);
            }
            for name in &profile.architectures {
                let arch = Arch::parse(name).unwrap().unwrap();
                if arch != native {
                    seccomp_arch_add(context, token(arch));
                }
            }
            for entry in &profile.syscalls {
                let action = action(&entry.action, entry.errno_ret).unwrap();
                if action == default {
                    continue;
                }
                let comparisons: Vec<Comparison> = entry
                    .args
                    .iter()
                    .map(|a| Comparison {
                        argument: a.index,
                        operator: ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"]
                            .iter()
                            .position(|o| a.op == format!("SCMP_CMP_{o}"))
                            .unwrap() as c_int
                            + 1,
                        a: a.value,
                        b: a.value_two,
                    })
                    .collect();
                let twice = (0..6).any(|i| entry.args.iter().filter(|a| a.index == i).count() > 1);
                for name in &entry.names {
                    let text = CString::new(name.as_str()).unwrap();
                    let number = seccomp_syscall_resolve_name(text.as_ptr());
                    let width = if twice { 1 } else { comparisons.len().max(1) };
                    let mut chunks: Vec<&[Comparison]> = comparisons.chunks(width).collect();
                    if chunks.is_empty() {
                        chunks.push(&[]);
                    }
                    for chunk in chunks {
                        // It refuses some rules that contradict earlier ones, on all architectures at once.
                        let count = chunk.len() as c_uint;
                        if seccomp_rule_add_array(context, action, number, count, chunk.as_ptr()) != 0 {
                            seccomp_release(context);
                            return None;
                        }
                    }
                }
            }
            let mut file = tempfile::tempfile().unwrap();
            assert_eq!(seccomp_export_bpf(context, file.as_raw_fd()), 0);
            seccomp_release(context);
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            let program = bytes
                .chunks_exact(8)
                .map(|c| sock_filter {
                    code: u16::from_ne_bytes([c[0], c[1]]),
                    jt: c[2],
                    jf: c[3],
                    k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
                })
                .collect();
            Some(program)
        }
    }

    /// Whether both must agree on a call: the profile does not contradict itself about it, it is none of the cases
    /// that the head of the module declares to be different, and none that libseccomp 2.5 is known to get wrong.
    fn settled(plain: &Plain, call: &Call) -> bool {
        let Some(actions) = plain.matching(call) else { return true };
        let (_default, rules) = actions.split_last().unwrap();
        let arch = plain.abi(call);
        let hidden = arch == Arch::X86 && matches!(call.number, 102 | 117);
        // libseccomp cuts x32 arguments to 32 bits, the kernel does not.
        let values = plain.profile.syscalls.iter().flat_map(|e| &e.args).flat_map(|a| [a.value, a.value_two]);
        let wide =
            call.arguments.into_iter().chain(values.filter(|_| arch == Arch::X32)).any(|v| v > 0xffff_ffff);
        // libseccomp merges the comparisons of several rules for one call, and loses some when they are not about
        // equality: of `x < 0x100000000` and `x < 0xffffffff` it keeps the second.
        let named = plain.profile.syscalls.iter().zip(plain.named(arch));
        let entries: Vec<_> = named.filter(|(_, (numbers, _))| numbers.contains(&call.number)).collect();
        let several = entries.len() > 1 || entries.iter().any(|(e, _)| alternatives(e));
        let ordered = entries.iter().flat_map(|(e, _)| &e.args).any(|a| a.op != "SCMP_CMP_EQ");
        let conditional = plain.profile.syscalls.iter().any(|e| !e.args.is_empty());
        rules.windows(2).all(|w| w[0] == w[1])
            && !(several && ordered)
            && !(hidden && conditional)
            && !(wide && (arch == Arch::X32 || arch.narrow()))
            && !(rules.is_empty() && plain.newer(call))
    }

    /// What both programs say, with what is said differently on purpose made equal.
    fn agree(ours: u32, theirs: u32) -> bool {
        ours == theirs || (ours == KILL_PROCESS && theirs == KILL_THREAD)
    }

    fn without_unknown(mut profile: spec::Seccomp) -> spec::Seccomp {
        for entry in &mut profile.syscalls {
            entry.names.retain(|n| knows(n));
        }
        profile
    }

    #[test]
    fn libseccomp_agrees_on_the_usual_profile() {
        for (native, profile, arches) in [
            (Arch::X86_64, usual(), [Arch::X86_64, Arch::X86]),
            (Arch::Aarch64, arm(usual()), [Arch::Aarch64, Arch::Arm]),
        ] {
            let profile = without_unknown(profile);
            let (ours, theirs) =
                (compile_for(native, &profile).unwrap(), compiled(native, &profile).unwrap());
            let plain = Plain::new(&profile, native);
            let mut compared = 0;
            for arch in arches {
                for number in numbers(arch) {
                    for arguments in ARGUMENTS_TO_TRY {
                        let call = Call { arch, number, arguments };
                        if settled(&plain, &call) {
                            compared += 1;
                            let (a, b) = (run(&ours, &call), run(&theirs, &call));
                            assert!(agree(a, b), "{call:x?}: {a:#x}, libseccomp {b:#x}");
                        }
                    }
                }
            }
            assert!(compared > 10_000, "{compared}");
            println!("{compared} calls, {} instructions, libseccomp {}", ours.len(), theirs.len());
        }
    }

    #[test]
    fn of_two_rules_for_a_call_libseccomp_takes_the_first_too() {
        let profile = without_unknown(usual());
        let theirs = compiled(Arch::X86_64, &profile).unwrap();
        let setns = Call { arch: Arch::X86_64, number: 308, arguments: [0; 6] };
        assert_eq!(run(&theirs, &setns), ERRNO | 13);
    }

    #[test]
    fn numbers_are_those_of_libseccomp() {
        let mut names = usual().syscalls.swap_remove(0).names;
        names.extend(
            [
                "newfstatat",
                "sync_file_range2",
                "arm_sync_file_range",
                "fadvise64_64",
                "set_tls",
                "breakpoint",
            ]
            .map(str::to_owned),
        );
        for arch in [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64, Arch::Arm] {
            let (mut known, mut wrong) = (0, Vec::new());
            for name in &names {
                let text = CString::new(name.as_str()).unwrap();
                // SAFETY: a string that ends in zero.
                let theirs = unsafe { seccomp_syscall_resolve_name_arch(token(arch), text.as_ptr()) };
                if theirs >= 0 {
                    known += 1;
                    let ours = arch.number(&Name::new(name));
                    if ours != Some(theirs as u32) {
                        wrong.push((name, ours, theirs));
                    }
                }
            }
            assert!(wrong.is_empty(), "{arch:?}: {wrong:?}");
            assert!(known > 250, "{known} on {arch:?}");
        }
    }

    proptest! {
        #[test]
        fn libseccomp_agrees_on_any_profile(profile in any_profile()) {
            let ours = compile_for(Arch::X86_64, &profile).unwrap();
            let theirs = compiled(Arch::X86_64, &profile);
            prop_assume!(theirs.is_some());
            let theirs = theirs.unwrap();
            let plain = Plain::new(&profile, Arch::X86_64);
            for arch in [Arch::X86_64, Arch::X86] {
                for number in interesting(arch) {
                    for arguments in ARGUMENTS_TO_TRY {
                        let call = Call { arch, number, arguments };
                        if settled(&plain, &call) {
                            let (a, b) = (run(&ours, &call), run(&theirs, &call));
                            prop_assert!(agree(a, b), "{:x?}: {:#x}, libseccomp {:#x}", call, a, b);
                        }
                    }
                }
            }
        }
    }
}
