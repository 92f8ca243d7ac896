//! What the runtime says of itself: version, readiness, features, cgroup driver, and for those who ask verbosely its
//! configuration in the shape that tools know from containerd. Answers from memory.

use std::{collections::HashMap, path::Path, sync::Arc};

use cri_api::v1;
use serde_json::{Value, json};

use crate::{config::Config, containers::spec::host, daemon::Daemon};

/// Name and version of the runtime.
pub fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        // The kubelet's own API version; it checks for exactly this.
        version: "0.1.0".into(),
        runtime_name: "crisp".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: "v1".into(),
    }
}

/// Whether runtime and network are ready, and what the runtime can do.
pub fn status(daemon: &Arc<Daemon>, verbose: bool) -> v1::StatusResponse {
    let config = daemon.config();
    let network = daemon.network.status();
    let info = match verbose {
        true => info(&config, &network),
        false => HashMap::new(),
    };
    answer(&config, &network, features(&config.root), info)
}

fn answer(
    config: &Config,
    network: &Result<(), String>,
    features: v1::RuntimeHandlerFeatures,
    info: HashMap<String, String>,
) -> v1::StatusResponse {
    let ready = v1::RuntimeCondition { r#type: "RuntimeReady".into(), status: true, ..Default::default() };
    let network = match network {
        Ok(()) => v1::RuntimeCondition { r#type: "NetworkReady".into(), status: true, ..Default::default() },
        Err(why) => v1::RuntimeCondition {
            r#type: "NetworkReady".into(),
            status: false,
            reason: "NetworkPluginNotReady".into(),
            message: format!("Network plugin returns error: {why}"),
        },
    };
    // The default handler goes by the empty name as well.
    let names = std::iter::once("").chain(config.runtimes.handlers.keys().map(String::as_str));
    let handlers = names.map(|name| v1::RuntimeHandler { name: name.into(), features: Some(features) });
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions: vec![ready, network] }),
        info,
        runtime_handlers: handlers.collect(),
        features: Some(v1::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: features.user_namespaces,
            mount_options: true,
        }),
    }
}

/// What our shim can do on this host.
fn features(root: &Path) -> v1::RuntimeHandlerFeatures {
    let host = host::get();
    v1::RuntimeHandlerFeatures {
        recursive_read_only_mounts: host.recursive_read_only(),
        user_namespaces: host.user_namespaces_at(root),
    }
}

/// Texts of JSON. critest reads `stateDir` of `config`; operators and tools the rest.
fn info(config: &Config, network: &Result<(), String>) -> HashMap<String, String> {
    let root = config.root.display().to_string();
    let state = config.state.display().to_string();
    let mut own = serde_json::to_value(config).unwrap_or(Value::Null);
    let runtimes: serde_json::Map<String, Value> = config
        .runtimes
        .handlers
        .iter()
        .map(|(name, handler)| {
            let entry = json!({
                "runtimeType": handler.runtime_type,
                "runtimePath": handler.runtime_path,
                "privileged_without_host_devices": handler.privileged_without_host_devices,
                "cgroupWritable": handler.cgroup_writable,
            });
            (name.clone(), entry)
        })
        .collect();
    if let Some(own) = own.as_object_mut() {
        own.insert("stateDir".into(), state.into());
        own.insert("rootDir".into(), root.into());
        own.insert("endpoint".into(), config.address().display().to_string().into());
        own.insert(
            "containerd".into(),
            json!({"defaultRuntimeName": config.runtimes.default_runtime_name, "runtimes": runtimes,
                "snapshotter": "overlayfs"}),
        );
        own.insert(
            "cni".into(),
            json!({"binDirs": config.network.cni.bin_dirs, "confDir": config.network.cni.conf_dir,
                "maxConfNum": config.network.cni.max_conf_num}),
        );
    }
    let mut info = HashMap::from([("config".to_owned(), own.to_string())]);
    let last = match network {
        Ok(()) => "OK",
        Err(why) => why,
    };
    info.insert("lastCNILoadStatus".into(), json!(last).to_string());
    info.insert("host".into(), host_info().to_string());
    info
}

/// What was found on this host; it decides which requests can be honoured.
fn host_info() -> Value {
    let host = host::get();
    json!({
        "kernel": format!("{}.{}", host.release.0, host.release.1),
        "cgroupV2": host.unified,
        "swapAccounted": host.swap,
        "hugetlb": host.hugetlb,
        "apparmor": host.apparmor,
        "selinux": host.selinux,
    })
}

/// The cgroup driver.
pub fn runtime_config(_daemon: &Arc<Daemon>) -> v1::RuntimeConfigResponse {
    // The zero value is SYSTEMD: said explicitly, whatever the configuration says.
    let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs.into() };
    v1::RuntimeConfigResponse { linux: Some(linux) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: v1::RuntimeHandlerFeatures =
        v1::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };

    #[test]
    fn the_version_is_the_one_that_kubelets_check() {
        let version = version();
        assert_eq!(version.version, "0.1.0");
        assert_eq!(version.runtime_api_version, "v1");
        assert_eq!(version.runtime_version.split('.').count(), 3);
    }

    #[test]
    fn both_conditions_are_always_there_and_the_network_gives_its_reason() {
        for (network, good) in [(Ok(()), true), (Err("no configuration".to_owned()), false)] {
            let answer = answer(&Config::default(), &network, ALL, HashMap::new());
            let conditions = answer.status.unwrap().conditions;
            assert_eq!(conditions[0].r#type, "RuntimeReady");
            assert!(conditions[0].status);
            assert_eq!(conditions[1].r#type, "NetworkReady");
            assert_eq!(conditions[1].status, good);
            assert_eq!(conditions[1].message.contains("no configuration"), !good);
        }
    }

    #[test]
    fn every_handler_and_the_nameless_one_tell_their_features() {
        let answer = answer(&Config::default(), &Ok(()), ALL, HashMap::new());
        let names: Vec<&str> = answer.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
        assert_eq!(names, ["", "crisp"]);
        assert!(answer.runtime_handlers.iter().all(|handler| handler.features == Some(ALL)));
        assert!(answer.features.unwrap().supplemental_groups_policy);
    }

    #[test]
    fn verbose_info_is_json_with_the_directories() {
        let config = Config::default();
        let info = info(&config, &Err("x \"quoted\"".into()));
        let parsed: Value = serde_json::from_str(&info["config"]).unwrap();
        assert_eq!(parsed["stateDir"], "/run/crisp");
        assert_eq!(parsed["rootDir"], "/var/lib/crisp");
        assert_eq!(parsed["containerd"]["runtimes"]["crisp"]["runtimeType"], crate::config::CRISP);
        assert!(serde_json::from_str::<Value>(&info["lastCNILoadStatus"]).is_ok());
    }
}
