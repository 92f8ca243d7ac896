//! A kubelet alone, with static pods and no API server, on a CRI socket: what a node does to a runtime all day.
//! The scenario is here so that it can be shown to pass on another runtime too.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::image::catalog;
use crate::traces::{self, Marks};
use crate::{http, place, registry, run, setup};

/// A kubelet in a private place.
#[derive(Debug)]
pub struct Kubelet {
    child: Child,
    /// Serves /pods and /stats/summary without TLS.
    port: u16,
    marks: Marks,
    dir: tempfile::TempDir,
}

/// Pulling, scheduling and probing on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);

impl Kubelet {
    /// Starts a kubelet on a socket; returns when it is healthy.
    pub fn start(socket: &Path) -> Result<Kubelet> {
        Kubelet::start_with(socket, "")
    }

    /// The same with feature gates, written as `Name: true, Other: false`.
    pub fn start_with(socket: &Path, gates: &str) -> Result<Kubelet> {
        let dir = place::scratch("ck-")?;
        let at = dir.path().display();
        let group = dir.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let marks = Marks { dir: dir.path().to_owned(), names: BTreeSet::from([group.clone()]) };
        // The kubelet refuses a root that does not exist in every hierarchy it uses.
        for root in traces::hierarchies() {
            let path = root.join(&group);
            std::fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
            cpuset(&root, &path)?;
        }
        let (port, secure) = (registry::free_port()?, registry::free_port()?);
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
             containerRuntimeEndpoint: unix://{}\nstaticPodPath: {at}/manifests\npodLogsDir: {at}/logs\n\
             authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
             authorization: {{mode: AlwaysAllow}}\naddress: 127.0.0.1\nport: {secure}\nreadOnlyPort: {port}\n\
             healthzPort: 0\nfailSwapOn: false\nfailCgroupV1: false\ncgroupRoot: /{group}\n\
             volumePluginDir: {at}/plugins\nmakeIPTablesUtilChains: false\nfileCheckFrequency: 1s\n\
             syncFrequency: 5s\nimageGCHighThresholdPercent: 100\nenforceNodeAllocatable: []\n\
             evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}\n\
             featureGates: {{{gates}}}\n",
            socket.display()
        );
        std::fs::write(dir.path().join("kubelet.yaml"), config)?;
        std::fs::create_dir(dir.path().join("manifests"))?;
        let log = std::fs::File::create(dir.path().join("kubelet.log"))?;
        let child = Command::new(setup::go_program("kubelet")?)
            .arg(format!("--config={at}/kubelet.yaml"))
            .arg(format!("--root-dir={at}/root"))
            .args(["--hostname-override=node1", "--v=2"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the kubelet")?;
        let kubelet = Kubelet { child, port, marks, dir };
        run::until("the kubelet is healthy", PATIENCE, || {
            Ok(kubelet.get("/healthz").ok().filter(|reply| reply == "ok"))
        })
        .with_context(|| kubelet.tail())?;
        Ok(kubelet)
    }

    /// The private directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Gives the kubelet a manifest, whole at once.
    pub fn apply(&self, name: &str, manifest: &str) -> Result<()> {
        let staging = self.dir.path().join(name);
        std::fs::write(&staging, manifest)?;
        Ok(std::fs::rename(staging, self.manifest(name))?)
    }

    /// Takes a manifest away.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.manifest(name))?)
    }

    /// A pod as the kubelet sees it.
    pub fn pod(&self, name: &str) -> Result<Option<Value>> {
        let list: Value = serde_json::from_str(&self.get("/pods")?)?;
        let mut pods = list["items"].as_array().into_iter().flatten();
        Ok(pods.find(|pod| pod["metadata"]["name"] == name).cloned())
    }

    /// Waits until a pod is Running and Ready and a condition of the caller's holds.
    pub fn ready(&self, name: &str, also: impl Fn(&Value) -> bool) -> Result<Value> {
        let ready = |pod: &Value| {
            pod["status"]["phase"] == "Running"
                && pod["status"]["conditions"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
        };
        run::until(&format!("pod {name} is ready"), PATIENCE, || {
            Ok(self.pod(name)?.filter(|pod| ready(pod) && also(pod)))
        })
        .with_context(|| self.tail())
    }

    /// A page of the read-only port.
    pub fn get(&self, path: &str) -> Result<String> {
        let reply =
            http::Request::new("GET", path).send(SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)))?;
        reply.expect(200, path)?;
        Ok(reply.text())
    }

    /// Cgroups below the kubelet's root whose name has a part in it.
    pub fn cgroups(&self, part: &str) -> Vec<PathBuf> {
        let named = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().contains(part));
        self.marks.cgroups().into_iter().filter(named).collect()
    }

    /// The end of the log, for a message.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("kubelet.log")).unwrap_or_default();
        // What it says of its node all day would fill the end of any log.
        let of_node = |line: &str| line.contains("Recording event message for node");
        let lines: Vec<&str> = text.lines().filter(|line| !of_node(line)).collect();
        format!("end of the kubelet's log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.dir.path().join("manifests").join(format!("{name}.yaml"))
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        self.marks.wipe();
    }
}

/// A cpuset of cgroup v1 starts empty and takes no process until it has CPUs and memory nodes.
fn cpuset(root: &Path, group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let of_root = root.join(file);
        if of_root.exists() && !root.join("cgroup.controllers").exists() {
            std::fs::write(group.join(file), std::fs::read(of_root)?)?;
        }
    }
    Ok(())
}

/// One static pod from its manifest to its end. Says what was seen, step by step.
pub fn scenario(socket: &Path) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let kubelet = Kubelet::start(socket)?;
    seen.push("the kubelet accepts the runtime".to_owned());

    let settings = kubelet.dir().join("settings");
    std::fs::create_dir(&settings)?;
    std::fs::write(settings.join("greeting"), "hello from the node\n")?;
    kubelet.apply("duo", &manifest(&settings))?;
    let pod = kubelet.ready("duo-node1", |_| true)?;
    let uid =
        pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str().unwrap_or_default().to_owned();
    ensure!(!uid.is_empty(), "the pod has no uid: {pod}");
    ensure!(!kubelet.cgroups(&uid).is_empty(), "the kubelet made no cgroup for pod {uid}");
    let address = pod["status"]["podIP"].as_str().context("the pod has no address")?;
    seen.push("a pod of two containers with exec and http probes is Running and Ready".to_owned());

    let to: SocketAddr = format!("{address}:8080").parse().context("the pod's address")?;
    let page = http::Request::new("GET", "/greeting").send(to)?;
    ensure!(page.text() == "hello from the node\n", "the page is {:?}", page.text());
    seen.push("the node reaches it at its address and gets a file of a host path volume".to_owned());

    let log = kubelet.dir().join(format!("logs/default_duo-node1_{uid}/reader/0.log"));
    run::until("the reader logs what it read", Duration::from_secs(30), || {
        Ok(std::fs::read_to_string(&log)?.contains("stdout F read hello from the node").then_some(()))
    })?;
    seen.push(
        "its containers share localhost and a volume, and their logs are where the kubelet wants them"
            .to_owned(),
    );

    let stats: Value = serde_json::from_str(&run::until("a summary with the pod", PATIENCE, || {
        Ok(kubelet.get("/stats/summary").ok().filter(|text| text.contains("\"duo-node1\"")))
    })?)?;
    ensure!(
        stats["node"]["runtime"]["imageFs"]["capacityBytes"].as_u64().is_some_and(|b| b > 0),
        "no imageFs: {stats}"
    );
    seen.push("the summary of statistics has the pod and the image file system".to_owned());

    let web = container_process("httpd -f -p 8080")?;
    kill(Pid::from_raw(web.cast_signed()), Signal::SIGKILL)?;
    let restarted = |pod: &Value| {
        let mut statuses = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
        statuses.any(|s| {
            s["name"] == "web" && s["restartCount"] == 1 && s["lastState"]["terminated"]["exitCode"] == 137
        })
    };
    kubelet.ready("duo-node1", restarted)?;
    seen.push("a container that was killed is started again, and its exit code 137 is known".to_owned());

    kubelet.withdraw("duo")?;
    run::until("the pod is gone", PATIENCE, || {
        let gone = kubelet.pod("duo-node1")?.is_none() && kubelet.cgroups(&uid).is_empty();
        Ok((gone && !log.parent().is_some_and(Path::exists)).then_some(()))
    })
    .with_context(|| format!("{}\ncgroups: {:?}", kubelet.tail(), kubelet.cgroups(&uid)))?;
    ensure!(container_process("httpd -f -p 8080").is_err(), "its process still runs");
    seen.push("a pod whose manifest is taken away is gone: object, cgroups, processes, logs".to_owned());
    Ok(seen)
}

/// One static pod that asks for what runtimes have learnt of late: a user namespace, a volume that is an image, a stop
/// signal, groups that are not merged. The kubelet takes all figures from the runtime. (Recursive read-only mounts take a
/// RuntimeClass, of which a kubelet alone knows nothing.)
pub fn modern(socket: &Path) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let kubelet =
        Kubelet::start_with(socket, "PodAndContainerStatsFromCRI: true, ContainerStopSignals: true")?;
    kubelet.apply("modern", &modern_manifest())?;
    let pod = kubelet.ready("modern-node1", |_| true)?;
    let status = &pod["status"]["containerStatuses"][0];
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str().unwrap_or_default();
    let log = kubelet.dir().join(format!("logs/default_modern-node1_{uid}/main/0.log"));
    let said = run::until("the container has looked around", Duration::from_secs(30), || {
        let text = crate::bed::said(&log)?;
        Ok(text.contains("done").then_some(text))
    })?;
    let lines: Vec<&str> = said.lines().collect();
    let expected =
        ["0", "0 4321", "mapped", "first", "third", "Read-only file system", "1", "written", "done"];
    ensure!(
        lines.len() == expected.len() && lines.iter().zip(expected).all(|(line, part)| line.contains(part)),
        "the container saw {lines:#?}"
    );
    seen.push("the pod has users of its own, and its emptyDir is id-mapped".to_owned());
    seen.push("an image is a volume, and a part of it too".to_owned());
    ensure!(status["user"]["linux"]["supplementalGroups"] == serde_json::json!([0, 4321]), "{status}");
    ensure!(status["stopSignal"] == "SIGUSR1", "{status}");
    seen.push("groups and stop signal are in the status of the pod".to_owned());

    let figures = run::until("metrics of the container", PATIENCE, || {
        let text = kubelet.get("/metrics/cadvisor")?;
        Ok(text.contains("pod=\"modern-node1\"").then_some(text))
    })
    .with_context(|| kubelet.tail())?;
    for name in
        ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_threads"]
    {
        let mut lines = figures.lines().filter(|line| line.starts_with(name));
        let found = lines.any(|l| l.contains("container=\"main\"") && l.contains("pod=\"modern-node1\""));
        ensure!(found, "{name} of the container is not among the kubelet's metrics");
    }
    let network = figures.lines().find(|l| l.starts_with("container_network_receive_bytes_total"));
    ensure!(network.is_some_and(|l| l.contains("pod=\"modern-node1\"")), "no metrics of the pod's network");
    let summary: Value = serde_json::from_str(&run::until("a summary with the pod", PATIENCE, || {
        Ok(kubelet.get("/stats/summary").ok().filter(|text| text.contains("\"modern-node1\"")))
    })?)?;
    let of_pod =
        summary["pods"].as_array().into_iter().flatten().find(|p| p["podRef"]["name"] == "modern-node1");
    let of_pod = of_pod.context("no such pod in the summary")?;
    for part in [
        "/network/rxBytes",
        "/memory/workingSetBytes",
        "/cpu/usageCoreNanoSeconds",
        "/containers/0/rootfs/usedBytes",
    ] {
        ensure!(of_pod.pointer(part).is_some_and(Value::is_u64), "{part} is not in {of_pod}");
    }
    seen.push("metrics and summary of the kubelet come from the runtime".to_owned());

    kubelet.withdraw("modern")?;
    run::until("the pod is gone", PATIENCE, || {
        let gone = kubelet.pod("modern-node1")?.is_none() && kubelet.cgroups(uid).is_empty();
        Ok((gone && !log.parent().is_some_and(Path::exists)).then_some(()))
    })
    .with_context(|| kubelet.tail())?;
    seen.push("and the pod is gone".to_owned());
    Ok(seen)
}

/// The host's process id of a command that only the scenario runs.
fn container_process(command: &str) -> Result<u32> {
    traces::all_processes()
        .find(|pid| traces::command_line(*pid).ends_with(command))
        .with_context(|| format!("no process runs {command:?}"))
}

fn manifest(settings: &Path) -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: duo, namespace: default}}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: settings, hostPath: {{path: {settings}, type: Directory}}}}
  - {{name: scratch, emptyDir: {{}}}}
  containers:
  - name: web
    image: {image}
    imagePullPolicy: IfNotPresent
    command: [sh, -c, "cp /settings/greeting /scratch/ && cd /scratch && exec httpd -f -p 8080"]
    volumeMounts:
    - {{name: settings, mountPath: /settings, readOnly: true}}
    - {{name: scratch, mountPath: /scratch}}
    readinessProbe: {{httpGet: {{path: /greeting, port: 8080}}, periodSeconds: 1}}
    resources: {{requests: {{cpu: 10m, memory: 16Mi}}, limits: {{memory: 64Mi}}}}
  - name: reader
    image: {image}
    imagePullPolicy: IfNotPresent
    command: [sh, -c, "while true; do echo read $(wget -qO- http://127.0.0.1:8080/greeting); sleep 1; done"]
    volumeMounts:
    - {{name: scratch, mountPath: /scratch}}
    readinessProbe: {{exec: {{command: [test, -s, /scratch/greeting]}}, periodSeconds: 1}}
"#,
        settings = settings.display(),
        image = catalog::SMALL,
    )
}

fn modern_manifest() -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: modern, namespace: default}}
spec:
  os: {{name: linux}}
  hostUsers: false
  terminationGracePeriodSeconds: 5
  securityContext: {{runAsUser: 0, supplementalGroups: [4321], supplementalGroupsPolicy: Strict}}
  volumes:
  - {{name: data, image: {{reference: "{data}", pullPolicy: IfNotPresent}}}}
  - {{name: scratch, emptyDir: {{}}}}
  containers:
  - name: main
    image: {image}
    imagePullPolicy: IfNotPresent
    lifecycle: {{stopSignal: SIGUSR1}}
    command:
    - sh
    - -c
    - |
      trap 'exit 0' USR1
      id -u; id -G
      [ $(tr -s ' ' < /proc/self/uid_map | cut -d ' ' -f 3) != 0 ] && echo mapped
      cat /data/w/kept /part; touch /frozen/x 2>&1
      touch /scratch/new && ls /frozen | wc -l; stat -c %u /scratch/new | grep -q '^0$' && echo written
      echo done
      while :; do sleep 0.1; done
    volumeMounts:
    - {{name: data, mountPath: /data}}
    - {{name: data, mountPath: /part, subPath: w/replaced}}
    - {{name: scratch, mountPath: /scratch}}
    - {{name: scratch, mountPath: /frozen, readOnly: true}}
"#,
        data = catalog::WHITEOUTS,
        image = catalog::SMALL,
    )
}
