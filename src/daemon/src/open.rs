//! Opens the parts that the daemon works with, from what the configuration says: directories, locks, images, network,
//! the shim's programs.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use image::{Images, Proxy, Unpacker};
use network::Network;
use rustix::fs::{FlockOperation, flock};

use crate::{
    config::{self, Config, Handler, Plugin},
    daemon::{IO, NETNS, PODS},
    shim::Program,
};

/// Held as long as the daemon lives: two daemons on the same directories would undo each other's work.
pub struct Locks {
    _files: [File; 2],
}

/// Makes the directories, corrects their modes, and locks them.
pub fn directories(config: &Config) -> Result<Locks> {
    for dir in [
        config.root.clone(),
        config.root.join("images"),
        config.state.clone(),
        config.state.join(PODS),
        config.state.join(NETNS),
        config.state.join(IO),
    ] {
        private(&dir).with_context(|| format!("make directory {}", dir.display()))?;
    }
    Ok(Locks { _files: [lock(&config.state)?, lock(&config.root)?] })
}

/// A directory of ours that nobody else may enter, whatever it was before (CVE-2021-41103).
fn private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// How long the lock of a daemon that is dead may be held by what it left.
const LINGER: Duration = Duration::from_secs(2);

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    // A daemon that was killed may have left a child between fork and exec, which holds its files for a moment.
    let end = Instant::now() + LINGER;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => bail!("another crispd works on {}", dir.display()),
            Err(e) => return Err(e).with_context(|| format!("lock {}", path.display())),
        }
    }
}

/// The database that all parts share, each with its own tables.
pub fn database(config: &Config) -> PathBuf {
    config.root.join("crisp.db")
}

pub async fn images(config: &Config) -> Result<Arc<Images>> {
    Images::open(of_images(config)).await.context("open images")
}

pub fn of_images(config: &Config) -> image::Config {
    let keys = &config.images;
    image::Config {
        hosts_dirs: keys.config_path.clone(),
        max_concurrent_downloads: keys.max_concurrent_downloads,
        max_concurrent_unpacks: keys.max_concurrent_unpacks,
        progress_timeout: keys.image_pull_progress_timeout.0,
        min_throughput: keys.pull_min_throughput,
        discard_layers: keys.discard_unpacked_layers,
        pinned: keys.pinned_images.clone(),
        default_registry: Some(keys.default_registry.clone()).filter(|name| !name.is_empty()),
        proxy: match keys.proxy.as_str() {
            "environment" => Proxy::Environment,
            "" => Proxy::None,
            url => Proxy::Url(url.into()),
        },
        auth_file: path(&keys.auth_file),
        ..image::Config::new(
            config.root.join("images"),
            database(config),
            Unpacker::new(vec!["/proc/self/exe".into(), "unpack".into()]),
        )
    }
}

pub fn network(config: &Config) -> Result<Network> {
    Network::open(of_network(config)?).context("open network")
}

pub fn of_network(config: &Config) -> Result<network::Config> {
    let keys = &config.network;
    Ok(match keys.plugin {
        Plugin::Cni => network::Config::Cni(network::cni::Config {
            bin_dirs: keys.cni.bin_dirs.clone(),
            conf_dir: keys.cni.conf_dir.clone(),
            max_conf_num: keys.cni.max_conf_num,
            default_network: Some(keys.cni.default_network.clone()).filter(|name| !name.is_empty()),
            timeout: keys.cni.timeout.0,
            conf_template: path(&keys.cni.conf_template),
            ip_pref: match keys.cni.ip_pref.as_str() {
                "ipv6" => network::cni::IpPref::Ipv6,
                "cni" => network::cni::IpPref::Cni,
                _ => network::cni::IpPref::Ipv4,
            },
            cache_dir: config.root.join("cni"),
        }),
        Plugin::Bridge => network::Config::Bridge(network::bridge::Config {
            name: keys.bridge.name.clone(),
            subnets: keys
                .bridge
                .subnets
                .iter()
                .map(|text| text.parse().with_context(|| format!("network.bridge.subnets: {text}")))
                .collect::<Result<_>>()?,
            mtu: Some(keys.bridge.mtu).filter(|mtu| *mtu != 0),
            masquerade: keys.bridge.masquerade,
            state_dir: config.state.join("network"),
        }),
    })
}

fn path(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.into())
}

/// The shim's program of each handler; handlers with the same program share its copy.
pub fn programs(config: &Config) -> Result<BTreeMap<String, Arc<Program>>> {
    let mut copies: BTreeMap<PathBuf, Arc<Program>> = BTreeMap::new();
    let mut programs = BTreeMap::new();
    for (name, handler) in &config.runtimes.handlers {
        let path = shim_path(handler).with_context(|| format!("runtimes.{name}"))?;
        let program = match copies.get(&path) {
            Some(program) => program.clone(),
            None => {
                config::trusted(&path)?;
                let program = Program::load(&path).with_context(|| format!("read {}", path.display()))?;
                copies.entry(path).or_insert(Arc::new(program)).clone()
            }
        };
        programs.insert(name.clone(), program);
    }
    Ok(programs)
}

const SHIM: &str = "containerd-shim-crisp-v1";

fn shim_path(handler: &Handler) -> Result<PathBuf> {
    if let Some(path) = path(&handler.runtime_path) {
        return Ok(path);
    }
    let own = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
    let places = own.into_iter().chain(["/usr/local/bin".into(), "/usr/bin".into()]);
    let mut paths = places.map(|dir: PathBuf| dir.join(SHIM));
    paths
        .find(|path| path.is_file())
        .with_context(|| format!("{SHIM} is neither beside crispd nor in /usr/local/bin nor in /usr/bin"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_second_daemon_on_the_same_directories_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { root: dir.path().join("a"), state: dir.path().join("b"), ..Config::default() };
        let first = directories(&config).unwrap();
        let error = directories(&config).err().unwrap().to_string();
        assert!(error.contains("another crispd"), "{error}");
        let other = Config { state: dir.path().join("c"), ..config.clone() };
        assert!(directories(&other).is_err());
        drop(first);
        directories(&config).unwrap();
    }

    #[test]
    fn s54_directories_that_were_open_to_others_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { root: dir.path().join("a"), state: dir.path().join("b"), ..Config::default() };
        fs::create_dir(&config.state).unwrap();
        fs::set_permissions(&config.state, Permissions::from_mode(0o777)).unwrap();
        directories(&config).unwrap();
        for dir in [&config.root, &config.state, &config.state.join(PODS)] {
            assert_eq!(fs::metadata(dir).unwrap().mode() & 0o777, 0o700, "{}", dir.display());
        }
    }
}
