//! The HTTP server: takes a token from the path, decides how the client wants to go on, answers 101 and hands the
//! connection over. Knows status codes and headers; what flows afterwards is left to `remote` and `forward`.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full as Body;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Attach, Backend, Exec, Full, Limits, forward,
    idle::Watched,
    negotiate::{self, Channels, Version},
    remote::{self, Call},
    spdy::Connection,
    token::Tokens,
    websocket::{self, Tunnel},
};

/// Connections at a time.
const MOST_CONNECTIONS: usize = 4096;
/// Time for TLS and for a request's head.
const HEAD: Duration = Duration::from_secs(30);
/// Time for the clients to hear of the end.
const GOODBYE: Duration = Duration::from_secs(3);
/// Size of a request's head.
const MOST_HEAD: usize = 64 << 10;

/// Serves streaming requests on one address.
pub struct Server<B> {
    shared: Arc<Shared<B>>,
    address: SocketAddr,
    tls: bool,
}

struct Shared<B> {
    backend: Arc<B>,
    limits: Limits,
    tokens: Tokens<Asked>,
    ending: CancellationToken,
    sessions: TaskTracker,
}

#[derive(Clone, Debug)]
enum Asked {
    Remote(Call),
    Forward { pod: String, ports: Vec<u16> },
}

impl Asked {
    fn path(&self) -> &'static str {
        match self {
            Asked::Remote(Call::Exec(_)) => "exec",
            Asked::Remote(Call::Attach(_)) => "attach",
            Asked::Forward { .. } => "portforward",
        }
    }
}

/// How the client wants to go on.
enum Protocol {
    Spdy { name: String, version: Version },
    WebSocket { name: Option<String>, channels: Channels, key: String },
    Tunnel { key: String },
}

impl<B: Backend> Server<B> {
    /// Listens on `address`; port 0 takes any free one. Serves until the value is dropped and the task aborted.
    pub async fn bind(
        address: SocketAddr,
        tls: Option<Arc<rustls::ServerConfig>>,
        limits: Limits,
        backend: Arc<B>,
    ) -> io::Result<(Server<B>, impl Future<Output = ()> + Send)> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            backend,
            limits,
            tokens: Tokens::new(limits.token),
            ending: CancellationToken::new(),
            sessions: TaskTracker::new(),
        });
        let server = Server { shared: shared.clone(), address, tls: tls.is_some() };
        Ok((server, serve(listener, tls.map(TlsAcceptor::from), shared)))
    }

    /// The URL at which a client finds its exec.
    pub fn exec(&self, exec: Exec) -> Result<String, Full> {
        self.url(Asked::Remote(Call::Exec(exec)))
    }

    /// The URL at which a client finds its attach.
    pub fn attach(&self, attach: Attach) -> Result<String, Full> {
        self.url(Asked::Remote(Call::Attach(attach)))
    }

    /// The URL at which a client finds its port-forward. The ports are only of use to the old WebSocket protocol.
    pub fn port_forward(&self, pod: String, ports: Vec<u16>) -> Result<String, Full> {
        self.url(Asked::Forward { pod, ports })
    }

    /// Tells every client that this is the end and waits until they know, for a bounded time.
    pub async fn end(&self) {
        self.shared.ending.cancel();
        self.shared.sessions.close();
        let _ = timeout(GOODBYE, self.shared.sessions.wait()).await;
    }

    fn url(&self, asked: Asked) -> Result<String, Full> {
        let (scheme, path) = (if self.tls { "https" } else { "http" }, asked.path());
        Ok(format!("{scheme}://{}/{path}/{}", self.address, self.shared.tokens.issue(asked)?))
    }
}

async fn serve<B: Backend>(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared<B>>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of descriptors, mostly: others will close some.
                tracing::warn!(%error, "accept a streaming connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (tls, shared) = (tls.clone(), shared.clone());
        tokio::spawn(async move {
            accepted(socket, tls, shared).await;
            drop(place);
        });
    }
}

async fn accepted<B: Backend>(socket: TcpStream, tls: Option<TlsAcceptor>, shared: Arc<Shared<B>>) {
    let _ = socket.set_nodelay(true);
    match tls {
        None => connection(socket, shared).await,
        Some(tls) => match timeout(HEAD, tls.accept(socket)).await {
            Ok(Ok(socket)) => connection(socket, shared).await,
            Ok(Err(error)) => tracing::debug!(%error, "TLS handshake of a streaming connection"),
            Err(_) => tracing::debug!("TLS handshake of a streaming connection took too long"),
        },
    }
}

async fn connection<Io, B>(socket: Io, shared: Arc<Shared<B>>)
where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Backend,
{
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(request, &shared)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MOST_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    if let Err(error) = served.await {
        tracing::debug!(%error, "streaming connection");
    }
}

/// The answer to a request; for a good one, the beginning of what follows.
fn answer<B: Backend>(request: Request<Incoming>, shared: &Arc<Shared<B>>) -> Response<Body<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST");
    }
    let mut path = request.uri().path().split('/').skip(1);
    let (Some(kind), Some(token), None) = (path.next(), path.next(), path.next()) else {
        return plain(StatusCode::NOT_FOUND, "no such path");
    };
    let Some(asked) = shared.tokens.take(token).filter(|asked| asked.path() == kind) else {
        return plain(StatusCode::NOT_FOUND, "unknown token, or used before, or too late");
    };
    let protocol = match choose(request.headers(), &asked) {
        Ok(protocol) => protocol,
        Err(refusal) => return *refusal,
    };
    let query = request.uri().query().unwrap_or_default().to_owned();
    let answer = switching(&protocol);
    let shared = shared.clone();
    shared.sessions.clone().spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => go_on(TokioIo::new(upgraded), asked, protocol, &query, &shared).await,
            Err(error) => tracing::debug!(%error, "upgrade of a streaming connection"),
        }
    });
    answer
}

async fn go_on<Io, B>(io: Io, asked: Asked, protocol: Protocol, query: &str, shared: &Arc<Shared<B>>)
where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Backend,
{
    let (io, clock) = Watched::new(io);
    let (creation, backend) = (shared.limits.creation, &shared.backend);
    let end = async {
        tokio::select! {
            () = clock.idle(shared.limits.idle) => "the connection was idle for too long",
            () = shared.ending.cancelled() => "the runtime is restarting",
        }
    };
    match (asked, protocol) {
        (Asked::Remote(call), Protocol::Spdy { version, .. }) => {
            let connection = Connection::serve(io, Bytes::new());
            remote::serve(connection, call, version, creation, &**backend, end).await;
        }
        (Asked::Remote(call), Protocol::WebSocket { channels, .. }) => {
            websocket::serve(websocket::accept(io).await, call, channels, &**backend, end).await;
        }
        (Asked::Forward { pod, .. }, Protocol::Spdy { .. }) => {
            forward::serve(Connection::serve(io, Bytes::new()), &pod, creation, backend, end).await;
        }
        (Asked::Forward { pod, .. }, Protocol::Tunnel { .. }) => {
            let tunnel = Tunnel::new(websocket::accept(io).await);
            forward::serve(Connection::serve(tunnel, Bytes::new()), &pod, creation, backend, end).await;
        }
        (Asked::Forward { pod, ports }, Protocol::WebSocket { channels, .. }) => {
            let ports = if ports.is_empty() { ports_of(query) } else { ports };
            let socket = websocket::accept(io).await;
            tokio::select! {
                () = forward::serve_websocket(socket, channels, &pod, &ports, &**backend) => {}
                _ = end => {}
            }
        }
        (Asked::Remote(_), Protocol::Tunnel { .. }) => {}
    }
}

fn choose(headers: &HeaderMap, asked: &Asked) -> Result<Protocol, Box<Response<Body<Bytes>>>> {
    let refuse = |status, text: &str| Err(Box::new(plain(status, text)));
    if negotiate::upgrades(headers, "websocket") {
        let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok()) else {
            return refuse(StatusCode::BAD_REQUEST, "no Sec-WebSocket-Key");
        };
        let key = key.to_owned();
        let offered = negotiate::values(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
        let forward = matches!(asked, Asked::Forward { .. });
        if forward && offered.iter().any(|offer| offer == negotiate::TUNNEL) {
            return Ok(Protocol::Tunnel { key });
        }
        return match negotiate::websocket(&offered) {
            Some((name, channels)) => Ok(Protocol::WebSocket { name, channels, key }),
            None => refuse(StatusCode::FORBIDDEN, "none of the subprotocols is spoken here"),
        };
    }
    if !negotiate::upgrades(headers, negotiate::SPDY) {
        return refuse(StatusCode::BAD_REQUEST, "upgrade to SPDY/3.1 or WebSocket wanted");
    }
    let offered = negotiate::values(headers, negotiate::VERSION_HEADER);
    if offered.is_empty() {
        return refuse(StatusCode::BAD_REQUEST, "no X-Stream-Protocol-Version");
    }
    let (chosen, spoken): (_, Vec<&str>) = match asked {
        Asked::Remote(_) => (negotiate::remote(&offered), negotiate::remote_names().collect()),
        Asked::Forward { .. } => {
            let chosen = offered.iter().find(|offer| *offer == negotiate::PORT_FORWARD);
            (chosen.map(|name| (name.clone(), Version::V1)), vec![negotiate::PORT_FORWARD])
        }
    };
    match chosen {
        Some((name, version)) => Ok(Protocol::Spdy { name, version }),
        None => {
            let mut refusal = plain(StatusCode::FORBIDDEN, "none of the stream protocols is spoken here");
            for name in spoken {
                refusal
                    .headers_mut()
                    .append("x-accepted-stream-protocol-versions", HeaderValue::from_static(name));
            }
            Err(Box::new(refusal))
        }
    }
}

fn switching(protocol: &Protocol) -> Response<Body<Bytes>> {
    let mut answer = Response::new(Body::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let mut set = |name: header::HeaderName, value: &str| {
        // What comes back to the client is what it offered, which was a header value before.
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    match protocol {
        Protocol::Spdy { name, .. } => {
            set(header::UPGRADE, negotiate::SPDY);
            set(header::HeaderName::from_static(negotiate::VERSION_HEADER), name);
        }
        Protocol::WebSocket { name, key, .. } => {
            set(header::UPGRADE, "websocket");
            set(header::SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
            if let Some(name) = name {
                set(header::SEC_WEBSOCKET_PROTOCOL, name);
            }
        }
        Protocol::Tunnel { key } => {
            set(header::UPGRADE, "websocket");
            set(header::SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
            set(header::SEC_WEBSOCKET_PROTOCOL, negotiate::TUNNEL);
        }
    }
    answer
}

/// Ports of a query like `port=80&ports=81,82`.
fn ports_of(query: &str) -> Vec<u16> {
    let named = query.split('&').filter_map(|pair| pair.split_once('='));
    let lists =
        named.filter(|(name, _)| matches!(*name, "port" | "ports")).map(|(_, list)| list.replace("%2C", ","));
    let mut ports = Vec::new();
    for list in lists {
        ports.extend(list.split(',').filter_map(|port| port.parse::<u16>().ok()).filter(|port| *port != 0));
    }
    ports.truncate(forward::MOST_PORTS);
    ports
}

fn plain(status: StatusCode, text: &str) -> Response<Body<Bytes>> {
    let mut answer = Response::new(Body::new(Bytes::copy_from_slice(format!("{text}\n").as_bytes())));
    *answer.status_mut() = status;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_come_repeated_or_in_lists() {
        assert_eq!(ports_of("ports=80,81&x=1&port=82&port=0&port=x"), [80, 81, 82]);
        assert_eq!(ports_of(&"port=1&".repeat(500)).len(), forward::MOST_PORTS);
    }
}
