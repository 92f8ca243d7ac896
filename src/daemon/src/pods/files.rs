//! Files of a pod that its containers get bound in: resolv.conf and hostname.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use cri_api::v1;
use shim_api::rundir;

use super::{HOSTNAME, RESOLV_CONF};

/// Makes the run directory and what is in it. Blocking.
pub fn directory(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700);
    builder.create(dir)?;
    builder.create(dir.join(rundir::CONTAINERS))
}

/// Writes resolv.conf and hostname. Blocking.
pub fn write(dir: &Path, dns: Option<&v1::DnsConfig>, hostname: &str) -> io::Result<()> {
    let resolv = match dns {
        Some(dns) => resolv_conf(dns),
        None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    readable(&dir.join(RESOLV_CONF), resolv.as_bytes())?;
    readable(&dir.join(HOSTNAME), format!("{hostname}\n").as_bytes())
}

/// The kubelet makes a pod's log directory; other clients expect us to.
pub fn log_directory(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
}

/// Users of the container read it, whatever our umask is.
fn readable(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(0o644))
}

/// resolv.conf(5).
fn resolv_conf(dns: &v1::DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_holds_each_kind_of_line() {
        let dns = v1::DnsConfig {
            servers: vec!["10.10.10.10".into(), "fd00::1".into()],
            searches: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:8".into()],
        };
        let text =
            "search a.example b.example\nnameserver 10.10.10.10\nnameserver fd00::1\noptions ndots:8\n";
        assert_eq!(resolv_conf(&dns), text);
        assert_eq!(resolv_conf(&v1::DnsConfig::default()), "");
    }

    #[test]
    fn files_are_readable_by_the_containers_users_and_the_directory_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        directory(&pod).unwrap();
        write(&pod, None, "web-0").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (mode(&pod), mode(&pod.join(HOSTNAME)), mode(&pod.join(RESOLV_CONF))),
            (0o700, 0o644, 0o644)
        );
        assert_eq!(fs::read_to_string(pod.join(HOSTNAME)).unwrap(), "web-0\n");
    }
}
