//! Answers the metrics calls under cAdvisor's names.

use std::sync::Arc;

use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// What metrics there are.
pub fn descriptors() -> Result<Vec<v1::MetricDescriptor>> {
    Err(Fault::Unsupported("ListMetricDescriptors").into())
}

/// Their values for every pod.
pub async fn pods(_daemon: &Arc<Daemon>) -> Result<Vec<v1::PodSandboxMetrics>> {
    Err(Fault::Unsupported("ListPodSandboxMetrics").into())
}
