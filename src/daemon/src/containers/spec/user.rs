//! Whom the first process runs as. Reads the bytes of an image's `/etc/passwd` and `/etc/group`, which the image
//! room fetched through the layers with a cap; decides uid, gid and groups and never looks at the host's files.

use cri_api::v1;

use super::Error;

/// The largest id that Kubernetes knows. Beyond it other programs wrapped around to root (CVE-2024-40635).
const MAX: i64 = i32::MAX as i64;
/// Lines of a user file that are looked at; what is longer was not made by a package manager.
const LINES: usize = 1_000_000;

/// What the client and the image say.
#[derive(Clone, Copy, Default)]
pub struct Wish<'a> {
    /// Security context of the container.
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub name: &'a str,
    pub groups: &'a [i64],
    pub strict: bool,
    /// USER of the image.
    pub image: &'a str,
    /// Contents of the image's files; empty when it has none.
    pub passwd: &'a [u8],
    pub group: &'a [u8],
}

/// Ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Sorted, without repetition, with the primary group among them: else a file that denies the group would not
    /// deny the process (CVE-2022-36109).
    pub groups: Vec<u32>,
    /// Home directory, for HOME.
    pub home: Option<String>,
}

impl User {
    /// Adds groups that devices need.
    pub fn join(&mut self, groups: &[u32]) {
        self.groups.extend(groups);
        self.groups.sort_unstable();
        self.groups.dedup();
    }

    /// As ContainerStatus reports it.
    pub fn to_cri(&self) -> v1::ContainerUser {
        v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: i64::from(self.uid),
                gid: i64::from(self.gid),
                supplemental_groups: self.groups.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }
    }
}

/// The ids that a wish means.
pub fn resolve(wish: &Wish<'_>) -> Result<User, Error> {
    if wish.uid.is_some() && !wish.name.is_empty() {
        return Err(Error::UserTwice);
    }
    if wish.gid.is_some() && wish.uid.is_none() && wish.name.is_empty() {
        return Err(Error::GroupWithoutUser);
    }
    let (who, image_group) = match (wish.uid, wish.name) {
        (Some(uid), _) => (Who::Id(id(uid)?), None),
        (None, "") => from_image(wish.image)?,
        // A client's name is a name even when it is all digits in no one's passwd: the CRI has a field for numbers.
        (None, name) => (who(name)?, None),
    };
    let entry = match who {
        Who::Id(uid) => lines(wish.passwd).filter_map(passwd).find(|entry| entry.uid == uid),
        Who::Name(name) => lines(wish.passwd).filter_map(passwd).find(|entry| entry.name == name.as_bytes()),
    };
    let uid = match (who, &entry) {
        (Who::Id(uid), _) => uid,
        (Who::Name(_), Some(entry)) => entry.uid,
        (Who::Name(name), None) => return Err(Error::UnknownUser(name.to_owned())),
    };
    let gid = match (wish.gid, image_group) {
        (Some(gid), _) => id(gid)?,
        (None, Some(Who::Id(gid))) => gid,
        (None, Some(Who::Name(name))) => lines(wish.group)
            .filter_map(group)
            .find(|group| group.name == name.as_bytes())
            .map(|group| group.gid)
            .ok_or_else(|| Error::UnknownGroup(name.to_owned()))?,
        (None, None) => entry.as_ref().map_or(0, |entry| entry.gid),
    };

    let mut groups = vec![gid];
    for listed in wish.groups {
        groups.push(id(*listed)?);
    }
    if let (false, Some(entry)) = (wish.strict, &entry) {
        groups
            .extend(lines(wish.group).filter_map(group).filter(|g| g.has(entry.name)).map(|group| group.gid));
    }
    groups.sort_unstable();
    groups.dedup();
    let home =
        entry.and_then(|entry| std::str::from_utf8(entry.home).ok()).filter(|home| home.starts_with('/'));
    Ok(User { uid, gid, groups, home: home.map(str::to_owned) })
}

/// What ImageStatus says of an image's USER: a number, or a name, never both; no USER means root.
/// A USER that no container could be made with is reported as a name, which no check for "not root" passes.
pub fn of_image(user: &str) -> (Option<i64>, String) {
    let user = user.split(':').next().unwrap_or_default();
    match who(user) {
        Ok(Who::Id(uid)) => (Some(i64::from(uid)), String::new()),
        _ if user.is_empty() => (Some(0), String::new()),
        _ => (None, user.to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who<'a> {
    Id(u32),
    Name(&'a str),
}

fn from_image(user: &str) -> Result<(Who<'_>, Option<Who<'_>>), Error> {
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let first = if user.is_empty() { Who::Id(0) } else { who(user)? };
    Ok((first, group.filter(|group| !group.is_empty()).map(who).transpose()?))
}

/// A number is never looked up as a name: a passwd with a user called `4294967296` would make it root
/// (CVE-2026-46680). What only looks like a number to a lenient parser is refused for the same reason.
fn who(text: &str) -> Result<Who<'_>, Error> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        let number = text.parse::<i64>().map_err(|_| Error::IdRange(text.to_owned()))?;
        return id(number).map(Who::Id);
    }
    let first_is_sign = text.starts_with(['+', '-']);
    let hex = text.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("0x"));
    if first_is_sign || hex || text.trim() != text || text.bytes().any(|b| b.is_ascii_control() || b == b':')
    {
        return Err(Error::UserName(text.escape_debug().to_string()));
    }
    Ok(Who::Name(text))
}

fn id(number: i64) -> Result<u32, Error> {
    if !(0..=MAX).contains(&number) {
        return Err(Error::IdRange(number.to_string()));
    }
    u32::try_from(number).map_err(|_| Error::IdRange(number.to_string()))
}

struct Passwd<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl Group<'_> {
    fn has(&self, user: &[u8]) -> bool {
        !user.is_empty() && self.members.split(|b| *b == b',').any(|member| member.trim_ascii() == user)
    }
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.starts_with(b"#")).take(LINES)
}

/// passwd(5): name, password, uid, gid, comment, home, shell. Lines that make no sense are passed over.
fn passwd(line: &[u8]) -> Option<Passwd<'_>> {
    let mut fields = line.split(|b| *b == b':');
    let (name, uid, gid) = (fields.next()?, fields.nth(1)?, fields.next()?);
    let home = fields.nth(1).unwrap_or_default();
    Some(Passwd { name, uid: number(uid)?, gid: number(gid)?, home })
}

/// group(5): name, password, gid, members.
fn group(line: &[u8]) -> Option<Group<'_>> {
    let mut fields = line.split(|b| *b == b':');
    let (name, gid) = (fields.next()?, fields.nth(1)?);
    Some(Group { name, gid: number(gid)?, members: fields.next().unwrap_or_default() })
}

fn number(digits: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
    id(text.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        www-data:x:33:34:www:/var/www:/usr/sbin/nologin\n\
        default-user:x:1000:1000::/home/default:/bin/sh\n\
        broken:x\n\
        wrapped:x:4294967296:0::/:\n\
        4294967296:x:0:0::/:\n\
        -1:x:0:0::/:\n\
        +0:x:0:0::/:\n\
        0x0:x:0:0::/:\n\
        2147483648:x:0:0::/:\n";
    const GROUP: &[u8] = b"root:x:0:\nwww-data:x:33:\n\
        staff:x:50:www-data,default-user\n\
        group-defined-in-image:x:50000:default-user\n\
        huge:x:4294967296:default-user\n";

    fn wish<'a>(image: &'a str) -> Wish<'a> {
        Wish { image, passwd: PASSWD, group: GROUP, ..Wish::default() }
    }

    fn ids(wish: &Wish<'_>) -> Result<(u32, u32, Vec<u32>), String> {
        resolve(wish).map(|user| (user.uid, user.gid, user.groups)).map_err(|e| e.to_string())
    }

    #[test]
    fn the_images_user_is_a_number_or_a_name_with_or_without_group() {
        for (user, expected) in [
            ("", (0, 0, vec![0])),
            ("0", (0, 0, vec![0])),
            ("00", (0, 0, vec![0])),
            ("root", (0, 0, vec![0])),
            ("1002", (1002, 0, vec![0])),
            ("33", (33, 34, vec![34, 50])),
            ("www-data", (33, 34, vec![34, 50])),
            ("1003:1004", (1003, 1004, vec![1004])),
            ("www-data:1004", (33, 1004, vec![50, 1004])),
            ("www-data:staff", (33, 50, vec![50])),
            ("1000", (1000, 1000, vec![50, 1000, 50000])),
            (":1004", (0, 1004, vec![1004])),
            ("www-data:", (33, 34, vec![34, 50])),
        ] {
            assert_eq!(ids(&wish(user)), Ok(expected), "{user}");
        }
    }

    #[test]
    fn a_number_is_never_a_name_and_never_wraps() {
        for user in [
            "2147483648",
            "4294967295",
            "4294967296",
            "-1",
            "+0",
            "0x0",
            "0X0",
            " 0",
            "0 ",
            "99999999999999999999",
            "1000:4294967296",
            "1000:-1",
            "nobody-here",
            "www-data:no-such-group",
            "wrapped",
            "a\nb",
        ] {
            assert!(resolve(&wish(user)).is_err(), "{user}");
        }
        for uid in [-1, 1 << 31, u32::MAX.into(), i64::MAX] {
            assert!(resolve(&Wish { uid: Some(uid), ..wish("") }).is_err(), "{uid}");
            assert!(resolve(&Wish { uid: Some(1), gid: Some(uid), ..wish("") }).is_err(), "{uid}");
            assert!(resolve(&Wish { groups: &[uid], ..wish("") }).is_err(), "{uid}");
        }
    }

    #[test]
    fn the_client_overrides_the_image() {
        for (wish, expected) in [
            (Wish { uid: Some(33), ..wish("1000:1000") }, (33, 34, vec![34, 50])),
            (Wish { uid: Some(4000), ..wish("1000:7") }, (4000, 0, vec![0])),
            (Wish { uid: Some(4000), gid: Some(5), ..wish("1000:7") }, (4000, 5, vec![5])),
            (Wish { name: "www-data", ..wish("1000:7") }, (33, 34, vec![34, 50])),
            (Wish { name: "www-data", gid: Some(9), ..wish("") }, (33, 9, vec![9, 50])),
        ] {
            assert_eq!(ids(&wish), Ok(expected));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(matches!(resolve(&Wish { uid: Some(1), name: "root", ..wish("") }), Err(Error::UserTwice)));
        assert!(matches!(resolve(&Wish { gid: Some(1), ..wish("1000") }), Err(Error::GroupWithoutUser)));
    }

    #[test]
    fn merge_takes_the_images_groups_and_strict_does_not() {
        let merge = Wish { groups: &[1234], ..wish("1000") };
        assert_eq!(ids(&merge).unwrap().2, [50, 1000, 1234, 50000]);
        assert_eq!(ids(&Wish { strict: true, ..merge }).unwrap().2, [1000, 1234]);
    }

    #[test]
    fn the_primary_group_is_always_among_the_groups() {
        for strict in [false, true] {
            for user in ["", "1000", "www-data:1004"] {
                let user = resolve(&Wish { strict, ..wish(user) }).unwrap();
                assert!(user.groups.contains(&user.gid));
            }
        }
    }

    #[test]
    fn home_comes_from_passwd_only() {
        assert_eq!(resolve(&wish("www-data")).unwrap().home.as_deref(), Some("/var/www"));
        assert_eq!(resolve(&wish("4711")).unwrap().home, None);
    }

    #[test]
    fn image_status_tells_a_uid_or_a_name_and_never_both() {
        for (user, expected) in [
            ("", (Some(0), "")),
            ("1002", (Some(1002), "")),
            ("1003:1004", (Some(1003), "")),
            ("www-data", (None, "www-data")),
            ("www-data:1004", (None, "www-data")),
            (":5", (Some(0), "")),
            ("4294967296", (None, "4294967296")),
            ("+0", (None, "+0")),
        ] {
            let (uid, name) = of_image(user);
            assert_eq!((uid, name.as_str()), expected, "{user}");
        }
    }

    #[test]
    fn ten_megabytes_of_groups_are_read_in_good_time() {
        let big = b"g:x:7:default-user\n".repeat(500_000);
        assert_eq!(ids(&Wish { group: &big, ..wish("1000") }).unwrap().2, [7, 1000]);
    }

    proptest! {
        #[test]
        fn s21_no_file_of_an_image_gives_an_id_that_is_none(
            passwd in "((a|1|0|-1|4294967296):x:(0|1|7|4294967295):(0|7|2147483648):::\n){0,4}",
            group in "((a|1|0):x:(0|7|4294967295):(a|1|0)?\n){0,4}",
            image in "(a|1|0|-1|4294967296)(:(a|1|7|4294967296))?",
        ) {
            let (passwd, group) = (passwd.as_bytes(), group.as_bytes());
            if let Ok(user) = resolve(&Wish { image: &image, passwd, group, ..Wish::default() }) {
                prop_assert!(user.groups.iter().chain([&user.uid]).all(|id| i64::from(*id) <= MAX));
                prop_assert!(user.groups.contains(&user.gid));
                // A number is that number, whatever the file says.
                if let Ok(uid) = image.split(':').next().unwrap_or_default().parse::<u32>() {
                    prop_assert_eq!(user.uid, uid);
                }
            }
        }

        #[test]
        fn any_bytes_end_in_an_answer(passwd in prop::collection::vec(any::<u8>(), 0..300), name in "[a-c]{0,2}") {
            let _ = resolve(&Wish { name: &name, passwd: &passwd, group: &passwd, ..Wish::default() });
        }
    }
}
