//! Decides which devices a container may open and make: from the rules of the specification to what v1 is told,
//! and to the BPF program that v2 takes. Loading that program is the business of `bpf`.

use super::Error;
use crate::spec;

pub(super) const MKNOD: u8 = 1;
pub(super) const READ: u8 = 2;
pub(super) const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Block,
    Char,
}

/// One rule for one kind of device. No number means every number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    pub(super) kind: Kind,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) access: u8,
}

/// What is allowed: a default, and rules of which the last that speaks of an access decides it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) allow: bool,
    pub(super) rules: Vec<Rule>,
}

impl Policy {
    /// Evaluates the specification's list. An empty one, or one that starts without a blanket rule, is "none but
    /// those every container has": an empty list that meant "all devices" was GHSA-g54h-m393-cpwq.
    pub(super) fn new(asked: &[spec::DeviceRule]) -> Result<Policy, Error> {
        let mut policy = Policy { allow: false, rules: built_in().to_vec() };
        for rule in asked {
            policy.take(rule)?;
        }
        Ok(policy)
    }

    fn take(&mut self, rule: &spec::DeviceRule) -> Result<(), Error> {
        let refuse = |why: &str| {
            Err(Error::Value {
                what: format!("device rule {:?} {:?}", rule.kind, rule.access),
                why: why.into(),
            })
        };
        let mut access = 0;
        for letter in rule.access.chars() {
            access |= match letter {
                'm' => MKNOD,
                'r' => READ,
                'w' => WRITE,
                _ => return refuse("access is not made of r, w and m"),
            };
        }
        if access == 0 {
            access = ALL;
        }
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => u32::try_from(n).map(Some),
        };
        let (Ok(major), Ok(minor)) = (number(rule.major), number(rule.minor)) else {
            return refuse("a device number is out of range");
        };
        let kinds: &[Kind] = match rule.kind.as_str() {
            "" | "a" => &[Kind::Block, Kind::Char],
            "b" => &[Kind::Block],
            "c" | "u" => &[Kind::Char],
            _ => return refuse("type is not a, b or c"),
        };
        if kinds.len() == 2 && access == ALL && major.is_none() && minor.is_none() {
            self.allow = rule.allow;
            self.rules = if rule.allow { Vec::new() } else { built_in().to_vec() };
            return Ok(());
        }
        for &kind in kinds {
            let rule = Rule { allow: rule.allow, kind, major, minor, access };
            // The later of two equal rules decides, so the earlier one is dead weight.
            self.rules.retain(|old| Rule { allow: rule.allow, ..*old } != rule);
            self.rules.push(rule);
        }
        Ok(())
    }

    /// What a v1 group is told, in order: pairs of file and line. `inherited` is its `devices.list` as it stands.
    ///
    /// Moving a running container from one set to another never passes through "deny all": what it keeps, it keeps
    /// throughout. Only the way from "all allowed" to "denied by default" has to, for the kernel offers no other.
    pub(super) fn v1(&self, inherited: &str) -> Vec<(&'static str, String)> {
        const ALLOW: &str = "devices.allow";
        const DENY: &str = "devices.deny";
        let mut old: Vec<Rule> = inherited.lines().filter_map(parse).collect();
        let old_allows = inherited.trim_start().starts_with('a');
        let mut writes = Vec::new();
        if self.allow {
            if !old_allows {
                writes.push((ALLOW, "a".to_owned()));
            }
            writes.extend(self.rules.iter().filter(|r| !r.allow).map(|r| (DENY, line(r))));
            return writes;
        }
        if old_allows {
            writes.push((DENY, "a".to_owned()));
            old.clear();
        }
        // The kernel keeps one entry for each device, so the letters are merged before they are compared.
        let mut wanted: Vec<Rule> = Vec::new();
        for rule in &self.rules {
            let same =
                wanted.iter_mut().find(|w| (w.kind, w.major, w.minor) == (rule.kind, rule.major, rule.minor));
            match (same, rule.allow) {
                (Some(w), true) => w.access |= rule.access,
                (Some(w), false) => w.access &= !rule.access,
                (None, true) => wanted.push(*rule),
                // The kernel cannot carve a device out of a wider rule here; with nothing to carve from there is no need.
                (None, false) => {}
            }
        }
        wanted.retain(|w| w.access != 0);
        // The order means nothing to the kernel; people and test suites look for their own first.
        wanted.sort_by_key(|w| built_in().contains(w));
        for before in &old {
            let kept = wanted
                .iter()
                .find(|w| (w.kind, w.major, w.minor) == (before.kind, before.major, before.minor))
                .map_or(0, |w| w.access);
            let lost = before.access & !kept;
            if lost != 0 {
                writes.push((DENY, line(&Rule { access: lost, ..*before })));
            }
        }
        for rule in &wanted {
            let had = old
                .iter()
                .find(|o| (o.kind, o.major, o.minor) == (rule.kind, rule.major, rule.minor))
                .map_or(0, |o| o.access);
            if rule.access & !had != 0 {
                writes.push((ALLOW, line(rule)));
            }
        }
        writes
    }

    /// Denials that a v1 group cannot express: of a device within a wider rule that allows it.
    pub(super) fn beyond_v1(&self) -> Option<String> {
        if self.allow {
            return None;
        }
        let denied = self.rules.iter().enumerate().find(|(i, deny)| {
            let wider = |a: Option<u32>, b: Option<u32>| a.is_none() || a == b;
            !deny.allow
                && self.rules[..*i].iter().any(|a| {
                    a.allow
                        && a.kind == deny.kind
                        && a.access & deny.access != 0
                        && (a.major, a.minor) != (deny.major, deny.minor)
                        && wider(a.major, deny.major)
                        && wider(a.minor, deny.minor)
                })
        });
        denied.map(|(_, rule)| line(rule))
    }

    /// The program for `BPF_PROG_TYPE_CGROUP_DEVICE`: 1 lets the access pass, 0 refuses it.
    ///
    /// The rules are asked from the last to the first, each about the letters that no later rule has settled.
    pub(super) fn program(&self) -> Vec<Insn> {
        let mut code = vec![
            // r2 = type, r3 = letters still to be settled, r4 = major, r5 = minor
            Insn::load(3, 1, 0),
            Insn::load(4, 1, 4),
            Insn::load(5, 1, 8),
            Insn::copy(2, 3),
            Insn::and(2, 0xffff),
            Insn::shift_right(3, 16),
        ];
        for rule in self.rules.iter().rev() {
            let kind = match rule.kind {
                Kind::Block => 1,
                Kind::Char => 2,
            };
            let mut tests = vec![(2, kind)];
            tests.extend(rule.major.map(|n| (4, n)));
            tests.extend(rule.minor.map(|n| (5, n)));
            let body: Vec<Insn> = if rule.allow {
                // Settle these letters; when none is left, all were allowed.
                vec![
                    Insn::and(3, !u32::from(rule.access)),
                    Insn::skip_unless_zero(3, 2),
                    Insn::set(0, 1),
                    Insn::exit(),
                ]
            } else {
                vec![
                    Insn::skip_if_any(3, u32::from(rule.access), 1),
                    Insn::jump(2),
                    Insn::set(0, 0),
                    Insn::exit(),
                ]
            };
            let count = tests.len();
            for (i, (register, value)) in tests.into_iter().enumerate() {
                // Past the tests that follow and the body: a handful, far below the 16-bit range of a jump.
                let over = count - i - 1 + body.len();
                #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
                code.push(Insn::skip_unless_equal(register, value, over as i16));
            }
            code.extend(body);
        }
        code.push(Insn::set(0, u32::from(self.allow)));
        code.push(Insn::exit());
        code
    }
}

/// What every container may do, as with runc: make any node, and use these. tun is among them because VPN pods
/// counted on it (runc took it out in 1.2.0 and back in in 1.2.4).
fn built_in() -> [Rule; 11] {
    let rule = |kind, major, minor, access| Rule { allow: true, kind, major, minor, access };
    let node = |major, minor| rule(Kind::Char, Some(major), Some(minor), ALL);
    [
        rule(Kind::Char, None, None, MKNOD),
        rule(Kind::Block, None, None, MKNOD),
        node(1, 3),                             // null
        node(1, 5),                             // zero
        node(1, 7),                             // full
        node(1, 8),                             // random
        node(1, 9),                             // urandom
        node(5, 0),                             // tty
        node(5, 2),                             // ptmx
        rule(Kind::Char, Some(136), None, ALL), // pts
        node(10, 200),                          // tun
    ]
}

fn line(rule: &Rule) -> String {
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let kind = match rule.kind {
        Kind::Block => 'b',
        Kind::Char => 'c',
    };
    let letters: String = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
        .iter()
        .filter(|(bit, _)| rule.access & bit != 0)
        .map(|(_, l)| l)
        .collect();
    format!("{kind} {}:{} {letters}", number(rule.major), number(rule.minor))
}

/// Reads a line of `devices.list`.
fn parse(line: &str) -> Option<Rule> {
    let mut words = line.split_whitespace();
    let kind = match words.next()? {
        "b" => Kind::Block,
        "c" => Kind::Char,
        _ => return None,
    };
    let (major, minor) = words.next()?.split_once(':')?;
    let number = |n: &str| if n == "*" { Some(None) } else { n.parse().ok().map(Some) };
    let mut access = 0;
    for letter in words.next()?.bytes() {
        access |= match letter {
            b'r' => READ,
            b'w' => WRITE,
            b'm' => MKNOD,
            _ => 0,
        };
    }
    Some(Rule { allow: true, kind, major: number(major)?, minor: number(minor)?, access })
}

/// One eBPF instruction, as bpf(2) takes it. Encodings are those of the kernel's Documentation/bpf/standardization.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Insn {
    pub(super) code: u8,
    /// Source register in the high half, destination in the low one.
    pub(super) registers: u8,
    pub(super) offset: i16,
    pub(super) value: i32,
}

const _: () = assert!(size_of::<Insn>() == 8);

impl Insn {
    const fn new(code: u8, destination: u8, source: u8, offset: i16, value: u32) -> Insn {
        Insn { code, registers: source << 4 | destination, offset, value: value.cast_signed() }
    }

    /// destination = *(u32 *)(source + offset)
    fn load(destination: u8, source: u8, offset: i16) -> Insn {
        Insn::new(0x61, destination, source, offset, 0)
    }

    fn copy(destination: u8, source: u8) -> Insn {
        Insn::new(0xbc, destination, source, 0, 0)
    }

    fn set(register: u8, value: u32) -> Insn {
        Insn::new(0xb4, register, 0, 0, value)
    }

    fn and(register: u8, value: u32) -> Insn {
        Insn::new(0x54, register, 0, 0, value)
    }

    fn shift_right(register: u8, bits: u32) -> Insn {
        Insn::new(0x74, register, 0, 0, bits)
    }

    fn skip_unless_equal(register: u8, value: u32, over: i16) -> Insn {
        Insn::new(0x56, register, 0, over, value)
    }

    fn skip_unless_zero(register: u8, over: i16) -> Insn {
        Insn::new(0x56, register, 0, over, 0)
    }

    fn skip_if_any(register: u8, bits: u32, over: i16) -> Insn {
        Insn::new(0x46, register, 0, over, bits)
    }

    fn jump(over: i16) -> Insn {
        Insn::new(0x05, 0, 0, over, 0)
    }

    fn exit() -> Insn {
        Insn::new(0x95, 0, 0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(json: &str) -> Policy {
        Policy::new(&serde_json::from_str::<Vec<spec::DeviceRule>>(json).unwrap()).unwrap()
    }

    /// Runs the program the way the kernel does.
    fn run(code: &[Insn], kind: Kind, major: u32, minor: u32, access: u8) -> bool {
        let kind = match kind {
            Kind::Block => 1,
            Kind::Char => 2,
        };
        let context = [kind | u32::from(access) << 16, major, minor];
        let mut r = [0u32; 11];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (d, s) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let value = i.value.cast_unsigned();
            let mut jump = 0;
            match i.code {
                0x61 => r[d] = context[usize::try_from(i.offset).unwrap() / 4],
                0xbc => r[d] = r[s],
                0xb4 => r[d] = value,
                0x54 => r[d] &= value,
                0x74 => r[d] >>= value,
                0x56 if r[d] != value => jump = i.offset,
                0x46 if r[d] & value != 0 => jump = i.offset,
                0x56 | 0x46 => {}
                0x05 => jump = i.offset,
                0x95 => return r[0] != 0,
                other => panic!("unknown instruction {other:#x}"),
            }
            at += 1 + usize::try_from(jump).unwrap();
        }
    }

    /// What the rules mean: each letter is decided by the last rule that speaks of it.
    fn means(policy: &Policy, kind: Kind, major: u32, minor: u32, access: u8) -> bool {
        [MKNOD, READ, WRITE].iter().filter(|&bit| access & bit != 0).all(|bit| {
            policy
                .rules
                .iter()
                .rev()
                .find(|r| {
                    r.kind == kind
                        && r.access & bit != 0
                        && r.major.is_none_or(|n| n == major)
                        && r.minor.is_none_or(|n| n == minor)
                })
                .map_or(policy.allow, |r| r.allow)
        })
    }

    #[test]
    fn an_empty_list_is_not_all_devices() {
        let code = policy("[]").program();
        assert!(run(&code, Kind::Char, 1, 3, READ | WRITE));
        assert!(run(&code, Kind::Char, 136, 7, READ | WRITE));
        assert!(run(&code, Kind::Block, 8, 0, MKNOD));
        for (kind, major, minor) in [(Kind::Block, 8, 0), (Kind::Char, 1, 1), (Kind::Char, 10, 229)] {
            assert!(!run(&code, kind, major, minor, READ), "{major}:{minor}");
            assert!(!run(&code, kind, major, minor, WRITE), "{major}:{minor}");
        }
    }

    #[test]
    fn allowing_everything_allows_everything() {
        let policy = policy(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#);
        assert_eq!(policy, Policy { allow: true, rules: vec![] });
        assert!(run(&policy.program(), Kind::Block, 8, 0, ALL));
    }

    #[test]
    fn reading_is_not_writing() {
        let code = policy(r#"[{"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#).program();
        assert!(run(&code, Kind::Block, 8, 0, READ));
        assert!(!run(&code, Kind::Block, 8, 0, READ | WRITE));
        assert!(!run(&code, Kind::Block, 8, 1, READ));
    }

    #[test]
    fn a_device_can_be_denied_within_a_wider_rule() {
        let json = r#"[{"allow":true,"type":"c","major":10,"access":"rw"},
                       {"allow":false,"type":"c","major":10,"minor":229,"access":"rw"}]"#;
        let policy = policy(json);
        assert!(run(&policy.program(), Kind::Char, 10, 1, READ));
        assert!(!run(&policy.program(), Kind::Char, 10, 229, READ));
        assert_eq!(policy.beyond_v1().as_deref(), Some("c 10:229 rw"));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            r#"[{"allow":true,"type":"p"}]"#,
            r#"[{"allow":true,"type":"c","access":"x"}]"#,
            r#"[{"allow":true,"type":"c","major":-2}]"#,
            r#"[{"allow":true,"type":"c","minor":4294967296}]"#,
        ] {
            assert!(
                Policy::new(&serde_json::from_str::<Vec<spec::DeviceRule>>(bad).unwrap()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn v1_denies_all_first_and_then_allows() {
        let writes = policy("[]").v1("a *:* rwm\n");
        assert_eq!(writes[0], ("devices.deny", "a".to_owned()));
        assert_eq!(writes.len(), 12);
        assert!(writes.contains(&("devices.allow", "c 136:* rwm".to_owned())));
    }

    #[test]
    fn v1_updates_touch_only_what_changes() {
        let now: String = policy("[]").rules.iter().map(|r| line(r) + "\n").collect();
        assert!(policy("[]").v1(&now).is_empty());
        let more = policy(r#"[{"allow":true,"type":"b","major":8,"minor":0,"access":"rw"}]"#);
        assert_eq!(more.v1(&now), [("devices.allow", "b 8:0 rw".to_owned())]);
        let now = now + "b 8:0 rw\n";
        assert_eq!(policy("[]").v1(&now), [("devices.deny", "b 8:0 rw".to_owned())]);
        let less = policy(r#"[{"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#);
        assert_eq!(less.v1(&now), [("devices.deny", "b 8:0 w".to_owned())]);
    }

    fn any_rule() -> impl Strategy<Value = spec::DeviceRule> {
        let number = || prop_oneof![Just(None), (0..3i64).prop_map(Some), Just(Some(4_000_000_000))];
        (any::<bool>(), "[abc]", number(), number(), "r?w?m?").prop_map(
            |(allow, kind, major, minor, access)| spec::DeviceRule { allow, kind, major, minor, access },
        )
    }

    proptest! {
        #[test]
        fn the_program_does_what_the_rules_mean(rules in prop::collection::vec(any_rule(), 0..12)) {
            let policy = Policy::new(&rules).unwrap();
            let code = policy.program();
            for kind in [Kind::Block, Kind::Char] {
                for major in [0, 1, 2, 4_000_000_000] {
                    for minor in [0, 1, 2, 9] {
                        for access in 1..=ALL {
                            prop_assert_eq!(
                                run(&code, kind, major, minor, access),
                                means(&policy, kind, major, minor, access)
                            );
                        }
                    }
                }
            }
        }
    }
}
