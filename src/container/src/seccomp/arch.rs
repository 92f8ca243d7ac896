//! Architectures and their system call numbers. The kernel's numbers come from the crate `syscalls`; how one call can
//! hide behind another on old x86 is written here.

use std::cell::OnceCell;

/// An ABI that a filter can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arch {
    X86_64,
    X86,
    X32,
    Aarch64,
    Arm,
}

/// Set in the numbers of x32 calls, which otherwise look like those of x86_64.
pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Arch {
    #[cfg(target_arch = "x86_64")]
    pub(super) const NATIVE: Arch = Arch::X86_64;
    #[cfg(target_arch = "aarch64")]
    pub(super) const NATIVE: Arch = Arch::Aarch64;

    /// The specification's name. None for architectures whose programs cannot run beside those we know, which a
    /// profile may list all the same.
    pub(super) fn parse(name: &str) -> Option<Option<Arch>> {
        Some(match name {
            "SCMP_ARCH_X86_64" => Some(Arch::X86_64),
            "SCMP_ARCH_X86" => Some(Arch::X86),
            "SCMP_ARCH_X32" => Some(Arch::X32),
            "SCMP_ARCH_AARCH64" => Some(Arch::Aarch64),
            "SCMP_ARCH_ARM" => Some(Arch::Arm),
            other if OTHERS.contains(&other) => None,
            _ => return None,
        })
    }

    /// Whether a kernel for `native` can run programs of this ABI.
    pub(super) fn runs_on(self, native: Arch) -> bool {
        match native {
            Arch::X86_64 => matches!(self, Arch::X86_64 | Arch::X86 | Arch::X32),
            Arch::Aarch64 => matches!(self, Arch::Aarch64 | Arch::Arm),
            other => self == other,
        }
    }

    /// What the kernel puts into `seccomp_data.arch`. x32 has that of x86_64.
    pub(super) fn token(self) -> u32 {
        match self {
            Arch::X86_64 | Arch::X32 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
            Arch::Aarch64 => 0xc000_00b7,
            Arch::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments have 32 bits, so that the upper half of a comparison does not exist.
    pub(super) fn narrow(self) -> bool {
        matches!(self, Arch::X86 | Arch::Arm)
    }

    pub(super) fn number(self, name: &Name) -> Option<u32> {
        match self {
            Arch::X86_64 => x86_64(name),
            Arch::X86 => x86(name),
            Arch::X32 => x32(name),
            Arch::Aarch64 => aarch64(name),
            Arch::Arm => arm(name),
        }
    }
}

const OTHERS: [&str; 17] = [
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SHEB",
];

/// A name with its hash: it is looked up in one table for each architecture.
pub(super) struct Name<'a> {
    text: &'a str,
    hash: usize,
    /// x86_64 and x32 ask the same table.
    x86_64: OnceCell<Option<u32>>,
}

impl<'a> Name<'a> {
    pub(super) fn new(text: &'a str) -> Name<'a> {
        Name { text, hash: hash(text.as_bytes()), x86_64: OnceCell::new() }
    }
}

/// FNV-1a, by which the tables below are laid out at compile time.
const fn hash(bytes: &[u8]) -> usize {
    let mut hash: u32 = 0x811c_9dc5;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    (hash ^ hash >> 15) as usize
}

const SLOTS: usize = 1024;

/// A lookup through a hash table made at compile time; the crate's own `from_str` compares with every name in turn.
macro_rules! lookup {
    ($function:ident, $arch:ident) => {
        fn $function(name: &Name) -> Option<u32> {
            use syscalls::$arch::Sysno;
            const fn lay_out() -> [Option<Sysno>; SLOTS] {
                let mut table = [None; SLOTS];
                let mut id = 0;
                while id <= Sysno::last().id() as usize {
                    if let Some(call) = Sysno::new(id) {
                        let mut slot = hash(call.name().as_bytes()) % SLOTS;
                        while table[slot].is_some() {
                            slot = (slot + 1) % SLOTS;
                        }
                        table[slot] = Some(call);
                    }
                    id += 1;
                }
                table
            }
            static TABLE: [Option<Sysno>; SLOTS] = lay_out();
            let mut slot = name.hash % SLOTS;
            // Half of the slots are empty, so this ends.
            while let Some(call) = TABLE[slot] {
                if call.name() == name.text {
                    return u32::try_from(call.id()).ok();
                }
                slot = (slot + 1) % SLOTS;
            }
            None
        }
    };
}

lookup!(x86_64_general, x86_64);
lookup!(x86, x86);
lookup!(aarch64_general, aarch64);
lookup!(arm_general, arm);

fn x86_64(name: &Name) -> Option<u32> {
    *name.x86_64.get_or_init(|| x86_64_general(name))
}

/// The generic table has one entry, `3264_fstatat`, for two names, of which profiles use this one; and entries for the
/// 64-bit times of 32-bit architectures.
fn aarch64(name: &Name) -> Option<u32> {
    match name.text {
        "newfstatat" => Some(79),
        _ => aarch64_general(name).filter(|number| !(403..=423).contains(number)),
    }
}

/// Calls that ARM keeps in a range of their own, and one with two names.
fn arm(name: &Name) -> Option<u32> {
    const PRIVATE: u32 = 0x0f_0000;
    match name.text {
        "breakpoint" => Some(PRIVATE + 1),
        "cacheflush" => Some(PRIVATE + 2),
        "usr26" => Some(PRIVATE + 3),
        "usr32" => Some(PRIVATE + 4),
        "set_tls" => Some(PRIVATE + 5),
        "get_tls" => Some(PRIVATE + 6),
        "sync_file_range2" => Some(341),
        _ => arm_general(name),
    }
}

/// x32 shares most numbers with x86_64; those whose arguments are laid out differently have their own from 512 on, and
/// a few are not there at all. See arch/x86/entry/syscalls/syscall_64.tbl.
fn x32(name: &Name) -> Option<u32> {
    let own = match x86_64(name)? {
        13 => 512,  // rt_sigaction
        15 => 513,  // rt_sigreturn
        16 => 514,  // ioctl
        19 => 515,  // readv
        20 => 516,  // writev
        45 => 517,  // recvfrom
        46 => 518,  // sendmsg
        47 => 519,  // recvmsg
        59 => 520,  // execve
        101 => 521, // ptrace
        127 => 522, // rt_sigpending
        128 => 523, // rt_sigtimedwait
        129 => 524, // rt_sigqueueinfo
        131 => 525, // sigaltstack
        222 => 526, // timer_create
        244 => 527, // mq_notify
        246 => 528, // kexec_load
        247 => 529, // waitid
        273 => 530, // set_robust_list
        274 => 531, // get_robust_list
        278 => 532, // vmsplice
        279 => 533, // move_pages
        295 => 534, // preadv
        296 => 535, // pwritev
        297 => 536, // rt_tgsigqueueinfo
        299 => 537, // recvmmsg
        307 => 538, // sendmmsg
        310 => 539, // process_vm_readv
        311 => 540, // process_vm_writev
        54 => 541,  // setsockopt
        55 => 542,  // getsockopt
        206 => 543, // io_setup
        209 => 544, // io_submit
        322 => 545, // execveat
        327 => 546, // preadv2
        328 => 547, // pwritev2
        // uselib, _sysctl, create_module, get_kernel_syms, query_module, nfsservctl, set_thread_area,
        // get_thread_area, epoll_ctl_old, epoll_wait_old, vserver, uretprobe, uprobe, map_shadow_stack
        134 | 156 | 174 | 177 | 178 | 180 | 205 | 211 | 214 | 215 | 236 | 335 | 336 | 453 => return None,
        shared => shared,
    };
    Some(own | X32_BIT)
}

/// On x86 the socket and System V IPC calls can also be made through one call whose first argument says which: the
/// number of that call, and the value. `ipc` keeps a version in the upper half of it.
pub(super) fn behind(name: &Name) -> Option<(u32, u32)> {
    const SOCKETCALL: u32 = 102;
    const IPC: u32 = 117;
    /// Sorted by name.
    const CALLS: [(&str, u32, u32); 32] = [
        ("accept", SOCKETCALL, 5),
        ("accept4", SOCKETCALL, 18),
        ("bind", SOCKETCALL, 2),
        ("connect", SOCKETCALL, 3),
        ("getpeername", SOCKETCALL, 7),
        ("getsockname", SOCKETCALL, 6),
        ("getsockopt", SOCKETCALL, 15),
        ("listen", SOCKETCALL, 4),
        ("msgctl", IPC, 14),
        ("msgget", IPC, 13),
        ("msgrcv", IPC, 12),
        ("msgsnd", IPC, 11),
        ("recv", SOCKETCALL, 10),
        ("recvfrom", SOCKETCALL, 12),
        ("recvmmsg", SOCKETCALL, 19),
        ("recvmsg", SOCKETCALL, 17),
        ("semctl", IPC, 3),
        ("semget", IPC, 2),
        ("semop", IPC, 1),
        ("semtimedop", IPC, 4),
        ("send", SOCKETCALL, 9),
        ("sendmmsg", SOCKETCALL, 20),
        ("sendmsg", SOCKETCALL, 16),
        ("sendto", SOCKETCALL, 11),
        ("setsockopt", SOCKETCALL, 14),
        ("shmat", IPC, 21),
        ("shmctl", IPC, 24),
        ("shmdt", IPC, 22),
        ("shmget", IPC, 23),
        ("shutdown", SOCKETCALL, 13),
        ("socket", SOCKETCALL, 1),
        ("socketpair", SOCKETCALL, 8),
    ];
    /// Which hashes occur, folded to 256: few of the names that are none of these come further.
    const OCCUR: [u64; 4] = {
        let mut bits = [0; 4];
        let mut i = 0;
        while i < CALLS.len() {
            let folded = hash(CALLS[i].0.as_bytes()) % 256;
            bits[folded / 64] |= 1 << (folded % 64);
            i += 1;
        }
        bits
    };
    let folded = name.hash % 256;
    if OCCUR[folded / 64] >> (folded % 64) & 1 == 0 {
        return None;
    }
    let at = CALLS.binary_search_by_key(&name.text, |call| call.0).ok()?;
    Some((CALLS[at].1, CALLS[at].2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_numbers_of_their_architecture() {
        let of = |arch: Arch, name| arch.number(&Name::new(name));
        assert_eq!(of(Arch::X86_64, "openat2"), Some(437));
        assert_eq!(of(Arch::X86, "socketcall"), Some(102));
        assert_eq!(of(Arch::X86_64, "socketcall"), None);
        assert_eq!(of(Arch::X32, "execve"), Some(520 | X32_BIT));
        assert_eq!(of(Arch::X32, "read"), Some(X32_BIT));
        assert_eq!(of(Arch::Aarch64, "openat"), Some(56));
        assert_eq!(of(Arch::Aarch64, "open"), None);
        assert_eq!(of(Arch::Arm, "set_tls"), Some(0xf0005));
        assert_eq!(of(Arch::X86_64, "no_such_call"), None);
        assert_eq!(of(Arch::X86_64, ""), None);
    }

    #[test]
    fn calls_behind_others_are_found() {
        assert_eq!(behind(&Name::new("accept")), Some((102, 5)));
        assert_eq!(behind(&Name::new("socketpair")), Some((102, 8)));
        assert_eq!(behind(&Name::new("shmctl")), Some((117, 24)));
        assert_eq!(behind(&Name::new("read")), None);
    }

    #[test]
    fn every_name_is_found() {
        for id in 0..=usize::try_from(syscalls::x86_64::Sysno::last().id()).unwrap() {
            if let Some(call) = syscalls::x86_64::Sysno::new(id) {
                assert_eq!(x86_64(&Name::new(call.name())), u32::try_from(id).ok(), "{call}");
            }
        }
    }
}
