//! crispd, the daemon: answers the kubelet and owns what is remembered. Here: arguments, configuration, log,
//! recovery, serving and draining. No decisions.

// A program has no outside: what is `pub` here is so for the other modules.
#![allow(unreachable_pub)]

mod calls;
mod config;
mod containers;
mod cri;
mod daemon;
mod error;
mod events;
mod lock;
mod metrics;
mod pods;
mod shim;
mod stats;
mod status;
mod store;
mod table;

fn main() {
    let _ = cri::runtime::Runtime;
}
