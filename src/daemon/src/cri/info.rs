//! The `info` maps of verbose status calls: JSON in the shape that operators know from containerd, as `crictl inspect`
//! and `crictl inspectp` print it. Nothing decides by it.

use std::{collections::HashMap, fs};

use cri_api::v1::{LinuxContainerResources, NamespaceOption};
use serde_json::{Value, json};
use shim_api::rundir;

use crate::{
    config::{CRISP, Config},
    containers::Container,
    pods::Pod,
};

/// Largest config.json that is shown.
const LIMIT: u64 = 8 << 20;

/// Of a pod.
pub fn pod(config: &Config, pod: &Pod) -> HashMap<String, String> {
    let state = pod.state();
    let record = fs::read(pod.dir.join(rundir::SHIM)).ok();
    let shim: Option<rundir::Shim> = record.and_then(|bytes| rundir::decode(&bytes).ok());
    let one = json!({
        "sandboxID": pod.id,
        "pid": shim.map_or(0, |shim| shim.process.pid),
        "processStatus": if pod.ready() { "running" } else { "deleted" },
        "netNamespaceClosed": pod.netns.as_ref().is_none_or(|path| !path.exists()),
        "networkNamespace": pod.netns,
        "ips": state.ips,
        "image": "",
        "snapshotKey": "",
        "snapshotter": "overlayfs",
        "runtimeHandler": pod.runtime_handler,
        "runtimeType": runtime_type(config, pod),
        "runtimeOptions": null,
        "config": from_pod(pod),
        "runtimeSpec": null,
        "cgroupParent": pod.cgroup_parent(),
    });
    HashMap::from([("info".to_owned(), one.to_string())])
}

/// Of a container.
pub fn container(config: &Config, container: &Container) -> HashMap<String, String> {
    let state = container.state();
    let one = json!({
        "sandboxID": container.pod.id,
        "pid": state.pid,
        "removing": state.removing,
        "snapshotKey": container.id,
        "snapshotter": "overlayfs",
        "runtimeType": runtime_type(config, &container.pod),
        "runtimeOptions": null,
        "config": from_container(container),
        "runtimeSpec": spec(container),
    });
    HashMap::from([("info".to_owned(), one.to_string())])
}

fn runtime_type<'a>(config: &'a Config, pod: &Pod) -> &'a str {
    config.handler(&pod.runtime_handler).map_or(CRISP, |(_, handler)| handler.runtime_type.as_str())
}

/// What the container was made from; it lies beside the records of the shim.
fn spec(container: &Container) -> Value {
    let path = container.bundle().join("config.json");
    match fs::metadata(&path) {
        Ok(meta) if meta.len() <= LIMIT => {
            fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or(Value::Null)
        }
        _ => Value::Null,
    }
}

fn from_pod(pod: &Pod) -> Value {
    let config = &pod.config;
    let (metadata, state) = (pod.metadata(), pod.state());
    let linux = config.linux.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    let ports: Vec<Value> = config
        .port_mappings
        .iter()
        .map(|port| {
            json!({"protocol": port.protocol, "container_port": port.container_port, "host_port": port.host_port,
                "host_ip": port.host_ip})
        })
        .collect();
    json!({
        "metadata": {"name": metadata.name, "uid": metadata.uid, "namespace": metadata.namespace,
            "attempt": metadata.attempt},
        "hostname": config.hostname,
        "log_directory": config.log_directory,
        "dns_config": {"servers": dns.servers, "searches": dns.searches, "options": dns.options},
        "port_mappings": ports,
        "labels": config.labels,
        "annotations": config.annotations,
        "linux": {
            "cgroup_parent": linux.cgroup_parent,
            "security_context": {"namespace_options": namespaces(&pod.namespaces())},
            "sysctls": linux.sysctls,
            "resources": state.resources.as_ref().map(limits),
            "overhead": state.overhead.as_ref().map(limits),
        },
    })
}

/// Values of the environment are not shown twice: they are in the runtime spec.
fn from_container(container: &Container) -> Value {
    let config = &container.config;
    let metadata = container.metadata();
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let resources = container.look(|state| state.resources.clone()).unwrap_or_default();
    let mounts: Vec<Value> = config
        .mounts
        .iter()
        .map(|mount| {
            json!({"container_path": mount.container_path, "host_path": mount.host_path, "readonly": mount.readonly,
                "propagation": mount.propagation, "selinux_relabel": mount.selinux_relabel,
                "image": mount.image.as_ref().map(|image| image.image.clone())})
        })
        .collect();
    let envs: Vec<&str> = config.envs.iter().map(|pair| pair.key.as_str()).collect();
    json!({
        "metadata": {"name": metadata.name, "attempt": metadata.attempt},
        "image": {"image": config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default(),
            "user_specified_image": container.facts.image_name},
        "command": config.command,
        "args": config.args,
        "working_dir": config.working_dir,
        "env_names": envs,
        "mounts": mounts,
        "labels": config.labels,
        "annotations": config.annotations,
        "log_path": config.log_path,
        "stdin": config.stdin,
        "stdin_once": config.stdin_once,
        "tty": config.tty,
        "linux": {
            "resources": limits(&resources),
            "security_context": {
                "privileged": security.privileged,
                "namespace_options": security.namespace_options.as_ref().map(namespaces),
                "run_as_user": security.run_as_user.map(|uid| json!({"value": uid.value})),
                "run_as_username": security.run_as_username,
                "readonly_rootfs": security.readonly_rootfs,
                "no_new_privs": security.no_new_privs,
                "masked_paths": security.masked_paths,
                "readonly_paths": security.readonly_paths,
            },
        },
    })
}

fn limits(resources: &LinuxContainerResources) -> Value {
    json!({
        "cpu_period": resources.cpu_period,
        "cpu_quota": resources.cpu_quota,
        "cpu_shares": resources.cpu_shares,
        "memory_limit_in_bytes": resources.memory_limit_in_bytes,
        "memory_swap_limit_in_bytes": resources.memory_swap_limit_in_bytes,
        "oom_score_adj": resources.oom_score_adj,
        "cpuset_cpus": resources.cpuset_cpus,
        "cpuset_mems": resources.cpuset_mems,
        "hugepage_limits": resources
            .hugepage_limits
            .iter()
            .map(|huge| json!({"page_size": huge.page_size, "limit": huge.limit}))
            .collect::<Vec<_>>(),
        "unified": resources.unified,
    })
}

fn namespaces(options: &NamespaceOption) -> Value {
    json!({"network": options.network, "pid": options.pid, "ipc": options.ipc, "target_id": options.target_id,
        "userns_options": options.userns_options.as_ref().map(|user| json!({"mode": user.mode}))})
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cri_api::v1;

    use super::*;
    use crate::{containers::Facts, pods::Place};

    #[test]
    fn info_is_json_and_names_what_operators_look_for() {
        let here = tempfile::tempdir().unwrap();
        let dir = here.path().join("pod");
        let labels = HashMap::from([("a".to_owned(), "b\"c".to_owned())]);
        let config = v1::PodSandboxConfig { labels, ..Default::default() };
        let one = Arc::new(Pod::new("p1".into(), config, String::new(), 1, Place { dir, netns: None }));
        let text = pod(&Config::default(), &one);
        let parsed: Value = serde_json::from_str(&text["info"]).unwrap();
        assert_eq!(parsed["sandboxID"], "p1");
        assert_eq!(parsed["runtimeType"], CRISP);
        assert_eq!(parsed["config"]["labels"]["a"], "b\"c");

        let config = v1::ContainerConfig {
            envs: vec![v1::KeyValue { key: "SECRET".into(), value: b"hidden".to_vec() }],
            ..Default::default()
        };
        let made = Container::new("c1".into(), one, config, 1, Facts::default());
        fs::create_dir_all(made.bundle()).unwrap();
        fs::write(made.bundle().join("config.json"), "{\"ociVersion\": \"1.2.1\"}").unwrap();
        made.change(|state| state.pid = 42);
        let parsed: Value = serde_json::from_str(&container(&Config::default(), &made)["info"]).unwrap();
        assert_eq!(parsed["pid"], 42);
        assert_eq!(parsed["snapshotKey"], "c1");
        assert_eq!(parsed["runtimeSpec"]["ociVersion"], "1.2.1");
        assert_eq!(parsed["config"]["env_names"], json!(["SECRET"]));
        assert!(!parsed.to_string().contains("hidden"));
    }
}
