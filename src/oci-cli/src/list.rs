//! state and list: what is known of containers, printed.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::state::{Home, Record, Status};

pub(crate) fn state(root: &Path, id: &str) -> Result<u8> {
    let home = Home::open(root, id)?;
    let spec = home.spec()?;
    let record = home.record()?;
    let status = record.as_ref().map_or(Status::Creating, Record::status);
    let mut state = json!({
        "ociVersion": spec.oci_version,
        "id": id,
        "status": status.name(),
        "bundle": record.as_ref().map(|record| &record.bundle),
    });
    if let (Some(record), true) = (&record, matches!(status, Status::Created | Status::Running)) {
        state["pid"] = record.pid.into();
    }
    if !spec.annotations.is_empty() {
        state["annotations"] = json!(spec.annotations);
    }
    println!("{}", serde_json::to_string_pretty(&state)?);
    Ok(0)
}

pub(crate) fn list(root: &Path, quiet: bool, format: &str) -> Result<u8> {
    let mut records: Vec<Record> = Vec::new();
    let entries = match std::fs::read_dir(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        other => Some(other.with_context(|| format!("read {}", root.display()))?),
    };
    for entry in entries.into_iter().flatten().flatten() {
        // One that is being removed while we look is not there.
        let home = entry.file_name().to_str().and_then(|id| Home::open(root, id).ok());
        records.extend(home.and_then(|home| home.record().ok().flatten()));
    }
    records.sort_by(|a, b| a.created.cmp(&b.created));
    let pid = |record: &Record| match record.status() {
        Status::Created | Status::Running => record.pid,
        _ => 0,
    };
    match format {
        _ if quiet => records.iter().for_each(|record| println!("{}", record.id)),
        "json" => {
            let all: Vec<Value> = records
                .iter()
                .map(|record| {
                    json!({
                        "id": record.id, "pid": pid(record), "status": record.status().name(),
                        "bundle": record.bundle, "created": record.created,
                    })
                })
                .collect();
            println!("{}", serde_json::to_string(&all)?);
        }
        "table" => {
            println!("{:<40} {:>8} {:<8} {:<30} BUNDLE", "ID", "PID", "STATUS", "CREATED");
            for record in &records {
                let (pid, status) = (pid(record), record.status().name());
                println!(
                    "{:<40} {pid:>8} {status:<8} {:<30} {}",
                    record.id,
                    record.created,
                    record.bundle.display()
                );
            }
        }
        other => bail!("{other:?} is neither table nor json"),
    }
    Ok(0)
}
