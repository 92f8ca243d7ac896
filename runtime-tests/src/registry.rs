//! The two registries of the tests: Debian's docker-registry, a program that clusters really use, and one of our own
//! that serves a store as it is and misbehaves when told to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::image::{Store, large, push};
use crate::{http, place, run, setup};

/// A loopback port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Debian's docker-registry with every image of a store. Killed when dropped.
#[derive(Debug)]
pub struct Docker {
    child: Child,
    address: SocketAddr,
}

impl Docker {
    /// Starts it on a free port; its files are in the cache, so that images are pushed once.
    pub fn start(store: &Store) -> Result<Docker> {
        let root = place::cache()?.join("registry");
        std::fs::create_dir_all(&root)?;
        let port = free_port()?;
        let config = root.join(format!("config-{port}.yml"));
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, cache: {{blobdescriptor: inmemory}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\", secret: crisp}}\n",
            root.join("files").display()
        );
        std::fs::write(&config, text)?;
        let program =
            place::program("docker-registry").map_or_else(|| setup::unpacked("docker-registry"), Ok)?;
        let log = std::fs::File::create(root.join("log"))?;
        let child = Command::new(program)
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start docker-registry")?;
        let registry = Docker { child, address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) };
        run::until("docker-registry answers", Duration::from_secs(20), || {
            Ok(http::Request::new("GET", "/v2/").send(registry.address).ok().filter(|r| r.code == 200))
        })?;
        std::fs::remove_file(&config).ok();
        registry.fill(store, &root)?;
        Ok(registry)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Pushes what was not pushed before, image by image.
    fn fill(&self, store: &Store, root: &Path) -> Result<()> {
        let lock = std::fs::File::create(root.join("lock"))?;
        rustix::fs::flock(lock.as_fd(), rustix::fs::FlockOperation::LockExclusive)?;
        let list = root.join("pushed.json");
        let mut pushed: BTreeMap<String, String> =
            std::fs::read(&list).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        for (reference, manifest) in &store.references {
            if pushed.get(reference) != Some(&manifest.digest) {
                push::push(store, reference, self.address)?;
                pushed.insert(reference.clone(), manifest.digest.clone());
                std::fs::write(&list, serde_json::to_vec_pretty(&pushed)?)?;
            }
        }
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What our own registry does with a request for a path.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answers with this status and nothing else.
    Status(u16),
    /// Answers with these bytes in place of the true ones, the length being theirs.
    Replace(Vec<u8>),
    /// Sends so many bytes and closes.
    CutAfter(usize),
    /// Sends so many bytes and then nothing, for as long as the client waits.
    StallAfter(usize),
    /// Adds a header to a true answer.
    Header(String, String),
}

#[derive(Debug, Default)]
struct Script {
    /// Part of a path, and what happens to requests whose path contains it. None as count: every time.
    faults: Vec<(String, Fault, Option<usize>)>,
    log: Vec<String>,
}

/// A registry of our own, in this process: reads only, anonymous, plain HTTP. Its thread ends with the process.
#[derive(Debug, Clone)]
pub struct Own {
    address: SocketAddr,
    script: Arc<Mutex<Script>>,
}

impl Own {
    /// Serves a store.
    pub fn serve(store: Store) -> Result<Own> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let script = Arc::new(Mutex::new(Script::default()));
        let own = Own { address, script: Arc::clone(&script) };
        let store = Arc::new(store);
        std::thread::Builder::new().name("registry".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let (store, script) = (Arc::clone(&store), Arc::clone(&script));
                // A client that goes away in the middle is no affair of the others.
                std::thread::spawn(move || connection(&stream, &store, &script).ok());
            }
        })?;
        Ok(own)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on requests whose path contains `part` go wrong, `times` times or for ever.
    pub fn fail(&self, part: &str, fault: Fault, times: Option<usize>) {
        self.lock().faults.push((part.to_owned(), fault, times));
    }

    /// Everything works again.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// The requests so far, as `METHOD path [range]`.
    pub fn requests(&self) -> Vec<String> {
        self.lock().log.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection: requests until the client closes it.
fn connection(stream: &TcpStream, store: &Store, script: &Mutex<Script>) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    stream.set_write_timeout(Some(Duration::from_secs(120)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let mut range = None;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("range")
            {
                range = parse_range(value.trim());
            }
        }
        let mut words = first.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let fault = note(script, method, path, range);
        if !answer(stream, store, method, path, range, fault)? {
            return Ok(());
        }
    }
}

fn parse_range(value: &str) -> Option<usize> {
    value.strip_prefix("bytes=")?.split_once('-')?.0.parse().ok()
}

/// Logs a request and takes the fault that is planned for it.
fn note(script: &Mutex<Script>, method: &str, path: &str, range: Option<usize>) -> Option<Fault> {
    let mut script = script.lock().unwrap_or_else(PoisonError::into_inner);
    let from = range.map(|from| format!(" {from}-")).unwrap_or_default();
    script.log.push(format!("{method} {path}{from}"));
    let (_, fault, times) = script
        .faults
        .iter_mut()
        .find(|(part, _, times)| path.contains(part.as_str()) && *times != Some(0))?;
    if let Some(times) = times {
        *times -= 1;
    }
    Some(fault.clone())
}

/// Answers one request; false when the connection is to be closed.
fn answer(
    mut stream: &TcpStream,
    store: &Store,
    method: &str,
    path: &str,
    range: Option<usize>,
    fault: Option<Fault>,
) -> Result<bool> {
    let found = find(store, path);
    let (mut code, mut kind, mut body) = match found {
        Some((kind, body)) => (200, kind, body),
        None => (404, "application/json".to_owned(), br#"{"errors":[{"code":"NOT_FOUND"}]}"#.to_vec()),
    };
    let digest = crate::image::digest(&body);
    let mut extra = String::new();
    let mut stop = None;
    match fault {
        Some(Fault::Status(status)) => (code, kind, body) = (status, "text/plain".to_owned(), Vec::new()),
        Some(Fault::Replace(bytes)) => body = bytes,
        Some(Fault::CutAfter(bytes)) => stop = Some((bytes, Duration::ZERO)),
        Some(Fault::StallAfter(bytes)) => stop = Some((bytes, Duration::from_secs(120))),
        Some(Fault::Header(name, value)) => extra = format!("{name}: {value}\r\n"),
        None => {}
    }
    if let Some(from) = range.filter(|from| code == 200 && *from < body.len()) {
        extra.push_str(&format!("Content-Range: bytes {from}-{}/{}\r\n", body.len() - 1, body.len()));
        code = 206;
        body.drain(..from);
    }
    let head = format!(
        "HTTP/1.1 {code} -\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\n\
         Docker-Distribution-Api-Version: registry/2.0\r\nAccept-Ranges: bytes\r\n{extra}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if method == "HEAD" {
        return Ok(true);
    }
    if let Some((bytes, wait)) = stop {
        stream.write_all(&body[..bytes.min(body.len())])?;
        std::thread::sleep(wait);
        return Ok(false);
    }
    stream.write_all(&body)?;
    Ok(true)
}

/// The content behind `/v2/<repository>/{manifests,blobs}/<tag or digest>`. The repository of the large image and of
/// all others lie beside each other, whatever host they were asked under.
fn find(store: &Store, path: &str) -> Option<(String, Vec<u8>)> {
    let path = path.split('?').next()?;
    if path == "/v2/" {
        return Some(("application/json".to_owned(), b"{}".to_vec()));
    }
    let rest = path.strip_prefix("/v2/")?;
    if let Some((_, digest)) = rest.rsplit_once("/blobs/") {
        return Some(("application/octet-stream".to_owned(), store.read(digest).ok()?));
    }
    let (repository, name) = rest.rsplit_once("/manifests/")?;
    let blob = if name.starts_with("sha256:") {
        let body = store.read(name).ok()?;
        let kind = serde_json::from_slice::<serde_json::Value>(&body).ok()?["mediaType"].as_str()?.to_owned();
        return Some((kind, body));
    } else {
        store
            .references
            .iter()
            .find(|(reference, _)| push::split(reference).is_ok_and(|(r, t)| r == repository && t == name))?
            .1
    };
    Some((blob.media_type.clone(), store.read(&blob.digest).ok()?))
}

/// Writes `certs.d/<host>/hosts.toml` for every registry host of the test images, each pointing at one address.
pub fn mirrors(certs: &Path, to: SocketAddr) -> Result<()> {
    for host in ["registry.k8s.io", "gcr.io", "k8s.gcr.io", "crisp.test", "docker.io"] {
        let dir = certs.join(host);
        std::fs::create_dir_all(&dir)?;
        let text = format!(
            "server = \"http://{to}\"\n\n[host.\"http://{to}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        std::fs::write(dir.join("hosts.toml"), text)?;
    }
    Ok(())
}

/// The catalogue together with the large image of the bench.
pub fn with_large(mut store: Store) -> Result<Store> {
    large::ensure(&mut store)?;
    Ok(store)
}
