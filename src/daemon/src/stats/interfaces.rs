//! Counters of a pod's network interfaces, from `/proc/<pid>/net/dev` of a process in the pod or, when none runs,
//! from within the pinned namespace. Which of them go where in an answer is the caller's business.

use std::{fs, os::fd::AsFd, path::Path, sync::Arc};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{containers::Container, pods::Pod};

/// One interface.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    pub name: String,
    pub received: Flow,
    pub sent: Flow,
}

/// One direction. All figures only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flow {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// The name that CNI and the built-in bridge give to a pod's first interface.
const FIRST: &str = "eth0";

/// Interfaces of the pod but for loopback, the default one first. Empty with the host's network.
pub async fn of_pod(pod: &Pod, running: &[Arc<Container>]) -> Vec<Counters> {
    let Some(netns) = pod.netns.clone() else { return Vec::new() };
    let pid = running.iter().map(|container| container.look(|state| state.pid)).find(|pid| *pid != 0);
    let (answer, table) = tokio::sync::oneshot::channel();
    let read = move || {
        let of_process = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/net/dev")).ok());
        let _ = answer.send(of_process.or_else(|| of_namespace(&netns)).unwrap_or_default());
    };
    // A thread of its own: one that entered a namespace must not serve anything else afterwards.
    if std::thread::Builder::new().name("net-counters".into()).spawn(read).is_err() {
        return Vec::new();
    }
    parse(&table.await.unwrap_or_default())
}

fn of_namespace(path: &Path) -> Option<String> {
    let namespace = fs::File::open(path).ok()?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).ok()?;
    fs::read_to_string("/proc/thread-self/net/dev").ok()
}

/// Two lines of heading, then `name: rx bytes packets errs drop fifo frame compressed multicast, tx the same`.
fn parse(table: &str) -> Vec<Counters> {
    let line = |line: &str| {
        let (name, figures) = line.split_once(':')?;
        let figures: Vec<u64> = figures.split_whitespace().filter_map(|figure| figure.parse().ok()).collect();
        let flow = |at: usize| {
            let figure = |offset: usize| figures.get(at + offset).copied().unwrap_or_default();
            Flow { bytes: figure(0), packets: figure(1), errors: figure(2), dropped: figure(3) }
        };
        Some(Counters { name: name.trim().into(), received: flow(0), sent: flow(8) })
    };
    let mut counters: Vec<_> = table.lines().skip(2).filter_map(line).filter(|c| c.name != "lo").collect();
    counters.sort_by_key(|counter| counter.name != FIRST);
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_interface_comes_first_and_loopback_not_at_all() {
        let table = "Inter-| Receive | Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0
  net1: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0
  eth0: 10 20 30 40 0 0 0 0 50 60 70 80 0 0 0 0
";
        let got = parse(table);
        assert_eq!(got.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["eth0", "net1"]);
        assert_eq!(got[0].received, Flow { bytes: 10, packets: 20, errors: 30, dropped: 40 });
        assert_eq!(got[0].sent, Flow { bytes: 50, packets: 60, errors: 70, dropped: 80 });
        assert!(parse("").is_empty());
    }
}
