//! Credentials: every form works, and none of them goes where it must not (S39).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{Auth, Error};

use crate::facts;
use crate::fixtures::*;
use crate::hosts::Authority;
use crate::server::{Reply, Request, Server};

facts![
    basic_credentials_are_given_when_asked_for,
    a_token_is_fetched_with_user_and_password,
    a_token_is_fetched_without_credentials,
    a_token_is_fetched_with_an_identity_token,
    a_registry_token_is_sent_as_it_is,
    a_token_that_ran_out_is_renewed,
    wrong_credentials_are_told_from_absent_images,
    credentials_for_another_server_stay_here,
    the_auth_file_is_read_at_each_pull,
    s39_a_redirect_to_another_host_carries_no_credentials,
    s39_a_foreign_server_that_asks_gets_no_credentials,
    s39_a_plain_realm_under_tls_is_refused,
    s39_a_realm_on_this_machine_is_refused_from_elsewhere,
    s39_a_redirect_to_this_machine_is_refused_from_elsewhere,
    a_redirect_from_tls_to_plain_is_refused,
];

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// Asks for one authorization before anything else.
fn demand(server: &Server, challenge: &str, wanted: &str) {
    let (challenge, wanted) = (challenge.to_owned(), wanted.to_owned());
    server.script(move |request, _| {
        let fine = request.authorization() == Some(&wanted) || !request.path.starts_with("/v2/");
        (!fine).then(|| Reply::new(401).header("www-authenticate", challenge.clone()).body("{}"))
    });
}

fn bearer(realm: &str) -> String {
    format!(r#"Bearer realm="{realm}/token",service="reg",scope="repository:a:pull""#)
}

/// A token server that gives one token to whoever passes the check.
async fn tokens(check: impl Fn(&Request) -> bool + Send + Sync + 'static) -> Server {
    let server = Server::start().await;
    server.script(move |request, _| {
        Some(if check(request) {
            Reply::new(200).body(r#"{"token":"t0ken","expires_in":300}"#)
        } else {
            Reply::new(401).body(r#"{"details":"incorrect username or password"}"#)
        })
    });
    server
}

async fn basic_credentials_are_given_when_asked_for() {
    let (server, store) = (Server::start().await, Store::new().await);
    let made = Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, r#"Basic realm="x""#, &basic("me", "pass"));
    let name = format!("{}/a", server.host());
    let image = store.images.pull(&name, Some(Auth::basic("me", "pass"))).await.unwrap();
    assert_eq!(image.id, made.id);
    // Once asked for, they come along: one refusal, not one for each request.
    assert_eq!(server.log().iter().filter(|request| request.authorization().is_none()).count(), 1);
    let encoded = Auth::header(&STANDARD.encode("me:pass")).unwrap();
    store.images.pull(&name, Some(encoded)).await.unwrap();
}

async fn a_token_is_fetched_with_user_and_password() {
    let (server, store) = (Server::start().await, Store::new().await);
    let realm = tokens(|request| request.authorization() == Some(&basic("me", "pass"))).await;
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, &bearer(&realm.url()), "Bearer t0ken");
    let name = format!("{}/a", server.host());
    store.images.pull(&name, Some(Auth::basic("me", "pass"))).await.unwrap();
    let asked = realm.log();
    assert_eq!(asked.len(), 1);
    assert!(asked[0].path.contains("service=reg") && asked[0].path.contains("scope=repository%3Aa%3Apull"));
    // The password went to the token server only.
    assert!(server.log().iter().all(|request| request.authorization() != Some(&basic("me", "pass"))));
}

async fn a_token_is_fetched_without_credentials() {
    let (server, store) = (Server::start().await, Store::new().await);
    let realm = tokens(|request| request.authorization().is_none()).await;
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, &bearer(&realm.url()), "Bearer t0ken");
    store.pull(&format!("{}/a", server.host())).await.unwrap();
}

async fn a_token_is_fetched_with_an_identity_token() {
    let (server, store) = (Server::start().await, Store::new().await);
    let realm = tokens(|request| {
        let form = String::from_utf8_lossy(&request.body).into_owned();
        request.method == "POST"
            && request.authorization().is_none()
            && ["grant_type=refresh_token", "refresh_token=id%2Ft", "service=reg"]
                .iter()
                .all(|part| form.contains(part))
    })
    .await;
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, &bearer(&realm.url()), "Bearer t0ken");
    let name = format!("{}/a", server.host());
    store.images.pull(&name, Some(Auth::identity_token("id/t"))).await.unwrap();
}

async fn a_registry_token_is_sent_as_it_is() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, &bearer("http://127.0.0.1:1"), "Bearer mine");
    let name = format!("{}/a", server.host());
    store.images.pull(&name, Some(Auth::registry_token("mine"))).await.unwrap();
    let error = store.images.pull(&name, Some(Auth::registry_token("other"))).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
}

async fn a_token_that_ran_out_is_renewed() {
    let (server, store) = (Server::start().await, Store::new().await);
    let realm = Server::start().await;
    realm.script(|_, before| Some(Reply::new(200).body(format!(r#"{{"access_token":"t{before}"}}"#))));
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let (challenge, blob) = (bearer(&realm.url()), made.blobs[0].clone());
    // Blobs want the second token.
    server.script(move |request, _| {
        let wanted = if request.path.contains(&blob) { "Bearer t1" } else { "Bearer t0" };
        let fine = request.authorization() == Some(wanted);
        (!fine).then(|| Reply::new(401).header("www-authenticate", challenge.clone()))
    });
    store.pull(&format!("{}/a", server.host())).await.unwrap();
    assert_eq!(realm.log().len(), 2);
}

async fn wrong_credentials_are_told_from_absent_images() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let realm = tokens(|_| false).await;
    let name = format!("{}/a", server.host());
    for challenge in [r#"Basic realm="x""#.to_owned(), bearer(&realm.url()), "Negotiate".into()] {
        demand(&server, &challenge, "nothing");
        for auth in [None, Some(Auth::basic("me", "wrong"))] {
            let error = store.images.pull(&name, auth).await.unwrap_err();
            assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
            assert!(!error.to_string().contains("wrong"), "no secret in {error}");
        }
    }
    server.script(|_, _| Some(Reply::new(403).body("denied: requested access")));
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(&error, Error::Unauthorized { why, .. } if why.contains("requested access")), "{error}");
}

async fn credentials_for_another_server_stay_here() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, r#"Basic realm="x""#, &basic("me", "pass"));
    let auth = Auth::basic("me", "pass").for_server("https://other.example/v1/");
    let error = store.images.pull(&format!("{}/a", server.host()), Some(auth)).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    assert!(server.log().iter().all(|request| request.authorization().is_none()));
}

async fn the_auth_file_is_read_at_each_pull() {
    let server = Server::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    let store = Store::with(|config| config.auth_file = Some(path)).await;
    Recipe::small("x").serve(&server, "team/a", "latest");
    demand(&server, r#"Basic realm="x""#, &basic("me", "pass"));
    let name = format!("{}/team/a", server.host());
    std::fs::write(file.path(), "{}").unwrap();
    assert!(matches!(store.pull(&name).await, Err(Error::Unauthorized { .. })));
    let text =
        format!(r#"{{"auths":{{"{}/team":{{"auth":"{}"}}}}}}"#, server.host(), STANDARD.encode("me:pass"));
    std::fs::write(file.path(), text).unwrap();
    store.pull(&name).await.unwrap();
}

async fn s39_a_redirect_to_another_host_carries_no_credentials() {
    let (server, elsewhere, store) = (Server::start().await, Server::start().await, Store::new().await);
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let bytes = Recipe::small("x").layers[0].1.clone();
    elsewhere.script(move |_, _| Some(Reply::new(200).body(bytes.clone())));
    let (wanted, target, blob) = (basic("me", "pass"), elsewhere.url(), made.blobs[0].clone());
    server.script(move |request, _| {
        if request.authorization() != Some(&wanted) {
            return Some(Reply::new(401).header("www-authenticate", "Basic realm=x"));
        }
        request.path.contains(&blob).then(|| Reply::new(307).header("location", format!("{target}/cdn")))
    });
    // A header of the configuration is a secret as well.
    let directory = store.directory.path().join("certs.d").join(server.host());
    std::fs::create_dir_all(&directory).unwrap();
    let text = format!("[host.\"{}\"]\n[host.\"{}\".header]\nx-secret = \"s\"\n", server.url(), server.url());
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    store.images.pull(&format!("{}/a", server.host()), Some(Auth::basic("me", "pass"))).await.unwrap();
    let log = elsewhere.log();
    assert_eq!(log.len(), 1);
    assert!(log[0].authorization().is_none() && !log[0].headers.contains_key("x-secret"), "{log:?}");
    assert!(server.log().iter().all(|request| request.headers.contains_key("x-secret")));
}

async fn s39_a_foreign_server_that_asks_gets_no_credentials() {
    let (server, elsewhere, store) = (Server::start().await, Server::start().await, Store::new().await);
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let realm = tokens(|_| true).await;
    let challenge = bearer(&realm.url());
    elsewhere.script(move |_, _| Some(Reply::new(401).header("www-authenticate", challenge.clone())));
    let (target, blob) = (elsewhere.url(), made.blobs[0].clone());
    server.script(move |request, _| {
        request.path.contains(&blob).then(|| Reply::new(302).header("location", format!("{target}/cdn")))
    });
    let auth = Some(Auth::basic("me", "pass"));
    let error = store.images.pull(&format!("{}/a", server.host()), auth).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    assert!(elsewhere.log().iter().all(|request| request.authorization().is_none()));
    assert!(realm.log().is_empty(), "its token server was not even asked");
    store.is_clean().await;
}

async fn s39_a_plain_realm_under_tls_is_refused() {
    let authority = Authority::new();
    let server = Server::on("127.0.0.1:0", Some(authority.server(false))).await;
    let realm = tokens(|_| true).await;
    let store = Store::new().await;
    Recipe::small("x").serve(&server, "a", "latest");
    demand(&server, &bearer(&realm.url()), "Bearer t0ken");
    let auth = Some(Auth::basic("me", "pass"));
    let error = store.images.pull(&format!("{}/a", server.host()), auth).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(realm.log().is_empty());
}

/// An address of this machine that is not loopback, as a registry in the network would have.
fn outward() -> Option<String> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: connecting chooses the route.
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback()).then(|| address.to_string())
}

async fn beyond_loopback(store: &Store) -> Option<Server> {
    let Some(address) = outward() else {
        println!("skipped: this machine has no address but loopback");
        return None;
    };
    let server = Server::on(&format!("{address}:0"), None).await;
    let directory = store.directory.path().join("certs.d").join(server.host());
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), format!("server = \"{}\"\n", server.url())).unwrap();
    Some(server)
}

async fn s39_a_realm_on_this_machine_is_refused_from_elsewhere() {
    let store = Store::new().await;
    let Some(server) = beyond_loopback(&store).await else { return };
    Recipe::small("x").serve(&server, "a", "latest");
    let realm = tokens(|_| true).await;
    let port = realm.address.port();
    for target in [
        realm.url(),
        format!("http://localhost:{port}"),
        "http://169.254.169.254".into(),
        format!("http://[::ffff:127.0.0.1]:{port}"),
    ] {
        demand(&server, &bearer(&target), "Bearer t0ken");
        let auth = Some(Auth::basic("me", "pass"));
        let error = store.images.pull(&format!("{}/a", server.host()), auth).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{target}: {error}");
    }
    assert!(realm.log().is_empty());
}

async fn s39_a_redirect_to_this_machine_is_refused_from_elsewhere() {
    let (inside, store) = (Server::start().await, Store::new().await);
    let Some(server) = beyond_loopback(&store).await else { return };
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let (target, blob) = (inside.url(), made.blobs[0].clone());
    server.script(move |request, _| {
        request.path.contains(&blob).then(|| Reply::new(307).header("location", format!("{target}/x")))
    });
    let error = store.pull(&format!("{}/a", server.host())).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(inside.log().is_empty());
}

async fn a_redirect_from_tls_to_plain_is_refused() {
    let authority = Authority::new();
    let server = Server::on("127.0.0.1:0", Some(authority.server(false))).await;
    let (plain, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let target = plain.url();
    server.script(move |_, _| Some(Reply::new(307).header("location", target.clone())));
    let error = store.pull(&format!("{}/a", server.host())).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(plain.log().is_empty());
}
