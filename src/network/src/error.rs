//! Every way in which giving a pod its network can fail, one variant per step.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::attachment::Protocol;

/// What went wrong, and with which object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no usable network configuration (yet).
    #[error("network is not ready: {0}")]
    NotReady(String),
    /// A field of the attachment cannot be handed on.
    #[error("attachment of pod {pod}: {reason}")]
    Attachment {
        /// The pod's id as it was given.
        pod: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The network's own configuration is wrong, or cannot be changed while running.
    #[error("network configuration: {0}")]
    Config(String),
    /// A network namespace could not be made, pinned, entered or removed.
    #[error("{act} network namespace {}: {cause}", path.display())]
    Netns {
        /// What was tried.
        act: &'static str,
        /// Where the namespace is, or should be, pinned.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A CNI configuration file cannot be used.
    #[error("CNI configuration {}: {reason}", path.display())]
    Conf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A CNI plugin is missing, or is not safe to run as root.
    #[error("CNI plugin {plugin}: {reason}")]
    Binary {
        /// The plugin's type.
        plugin: String,
        /// Why it is not run.
        reason: String,
    },
    /// A CNI plugin could not be run, or did not behave as a CNI plugin does.
    #[error("CNI plugin {plugin} {command}: {reason}")]
    Run {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, CHECK, STATUS or GC.
        command: &'static str,
        /// What happened.
        reason: String,
    },
    /// A CNI plugin was still running at its deadline and was killed.
    #[error("CNI plugin {plugin} {command}: killed after {}s", limit.as_secs_f32())]
    Timeout {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, CHECK, STATUS or GC.
        command: &'static str,
        /// The deadline that it missed.
        limit: Duration,
    },
    /// A CNI plugin answered with an error of its own.
    #[error("CNI plugin {plugin} {command}: {msg}{} (code {code})", suffix(details))]
    Plugin {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, CHECK, STATUS or GC.
        command: &'static str,
        /// The number from the specification, or the plugin's own from 100 on.
        code: u64,
        /// Its short text.
        msg: String,
        /// Its long text, often empty.
        details: String,
    },
    /// A result of a plugin, or a cached one, cannot be understood.
    #[error("CNI result of {plugin}: {reason}")]
    Result {
        /// The plugin's type, or the network's name.
        plugin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The record of an attachment could not be read or written.
    #[error("{act} {}: {cause}", path.display())]
    Record {
        /// What was tried.
        act: &'static str,
        /// The record's path.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A netlink request was refused.
    #[error("{act}: {cause}{}", suffix(hint))]
    Netlink {
        /// What was asked for.
        act: String,
        /// The kernel's error number.
        cause: io::Error,
        /// The kernel's own words, often empty.
        hint: String,
    },
    /// A kernel setting could not be written.
    #[error("write {}: {cause}", path.display())]
    Sysctl {
        /// The setting's file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// No address is left in a subnet.
    #[error("subnet {0} has no free address")]
    Exhausted(String),
    /// A plugin chain ended without an address for the pod.
    #[error("network {0} gave the pod no address")]
    NoAddress(String),
    /// Somebody has the wanted port of the host already.
    #[error("host port {port}/{protocol}{} is taken by {holder}", on(host_ip))]
    PortTaken {
        /// The protocol.
        protocol: Protocol,
        /// The port of the host.
        port: u16,
        /// The address of the host, where the pod named one.
        host_ip: Option<IpAddr>,
        /// `pod <id>` or `a process of the host`.
        holder: String,
    },
    /// The port could be opened, and nobody would ever be answered there.
    #[error("host port {port} on {host_ip} cannot lead to the pod: {why}")]
    PortUnreachable {
        /// The port of the host.
        port: u16,
        /// The address of the host that the pod named.
        host_ip: IpAddr,
        /// What is in the way.
        why: &'static str,
    },
    /// A blocking step died.
    #[error("network worker: {0}")]
    Worker(String),
}

fn suffix(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

fn on(host_ip: &Option<IpAddr>) -> String {
    host_ip.map(|ip| format!(" on {ip}")).unwrap_or_default()
}
