//! Which seccomp profile a container gets: none, ours, or one from a file of the node. Reads the file format that the
//! OCI specification and its older relatives use, with bounds; the result is `linux.seccomp` of the OCI spec.

use std::path::{Path, PathBuf};

use cri_api::v1::{SecurityProfile, security_profile::ProfileType};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Error, capability::Sets, seccomp_default as data};

/// Largest profile file and the most rules that are read from it.
pub const FILE_LIMIT: u64 = 1 << 20;
const RULES: usize = 4096;

/// What a container shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    Unconfined,
    Default,
    File(PathBuf),
}

/// Decides between the profile, the older text that says the same, and the setting for those who say nothing.
pub fn choose(
    profile: Option<&SecurityProfile>,
    text: &str,
    unset: &str,
    privileged: bool,
) -> Result<Choice, Error> {
    if privileged {
        return Ok(Choice::Unconfined);
    }
    let Some(profile) = profile else {
        return from_text(if text.is_empty() { unset } else { text });
    };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::RuntimeDefault) => Ok(Choice::Default),
        Ok(ProfileType::Unconfined) => Ok(Choice::Unconfined),
        Ok(ProfileType::Localhost) => file(&profile.localhost_ref),
        Err(_) => Err(Error::ProfileType(profile.profile_type)),
    }
}

fn from_text(text: &str) -> Result<Choice, Error> {
    match text {
        "" | "unconfined" => Ok(Choice::Unconfined),
        "runtime/default" | "docker/default" => Ok(Choice::Default),
        _ => match text.strip_prefix("localhost/") {
            Some(_) => file(text),
            None => Err(Error::SeccompText(text.escape_debug().to_string())),
        },
    }
}

/// Localhost without a name must not become "no profile" (CVE-2023-2431).
fn file(reference: &str) -> Result<Choice, Error> {
    let path = reference.strip_prefix("localhost/").unwrap_or(reference);
    let absolute = path.starts_with('/') && !path.contains('\0');
    if !absolute || Path::new(path).components().any(|part| part == std::path::Component::ParentDir) {
        return Err(Error::SeccompPath(reference.escape_debug().to_string()));
    }
    Ok(Choice::File(path.into()))
}

/// Our own profile for a process with these capabilities.
pub fn default_profile(capabilities: &Sets) -> Value {
    let allow = |names: &[&str]| json!({"names": names, "action": "SCMP_ACT_ALLOW"});
    let arch = std::env::consts::ARCH;
    let mut rules = vec![allow(data::ALWAYS)];
    rules.extend(data::ON_ARCH.iter().filter(|(name, _)| *name == arch).map(|(_, names)| allow(names)));
    rules.extend(data::PERSONALITIES.iter().map(|value| {
        json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
    }));
    rules.extend(data::FAMILIES.iter().map(|(mask, value)| {
        json!({"names": ["socket"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}]})
    }));
    let held = data::WITH_CAPABILITY.iter().filter(|(name, _)| capabilities.has(name));
    rules.extend(held.map(|(_, names)| allow(names)));
    if !capabilities.has("SYS_ADMIN") {
        // s390 takes the flags of clone second (clone(2)).
        let index = if arch == "s390x" { 1 } else { 0 };
        rules.push(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": index, "value": data::NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}));
        // A filter cannot look into the structure that clone3 takes. ENOSYS makes libc fall back to clone.
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "architectures": architectures(arch),
        "syscalls": rules,
    })
}

fn architectures(arch: &str) -> &'static [&'static str] {
    match arch {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        "s390x" => &["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
        "powerpc64" if cfg!(target_endian = "little") => &["SCMP_ARCH_PPC64LE"],
        _ => &[],
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: String,
    #[serde(alias = "defaultErrno")]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    arch_map: Vec<Architectures>,
    #[serde(default)]
    flags: Vec<String>,
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

/// Docker's way to name architectures.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Architectures {
    architecture: String,
    #[serde(default)]
    sub_architectures: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    name: Option<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Arg>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
}

impl Condition {
    fn caps_held(&self, held: &Sets) -> impl Iterator<Item = bool> {
        self.caps.iter().map(|name| held.has(name.strip_prefix("CAP_").unwrap_or(name)))
    }

    fn arch(&self) -> bool {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        self.arches.iter().any(|name| name == arch)
    }
}

const ACTIONS: [&str; 8] = [
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_LOG",
    "SCMP_ACT_ALLOW",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
const FLAGS: [&str; 3] =
    ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];

/// The profile in a file's bytes, brought into the OCI form.
pub fn parse(path: &Path, bytes: &[u8], capabilities: &Sets) -> Result<Value, Error> {
    let bad = |why: String| Error::SeccompFile { path: path.to_owned(), why };
    let file: File = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if file.listener_path.is_some_and(|path| !path.is_empty()) {
        return Err(bad("listenerPath is not offered".into()));
    }
    let known = |list: &[&str], name: &str| match list.contains(&name) {
        true => Ok(()),
        false => Err(bad(format!("{:?} is not known", name.chars().take(80).collect::<String>()))),
    };
    known(&ACTIONS, &file.default_action)?;
    for flag in &file.flags {
        known(&FLAGS, flag)?;
    }
    let mut architectures = file.architectures;
    let native = self::architectures(std::env::consts::ARCH).first().copied().unwrap_or_default();
    for entry in file.arch_map.into_iter().filter(|entry| entry.architecture == native) {
        architectures.push(entry.architecture);
        architectures.extend(entry.sub_architectures);
    }
    if let Some(name) = architectures.iter().find(|name| name.len() > 40 || !name.starts_with("SCMP_ARCH_")) {
        return Err(bad(format!("{:?} is not known", name.chars().take(80).collect::<String>())));
    }
    let rules = file.syscalls.unwrap_or_default();
    if rules.len() > RULES {
        return Err(bad(format!("more than {RULES} rules")));
    }
    let mut syscalls = Vec::with_capacity(rules.len());
    for rule in rules {
        known(&ACTIONS, &rule.action)?;
        let includes = rule.includes.unwrap_or_default();
        let excludes = rule.excludes.unwrap_or_default();
        let wanted = includes.caps_held(capabilities).all(|held| held)
            && !excludes.caps_held(capabilities).any(|held| held)
            && (includes.arches.is_empty() || includes.arch())
            && !excludes.arch();
        let names: Vec<String> = rule.names.into_iter().chain(rule.name).collect();
        if names.iter().any(|name| name.is_empty() || name.len() > 64) {
            return Err(bad("a rule has an empty or overlong name".into()));
        }
        let args = rule.args.unwrap_or_default();
        for arg in &args {
            known(&OPERATORS, &arg.op)?;
            if arg.index > 5 {
                return Err(bad(format!("argument {} of a system call", arg.index)));
            }
        }
        if !wanted || names.is_empty() {
            continue;
        }
        let mut entry = json!({"names": names, "action": rule.action});
        if let Some(errno) = rule.errno_ret {
            entry["errnoRet"] = errno.into();
        }
        if !args.is_empty() {
            entry["args"] = json!(args);
        }
        syscalls.push(entry);
    }
    let mut profile = json!({"defaultAction": file.default_action, "syscalls": syscalls});
    if let Some(errno) = file.default_errno_ret {
        profile["defaultErrnoRet"] = errno.into();
    }
    if !architectures.is_empty() {
        profile["architectures"] = json!(architectures);
    }
    if !file.flags.is_empty() {
        profile["flags"] = json!(file.flags);
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(kind: ProfileType, reference: &str) -> SecurityProfile {
        SecurityProfile { profile_type: kind as i32, localhost_ref: reference.to_owned() }
    }

    fn sets(names: &[&str]) -> Sets {
        Sets { bounding: names.iter().map(|name| format!("CAP_{name}")).collect(), ambient: vec![] }
    }

    fn parsed(text: &str) -> Result<Value, Error> {
        parse(Path::new("/p.json"), text.as_bytes(), &sets(&["CHOWN"]))
    }

    /// What a profile answers to a call: the first rule that fits, as the compiler has it.
    fn verdict(profile: &Value, name: &str, args: &[u64]) -> String {
        for rule in profile["syscalls"].as_array().unwrap() {
            let named = rule["names"].as_array().unwrap().iter().any(|n| n == name);
            let empty = vec![];
            let fits = rule["args"].as_array().unwrap_or(&empty).iter().all(|arg| {
                let have = args[arg["index"].as_u64().unwrap() as usize];
                let (value, two) = (arg["value"].as_u64().unwrap(), arg["valueTwo"].as_u64().unwrap_or(0));
                match arg["op"].as_str().unwrap() {
                    "SCMP_CMP_EQ" => have == value,
                    "SCMP_CMP_MASKED_EQ" => have & value == two,
                    other => panic!("{other}"),
                }
            });
            if named && fits {
                return format!("{} {}", rule["action"].as_str().unwrap(), rule["errnoRet"]);
            }
        }
        "denied".into()
    }

    const ALLOWED: &str = "SCMP_ACT_ALLOW null";

    #[test]
    fn the_new_field_wins_over_the_text_and_privileged_over_both() {
        let file = |path: &str| Choice::File(path.into());
        let default = profile(ProfileType::RuntimeDefault, "");
        let unconfined = profile(ProfileType::Unconfined, "");
        let local = profile(ProfileType::Localhost, "/p.json");
        for (new, text, unset, privileged, expected) in [
            (None, "", "", false, Choice::Unconfined),
            (None, "", "runtime/default", false, Choice::Default),
            (None, "unconfined", "runtime/default", false, Choice::Unconfined),
            (None, "runtime/default", "", false, Choice::Default),
            (None, "docker/default", "", false, Choice::Default),
            (None, "localhost//p.json", "", false, file("/p.json")),
            (Some(&default), "unconfined", "", false, Choice::Default),
            (Some(&unconfined), "runtime/default", "", false, Choice::Unconfined),
            (Some(&local), "", "", false, file("/p.json")),
            (Some(&local), "", "", true, Choice::Unconfined),
            (Some(&default), "", "", true, Choice::Unconfined),
        ] {
            assert_eq!(choose(new, text, unset, privileged).unwrap(), expected, "{new:?} {text}");
        }
    }

    #[test]
    fn localhost_never_means_unconfined() {
        for reference in ["", "relative.json", "localhost/relative", "/a/../b", "/a\0b", "localhost/"] {
            let wanted = profile(ProfileType::Localhost, reference);
            assert!(choose(Some(&wanted), "", "", false).is_err(), "{reference:?}");
        }
        for text in ["localhost/", "localhost/x", "default", "/p.json"] {
            assert!(choose(None, text, "", false).is_err(), "{text:?}");
        }
        let strange = SecurityProfile { profile_type: 7, localhost_ref: String::new() };
        assert!(choose(Some(&strange), "", "", false).is_err());
    }

    #[test]
    fn the_default_profile_denies_what_it_should() {
        let plain = default_profile(&sets(&[]));
        for (name, args, expected) in [
            ("read", [0u64; 3], ALLOWED),
            ("socket", [2, 1, 0], ALLOWED),
            ("socket", [10, 1, 0], ALLOWED),
            ("socket", [16, 3, 0], ALLOWED),
            ("socket", [38, 5, 0], "denied"),
            ("socket", [40, 1, 0], "denied"),
            ("socket", [0x1_0000_0026, 5, 0], "denied"),
            ("socket", [39, 1, 0], ALLOWED),
            ("socket", [44, 1, 0], ALLOWED),
            ("socket", [99, 1, 0], "denied"),
            ("socketcall", [1, 0, 0], "denied"),
            ("io_uring_setup", [0; 3], "denied"),
            ("io_uring_enter", [0; 3], "denied"),
            ("keyctl", [0; 3], "denied"),
            ("add_key", [0; 3], "denied"),
            ("userfaultfd", [0; 3], "denied"),
            ("kexec_load", [0; 3], "denied"),
            ("mount", [0; 3], "denied"),
            ("unshare", [0; 3], "denied"),
            ("setns", [0; 3], "denied"),
            ("bpf", [0; 3], "denied"),
            ("chroot", [0; 3], "denied"),
            ("clone", [libc::CLONE_VM as u64 | 17, 0, 0], ALLOWED),
            ("clone", [libc::CLONE_NEWUSER as u64, 0, 0], "denied"),
            ("clone", [libc::CLONE_NEWNS as u64 | 17, 0, 0], "denied"),
            ("clone3", [0; 3], "SCMP_ACT_ERRNO 38"),
            ("personality", [0, 0, 0], ALLOWED),
            ("personality", [8, 0, 0], ALLOWED),
            ("personality", [0x4_0000, 0, 0], "denied"),
        ] {
            assert_eq!(verdict(&plain, name, &args), expected, "{name} {args:?}");
        }
        for family in (0..38).chain([39]).chain(41..48) {
            assert_eq!(verdict(&plain, "socket", &[family, 0, 0]), ALLOWED, "{family}");
        }
    }

    #[test]
    fn capabilities_open_what_they_stand_for() {
        for (capability, name) in [
            ("SYS_ADMIN", "mount"),
            ("SYS_ADMIN", "clone3"),
            ("SYS_ADMIN", "unshare"),
            ("SYS_CHROOT", "chroot"),
            ("SYS_PTRACE", "kcmp"),
            ("SYS_BOOT", "reboot"),
            ("SYSLOG", "syslog"),
            ("SYS_TIME", "clock_settime"),
        ] {
            let with = default_profile(&sets(&[capability]));
            assert_eq!(verdict(&with, name, &[0; 6]), ALLOWED, "{capability}");
            assert_ne!(verdict(&default_profile(&sets(&[])), name, &[0; 6]), ALLOWED, "{name}");
        }
        let admin = default_profile(&sets(&["SYS_ADMIN"]));
        assert_eq!(verdict(&admin, "clone", &[libc::CLONE_NEWUSER as u64, 0]), ALLOWED);
    }

    #[test]
    fn no_name_is_listed_twice() {
        let mut names = data::ALWAYS.to_vec();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_oci_library_reads_the_default_profile() {
        let value = default_profile(&sets(&["SYS_ADMIN"]));
        let read: oci_spec::runtime::LinuxSeccomp = serde_json::from_value(value).unwrap();
        assert_eq!(read.default_errno_ret(), Some(1));
        assert!(!read.syscalls().as_ref().unwrap().is_empty());
    }

    #[test]
    fn profiles_of_all_three_shapes_are_read() {
        let oci = r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"},
                {"names":["chmod"],"action":"SCMP_ACT_ERRNO","errnoRet":5,
                 "args":[{"index":1,"value":511,"op":"SCMP_CMP_EQ"}]}]}"#;
        let value = parsed(oci).unwrap();
        assert_eq!(value["architectures"][0], "SCMP_ARCH_X86_64");
        assert_eq!(value["syscalls"][1]["errnoRet"], 5);
        let old =
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"chmod","action":"SCMP_ACT_ERRNO"}]}"#;
        assert_eq!(parsed(old).unwrap()["syscalls"][0]["names"][0], "chmod");
        let docker = r#"{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64",
            "subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[
            {"names":["chown"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_CHOWN"]}},
            {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_CHOWN"]}}]}"#;
        assert_eq!(parsed(docker).unwrap()["syscalls"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn damaged_profiles_are_errors() {
        for text in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"defaultAction":"SCMP_ACT_NONSENSE"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["X"]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["x86"]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"NO"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[""],"action":"SCMP_ACT_ALLOW"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":0,"value":0,"op":"=="}]}]}"#,
        ] {
            assert!(matches!(parsed(text), Err(Error::SeccompFile { .. })), "{text}");
        }
        let many = r#"{"names":["a"],"action":"SCMP_ACT_ALLOW"},"#.repeat(RULES + 1);
        let many =
            format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{}]}}"#, many.trim_end_matches(','));
        assert!(parsed(&many).is_err());
    }
}
