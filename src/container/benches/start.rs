//! What a container costs: 200 times from nothing to a running `true`, and to its end.
#![allow(clippy::unwrap_used)]

#[path = "../tests/containers/lab.rs"]
#[allow(dead_code)]
mod lab;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use container::Stdio;
use lab::{Lab, soon};

const TIMES: usize = 200;

fn main() {
    let lab = Lab::new();
    let mut phases: [Vec<Duration>; 4] = Default::default();
    for _ in 0..TIMES {
        let container = lab.container(&["/bin/true"]);
        let begun = Instant::now();
        let (running, mut created) = container.create(Stdio::null()).unwrap();
        phases[0].push(begun.elapsed());
        created.start().unwrap().finish(soon()).unwrap();
        phases[1].push(begun.elapsed());
        assert_eq!(lab::wait(running.pidfd.as_fd()), Some(0));
        phases[2].push(begun.elapsed());
    }
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    for _ in 0..TIMES {
        let begun = Instant::now();
        let exec = running.spawn(&running.like_init(&["/bin/true"]), Stdio::null()).unwrap();
        assert_eq!(lab::wait(exec.pidfd.as_fd()), Some(0));
        phases[3].push(begun.elapsed());
    }
    drop(running);
    for (name, times) in ["created", "started", "ended", "exec, to its end"].iter().zip(&mut phases) {
        times.sort();
        println!(
            "{name:20} median {:?}, fastest {:?}, 95% {:?}",
            times[TIMES / 2],
            times[0],
            times[TIMES * 95 / 100]
        );
    }
    assert!(lab.close().is_empty());
}
