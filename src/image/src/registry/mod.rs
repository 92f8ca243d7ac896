//! A registry, as one pull sees it: the servers that may answer, who we are to each of them, and documents and blobs
//! that come back whole or not at all. Digests of blobs are checked by whoever reads them; retries, resumption,
//! redirects and credentials end here.
//!
//! Who gets credentials: the servers that the operator named for this registry, and the token servers that they in
//! turn name, within limits. A redirect to another origin gets none, and its own challenges are not answered (S39).

pub(crate) mod challenge;
mod dial;
pub(crate) mod hosts;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER, USER_AGENT,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use tokio::sync::Mutex;

use crate::auth::{Auth, Secret};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest;
use crate::reference::Reference;
use challenge::Challenge;
pub(crate) use dial::Tls;
use dial::{Http, OutOfReach, Reach};
use hosts::{Endpoint, is_loopback};

/// From sending a request to the end of the answer's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// For a guess that a server speaks TLS.
const GUESS_TIMEOUT: Duration = Duration::from_secs(5);
/// For all of a small document.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Hops of one request.
const MAX_REDIRECTS: usize = 10;
/// Tries of one request at one server, without progress.
const MAX_TRIES: u32 = 5;
/// Breaks of one download at one server, with or without progress.
const MAX_BREAKS: u32 = 20;
/// The most that we wait because a server says so.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
/// A token, with everything around it.
const MAX_TOKEN: usize = 1 << 20;
/// What of an error's body is repeated.
const MAX_WORDS: usize = 300;

/// When a download counts as stalled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Without a byte for so long.
    pub(crate) timeout: Duration,
    /// Or with fewer bytes a second than this over that time.
    pub(crate) floor: u64,
}

/// One pull's view of a registry.
pub(crate) struct Session {
    peers: Vec<Peer>,
    reference: Reference,
    auth: Option<Auth>,
    pace: Pace,
}

/// One server.
struct Peer {
    endpoint: Endpoint,
    http: Http,
    /// For wherever the server sends us.
    away: Http,
    /// What we say who we are, once we were asked.
    granted: Mutex<Granted>,
    /// TLS was refused where it was only tried.
    plain: AtomicBool,
    /// Something was answered: how it is spoken to is known.
    settled: AtomicBool,
}

#[derive(Default)]
struct Granted {
    header: Option<HeaderValue>,
    /// Grows with each new header, so that of many who see it refused one renews it.
    generation: u64,
}

/// A document and what came with it.
pub(crate) struct Fetched {
    pub(crate) body: Bytes,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
}

/// How a request failed, as far as it matters for what to do next.
enum Failure {
    /// Worth another try, perhaps only after a while.
    Again { why: String, after: Option<Duration> },
    /// Not at this server.
    Final(Error),
}

impl Session {
    /// Reads the configuration of a registry and makes ready to ask. Blocking.
    pub(crate) fn open(
        tls: &Tls,
        directories: &[PathBuf],
        reference: Reference,
        auth: Option<Auth>,
        pace: Pace,
    ) -> Result<Session> {
        let peer = |endpoint: Endpoint| {
            let reach = if is_loopback(&endpoint.host) { Reach::Anywhere } else { Reach::Public };
            Ok(Peer {
                http: tls.client(&endpoint)?,
                away: tls.away(reach)?,
                endpoint,
                granted: Mutex::default(),
                plain: false.into(),
                settled: false.into(),
            })
        };
        let peers =
            hosts::endpoints(directories, reference.host())?.into_iter().map(peer).collect::<Result<_>>()?;
        Ok(Session { peers, reference, auth, pace })
    }

    /// Asks what a tag or digest stands for. The body is checked against `wanted`, or gives the digest itself.
    pub(crate) async fn manifest(&self, selector: &str, wanted: Option<Digest>) -> Result<Fetched> {
        let what = match wanted {
            Some(digest) => self.reference.with_digest(&digest),
            None => self.reference.to_string(),
        };
        let path = format!("manifests/{selector}");
        let usable = |peer: &&Peer| if wanted.is_some() { peer.endpoint.pull } else { peer.endpoint.resolve };
        self.document(&what, &path, wanted, usable, manifest::ACCEPT).await
    }

    /// Fetches a small blob whole.
    pub(crate) async fn blob(&self, digest: Digest) -> Result<Bytes> {
        let path = format!("blobs/{digest}");
        let what = self.reference.with_digest(&digest);
        Ok(self.document(&what, &path, Some(digest), |peer| peer.endpoint.pull, "*/*").await?.body)
    }

    /// Starts the download of a blob of a known size.
    pub(crate) fn download(&self, digest: Digest, size: u64) -> Download<'_> {
        Download {
            session: self,
            digest,
            size,
            offset: 0,
            skip: 0,
            body: None,
            meter: Meter::new(self.pace),
            peer: 0,
            tries: 0,
            breaks: 0,
            used: 0,
            banned: 0,
            last: None,
        }
    }

    async fn document(
        &self,
        what: &str,
        path: &str,
        wanted: Option<Digest>,
        usable: impl Fn(&&Peer) -> bool,
        accept: &'static str,
    ) -> Result<Fetched> {
        let mut last = None;
        for peer in self.peers.iter().filter(usable) {
            match self.document_from(peer, what, path, wanted, accept).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => {
                    tracing::debug!(%what, host = %peer.endpoint.host, %error, "not from this server");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::NotFound(format!("{what}: no server is configured for it"))))
    }

    async fn document_from(
        &self,
        peer: &Peer,
        what: &str,
        path: &str,
        wanted: Option<Digest>,
        accept: &'static str,
    ) -> Result<Fetched> {
        let host = &peer.endpoint.host;
        let mut tries = 0;
        loop {
            let attempt = async {
                let response = self.request(peer, what, path, accept, 0).await?;
                self.whole(response, what).await
            };
            let failure = match tokio::time::timeout(DOCUMENT_TIMEOUT, attempt).await {
                Ok(Ok((content_type, body))) => {
                    let digest = match wanted {
                        Some(wanted) => wanted.check(&body).err().map_or(Ok(wanted), |actual| {
                            Err(Error::Digest {
                                what: what.to_owned(),
                                expected: wanted.to_string(),
                                actual: actual.to_string(),
                            })
                        })?,
                        None => Digest::sha256(&body),
                    };
                    return Ok(Fetched { body, content_type, digest });
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::Again { why: "the answer does not end".into(), after: None },
            };
            match failure {
                Failure::Final(error) => return Err(error),
                Failure::Again { why, after } => {
                    tries += 1;
                    if tries >= MAX_TRIES.min(3) {
                        return Err(Error::RegistryUnavailable { host: host.clone(), why });
                    }
                    tokio::time::sleep(patience(tries, after)).await;
                }
            }
        }
    }

    /// The body of an answer, if it is no longer than a document may be.
    async fn whole(
        &self,
        response: Response<Incoming>,
        what: &str,
    ) -> Result<(Option<String>, Bytes), Failure> {
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut body = response.into_body();
        let mut meter = Meter::new(self.pace);
        let mut bytes = Vec::new();
        while let Some(chunk) =
            meter.next(&mut body).await.map_err(|why| Failure::Again { why, after: None })?
        {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > manifest::MAX_DOCUMENT {
                return Err(Failure::Final(manifest::too_long(what)));
            }
        }
        Ok((content_type, bytes.into()))
    }

    /// Sends one request and comes back with a good answer: credentials are found, redirects followed.
    async fn request(
        &self,
        peer: &Peer,
        what: &str,
        path: &str,
        accept: &'static str,
        offset: u64,
    ) -> Result<Response<Incoming>, Failure> {
        let endpoint = &peer.endpoint;
        let mut asked = 0;
        loop {
            let (authorization, generation) = self.authorization(peer).await;
            let url = self.url(peer, path)?;
            let response = self.follow(peer, url, accept, offset, authorization).await?;
            let status = response.status();
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::UNAUTHORIZED if response.extensions().get::<Away>().is_none() && asked < 2 => {
                    asked += 1;
                    self.answer(peer, what, &response, generation).await?;
                }
                _ => return Err(refusal(endpoint, what, response).await),
            }
        }
    }

    fn url(&self, peer: &Peer, path: &str) -> Result<Uri, Failure> {
        let endpoint = &peer.endpoint;
        let scheme = if peer.speaks_tls() { "https" } else { "http" };
        let mut url =
            format!("{scheme}://{}{}/{}/{path}", endpoint.host, endpoint.path, self.reference.path());
        // A mirror of several registries is told which one is meant.
        let own = self.reference.host();
        if endpoint.host != own && !(own == "docker.io" && endpoint.host == "registry-1.docker.io") {
            url.push_str(&format!("?ns={own}"));
        }
        url.parse().map_err(|_| Failure::Final(invalid(endpoint, format!("its URL {url:?} is malformed"))))
    }

    /// Sends a request along redirects. Credentials and configured headers go to the server itself only.
    async fn follow(
        &self,
        peer: &Peer,
        mut url: Uri,
        accept: &'static str,
        offset: u64,
        authorization: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, Failure> {
        let endpoint = &peer.endpoint;
        let home = origin(&url);
        for _ in 0..=MAX_REDIRECTS {
            let at_home = origin(&url) == home;
            let mut request = Request::builder().method(Method::GET).uri(url.clone());
            request = request.header(ACCEPT, accept).header(USER_AGENT, AGENT);
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            if at_home {
                for (name, value) in &endpoint.header {
                    request = request.header(name, value);
                }
                if let Some(authorization) = &authorization {
                    request = request.header(AUTHORIZATION, authorization);
                }
            }
            let request = request
                .body(Full::default())
                .map_err(|error| Failure::Final(invalid(endpoint, format!("request: {error}"))))?;
            let http = if at_home { &peer.http } else { &peer.away };
            let mut response = match self.send(peer, http, request).await? {
                Some(response) => response,
                // TLS was tried and is not spoken there: the same again without.
                None => return Box::pin(self.follow(peer, plain(&url), accept, offset, authorization)).await,
            };
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                if !at_home {
                    response.extensions_mut().insert(Away);
                }
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = target.and_then(|target| join(&url, target)).ok_or_else(|| {
                Failure::Final(invalid(
                    endpoint,
                    format!("it redirects to {:?}", shorten(target.unwrap_or(""))),
                ))
            })?;
            if url.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(refused(endpoint, "a redirect from https to http".into()));
            }
            url = next;
        }
        Err(Failure::Final(invalid(endpoint, format!("it redirects more than {MAX_REDIRECTS} times"))))
    }

    /// One request, one answer. `None` when TLS was only a guess and wrong.
    async fn send(
        &self,
        peer: &Peer,
        http: &Http,
        request: Request<Full<Bytes>>,
    ) -> Result<Option<Response<Incoming>>, Failure> {
        let guess = peer.endpoint.ambiguous && request.uri().scheme_str() == Some("https");
        let timeout = if guess { self.head_timeout().min(GUESS_TIMEOUT) } else { self.head_timeout() };
        match tokio::time::timeout(timeout, http.request(request)).await {
            // Some servers wait for the end of what they take for a request.
            Err(_) if guess && !peer.settled.load(Ordering::Relaxed) => {
                peer.plain.store(true, Ordering::Relaxed);
                Ok(None)
            }
            Err(_) => Err(Failure::Again { why: "no answer in time".into(), after: None }),
            Ok(Ok(response)) => {
                peer.settled.store(true, Ordering::Relaxed);
                Ok(Some(response))
            }
            Ok(Err(error)) => {
                if let Some(out) = cause::<OutOfReach>(&error) {
                    return Err(refused(&peer.endpoint, out.to_string()));
                }
                let tls = cause::<rustls::Error>(&error);
                if guess && tls.is_some_and(not_tls) {
                    peer.plain.store(true, Ordering::Relaxed);
                    return Ok(None);
                }
                let why = chain(&error);
                match tls {
                    // A certificate does not get better by trying again.
                    Some(rustls::Error::InvalidCertificate(_)) => {
                        Err(Failure::Final(Error::RegistryUnavailable {
                            host: peer.endpoint.host.clone(),
                            why,
                        }))
                    }
                    _ => Err(Failure::Again { why, after: None }),
                }
            }
        }
    }

    /// What we say who we are, before anyone asks: a token that the caller brought, or what was agreed before.
    async fn authorization(&self, peer: &Peer) -> (Option<HeaderValue>, u64) {
        let mut granted = peer.granted.lock().await;
        if granted.header.is_none()
            && granted.generation == 0
            && let Some(Secret::Bearer(token)) = self.secret(peer)
        {
            granted.header = secret_header(format!("Bearer {token}"));
        }
        (granted.header.clone(), granted.generation)
    }

    /// Slow heads are stalls too.
    fn head_timeout(&self) -> Duration {
        if self.pace.timeout.is_zero() { HEAD_TIMEOUT } else { self.pace.timeout.min(HEAD_TIMEOUT) }
    }

    fn secret(&self, peer: &Peer) -> Option<&Secret> {
        self.auth.as_ref()?.for_host(&peer.endpoint.host)
    }

    /// Does what a 401 asks for. One does it for all who saw the same.
    async fn answer(
        &self,
        peer: &Peer,
        what: &str,
        response: &Response<Incoming>,
        generation: u64,
    ) -> Result<(), Failure> {
        let mut granted = peer.granted.lock().await;
        if granted.generation != generation {
            return Ok(());
        }
        let endpoint = &peer.endpoint;
        let denied = |why: &str| {
            Failure::Final(Error::Unauthorized {
                host: endpoint.host.clone(),
                what: what.to_owned(),
                why: why.to_owned(),
            })
        };
        let headers = response.headers().get_all(http::header::WWW_AUTHENTICATE);
        let challenges: Vec<_> =
            headers.iter().filter_map(|value| value.to_str().ok()).flat_map(challenge::parse).collect();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let secret = self.secret(peer);
        granted.header = match (bearer, secret) {
            (_, Some(Secret::Bearer(_))) => return Err(denied("the registry token was not accepted")),
            (Some(Challenge::Bearer { realm, service, scope, .. }), secret) => {
                let token =
                    self.token(peer, realm, service.as_deref(), scope.as_deref(), secret, what).await?;
                secret_header(format!("Bearer {token}"))
            }
            (_, Some(Secret::Basic { user, password })) if challenges.contains(&Challenge::Basic) => {
                if granted.generation > 0 {
                    return Err(denied("user and password were not accepted"));
                }
                secret_header(basic(user, password))
            }
            (_, Some(Secret::Identity(_))) => return Err(denied("the registry takes no tokens")),
            (_, None) => return Err(denied("it wants credentials, none were given")),
            _ => return Err(denied("it names no way to authenticate that we know")),
        };
        granted.generation += 1;
        Ok(())
    }

    /// Gets a token (distribution specification, "token authentication").
    async fn token(
        &self,
        peer: &Peer,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        secret: Option<&Secret>,
        what: &str,
    ) -> Result<String, Failure> {
        let endpoint = &peer.endpoint;
        let realm = self.realm(peer, realm)?;
        let own_scope = format!("repository:{}:pull", self.reference.path());
        let scope = scope.unwrap_or(&own_scope);
        let mut form: Vec<(&str, &str)> = Vec::new();
        form.extend(service.map(|service| ("service", service)));
        // Several scopes are several parameters.
        form.extend(
            scope.split(' ').filter(|scope| !scope.is_empty()).take(20).map(|scope| ("scope", scope)),
        );
        let request = Request::builder().header(USER_AGENT, AGENT).header(ACCEPT, "application/json");
        let request = match secret {
            Some(Secret::Identity(token)) => {
                form.retain(|(name, _)| *name != "scope");
                form.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "crisp"),
                    ("scope", scope),
                    ("refresh_token", token),
                ]);
                let body = Bytes::from(encode(&form));
                let request = request.method(Method::POST).uri(realm.clone());
                request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(Full::new(body))
            }
            secret => {
                let mut request = request.method(Method::GET);
                if let Some(Secret::Basic { user, password }) = secret {
                    form.push(("account", user));
                    request = match secret_header(basic(user, password)) {
                        Some(header) => request.header(AUTHORIZATION, header),
                        None => request,
                    };
                }
                let joint = if realm.query().is_some() { '&' } else { '?' };
                request.uri(format!("{realm}{joint}{}", encode(&form))).body(Full::default())
            }
        };
        let request =
            request.map_err(|_| Failure::Final(invalid(endpoint, "its token realm is malformed".into())))?;
        let same = realm.host() == peer.base()?.host();
        let response = self.send(peer, if same { &peer.http } else { &peer.away }, request).await?;
        let Some(response) = response else {
            return Err(refused(endpoint, "its token realm does not speak TLS".into()));
        };
        let status = response.status();
        if status.is_redirection() {
            return Err(refused(endpoint, "its token realm redirects".into()));
        }
        let mut body = response.into_body();
        let mut meter = Meter::new(self.pace);
        let mut bytes = Vec::new();
        let read = async {
            while let Some(chunk) = meter.next(&mut body).await? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() > MAX_TOKEN {
                    return Err("its token server's answer does not end".to_owned());
                }
            }
            Ok(())
        };
        let again = |why| Failure::Again { why, after: None };
        match tokio::time::timeout(self.head_timeout(), read).await {
            Ok(result) => result.map_err(again)?,
            Err(_) => return Err(again("its token server's answer does not end".into())),
        }
        match status.as_u16() {
            200 => {}
            400 | 401 | 403 => {
                return Err(Failure::Final(Error::Unauthorized {
                    host: endpoint.host.clone(),
                    what: what.to_owned(),
                    why: format!("its token server refused: {}", words(&bytes)),
                }));
            }
            429 | 500..=599 => return Err(again(format!("its token server answered {status}"))),
            _ => {
                return Err(Failure::Final(invalid(endpoint, format!("its token server answered {status}"))));
            }
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            #[serde(default)]
            token: Option<String>,
            #[serde(default)]
            access_token: Option<String>,
        }
        let answer: Option<Answer> = serde_json::from_slice(&bytes).ok();
        let token =
            answer.and_then(|answer| answer.token.filter(|token| !token.is_empty()).or(answer.access_token));
        token
            .filter(|token| !token.is_empty())
            .ok_or_else(|| Failure::Final(invalid(endpoint, "its token server sent no token".into())))
    }

    /// A realm that we would send a secret to.
    fn realm(&self, peer: &Peer, realm: &str) -> Result<Uri, Failure> {
        let endpoint = &peer.endpoint;
        let url: Option<Uri> = realm.parse().ok();
        let url = url.filter(|url| url.host().is_some_and(|host| !host.is_empty()));
        let Some(url) = url else {
            return Err(Failure::Final(invalid(
                endpoint,
                format!("its token realm {:?} is no URL", shorten(realm)),
            )));
        };
        if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(refused(endpoint, "a token realm with a user in it".into()));
        }
        match url.scheme_str() {
            Some("https") => Ok(url),
            Some("http") if !peer.speaks_tls() => Ok(url),
            Some("http") => Err(refused(endpoint, "a token realm without TLS".into())),
            _ => Err(Failure::Final(invalid(endpoint, "its token realm is no http URL".into()))),
        }
    }
}

impl Peer {
    fn speaks_tls(&self) -> bool {
        let plain = self.plain.load(Ordering::Relaxed);
        self.endpoint.https || self.endpoint.ambiguous && !plain
    }

    fn base(&self) -> Result<Uri, Failure> {
        let url = format!("https://{}/", self.endpoint.host);
        url.parse().map_err(|_| Failure::Final(invalid(&self.endpoint, "its name is malformed".into())))
    }
}

/// A blob on its way. Chunks come in order and once, whatever breaks below.
pub(crate) struct Download<'a> {
    session: &'a Session,
    digest: Digest,
    size: u64,
    /// Bytes handed out so far.
    offset: u64,
    /// Bytes that a server which ignored our range repeats.
    skip: u64,
    body: Option<Incoming>,
    meter: Meter,
    peer: usize,
    tries: u32,
    breaks: u32,
    /// Servers that bytes came from, as bits; and servers that must not be asked.
    used: u64,
    banned: u64,
    last: Option<Error>,
}

impl Download<'_> {
    /// The next bytes, or `None` after exactly as many as were announced.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.offset == self.size && self.body.is_none() && (self.size > 0 || self.used > 0) {
                return Ok(None);
            }
            let Some(body) = &mut self.body else {
                self.open().await?;
                continue;
            };
            match self.meter.next(body).await {
                Ok(Some(mut chunk)) => {
                    let repeated = self.skip.min(chunk.len() as u64);
                    self.skip -= repeated;
                    bytes::Buf::advance(&mut chunk, usize::try_from(repeated).unwrap_or(0));
                    if chunk.is_empty() {
                        continue;
                    }
                    if chunk.len() as u64 > self.size - self.offset {
                        return Err(self.mismatch("more"));
                    }
                    self.offset += chunk.len() as u64;
                    self.tries = 0;
                    return Ok(Some(chunk));
                }
                // All is here; how the transfer ends does not matter any more.
                Ok(None) | Err(_) if self.offset == self.size => self.body = None,
                Ok(None) => self.again("it ended the transfer early".into(), None).await?,
                Err(why) => self.again(why, None).await?,
            }
        }
    }

    /// Starts from the beginning without the servers that the bad bytes came from. False if that leaves nobody.
    pub(crate) fn elsewhere(&mut self) -> bool {
        self.banned |= self.used;
        (self.offset, self.skip, self.body, self.used) = (0, 0, None, 0);
        (self.peer, self.tries, self.breaks) = (0, 0, 0);
        self.pick().is_some()
    }

    /// The next server at or after the current one that may be asked.
    fn pick(&self) -> Option<(usize, &Peer)> {
        let peers = self.session.peers.iter().enumerate().skip(self.peer);
        peers.take(64).find(|(index, peer)| peer.endpoint.pull && self.banned & bit(*index) == 0)
    }

    async fn open(&mut self) -> Result<()> {
        let session = self.session;
        let Some((index, _)) = self.pick() else {
            let what = session.reference.with_digest(&self.digest);
            return Err(self.last.take().unwrap_or_else(|| Error::NotFound(what)));
        };
        let peer = &session.peers[index];
        self.peer = index;
        let what = session.reference.with_digest(&self.digest);
        let path = format!("blobs/{}", self.digest);
        let response = match session.request(peer, &what, &path, "*/*", self.offset).await {
            Ok(response) => response,
            Err(Failure::Again { why, after }) => return self.again(why, after).await,
            Err(Failure::Final(error)) => {
                self.next_peer(error);
                return Ok(());
            }
        };
        self.skip = match (response.status(), self.offset) {
            (StatusCode::PARTIAL_CONTENT, offset) => {
                let start = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let start = start
                    .and_then(|text| text.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok());
                match start {
                    Some(start) if start <= offset => offset - start,
                    _ => {
                        self.next_peer(invalid(
                            &peer.endpoint,
                            "it answers another range than asked for".into(),
                        ));
                        return Ok(());
                    }
                }
            }
            // Our range was ignored: what we have comes again.
            (_, offset) => offset,
        };
        self.used |= bit(index);
        self.meter = Meter::new(session.pace);
        self.body = Some(response.into_body());
        Ok(())
    }

    /// Waits and tries again, here or elsewhere.
    async fn again(&mut self, why: String, after: Option<Duration>) -> Result<()> {
        self.body = None;
        self.tries += 1;
        self.breaks += 1;
        let host =
            self.session.peers.get(self.peer).map(|peer| peer.endpoint.host.clone()).unwrap_or_default();
        tracing::debug!(digest = %self.digest, %host, %why, offset = self.offset, "a download broke off");
        if self.tries >= MAX_TRIES || self.breaks >= MAX_BREAKS {
            self.next_peer(Error::RegistryUnavailable { host, why });
            return Ok(());
        }
        tokio::time::sleep(patience(self.tries, after)).await;
        Ok(())
    }

    fn next_peer(&mut self, error: Error) {
        self.last = Some(error);
        self.peer += 1;
        (self.tries, self.breaks, self.body) = (0, 0, None);
    }

    fn mismatch(&mut self, how: &str) -> Error {
        self.body = None;
        Error::Digest {
            what: self.session.reference.with_digest(&self.digest),
            expected: format!("{} bytes", self.size),
            actual: how.to_owned(),
        }
    }
}

fn bit(index: usize) -> u64 {
    u32::try_from(index).ok().and_then(|index| 1u64.checked_shl(index)).unwrap_or(0)
}

/// Marks an answer that came from elsewhere than the server that was asked.
#[derive(Clone)]
struct Away;

/// Reads a body and tells when it comes too slowly. Only time spent waiting for the network counts.
struct Meter {
    pace: Pace,
    waited: Duration,
    bytes: u64,
}

impl Meter {
    fn new(pace: Pace) -> Meter {
        Meter { pace, waited: Duration::ZERO, bytes: 0 }
    }

    async fn next(&mut self, body: &mut Incoming) -> Result<Option<Bytes>, String> {
        let patience =
            if self.pace.timeout.is_zero() { Duration::from_secs(3600) } else { self.pace.timeout };
        loop {
            let started = Instant::now();
            let frame = match tokio::time::timeout(patience, body.frame()).await {
                Err(_) => return Err(format!("it sent nothing for {} s", patience.as_secs_f32())),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(chain(&error)),
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(chunk) = frame.into_data() else { continue };
            self.waited += started.elapsed();
            self.bytes += chunk.len() as u64;
            if self.waited >= patience {
                if self.bytes < self.pace.floor.saturating_mul(patience.as_secs().max(1)) {
                    return Err(format!("it sent {} bytes in {} s", self.bytes, self.waited.as_secs_f32()));
                }
                (self.waited, self.bytes) = (Duration::ZERO, 0);
            }
            return Ok(Some(chunk));
        }
    }
}

const AGENT: &str = concat!("crisp/", env!("CARGO_PKG_VERSION"));

/// How long to wait before another try: doubling, with some chance in it so that nodes do not come back together.
fn patience(tries: u32, after: Option<Duration>) -> Duration {
    if let Some(after) = after {
        return after.min(MAX_PATIENCE);
    }
    let base = Duration::from_millis(200) * 2u32.pow(tries.min(6));
    let jitter =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    base / 2 + (base / 2).mul_f64(f64::from(jitter % 1000) / 1000.0)
}

/// Turns an answer that is not good into what to do about it.
async fn refusal(endpoint: &Endpoint, what: &str, response: Response<Incoming>) -> Failure {
    let status = response.status();
    let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let after = after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    match status.as_u16() {
        404 => Failure::Final(Error::NotFound(what.to_owned())),
        401 | 403 => Failure::Final(Error::Unauthorized {
            host: endpoint.host.clone(),
            what: what.to_owned(),
            why: format!("it answered {status}: {}", some_words(response).await),
        }),
        408 | 429 | 500..=599 => Failure::Again { why: format!("it answered {status}"), after },
        _ => {
            let why = format!("it answered {status}: {}", some_words(response).await);
            Failure::Final(invalid(endpoint, why))
        }
    }
}

/// The beginning of an error's body, which is often the only explanation.
async fn some_words(response: Response<Incoming>) -> String {
    let mut body = response.into_body();
    match tokio::time::timeout(Duration::from_secs(2), body.frame()).await {
        Ok(Some(Ok(frame))) => words(frame.data_ref().map(AsRef::as_ref).unwrap_or_default()),
        _ => String::new(),
    }
}

/// Foreign text on one line, short and printable.
fn words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_WORDS)
        .collect::<String>()
        .trim()
        .to_owned()
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_WORDS).collect()
}

fn invalid(endpoint: &Endpoint, why: String) -> Error {
    Error::Registry { host: endpoint.host.clone(), why }
}

fn refused(endpoint: &Endpoint, why: String) -> Failure {
    Failure::Final(Error::Refused { host: endpoint.host.clone(), why })
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

fn secret_header(text: String) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(&text).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// Scheme, host and port: what credentials belong to.
fn origin(url: &Uri) -> (Option<String>, Option<String>, u16) {
    let https = url.scheme_str() == Some("https");
    let port = url.port_u16().unwrap_or(if https { 443 } else { 80 });
    (url.scheme_str().map(str::to_owned), url.host().map(str::to_ascii_lowercase), port)
}

fn plain(url: &Uri) -> Uri {
    let mut parts = url.clone().into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTP);
    Uri::from_parts(parts).unwrap_or_else(|_| url.clone())
}

/// Where a redirect leads, seen from where we are.
fn join(base: &Uri, target: &str) -> Option<Uri> {
    let text = if target.contains("://") {
        target.to_owned()
    } else if let Some(rest) = target.strip_prefix("//") {
        format!("{}://{rest}", base.scheme_str()?)
    } else {
        let authority = base.authority()?;
        let path = match target.strip_prefix('/') {
            Some(rest) => format!("/{rest}"),
            None => format!("{}/{target}", base.path().rsplit_once('/')?.0),
        };
        format!("{}://{authority}{path}", base.scheme_str()?)
    };
    let url: Uri = text.split('#').next()?.parse().ok()?;
    let usable =
        matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some_and(|host| !host.is_empty());
    // A user in a redirect's URL is somebody else's business.
    (usable && !url.authority()?.as_str().contains('@')).then_some(url)
}

fn encode(form: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in form {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    text.push(char::from(byte))
                }
                byte => text.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    text
}

/// Whether the other side does not speak TLS at all.
fn not_tls(error: &rustls::Error) -> bool {
    use rustls::{AlertDescription, Error::*};
    matches!(
        error,
        InvalidMessage(_) | AlertReceived(AlertDescription::ProtocolVersion) | InappropriateMessage { .. }
    )
}

/// The cause of a type somewhere below an error.
fn cause<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        // io::Error hides what it wraps from `source`.
        if let Some(inner) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref)
            && let Some(found) = cause::<T>(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// An error with its causes, on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_and_odd_ones_refused() {
        let base: Uri = "https://r.example:5000/v2/a/blobs/x?y=1".parse().unwrap();
        for (target, expected) in [
            ("https://cdn.example/b?c=d#e", Some("https://cdn.example/b?c=d")),
            ("/b", Some("https://r.example:5000/b")),
            ("//cdn.example/b", Some("https://cdn.example/b")),
            ("z", Some("https://r.example:5000/v2/a/blobs/z")),
            ("ftp://x/y", None),
            ("https://u:p@cdn.example/", None),
            ("http://", None),
        ] {
            let joined = join(&base, target).map(|url| url.to_string());
            assert_eq!(joined.as_deref(), expected, "{target}");
        }
    }

    #[test]
    fn forms_are_encoded() {
        assert_eq!(
            encode(&[("scope", "repository:a/b:pull"), ("x", "ü &")]),
            "scope=repository%3Aa%2Fb%3Apull&x=%C3%BC%20%26"
        );
    }

    #[test]
    fn patience_grows_and_has_an_end() {
        assert!(patience(1, None) < Duration::from_millis(500));
        assert!(patience(100, None) < Duration::from_secs(15));
        assert_eq!(patience(1, Some(Duration::from_secs(100_000))), MAX_PATIENCE);
    }
}
