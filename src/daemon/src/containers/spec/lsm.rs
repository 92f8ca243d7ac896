//! Which AppArmor profile and which SELinux label a container gets. Loading profiles is the administrator's, writing
//! labels the container room's work.

use cri_api::v1::{SeLinuxOption, SecurityProfile, security_profile::ProfileType};

use super::Error;

/// Profile that RuntimeDefault means, when it is loaded.
pub const DEFAULT_PROFILE: &str = "crisp-default";

/// What is known of AppArmor on this host.
pub struct AppArmor<'a> {
    pub on: bool,
    /// Tells whether a profile is loaded.
    pub loaded: &'a dyn Fn(&str) -> bool,
    /// Profile of RuntimeDefault.
    pub default: &'a str,
}

/// Decides between the profile and the older text that says the same. None is unconfined.
pub fn apparmor(
    profile: Option<&SecurityProfile>,
    text: &str,
    privileged: bool,
    host: &AppArmor<'_>,
) -> Result<Option<String>, Error> {
    enum Choice<'a> {
        Default,
        Unconfined,
        Named(&'a str),
    }
    let choice = match profile {
        Some(profile) => match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Choice::Default,
            Ok(ProfileType::Unconfined) => Choice::Unconfined,
            Ok(ProfileType::Localhost) => {
                let name = &profile.localhost_ref;
                Choice::Named(name.strip_prefix("localhost/").unwrap_or(name))
            }
            Err(_) => return Err(Error::ProfileType(profile.profile_type)),
        },
        None => match text {
            "" | "runtime/default" => Choice::Default,
            "unconfined" => Choice::Unconfined,
            _ => match text.strip_prefix("localhost/") {
                Some(name) => Choice::Named(name),
                None => return Err(Error::AppArmorText(text.escape_debug().to_string())),
            },
        },
    };
    match choice {
        Choice::Unconfined => Ok(None),
        // A host without AppArmor cannot confine and was not asked for a profile of the user's.
        Choice::Default if privileged || !host.on => Ok(None),
        Choice::Default => Ok((host.loaded)(host.default).then(|| host.default.to_owned())),
        Choice::Named("") => Err(Error::AppArmorText("localhost/".to_owned())),
        Choice::Named(_) if !host.on => Err(Error::AppArmorOff),
        Choice::Named("unconfined") => Ok(None),
        Choice::Named(name) if (host.loaded)(name) => Ok(Some(name.to_owned())),
        Choice::Named(name) => Err(Error::AppArmorNotLoaded(name.escape_debug().to_string())),
    }
}

/// Whether a profile is in the kernel's list: lines of `name (mode)`.
pub fn is_loaded(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(known, _)| known == name))
}

/// Labels of a process and of the files that it may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    pub process: String,
    pub mount: String,
}

/// Decides the labels. The categories of pods that name no level come from the pod's id: all containers of a pod
/// share them, two pods seldom do.
pub fn selinux(
    wanted: Option<&SeLinuxOption>,
    privileged: bool,
    on: bool,
    pod_id: &str,
) -> Result<Option<Labels>, Error> {
    if !on {
        return Ok(None);
    }
    let empty = SeLinuxOption::default();
    let wanted = wanted.unwrap_or(&empty);
    if privileged && wanted.r#type.is_empty() {
        return Ok(None);
    }
    for part in [&wanted.user, &wanted.role, &wanted.r#type] {
        if part.len() > 255 || part.bytes().any(|b| !(b.is_ascii_alphanumeric() || b"_.-".contains(&b))) {
            return Err(Error::SelinuxLabel(part.escape_debug().take(80).collect()));
        }
    }
    if !level_is_sane(&wanted.level) {
        return Err(Error::SelinuxLabel(wanted.level.escape_debug().take(80).collect()));
    }
    let or = |part: &str, default: &str| if part.is_empty() { default.to_owned() } else { part.to_owned() };
    let user = or(&wanted.user, "system_u");
    let level = if wanted.level.is_empty() { categories(pod_id) } else { wanted.level.clone() };
    let process =
        format!("{user}:{}:{}:{level}", or(&wanted.role, "system_r"), or(&wanted.r#type, "container_t"));
    let mount = format!("{user}:object_r:container_file_t:{level}");
    Ok(Some(Labels { process, mount }))
}

/// `s0`, `s0:c1,c2`, `s0-s1:c0.c1023`.
fn level_is_sane(level: &str) -> bool {
    level.len() <= 255
        && (level.is_empty() || level.starts_with('s'))
        && level.bytes().all(|b| b.is_ascii_digit() || b"sc:,.-".contains(&b))
}

fn categories(pod_id: &str) -> String {
    // FNV-1a, to spread ids that clients may have chosen alike.
    let hash = pod_id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let (one, two) = (hash % 1024, hash / 1024 % 1023);
    let two = if two >= one { two + 1 } else { two };
    format!("s0:c{},c{}", one.min(two), one.max(two))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(kind: ProfileType, name: &str) -> Option<SecurityProfile> {
        Some(SecurityProfile { profile_type: kind as i32, localhost_ref: name.to_owned() })
    }

    const LIST: &str = "crisp-default (enforce)\nmy profile (complain)\n/usr/sbin/x (enforce)\n";

    #[test]
    fn the_profile_is_the_one_asked_for_or_an_error() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let default = Some("crisp-default");
        for (new, text, privileged, on, expected) in [
            (None, "", false, true, Ok(default)),
            (None, "", false, false, Ok(None)),
            (None, "", true, true, Ok(None)),
            (None, "runtime/default", false, true, Ok(default)),
            (None, "unconfined", false, true, Ok(None)),
            (None, "localhost/my profile", false, true, Ok(Some("my profile"))),
            (None, "localhost/none", false, true, Err(())),
            (None, "localhost/", false, true, Err(())),
            (None, "nonsense", false, true, Err(())),
            (None, "localhost/my profile", false, false, Err(())),
            (profile(RuntimeDefault, ""), "unconfined", false, true, Ok(default)),
            (profile(RuntimeDefault, ""), "", false, false, Ok(None)),
            (profile(RuntimeDefault, ""), "", true, true, Ok(None)),
            (profile(Unconfined, ""), "localhost/none", false, true, Ok(None)),
            (profile(Localhost, "/usr/sbin/x"), "", false, true, Ok(Some("/usr/sbin/x"))),
            (profile(Localhost, "localhost//usr/sbin/x"), "", false, true, Ok(Some("/usr/sbin/x"))),
            (profile(Localhost, "none"), "", false, true, Err(())),
            (profile(Localhost, ""), "", false, true, Err(())),
            (profile(Localhost, ""), "", true, true, Err(())),
            (profile(Localhost, "my profile"), "", false, false, Err(())),
        ] {
            let host = AppArmor { on, loaded: &|name| is_loaded(LIST, name), default: DEFAULT_PROFILE };
            let got = apparmor(new.as_ref(), text, privileged, &host).map_err(|_| ());
            assert_eq!(
                got.as_ref().map(Option::as_deref),
                expected.as_ref().map(|e| *e),
                "{new:?} {text} {on}"
            );
        }
    }

    #[test]
    fn labels_are_filled_in_and_checked() {
        let label = |user: &str, role: &str, kind: &str, level: &str| SeLinuxOption {
            user: user.into(),
            role: role.into(),
            r#type: kind.into(),
            level: level.into(),
        };
        let full = selinux(Some(&label("u", "r", "t", "s0:c1,c2")), false, true, "p").unwrap().unwrap();
        assert_eq!(full.process, "u:r:t:s0:c1,c2");
        assert_eq!(full.mount, "u:object_r:container_file_t:s0:c1,c2");
        let own = selinux(None, false, true, "pod-a").unwrap().unwrap();
        assert!(own.process.starts_with("system_u:system_r:container_t:s0:c"), "{own:?}");
        assert_ne!(own, selinux(None, false, true, "pod-b").unwrap().unwrap());
        for bad in [
            label("a:b", "", "", ""),
            label("", "", "t t", ""),
            label("", "", "", "high"),
            label("", "\n", "", ""),
        ] {
            assert!(selinux(Some(&bad), false, true, "p").is_err(), "{bad:?}");
            assert_eq!(selinux(Some(&bad), false, false, "p").unwrap(), None);
        }
        assert_eq!(selinux(None, true, true, "p").unwrap(), None);
    }
}
