//! CNI as operators and plugins meet it: plugins that behave, plugins that do not, and Debian's real ones
//! (package containernetworking-plugins) on a host of their own.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use network::cni::{Config, IpPref};
use network::{Attachment, Bandwidth, Cni, Dns, Error, Network, PortMapping, Protocol, netns};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);

/// A plugin that writes down how it was called, and then does what the test wants.
const PLUGIN: &str = r#"#!/bin/sh
input=$(cat)
echo "${0##*/} $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME ${CNI_NETNS:-none}" >> DIR/calls
printf '%s\n' "$input" >> DIR/input.$CNI_COMMAND
env > DIR/env.$CNI_COMMAND
. DIR/behaviour
"#;

const GOOD: &str = r#"
if [ "$CNI_COMMAND" = ADD ]; then
    echo '{"cniVersion":"VERSION","interfaces":[{"name":"'$CNI_IFNAME'","mac":"02:00:00:00:00:01","sandbox":"/x"}],
        "ips":[{"address":"10.9.0.5/24","gateway":"10.9.0.1","interface":0},{"address":"fd09::5/64","interface":0}]}'
fi
"#;

/// Directories for everything, and the plugin in one of them.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        let lab = Lab { dir: tempfile::tempdir().unwrap() };
        for dir in ["bin", "conf"] {
            fs::create_dir(lab.path(dir)).unwrap();
        }
        lab.plugin("fake");
        lab.behave("1.0.0", GOOD);
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plugin(&self, name: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, PLUGIN.replace("DIR", self.dir.path().to_str().unwrap())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the plugin does from now on. By rename, as it may be running.
    fn behave(&self, version: &str, script: &str) {
        fs::write(self.path("behaviour.new"), script.replace("VERSION", version)).unwrap();
        fs::rename(self.path("behaviour.new"), self.path("behaviour")).unwrap();
    }

    fn network(&self, file: &str, name: &str, version: &str, plugins: Value) {
        let list = json!({"cniVersion": version, "name": name, "plugins": plugins});
        fs::write(self.path("conf.new"), list.to_string()).unwrap();
        fs::rename(self.path("conf.new"), self.path("conf").join(file)).unwrap();
    }

    fn usual(&self) {
        self.network("10-net.conflist", "net", "1.0.0", json!([{"type": "fake"}]));
    }

    fn config(&self) -> Config {
        Config {
            bin_dirs: vec![self.path("bin")],
            conf_dir: self.path("conf"),
            max_conf_num: 1,
            default_network: None,
            timeout: SOON,
            conf_template: None,
            ip_pref: IpPref::Ipv4,
            cache_dir: self.path("cache"),
        }
    }

    fn open(&self) -> Network {
        self.open_with(|_| {})
    }

    fn open_with(&self, change: impl FnOnce(&mut Config)) -> Network {
        let mut config = self.config();
        change(&mut config);
        Network::open(network::Config::Cni(config)).unwrap()
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn inputs(&self, command: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(&format!("input.{command}"))).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn remembers_nothing(&self) -> bool {
        fs::read_dir(self.path("cache")).is_ok_and(|mut entries| entries.next().is_none())
    }
}

fn pod(id: &str) -> Attachment {
    Attachment {
        pod_id: id.into(),
        name: "web-0".into(),
        namespace: "shop".into(),
        uid: "u-1".into(),
        netns: "/proc/self/ns/net".into(),
        ..Attachment::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[tokio::test]
async fn a_pod_is_added_checked_and_deleted() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    network.ready(SOON).await.unwrap();
    let attached = network.attach(&pod("a")).await.unwrap();
    assert_eq!(attached.ips, [ip("10.9.0.5"), ip("fd09::5")]);
    assert_eq!((attached.interface.as_str(), attached.mac.as_str()), ("eth0", "02:00:00:00:00:01"));
    assert_eq!(attached.result["ips"][0]["gateway"], "10.9.0.1");
    network.check(&pod("a"), Some(&attached)).await.unwrap();
    network.detach(&pod("a"), Some(&attached)).await.unwrap();
    assert_eq!(
        lab.calls(),
        [
            "fake ADD a eth0 /proc/self/ns/net",
            "fake CHECK a eth0 /proc/self/ns/net",
            "fake DEL a eth0 /proc/self/ns/net"
        ]
    );
    for command in ["CHECK", "DEL"] {
        assert_eq!(lab.inputs(command)[0]["prevResult"]["ips"][0]["address"], "10.9.0.5/24");
    }
    assert!(lab.inputs("ADD")[0].get("prevResult").is_none());
    assert!(lab.remembers_nothing());
    assert!(network.check(&pod("a"), None).await.is_err());
}

#[tokio::test]
async fn a_plugins_environment_is_clean() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    network.attach(&pod("a")).await.unwrap();
    let text = fs::read_to_string(lab.path("env.ADD")).unwrap();
    let mut names: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    // What the shell itself sets.
    names.retain(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name));
    names.sort();
    assert_eq!(
        names,
        ["CNI_ARGS", "CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "PATH"]
    );
    assert!(text.contains(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=u-1\n"
    ));
    network.detach(&pod("a"), None).await.unwrap();
}

#[tokio::test]
async fn plugins_are_chained_and_deleted_in_reverse() {
    let lab = Lab::new();
    lab.plugin("second");
    lab.network("10-net.conflist", "net", "1.0.0", json!([{"type": "fake"}, {"type": "second"}]));
    let network = lab.open();
    network.attach(&pod("a")).await.unwrap();
    network.detach(&pod("a"), None).await.unwrap();
    let calls = lab.calls();
    let order: Vec<&str> = calls.iter().map(|call| call.split(" a ").next().unwrap()).collect();
    assert_eq!(order, ["fake ADD", "second ADD", "second DEL", "fake DEL"]);
    assert_eq!(lab.inputs("ADD")[1]["prevResult"]["ips"][0]["address"], "10.9.0.5/24");
}

#[tokio::test]
async fn capabilities_go_to_the_plugins_that_declare_them() {
    let lab = Lab::new();
    lab.plugin("plain");
    let wanted = json!({"portMappings": true, "bandwidth": true, "ipRanges": true, "dns": true, "mac": true});
    lab.network(
        "10-net.conflist",
        "net",
        "1.0.0",
        json!([{"type": "fake", "capabilities": wanted}, {"type": "plain", "capabilities": {"dns": false}}]),
    );
    let network = lab.open();
    network.set_pod_cidr("10.9.0.0/24,fd09::/64").await.unwrap();
    let pod = Attachment {
        ports: vec![
            PortMapping {
                protocol: Protocol::Udp,
                container_port: 53,
                host_port: 5353,
                host_ip: Some(ip("127.0.0.1")),
            },
            PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 0, host_ip: None },
        ],
        bandwidth: Some(Bandwidth { ingress: Some(1_000_000), egress: None }),
        dns: Dns {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["svc".into()],
            options: vec!["ndots:5".into()],
        },
        ..pod("a")
    };
    network.attach(&pod).await.unwrap();
    network.detach(&pod, None).await.unwrap();
    let runtime = json!({
        "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}],
        "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": u32::MAX},
        "ipRanges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd09::/64"}]],
        "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
    });
    assert_eq!(lab.inputs("ADD")[0]["runtimeConfig"], runtime);
    assert!(lab.inputs("ADD")[1].get("runtimeConfig").is_none());
    assert_eq!(lab.inputs("DEL")[1]["runtimeConfig"], runtime, "DEL is told the same as ADD");
}

#[tokio::test]
async fn the_preferred_address_comes_first() {
    for (preference, first) in
        [(IpPref::Ipv4, "10.9.0.5"), (IpPref::Ipv6, "fd09::5"), (IpPref::Cni, "10.9.0.5")]
    {
        let lab = Lab::new();
        lab.usual();
        let network = lab.open_with(|config| config.ip_pref = preference);
        assert_eq!(network.attach(&pod("a")).await.unwrap().ips[0], ip(first));
        network.detach(&pod("a"), None).await.unwrap();
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_all_that_it_started() {
    let lab = Lab::new();
    lab.usual();
    lab.behave(
        "1.0.0",
        "sleep 1000 & echo $! $$ > DIR/pids; wait".replace("DIR", lab.dir.path().to_str().unwrap()).as_str(),
    );
    let network = lab.open_with(|config| config.timeout = Duration::from_millis(500));
    let begin = Instant::now();
    let error = network.attach(&pod("a")).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { command: "ADD", .. }), "{error}");
    assert!(begin.elapsed() < SOON);
    let pids = fs::read_to_string(lab.path("pids")).unwrap();
    until("the plugin and its child die", || !pids.split_whitespace().any(alive)).await;
    lab.behave("1.0.0", GOOD);
    network.detach(&pod("a"), None).await.unwrap();
    assert!(lab.remembers_nothing());
}

#[tokio::test]
async fn a_plugin_that_hangs_for_one_pod_keeps_no_other_waiting() {
    let lab = Lab::new();
    lab.usual();
    lab.behave("1.0.0", &format!("[ $CNI_CONTAINERID = stuck ] && exec sleep 1000; {GOOD}"));
    let network = lab.open();
    let stuck = pod("stuck");
    let mut hanging = Box::pin(network.attach(&stuck));
    let none = tokio::time::timeout(Duration::from_millis(300), &mut hanging).await;
    assert!(none.is_err());
    let begin = Instant::now();
    network.attach(&pod("b")).await.unwrap();
    network.status().unwrap();
    network.gc(&[]).await.unwrap();
    network.detach(&pod("b"), None).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    // A caller that goes away takes the plugin with it.
    drop(hanging);
    lab.behave("1.0.0", GOOD);
    network.detach(&pod("stuck"), None).await.unwrap();
}

#[tokio::test]
async fn a_plugin_that_misbehaves_is_an_error_that_says_how() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    for (script, expected) in [
        ("echo garbage", "CNI result of fake"),
        ("true", "CNI result of fake"),
        ("echo '{\"cniVersion\":\"1.0.0\",\"ips\":[]}'", "gave the pod no address"),
        ("dd if=/dev/zero bs=1M count=100 2>/dev/null", "wrote more than 1048576 bytes"),
        ("kill -9 $$", "signal: 9"),
        ("echo broken >&2; exit 3", "exit status: 3: broken"),
        ("dd if=/dev/zero bs=1M count=100 >&2; exit 3", "exit status: 3"),
        (
            "echo '{\"code\":11,\"msg\":\"try again\",\"details\":\"later\"}'; exit 1",
            "fake ADD: try again: later (code 11)",
        ),
        ("echo '{\"cniVersion\":\"9.9.9\"}'", "unknown CNI version"),
    ] {
        lab.behave("1.0.0", script);
        let begin = Instant::now();
        let error = network.attach(&pod("a")).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{script}: {error}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{script}: {:?}", begin.elapsed());
        lab.behave("1.0.0", GOOD);
        network.detach(&pod("a"), None).await.unwrap();
        assert!(lab.remembers_nothing(), "{script}");
    }
}

#[tokio::test]
async fn a_child_that_a_plugin_leaves_behind_is_not_waited_for() {
    let lab = Lab::new();
    lab.usual();
    let dir = lab.dir.path().to_str().unwrap();
    lab.behave("1.0.0", &format!("{GOOD} sleep 30 & echo $! >> {dir}/pids"));
    let network = lab.open();
    let begin = Instant::now();
    network.attach(&pod("a")).await.unwrap();
    network.detach(&pod("a"), None).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    for pid in fs::read_to_string(lab.path("pids")).unwrap().split_whitespace() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}

#[tokio::test]
async fn a_deletion_that_fails_is_remembered_until_it_succeeds() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    let attached = network.attach(&pod("a")).await.unwrap();
    lab.behave("1.0.0", "echo '{\"code\":100,\"msg\":\"not now\"}'; exit 1");
    for _ in 0..2 {
        let error = network.detach(&pod("a"), Some(&attached)).await.unwrap_err();
        assert!(matches!(error, Error::Plugin { command: "DEL", code: 100, .. }), "{error}");
    }
    drop(network);
    // A new daemon, and the configuration is gone meanwhile.
    fs::remove_dir_all(lab.path("conf")).unwrap();
    lab.behave("1.0.0", GOOD);
    let network = lab.open();
    assert!(network.status().is_err());
    network.detach(&pod("a"), Some(&attached)).await.unwrap();
    let calls = lab.calls().len();
    assert!(lab.remembers_nothing());
    network.detach(&pod("a"), Some(&attached)).await.unwrap();
    assert_eq!(lab.calls().len(), calls, "nothing is left to do");
}

#[tokio::test]
async fn an_addition_that_failed_half_way_is_deleted_in_full() {
    let lab = Lab::new();
    lab.plugin("second");
    lab.network("10-net.conflist", "net", "1.0.0", json!([{"type": "fake"}, {"type": "second"}]));
    lab.behave("1.0.0", &format!("case $0 in */second) [ $CNI_COMMAND = ADD ] && exit 1;; esac; {GOOD}"));
    let network = lab.open();
    assert!(network.attach(&pod("a")).await.is_err());
    assert!(network.check(&pod("a"), None).await.is_err());
    network.detach(&pod("a"), None).await.unwrap();
    let calls = lab.calls();
    assert!(calls[2].starts_with("second DEL") && calls[3].starts_with("fake DEL"), "{calls:?}");
    assert!(lab.inputs("DEL")[0].get("prevResult").is_none());
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_an_empty_path() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    let pinned = lab.path("ns");
    netns::create(&pinned).unwrap();
    let pod = Attachment { netns: pinned.clone(), ..pod("a") };
    network.attach(&pod).await.unwrap();
    netns::remove(&pinned).unwrap();
    network.detach(&pod, None).await.unwrap();
    assert_eq!(lab.calls()[1], "fake DEL a eth0 none");
}

#[tokio::test]
async fn without_a_record_of_our_own_the_daemons_memory_serves() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    let attached = network.attach(&pod("a")).await.unwrap();
    fs::remove_dir_all(lab.path("cache")).unwrap();
    network.check(&pod("a"), Some(&attached)).await.unwrap();
    network.detach(&pod("a"), Some(&attached)).await.unwrap();
    assert_eq!(lab.inputs("DEL")[0]["prevResult"]["ips"][0]["address"], "10.9.0.5/24");
    let calls = lab.calls().len();
    network.detach(&pod("never"), None).await.unwrap();
    assert_eq!(lab.calls().len(), calls);
}

#[tokio::test]
async fn the_configuration_is_followed_as_it_comes_changes_goes_and_returns() {
    let lab = Lab::new();
    fs::remove_dir(lab.path("conf")).unwrap();
    let network = lab.open();
    assert!(network.status().unwrap_err().contains("no network configuration"));
    assert!(matches!(network.attach(&pod("a")).await, Err(Error::NotReady(_))));
    fs::create_dir(lab.path("conf")).unwrap();
    lab.usual();
    network.ready(SOON).await.unwrap();
    network.attach(&pod("a")).await.unwrap();
    // Another network comes in front.
    lab.network("00-other.conflist", "other", "1.0.0", json!([{"type": "fake"}]));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    network.attach(&pod("b")).await.unwrap();
    let names: Vec<Value> = lab.inputs("ADD").iter().map(|input| input["name"].clone()).collect();
    assert_eq!(names, ["net", "other"]);
    // The directory goes, as a whole, and comes back as another one.
    fs::rename(lab.path("conf"), lab.path("away")).unwrap();
    until("the network goes", || network.status().is_err()).await;
    fs::write(lab.path("away/00-other.conflist"), "{ cut").unwrap();
    fs::rename(lab.path("away"), lab.path("conf")).unwrap();
    until("the bad file is named", || network.status().is_err_and(|e| e.contains("00-other.conflist"))).await;
    fs::remove_file(lab.path("conf/00-other.conflist")).unwrap();
    network.ready(SOON).await.unwrap();
    for id in ["a", "b"] {
        network.detach(&pod(id), None).await.unwrap();
    }
    let names: Vec<Value> = lab.inputs("DEL").iter().map(|input| input["name"].clone()).collect();
    assert_eq!(names, ["net", "other"], "each leaves the network that it was on");
}

#[tokio::test]
async fn a_changed_setting_is_taken_over() {
    let lab = Lab::new();
    lab.usual();
    lab.network("20-late.conflist", "late", "1.0.0", json!([{"type": "fake"}]));
    let network = lab.open();
    network.ready(SOON).await.unwrap();
    let mut config = lab.config();
    config.default_network = Some("late".into());
    network.reconfigure(network::Config::Cni(config)).unwrap();
    let begin = Instant::now();
    loop {
        network.attach(&pod("a")).await.unwrap();
        network.detach(&pod("a"), None).await.unwrap();
        if lab.inputs("ADD").last().unwrap()["name"] == "late" {
            break;
        }
        assert!(begin.elapsed() < SOON);
    }
    assert!(network.reconfigure(network::Config::Bridge(network::bridge::Config::default())).is_err());
}

#[tokio::test]
async fn a_pod_can_be_on_several_networks() {
    let lab = Lab::new();
    lab.plugin("second");
    lab.network("10-one.conflist", "one", "1.0.0", json!([{"type": "fake"}]));
    lab.network("20-two.conflist", "two", "1.0.0", json!([{"type": "second"}]));
    let network = lab.open_with(|config| config.max_conf_num = 2);
    let attached = network.attach(&pod("a")).await.unwrap();
    assert_eq!(attached.interface, "eth0");
    lab.behave("1.0.0", &format!("case $0 in */second) exit 1;; esac; {GOOD}"));
    assert!(network.detach(&pod("a"), None).await.is_err());
    assert!(
        lab.calls().last().unwrap().starts_with("fake DEL a eth0"),
        "one that stays does not keep the other"
    );
    lab.behave("1.0.0", GOOD);
    network.detach(&pod("a"), None).await.unwrap();
    assert!(lab.calls().last().unwrap().starts_with("second DEL a eth1"));
    assert!(lab.remembers_nothing());
}

#[tokio::test]
async fn status_is_what_the_plugins_say() {
    let lab = Lab::new();
    lab.network("10-net.conflist", "net", "1.1.0", json!([{"type": "fake"}]));
    lab.behave("1.1.0", "echo '{\"code\":50,\"msg\":\"no uplink\"}'; exit 1");
    let network = lab.open();
    assert!(network.status().is_err(), "not well before it was asked");
    until("the plugin is heard", || network.status().is_err_and(|e| e.contains("no uplink"))).await;
    lab.behave("1.1.0", GOOD);
    network.ready(SOON).await.unwrap();
    let input = &lab.inputs("STATUS")[0];
    assert_eq!((&input["name"], &input["cniVersion"]), (&json!("net"), &json!("1.1.0")));
    let environment = fs::read_to_string(lab.path("env.STATUS")).unwrap();
    assert!(!environment.contains("CNI_CONTAINERID") && environment.contains("CNI_PATH"));
}

#[tokio::test]
async fn a_plugin_that_is_missing_or_not_to_be_trusted_is_not_run() {
    let lab = Lab::new();
    lab.network("10-net.conflist", "net", "1.0.0", json!([{"type": "absent"}]));
    let network = lab.open();
    until("the status says so", || network.status().is_err_and(|e| e.contains("absent: not found in"))).await;
    assert!(matches!(network.attach(&pod("a")).await, Err(Error::Binary { .. })));
    lab.plugin("absent");
    fs::set_permissions(lab.path("bin/absent"), fs::Permissions::from_mode(0o777)).unwrap();
    let error = network.attach(&pod("a")).await.unwrap_err().to_string();
    assert!(error.contains("writable by others"), "{error}");
    fs::set_permissions(lab.path("bin/absent"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(lab.path("bin/absent"), Some(1000), None).unwrap();
    let error = network.attach(&pod("a")).await.unwrap_err().to_string();
    assert!(error.contains("owned by user 1000"), "{error}");
    assert_eq!(lab.calls(), Vec::<String>::new());
}

#[tokio::test]
async fn what_no_pod_owns_is_collected() {
    let lab = Lab::new();
    lab.network("10-net.conflist", "net", "1.1.0", json!([{"type": "fake"}]));
    lab.behave("1.1.0", GOOD);
    let network = lab.open();
    for id in ["live", "dead"] {
        network.attach(&pod(id)).await.unwrap();
    }
    network.gc(&[]).await.unwrap();
    assert!(!lab.calls().iter().any(|call| call.contains("DEL")), "who attached them knows better");
    drop(network);
    let network = lab.open();
    network.attach(&pod("new")).await.unwrap();
    network.gc(&["live".to_owned()]).await.unwrap();
    let deleted: Vec<String> = lab.calls().into_iter().filter(|call| call.contains("DEL")).collect();
    assert_eq!(deleted, ["fake DEL dead eth0 /proc/self/ns/net"]);
    let valid = &lab.inputs("GC").pop().unwrap()["cni.dev/valid-attachments"];
    let mut valid: Vec<&str> =
        valid.as_array().unwrap().iter().map(|v| v["containerID"].as_str().unwrap()).collect();
    valid.sort();
    assert_eq!(valid, ["live", "new"]);
    for id in ["live", "new"] {
        network.detach(&pod(id), None).await.unwrap();
    }
}

#[tokio::test]
async fn collecting_waits_for_nobody_and_nobody_is_forgotten() {
    let lab = Lab::new();
    lab.network("10-net.conflist", "net", "1.1.0", json!([{"type": "fake"}]));
    lab.behave("1.1.0", &format!("[ $CNI_COMMAND = ADD ] && sleep 1; {GOOD}"));
    let network = lab.open();
    let a = pod("a");
    let (attached, ()) = tokio::join!(network.attach(&a), async {
        until("ADD runs", || lab.calls().iter().any(|call| call.contains("ADD"))).await;
        network.gc(&[]).await.unwrap();
    });
    attached.unwrap();
    assert!(!lab.calls().iter().any(|call| call.contains("GC")), "not while a pod is being added");
    network.gc(&[]).await.unwrap();
    assert!(lab.calls().iter().any(|call| call.contains("GC")));
    network.detach(&pod("a"), None).await.unwrap();
}

#[tokio::test]
async fn a_template_is_filled_while_there_is_no_other_network() {
    let lab = Lab::new();
    let template = lab.path("template");
    fs::write(
        &template,
        r#"{"cniVersion":"1.0.0","name":"made","plugins":[{"type":"fake","subnet":"{{.PodCIDR}}"}]}"#,
    )
    .unwrap();
    let network = lab.open_with(|config| config.conf_template = Some(template.clone()));
    assert!(network.set_pod_cidr("nonsense").await.is_err());
    network.set_pod_cidr("").await.unwrap();
    network.set_pod_cidr("10.9.0.0/24").await.unwrap();
    network.attach(&pod("a")).await.unwrap();
    assert_eq!(lab.inputs("ADD")[0]["subnet"], "10.9.0.0/24");
    network.set_pod_cidr("10.8.0.0/24").await.unwrap();
    network.attach(&pod("b")).await.unwrap();
    assert_eq!(lab.inputs("ADD")[1]["subnet"], "10.8.0.0/24");
    for id in ["a", "b"] {
        network.detach(&pod(id), None).await.unwrap();
    }
    let other = Lab::new();
    other.usual();
    let network = other.open_with(|config| config.conf_template = Some(template));
    network.set_pod_cidr("10.9.0.0/24").await.unwrap();
    assert_eq!(fs::read_dir(other.path("conf")).unwrap().count(), 1);
}

#[tokio::test]
async fn ids_and_names_cannot_smuggle_arguments_or_paths() {
    let lab = Lab::new();
    lab.usual();
    let network = lab.open();
    for id in ["", "../x", "a/b", "-a", "a;b", "a b"] {
        assert!(matches!(network.attach(&pod(id)).await, Err(Error::Attachment { .. })), "{id:?}");
        assert!(matches!(network.detach(&pod(id), None).await, Err(Error::Attachment { .. })), "{id:?}");
    }
    let named = Attachment { name: "x;IgnoreUnknown=0".into(), ..pod("a") };
    assert!(matches!(network.attach(&named).await, Err(Error::Attachment { .. })));
    assert_eq!(lab.calls(), Vec::<String>::new());
}

/// Runs a test on a host of its own: a network namespace that goes with the test.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F + Send) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host");
    netns::create(&path).unwrap();
    let _unpin = Unpin(path.clone());
    netns::run(&path, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let test = test(dir.path().to_owned());
            tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test hangs");
        });
    })
    .unwrap();
}

struct Unpin(PathBuf);

impl Drop for Unpin {
    fn drop(&mut self) {
        let _ = netns::remove(&self.0);
    }
}

fn serve(netns: &Path, name: &'static str) {
    let listener = netns::run(netns, || TcpListener::bind("0.0.0.0:80").unwrap()).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(name.as_bytes());
        }
    });
}

fn ask(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn links() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

#[test]
fn real_plugins_connect_real_pods() {
    let bin = PathBuf::from("/usr/lib/cni");
    assert!(bin.join("bridge").exists(), "this test needs the package containernetworking-plugins");
    on_a_host(async |dir: PathBuf| {
        fs::create_dir(dir.join("conf")).unwrap();
        let list = json!({"cniVersion": "1.0.0", "name": "real", "plugins": [
            {"type": "bridge", "bridge": "cni-test", "isGateway": true, "ipMasq": true, "hairpinMode": true,
             "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.99.0.0/24"}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "tuning", "dataDir": dir.join("tuning"), "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}},
            {"type": "firewall"},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
            {"type": "portmap", "capabilities": {"portMappings": true}}
        ]});
        fs::write(dir.join("conf/10-real.conflist"), list.to_string()).unwrap();
        let cni = Cni::open(Config {
            bin_dirs: vec![bin],
            conf_dir: dir.join("conf"),
            cache_dir: dir.join("cache"),
            ..Config::default()
        })
        .unwrap();
        let mut pods = Vec::new();
        for (id, ports) in [
            ("a", vec![PortMapping { container_port: 80, host_port: 8080, ..PortMapping::default() }]),
            ("b", vec![]),
        ] {
            let netns = dir.join(id);
            netns::create(&netns).unwrap();
            let bandwidth = Some(Bandwidth { ingress: Some(100_000_000), egress: None });
            let pod = Attachment { netns: netns.clone(), ports, bandwidth, ..pod(id) };
            let attached = cni.attach(&pod).await.unwrap();
            pods.push((pod, attached, Unpin(netns)));
        }
        let (a, b) = (&pods[0], &pods[1]);
        assert_eq!(a.1.ips, [ip("10.99.0.2")]);
        assert_eq!(a.1.mac.len(), 17);
        serve(&a.0.netns, "a");
        let to = |ip: IpAddr, port| SocketAddr::new(ip, port);
        assert_eq!(netns::run(&b.0.netns, || ask(to(a.1.ips[0], 80))).unwrap().unwrap(), "a");
        assert_eq!(ask(to(a.1.ips[0], 80)).unwrap(), "a", "the host");
        assert_eq!(ask(to(ip("127.0.0.1"), 8080)).unwrap(), "a", "the host's port");
        assert_eq!(netns::run(&b.0.netns, || ask(to(ip("10.99.0.1"), 8080))).unwrap().unwrap(), "a");
        // The other one has a host port, and portmap 1.1 looks for that in ip6tables too, whatever the pod has.
        cni.check(&b.0, Some(&b.1)).await.unwrap();
        // One leaves properly, the other one after its namespace is gone.
        cni.detach(&a.0, Some(&a.1)).await.unwrap();
        assert!(ask(to(ip("127.0.0.1"), 8080)).is_err());
        netns::remove(&b.0.netns).unwrap();
        cni.detach(&b.0, Some(&b.1)).await.unwrap();
        cni.detach(&b.0, Some(&b.1)).await.unwrap();
        assert!(!dir.join("ipam/real/10.99.0.2").exists() && !dir.join("ipam/real/10.99.0.3").exists());
        let begin = Instant::now();
        while links().iter().any(|name| name.starts_with("veth")) {
            assert!(begin.elapsed() < SOON, "{:?}", links());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(fs::read_dir(dir.join("cache")).unwrap().next().is_none());
    });
}
