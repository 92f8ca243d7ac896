//! What the runtime says of itself: version, readiness, features, cgroup driver.

use std::sync::Arc;

use cri_api::v1;

use crate::daemon::Daemon;

/// Name and version of the runtime.
pub fn version() -> v1::VersionResponse {
    let version = env!("CARGO_PKG_VERSION");
    v1::VersionResponse {
        version: "0.1.0".into(),
        runtime_name: "crisp".into(),
        runtime_version: version.into(),
        runtime_api_version: "v1".into(),
    }
}

/// Whether runtime and network are ready, and what the runtime can do.
pub fn status(_daemon: &Arc<Daemon>, _verbose: bool) -> v1::StatusResponse {
    let condition =
        |kind: &str| v1::RuntimeCondition { r#type: kind.into(), status: true, ..Default::default() };
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus {
            conditions: vec![condition("RuntimeReady"), condition("NetworkReady")],
        }),
        ..Default::default()
    }
}

/// The cgroup driver.
pub fn runtime_config(_daemon: &Arc<Daemon>) -> v1::RuntimeConfigResponse {
    let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs.into() };
    v1::RuntimeConfigResponse { linux: Some(linux) }
}
