//! Pulls from registries that behave.

use std::sync::Arc;

use image::Error;

use crate::facts;
use crate::fixtures::*;
use crate::server::Server;

facts![
    a_pull_makes_an_image_that_is_found_by_all_of_its_names,
    every_compression_and_both_digests_work,
    an_index_gives_the_image_for_this_machine,
    an_image_for_another_machine_is_refused,
    a_tag_moves_and_the_old_image_keeps_its_digest,
    the_same_content_from_two_registries_is_one_image,
    shared_layers_are_fetched_and_kept_once,
    sixty_pulls_of_one_image_are_one_download,
    f51_sixty_pulls_of_an_absent_image_all_end,
    a_pull_by_digest_brings_no_tag,
    a_layer_that_comes_twice_is_stacked_once,
    a_layout_directory_is_imported,
    debians_registry_serves_us,
];

async fn a_pull_makes_an_image_that_is_found_by_all_of_its_names() {
    let (server, store) = (Server::start().await, Store::new().await);
    let mut recipe = Recipe::small("hello");
    recipe.config = r#""User":"7:8","Env":["A=b"],"Entrypoint":["/e"],"Cmd":["c"],"WorkingDir":"/w","Volumes":{"/v":{}},"StopSignal":"SIGINT","Labels":{"l":"m"},"ExposedPorts":{"80/tcp":{}}"#.into();
    let made = recipe.serve(&server, "team/app", "1.0");
    let name = format!("{}/team/app:1.0", server.host());
    let image = store.pull(&name).await.unwrap();
    let by_digest = format!("{}/team/app@{}", server.host(), made.manifest);
    assert_eq!(
        (&image.id, &image.tags, &image.digests),
        (&made.id, &vec![name.clone()], &vec![by_digest.clone()])
    );
    assert!(image.size > 0);
    assert_eq!((image.config.user.as_str(), image.config.working_dir.as_str()), ("7:8", "/w"));
    assert_eq!(
        (&image.config.entrypoint[..], &image.config.cmd[..]),
        (&["/e".to_owned()][..], &["c".to_owned()][..])
    );
    assert_eq!((image.config.stop_signal.as_str(), image.config.labels["l"].as_str()), ("SIGINT", "m"));
    assert!(image.config.volumes.contains("/v") && image.config.exposed_ports.contains("80/tcp"));
    let hex = made.id.strip_prefix("sha256:").unwrap();
    let both = format!("{}/team/app:1.0@{}", server.host(), made.manifest);
    for name in [&name, &by_digest, &both, &made.id, &hex.to_owned(), &hex[..12].to_owned()] {
        assert_eq!(store.images.find(name).unwrap().id, made.id, "{name}");
    }
    assert!(store.images.find("absent").is_none() && store.images.find(&"0".repeat(64)).is_none());
    assert_eq!(store.images.list().len(), 1);
    // It is all there after the daemon's death.
    let store = store.reopened().await;
    let again = store.images.find(&name).unwrap();
    assert_eq!((&again.id, &again.tags, &again.digests), (&image.id, &image.tags, &image.digests));
    store.is_clean().await;
}

async fn every_compression_and_both_digests_work() {
    let (server, store) = (Server::start().await, Store::new().await);
    let tar = |word: &str| Tar::default().file(word, word).end();
    let mut recipe = Recipe::new(&[tar("gzip"), tar("plain"), tar("zstd"), tar("sha512")]);
    recipe.layers[1].1 = recipe.layers[1].0.clone();
    recipe.layers[2].1 = zstd::encode_all(&recipe.layers[2].0[..], 3).unwrap();
    let (config, manifest) = recipe.documents();
    // The last layer goes by sha512, on both sides of the compression.
    let sha512 = |bytes: &[u8]| {
        use sha2::Digest;
        let hash = sha2::Sha512::digest(bytes);
        let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha512:{hex}")
    };
    let (last_tar, last_sent) = &recipe.layers[3];
    let config = String::from_utf8(config).unwrap().replace(&digest(last_tar), &sha512(last_tar));
    let manifest = String::from_utf8(manifest).unwrap();
    let (old_config, _) = recipe.documents();
    let manifest = manifest
        .replace(&digest(last_sent), &sha512(last_sent))
        .replace(&digest(&old_config), &digest(config.as_bytes()))
        .replace(
            &format!("\"size\":{}}},\"layers\"", old_config.len()),
            &format!("\"size\":{}}},\"layers\"", config.len()),
        );
    {
        let mut content = server.content.lock().unwrap();
        for (_, sent) in &recipe.layers {
            content.blob("a", sent);
        }
        content.lie("a", &sha512(last_sent), last_sent);
        content.blob("a", config.as_bytes());
        content.manifest("a", "t", MANIFEST, manifest.as_bytes());
    }
    let image = store.pull(&format!("{}/a:t", server.host())).await.unwrap();
    for word in ["gzip", "plain", "zstd", "sha512"] {
        let read = store.images.read_file(&image.id, word, 100).await.unwrap();
        assert_eq!(read.as_deref(), Some(word.as_bytes()));
    }
}

async fn an_index_gives_the_image_for_this_machine() {
    let (server, store) = (Server::start().await, Store::new().await);
    let right = Recipe::small("right").serve(&server, "a", "right");
    let wrong = Recipe::small("wrong").serve(&server, "a", "wrong");
    let entry = |digest: &str, media: &str, platform: &str| {
        format!(r#"{{"mediaType":"{media}","digest":"{digest}","size":1,"platform":{platform}}}"#)
    };
    let inner = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{},{},{}]}}"#,
        entry(&wrong.manifest, MANIFEST, r#"{"os":"windows","architecture":"amd64"}"#),
        entry(&wrong.manifest, MANIFEST, r#"{"os":"unknown","architecture":"unknown"}"#),
        entry(&right.manifest, MANIFEST, &format!(r#"{{"os":"linux","architecture":"{ARCH}"}}"#)),
    );
    let inner_digest = server.content.lock().unwrap().manifest("a", "inner", INDEX, inner.as_bytes());
    let outer = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{INDEX}","digest":"{inner_digest}","size":1}}]}}"#
    );
    let outer_digest = server.content.lock().unwrap().manifest("a", "latest", INDEX, outer.as_bytes());
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    assert_eq!(image.id, right.id);
    assert_eq!(image.digests, [format!("{}/a@{outer_digest}", server.host())]);
    assert!(server.asked(&wrong.manifest).is_empty());
}

async fn an_image_for_another_machine_is_refused() {
    let (server, store) = (Server::start().await, Store::new().await);
    let recipe = Recipe::small("x");
    let (config, manifest) = recipe.documents();
    let other = String::from_utf8(config.clone()).unwrap().replace(ARCH, "s390x");
    let manifest = String::from_utf8(manifest).unwrap();
    let manifest = manifest.replace(&digest(&config), &digest(other.as_bytes())).replace(
        &format!("\"size\":{}}},\"layers\"", config.len()),
        &format!("\"size\":{}}},\"layers\"", other.len()),
    );
    {
        let mut content = server.content.lock().unwrap();
        content.blob("a", other.as_bytes());
        content.manifest("a", "latest", MANIFEST, manifest.as_bytes());
    }
    let error = store.pull(&format!("{}/a", server.host())).await.unwrap_err();
    assert!(matches!(&error, Error::Platform { platform, .. } if platform.contains(ARCH)), "{error}");
}

async fn a_tag_moves_and_the_old_image_keeps_its_digest() {
    let (server, store) = (Server::start().await, Store::new().await);
    let name = format!("{}/a:latest", server.host());
    let old = Recipe::small("old").serve(&server, "a", "latest");
    store.pull(&name).await.unwrap();
    let new = Recipe::small("new").serve(&server, "a", "latest");
    store.pull(&name).await.unwrap();
    assert_eq!(store.images.find(&name).unwrap().id, new.id);
    let left = store.images.find(&old.id).unwrap();
    assert!(left.tags.is_empty());
    assert_eq!(left.digests, [format!("{}/a@{}", server.host(), old.manifest)]);
    assert_eq!(store.images.list().len(), 2);
}

async fn the_same_content_from_two_registries_is_one_image() {
    let (one, two, store) = (Server::start().await, Server::start().await, Store::new().await);
    let recipe = Recipe::small("same");
    recipe.serve(&one, "a", "x");
    let made = recipe.serve(&two, "b/c", "y");
    store.pull(&format!("{}/a:x", one.host())).await.unwrap();
    let image = store.pull(&format!("{}/b/c:y", two.host())).await.unwrap();
    assert_eq!((image.tags.len(), image.digests.len(), store.images.list().len()), (2, 2, 1));
    assert!(two.asked(&made.blobs[0]).is_empty(), "the layer was here already");
    // All names go, in both repositories.
    assert!(store.images.remove(&format!("{}/a:x", one.host())).await.unwrap());
    assert!(store.images.list().is_empty());
    assert!(!store.images.remove(&made.id).await.unwrap());
}

async fn shared_layers_are_fetched_and_kept_once() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default().file("base", noise(100_000, 1)).end();
    let images: Vec<Made> = (0..3)
        .map(|n| {
            let own = Tar::default().file("own", format!("{n}")).end();
            Recipe::new(&[base.clone(), own]).serve(&server, "a", &format!("t{n}"))
        })
        .collect();
    let pulls = (0..3).map(|n| {
        let (images, name) = (store.images.clone(), format!("{}/a:t{n}", server.host()));
        tokio::spawn(async move { images.pull(&name, None).await.unwrap() })
    });
    for pull in pulls.collect::<Vec<_>>() {
        pull.await.unwrap();
    }
    assert_eq!(server.asked(&images[0].blobs[0]).len(), 1);
    assert_eq!(store.layers(), 4);
    store.images.remove(&images[0].id).await.unwrap();
    assert_eq!(store.layers(), 3, "the shared layer stays for the others");
}

async fn sixty_pulls_of_one_image_are_one_download() {
    let (server, store) = (Server::start().await, Store::new().await);
    let made = Recipe::small("popular").serve(&server, "a", "latest");
    let name = format!("{}/a", server.host());
    let pulls: Vec<_> = (0..60)
        .map(|_| {
            let (images, name) = (store.images.clone(), name.clone());
            tokio::spawn(async move { images.pull(&name, None).await.map(|image| image.id.clone()) })
        })
        .collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap(), made.id);
    }
    assert_eq!(server.asked(&made.blobs[0]).len(), 1);
    assert_eq!(server.asked("manifests").len(), 1);
}

async fn f51_sixty_pulls_of_an_absent_image_all_end() {
    let (server, store) = (Server::start().await, Store::new().await);
    let pulls: Vec<_> = (0..60)
        .map(|n| {
            let (images, name) = (store.images.clone(), format!("{}/absent:t{}", server.host(), n % 30));
            tokio::spawn(async move { images.pull(&name, None).await })
        })
        .collect();
    for pull in pulls {
        assert!(matches!(pull.await.unwrap(), Err(Error::NotFound(_))));
    }
    let made = Recipe::small("x").serve(&server, "a", "latest");
    assert_eq!(store.pull(&format!("{}/a", server.host())).await.unwrap().id, made.id);
}

async fn a_pull_by_digest_brings_no_tag() {
    let (server, store) = (Server::start().await, Store::new().await);
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a:latest@{}", server.host(), made.manifest)).await.unwrap();
    assert!(image.tags.is_empty());
    assert_eq!(image.digests, [format!("{}/a@{}", server.host(), made.manifest)]);
    // A manifest that is not what its digest says is no answer.
    let other = Recipe::small("y").documents().1;
    let lie = format!("a/manifests/{}", made.manifest);
    {
        let mut content = server.content.lock().unwrap();
        content.remove(&lie);
    }
    server.script(move |request, _| {
        request.path.contains("manifests").then(|| crate::server::Reply::new(200).body(other.clone()))
    });
    let error = store.pull(&format!("{}/a@{}", server.host(), made.manifest)).await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
}

async fn a_layer_that_comes_twice_is_stacked_once() {
    let (server, store) = (Server::start().await, Store::new().await);
    let empty = Tar::default().end();
    let one = Tar::default().file("f", "1").end();
    Recipe::new(&[empty.clone(), one, empty]).serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    assert_eq!(image.diff_ids.len(), 3);
    assert_eq!(store.images.view(&image.id, "seen").await.unwrap().len(), 2);
}

async fn a_layout_directory_is_imported() {
    let store = Store::new().await;
    let layout = tempfile::tempdir().unwrap();
    let recipe = Recipe::small("imported");
    let (config, manifest) = recipe.documents();
    let blobs = layout.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = digest(bytes);
        std::fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        digest
    };
    put(&config);
    put(&recipe.layers[0].1);
    let manifest_digest = put(&manifest);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{MANIFEST}","digest":"{manifest_digest}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"r.example/a:b"}}}}]}}"#,
        manifest.len()
    );
    std::fs::write(layout.path().join("index.json"), index).unwrap();
    std::fs::write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let imported = store.images.import(layout.path()).await.unwrap();
    assert_eq!(imported[0].tags, ["r.example/a:b"]);
    assert_eq!(store.images.find("r.example/a:b").unwrap().id, digest(&config));
    let read = store.images.read_file("r.example/a:b", "/file", 100).await.unwrap();
    assert_eq!(read.as_deref(), Some(&b"imported"[..]));
    // A blob that was changed is seen.
    store.images.remove("r.example/a:b").await.unwrap();
    let path = blobs.join(digest(&recipe.layers[0].1).strip_prefix("sha256:").unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(store.images.import(layout.path()).await, Err(Error::Digest { .. })));
    store.is_clean().await;
}

/// The reference implementation, as Debian packages it.
async fn debians_registry_serves_us() {
    let directory = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = directory.path().join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
        directory.path().join("data").display()
    );
    std::fs::write(&config, text).unwrap();
    struct Kill(std::process::Child);
    impl Drop for Kill {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let child = std::process::Command::new("docker-registry")
        .args(["serve", config.to_str().unwrap()])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _kill = Kill(child);
    let host = format!("127.0.0.1:{port}");
    until("the registry is up", || std::net::TcpStream::connect(&host).is_ok()).await;
    let mut recipe = Recipe::new(&[
        Tar::default().directory("d", 0o750, 3).file("d/f", noise(3_000_000, 5)).end(),
        Tar::default().file("d/g", "2").end(),
    ]);
    recipe.media_type = DOCKER;
    let (config, manifest) = recipe.documents();
    for blob in recipe.layers.iter().map(|(_, sent)| sent).chain([&config]) {
        let (head, _) = http(&host, "POST", "/v2/x/y/blobs/uploads/", "", b"");
        let location = head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap().to_owned();
        let path = location.split_once(&host).map_or(location.as_str(), |(_, path)| path);
        let joint = if path.contains('?') { '&' } else { '?' };
        let (head, _) = http(
            &host,
            "PUT",
            &format!("{path}{joint}digest={}", digest(blob)),
            "application/octet-stream",
            blob,
        );
        assert!(head.starts_with("HTTP/1.1 201"), "{head}");
    }
    let (head, _) = http(&host, "PUT", "/v2/x/y/manifests/v1", DOCKER, &manifest);
    assert!(head.starts_with("HTTP/1.1 201"), "{head}");
    let store = Store::new().await;
    let image = store.pull(&format!("{host}/x/y:v1")).await.unwrap();
    assert_eq!(image.digests, [format!("{host}/x/y@{}", digest(&manifest))]);
    let read = store.images.read_file(&image.id, "d/f", 4_000_000).await.unwrap().unwrap();
    assert!(read == noise(3_000_000, 5));
    assert!(matches!(store.pull(&format!("{host}/x/y:v2")).await, Err(Error::NotFound(_))));
    let by_digest =
        Arc::clone(&store.images).pull(&format!("{host}/x/y@{}", digest(&manifest)), None).await.unwrap();
    assert_eq!(by_digest.id, image.id);
}

/// One request, for setting things up.
fn http(host: &str, method: &str, path: &str, media_type: &str, body: &[u8]) -> (String, Vec<u8>) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(host).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    (String::from_utf8_lossy(&answer[..end]).into_owned(), answer[end + 4..].to_vec())
}
