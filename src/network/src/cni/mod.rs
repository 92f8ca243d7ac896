//! The CNI side of the network: which plugins to call, in which order, with what, and what to remember of it.
//! Every call has a deadline, and no lock is held during one.

mod cache;
pub(crate) mod conf;
mod plugin;
mod result;
mod template;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::sync::{Notify, RwLock as Gate};
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::{info, warn};

use crate::attachment::{Attached, Attachment};
use crate::error::Error;
use crate::subnet::{self, Subnet};
use cache::{Cache, Entry};
use conf::{NetworkList, Plugin, Signature, Version};
use plugin::Call;
use result::Facts;

/// How often the configuration directory is looked at. Polling outlives what watching does not: the directory
/// removed and made anew, a link moved, a mount put over it.
const LOOK: Duration = Duration::from_millis(500);
/// How often plugins are asked for their STATUS.
const ASK: Duration = Duration::from_secs(10);
/// STATUS and GC are asked beside the pods' own business and wait less long.
const PATIENCE: Duration = Duration::from_secs(10);
/// The file that a template is written to, where containerd would write its own.
const GENERATED: &str = "10-crisp-net.conflist";
/// `ingressBurst` and `egressBurst` must be given with a rate; all other runtimes give this.
const BURST: u64 = u32::MAX as u64;

/// How CNI is set up.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where plugins are, in order of preference.
    pub bin_dirs: Vec<PathBuf>,
    /// Where network configurations are.
    pub conf_dir: PathBuf,
    /// How many networks a pod is attached to, the first by file name; 0 is all there are.
    pub max_conf_num: usize,
    /// The one network to use, by its name, wherever it stands.
    pub default_network: Option<String>,
    /// Deadline of one plugin call.
    pub timeout: Duration,
    /// A configuration that is filled with the pod addresses and written while there is no other.
    pub conf_template: Option<PathBuf>,
    /// Which address of a pod is its first.
    pub ip_pref: IpPref,
    /// Where is remembered what was done; should outlive a reboot, as what plugins remember does.
    pub cache_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into(), "/usr/libexec/cni".into()],
            conf_dir: "/etc/cni/net.d".into(),
            max_conf_num: 1,
            default_network: None,
            timeout: Duration::from_secs(120),
            conf_template: None,
            ip_pref: IpPref::Ipv4,
            cache_dir: "/var/lib/crisp/cni".into(),
        }
    }
}

/// Which of a pod's addresses comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IpPref {
    /// IPv4.
    #[default]
    Ipv4,
    /// IPv6.
    Ipv6,
    /// The one that the plugins name first.
    Cni,
}

/// The node's CNI networks.
#[derive(Debug)]
pub struct Cni {
    shared: Arc<Shared>,
    watcher: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    config: RwLock<Arc<Config>>,
    loaded: Mutex<Loaded>,
    /// Pods that were attached, or began to be, and are not detached: GC never touches these.
    active: Mutex<HashSet<String>>,
    pod_cidr: Mutex<Vec<Subnet>>,
    /// Plugins collect what is not on a list; nothing may be added while they do.
    collecting: Gate<()>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Loaded {
    networks: Arc<Vec<NetworkList>>,
    /// Why pods cannot be attached.
    missing: Option<String>,
    /// Why they should not be, in the words of a plugin.
    unwell: Option<String>,
    signature: Signature,
}

impl Drop for Cni {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl Cni {
    /// Reads the configuration, and watches it from now on by a task on the current tokio runtime.
    pub fn open(config: Config) -> Result<Cni, Error> {
        let shared = Arc::new(Shared {
            config: RwLock::new(Arc::new(config)),
            loaded: Mutex::default(),
            active: Mutex::default(),
            pod_cidr: Mutex::default(),
            collecting: Gate::new(()),
            changed: Notify::new(),
        });
        shared.load();
        let watcher = tokio::spawn(watch(shared.clone()));
        Ok(Cni { shared, watcher })
    }

    /// Runs ADD on every network.
    pub async fn attach(&self, attachment: &Attachment) -> Result<Attached, Error> {
        checked(attachment)?;
        let config = self.shared.config();
        let networks = match self.shared.networks() {
            Ok(networks) => networks,
            // The file may have come a moment ago.
            Err(_) => {
                self.shared.reload().await?;
                self.shared.networks()?
            }
        };
        let _gate = self.shared.collecting.read().await;
        lock(&self.shared.active).insert(attachment.pod_id.clone());
        let ranges: Vec<String> = lock(&self.shared.pod_cidr).iter().map(Subnet::to_string).collect();
        let mut attached = None;
        for (number, network) in networks.iter().enumerate() {
            let entry = Entry {
                attachment: attachment.clone(),
                interface: format!("eth{number}"),
                ranges: ranges.clone(),
                network: network.clone(),
                result: None,
            };
            let result = self.add(&config, entry).await?;
            if attached.is_none() {
                attached = Some(summary(result, network, config.ip_pref)?);
            }
        }
        attached.ok_or_else(|| Error::NotReady("no network configuration".into()))
    }

    /// Runs DEL on every network that ADD was run on, the last first.
    pub async fn detach(&self, attachment: &Attachment, attached: Option<&Attached>) -> Result<(), Error> {
        checked(attachment)?;
        let config = self.shared.config();
        let cache = Cache(config.cache_dir.clone());
        let pod = attachment.pod_id.clone();
        let entries = {
            let cache = cache.clone();
            blocking(move || cache.of(&pod)).await?
        };
        let _gate = self.shared.collecting.read().await;
        let mut first_error = None;
        for entry in self.known(entries, attachment, attached).iter().rev() {
            // One network that does not let go is no reason to stay on the others.
            if let Err(error) = self.del(&config, entry).await {
                first_error = first_error.or(Some(error));
            }
        }
        if let Some(error) = first_error {
            return Err(error);
        }
        let pod = attachment.pod_id.clone();
        blocking(move || cache.close(&pod)).await?;
        lock(&self.shared.active).remove(&attachment.pod_id);
        Ok(())
    }

    /// Runs CHECK where the network's version has it and its operator wants it.
    pub async fn check(&self, attachment: &Attachment, attached: Option<&Attached>) -> Result<(), Error> {
        checked(attachment)?;
        let config = self.shared.config();
        let (cache, pod) = (Cache(config.cache_dir.clone()), attachment.pod_id.clone());
        let entries = blocking(move || cache.of(&pod)).await?;
        let entries = self.known(entries, attachment, attached);
        if entries.is_empty() {
            return Err(Error::NoAddress(format!("nothing is remembered of pod {}", attachment.pod_id)));
        }
        for entry in &entries {
            let Some(result) = &entry.result else {
                return Err(Error::NoAddress(entry.network.name.clone()));
            };
            if entry.network.version < Version::V0_4_0 || entry.network.disable_check {
                continue;
            }
            for plugin in &entry.network.plugins {
                self.call(&config, "CHECK", entry, plugin, Some(result)).await?;
            }
        }
        Ok(())
    }

    /// Runs DEL for what belongs to no live pod, and GC where plugins know it.
    pub async fn gc(&self, live: &[String]) -> Result<(), Error> {
        let config = self.shared.config();
        let mut first_error = None;
        for pod in self.dead(&config, live).await? {
            let attachment = Attachment { pod_id: pod, ..Attachment::default() };
            if let Err(error) = self.detach(&attachment, None).await {
                first_error = first_error.or(Some(error));
            }
        }
        if let Err(error) = self.collect(&config).await {
            first_error = first_error.or(Some(error));
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Whether there is a network, its plugins are there, and they say that they are well.
    pub fn status(&self) -> Result<(), String> {
        let loaded = lock(&self.shared.loaded);
        match loaded.missing.as_ref().or(loaded.unwell.as_ref()) {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    /// Remembers the pod addresses for plugins that want `ipRanges`, and fills the template.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<(), Error> {
        if cidr.trim().is_empty() {
            return Ok(());
        }
        let subnets = subnet::list(cidr)?;
        lock(&self.shared.pod_cidr).clone_from(&subnets);
        let config = self.shared.config();
        let Some(template) = config.conf_template.clone() else { return Ok(()) };
        let networks = self.shared.networks().is_ok();
        blocking(move || generate(&template, &config.conf_dir, &subnets, networks)).await?;
        // What was written may be wrong, or another file is; both is for the status to say.
        let _ = self.shared.reload().await;
        Ok(())
    }

    /// Takes over a changed configuration.
    pub fn reconfigure(&self, config: Config) {
        *self.shared.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        lock(&self.shared.loaded).signature = Signature::default();
        self.shared.changed.notify_one();
    }

    /// What is remembered of a pod; failing that, what the daemon remembers, as if on today's networks.
    fn known(&self, entries: Vec<Entry>, attachment: &Attachment, attached: Option<&Attached>) -> Vec<Entry> {
        match (entries.is_empty(), attached, self.shared.networks()) {
            (true, Some(attached), Ok(networks)) => networks
                .iter()
                .enumerate()
                .map(|(number, network)| Entry {
                    attachment: attachment.clone(),
                    interface: format!("eth{number}"),
                    ranges: Vec::new(),
                    network: network.clone(),
                    result: attached
                        .result
                        .as_object()
                        .filter(|_| number == 0)
                        .and_then(|result| result::convert(result.clone(), network.version).ok()),
                })
                .collect(),
            _ => entries
                .into_iter()
                .map(|mut entry| {
                    // After a reboot the daemon may pin namespaces elsewhere.
                    if !attachment.netns.as_os_str().is_empty() {
                        entry.attachment.netns.clone_from(&attachment.netns);
                    }
                    entry
                })
                .collect(),
        }
    }

    async fn add(&self, config: &Config, mut entry: Entry) -> Result<Value, Error> {
        // Before the first plugin runs it is on record that there may be something to take away.
        self.remember(config, &entry).await?;
        let mut previous = None;
        for plugin in &entry.network.plugins {
            let answer = self.call(config, "ADD", &entry, plugin, previous.as_ref()).await?;
            let result = result::parse(&answer, entry.network.version)
                .map_err(|reason| Error::Result { plugin: plugin.kind().to_owned(), reason })?;
            previous = Some(result);
        }
        entry.result = previous.clone();
        self.remember(config, &entry).await?;
        previous.ok_or(Error::NoAddress(entry.network.name))
    }

    async fn del(&self, config: &Config, entry: &Entry) -> Result<(), Error> {
        let previous = entry.result.as_ref().filter(|_| entry.network.version >= Version::V0_4_0);
        for plugin in entry.network.plugins.iter().rev() {
            self.call(config, "DEL", entry, plugin, previous).await?;
        }
        let (cache, entry) = (Cache(config.cache_dir.clone()), entry.clone());
        blocking(move || cache.forget(&entry)).await
    }

    async fn remember(&self, config: &Config, entry: &Entry) -> Result<(), Error> {
        let (cache, entry) = (Cache(config.cache_dir.clone()), entry.clone());
        blocking(move || cache.write(&entry)).await
    }

    async fn call(
        &self,
        config: &Config,
        command: &'static str,
        entry: &Entry,
        plugin: &Plugin,
        previous: Option<&Value>,
    ) -> Result<Vec<u8>, Error> {
        let mut more = Map::new();
        if let Some(previous) = previous {
            more.insert("prevResult".into(), previous.clone());
        }
        let runtime = runtime_config(entry, plugin);
        if !runtime.is_empty() {
            more.insert("runtimeConfig".into(), Value::Object(runtime));
        }
        // DEL of a pod whose namespace is gone, after a reboot say, is told so by an empty path.
        let netns = &entry.attachment.netns;
        let gone = command == "DEL" && !crate::netns::exists(netns);
        let netns = if gone { String::new() } else { netns.display().to_string() };
        let environment = [
            ("CNI_CONTAINERID", entry.attachment.pod_id.clone()),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", entry.interface.clone()),
            ("CNI_ARGS", arguments(&entry.attachment)),
        ];
        Call {
            plugin: plugin.kind(),
            command,
            dirs: &config.bin_dirs,
            environment: &environment,
            input: plugin.input(&entry.network, more),
            limit: config.timeout,
        }
        .run()
        .await
    }

    /// Pods with entries that are neither live nor ours.
    async fn dead(&self, config: &Config, live: &[String]) -> Result<Vec<String>, Error> {
        let cache = Cache(config.cache_dir.clone());
        let mut pods = blocking(move || cache.pods()).await?;
        let active = lock(&self.shared.active);
        pods.retain(|pod| conf::is_name(pod) && !active.contains(pod) && !live.contains(pod));
        Ok(pods)
    }

    /// Runs GC with the list of what is remembered, while no pod comes or goes.
    async fn collect(&self, config: &Config) -> Result<(), Error> {
        let networks = self.shared.networks().unwrap_or_default();
        let known = |network: &&NetworkList| network.version >= Version::V1_1_0 && !network.disable_gc;
        if !networks.iter().any(|network| known(&network)) {
            return Ok(());
        }
        // A pod that comes just now would not be on the list: then there is a better time than now.
        let Ok(_gate) = self.shared.collecting.try_write() else { return Ok(()) };
        let cache = Cache(config.cache_dir.clone());
        let entries = blocking(move || {
            let pods = cache.pods()?;
            let entries: Vec<Vec<Entry>> = pods.iter().map(|pod| cache.of(pod)).collect::<Result<_, _>>()?;
            Ok(entries.concat())
        })
        .await?;
        for network in networks.iter().filter(known) {
            let valid: Vec<Value> = entries
                .iter()
                .filter(|entry| entry.network.name == network.name)
                .map(|entry| json!({"containerID": entry.attachment.pod_id, "ifname": entry.interface}))
                .collect();
            let mut more = Map::new();
            more.insert("cni.dev/valid-attachments".into(), Value::Array(valid.clone()));
            // The name that the reference implementation used at first, and that plugins still read.
            more.insert("cni.dev/attachments".into(), Value::Array(valid));
            for plugin in &network.plugins {
                beside(config, "GC", network, plugin, more.clone()).await?;
            }
        }
        Ok(())
    }
}

impl Shared {
    fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn networks(&self) -> Result<Arc<Vec<NetworkList>>, Error> {
        let loaded = lock(&self.loaded);
        match &loaded.missing {
            Some(reason) => Err(Error::NotReady(reason.clone())),
            None => Ok(loaded.networks.clone()),
        }
    }

    /// Reads the configuration anew if it changed. Returns whether it did.
    fn load(&self) -> bool {
        let config = self.config();
        // First the signature: what changes behind it is seen the next time.
        let signature = Signature::of(&config.conf_dir);
        {
            let loaded = lock(&self.loaded);
            let empty = loaded.networks.is_empty() && loaded.missing.is_none();
            if !empty && loaded.signature == signature && signature != Signature::default() {
                return false;
            }
        }
        let found = conf::load(&config.conf_dir, config.max_conf_num, config.default_network.as_deref());
        let mut loaded = lock(&self.loaded);
        loaded.signature = signature;
        let (networks, missing) = match found {
            Ok(networks) => (networks, None),
            Err(Error::NotReady(reason)) => (Vec::new(), Some(reason)),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let changed = *loaded.networks != networks || loaded.missing != missing;
        if changed {
            let names: Vec<&str> = networks.iter().map(|n| n.name.as_str()).collect();
            match &missing {
                Some(reason) => warn!(%reason, "no pod network"),
                None => info!(?names, "pod network configuration read"),
            }
            // Until a plugin that knows STATUS was asked, it is not known to be well.
            loaded.unwell = networks
                .iter()
                .any(|network| network.version >= Version::V1_1_0)
                .then(|| "the CNI plugins were not asked for their status yet".to_owned());
            loaded.networks = Arc::new(networks);
            loaded.missing = missing;
        }
        changed
    }

    /// As `load`, off the runtime's threads, and with the reason when there is no network then.
    async fn reload(self: &Arc<Shared>) -> Result<(), Error> {
        let shared = self.clone();
        blocking(move || {
            shared.load();
            shared.networks().map(|_| ())
        })
        .await?;
        self.changed.notify_one();
        Ok(())
    }

    /// Looks for the plugins' programs, and asks those that know STATUS.
    async fn ask(&self) {
        let config = self.config();
        let Ok(networks) = self.networks() else { return };
        let unwell = status(&config, &networks).await.err().map(|error| error.to_string());
        let mut loaded = lock(&self.loaded);
        // The answer counts for the networks that it was asked for.
        if Arc::ptr_eq(&loaded.networks, &networks) && loaded.unwell != unwell {
            match &unwell {
                Some(reason) => warn!(%reason, "pod network is not well"),
                None => info!("pod network is well"),
            }
            loaded.unwell = unwell;
        }
    }
}

async fn watch(shared: Arc<Shared>) {
    let mut asked = None::<Instant>;
    loop {
        let for_load = shared.clone();
        let changed = spawn_blocking(move || for_load.load()).await.unwrap_or(false);
        if changed || asked.is_none_or(|at| at.elapsed() >= ASK) {
            shared.ask().await;
            asked = Some(Instant::now());
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shared.changed.notified() => asked = None,
        }
    }
}

async fn status(config: &Config, networks: &[NetworkList]) -> Result<(), Error> {
    for network in networks {
        for plugin in &network.plugins {
            if network.version >= Version::V1_1_0 {
                beside(config, "STATUS", network, plugin, Map::new()).await?;
            } else {
                let (kind, dirs) = (plugin.kind().to_owned(), config.bin_dirs.clone());
                blocking(move || plugin::find(&kind, &dirs).map(|_| ())).await?;
            }
        }
    }
    Ok(())
}

/// Asks a plugin something that is about no pod.
async fn beside(
    config: &Config,
    command: &'static str,
    network: &NetworkList,
    plugin: &Plugin,
    more: Map<String, Value>,
) -> Result<(), Error> {
    let call = Call {
        plugin: plugin.kind(),
        command,
        dirs: &config.bin_dirs,
        environment: &[],
        input: plugin.input(network, more),
        limit: config.timeout.min(PATIENCE),
    };
    call.run().await.map(|_| ())
}

/// What a plugin is told about the pod, as far as it declared that it wants to know.
fn runtime_config(entry: &Entry, plugin: &Plugin) -> Map<String, Value> {
    let pod = &entry.attachment;
    let mut all = Map::new();
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .filter(|port| port.host_port != 0)
        .map(|port| {
            let host_ip = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
            json!({"hostPort": port.host_port, "containerPort": port.container_port,
                   "protocol": port.protocol.to_string(), "hostIP": host_ip})
        })
        .collect();
    if !ports.is_empty() && plugin.capable_of("portMappings") {
        all.insert("portMappings".into(), Value::Array(ports));
    }
    if let Some(limits) = pod.bandwidth.filter(|_| plugin.capable_of("bandwidth")) {
        let mut bandwidth = Map::new();
        for (direction, rate) in [("ingress", limits.ingress), ("egress", limits.egress)] {
            if let Some(rate) = rate {
                bandwidth.insert(format!("{direction}Rate"), json!(rate));
                bandwidth.insert(format!("{direction}Burst"), json!(BURST));
            }
        }
        all.insert("bandwidth".into(), Value::Object(bandwidth));
    }
    if !entry.ranges.is_empty() && plugin.capable_of("ipRanges") {
        let ranges: Vec<Value> = entry.ranges.iter().map(|range| json!([{"subnet": range}])).collect();
        all.insert("ipRanges".into(), Value::Array(ranges));
    }
    let dns = &pod.dns;
    let silent = dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty();
    if !silent && plugin.capable_of("dns") {
        let dns = json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options});
        all.insert("dns".into(), dns);
    }
    all
}

fn arguments(pod: &Attachment) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.pod_id, pod.uid
    )
}

/// The id becomes a path, and all of them become arguments with `;` and `=` between.
fn checked(attachment: &Attachment) -> Result<(), Error> {
    let bad = |reason: String| Err(Error::Attachment { pod: attachment.pod_id.clone(), reason });
    if !conf::is_name(&attachment.pod_id) {
        return bad("the id has forbidden characters".into());
    }
    for value in [&attachment.name, &attachment.namespace, &attachment.uid] {
        if value.contains([';', '=', '\0', '\n']) {
            return bad(format!("{value:?} has forbidden characters"));
        }
    }
    Ok(())
}

fn summary(result: Value, network: &NetworkList, preference: IpPref) -> Result<Attached, Error> {
    let bad = |reason| Error::Result { plugin: network.name.clone(), reason };
    let Value::Object(all) = result else { return Err(bad("not a JSON object".into())) };
    let version = network.version.max(Version::V1_0_0);
    let result = result::convert(all, version).map_err(bad)?;
    let interface = "eth0".to_owned();
    let Facts { mut ips, mac } = Facts::of(&result, &interface).map_err(bad)?;
    match preference {
        IpPref::Ipv4 => ips.sort_by_key(IpAddr::is_ipv6),
        IpPref::Ipv6 => ips.sort_by_key(IpAddr::is_ipv4),
        IpPref::Cni => {}
    }
    if ips.is_empty() {
        return Err(Error::NoAddress(network.name.clone()));
    }
    Ok(Attached { ips, interface, mac, result })
}

/// Writes the filled template, unless the directory has a network of somebody else's.
fn generate(template: &Path, dir: &Path, subnets: &[Subnet], networks: bool) -> Result<(), Error> {
    let target = dir.join(GENERATED);
    if networks && !target.exists() {
        return Ok(());
    }
    let bad = |reason: String| Error::Conf { path: template.to_owned(), reason };
    let text = std::fs::read_to_string(template).map_err(|e| bad(e.to_string()))?;
    let text = template::render(&text, subnets).map_err(bad)?;
    let failed = |cause| Error::Record { act: "write", path: target.clone(), cause };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let temporary = target.with_extension("new");
    std::fs::write(&temporary, text).map_err(failed)?;
    std::fs::rename(&temporary, &target).map_err(failed)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work).await.unwrap_or_else(|e| Err(Error::Worker(e.to_string())))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
