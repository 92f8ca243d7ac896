//! How a connection is made: name look-up, the addresses that we refuse, proxies, TLS. Plain HTTP is spoken where a
//! URL says so; whether it may say so is decided by the caller.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use http::Uri;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::hosts::{Endpoint, is_loopback};
use crate::error::{Error, Result};
use crate::settings::Proxy;

/// How long a connection may take when nothing else was configured.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// What talks HTTP.
pub(crate) type Http = Client<HttpsConnector<Dialer>, http_body_util::Full<bytes::Bytes>>;

/// Where we may be sent by others than the operator: a registry that redirects or names a token server must not turn
/// us against this machine or the cloud's metadata service (S39).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The operator named the host.
    Anywhere,
    /// The registry did.
    Public,
}

/// Why a connection was not even tried.
#[derive(Debug, thiserror::Error)]
#[error("{host} is at {address}, where registries must not send us")]
pub(crate) struct OutOfReach {
    host: String,
    address: IpAddr,
}

/// What all connections share: trusted roots and the proxies.
#[derive(Clone)]
pub(crate) struct Tls {
    roots: Arc<OnceLock<Arc<RootCertStore>>>,
    proxies: Arc<Proxies>,
}

impl Tls {
    pub(crate) fn new(proxy: &Proxy) -> Tls {
        Tls { roots: Arc::default(), proxies: Arc::new(Proxies::new(proxy)) }
    }

    /// A client for one endpoint. Reads certificates, and the system's roots the first time: blocking.
    pub(crate) fn client(&self, endpoint: &Endpoint) -> Result<Http> {
        let timeout = endpoint.dial_timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(DIAL_TIMEOUT);
        self.http(Some(endpoint), Reach::Anywhere, timeout)
    }

    /// A client for wherever an endpoint sends us: it has neither the endpoint's certificates nor its leniency.
    pub(crate) fn away(&self, reach: Reach) -> Result<Http> {
        self.http(None, reach, DIAL_TIMEOUT)
    }

    fn http(&self, endpoint: Option<&Endpoint>, reach: Reach, timeout: Duration) -> Result<Http> {
        let config = self.config(endpoint)?;
        let dialer = Dialer { reach, timeout, proxies: self.proxies.clone() };
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(dialer);
        Ok(Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .build(connector))
    }

    fn config(&self, endpoint: Option<&Endpoint>) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::InvalidArgument(format!("TLS: {error}")))?;
        let builder = match endpoint {
            Some(endpoint) if endpoint.skip_verify => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone { provider }))
            }
            _ => builder.with_root_certificates(self.roots(endpoint)?),
        };
        let Some((path, key_path)) = endpoint.and_then(|endpoint| endpoint.client.first()) else {
            return Ok(builder.with_no_client_auth());
        };
        let bad = |path: &std::path::Path, why: String| Error::Config { path: path.to_owned(), why };
        let read = |path: &std::path::Path| std::fs::read(path).map_err(|error| bad(path, error.to_string()));
        let text = read(path)?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|error| bad(path, format!("not a certificate: {error}")))?;
        let key_path = key_path.as_ref().unwrap_or(path);
        let key = PrivateKeyDer::from_pem_slice(&read(key_path)?)
            .map_err(|error| bad(key_path, format!("not a key: {error}")))?;
        builder.with_client_auth_cert(chain, key).map_err(|error| bad(path, error.to_string()))
    }

    fn roots(&self, endpoint: Option<&Endpoint>) -> Result<Arc<RootCertStore>> {
        let system = self.roots.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let native = rustls_native_certs::load_native_certs();
            for error in native.errors {
                tracing::warn!(%error, "a trusted root of the system is unreadable");
            }
            roots.add_parsable_certificates(native.certs);
            Arc::new(roots)
        });
        let files = endpoint.map(|endpoint| endpoint.ca.as_slice()).unwrap_or_default();
        if files.is_empty() {
            return Ok(system.clone());
        }
        let mut roots = RootCertStore::clone(system);
        for path in files {
            let bad = |why: String| Error::Config { path: path.clone(), why };
            let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
            let mut any = false;
            for certificate in CertificateDer::pem_slice_iter(&text) {
                let certificate = certificate.map_err(|error| bad(format!("not a certificate: {error}")))?;
                roots.add(certificate).map_err(|error| bad(error.to_string()))?;
                any = true;
            }
            if !any {
                return Err(bad("holds no certificate".into()));
            }
        }
        Ok(Arc::new(roots))
    }
}

/// Opens TCP connections, perhaps through a proxy.
#[derive(Clone)]
pub(crate) struct Dialer {
    reach: Reach,
    timeout: Duration,
    proxies: Arc<Proxies>,
}

impl tower::Service<Uri> for Dialer {
    type Response = Stream;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move {
            match tokio::time::timeout(dialer.timeout, dialer.dial(&uri)).await {
                Ok(result) => result,
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time").into()),
            }
        })
    }
}

impl Dialer {
    async fn dial(&self, uri: &Uri) -> Result<Stream, Box<dyn std::error::Error + Send + Sync>> {
        let https = uri.scheme_str() == Some("https");
        let host = uri.host().ok_or("no host")?;
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        if let Some(proxy) = self.proxies.for_target(https, host, port) {
            // The proxy looks the name up; only what is written as an address can be judged here.
            if let Ok(address) = bare(host).parse() {
                self.judge(host, address)?;
            }
            let stream = connect(&self.resolve(&proxy.host, proxy.port).await?).await?;
            let stream = if https { tunnel(stream, host, port, proxy).await? } else { stream };
            return Ok(Stream { io: TokioIo::new(stream), proxied: !https });
        }
        let addresses = self.resolve(bare(host), port).await?;
        for address in &addresses {
            self.judge(host, address.ip())?;
        }
        Ok(Stream { io: TokioIo::new(connect(&addresses).await?), proxied: false })
    }

    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }

    fn judge(&self, host: &str, address: IpAddr) -> Result<(), OutOfReach> {
        if self.reach == Reach::Public && is_private_to_host(address) {
            return Err(OutOfReach { host: host.to_owned(), address });
        }
        Ok(())
    }
}

/// Loopback, link-local, and what means either: addresses that say something else to us than to the registry.
pub(crate) fn is_private_to_host(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_broadcast()
                || v4.is_multicast()
                || v4.octets()[0] == 0
        }
        IpAddr::V6(v6) => {
            let segments = v6.segments();
            let embedded = match segments {
                // NAT64 and 6to4 carry an IPv4 address (RFC 6052, RFC 3056).
                [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some((high, low)),
                [0x2002, high, low, ..] => Some((high, low)),
                [0, 0, 0, 0, 0, 0, high, low] if high != 0 => Some((high, low)),
                _ => None,
            };
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || segments[0] & 0xffc0 == 0xfe80
                // A cloud's metadata service, on an address that looks like any private network.
                || segments[..2] == [0xfd00, 0xec2]
                || embedded.is_some_and(|(high, low)| {
                    let [a, b] = high.to_be_bytes();
                    let [c, d] = low.to_be_bytes();
                    is_private_to_host(IpAddr::from([a, b, c, d]))
                })
        }
    }
}

/// Tries each address, most of the time the first.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses.iter().take(16) {
        // One dead address of several must not use up the whole deadline.
        let patience = if addresses.len() > 1 { Duration::from_secs(5) } else { Duration::from_secs(3600) };
        match tokio::time::timeout(patience, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer")),
        }
    }
    Err(last)
}

/// Asks a proxy for a way through (RFC 9110, section 9.3.6).
async fn tunnel(mut stream: TcpStream, host: &str, port: u16, proxy: &ProxyServer) -> io::Result<TcpStream> {
    let mut request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
    if let Some(authorization) = &proxy.authorization {
        request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    // Byte by byte: what follows the head belongs to TLS.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 16 << 10 {
            return Err(io::Error::other("the proxy's answer has no end"));
        }
        head.push(stream.read_u8().await?);
    }
    let status = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    if status.first() == Some(&b'2') {
        return Ok(stream);
    }
    Err(io::Error::other(format!("the proxy answered {}", String::from_utf8_lossy(status))))
}

/// IPv6 addresses stand in brackets in a URL.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// A TCP connection that knows whether it leads to a proxy.
pub(crate) struct Stream {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().proxy(self.proxied)
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// Which proxy serves which target, by the rules of Go's `net/http`, which operators know.
#[derive(Debug, Default)]
struct Proxies {
    https: Option<ProxyServer>,
    http: Option<ProxyServer>,
    except: Vec<String>,
}

#[derive(Debug, Clone)]
struct ProxyServer {
    host: String,
    port: u16,
    authorization: Option<String>,
}

impl Proxies {
    fn new(proxy: &Proxy) -> Proxies {
        let variable = |name: &str| {
            std::env::var(name).or_else(|_| std::env::var(name.to_ascii_lowercase())).unwrap_or_default()
        };
        match proxy {
            Proxy::None => Proxies::default(),
            Proxy::Url(url) => Proxies { https: server(url), http: server(url), except: Vec::new() },
            Proxy::Environment => Proxies {
                https: server(&variable("HTTPS_PROXY")),
                http: server(&variable("HTTP_PROXY")),
                except: variable("NO_PROXY").split(',').map(|one| one.trim().to_ascii_lowercase()).collect(),
            },
        }
    }

    fn for_target(&self, https: bool, host: &str, port: u16) -> Option<&ProxyServer> {
        let proxy = if https { &self.https } else { &self.http }.as_ref()?;
        let host = bare(host).trim_end_matches('.').to_ascii_lowercase();
        let excepted = is_loopback(&host)
            || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
            || self.except.iter().any(|rule| excepts(rule, &host, port));
        (!excepted).then_some(proxy)
    }
}

fn excepts(rule: &str, host: &str, port: u16) -> bool {
    if rule == "*" {
        return true;
    }
    if rule.is_empty() {
        return false;
    }
    if let (Some((network, bits)), Ok(address)) = (rule.split_once('/'), host.parse::<IpAddr>()) {
        let (Ok(network), Ok(bits)) = (network.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
        return within(address, network, bits);
    }
    let (name, only) = match rule.rsplit_once(':') {
        Some((name, digits)) if !name.contains(':') => (name, digits.parse::<u16>().ok()),
        _ => (rule, None),
    };
    if only.is_some_and(|only| only != port) {
        return false;
    }
    let name = name.strip_prefix('*').unwrap_or(name);
    match name.strip_prefix('.') {
        // A leading dot means subdomains only.
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
        None => host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')),
    }
}

fn within(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(n)) if bits <= 32 => {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            a.to_bits() & mask == n.to_bits() & mask
        }
        (IpAddr::V6(a), IpAddr::V6(n)) if bits <= 128 => {
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            a.to_bits() & mask == n.to_bits() & mask
        }
        _ => false,
    }
}

fn server(url: &str) -> Option<ProxyServer> {
    if url.is_empty() {
        return None;
    }
    let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let parsed: Option<Uri> = full.parse().ok();
    let Some(uri) = parsed.filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some()) else {
        // The URL may hold a password.
        tracing::error!("the proxy is no http URL, it is not used");
        return None;
    };
    let user =
        uri.authority().and_then(|authority| authority.as_str().rsplit_once('@')).map(|(user, _)| user);
    Some(ProxyServer {
        host: bare(uri.host()?).to_owned(),
        port: uri.port_u16().unwrap_or(80),
        authorization: user.map(|user| {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(percent_decode(user)))
        }),
    })
}

fn percent_decode(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let hex = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        if byte == b'%'
            && let (Some(high), Some(low)) = (hex(bytes.clone().next()), hex(bytes.clone().nth(1)))
        {
            decoded.push(u8::try_from(high * 16 + low).unwrap_or(b'%'));
            bytes.nth(1);
            continue;
        }
        decoded.push(byte);
    }
    decoded
}

/// The operator asked not to check: `skip_verify`, and TLS on loopback.
#[derive(Debug)]
struct Anyone {
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s39_addresses_that_mean_this_machine_are_out_of_reach() {
        for bad in [
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "::1",
            "::",
            "fe80::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::",
            "fd00:ec2::254",
            "::7f00:1",
            "ff02::1",
            "224.0.0.1",
        ] {
            assert!(is_private_to_host(bad.parse().unwrap()), "{bad}");
        }
        for good in ["10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1", "fd00::1", "64:ff9b::808:808"] {
            assert!(!is_private_to_host(good.parse().unwrap()), "{good}");
        }
    }

    #[tokio::test]
    async fn s39_a_dialer_for_the_public_does_not_connect_to_this_machine() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for (reach, connects) in [(Reach::Anywhere, true), (Reach::Public, false)] {
            for host in ["127.0.0.1", "localhost"] {
                let dialer =
                    Dialer { reach, timeout: Duration::from_secs(5), proxies: Arc::new(Proxies::default()) };
                let uri = format!("http://{host}:{port}/").parse().unwrap();
                let result = dialer.dial(&uri).await;
                assert_eq!(result.is_ok(), connects, "{host}");
                if let Err(error) = result {
                    assert!(error.downcast_ref::<OutOfReach>().is_some(), "{error}");
                }
            }
        }
    }

    #[test]
    fn proxies_are_chosen_as_go_does() {
        let proxies = Proxies {
            https: server("http://user:p%40ss@proxy.example:3128"),
            http: None,
            except: ["a.example", ".b.example", "10.0.0.0/8", "c.example:444", "fd00::/8"]
                .map(String::from)
                .to_vec(),
        };
        let through = |host: &str, port| proxies.for_target(true, host, port).is_some();
        assert!(through("r.example", 443) && through("b.example", 443) && through("c.example", 443));
        for direct in [
            "a.example",
            "x.a.example",
            "x.b.example",
            "10.1.2.3",
            "localhost",
            "127.0.0.1",
            "[::1]",
            "[fd00::1]",
        ] {
            assert!(!through(direct, 443), "{direct}");
        }
        assert!(!through("c.example", 444));
        assert!(proxies.for_target(false, "r.example", 80).is_none());
        let proxy = proxies.https.unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.example", 3128));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic dXNlcjpwQHNz"));
        assert!(server("socks5://x").is_none() && server("").is_none());
    }
}
