//! delete: what is left of a container goes.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::state::{Home, Status};

/// How long killed processes may take to leave.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn delete(root: &Path, id: &str, force: bool) -> Result<u8> {
    let home = match Home::open(root, id) {
        Err(_) if force && !root.join(id).exists() => return Ok(0),
        other => other?,
    };
    let record = home.record()?;
    let status = record.as_ref().map_or(Status::Creating, |record| record.status());
    if status != Status::Stopped && !force {
        bail!("container {id} is {}, not stopped", status.name());
    }
    if let Ok(spec) = home.spec() {
        let cgroup = home.cgroup(&spec)?;
        cgroup.kill()?;
        let until = Instant::now() + PATIENCE;
        while record.as_ref().is_some_and(|record| record.status() != Status::Stopped) {
            if Instant::now() > until {
                bail!("container {id} does not stop");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        cgroup.remove(PATIENCE)?;
        home.remove()?;
        if let Some(record) = record {
            for failed in container::poststop(id, &spec, &record.bundle) {
                eprintln!("crisp-oci: warning: {failed}");
            }
        }
    }
    home.remove()?;
    Ok(0)
}
