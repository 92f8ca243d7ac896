//! Reads config.toml and its drop-ins into one typed value. Knows names, defaults and bounds of the keys;
//! what a key does is the business of the part that reads it.
//!
//! A key that nobody reads does not exist here: it is refused with file and line, in place of being a silent default.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Format of the file.
    pub version: u32,
    /// Globs of drop-in files, read in sorted order; later ones win.
    pub imports: Vec<String>,
    /// What lasts: database, images, writable layers.
    pub root: PathBuf,
    /// What a reboot clears: run directories, sockets, network namespaces.
    pub state: PathBuf,
    /// oom_score_adj of the daemon, where permitted.
    pub oom_score: i32,
    pub grpc: Grpc,
    pub cgroup: Cgroup,
    pub runtimes: Runtimes,
    pub network: Network,
    pub security: Security,
    pub defaults: Defaults,
    pub cdi: Cdi,
    pub images: Images,
    pub logs: Logs,
    pub exec: Exec,
    pub stream: Stream,
    pub stats: Stats,
    pub debug: Debug,
}

/// The CRI socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grpc {
    /// Path; empty means crispd.sock in the state directory.
    pub address: PathBuf,
    pub uid: u32,
    /// With a gid other than 0 the socket's mode is 0660, otherwise 0600.
    pub gid: u32,
    pub max_recv_message_size: usize,
    pub max_send_message_size: usize,
}

/// Who makes cgroups, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    pub driver: Driver,
    /// Cgroup of the shims, relative to the root of the hierarchies; empty means: where the daemon is.
    pub shim_cgroup: String,
}

/// The cgroup driver that the kubelet is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    Auto,
    Cgroupfs,
}

/// Ways to run pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtimes {
    /// The handler of pods that name none.
    pub default_runtime_name: String,
    #[serde(flatten)]
    pub handlers: BTreeMap<String, Handler>,
}

/// One runtime handler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handler {
    /// Which shim; only crisp's own is driven today.
    pub runtime_type: String,
    /// The shim's program; empty means: beside crispd, then /usr/local/bin, then /usr/bin.
    pub runtime_path: PathBuf,
    /// A privileged container gets no devices of the host.
    pub privileged_without_host_devices: bool,
    /// /sys/fs/cgroup is writable for containers that are not privileged.
    pub cgroup_writable: bool,
}

/// The name of our own shim in containerd's convention.
pub const CRISP: &str = "io.containerd.crisp.v1";

/// Where pods get their addresses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    pub plugin: Plugin,
    pub cni: Cni,
    pub bridge: Bridge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plugin {
    Cni,
    Bridge,
}

/// Plugins by the Container Network Interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cni {
    pub bin_dirs: Vec<PathBuf>,
    pub conf_dir: PathBuf,
    /// How many files of conf_dir count; 0 means all.
    pub max_conf_num: usize,
    /// Name of the network to use; empty means the first file.
    pub default_network: String,
    /// Deadline of one plugin call.
    pub timeout: Span,
    /// Template that is filled with the pod address range and written to conf_dir; empty means none.
    pub conf_template: PathBuf,
    /// Which address of a pod is its first: "ipv4", "ipv6" or "cni" (order of the plugin).
    pub ip_pref: String,
}

/// The built-in network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bridge {
    pub name: String,
    /// One per address family; empty means those that the kubelet tells.
    pub subnets: Vec<String>,
    /// 0 means that of the host's route to the world.
    pub mtu: u32,
    pub masquerade: bool,
}

/// What containers may do, beyond what CRI says of each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Security {
    /// Do not touch AppArmor even where the kernel has it.
    pub disable_apparmor: bool,
    /// AppArmor profile that RuntimeDefault means, when it is loaded; empty means crisp-default.
    pub apparmor_profile: String,
    /// Label containers where the kernel has SELinux.
    pub enable_selinux: bool,
    /// OCI seccomp profile that RuntimeDefault means; empty means the built-in one.
    pub seccomp_profile: PathBuf,
    /// What containers get that name no profile: "unconfined" (also when empty) or "runtime/default".
    pub unset_seccomp_profile: String,
    pub device_ownership_from_security_context: bool,
    #[serde(default = "yes")]
    pub enable_unprivileged_ports: bool,
    #[serde(default = "yes")]
    pub enable_unprivileged_icmp: bool,
    pub ignore_image_defined_volumes: bool,
    /// Host paths that are never made when a mount names them and they are absent.
    pub absent_mount_sources_to_reject: Vec<PathBuf>,
}

fn yes() -> bool {
    true
}

/// For containers that say nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// "nofile=1024:4096", soft and hard.
    pub default_ulimits: Vec<String>,
    /// "NAME=value".
    pub default_env: Vec<String>,
    /// Dot form, for pods.
    pub default_sysctls: BTreeMap<String, String>,
    /// Capabilities in place of the usual fourteen; empty means those.
    pub default_capabilities: Vec<String>,
    /// 0 means no limit.
    pub pids_limit: i64,
}

/// Devices by name, as their vendors describe them in files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cdi {
    pub enable_cdi: bool,
    /// Directories of specs; later ones win.
    pub cdi_spec_dirs: Vec<PathBuf>,
}

/// Where images come from and how they are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Images {
    /// Directories with `<host>/hosts.toml`.
    pub config_path: Vec<PathBuf>,
    /// "environment", empty for none, or a URL.
    pub proxy: String,
    /// Registry credentials of the node; empty means none.
    pub auth_file: PathBuf,
    /// Registry of short names; empty refuses them.
    pub default_registry: String,
    /// Patterns of images that the kubelet must not collect.
    pub pinned_images: Vec<String>,
    /// OCI image layout directories whose images are taken in at the start and on SIGHUP.
    pub import_dirs: Vec<PathBuf>,
    pub max_concurrent_downloads: usize,
    pub max_concurrent_unpacks: usize,
    /// A download that brings nothing for so long is cut.
    pub image_pull_progress_timeout: Span,
    /// Bytes per second below which a download is cut.
    pub pull_min_throughput: u64,
    pub discard_unpacked_layers: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logs {
    /// A longer record is cut with tag P.
    pub max_container_log_line_size: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Exec {
    /// How long output is read on after the command of an ExecSync has ended.
    pub drain_exec_sync_io_timeout: Span,
}

/// Exec, attach and port-forward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stream {
    /// Where the kubelet finds the streaming server.
    pub stream_server_address: IpAddr,
    /// 0 means any free one.
    pub stream_server_port: u16,
    /// A connection on which nothing moves for so long is closed.
    pub stream_idle_timeout: Span,
    /// Needs both files of the pair.
    pub enable_tls_streaming: bool,
    pub x509_key_pair_streaming: KeyPair,
}

/// The certificate of a server, with those that signed it, and its key; both PEM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyPair {
    pub tls_cert_file: PathBuf,
    pub tls_key_file: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stats {
    /// How old answers of the stats calls may be; 0 means taken anew for each.
    pub stats_collect_period: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Debug {
    /// "error", "warn", "info", "debug", "trace", or a filter by module.
    pub level: String,
    pub format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            version: 1,
            imports: vec!["/etc/crisp/config.toml.d/*.toml".into()],
            root: "/var/lib/crisp".into(),
            state: "/run/crisp".into(),
            oom_score: -999,
            grpc: Grpc::default(),
            cgroup: Cgroup::default(),
            runtimes: Runtimes::default(),
            network: Network::default(),
            security: Security {
                enable_unprivileged_ports: true,
                enable_unprivileged_icmp: true,
                ..Security::default()
            },
            defaults: Defaults::default(),
            cdi: Cdi::default(),
            images: Images::default(),
            logs: Logs::default(),
            exec: Exec::default(),
            stream: Stream::default(),
            stats: Stats::default(),
            debug: Debug::default(),
        }
    }
}

impl Default for Grpc {
    fn default() -> Grpc {
        Grpc {
            address: PathBuf::new(),
            uid: 0,
            gid: 0,
            max_recv_message_size: 16 << 20,
            max_send_message_size: 16 << 20,
        }
    }
}

impl Default for Cgroup {
    fn default() -> Cgroup {
        Cgroup { driver: Driver::Auto, shim_cgroup: String::new() }
    }
}

impl Default for Runtimes {
    fn default() -> Runtimes {
        Runtimes {
            default_runtime_name: "crisp".into(),
            handlers: BTreeMap::from([("crisp".into(), Handler::default())]),
        }
    }
}

impl Default for Handler {
    fn default() -> Handler {
        Handler {
            runtime_type: CRISP.into(),
            runtime_path: PathBuf::new(),
            privileged_without_host_devices: false,
            cgroup_writable: false,
        }
    }
}

impl Default for Network {
    fn default() -> Network {
        Network { plugin: Plugin::Cni, cni: Cni::default(), bridge: Bridge::default() }
    }
}

impl Default for Cni {
    fn default() -> Cni {
        Cni {
            bin_dirs: vec!["/opt/cni/bin".into()],
            conf_dir: "/etc/cni/net.d".into(),
            max_conf_num: 1,
            default_network: String::new(),
            timeout: Span::secs(60),
            conf_template: PathBuf::new(),
            ip_pref: "ipv4".into(),
        }
    }
}

impl Default for Bridge {
    fn default() -> Bridge {
        Bridge { name: "crisp0".into(), subnets: Vec::new(), mtu: 0, masquerade: true }
    }
}

impl Default for Cdi {
    fn default() -> Cdi {
        Cdi { enable_cdi: true, cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()] }
    }
}

impl Default for Images {
    fn default() -> Images {
        Images {
            config_path: vec!["/etc/crisp/certs.d".into(), "/etc/containerd/certs.d".into()],
            proxy: "environment".into(),
            auth_file: PathBuf::new(),
            default_registry: "docker.io".into(),
            pinned_images: Vec::new(),
            import_dirs: Vec::new(),
            max_concurrent_downloads: 6,
            max_concurrent_unpacks: 4,
            image_pull_progress_timeout: Span::secs(30),
            pull_min_throughput: 1024,
            discard_unpacked_layers: true,
        }
    }
}

impl Default for Logs {
    fn default() -> Logs {
        Logs { max_container_log_line_size: 16 << 10 }
    }
}

impl Default for Exec {
    fn default() -> Exec {
        Exec { drain_exec_sync_io_timeout: Span::secs(1) }
    }
}

impl Default for Stream {
    fn default() -> Stream {
        Stream {
            stream_server_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            stream_server_port: 0,
            stream_idle_timeout: Span::secs(4 * 3600),
            enable_tls_streaming: false,
            x509_key_pair_streaming: KeyPair::default(),
        }
    }
}

impl Default for Stats {
    fn default() -> Stats {
        Stats { stats_collect_period: Span(Duration::ZERO) }
    }
}

impl Default for Debug {
    fn default() -> Debug {
        Debug { level: "info".into(), format: Format::Text }
    }
}

/// A length of time, written as a whole number with a unit: `500ms`, `30s`, `5m`, `4h`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    pub const fn secs(secs: u64) -> Span {
        Span(Duration::from_secs(secs))
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            0 => f.write_str("0s"),
            ms if ms % 1000 == 0 => write!(f, "{}s", ms / 1000),
            ms => write!(f, "{ms}ms"),
        }
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Span, D::Error> {
        let text = String::deserialize(from)?;
        span(&text).ok_or_else(|| {
            de::Error::custom(format!("\"{text}\" is not a time: write a whole number with ms, s, m or h"))
        })
    }
}

fn span(text: &str) -> Option<Span> {
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit);
    let number: u64 = number.parse().ok()?;
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(factor).map(|ms| Span(Duration::from_millis(ms)))
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read {0}: {1}")]
    Read(PathBuf, std::io::Error),
    #[error("{0}: {1}")]
    Parse(PathBuf, toml::de::Error),
    #[error("{0} can be written by others than root")]
    Untrusted(PathBuf),
    #[error("{0}")]
    Value(String),
}

impl Config {
    /// Reads a file and what it imports. A drop-in is checked by itself first, so that an error names its line.
    pub fn load(path: &Path) -> Result<Config, Error> {
        let (mut table, main) = read(path)?;
        for file in drop_ins(&main.imports) {
            merge(&mut table, read(&file)?.0);
        }
        let config: Config = table.try_into().map_err(|e| Error::Parse(path.into(), e))?;
        config.check()?;
        Ok(config)
    }

    /// The CRI socket.
    pub fn address(&self) -> PathBuf {
        match self.grpc.address.as_os_str().is_empty() {
            true => self.state.join("crispd.sock"),
            false => self.grpc.address.clone(),
        }
    }

    /// The handler of a pod and its name; the empty name is the default.
    pub fn handler(&self, name: &str) -> Option<(&str, &Handler)> {
        let name = if name.is_empty() { &self.runtimes.default_runtime_name } else { name };
        self.runtimes.handlers.get_key_value(name).map(|(name, handler)| (name.as_str(), handler))
    }

    /// What a running daemon takes over from a newly read file: all but what was opened once at its start.
    pub fn live(&self, new: Config) -> Config {
        Config {
            version: self.version,
            root: self.root.clone(),
            state: self.state.clone(),
            oom_score: self.oom_score,
            grpc: self.grpc.clone(),
            cgroup: Cgroup { driver: self.cgroup.driver, ..new.cgroup },
            network: Network {
                plugin: self.network.plugin,
                cni: new.network.cni,
                bridge: self.network.bridge.clone(),
            },
            images: Images { proxy: self.images.proxy.clone(), ..new.images },
            stream: self.stream.clone(),
            debug: self.debug.clone(),
            ..new
        }
    }

    fn check(&self) -> Result<(), Error> {
        let wrong = |text: String| Err(Error::Value(text));
        if self.version != 1 {
            return wrong(format!("version {} of the configuration is not known, 1 is", self.version));
        }
        for (name, path) in [("root", &self.root), ("state", &self.state)] {
            if !path.is_absolute() {
                return wrong(format!("{name}: {} is not an absolute path", path.display()));
            }
        }
        if self.handler("").is_none() {
            let name = &self.runtimes.default_runtime_name;
            return wrong(format!("runtimes.default_runtime_name: there is no [runtimes.{name}]"));
        }
        for (name, handler) in &self.runtimes.handlers {
            if handler.runtime_type != CRISP {
                let kind = &handler.runtime_type;
                return wrong(format!(
                    "runtimes.{name}: runtime_type {kind} is not supported, only {CRISP} is"
                ));
            }
        }
        if !["ipv4", "ipv6", "cni"].contains(&self.network.cni.ip_pref.as_str()) {
            return wrong(format!(
                "network.cni.ip_pref: {:?} is none of ipv4, ipv6, cni",
                self.network.cni.ip_pref
            ));
        }
        if !["", "unconfined", "runtime/default"].contains(&self.security.unset_seccomp_profile.as_str()) {
            let value = &self.security.unset_seccomp_profile;
            return wrong(format!(
                "security.unset_seccomp_profile: {value:?} is none of unconfined, runtime/default"
            ));
        }
        for (name, size) in [
            ("max_recv_message_size", self.grpc.max_recv_message_size),
            ("max_send_message_size", self.grpc.max_send_message_size),
        ] {
            if size < 1 << 20 {
                return wrong(format!("grpc.{name}: {size} is less than 1 MiB"));
            }
        }
        let pair = &self.stream.x509_key_pair_streaming;
        let named = [&pair.tls_cert_file, &pair.tls_key_file].iter().all(|path| path.is_absolute());
        if self.stream.enable_tls_streaming && !named {
            return wrong(
                "stream.enable_tls_streaming: x509_key_pair_streaming names no two absolute paths".into(),
            );
        }
        if self.logs.max_container_log_line_size < 64 {
            return wrong("logs.max_container_log_line_size: less than 64 bytes".into());
        }
        Ok(())
    }
}

/// What decides over root must be root's alone.
pub fn trusted(path: &Path) -> Result<(), Error> {
    let meta = std::fs::metadata(path).map_err(|e| Error::Read(path.into(), e))?;
    match meta.uid() == 0 && meta.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(Error::Untrusted(path.into())),
    }
}

/// The file as a table, and typed: the second is what finds unknown keys with their lines.
fn read(path: &Path) -> Result<(toml::Table, Config), Error> {
    trusted(path)?;
    let text = std::fs::read_to_string(path).map_err(|e| Error::Read(path.into(), e))?;
    let config = toml::from_str(&text).map_err(|e| Error::Parse(path.into(), e))?;
    let table = toml::from_str(&text).map_err(|e| Error::Parse(path.into(), e))?;
    Ok((table, config))
}

/// Files that the globs name. Only the last component may hold a `*`; that is what operators write.
fn drop_ins(globs: &[String]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = globs.iter().flat_map(|glob| matches(Path::new(glob))).collect();
    files.sort();
    files.dedup();
    files
}

fn matches(glob: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (glob.parent(), glob.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let Some((head, tail)) = name.split_once('*') else { return vec![glob.into()] };
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            entry.file_name().to_str().is_some_and(|name| {
                name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail)
            })
        })
        .map(|entry| entry.path())
        .collect()
}

/// Tables are merged key by key, everything else is replaced.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../config.toml.example");

    #[test]
    fn the_example_says_the_defaults() {
        assert_eq!(toml::from_str::<Config>(EXAMPLE).unwrap(), Config::default());
    }

    #[test]
    fn the_example_holds_every_key() {
        fn keys(table: &toml::Table, prefix: &str, out: &mut Vec<String>) {
            for (key, value) in table {
                match value {
                    toml::Value::Table(t) if !t.is_empty() => keys(t, &format!("{prefix}{key}."), out),
                    _ => out.push(format!("{prefix}{key}")),
                }
            }
        }
        let (mut said, mut meant) = (Vec::new(), Vec::new());
        keys(&toml::from_str(EXAMPLE).unwrap(), "", &mut said);
        keys(&toml::Table::try_from(Config::default()).unwrap(), "", &mut meant);
        said.sort();
        meant.sort();
        assert_eq!(said, meant);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "version = 1\n[images]\nmax_downloads = 3\n").unwrap();
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("config.toml") && error.contains("line 3") && error.contains("max_downloads"),
            "{error}"
        );
    }

    #[test]
    fn a_drop_in_wins_key_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        let imports = dir.path().join("d/*.toml");
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(
            &main,
            format!("imports = [{imports:?}]\n[network.bridge]\nmtu = 9000\nname = \"a\"\n"),
        )
        .unwrap();
        std::fs::write(dir.path().join("d/1.toml"), "[network.bridge]\nname = \"b\"\n").unwrap();
        std::fs::write(dir.path().join("d/2.toml"), "[network.bridge]\nname = \"c\"\n").unwrap();
        let bridge = Config::load(&main).unwrap().network.bridge;
        assert_eq!((bridge.name.as_str(), bridge.mtu), ("c", 9000));
    }

    #[test]
    fn a_foreign_shim_is_refused_by_name() {
        let mut config = Config::default();
        let kata = Handler { runtime_type: "io.containerd.kata.v2".into(), ..Handler::default() };
        config.runtimes.handlers.insert("kata".into(), kata);
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("runtimes.kata") && error.contains("io.containerd.kata.v2"), "{error}");
    }

    #[test]
    fn times_are_a_number_with_a_unit() {
        assert_eq!(span("500ms"), Some(Span(Duration::from_millis(500))));
        assert_eq!(span("5m"), Some(Span::secs(300)));
        for bad in ["", "5", "s", "-1s", "1.5s", "1d", "99999999999999999999s", "18446744073709551615h"] {
            assert_eq!(span(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_reload_keeps_what_was_opened_at_the_start() {
        let mut new = Config { root: "/elsewhere".into(), ..Config::default() };
        new.images.max_concurrent_downloads = 1;
        let live = Config::default().live(new);
        assert_eq!(live.root, Config::default().root);
        assert_eq!(live.images.max_concurrent_downloads, 1);
    }

    #[test]
    fn h02_a_file_that_others_can_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        trusted(file.path()).unwrap();
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o666)).unwrap();
        assert!(trusted(file.path()).is_err());
    }
}
