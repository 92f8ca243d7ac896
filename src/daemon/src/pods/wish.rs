//! What a client may ask of a pod. Checks a request once, at the door, and makes of it what the steps of a pod's
//! creation take. Touches nothing.

use std::net::IpAddr;

use cri_api::v1::{self, NamespaceMode};
use network::{Bandwidth, Dns, PortMapping, Protocol};

use super::sysctl;
use crate::{
    config::Config,
    error::{Fault, Result},
    shim::PodOptions,
};

/// A request that can be honoured.
pub struct Wish {
    pub config: v1::PodSandboxConfig,
    /// As asked; empty means the default.
    pub handler: String,
    pub hostname: String,
    pub options: PodOptions,
    pub ports: Vec<PortMapping>,
    pub bandwidth: Option<Bandwidth>,
    /// The pod has a network of its own, not the host's.
    pub network: bool,
}

/// Size of the /dev/shm that a pod's containers share: 64 MiB, as everywhere.
const SHM: i64 = 64 << 20;
/// The shim goes last when memory runs out, but before the daemon.
const OOM_SCORE: i32 = -998;

impl Wish {
    pub fn check(config: &Config, host: &str, request: v1::RunPodSandboxRequest) -> Result<Wish> {
        let pod = request.config.ok_or_else(|| Fault::invalid("config is missing"))?;
        let metadata = pod.metadata.as_ref().ok_or_else(|| Fault::invalid("config.metadata is missing"))?;
        for (field, value) in
            [("name", &metadata.name), ("namespace", &metadata.namespace), ("uid", &metadata.uid)]
        {
            if value.is_empty() {
                return Err(Fault::invalid(format!("config.metadata.{field} is missing")));
            }
        }
        let handler = request.runtime_handler;
        if config.handler(&handler).is_none() {
            return Err(Fault::invalid(format!("runtime handler {handler:?} is not configured")));
        }

        let linux = pod.linux.clone().unwrap_or_default();
        check_cgroup(&linux.cgroup_parent)?;
        let security = linux.security_context.unwrap_or_default();
        if security.run_as_group.is_some() && security.run_as_user.is_none() {
            return Err(Fault::invalid("run_as_group needs run_as_user"));
        }
        let namespaces = security.namespace_options.unwrap_or_default();
        let (uid_mappings, gid_mappings) = mappings(namespaces.userns_options.as_ref())?;
        let network = match mode(namespaces.network, "network")? {
            NamespaceMode::Pod => true,
            NamespaceMode::Node => false,
            other => return Err(unfit("network", other)),
        };
        let ipc = match mode(namespaces.ipc, "ipc")? {
            NamespaceMode::Pod => true,
            NamespaceMode::Node => false,
            other => return Err(unfit("ipc", other)),
        };
        let pid = match mode(namespaces.pid, "pid")? {
            NamespaceMode::Target => return Err(unfit("pid", NamespaceMode::Target)),
            mode => mode == NamespaceMode::Pod,
        };
        let own = sysctl::Own { network, ipc, uts: network, user: !uid_mappings.is_empty() };
        let sysctls = sysctl::settings(config, &linux.sysctls, own).map_err(Fault::invalid)?;
        check_dns(pod.dns_config.as_ref())?;
        check_log_directory(&pod.log_directory)?;

        let hostname = if pod.hostname.is_empty() || !network { host } else { &pod.hostname }.to_string();
        check_hostname(&hostname)?;
        let note =
            |side: &str| pod.annotations.get(&format!("kubernetes.io/{side}-bandwidth")).map(String::as_str);
        let bandwidth =
            Bandwidth::parse(note("ingress"), note("egress")).map_err(|e| Fault::invalid(e.to_string()))?;
        let options = PodOptions {
            hostname: if network { hostname.clone() } else { String::new() },
            new_ipc: ipc,
            new_uts: network,
            new_pid: pid,
            new_net: network && own.user,
            uid_mappings,
            gid_mappings,
            sysctls,
            shm_size: if ipc { SHM } else { 0 },
            shim_cgroup: config.cgroup.shim_cgroup.clone(),
            oom_score_adj: OOM_SCORE,
            ..PodOptions::default()
        };
        Ok(Wish {
            ports: ports(&pod.port_mappings)?,
            config: pod,
            handler,
            hostname,
            options,
            bandwidth,
            network,
        })
    }

    /// What tells this pod from all others.
    pub fn name(&self) -> String {
        let metadata = self.config.metadata.clone().unwrap_or_default();
        format!("pod {}/{}/{}/{}", metadata.namespace, metadata.name, metadata.uid, metadata.attempt)
    }

    pub fn dns(&self) -> Dns {
        let dns = self.config.dns_config.clone().unwrap_or_default();
        Dns { servers: dns.servers, searches: dns.searches, options: dns.options }
    }
}

fn mode(value: i32, field: &str) -> Result<NamespaceMode> {
    NamespaceMode::try_from(value)
        .map_err(|_| Fault::invalid(format!("{field} namespace mode {value} is not known")))
}

fn unfit(field: &str, mode: NamespaceMode) -> crate::error::Error {
    Fault::invalid(format!("{field} namespace of a pod cannot be {}", mode.as_str_name()))
}

type Mappings = Vec<shim_api::shim::IdMapping>;

/// None at all, or exactly one of each that has id 0 inside: without a root nobody could set the pod up.
fn mappings(options: Option<&v1::UserNamespace>) -> Result<(Mappings, Mappings)> {
    let Some(options) = options else { return Ok(Default::default()) };
    match mode(options.mode, "user")? {
        NamespaceMode::Node if options.uids.is_empty() && options.gids.is_empty() => {
            return Ok(Default::default());
        }
        NamespaceMode::Node => return Err(Fault::invalid("user namespace mode NODE takes no id mappings")),
        NamespaceMode::Pod => {}
        other => return Err(unfit("user", other)),
    }
    let one = |kind: &str, list: &[v1::IdMapping]| match list {
        [map] if map.length == 0 => {
            Err(Fault::invalid(format!("{kind} mapping of the user namespace is empty")))
        }
        [map] if map.container_id != 0 => {
            Err(Fault::invalid(format!("{kind} mapping of the user namespace must begin at 0")))
        }
        [map] if map.host_id.checked_add(map.length).is_none() => {
            Err(Fault::invalid(format!("{kind} mapping of the user namespace is out of range")))
        }
        [map] => Ok(vec![shim_api::shim::IdMapping {
            container_id: map.container_id,
            host_id: map.host_id,
            size: map.length,
            ..Default::default()
        }]),
        _ => Err(Fault::invalid(format!(
            "user namespace needs exactly one {kind} mapping, not {}",
            list.len()
        ))),
    };
    Ok((one("uid", &options.uids)?, one("gid", &options.gids)?))
}

/// Host port 0 means none and is left out.
fn ports(list: &[v1::PortMapping]) -> Result<Vec<PortMapping>> {
    list.iter().filter(|port| port.host_port != 0).map(port).collect()
}

fn port(port: &v1::PortMapping) -> Result<PortMapping> {
    let number = |what: &str, value: i32| {
        u16::try_from(value)
            .ok()
            .filter(|value| *value != 0)
            .ok_or_else(|| Fault::invalid(format!("{what} {value} is not a port")))
    };
    let host_ip = match port.host_ip.as_str() {
        "" => None,
        text => Some(
            text.parse::<IpAddr>()
                .map_err(|_| Fault::invalid(format!("host_ip {text:?} is not an address")))?,
        ),
    };
    let protocol = match v1::Protocol::try_from(port.protocol) {
        Ok(v1::Protocol::Tcp) => Protocol::Tcp,
        Ok(v1::Protocol::Udp) => Protocol::Udp,
        Ok(v1::Protocol::Sctp) => Protocol::Sctp,
        Err(_) => return Err(Fault::invalid(format!("protocol {} is not known", port.protocol))),
    };
    Ok(PortMapping {
        protocol,
        container_port: number("container_port", port.container_port)?,
        host_port: number("host_port", port.host_port)?,
        host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
    })
}

/// An absolute path below the hierarchies' root, in cgroupfs syntax whatever the driver.
fn check_cgroup(parent: &str) -> Result<()> {
    let climbs = parent.split('/').any(|part| part == "." || part == "..");
    match parent.is_empty() || (!climbs && !parent.contains(['\0', '\n'])) {
        true => Ok(()),
        false => Err(Fault::invalid(format!("cgroup_parent {parent:?} is not a path below the root"))),
    }
}

/// Each text is one word of one line of resolv.conf.
fn check_dns(dns: Option<&v1::DnsConfig>) -> Result<()> {
    let Some(dns) = dns else { return Ok(()) };
    match dns
        .servers
        .iter()
        .chain(&dns.searches)
        .chain(&dns.options)
        .find(|text| text.contains(char::is_whitespace) || text.contains('\0'))
    {
        Some(text) => Err(Fault::invalid(format!("dns_config: {text:?} is not one word"))),
        None => Ok(()),
    }
}

fn check_log_directory(path: &str) -> Result<()> {
    let climbs = path.split('/').any(|part| part == "..");
    match path.is_empty() || (path.starts_with('/') && !climbs && !path.contains('\0')) {
        true => Ok(()),
        false => Err(Fault::invalid(format!("log_directory {path:?} is not an absolute path"))),
    }
}

/// sethostname(2) takes 64 bytes.
fn check_hostname(name: &str) -> Result<()> {
    match name.len() <= 64 && !name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        true => Ok(()),
        false => Err(Fault::invalid(format!("hostname {name:?} is not a name of at most 64 bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::RunPodSandboxRequest {
        let metadata = v1::PodSandboxMetadata {
            name: "web".into(),
            uid: "u".into(),
            namespace: "default".into(),
            attempt: 2,
        };
        let config = v1::PodSandboxConfig {
            metadata: Some(metadata),
            hostname: "web-0".into(),
            linux: Some(v1::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() }
    }

    fn checked(change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<Wish> {
        let mut request = request();
        change(request.config.as_mut().unwrap());
        Wish::check(&Config::default(), "node", request)
    }

    fn with_namespaces(namespaces: v1::NamespaceOption) -> Result<Wish> {
        checked(|pod| {
            let security =
                v1::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
            pod.linux.as_mut().unwrap().security_context = Some(security);
        })
    }

    fn userns(
        mode: NamespaceMode,
        uids: &[(u32, u32, u32)],
        gids: &[(u32, u32, u32)],
    ) -> v1::NamespaceOption {
        let list = |maps: &[(u32, u32, u32)]| {
            let map = |m: &(u32, u32, u32)| v1::IdMapping { container_id: m.0, host_id: m.1, length: m.2 };
            maps.iter().map(map).collect()
        };
        let options = v1::UserNamespace { mode: mode.into(), uids: list(uids), gids: list(gids) };
        v1::NamespaceOption { userns_options: Some(options), ..Default::default() }
    }

    #[test]
    fn zero_values_mean_namespaces_of_the_pod() {
        let wish = checked(|_| {}).unwrap();
        let o = &wish.options;
        assert!(wish.network && o.new_ipc && o.new_uts && o.new_pid && !o.new_net);
        assert_eq!((o.hostname.as_str(), o.shm_size), ("web-0", SHM));
        assert_eq!(wish.name(), "pod default/web/u/2");
    }

    #[test]
    fn the_hosts_network_comes_with_the_hosts_name() {
        let node = NamespaceMode::Node.into();
        let wish =
            with_namespaces(v1::NamespaceOption { network: node, ipc: node, ..Default::default() }).unwrap();
        assert!(!wish.network && !wish.options.new_uts && !wish.options.new_ipc);
        assert_eq!((wish.hostname.as_str(), wish.options.shm_size), ("node", 0));
    }

    #[test]
    fn a_user_namespace_needs_exactly_one_mapping_of_each_kind_from_zero() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let one = [(0, 1000, 100_000)];
        let wish = with_namespaces(userns(Pod, &one, &one)).unwrap();
        assert!(wish.options.new_net && wish.options.uid_mappings[0].size == 100_000);
        assert!(with_namespaces(userns(Node, &[], &[])).unwrap().options.uid_mappings.is_empty());
        for bad in [
            userns(Pod, &[], &[]),
            userns(Pod, &one, &[]),
            userns(Pod, &[(0, 1, 2), (2, 9, 9)], &one),
            userns(Pod, &[(1, 1000, 1000)], &[(1, 1000, 1000)]),
            userns(Pod, &[(0, 1000, 0)], &[(0, 1000, 0)]),
            userns(Pod, &[(0, u32::MAX, 2)], &[(0, u32::MAX, 2)]),
            userns(Container, &one, &one),
            userns(Target, &one, &one),
            userns(Node, &one, &one),
        ] {
            assert!(with_namespaces(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        type Change = fn(&mut v1::PodSandboxConfig);
        let bad: [(&str, Change); 10] = [
            ("no metadata", |pod| pod.metadata = None),
            ("no uid", |pod| pod.metadata.as_mut().unwrap().uid.clear()),
            ("cgroup climbs", |pod| pod.linux.as_mut().unwrap().cgroup_parent = "/a/../b".into()),
            ("log climbs", |pod| pod.log_directory = "/var/log/../x".into()),
            ("log relative", |pod| pod.log_directory = "logs".into()),
            ("hostname with a line end", |pod| pod.hostname = "a\nb".into()),
            ("long hostname", |pod| pod.hostname = "a".repeat(65)),
            ("search with a line end", |pod| {
                let searches = vec!["a\nnameserver 1.1.1.1".into()];
                pod.dns_config = Some(v1::DnsConfig { searches, ..Default::default() });
            }),
            ("sysctl of the host", |pod| {
                pod.linux.as_mut().unwrap().sysctls.insert("kernel.core_pattern".into(), "x".into());
            }),
            ("port out of range", |pod| {
                pod.port_mappings =
                    vec![v1::PortMapping { container_port: 80, host_port: 70_000, ..Default::default() }];
            }),
        ];
        for (what, change) in bad {
            assert!(checked(change).is_err(), "{what}");
        }
        let unknown = v1::RunPodSandboxRequest { runtime_handler: "kata".into(), ..request() };
        assert!(Wish::check(&Config::default(), "node", unknown).is_err());
    }

    #[test]
    fn host_port_zero_is_none() {
        let map = |host_port| v1::PortMapping { container_port: 80, host_port, ..Default::default() };
        let wish = checked(|pod| pod.port_mappings = vec![map(0), map(12000)]).unwrap();
        assert_eq!(wish.ports.iter().map(|port| port.host_port).collect::<Vec<_>>(), [12000]);
    }
}
