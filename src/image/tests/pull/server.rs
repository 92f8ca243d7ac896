//! A registry that does what a script says: it stalls, breaks, lies and redirects, and remembers every request.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fixtures::digest;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn authorization(&self) -> Option<&str> {
        self.headers.get("authorization").map(String::as_str)
    }

    pub(crate) fn range(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What goes wrong with an answer's body.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    None,
    /// Says nothing more after so many bytes.
    Stall(usize),
    /// Closes the connection after so many bytes.
    Cut(usize),
    /// So many bytes a second.
    Trickle(usize),
    /// Says nothing at all.
    Silent,
    /// So many bytes more than announced by the manifest.
    Longer(usize),
    /// The content, and then more of anything, without a length and without an end.
    Endless,
}

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) fault: Fault,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), body: Vec::new(), fault: Fault::None }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Reply {
        self.body = body.into();
        self
    }
}

/// What is asked before the content: `Some` answers in its place.
pub(crate) type Script = Box<dyn Fn(&Request, usize) -> Option<Reply> + Send + Sync>;

#[derive(Default)]
pub(crate) struct Content {
    /// By path without `/v2/`: type and bytes.
    files: HashMap<String, (String, Vec<u8>)>,
}

impl Content {
    pub(crate) fn manifest(&mut self, repository: &str, tag: &str, media_type: &str, body: &[u8]) -> String {
        let digest = digest(body);
        for selector in [tag, &digest] {
            let path = format!("{repository}/manifests/{selector}");
            self.files.insert(path, (media_type.into(), body.to_vec()));
        }
        digest
    }

    pub(crate) fn blob(&mut self, repository: &str, body: &[u8]) -> String {
        let digest = digest(body);
        let path = format!("{repository}/blobs/{digest}");
        self.files.insert(path, ("application/octet-stream".into(), body.to_vec()));
        digest
    }

    /// As [`Content::blob`], but with other bytes than the digest says.
    pub(crate) fn lie(&mut self, repository: &str, digest: &str, body: &[u8]) {
        let path = format!("{repository}/blobs/{digest}");
        self.files.insert(path, ("application/octet-stream".into(), body.to_vec()));
    }

    pub(crate) fn remove(&mut self, path: &str) {
        self.files.remove(path);
    }
}

pub(crate) struct Server {
    pub(crate) address: std::net::SocketAddr,
    pub(crate) content: Arc<Mutex<Content>>,
    log: Arc<Mutex<Vec<Request>>>,
    script: Arc<Mutex<Script>>,
    open: Arc<AtomicUsize>,
    ranges: Arc<std::sync::atomic::AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start() -> Server {
        Server::on("127.0.0.1:0", None).await
    }

    /// On an address, with TLS if there is a configuration.
    pub(crate) async fn on(address: &str, tls: Option<Arc<rustls::ServerConfig>>) -> Server {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let content = Arc::new(Mutex::new(Content::default()));
        let log = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(|_, _| None)));
        let open = Arc::new(AtomicUsize::new(0));
        let ranges = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let task = {
            let (content, log, script, open, ranges) =
                (content.clone(), log.clone(), script.clone(), open.clone(), ranges.clone());
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let state = State {
                        content: content.clone(),
                        log: log.clone(),
                        script: script.clone(),
                        ranges: ranges.clone(),
                    };
                    let open = Open::new(open.clone());
                    let tls = tls.clone();
                    tokio::spawn(async move {
                        let _open = open;
                        match tls {
                            None => serve(stream, state).await,
                            Some(config) => {
                                let acceptor = tokio_rustls::TlsAcceptor::from(config);
                                if let Ok(stream) = acceptor.accept(stream).await {
                                    serve(stream, state).await;
                                }
                            }
                        }
                    });
                }
            })
        };
        Server { address, content, log, script, open, ranges, task }
    }

    pub(crate) fn script(&self, script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    /// From now on ranges are ignored.
    pub(crate) fn without_ranges(&self) {
        self.ranges.store(false, Ordering::SeqCst);
    }

    pub(crate) fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn forget(&self) {
        self.log.lock().unwrap().clear();
    }

    /// Requests whose path contains this.
    pub(crate) fn asked(&self, part: &str) -> Vec<Request> {
        self.log().into_iter().filter(|request| request.path.contains(part)).collect()
    }

    /// Connections that are open now.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: Arc<AtomicUsize>) -> Open {
        count.fetch_add(1, Ordering::SeqCst);
        Open(count)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct State {
    content: Arc<Mutex<Content>>,
    log: Arc<Mutex<Vec<Request>>>,
    script: Arc<Mutex<Script>>,
    ranges: Arc<std::sync::atomic::AtomicBool>,
}

impl State {
    fn reply(&self, request: &Request) -> Reply {
        // How often this path was asked for before.
        let before = {
            let mut log = self.log.lock().unwrap();
            let before = log.iter().filter(|earlier| earlier.path == request.path).count();
            log.push(request.clone());
            before
        };
        let mut reply = match (self.script.lock().unwrap())(request, before) {
            // A fault alone is put on what would have been answered.
            Some(reply) if reply.status == 0 => Reply { fault: reply.fault, ..self.file(request) },
            Some(reply) => return reply,
            None => self.file(request),
        };
        if let Fault::Longer(more) = reply.fault {
            reply.body.resize(reply.body.len() + more, 7);
        }
        if let (Some(start), true, 200) = (request.range(), self.ranges.load(Ordering::SeqCst), reply.status)
        {
            let total = reply.body.len();
            reply.status = 206;
            reply.headers.push(("content-range".into(), format!("bytes {start}-{}/{total}", total - 1)));
            reply.body.drain(..start.min(total));
        }
        reply
    }

    fn file(&self, request: &Request) -> Reply {
        let path = request.path.split('?').next().unwrap().trim_start_matches("/v2/").trim_start_matches('/');
        match self.content.lock().unwrap().files.get(path) {
            Some((media_type, body)) => Reply::new(200).header("content-type", media_type).body(body.clone()),
            None => Reply::new(404).body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#),
        }
    }
}

/// Only a fault; the content stays.
pub(crate) fn only(fault: Fault) -> Option<Reply> {
    Some(Reply { status: 0, headers: Vec::new(), body: Vec::new(), fault })
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, state: State) {
    while let Some(request) = read(&mut stream).await {
        let reply = state.reply(&request);
        if write(&mut stream, reply).await.is_none() {
            return;
        }
    }
}

async fn read(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Option<Request> {
    let mut head = vec![stream.read_u8().await.ok()?];
    if head == [0x16] {
        // TLS at a server that does not speak it: as Go's answers.
        let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request").await;
        return None;
    }
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head).ok()?;
    let mut lines = text.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request { method, path, headers, body })
}

async fn write(stream: &mut (impl AsyncWrite + AsyncRead + Unpin), reply: Reply) -> Option<()> {
    if reply.fault == Fault::Silent {
        return wait(stream).await;
    }
    let length = match reply.fault {
        Fault::Endless => "transfer-encoding: chunked".to_owned(),
        _ => format!("content-length: {}", reply.body.len()),
    };
    let mut head = format!("HTTP/1.1 {} x\r\n{length}\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    match reply.fault {
        Fault::None | Fault::Longer(_) => stream.write_all(&reply.body).await.ok()?,
        Fault::Stall(after) => {
            stream.write_all(&reply.body[..after.min(reply.body.len())]).await.ok()?;
            stream.flush().await.ok()?;
            return wait(stream).await;
        }
        Fault::Cut(after) => {
            stream.write_all(&reply.body[..after.min(reply.body.len())]).await.ok()?;
            stream.flush().await.ok()?;
            return None;
        }
        Fault::Trickle(rate) => {
            for piece in reply.body.chunks(rate.max(10) / 10) {
                stream.write_all(piece).await.ok()?;
                stream.flush().await.ok()?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Fault::Endless => loop {
            for piece in [reply.body.as_slice(), &[b' '; 65536]].iter().filter(|piece| !piece.is_empty()) {
                stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.ok()?;
                stream.write_all(piece).await.ok()?;
                stream.write_all(b"\r\n").await.ok()?;
            }
        },
        Fault::Silent => {}
    }
    stream.flush().await.ok()
}

/// Until the other side goes away.
async fn wait(stream: &mut (impl AsyncRead + Unpin)) -> Option<()> {
    let mut byte = [0];
    let _ = stream.read(&mut byte).await;
    None
}
