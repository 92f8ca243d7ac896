//! Mirrors and TLS, as `hosts.toml` says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::Error;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::facts;
use crate::fixtures::*;
use crate::server::Server;

facts![
    a_mirror_is_asked_first_and_the_registry_last,
    a_mirror_that_may_not_resolve_only_serves_blobs,
    a_mirror_that_is_down_is_passed_over,
    the_file_is_read_at_each_pull,
    a_path_can_be_overridden,
    an_unknown_authority_is_refused_and_a_named_one_trusted,
    a_client_certificate_is_shown,
    verification_can_be_switched_off,
    f50_an_expired_certificate_is_refused,
];

/// A certificate authority for one test, with its files.
pub(crate) struct Authority {
    directory: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        let mut make = vec!["req", "-x509", "-days", "2", "-subj", "/CN=authority"];
        make.extend(key);
        let (ca, ca_key) = (at("ca.pem"), at("ca.key"));
        make.extend(["-keyout", &ca_key, "-out", &ca]);
        output("openssl", &make);
        let authority = Authority { directory };
        authority.certificate("server", 2);
        authority.certificate("client", 2);
        authority
    }

    fn certificate(&self, name: &str, days: i32) {
        let at = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let (key, request, certificate) =
            (at(&format!("{name}.key")), at("request"), at(&format!("{name}.pem")));
        let (ca, ca_key, extra) = (at("ca.pem"), at("ca.key"), at("extra"));
        std::fs::write(&extra, "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n")
            .unwrap();
        let subject = format!("/CN={name}");
        let make = [
            "req",
            "-new",
            "-subj",
            &subject,
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ];
        output("openssl", &[&make[..], &["-keyout", &key, "-out", &request]].concat());
        let days = days.to_string();
        let sign = [
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            &days,
        ];
        output("openssl", &[&sign[..], &["-extfile", &extra, "-out", &certificate]].concat());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn server(&self, want_client: bool) -> Arc<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let builder = if want_client {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap()).unwrap();
            let verifier =
                rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_file(self.path("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap();
        Arc::new(builder.with_single_cert(chain, key).unwrap())
    }
}

fn hosts_toml(store: &Store, host: &str, text: &str) {
    let directory = store.directory.path().join("certs.d").join(host);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
}

async fn a_mirror_is_asked_first_and_the_registry_last() {
    let (mirror, upstream, store) = (Server::start().await, Server::start().await, Store::new().await);
    hosts_toml(
        &store,
        "r.example",
        &format!("server = \"{}\"\n[host.\"{}\"]\n", upstream.url(), mirror.url()),
    );
    let both = Recipe::small("both");
    both.serve(&mirror, "a", "latest");
    both.serve(&upstream, "a", "latest");
    let image = store.pull("r.example/a").await.unwrap();
    // The name is that of the registry, whoever served it.
    assert_eq!(image.tags, ["r.example/a:latest"]);
    assert!(upstream.log().is_empty());
    assert!(mirror.log().iter().all(|request| request.path.ends_with("?ns=r.example")));
    Recipe::small("upstream").serve(&upstream, "b", "latest");
    store.pull("r.example/b").await.unwrap();
    assert!(!upstream.log().is_empty() && !mirror.asked("/b/").is_empty());
}

async fn a_mirror_that_may_not_resolve_only_serves_blobs() {
    let (mirror, upstream, store) = (Server::start().await, Server::start().await, Store::new().await);
    let text =
        format!("server = \"{}\"\n[host.\"{}\"]\ncapabilities = [\"pull\"]\n", upstream.url(), mirror.url());
    hosts_toml(&store, "r.example", &text);
    let recipe = Recipe::small("x");
    let made = recipe.serve(&upstream, "a", "latest");
    recipe.serve(&mirror, "a", "latest");
    store.pull("r.example/a").await.unwrap();
    assert!(mirror.asked("manifests/latest").is_empty());
    assert_eq!(mirror.asked(&made.blobs[0]).len(), 1);
    assert!(upstream.asked(&made.blobs[0]).is_empty());
}

async fn a_mirror_that_is_down_is_passed_over() {
    let (upstream, store) = (Server::start().await, Store::new().await);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    hosts_toml(&store, "r.example", &format!("server = \"{}\"\n[host.\"http://{gone}\"]\n", upstream.url()));
    Recipe::small("x").serve(&upstream, "a", "latest");
    store.pull("r.example/a").await.unwrap();
    hosts_toml(&store, "r.example", &format!("server = \"http://{gone}\"\n"));
    let error = store.pull("r.example/a").await.unwrap_err();
    assert!(
        matches!(&error, Error::RegistryUnavailable { host, .. } if *host == gone.to_string()),
        "{error}"
    );
}

async fn the_file_is_read_at_each_pull() {
    let (one, two, store) = (Server::start().await, Server::start().await, Store::new().await);
    let made: Vec<Made> = [(&one, "one"), (&two, "two")]
        .map(|(server, word)| Recipe::small(word).serve(server, "a", "latest"))
        .into();
    for (server, made) in [(&one, &made[0]), (&two, &made[1])] {
        hosts_toml(&store, "_default", &format!("[host.\"{}\"]\n", server.url()));
        assert_eq!(store.pull("r.example/a").await.unwrap().id, made.id);
    }
}

async fn a_path_can_be_overridden() {
    let (server, store) = (Server::start().await, Store::new().await);
    let text = format!("[host.\"{}/v2/some/proxy\"]\noverride_path = true\n", server.url());
    hosts_toml(&store, "r.example", &text);
    Recipe::small("x").serve(&server, "some/proxy/a", "latest");
    store.pull("r.example/a").await.unwrap();
    assert!(server.log().iter().all(|request| request.path.starts_with("/v2/some/proxy/a/")));
}

/// A registry with TLS that a name other than loopback's stands for, so that nothing is lenient about it.
async fn with_tls(authority: &Authority, want_client: bool, fields: &str) -> (Server, Store) {
    let server = Server::on("127.0.0.1:0", Some(authority.server(want_client))).await;
    let store = Store::new().await;
    let text = format!("server = \"https://{}\"\n{fields}\n", server.address);
    hosts_toml(&store, "r.example", &text);
    Recipe::small("x").serve(&server, "a", "latest");
    (server, store)
}

fn quoted(path: &Path) -> String {
    format!("{:?}", path.to_str().unwrap())
}

async fn an_unknown_authority_is_refused_and_a_named_one_trusted() {
    let authority = Authority::new();
    let (server, store) = with_tls(&authority, false, "").await;
    let error = store.pull("r.example/a").await.unwrap_err();
    assert!(
        matches!(&error, Error::RegistryUnavailable { why, .. } if why.contains("certificate")),
        "{error}"
    );
    assert!(server.log().is_empty());
    let (_server, store) =
        with_tls(&authority, false, &format!("ca = {}", quoted(&authority.path("ca.pem")))).await;
    store.pull("r.example/a").await.unwrap();
    // As Docker lays it out, without a file.
    let (server, store) =
        (Server::on("127.0.0.1:0", Some(authority.server(false))).await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let directory = store.directory.path().join("certs.d").join(server.host());
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::copy(authority.path("ca.pem"), directory.join("ca.crt")).unwrap();
    store.pull(&format!("{}/a", server.host())).await.unwrap();
}

async fn a_client_certificate_is_shown() {
    let authority = Authority::new();
    let ca = format!("ca = {}", quoted(&authority.path("ca.pem")));
    let (_server, store) = with_tls(&authority, true, &ca).await;
    assert!(matches!(store.pull("r.example/a").await, Err(Error::RegistryUnavailable { .. })));
    let (certificate, key) = (authority.path("client.pem"), authority.path("client.key"));
    let pair = format!("{ca}\nclient = [[{}, {}]]", quoted(&certificate), quoted(&key));
    let (_server, store) = with_tls(&authority, true, &pair).await;
    store.pull("r.example/a").await.unwrap();
    let both = authority.path("both.pem");
    let text = [std::fs::read(&certificate).unwrap(), std::fs::read(&key).unwrap()].concat();
    std::fs::write(&both, text).unwrap();
    let (_server, store) = with_tls(&authority, true, &format!("{ca}\nclient = {}", quoted(&both))).await;
    store.pull("r.example/a").await.unwrap();
}

async fn verification_can_be_switched_off() {
    let authority = Authority::new();
    let (_server, store) = with_tls(&authority, false, "skip_verify = true").await;
    store.pull("r.example/a").await.unwrap();
}

async fn f50_an_expired_certificate_is_refused() {
    let authority = Authority::new();
    authority.certificate("server", -1);
    let ca = format!("ca = {}", quoted(&authority.path("ca.pem")));
    let (server, store) = with_tls(&authority, false, &ca).await;
    let error = store.pull("r.example/a").await.unwrap_err();
    assert!(matches!(&error, Error::RegistryUnavailable { why, .. } if why.contains("xpired")), "{error}");
    assert!(server.log().is_empty());
}
