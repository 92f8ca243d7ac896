//! Which signal asks a container to stop. Knows three spellings: the numbers of the CRI enum, names as images write
//! them, and Linux's numbers, which is what comes out. Sending it is left to the shim.

use cri_api::v1;

/// What is sent when neither the client nor the image names a signal.
pub const DEFAULT: i32 = libc::SIGTERM;

/// First and last real-time signal as programs see them: glibc keeps 32 and 33 to itself (signal(7)).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Names without SIG in front, the usual one of each number first.
const NAMES: [(&str, i32); 34] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGABRT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGIO),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
];

/// The signal that stops a container: the client's wish, else the image's, else TERM. An image that names no signal
/// of this system is treated as one that names none: its author is not the one who could be told.
pub fn stop(wanted: i32, image: Option<&str>) -> Option<i32> {
    match from_cri(wanted)? {
        0 => Some(image.and_then(from_name).unwrap_or(DEFAULT)),
        number => Some(number),
    }
}

/// Linux's number of a CRI signal; 0 for the one that says "not given", nothing for a number that is none.
pub fn from_cri(wanted: i32) -> Option<i32> {
    match wanted {
        0 => Some(0),
        // The enum lists the named signals in alphabetical order, as the table does.
        1..=34 => NAMES.get(usize::try_from(wanted - 1).ok()?).map(|(_, number)| *number),
        35..=50 => Some(RTMIN + wanted - 35),
        51..=65 => Some(RTMAX - (65 - wanted)),
        _ => None,
    }
}

/// The CRI signal that stands for a number of Linux.
pub fn to_cri(number: i32) -> v1::Signal {
    let wanted = match number {
        RTMIN..=49 => 35 + number - RTMIN,
        50..=RTMAX => 65 - (RTMAX - number),
        _ => NAMES.iter().zip(1..).find(|((_, n), _)| *n == number).map_or(0, |(_, at)| at),
    };
    v1::Signal::try_from(wanted).unwrap_or(v1::Signal::RuntimeDefault)
}

/// A signal as an image writes it: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
pub fn from_name(name: &str) -> Option<i32> {
    let name = name.trim().to_ascii_uppercase();
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return real_time(rest, '+').map(|n| RTMIN + n).filter(|n| *n <= RTMAX);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return real_time(rest, '-').map(|n| RTMAX - n).filter(|n| *n >= RTMIN);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

fn real_time(rest: &str, sign: char) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    let digits = rest.strip_prefix(sign)?;
    digits.parse::<u8>().ok().filter(|n| *n <= 30).map(i32::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_the_enum_is_the_signal_of_its_name() {
        for wanted in 1..=65 {
            let name = v1::Signal::try_from(wanted).unwrap().as_str_name();
            let name = name.strip_prefix("SIGNAL_").unwrap();
            let name = name.replace("PLUS", "+").replace("MINUS", "-");
            assert_eq!(from_cri(wanted), from_name(&name), "{name}");
            assert!(from_cri(wanted).is_some(), "{name}");
        }
        assert_eq!(from_cri(66), None);
        assert_eq!(from_cri(-1), None);
    }

    #[test]
    fn a_number_comes_back_from_the_enum() {
        for number in (1..=31).chain(34..=64) {
            if number == libc::SIGSTKFLT || from_cri(to_cri(number) as i32) == Some(number) {
                continue;
            }
            panic!("signal {number} became {:?}", to_cri(number));
        }
    }

    #[test]
    fn the_image_is_asked_when_the_client_is_silent() {
        for (wanted, image, expected) in [
            (0, None, Some(libc::SIGTERM)),
            (0, Some("SIGQUIT"), Some(libc::SIGQUIT)),
            (0, Some("quit"), Some(libc::SIGQUIT)),
            (0, Some("3"), Some(3)),
            (0, Some("SIGRTMIN+3"), Some(37)),
            (0, Some("RTMAX-2"), Some(62)),
            (0, Some("nonsense"), Some(libc::SIGTERM)),
            (0, Some("0"), Some(libc::SIGTERM)),
            (0, Some("65"), Some(libc::SIGTERM)),
            (0, Some("SIGRTMIN+31"), Some(libc::SIGTERM)),
            (0, Some("SIGRTMIN3"), Some(libc::SIGTERM)),
            (29, Some("SIGQUIT"), Some(libc::SIGUSR1)),
            (66, None, None),
        ] {
            assert_eq!(stop(wanted, image), expected, "{wanted} {image:?}");
        }
    }
}
