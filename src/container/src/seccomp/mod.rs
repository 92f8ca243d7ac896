//! Compiles a seccomp profile of the OCI specification to a BPF filter, in microseconds, and installs it.
//! Which profile a container gets is the business of whoever makes its specification.
//!
//! For each architecture the numbers of system calls are cut into ranges of equal treatment and searched by a balanced
//! tree of comparisons. Where several rules name one call the first that matches decides. Otherwise this does what
//! runc does with libseccomp, which the tests hold it to:
//! - a rule whose action is the default action is passed over;
//! - several conditions are joined by AND, unless two of them are about the same argument: then by OR;
//! - names that an architecture does not have are passed over; the native architecture is always included;
//! - calls newer than every call the profile names get ENOSYS in place of a refusal, so that libraries that try a new
//!   call fall back to the old one.
//!
//! One thing is stricter: on x86 a socket call made through `socketcall` shows the filter none of its arguments. A
//! rule that allows under conditions therefore does not allow it that way.

mod arch;
mod code;

use libc::sock_filter;

use self::arch::{Arch, Name, X32_BIT};
use self::code::{Code, Target, Test};
use crate::spec;

/// A compiled filter.
#[derive(Clone)]
pub struct Program {
    /// What the kernel runs for every system call.
    pub filters: Vec<sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*` for seccomp(2).
    pub flags: u32,
}

/// Why a profile cannot be compiled.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Error {
    #[error("unknown seccomp action {0:?}")]
    Action(String),
    #[error("seccomp action SCMP_ACT_NOTIFY is not supported")]
    Notify,
    #[error("unknown seccomp architecture {0:?}")]
    Architecture(String),
    #[error("unknown seccomp flag {0:?}")]
    Flag(String),
    #[error("unknown seccomp operator {0:?}")]
    Operator(String),
    #[error("seccomp argument index {0} is not within 0 to 5")]
    Argument(u32),
    #[error("seccomp errno {0} is not within 0 to 4095")]
    Errno(u32),
    #[error("seccomp profile needs {0} instructions, the kernel takes 4096")]
    TooLong(usize),
}

const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const KIND: u32 = 0xffff_0000;

const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// Longest program that the kernel takes (BPF_MAXINSNS).
const LONGEST: usize = 4096;

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Compiles a profile for the architecture we run on and those it lists.
pub fn compile(profile: &spec::Seccomp) -> Result<Program, Error> {
    let filters = compile_for(Arch::NATIVE, profile)?;
    let mut flags = 0;
    for flag in &profile.flags {
        flags |= match flag.as_str() {
            "SECCOMP_FILTER_FLAG_TSYNC" => 1,
            "SECCOMP_FILTER_FLAG_LOG" => 1 << 1,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0, // speaks of notifications, of which there are none
            _ => return Err(Error::Flag(flag.clone())),
        };
    }
    if profile.flags.is_empty() {
        // As runc: the mitigation that seccomp would switch on costs much and protects a container from itself only.
        flags = FLAG_SPEC_ALLOW;
    }
    Ok(Program { filters, flags })
}

impl Program {
    /// Puts the calling thread under the filter. Needs no_new_privs or CAP_SYS_ADMIN. Allocates nothing.
    pub fn install(&self) -> std::io::Result<()> {
        const SET_MODE_FILTER: libc::c_uint = 1;
        let program = libc::sock_fprog {
            len: u16::try_from(self.filters.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?,
            filter: self.filters.as_ptr().cast_mut(),
        };
        // SAFETY: `program` describes `filters`, which the kernel copies and does not write to.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, self.flags, std::ptr::from_ref(&program))
        };
        match result {
            0 => Ok(()),
            // With TSYNC the kernel names a thread that could not be taken along.
            1.. => Err(std::io::ErrorKind::ResourceBusy.into()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Program({} instructions, flags {:#x})", self.filters.len(), self.flags)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    Masked,
}

/// A comparison with one argument; `second` is what a masked argument is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    argument: u32,
    operator: Operator,
    value: u64,
    second: u64,
}

/// Conditions that must all hold, and what happens then.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    action: u32,
}

/// An entry of a profile, ready to be looked up.
struct Entry<'a> {
    names: Vec<Name<'a>>,
    rules: Vec<Rule>,
    /// The same for calls that x86 can make through another: the number of that one, and the rule.
    behind: Vec<(u32, Rule)>,
}

/// What happens to one system call: rules in order, by their place in [`Chains`], then an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Treatment {
    chain: usize,
    otherwise: u32,
}

impl Treatment {
    const fn plain(otherwise: u32) -> Treatment {
        Treatment { chain: 0, otherwise }
    }
}

/// Every sequence of conditional rules that some call has, once. The first is the empty one.
struct Chains<'a>(Vec<Vec<&'a Rule>>);

impl<'a> Chains<'a> {
    fn place(&mut self, chain: Vec<&'a Rule>) -> usize {
        self.0.iter().position(|known| *known == chain).unwrap_or_else(|| {
            self.0.push(chain);
            self.0.len() - 1
        })
    }
}

fn compile_for(native: Arch, profile: &spec::Seccomp) -> Result<Vec<sock_filter>, Error> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let entries =
        profile.syscalls.iter().map(|entry| Entry::new(entry, default)).collect::<Result<Vec<_>, _>>()?;
    let mut arches = vec![native];
    for name in &profile.architectures {
        match Arch::parse(name) {
            Some(Some(arch)) if arch.runs_on(native) && !arches.contains(&arch) => arches.push(arch),
            Some(_) => {}
            None => return Err(Error::Architecture(name.clone())),
        }
    }

    // The highest value that a refused unknown call can have: see runc's libcontainer/seccomp/patchbpf.
    let unknown = match default & KIND {
        ALLOW | LOG | TRACE => default,
        _ => ERRNO | libc::ENOSYS.cast_unsigned(),
    };
    let mut code = Code::default();
    let mut chains = Chains(vec![Vec::new()]);
    // An ABI that the profile does not list is not for this container.
    let mut start = Target::Return(KILL_PROCESS);
    for &arch in arches.iter().rev() {
        if arch == Arch::X32 {
            continue;
        }
        let mut ranges = treatments(arch, &entries, default, unknown, &mut chains);
        if arch == Arch::X86_64 {
            ranges.retain(|(from, _)| *from < X32_BIT);
            if arches.contains(&Arch::X32) {
                ranges.extend(treatments(Arch::X32, &entries, default, unknown, &mut chains));
            } else {
                ranges.push((X32_BIT, Treatment::plain(KILL_PROCESS)));
            }
            // -1 is what a tracer sets to skip a call, not a number of x32.
            ranges.push((u32::MAX, Treatment::plain(default)));
        }
        ranges.dedup_by(|next, previous| next.1 == previous.1);
        let mut shared = Vec::new();
        let tree = search(&mut code, arch, &ranges, &chains, &mut shared);
        let tree = code.load(NUMBER, tree);
        start = code.branch(Test::Equal, arch.token(), tree, start);
    }
    let start = code.load(ARCHITECTURE, start);
    let program = code.finish(start);
    if program.len() > LONGEST {
        return Err(Error::TooLong(program.len()));
    }
    Ok(program)
}

/// Cuts all numbers of an architecture into ranges of equal treatment, each given by its first number.
fn treatments<'a>(
    arch: Arch,
    entries: &'a [Entry],
    default: u32,
    unknown: u32,
    chains: &mut Chains<'a>,
) -> Vec<(u32, Treatment)> {
    let base = if arch == Arch::X32 { X32_BIT } else { 0 };
    let mut last = None;
    // (number, position of the rule, rule): sorted, each call's rules stand together in their order.
    let mut named: Vec<(u32, u32, &Rule)> = Vec::with_capacity(512);
    let mut position = 0;
    for entry in entries {
        let numbers = entry.names.iter().filter_map(|name| arch.number(name));
        for number in numbers {
            // Also a call whose rules change nothing was known to the author of the profile.
            last = if number < base + 0x1_0000 { last.max(Some(number)) } else { last };
            named.extend(entry.rules.iter().map(|rule| (number, position, rule)));
            position += 1;
        }
        if arch == Arch::X86 {
            named.extend(entry.behind.iter().map(|(number, rule)| (*number, position, rule)));
            position += 1;
        }
    }
    // Stable: rules of one entry have one position and are in order already.
    named.sort_by_key(|(number, position, _)| (*number, *position));

    let refused = Treatment::plain(default);
    let mut ranges = vec![(base, refused)];
    let mut add = |from: u32, treatment: Treatment| match ranges.last_mut() {
        Some((_, last)) if *last == treatment => {}
        Some((start, last)) if *start == from => *last = treatment,
        _ => ranges.push((from, treatment)),
    };
    for call in named.chunk_by(|a, b| a.0 == b.0) {
        let number = call[0].0;
        let mut treatment = refused;
        let mut chain: Vec<&Rule> = Vec::new();
        for (.., rule) in call {
            if rule.conditions.is_empty() {
                treatment.otherwise = rule.action;
                break;
            }
            if !chain.contains(rule) {
                chain.push(rule);
            }
        }
        if !chain.is_empty() {
            treatment.chain = chains.place(chain);
        }
        add(number, treatment);
        add(number + 1, refused);
    }
    if let Some(last) = last {
        let newer = Treatment::plain(unknown);
        // ARM's private calls lie far above; what follows the last ordinary one gives way to them.
        let at = ranges.partition_point(|(from, _)| *from <= last);
        match ranges.get_mut(at) {
            Some(range) if range.0 == last + 1 => range.1 = newer,
            _ => ranges.insert(at, (last + 1, newer)),
        }
    }
    ranges
}

/// What a rule says about the same call made through `socketcall` or `ipc`, where its arguments cannot be seen.
fn hidden(rule: &Rule, value: u32) -> Option<Rule> {
    let permits = matches!(rule.action & KIND, ALLOW | LOG);
    if permits && !rule.conditions.is_empty() {
        return None;
    }
    let which = Condition { argument: 0, operator: Operator::Masked, value: 0xffff, second: value.into() };
    Some(Rule { conditions: vec![which], action: rule.action })
}

/// A balanced tree over ranges: which of them holds the accumulator?
fn search(
    code: &mut Code,
    arch: Arch,
    ranges: &[(u32, Treatment)],
    chains: &Chains,
    shared: &mut Vec<(Treatment, Target)>,
) -> Target {
    match ranges {
        [] => Target::Return(KILL_PROCESS),
        [(_, treatment)] => treat(code, arch.narrow(), *treatment, chains, shared),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let above = search(code, arch, right, chains, shared);
            let below = search(code, arch, left, chains, shared);
            code.branch(Test::GreaterOrEqual, right[0].0, above, below)
        }
    }
}

/// The rules of a call, tried in order. Calls that are treated alike share them.
fn treat(
    code: &mut Code,
    narrow: bool,
    treatment: Treatment,
    chains: &Chains,
    shared: &mut Vec<(Treatment, Target)>,
) -> Target {
    let mut next = Target::Return(treatment.otherwise);
    if treatment.chain == 0 {
        return next;
    }
    if let Some((_, target)) = shared.iter().find(|(known, _)| *known == treatment) {
        return *target;
    }
    for rule in chains.0[treatment.chain].iter().rev() {
        let mut then = Target::Return(rule.action);
        for condition in rule.conditions.iter().rev() {
            then = compare(code, narrow, condition, then, next);
        }
        next = then;
    }
    shared.push((treatment, next));
    next
}

/// Compares one argument: the upper half first, the lower one where the upper does not decide.
fn compare(code: &mut Code, narrow: bool, condition: &Condition, yes: Target, no: Target) -> Target {
    #[allow(clippy::cast_possible_truncation)] // the point of it
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let low = ARGUMENTS + 8 * condition.argument;
    let high = low + 4;
    let (value_high, value_low) = halves(condition.value);
    let mut ordered = |test: Test, yes: Target, no: Target| {
        let lower = code.branch(test, value_low, yes, no);
        let lower = code.load(low, lower);
        if narrow {
            return lower;
        }
        let equal = code.branch(Test::Equal, value_high, lower, no);
        let higher = code.branch(Test::Greater, value_high, yes, equal);
        code.load(high, higher)
    };
    match condition.operator {
        Operator::Greater => ordered(Test::Greater, yes, no),
        Operator::GreaterOrEqual => ordered(Test::GreaterOrEqual, yes, no),
        Operator::LessOrEqual => ordered(Test::Greater, no, yes),
        Operator::Less => ordered(Test::GreaterOrEqual, no, yes),
        Operator::Equal => equal(code, narrow, low, u64::MAX, condition.value, yes, no),
        Operator::NotEqual => equal(code, narrow, low, u64::MAX, condition.value, no, yes),
        Operator::Masked => {
            // Bits outside the mask are not compared, on neither side.
            let wanted = condition.second & condition.value;
            equal(code, narrow, low, condition.value, wanted, yes, no)
        }
    }
}

fn equal(code: &mut Code, narrow: bool, low: u32, mask: u64, value: u64, yes: Target, no: Target) -> Target {
    let mut half = |offset: u32, mask: u32, value: u32, yes: Target| match mask {
        0 => yes,
        _ => {
            let mut then = code.branch(Test::Equal, value, yes, no);
            if mask != u32::MAX {
                then = code.and(mask, then);
            }
            code.load(offset, then)
        }
    };
    #[allow(clippy::cast_possible_truncation)] // the point of it
    let lower = half(low, mask as u32, value as u32, yes);
    if narrow { lower } else { half(low + 4, (mask >> 32) as u32, (value >> 32) as u32, lower) }
}

impl Entry<'_> {
    fn new(entry: &spec::SeccompSyscall, default: u32) -> Result<Entry<'_>, Error> {
        let rules = rules(entry, default)?;
        let names: Vec<Name> = entry.names.iter().map(|name| Name::new(name)).collect();
        let behind = names
            .iter()
            .filter_map(arch::behind)
            .flat_map(|(number, value)| {
                rules.iter().filter_map(move |rule| Some((number, hidden(rule, value)?)))
            })
            .collect();
        Ok(Entry { names, rules, behind })
    }
}

/// The rules of one entry. None when it says what would happen anyway.
fn rules(entry: &spec::SeccompSyscall, default: u32) -> Result<Vec<Rule>, Error> {
    let action = action(&entry.action, entry.errno_ret)?;
    let conditions = entry.args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    if action == default {
        return Ok(Vec::new());
    }
    let mut seen = [false; 6];
    let twice = conditions.iter().any(|c| std::mem::replace(&mut seen[c.argument as usize], true));
    if twice {
        return Ok(conditions.into_iter().map(|c| Rule { conditions: vec![c], action }).collect());
    }
    Ok(vec![Rule { conditions, action }])
}

fn condition(arg: &spec::SeccompArg) -> Result<Condition, Error> {
    let operator = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Operator::Equal,
        "SCMP_CMP_NE" => Operator::NotEqual,
        "SCMP_CMP_GT" => Operator::Greater,
        "SCMP_CMP_GE" => Operator::GreaterOrEqual,
        "SCMP_CMP_LT" => Operator::Less,
        "SCMP_CMP_LE" => Operator::LessOrEqual,
        "SCMP_CMP_MASKED_EQ" => Operator::Masked,
        other => return Err(Error::Operator(other.to_owned())),
    };
    if arg.index > 5 {
        return Err(Error::Argument(arg.index));
    }
    Ok(Condition { argument: arg.index, operator, value: arg.value, second: arg.value_two })
}

/// The kernel's return value for an action of the specification.
fn action(name: &str, errno: Option<u32>) -> Result<u32, Error> {
    let data = errno.unwrap_or(libc::EPERM.cast_unsigned());
    let action = match name {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_ERRNO" if data <= 4095 => ERRNO | data,
        "SCMP_ACT_TRACE" if data <= 0xffff => TRACE | data,
        "SCMP_ACT_ERRNO" | "SCMP_ACT_TRACE" => return Err(Error::Errno(data)),
        "SCMP_ACT_NOTIFY" => return Err(Error::Notify),
        other => return Err(Error::Action(other.to_owned())),
    };
    Ok(action)
}

#[cfg(test)]
mod tests;
