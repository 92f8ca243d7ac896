//! What a pod sees of the network and the network of the pod, with the built-in bridge and with CNI plugins.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{Reply, host_pod, pod};
use runtime_tests::daemon::Network;
use runtime_tests::image::catalog;
use runtime_tests::registry::free_port;
use runtime_tests::{http, run};

async fn bed(network: Network) -> Result<Bed> {
    let bed = Bed::with(catalog::ensure()?, |options| options.network = network).await?;
    bed.client.pull(catalog::SMALL).await?;
    Ok(bed)
}

fn cni() -> Network {
    Network::Cni(PathBuf::from("/usr/lib/cni"))
}

const SERVE: &str =
    "mkdir /tmp/www; echo page of $(hostname) > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";

/// A page, once the server is up.
fn page(to: SocketAddr) -> Result<String> {
    run::until(&format!("a page from {to}"), Duration::from_secs(15), || {
        Ok(Some(http::Request::new("GET", "/").send(to)?.text().trim().to_owned()))
    })
}

async fn address(bed: &Bed, id: &str) -> Result<IpAddr> {
    let network = bed.client.pod_status(id).await?.network.context("the status has no network")?;
    network.ip.parse().with_context(|| format!("{:?} is no address", network.ip))
}

async fn pods_reach_each_other_the_host_and_host_ports(network: Network) -> Result<()> {
    let mut bed = bed(network).await?;
    let before = bed.daemon.traces();
    let port = free_port()?;
    let mut config = pod("server");
    config.port_mappings = vec![
        PortMapping { container_port: 8080, host_port: i32::from(port), ..PortMapping::default() },
        PortMapping { container_port: 8080, host_port: 0, ..PortMapping::default() },
    ];
    let server = bed.run(config).await?;
    let id = server.start("web", SERVE).await?;
    let ip = address(&bed, &server.id).await?;
    assert_eq!(page(SocketAddr::new(ip, 8080))?, "page of server");
    // From the host by its own loopback address, which takes route_localnet and a masquerade.
    assert_eq!(page(SocketAddr::from(([127, 0, 0, 1], port)))?, "page of server");

    let client = bed.pod("client").await?;
    let other = client.start("c", "exec sleep 1000").await?;
    ensure!(address(&bed, &client.id).await? != ip, "two pods have one address");
    let fetched = bed.client.sh(&other, &format!("wget -qO- http://{ip}:8080/")).await?;
    assert_eq!(fetched, "page of server");
    // A pod reaches a host port too, by the gateway's address.
    let gateway = bed.client.sh(&other, "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").await?;
    assert_eq!(
        bed.client.sh(&other, &format!("wget -qO- http://{gateway}:{port}/")).await?,
        "page of server"
    );
    assert_eq!(
        bed.client.sh(&id, "cat /sys/class/net/lo/operstate /sys/class/net/eth0/operstate").await?,
        "unknown\nup"
    );
    assert_eq!(bed.client.sh(&id, "wget -qO- http://127.0.0.1:8080/").await?, "page of server");

    bed.client.stop_pod(&server.id).await?;
    ensure!(
        TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_millis(500))
            .is_err()
    );
    server.remove().await?;
    client.remove().await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn on_the_built_in_bridge_pods_reach_each_other_the_host_and_host_ports() -> Result<()> {
    pods_reach_each_other_the_host_and_host_ports(Network::Bridge).await
}

#[tokio::test]
async fn with_cni_plugins_pods_reach_each_other_the_host_and_host_ports() -> Result<()> {
    pods_reach_each_other_the_host_and_host_ports(cni()).await
}

#[tokio::test]
async fn addresses_are_given_back_and_used_again() -> Result<()> {
    for network in [Network::Bridge, cni()] {
        let bed = bed(network).await?;
        // More pods than a /24 has addresses, eight at a time, would run out if any were lost.
        for round in 0..34 {
            let pods = futures_util::future::try_join_all((0..8).map(|n| {
                let client = bed.client.clone();
                async move {
                    let config = pod(&format!("address{round}-{n}"));
                    let id = client.run_pod(&config).await?;
                    client.stop_pod(&id).await?;
                    client.remove_pod(&id).await
                }
            }));
            pods.await.with_context(|| format!("round {round}"))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_on_the_hosts_network_sees_the_hosts_links_and_name() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("host").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let links = bed.client.sh(&id, "ls /sys/class/net").await?;
    ensure!(links.split_whitespace().any(|l| l == "lo"), "{links}");
    let inside = bed.client.sh(&id, "readlink /proc/self/ns/net").await?;
    assert_eq!(inside, std::fs::read_link("/proc/self/ns/net")?.display().to_string());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    assert_eq!(bed.client.sh(&id, "hostname").await?, host.trim());
    assert!(bed.client.pod_status(&pod.id).await?.network.is_none_or(|n| n.ip.is_empty()));
    Ok(())
}

#[tokio::test]
async fn resolver_hostname_and_sysctls_are_the_pods() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = pod("named");
    config.hostname = "front-7".into();
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
        options: vec!["ndots:5".into(), "edns0".into()],
    });
    config.linux.get_or_insert_default().sysctls = HashMap::from([
        ("net.ipv4.ip_local_port_range".to_owned(), "2000 3000".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ("fs.mqueue.msg_max".to_owned(), "100".to_owned()),
    ]);
    let pod = bed.run(config).await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let resolver = bed.client.sh(&id, "cat /etc/resolv.conf").await?;
    for line in
        ["nameserver 10.96.0.10", "search default.svc.cluster.local cluster.local", "options ndots:5 edns0"]
    {
        ensure!(resolver.lines().any(|l| l == line), "resolv.conf is {resolver:?}");
    }
    assert_eq!(bed.client.sh(&id, "hostname; cat /etc/hostname").await?, "front-7\nfront-7");
    assert_eq!(bed.client.sh(&id, "cat /proc/sys/net/ipv4/ip_local_port_range").await?, "2000\t3000");
    assert_eq!(
        bed.client.sh(&id, "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max").await?,
        "1\n100"
    );
    assert_eq!(bed.client.sh(&id, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await?, "0");
    // Without a configuration of its own a pod has the host's.
    let plain = bed.pod("plain").await?.start("c", "exec sleep 1000").await?;
    let host = std::fs::read_to_string("/etc/resolv.conf")?;
    assert_eq!(bed.client.sh(&plain, "cat /etc/resolv.conf").await?, host.trim_end_matches('\n'));
    Ok(())
}

#[tokio::test]
async fn containers_of_a_pod_share_localhost_and_ipc_but_not_processes() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.pod("shared").await?;
    let web = pod.start("web", SERVE).await?;
    let other = pod.start("other", "exec sleep 1000").await?;
    let until = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.05; done";
    assert_eq!(bed.client.sh(&other, until).await?, "page of shared");
    let namespace = |name: &str| format!("readlink /proc/self/ns/{name}");
    for name in ["net", "ipc", "uts"] {
        assert_eq!(
            bed.client.sh(&web, &namespace(name)).await?,
            bed.client.sh(&other, &namespace(name)).await?
        );
    }
    for name in ["pid", "mnt", "cgroup"] {
        assert_ne!(
            bed.client.sh(&web, &namespace(name)).await?,
            bed.client.sh(&other, &namespace(name)).await?
        );
    }
    bed.client.sh(&web, "echo through memory > /dev/shm/note").await?;
    assert_eq!(bed.client.sh(&other, "cat /dev/shm/note").await?, "through memory");
    Ok(())
}

#[tokio::test]
async fn without_a_cni_configuration_only_host_network_pods_run() -> Result<()> {
    let bed = bed(cni()).await?;
    let conf = bed.daemon.dir().join("net.d/10-crisp.conflist");
    let kept = std::fs::read(&conf)?;
    std::fs::remove_file(&conf)?;
    let ready = || async {
        let status = bed.client.runtime_status().await?.status.context("no status")?;
        let network =
            status.conditions.into_iter().find(|c| c.r#type == "NetworkReady").context("no condition")?;
        Ok::<_, anyhow::Error>((network.status, network.message))
    };
    let wait = |wanted: bool| async move {
        for _ in 0..500 {
            if ready().await?.0 == wanted {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::bail!("NetworkReady is never {wanted}")
    };
    wait(false).await?;
    ensure!(!ready().await?.1.is_empty(), "not ready, and no message says why");
    bed.run(host_pod("unaffected")).await?.start("c", "true").await?;
    std::fs::write(&conf, kept)?;
    wait(true).await?;
    bed.pod("again").await?;
    Ok(())
}

/// Fails to add, and has nothing to delete.
const BROKEN: &str = r#"#!/bin/sh
case "$CNI_COMMAND" in
ADD) echo '{"cniVersion":"1.0.0","code":100,"msg":"broken on purpose"}'; exit 1;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
esac
"#;

#[tokio::test]
async fn a_plugin_that_fails_fails_the_pod_and_leaves_nothing() -> Result<()> {
    let plugins = tempfile::tempdir()?;
    for plugin in ["bridge", "host-local", "portmap"] {
        std::os::unix::fs::symlink(Path::new("/usr/lib/cni").join(plugin), plugins.path().join(plugin))?;
    }
    let broken = plugins.path().join("broken");
    std::fs::write(&broken, BROKEN)?;
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755))?;
    let mut bed = bed(Network::Cni(plugins.path().to_owned())).await?;
    let conf = bed.daemon.dir().join("net.d/10-crisp.conflist");
    let good = std::fs::read_to_string(&conf)?;
    let before = bed.daemon.traces();
    // The link is made, an address is taken, and then the chain breaks.
    let bad = good.replace("\"portmap\"", "\"broken\"");
    ensure!(bad != good, "the configuration has no portmap");
    std::fs::write(&conf, bad)?;
    let refused = eventually(&bed, |outcome| outcome.is_err()).await?;
    ensure!(
        refused.err().is_some_and(|s| s.message().contains("broken on purpose")),
        "the cause is not told"
    );
    std::fs::write(&conf, good)?;
    eventually(&bed, |outcome| outcome.is_ok()).await?.context("a pod on the repaired network")?;
    bed.client.remove_all_pods().await?;
    bed.nothing_left(&before)
}

/// Runs pods until one comes out as wanted: a changed configuration is noticed in a moment, not at once.
async fn eventually(bed: &Bed, wanted: impl Fn(&Reply<String>) -> bool) -> Result<Reply<String>> {
    for number in 0..250 {
        let outcome = bed.client.run_pod(&pod(&format!("try{number}"))).await;
        if wanted(&outcome) {
            return Ok(outcome);
        }
        bed.client.remove_all_pods().await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    anyhow::bail!("the configuration was never taken over")
}
