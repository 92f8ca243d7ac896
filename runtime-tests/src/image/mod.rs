//! Container images made by our own code: trees of files become layers, layers become images, images lie in a
//! store of blobs. Which images the tests need is `catalog`'s, how they reach a registry is `push`'s.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub mod catalog;
pub mod debian;
pub mod large;
pub mod push;
pub mod tree;

pub use tree::Tree;

/// How a layer is packed, and by which names the manifest calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// OCI manifest, gzip.
    OciGzip,
    /// OCI manifest, zstd.
    OciZstd,
    /// OCI manifest, not compressed.
    OciPlain,
    /// Docker's schema 2, gzip.
    DockerGzip,
}

/// Media types of a manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// An index of manifests, by platform.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Packing {
    fn layer(self) -> &'static str {
        match self {
            Packing::OciGzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::OciZstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Packing::OciPlain => "application/vnd.oci.image.layer.v1.tar",
            Packing::DockerGzip => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Packing::DockerGzip => "application/vnd.docker.container.image.v1+json",
            _ => "application/vnd.oci.image.config.v1+json",
        }
    }

    fn manifest(self) -> &'static str {
        match self {
            Packing::DockerGzip => DOCKER_MANIFEST,
            _ => OCI_MANIFEST,
        }
    }
}

/// What an image config says about the process.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// USER.
    pub user: String,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV beyond PATH.
    pub env: Vec<String>,
    /// WORKDIR.
    pub dir: String,
    /// STOPSIGNAL.
    pub stop_signal: String,
    /// VOLUME.
    pub volumes: Vec<String>,
}

/// One blob by its digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Blob {
    /// `sha256:` and 64 hex digits.
    pub digest: String,
    /// In bytes.
    pub size: u64,
    /// What it is.
    pub media_type: String,
}

/// A layer in a store: packed, and the digest of what was packed.
#[derive(Clone, Debug)]
pub struct Layer {
    blob: Blob,
    diff_id: String,
}

/// Blobs in a directory, and the references that name manifests among them.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Full reference (`host/repository:tag`) to the blob of its manifest.
    pub references: BTreeMap<String, Blob>,
}

impl Store {
    /// An empty store at a directory that need not exist.
    pub fn create(dir: &Path) -> Result<Store> {
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        Ok(Store { dir: dir.to_owned(), references: BTreeMap::new() })
    }

    /// A store that was saved before.
    pub fn open(dir: &Path) -> Result<Store> {
        let text = std::fs::read(dir.join("references.json")).context("read the list of images")?;
        Ok(Store { dir: dir.to_owned(), references: serde_json::from_slice(&text)? })
    }

    /// Writes the list of references: from now on `open` finds the store.
    pub fn save(&self) -> Result<()> {
        let staging = self.dir.join("references.new");
        std::fs::write(&staging, serde_json::to_vec_pretty(&self.references)?)?;
        Ok(std::fs::rename(staging, self.dir.join("references.json"))?)
    }

    /// Where a blob's file is.
    pub fn path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    /// The bytes of a blob.
    pub fn read(&self, digest: &str) -> Result<Vec<u8>> {
        std::fs::read(self.path(digest)).with_context(|| format!("read blob {digest}"))
    }

    /// Adds a blob of any kind.
    pub fn add(&self, bytes: &[u8], media_type: &str) -> Result<Blob> {
        let blob =
            Blob { digest: digest(bytes), size: bytes.len() as u64, media_type: media_type.to_owned() };
        let path = self.path(&blob.digest);
        if !path.exists() {
            std::fs::write(&path, bytes).with_context(|| format!("write blob {}", blob.digest))?;
        }
        Ok(blob)
    }

    /// Packs a tree into a layer.
    pub fn layer(&self, tree: &Tree, packing: Packing) -> Result<Layer> {
        self.layer_of_tar(&tree.tar()?, packing)
    }

    /// Packs bytes that call themselves a tar file; they need not be one.
    pub fn layer_of_tar(&self, tar: &[u8], packing: Packing) -> Result<Layer> {
        let packed = match packing {
            Packing::OciPlain => tar.to_vec(),
            Packing::OciZstd => zstd::bulk::compress(tar, 3)?,
            Packing::OciGzip | Packing::DockerGzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(4));
                gzip.write_all(tar)?;
                gzip.finish()?
            }
        };
        Ok(Layer { blob: self.add(&packed, packing.layer())?, diff_id: digest(tar) })
    }

    /// Makes config and manifest and gives the image its names.
    pub fn image(
        &mut self,
        references: &[&str],
        layers: &[Layer],
        process: &Process,
        packing: Packing,
    ) -> Result<Blob> {
        let config = config(layers, process);
        let config = self.add(&serde_json::to_vec(&config)?, packing.config())?;
        let layers: Vec<Value> = layers.iter().map(|layer| descriptor(&layer.blob)).collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": packing.manifest(),
            "config": descriptor(&config),
            "layers": layers,
        });
        let manifest = self.add(&serde_json::to_vec(&manifest)?, packing.manifest())?;
        self.name(references, &manifest);
        Ok(manifest)
    }

    /// Makes an index of one manifest for this platform and one for another.
    pub fn index(&mut self, references: &[&str], manifest: &Blob, foreign: &Blob) -> Result<Blob> {
        let entry = |blob: &Blob, architecture: &str| {
            let mut entry = descriptor(blob);
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        };
        let index = json!({
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [entry(foreign, "s390x"), entry(manifest, architecture())],
        });
        let index = self.add(&serde_json::to_vec(&index)?, OCI_INDEX)?;
        self.name(references, &index);
        Ok(index)
    }

    /// Gives names to a manifest.
    pub fn name(&mut self, references: &[&str], manifest: &Blob) {
        for reference in references {
            self.references.insert((*reference).to_owned(), manifest.clone());
        }
    }

    /// Writes one image as an OCI image layout directory, named by its reference.
    pub fn layout(&self, reference: &str, dir: &Path) -> Result<()> {
        let Some(manifest) = self.references.get(reference) else {
            bail!("{reference} is not in the store");
        };
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        for blob in self.closure(manifest)? {
            let name = blob.digest.trim_start_matches("sha256:");
            std::fs::copy(self.path(&blob.digest), dir.join("blobs/sha256").join(name))?;
        }
        std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut entry = descriptor(manifest);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": reference});
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
        Ok(std::fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)?)
    }

    /// A manifest and all that hangs on it, leaves first.
    pub fn closure(&self, manifest: &Blob) -> Result<Vec<Blob>> {
        let body: Value = serde_json::from_slice(&self.read(&manifest.digest)?)?;
        let mut found = Vec::new();
        for child in body["manifests"].as_array().into_iter().flatten() {
            found.extend(self.closure(&serde_json::from_value(rename(child))?)?);
        }
        for child in body["layers"].as_array().into_iter().flatten().chain(body.get("config")) {
            found.push(serde_json::from_value(rename(child))?);
        }
        found.push(manifest.clone());
        Ok(found)
    }
}

/// The name of this machine's architecture in image configs.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `sha256:` and the sum in hex digits.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Bytes as hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rename(descriptor: &Value) -> Value {
    json!({
        "digest": descriptor["digest"],
        "size": descriptor["size"],
        "media_type": descriptor["mediaType"],
    })
}

fn descriptor(blob: &Blob) -> Value {
    json!({"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size})
}

fn config(layers: &[Layer], process: &Process) -> Value {
    let mut env = vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    env.extend(process.env.iter().cloned());
    let mut inner = json!({ "Env": env });
    let mut set = |key: &str, value: Value, empty: bool| {
        if !empty {
            inner[key] = value;
        }
    };
    set("User", json!(process.user), process.user.is_empty());
    set("Entrypoint", json!(process.entrypoint), process.entrypoint.is_empty());
    set("Cmd", json!(process.cmd), process.cmd.is_empty());
    set("WorkingDir", json!(process.dir), process.dir.is_empty());
    set("StopSignal", json!(process.stop_signal), process.stop_signal.is_empty());
    let volumes: serde_json::Map<String, Value> =
        process.volumes.iter().map(|path| (path.clone(), json!({}))).collect();
    set("Volumes", json!(volumes), volumes.is_empty());
    json!({
        "architecture": architecture(),
        "os": "linux",
        "created": "2025-01-01T00:00:00Z",
        "config": inner,
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
        "history": layers.iter().map(|_| json!({"created_by": "crisp runtime-tests"})).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_holds_the_whole_image_and_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(&dir.path().join("store")).unwrap();
        let mut tree = Tree::default();
        tree.file("etc/motd", 0o644, b"hello\n");
        let layer = store.layer(&tree, Packing::OciZstd).unwrap();
        store.image(&["local/x:1"], &[layer], &Process::default(), Packing::OciZstd).unwrap();
        let layout = dir.path().join("layout");
        store.layout("local/x:1", &layout).unwrap();
        assert_eq!(std::fs::read_dir(layout.join("blobs/sha256")).unwrap().count(), 3);
        let index: Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        assert_eq!(index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], "local/x:1");
        for blob in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let blob = blob.unwrap();
            let sum = digest(&std::fs::read(blob.path()).unwrap());
            assert_eq!(sum, format!("sha256:{}", blob.file_name().into_string().unwrap()));
        }
    }
}
