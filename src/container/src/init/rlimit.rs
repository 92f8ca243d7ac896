//! Resource limits of a process (getrlimit(2)). A hard limit that only CAP_SYS_RESOURCE could raise is left where
//! it is, and the caller is told.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{At, Error, Failure, Step};
use crate::spec;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    name: String,
    resource: Resource,
    soft: u64,
    hard: u64,
}

impl Limit {
    pub(crate) fn all(wanted: &[spec::Rlimit]) -> Result<Vec<Limit>, Error> {
        let mut limits: Vec<Limit> = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let resource = resource(&wanted.kind)
                .ok_or_else(|| Error::Invalid(format!("rlimit {:?} does not exist", wanted.kind)))?;
            if wanted.soft > wanted.hard {
                return Err(Error::Invalid(format!("rlimit {}: soft above hard", wanted.kind)));
            }
            if limits.iter().any(|limit| limit.resource == resource) {
                return Err(Error::Invalid(format!("rlimit {} is given twice", wanted.kind)));
            }
            limits.push(Limit { name: wanted.kind.clone(), resource, soft: wanted.soft, hard: wanted.hard });
        }
        Ok(limits)
    }

    /// Sets it, or as much of it as we may and says so.
    pub(crate) fn set(&self) -> Result<Option<String>, Failure> {
        let wanted = Rlimit { current: finite(self.soft), maximum: finite(self.hard) };
        match setrlimit(self.resource, wanted) {
            Err(Errno::PERM) => {}
            other => return other.at(Step::Rlimit, &self.name).map(|()| None),
        }
        let possible = getrlimit(self.resource).maximum;
        let most = possible.unwrap_or(u64::MAX).min(self.hard);
        let clamped = Rlimit { current: finite(self.soft.min(most)), maximum: finite(most) };
        setrlimit(self.resource, clamped).at(Step::Rlimit, &self.name)?;
        Ok(Some(format!("{} is {most} in place of {}: CAP_SYS_RESOURCE is missing", self.name, self.hard)))
    }
}

/// The specification writes "no limit" as the largest number.
fn finite(limit: u64) -> Option<u64> {
    (limit != u64::MAX).then_some(limit)
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(kind: &str, soft: u64, hard: u64) -> spec::Rlimit {
        spec::Rlimit { kind: kind.into(), soft, hard }
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        assert!(Limit::all(&[limit("RLIMIT_NOFILE", 1, 2)]).is_ok());
        assert!(Limit::all(&[limit("RLIMIT_NOFILE", 3, 2)]).is_err());
        assert!(Limit::all(&[limit("NOFILE", 1, 2)]).is_err());
        assert!(Limit::all(&[limit("RLIMIT_AS", 1, 2), limit("RLIMIT_AS", 1, 2)]).is_err());
    }
}
