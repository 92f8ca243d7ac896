//! Brings images of a store into a registry, by the calls of the OCI distribution specification ("Pushing").

use std::net::SocketAddr;

use anyhow::{Result, bail};

use super::Store;
use crate::http;

/// Splits `host/repository:tag` into repository and tag: the host is what a mirror stands in for.
pub fn split(reference: &str) -> Result<(&str, &str)> {
    let parts = reference.split_once('/').and_then(|(_, rest)| rest.rsplit_once(':'));
    match parts {
        Some(parts) => Ok(parts),
        None => bail!("{reference} has no host or no tag"),
    }
}

/// Pushes one image. What the registry has already is not sent again.
pub fn push(store: &Store, reference: &str, registry: SocketAddr) -> Result<()> {
    let Some(manifest) = store.references.get(reference) else {
        bail!("{reference} is not in the store");
    };
    let (repository, tag) = split(reference)?;
    for blob in store.closure(manifest)? {
        let is_manifest = blob.media_type.contains("manifest") || blob.media_type.contains("index");
        if !is_manifest {
            upload(store, &blob.digest, repository, registry)?;
        } else {
            let name = if blob.digest == manifest.digest { tag } else { &blob.digest };
            let reply = http::Request::new("PUT", &format!("/v2/{repository}/manifests/{name}"))
                .header("Content-Type", &blob.media_type)
                .body(&store.read(&blob.digest)?)
                .send(registry)?;
            reply.expect(201, &format!("push manifest {reference}"))?;
        }
    }
    Ok(())
}

fn upload(store: &Store, digest: &str, repository: &str, registry: SocketAddr) -> Result<()> {
    let there = http::Request::new("HEAD", &format!("/v2/{repository}/blobs/{digest}")).send(registry)?;
    if there.code == 200 {
        return Ok(());
    }
    let begun = http::Request::new("POST", &format!("/v2/{repository}/blobs/uploads/")).send(registry)?;
    begun.expect(202, "begin an upload")?;
    let Some(location) = begun.header("location") else {
        bail!("the registry named no place for blob {digest}");
    };
    // Either a path or a whole URL; both end in the query we add to.
    let path = location
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'))
        .map(|(_, path)| format!("/{path}"));
    let path = path.unwrap_or_else(|| location.to_owned());
    let mark = if path.contains('?') { '&' } else { '?' };
    let reply = http::Request::new("PUT", &format!("{path}{mark}digest={digest}"))
        .header("Content-Type", "application/octet-stream")
        .body(&store.read(digest)?)
        .send(registry)?;
    reply.expect(201, &format!("push blob {digest}"))?;
    Ok(())
}
