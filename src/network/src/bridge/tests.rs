//! The bridge on a real kernel. Every test has a host of its own, a fresh network namespace, and so cannot harm the
//! machine or another test; and looks at its end whether anything was left in it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;

use super::*;

const SOON: Duration = Duration::from_secs(5);

/// A host with a bridge, and a directory for everything.
struct Host {
    dir: tempfile::TempDir,
    bridge: Bridge,
}

impl Host {
    /// Runs a test on a host of its own. When it is done nothing may be left.
    fn run(subnets: &str, test: impl AsyncFnOnce(&Host) + Send) {
        Host::with(subnets, true, test);
    }

    fn with(subnets: &str, masquerade: bool, test: impl AsyncFnOnce(&Host) + Send) {
        let dir = tempfile::tempdir().unwrap();
        let namespace = dir.path().join("host");
        let _unpin = Unpin(vec![namespace.clone()]);
        netns::create(&namespace).unwrap();
        netns::run(&namespace, move || {
            let bridge = Bridge::open(config(dir.path(), "br0", subnets, masquerade)).unwrap();
            let host = Host { dir, bridge };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::time::timeout(Duration::from_secs(60), test(&host)).await.expect("the test hangs");
                assert!(host.bridge.teardown().await.unwrap(), "a pod is left");
                host.is_clean();
            });
        })
        .unwrap();
    }

    fn is_clean(&self) {
        let links = links().into_iter().filter(|name| name.starts_with(WIRE) || name.starts_with("br"));
        assert_eq!(links.collect::<Vec<_>>(), Vec::<String>::new());
        assert_eq!(tables(), Vec::<String>::new());
        let left = fs::read_dir(self.dir.path().join("state/br0")).unwrap();
        let left = left.map(|entry| entry.unwrap().file_name()).filter(|name| name != "subnets");
        assert_eq!(left.collect::<Vec<_>>(), Vec::<std::ffi::OsString>::new());
    }

    async fn pod(&self, id: &str, ports: &[PortMapping]) -> Pod {
        let pod = Pod::new(&self.dir, id, ports);
        pod.attach(&self.bridge).await
    }
}

fn config(dir: &Path, name: &str, subnets: &str, masquerade: bool) -> Config {
    let subnets = if subnets.is_empty() { Vec::new() } else { subnet::list(subnets).unwrap() };
    Config { name: name.into(), subnets, mtu: None, masquerade, state_dir: dir.join("state") }
}

/// Removes pinned namespaces in the end, however the test ends.
struct Unpin(Vec<PathBuf>);

impl Drop for Unpin {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = netns::remove(path);
        }
    }
}

struct Pod {
    attachment: Attachment,
    attached: Attached,
    _unpin: Unpin,
}

impl Pod {
    fn new(dir: &tempfile::TempDir, id: &str, ports: &[PortMapping]) -> Pod {
        let path = dir.path().join(format!("ns-{id}"));
        netns::create(&path).unwrap();
        let attachment = Attachment {
            pod_id: id.into(),
            netns: path.clone(),
            ports: ports.to_vec(),
            ..Attachment::default()
        };
        Pod { attachment, attached: Attached::default(), _unpin: Unpin(vec![path]) }
    }

    async fn attach(mut self, bridge: &Bridge) -> Pod {
        self.attached = bridge.attach(&self.attachment).await.unwrap();
        self
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run(&self.attachment.netns, work).unwrap()
    }

    fn ip(&self) -> IpAddr {
        self.attached.ips[0]
    }

    /// Serves its own name, and who asked for it, to all who connect.
    fn serve(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind(("::", port)).unwrap());
        serve(listener, &self.attachment.pod_id);
    }
}

fn serve(listener: TcpListener, name: &str) {
    let name = name.to_owned();
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let answer = format!("{name} {}", from.ip().to_canonical());
            if stream.write_all(answer.as_bytes()).is_err() || name == "quit" {
                return;
            }
        }
    });
}

fn ask(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Echoes its own name for every datagram.
fn serve_udp(pod: &Pod, port: u16) {
    let socket = pod.inside(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
    let name = pod.attachment.pod_id.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn port(host_port: u16, protocol: Protocol, host_ip: &str) -> PortMapping {
    PortMapping { protocol, container_port: 80, host_port, host_ip: host_ip.parse().ok() }
}

fn tcp(host_port: u16) -> PortMapping {
    port(host_port, Protocol::Tcp, "")
}

fn links() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// The nftables tables of this host.
fn tables() -> Vec<String> {
    ["br0", "br1"]
        .into_iter()
        .filter(|name| Table::of(name).unwrap().exists().unwrap())
        .map(str::to_owned)
        .collect()
}

/// A second machine, connected to the host by a wire: 192.0.2.1 is the host, 192.0.2.2 the machine.
fn outside(host: &Host) -> (PathBuf, Unpin) {
    let path = host.dir.path().join("outside");
    netns::create(&path).unwrap();
    let unpin = Unpin(vec![path.clone()]);
    let namespace = netns::open(&path).unwrap();
    let wire = Wire { name: "up0", netns: &namespace, mac: [2, 0, 0, 0, 0, 9], mtu: None };
    let mut socket = Socket::route().unwrap();
    link::add_wire(&mut socket, &wire).unwrap();
    let index = link::find(&mut socket, "up0").unwrap().unwrap().header.index;
    let address = link::address(index, ip("192.0.2.1"), 24);
    socket.request(RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE | NLM_F_EXCL).unwrap();
    netns::run(&path, || {
        link::configure(&mut Socket::route().unwrap(), &[(ip("192.0.2.2"), 24, ip("192.0.2.1"))]).unwrap();
    })
    .unwrap();
    (path, unpin)
}

#[test]
fn pods_reach_each_other_and_the_host() {
    Host::run("10.77.0.0/24,fd77::/64", async |host| {
        let a = host.pod("a", &[]).await;
        let b = host.pod("b", &[]).await;
        assert_eq!(a.attached.ips, [ip("10.77.0.2"), ip("fd77::2")]);
        b.serve(80);
        for ip in &b.attached.ips {
            assert!(a.inside(|| ask(at(*ip, 80))).unwrap().starts_with("b "), "{ip}");
            assert!(ask(at(*ip, 80)).unwrap().starts_with("b "), "the host asks {ip}");
        }
        serve(TcpListener::bind(("::", 81)).unwrap(), "host");
        for gateway in ["10.77.0.1", "fd77::1"] {
            assert!(a.inside(|| ask(at(ip(gateway), 81))).unwrap().starts_with("host "), "{gateway}");
        }
        host.bridge.check(&a.attachment).await.unwrap();
        for pod in [a, b] {
            host.bridge.detach(&pod.attachment).await.unwrap();
            assert!(host.bridge.check(&pod.attachment).await.is_err());
        }
    });
}

#[test]
fn a_pod_has_its_address_name_and_default_route() {
    Host::run("10.77.0.0/24", async |host| {
        let pod = host.pod("a", &[]).await;
        assert_eq!(pod.attached.interface, "eth0");
        assert_eq!(pod.attached.mac, "0a:58:0a:4d:00:02");
        let (mac, route) = pod.inside(|| {
            let link = link::find(&mut Socket::route().unwrap(), "eth0").unwrap().unwrap();
            let route = fs::read_to_string("/proc/thread-self/net/route").unwrap();
            let mac = link.attributes.into_iter().find_map(|attribute| match attribute {
                netlink_packet_route::link::LinkAttribute::Address(mac) => Some(mac),
                _ => None,
            });
            (mac.unwrap(), route)
        });
        assert_eq!(mac, [0x0a, 0x58, 10, 77, 0, 2]);
        assert!(route.lines().any(|line| line.starts_with("eth0\t00000000\t01004D0A")), "{route}");
        host.bridge.detach(&pod.attachment).await.unwrap();
    });
}

#[test]
fn a_pod_meets_the_world_under_the_hosts_address() {
    for (masquerade, seen) in [(true, "192.0.2.1"), (false, "10.77.0.2")] {
        Host::with("10.77.0.0/24", masquerade, async |host| {
            let (outside, _unpin) = outside(host);
            serve(netns::run(&outside, || TcpListener::bind("192.0.2.2:80").unwrap()).unwrap(), "world");
            let pod = host.pod("a", &[]).await;
            assert_eq!(pod.inside(|| ask(at(ip("192.0.2.2"), 80))).unwrap(), format!("world {seen}"));
            host.bridge.detach(&pod.attachment).await.unwrap();
        });
    }
}

#[test]
fn a_host_port_leads_to_the_pod_from_everywhere() {
    Host::run("10.77.0.0/24", async |host| {
        let (outside, _unpin) = outside(host);
        let a = host.pod("a", &[tcp(8080)]).await;
        let b = host.pod("b", &[]).await;
        a.serve(80);
        assert_eq!(ask(at(ip("127.0.0.1"), 8080)).unwrap(), "a 10.77.0.1", "the host's loopback");
        assert!(ask(at(ip("192.0.2.1"), 8080)).unwrap().starts_with("a "), "the host's own address");
        let far = netns::run(&outside, || ask(at(ip("192.0.2.1"), 8080))).unwrap();
        assert_eq!(far.unwrap(), "a 192.0.2.2", "from outside, and the pod sees who asks");
        assert!(b.inside(|| ask(at(ip("192.0.2.1"), 8080))).unwrap().starts_with("a "), "another pod");
        assert!(a.inside(|| ask(at(ip("192.0.2.1"), 8080))).unwrap().starts_with("a "), "the pod itself");
        host.bridge.detach(&a.attachment).await.unwrap();
        assert!(ask(at(ip("192.0.2.1"), 8080)).is_err(), "closed with the pod");
        host.bridge.detach(&b.attachment).await.unwrap();
    });
}

#[test]
fn a_host_port_can_be_for_one_address_only() {
    Host::run("10.77.0.0/24", async |host| {
        let (outside, _unpin) = outside(host);
        let a = host.pod("a", &[port(8080, Protocol::Tcp, "127.0.0.1")]).await;
        let b = host.pod("b", &[port(8080, Protocol::Tcp, "192.0.2.1")]).await;
        a.serve(80);
        b.serve(80);
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "));
        assert!(ask(at(ip("192.0.2.1"), 8080)).unwrap().starts_with("b "));
        assert!(netns::run(&outside, || ask(at(ip("192.0.2.1"), 8080))).unwrap().unwrap().starts_with("b "));
        for pod in [a, b] {
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

#[test]
fn host_ports_work_over_ipv6() {
    Host::run("10.77.0.0/24,fd77::/64", async |host| {
        let a = host.pod("a", &[tcp(8080)]).await;
        let b = host.pod("b", &[]).await;
        a.serve(80);
        assert!(ask(at(ip("fd77::1"), 8080)).unwrap().starts_with("a "), "the host");
        assert!(b.inside(|| ask(at(ip("fd77::1"), 8080))).unwrap().starts_with("a "), "another pod");
        assert!(a.inside(|| ask(at(ip("fd77::1"), 8080))).unwrap().starts_with("a "), "the pod itself");
        // Linux forwards nothing from there: who calls "localhost" must learn at once to go on to 127.0.0.1.
        let loopback = TcpStream::connect_timeout(&at(ip("::1"), 8080), SOON);
        assert_eq!(loopback.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "), "the other loopback");
        for pod in [a, b] {
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

#[test]
fn udp_and_sctp_ports_are_opened_and_old_connections_forgotten() {
    Host::run("10.77.0.0/24", async |host| {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let ask = || {
            let mut buffer = [0; 64];
            (0..10).find_map(|_| {
                client.send_to(b"?", "127.0.0.1:8080").unwrap();
                let (length, _) = client.recv_from(&mut buffer).ok()?;
                Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
            })
        };
        client.send_to(b"?", "127.0.0.1:8080").unwrap();
        let ports = [port(8080, Protocol::Udp, ""), port(8080, Protocol::Sctp, ""), tcp(8080)];
        // One client socket all the time: to the kernel it is one connection that never ends.
        for name in ["a", "b"] {
            let pod = host.pod(name, &ports).await;
            serve_udp(&pod, 80);
            assert_eq!(ask().as_deref(), Some(name));
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

#[test]
fn pods_cannot_reach_what_listens_on_the_hosts_loopback() {
    Host::run("10.77.0.0/24", async |host| {
        let pod = host.pod("a", &[]).await;
        serve(TcpListener::bind("127.0.0.1:81").unwrap(), "host");
        let gateway = link::default_route(0, ip("10.77.0.1"));
        // A pod that may change its own network sends the loopback's addresses out to the host.
        let answer = pod.inside(move || {
            let mut socket = Socket::route().unwrap();
            netns::sysctl("net/ipv4/conf/all/route_localnet", "1").unwrap();
            socket.request(RouteNetlinkMessage::DelAddress(link::address(1, ip("127.0.0.1"), 8)), 0).unwrap();
            let mut route = gateway;
            route.header.destination_prefix_length = 8;
            use netlink_packet_route::route::{RouteAddress, RouteAttribute};
            route.attributes.retain(|attribute| matches!(attribute, RouteAttribute::Gateway(_)));
            route
                .attributes
                .push(RouteAttribute::Destination(RouteAddress::Inet("127.0.0.0".parse().unwrap())));
            socket.request(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE).unwrap();
            TcpStream::connect_timeout(&at(ip("127.0.0.1"), 81), Duration::from_millis(500)).map(|_| ())
        });
        assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        host.bridge.detach(&pod.attachment).await.unwrap();
    });
}

#[test]
fn a_port_that_is_taken_is_an_error_and_leaves_nothing() {
    Host::run("10.77.0.0/24", async |host| {
        let a = host.pod("a", &[tcp(8080)]).await;
        a.serve(80);
        let b = Pod::new(&host.dir, "b", &[tcp(8080)]);
        let error = host.bridge.attach(&b.attachment).await.unwrap_err();
        assert_eq!(error.to_string(), "host port 8080/tcp is taken by pod a");
        let _listener = TcpListener::bind("127.0.0.1:9090").unwrap();
        let c = Pod::new(&host.dir, "c", &[tcp(9090)]);
        let error = host.bridge.attach(&c.attachment).await.unwrap_err();
        assert_eq!(error.to_string(), "host port 9090/tcp is taken by a process of the host");
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "), "the holder keeps it");
        assert_eq!(links().iter().filter(|name| name.starts_with(WIRE)).count(), 1);
        host.bridge.detach(&a.attachment).await.unwrap();
        host.bridge.attach(&b.attachment).await.unwrap();
        host.bridge.detach(&b.attachment).await.unwrap();
    });
}

#[test]
fn many_pods_at_once_get_different_addresses() {
    Host::run("10.77.0.0/24", async |host| {
        let pods: Vec<Pod> = (0..24).map(|n| Pod::new(&host.dir, &n.to_string(), &[tcp(9000 + n)])).collect();
        let attachments = pods.iter().map(|pod| host.bridge.attach(&pod.attachment));
        let mut ips: Vec<IpAddr> = Vec::new();
        for attached in join_all(attachments.collect()).await {
            ips.extend(attached.unwrap().ips);
        }
        ips.sort();
        ips.dedup();
        assert_eq!(ips.len(), 24);
        let detached = join_all(pods.iter().map(|pod| host.bridge.detach(&pod.attachment)).collect()).await;
        assert!(detached.into_iter().all(|result| result.is_ok()));
    });
}

/// Polls all of them at once.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in futures.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(context) {
                *output = Some(value);
            }
        }
        if futures.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}

#[test]
fn detaching_again_or_without_a_namespace_or_bridge_succeeds() {
    Host::run("10.77.0.0/24", async |host| {
        let pod = host.pod("a", &[tcp(8080)]).await;
        host.bridge.detach(&pod.attachment).await.unwrap();
        host.bridge.detach(&pod.attachment).await.unwrap();
        let pod = host.pod("b", &[tcp(8080)]).await;
        netns::remove(&pod.attachment.netns).unwrap();
        host.bridge.detach(&pod.attachment).await.unwrap();
        let pod = host.pod("c", &[tcp(8080)]).await;
        link::delete(&mut Socket::route().unwrap(), "br0").unwrap();
        Table::of("br0").unwrap().delete().unwrap();
        host.bridge.detach(&pod.attachment).await.unwrap();
        let never = Attachment { pod_id: "never".into(), ..Attachment::default() };
        host.bridge.detach(&never).await.unwrap();
    });
}

#[test]
fn a_bridge_or_table_that_somebody_removed_is_made_again() {
    Host::run("10.77.0.0/24", async |host| {
        let a = host.pod("a", &[tcp(8080)]).await;
        a.serve(80);
        Table::of("br0").unwrap().delete().unwrap();
        let b = host.pod("b", &[]).await;
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "));
        Table::of("br0").unwrap().delete().unwrap();
        host.bridge.gc(&[]).await.unwrap();
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "));
        link::delete(&mut Socket::route().unwrap(), "br0").unwrap();
        let c = host.pod("c", &[]).await;
        c.serve(80);
        assert!(ask(at(c.ip(), 80)).unwrap().starts_with("c "));
        for pod in [a, b, c] {
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

#[test]
fn a_new_daemon_knows_the_pods_of_the_old_one_and_collects_the_dead() {
    Host::run("10.77.0.0/24", async |host| {
        let live = host.pod("live", &[tcp(8080)]).await;
        let dead = host.pod("dead", &[tcp(9090)]).await;
        live.serve(80);
        // Something that a daemon left between the kernel and the record.
        let stray = Pod::new(&host.dir, "stray", &[]);
        let namespace = netns::open(&stray.attachment.netns).unwrap();
        let wire = Wire { name: "crdeadbeef", netns: &namespace, mac: [2, 0, 0, 0, 0, 1], mtu: None };
        let mut socket = Socket::route().unwrap();
        link::add_wire(&mut socket, &wire).unwrap();
        let index = link::find(&mut socket, "br0").unwrap().unwrap().header.index;
        link::join(&mut socket, "crdeadbeef", index).unwrap();

        let next = Bridge::open(host.bridge.config().clone()).unwrap();
        next.check(&live.attachment).await.unwrap();
        next.gc(&["live".to_owned()]).await.unwrap();
        next.check(&live.attachment).await.unwrap();
        assert!(next.check(&dead.attachment).await.is_err());
        assert_eq!(links().iter().filter(|name| name.starts_with(WIRE)).count(), 1);
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("live "));
        let taken = Pod::new(&host.dir, "next", &[tcp(8080)]);
        assert!(matches!(next.attach(&taken.attachment).await, Err(Error::PortTaken { .. })));
        let new = Pod::new(&host.dir, "new", &[tcp(9090)]).attach(&next).await;
        assert_ne!(new.ip(), live.ip());
        for pod in [&live, &new] {
            next.detach(&pod.attachment).await.unwrap();
        }
        host.bridge.gc(&[]).await.unwrap();
        for pod in [live, dead] {
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

#[test]
fn attaching_again_repairs_what_was_half_done() {
    Host::run("10.77.0.0/24", async |host| {
        let pod = host.pod("a", &[tcp(8080)]).await;
        let first = pod.ip();
        // As after a daemon that died in the middle: the record is there, the pod's end is not.
        pod.inside(|| link::delete(&mut Socket::route().unwrap(), "eth0")).unwrap();
        let pod = pod.attach(&host.bridge).await;
        assert_eq!(pod.ip(), first);
        pod.serve(80);
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "));
        host.bridge.detach(&pod.attachment).await.unwrap();
    });
}

#[test]
fn a_pod_that_cannot_be_attached_leaves_nothing() {
    Host::run("10.77.0.0/24", async |host| {
        let nowhere =
            Attachment { pod_id: "a".into(), netns: host.dir.path().join("none"), ..Attachment::default() };
        assert!(matches!(host.bridge.attach(&nowhere).await, Err(Error::Netns { .. })));
        // A namespace that has an eth0 already.
        let pod = host.pod("b", &[]).await;
        let again = Attachment { pod_id: "c".into(), ports: vec![tcp(8080)], ..pod.attachment.clone() };
        assert!(matches!(host.bridge.attach(&again).await, Err(Error::Netlink { .. })));
        assert_eq!(links().iter().filter(|name| name.starts_with(WIRE)).count(), 1);
        host.bridge.detach(&pod.attachment).await.unwrap();
    });
}

#[test]
fn two_bridges_live_side_by_side() {
    Host::run("10.77.0.0/24", async |host| {
        let other = Bridge::open(config(host.dir.path(), "br1", "10.78.0.0/24", true)).unwrap();
        let a = host.pod("a", &[tcp(8080)]).await;
        let b = Pod::new(&host.dir, "b", &[tcp(9090)]).attach(&other).await;
        a.serve(80);
        b.serve(80);
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "));
        assert!(ask(at(ip("127.0.0.1"), 9090)).unwrap().starts_with("b "));
        assert!(a.inside(|| ask(at(b.ip(), 80))).unwrap().starts_with("b "), "from one to the other");
        assert!(!other.teardown().await.unwrap(), "not while a pod is on it");
        other.detach(&b.attachment).await.unwrap();
        assert!(other.teardown().await.unwrap());
        assert!(ask(at(ip("127.0.0.1"), 8080)).unwrap().starts_with("a "), "the other one stays");
        host.bridge.detach(&a.attachment).await.unwrap();
    });
}

#[test]
fn without_subnets_the_kubelets_are_taken_and_remembered() {
    Host::run("", async |host| {
        assert!(host.bridge.status().is_err());
        let pod = Pod::new(&host.dir, "a", &[]);
        assert!(matches!(host.bridge.attach(&pod.attachment).await, Err(Error::NotReady(_))));
        host.bridge.set_pod_cidr("10.79.0.0/24").await.unwrap();
        host.bridge.status().unwrap();
        let pod = pod.attach(&host.bridge).await;
        assert_eq!(pod.ip(), ip("10.79.0.2"));
        host.bridge.detach(&pod.attachment).await.unwrap();
        Bridge::open(host.bridge.config().clone()).unwrap().status().unwrap();
    });
}

#[test]
fn something_else_of_the_bridges_name_is_left_alone() {
    Host::run("10.77.0.0/24", async |host| {
        let pod = Pod::new(&host.dir, "a", &[]);
        let namespace = netns::open(&pod.attachment.netns).unwrap();
        let wire = Wire { name: "br0", netns: &namespace, mac: [2, 0, 0, 0, 0, 1], mtu: None };
        let mut socket = Socket::route().unwrap();
        link::add_wire(&mut socket, &wire).unwrap();
        let other = Pod::new(&host.dir, "b", &[]);
        assert!(matches!(host.bridge.attach(&other.attachment).await, Err(Error::Config(_))));
        assert!(host.bridge.teardown().await.unwrap());
        assert!(links().contains(&"br0".to_owned()));
        link::delete(&mut socket, "br0").unwrap();
    });
}

/// Not a benchmark, but one that would notice a wait that slipped in: the kernel needs about 2 ms for all of it.
#[test]
fn attaching_takes_milliseconds() {
    Host::run("10.77.0.0/24", async |host| {
        let (mut made, mut attached, mut detached) = (Vec::new(), Vec::new(), Vec::new());
        let mut pods = Vec::new();
        for n in 0..40 {
            let begin = Instant::now();
            let pod = Pod::new(&host.dir, &n.to_string(), &[tcp(8000 + n)]);
            made.push(begin.elapsed());
            let begin = Instant::now();
            host.bridge.attach(&pod.attachment).await.unwrap();
            attached.push(begin.elapsed());
            pods.push(pod);
        }
        for pod in pods {
            let begin = Instant::now();
            host.bridge.detach(&pod.attachment).await.unwrap();
            detached.push(begin.elapsed());
        }
        for (what, times) in [("namespace", &mut made), ("attach", &mut attached), ("detach", &mut detached)]
        {
            times.sort();
            println!("{what}: best {:?}, median {:?}, worst {:?}", times[0], times[20], times[39]);
            assert!(times[20] < Duration::from_millis(50), "{what}: {:?}", times[20]);
        }
    });
}

#[test]
fn bandwidth_is_limited_both_ways() {
    Host::run("10.77.0.0/24", async |host| {
        let limits = |ingress, egress| Some(crate::Bandwidth { ingress, egress });
        for (id, bandwidth) in [("in", limits(Some(8_000_000), None)), ("out", limits(None, Some(8_000_000)))]
        {
            let mut pod = Pod::new(&host.dir, id, &[]);
            pod.attachment.bandwidth = bandwidth;
            let pod = pod.attach(&host.bridge).await;
            let listener = pod.inside(|| TcpListener::bind("0.0.0.0:80").unwrap());
            let from_host = TcpStream::connect_timeout(&at(pod.ip(), 80), SOON).unwrap();
            let (from_pod, _) = listener.accept().unwrap();
            // A megabyte and a half at a megabyte a second, of which the bucket lets a bit through at once.
            let begin = Instant::now();
            send(&from_host, &from_pod);
            let received = begin.elapsed();
            let begin = Instant::now();
            send(&from_pod, &from_host);
            let sent = begin.elapsed();
            let (slow, fast) = if id == "in" { (received, sent) } else { (sent, received) };
            assert!(slow > Duration::from_millis(900), "{id}: {slow:?}");
            assert!(fast < Duration::from_millis(900), "{id}: {fast:?}");
            host.bridge.detach(&pod.attachment).await.unwrap();
        }
    });
}

fn send(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let sender = std::thread::spawn(move || from.write_all(&[7; 1_500_000]).unwrap());
    to.set_read_timeout(Some(SOON)).unwrap();
    to.read_exact(&mut vec![0; 1_500_000]).unwrap();
    sender.join().unwrap();
}

#[test]
fn after_many_pods_the_host_is_as_before() {
    Host::run("10.77.0.0/26", async |host| {
        let begin = Instant::now();
        let lane = async |lane: u16| {
            for n in 0..30 {
                let (dir, id) = (host.dir.path().to_owned(), format!("{lane}-{n}"));
                let path = dir.join(&id);
                let pinned = path.clone();
                spawn_blocking(move || netns::create(&pinned)).await.unwrap().unwrap();
                let pod = Attachment {
                    pod_id: id,
                    netns: path.clone(),
                    ports: vec![tcp(8000 + lane)],
                    ..Attachment::default()
                };
                host.bridge.attach(&pod).await.unwrap();
                host.bridge.detach(&pod).await.unwrap();
                spawn_blocking(move || netns::remove(&path)).await.unwrap().unwrap();
            }
        };
        join_all((0..8).map(lane).collect()).await;
        println!("240 pods, 8 at a time: {:.0} a second", 240.0 / begin.elapsed().as_secs_f64());
    });
}

#[test]
fn a_bridge_has_a_name_that_leads_nowhere_else() {
    for name in ["crisp0", "br-1", "a_b"] {
        check_name(name).unwrap();
    }
    for name in ["", "all", "default", "../x", "a/b", "a.b", "sixteen-letters-", "-a", "a b"] {
        assert!(check_name(name).is_err(), "{name:?}");
    }
}

#[test]
fn subnets_without_room_or_on_top_of_each_other_are_refused() {
    for (text, good) in [
        ("10.0.0.0/24,fd00::/64", true),
        ("10.0.0.0/24,10.0.1.0/24", true),
        ("10.0.0.0/31", false),
        ("10.0.0.0/16,10.0.1.0/24", false),
    ] {
        assert_eq!(check_subnets(&subnet::list(text).unwrap()).is_ok(), good, "{text}");
    }
}

#[test]
fn a_port_leads_to_addresses_of_its_family() {
    for (host_ip, pods) in [
        ("", vec!["10.0.0.2", "fd00::2"]),
        ("0.0.0.0", vec!["10.0.0.2"]),
        ("127.0.0.1", vec!["10.0.0.2"]),
        ("::", vec!["fd00::2"]),
    ] {
        let port = PortMapping { host_port: 80, host_ip: host_ip.parse().ok(), ..PortMapping::default() };
        let ips = ["10.0.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()).to_vec();
        let found = forwards(&Lease { pod: "a".into(), ips, ports: vec![port] });
        assert_eq!(found.iter().map(|f| f.pod.to_string()).collect::<Vec<_>>(), pods, "{host_ip:?}");
    }
}
