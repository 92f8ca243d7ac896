//! Stores, layers and images to test with.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use image::{Config, Digest, Error, Image, Images, Proxy, Unpacker};
use tempfile::TempDir;

use crate::server::{Content, Server};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const ARCH: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// A store in a directory of its own.
pub(crate) struct Store {
    pub(crate) images: Arc<Images>,
    pub(crate) directory: TempDir,
}

impl Store {
    pub(crate) async fn new() -> Store {
        Store::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Store {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        change(&mut config);
        Store { images: Images::open(config).await.unwrap(), directory }
    }

    /// Lets go of the store and opens it again, as after the daemon's death.
    pub(crate) async fn reopened(self) -> Store {
        let Store { images, directory } = self;
        drop(images);
        let images = Images::open(config(directory.path())).await.unwrap();
        Store { images, directory }
    }

    pub(crate) async fn pull(&self, reference: &str) -> Result<Arc<Image>, Error> {
        self.images.pull(reference, None).await
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    /// Nothing unfinished is left: staging and trash are empty, no helper runs. Waits a second for that.
    pub(crate) async fn is_clean(&self) {
        let started = Instant::now();
        loop {
            let left: Vec<PathBuf> = ["staging", "trash", "blobs"]
                .iter()
                .flat_map(|name| children(&self.root().join(name)))
                .collect();
            let helpers = self.helpers();
            if left.is_empty() && helpers == 0 {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(1), "left: {left:?}, helpers: {helpers}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Unpack helpers that work for this store.
    pub(crate) fn helpers(&self) -> usize {
        let needle = self.directory.path().to_str().unwrap().to_owned();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| String::from_utf8_lossy(line).contains(&needle)).count()
    }

    pub(crate) fn layers(&self) -> usize {
        children(&self.root().join("layers")).len()
    }
}

pub(crate) fn config(directory: &Path) -> Config {
    let unpacker = Unpacker::new(vec![std::env::current_exe().unwrap().into(), "unpack".into()]);
    let mut config = Config::new(directory.join("images"), directory.join("crisp.db"), unpacker);
    config.progress_timeout = Duration::from_secs(1);
    config.hosts_dirs = vec![directory.join("certs.d")];
    config.proxy = Proxy::None;
    config
}

pub(crate) fn children(path: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(path).map(|all| all.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    Digest::sha256(bytes).to_string()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress and differ by seed.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

/// An archive, entry by entry.
#[derive(Default, Clone)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    pub(crate) fn entry(
        mut self,
        kind: u8,
        name: &str,
        mode: u32,
        owner: u32,
        link: &str,
        content: &[u8],
    ) -> Tar {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        let mut octal = |from: usize, width: usize, value: u64| {
            let text = format!("{value:0width$o}\0", width = width - 1);
            header[from..from + width].copy_from_slice(text.as_bytes());
        };
        octal(100, 8, mode.into());
        octal(108, 8, owner.into());
        octal(116, 8, owner.into());
        octal(124, 12, content.len() as u64);
        octal(136, 12, 1_600_000_000);
        octal(329, 8, 0);
        octal(337, 8, 0);
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Tar {
        self.entry(b'0', name, 0o644, 0, "", content.as_ref())
    }

    pub(crate) fn directory(self, name: &str, mode: u32, owner: u32) -> Tar {
        self.entry(b'5', name, mode, owner, "", b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Tar {
        self.entry(b'2', name, 0o777, 0, target, b"")
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// An image in the making: archives, and how they are sent.
pub(crate) struct Recipe {
    pub(crate) layers: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) config: String,
    pub(crate) media_type: &'static str,
}

/// What became of a recipe at a registry.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) manifest: String,
    pub(crate) id: String,
    pub(crate) blobs: Vec<String>,
}

impl Recipe {
    /// Layers that are sent with gzip.
    pub(crate) fn new(layers: &[Vec<u8>]) -> Recipe {
        Recipe {
            layers: layers.iter().map(|tar| (tar.clone(), gzip(tar))).collect(),
            config: r#""Env":["A=b"],"Cmd":["/run"]"#.into(),
            media_type: MANIFEST,
        }
    }

    /// One file in one layer, different for each word.
    pub(crate) fn small(word: &str) -> Recipe {
        Recipe::new(&[Tar::default().file("file", word).end()])
    }

    pub(crate) fn documents(&self) -> (Vec<u8>, Vec<u8>) {
        let diff_ids: Vec<String> = self.layers.iter().map(|(tar, _)| format!("{:?}", digest(tar))).collect();
        let config = format!(
            r#"{{"architecture":"{ARCH}","os":"linux","config":{{{}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            self.config,
            diff_ids.join(",")
        );
        let layers: Vec<String> = self
            .layers
            .iter()
            .map(|(_, sent)| {
                format!(r#"{{"mediaType":"{LAYER}","digest":"{}","size":{}}}"#, digest(sent), sent.len())
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{}]}}"#,
            self.media_type,
            digest(config.as_bytes()),
            config.len(),
            layers.join(",")
        );
        (config.into_bytes(), manifest.into_bytes())
    }

    pub(crate) fn put(&self, content: &mut Content, repository: &str, tag: &str) -> Made {
        let (config, manifest) = self.documents();
        let blobs = self.layers.iter().map(|(_, sent)| content.blob(repository, sent)).collect();
        let id = content.blob(repository, &config);
        let manifest = content.manifest(repository, tag, self.media_type, &manifest);
        Made { manifest, id, blobs }
    }

    pub(crate) fn serve(&self, server: &Server, repository: &str, tag: &str) -> Made {
        self.put(&mut server.content.lock().unwrap(), repository, tag)
    }
}

/// Waits for something to become true.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < Duration::from_secs(10), "{what} in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a command prints, which must succeed.
pub(crate) fn output(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
