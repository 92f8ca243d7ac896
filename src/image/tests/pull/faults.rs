//! Registries that break off, stall, lie and never end (F50), pulls that are given up, and disks that are full.

use std::time::{Duration, Instant};

use image::Error;

use crate::facts;
use crate::fixtures::*;
use crate::server::{Fault, Reply, Server, only};

facts![
    f50_a_download_that_breaks_off_is_resumed_by_range,
    f50_a_stalled_download_is_cut_and_resumed,
    f50_a_server_without_ranges_is_read_again_from_the_start,
    f50_a_trickle_counts_as_a_stall,
    f50_a_server_that_always_breaks_off_is_given_up,
    f50_errors_of_the_moment_are_tried_again,
    f50_a_server_that_says_nothing_is_cut,
    f50_a_token_server_that_hangs_is_cut,
    f50_redirects_have_an_end,
    f50_wrong_bytes_are_refused_and_fetched_elsewhere,
    f50_a_wrong_length_is_refused,
    f50_a_registry_that_is_gone_says_unavailable,
    s36_documents_without_bound_are_refused,
    s36_nested_indexes_are_read_once_and_not_without_end,
    s36_the_size_that_a_layer_announces_is_the_most_that_is_read,
    s35_bombs_leave_nothing,
    f50_a_pull_that_nobody_waits_for_leaves_nothing,
    a_pull_goes_on_while_one_still_waits,
    f03_a_pull_that_was_cut_off_keeps_its_finished_layers,
    f24_a_full_disk_fails_one_pull_and_no_other,
    s46_a_hundred_pulls_that_fail_do_not_slow_the_next,
];

/// An image of one layer of a megabyte, at a server.
fn large(server: &Server) -> (String, Made) {
    let made =
        Recipe::new(&[Tar::default().file("f", noise(1_000_000, 3)).end()]).serve(server, "a", "latest");
    (format!("{}/a", server.host()), made)
}

async fn content_is_whole(store: &Store, name: &str) {
    let read = store.images.read_file(name, "f", 2_000_000).await.unwrap().unwrap();
    assert!(read == noise(1_000_000, 3));
    store.is_clean().await;
}

async fn f50_a_download_that_breaks_off_is_resumed_by_range() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, before| {
        (request.path.contains(&blob) && before < 3).then(|| only(Fault::Cut(200_000)))?
    });
    store.pull(&name).await.unwrap();
    content_is_whole(&store, &name).await;
    let ranges: Vec<_> = server.asked(&made.blobs[0]).iter().map(|request| request.range()).collect();
    // Nothing was sent twice.
    assert_eq!(ranges, [None, Some(200_000), Some(400_000), Some(600_000)]);
}

async fn f50_a_stalled_download_is_cut_and_resumed() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, before| {
        (request.path.contains(&blob) && before == 0).then(|| only(Fault::Stall(300_000)))?
    });
    let started = Instant::now();
    store.pull(&name).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1) && started.elapsed() < Duration::from_secs(4));
    content_is_whole(&store, &name).await;
    assert_eq!(server.asked(&made.blobs[0])[1].range(), Some(300_000));
}

async fn f50_a_server_without_ranges_is_read_again_from_the_start() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    server.without_ranges();
    let blob = made.blobs[0].clone();
    server.script(move |request, before| {
        (request.path.contains(&blob) && before < 2).then(|| only(Fault::Cut(400_000)))?
    });
    store.pull(&name).await.unwrap();
    content_is_whole(&store, &name).await;
}

async fn f50_a_trickle_counts_as_a_stall() {
    let server = Server::start().await;
    let store = Store::with(|config| config.min_throughput = 100_000).await;
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, before| {
        (request.path.contains(&blob) && before == 0).then(|| only(Fault::Trickle(1000)))?
    });
    let started = Instant::now();
    store.pull(&name).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    content_is_whole(&store, &name).await;
    assert_eq!(server.asked(&made.blobs[0]).len(), 2);
}

async fn f50_a_server_that_always_breaks_off_is_given_up() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, _| request.path.contains(&blob).then(|| only(Fault::Cut(0)))?);
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::RegistryUnavailable { .. }), "{error}");
    let tries = server.asked(&made.blobs[0]).len();
    assert!((2..=8).contains(&tries), "{tries}");
    store.is_clean().await;
}

async fn f50_errors_of_the_moment_are_tried_again() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, before| match before {
        0 if request.path.contains(&blob) => Some(Reply::new(429).header("retry-after", "1")),
        0 => Some(Reply::new(503)),
        _ => None,
    });
    let started = Instant::now();
    store.pull(&name).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1), "Retry-After is obeyed");
    content_is_whole(&store, &name).await;
    // What is not of the moment is not tried again.
    server.forget();
    server.script(|_, _| Some(Reply::new(400).body("no")));
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error}");
    assert_eq!(server.log().len(), 1);
}

async fn f50_a_server_that_says_nothing_is_cut() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, _) = large(&server);
    server.script(|_, _| only(Fault::Silent));
    let started = Instant::now();
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::RegistryUnavailable { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

async fn f50_a_token_server_that_hangs_is_cut() {
    let (server, realm, store) = (Server::start().await, Server::start().await, Store::new().await);
    let (name, _) = large(&server);
    realm.script(|_, _| only(Fault::Silent));
    let challenge = format!("Bearer realm=\"{}/token\"", realm.url());
    server.script(move |_, _| Some(Reply::new(401).header("www-authenticate", challenge.clone())));
    let started = Instant::now();
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::RegistryUnavailable { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

async fn f50_redirects_have_an_end() {
    let (server, store) = (Server::start().await, Store::new().await);
    server.script(|request, _| Some(Reply::new(307).header("location", request.path.clone())));
    let error = store.pull(&format!("{}/a", server.host())).await.unwrap_err();
    assert!(matches!(&error, Error::Registry { why, .. } if why.contains("redirects")), "{error}");
    assert!(server.log().len() <= 12);
}

async fn f50_wrong_bytes_are_refused_and_fetched_elsewhere() {
    let (mirror, upstream, store) = (Server::start().await, Server::start().await, Store::new().await);
    let (_, made) = large(&upstream);
    let right = Recipe::new(&[Tar::default().file("f", noise(1_000_000, 3)).end()]).layers[0].1.clone();
    let directory = store.directory.path().join("certs.d/r.example");
    std::fs::create_dir_all(&directory).unwrap();
    let text = format!("server = \"{}\"\n[host.\"{}\"]\n", upstream.url(), mirror.url());
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let (mut flipped, mut other) = (right.clone(), Tar::default().file("f", "other").end());
    flipped[500_000] ^= 1;
    other = gzip(&other);
    other.resize(right.len(), 0);
    for wrong in [flipped, other, right[..right.len() - 1].to_vec()] {
        mirror.content.lock().unwrap().lie("a", &made.blobs[0], &wrong);
        store.pull("r.example/a").await.unwrap();
        content_is_whole(&store, "r.example/a").await;
        assert!(store.images.remove("r.example/a").await.unwrap());
    }
    // Nobody has the right bytes: no image, and nothing of it stays.
    let mut wrong = right;
    wrong[500_000] ^= 1;
    upstream.content.lock().unwrap().lie("a", &made.blobs[0], &wrong);
    mirror.content.lock().unwrap().remove(&format!("a/blobs/{}", made.blobs[0]));
    let error = store.pull("r.example/a").await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    assert!(store.images.list().is_empty());
    assert_eq!(store.layers(), 0);
    store.is_clean().await;
}

async fn f50_a_wrong_length_is_refused() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, _| request.path.contains(&blob).then(|| only(Fault::Longer(1)))?);
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    // A configuration that promises other layers than the manifest brings.
    let mut recipe = Recipe::small("x");
    recipe.layers[0].1 = gzip(&Tar::default().file("other", "y").end());
    recipe.serve(&server, "b", "latest");
    server.script(|_, _| None);
    let error = store.pull(&format!("{}/b", server.host())).await.unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{error}");
    store.is_clean().await;
}

async fn f50_a_registry_that_is_gone_says_unavailable() {
    let store = Store::new().await;
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = store.pull(&format!("{gone}/a")).await.unwrap_err();
    assert!(matches!(error, Error::RegistryUnavailable { .. }), "{error}");
}

async fn s36_documents_without_bound_are_refused() {
    let (server, store) = (Server::start().await, Store::new().await);
    let name = format!("{}/a", server.host());
    server.content.lock().unwrap().manifest("a", "latest", MANIFEST, &vec![b' '; 20_000_000]);
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    server.content.lock().unwrap().manifest("a", "latest", MANIFEST, b"{");
    server.script(|_, _| only(Fault::Endless));
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    server.script(|_, _| None);
    // A configuration of five megabytes, announced as small.
    let mut recipe = Recipe::small("x");
    recipe.config = format!("\"Labels\":{{\"x\":\"{}\"}}", "y".repeat(5 << 20));
    let (config, manifest) = recipe.documents();
    let manifest = String::from_utf8(manifest)
        .unwrap()
        .replace(&format!("\"size\":{}}},\"layers\"", config.len()), "\"size\":100},\"layers\"");
    {
        let mut content = server.content.lock().unwrap();
        content.blob("a", &config);
        content.manifest("a", "latest", MANIFEST, manifest.as_bytes());
    }
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

async fn s36_nested_indexes_are_read_once_and_not_without_end() {
    let (server, store) = (Server::start().await, Store::new().await);
    let name = format!("{}/a", server.host());
    let index = |digests: &[String]| {
        let entries: Vec<String> = digests
            .iter()
            .map(|digest| format!(r#"{{"mediaType":"{INDEX}","digest":"{digest}","size":1}}"#))
            .collect();
        format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
    };
    // A thousand deep.
    let mut digest = Recipe::small("x").serve(&server, "a", "x").manifest;
    for depth in 0..1000 {
        let body = index(&[digest]);
        digest = server.content.lock().unwrap().manifest("a", &format!("d{depth}"), INDEX, body.as_bytes());
    }
    let error = store.pull(&format!("{name}:d999")).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(server.log().len() < 10);
    // Diamonds: two ways to each of two, level by level.
    server.forget();
    let mut level = [String::new(), String::new()];
    for (side, digest) in level.iter_mut().enumerate() {
        let body = format!(r#"{{"schemaVersion":2,"manifests":[],"annotations":{{"side":"{side}"}}}}"#);
        *digest = server.content.lock().unwrap().manifest("a", &format!("l{side}"), INDEX, body.as_bytes());
    }
    for depth in 0..3 {
        let one = index(&[level[0].clone(), level[1].clone()]);
        let two = index(&[level[1].clone(), level[0].clone()]);
        let mut content = server.content.lock().unwrap();
        level = [
            content.manifest("a", &format!("one{depth}"), INDEX, one.as_bytes()),
            content.manifest("a", &format!("two{depth}"), INDEX, two.as_bytes()),
        ];
    }
    assert!(store.pull(&format!("{name}:one1")).await.is_err());
    let mut paths: Vec<String> = server.log().into_iter().map(|request| request.path).collect();
    paths.sort();
    let all = paths.len();
    paths.dedup();
    assert!(paths.len() == all && all == 5, "{all} requests");
}

async fn s36_the_size_that_a_layer_announces_is_the_most_that_is_read() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, _| request.path.contains(&blob).then(|| only(Fault::Endless))?);
    let error = store.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    store.is_clean().await;
}

async fn s35_bombs_leave_nothing() {
    // In memory: what is written before the proportion is seen is more than a busy disk takes in time.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = memory.path().join("images");
    let server = Server::start().await;
    let store = Store::with(|config| config.root = root.clone()).await;
    // Ten gigabytes of zeros in ten megabytes, by members that repeat one.
    let megabyte = {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![0; 1 << 20]).unwrap();
        encoder.finish().unwrap()
    };
    // One file that is as long as all of it, so that none of it is padding.
    let mut header = Tar::default().file("zeros", "").end();
    header.truncate(512);
    header[124..136].copy_from_slice(b"77777777777\0");
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let bomb = [gzip(&header), megabyte.repeat(10 << 10)].concat();
    assert!(bomb.len() < 12 << 20);
    let mut recipe = Recipe::small("bomb");
    recipe.layers[0].1 = bomb;
    recipe.serve(&server, "a", "latest");
    let error = store.pull(&format!("{}/a", server.host())).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(children(&root.join("layers")).is_empty());
    // The gigabytes that were written go, if not within a second.
    until("staging and trash are empty", || {
        ["staging", "trash"].iter().all(|name| children(&root.join(name)).is_empty())
    })
    .await;
}

async fn f50_a_pull_that_nobody_waits_for_leaves_nothing() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, _| request.path.contains(&blob).then(|| only(Fault::Trickle(500_000)))?);
    for _ in 0..3 {
        let (images, name) = (store.images.clone(), name.clone());
        let pull = tokio::spawn(async move { images.pull(&name, None).await });
        until("a helper runs", || store.helpers() > 0).await;
        pull.abort();
        let given_up = Instant::now();
        store.is_clean().await;
        until("connections are closed", || server.open() <= 1).await;
        assert!(given_up.elapsed() < Duration::from_secs(1), "{:?}", given_up.elapsed());
        assert!(store.images.list().is_empty());
    }
}

async fn a_pull_goes_on_while_one_still_waits() {
    let (server, store) = (Server::start().await, Store::new().await);
    let (name, made) = large(&server);
    let blob = made.blobs[0].clone();
    server.script(move |request, _| request.path.contains(&blob).then(|| only(Fault::Trickle(2_000_000)))?);
    let pull = || {
        let (images, name) = (store.images.clone(), name.clone());
        tokio::spawn(async move { images.pull(&name, None).await })
    };
    let (first, second) = (pull(), pull());
    until("a helper runs", || store.helpers() > 0).await;
    first.abort();
    second.await.unwrap().unwrap();
    assert_eq!(server.asked(&made.blobs[0]).len(), 1);
    content_is_whole(&store, &name).await;
}

async fn f03_a_pull_that_was_cut_off_keeps_its_finished_layers() {
    let (server, store) = (Server::start().await, Store::new().await);
    let layers = [1, 2].map(|seed| Tar::default().file(&format!("f{seed}"), noise(300_000, seed)).end());
    let made = Recipe::new(&layers).serve(&server, "a", "latest");
    let slow = made.blobs[1].clone();
    server.script(move |request, _| request.path.contains(&slow).then(|| only(Fault::Stall(100_000)))?);
    let name = format!("{}/a", server.host());
    let pull = {
        let (images, name) = (store.images.clone(), name.clone());
        tokio::spawn(async move { images.pull(&name, None).await })
    };
    until("the other layer is done", || store.layers() == 1).await;
    pull.abort();
    let _ = pull.await;
    // What a killed daemon would have left as well.
    std::fs::create_dir_all(store.root().join("staging/left/over")).unwrap();
    std::fs::create_dir_all(store.root().join(format!("layers/{}", "0".repeat(64)))).unwrap();
    let store = store.reopened().await;
    assert!(store.images.list().is_empty(), "an image is visible when it is complete");
    store.is_clean().await;
    server.script(|_, _| None);
    server.forget();
    store.pull(&name).await.unwrap();
    assert!(server.asked(&made.blobs[0]).is_empty(), "a finished layer is not fetched again");
    assert_eq!(store.layers(), 2);
}

async fn f24_a_full_disk_fails_one_pull_and_no_other() {
    let (server, place) = (Server::start().await, tempfile::tempdir().unwrap());
    let file = place.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(24 << 20).unwrap();
    output("mkfs.ext4", &["-q", "-F", file.to_str().unwrap()]);
    let target = place.path().join("mounted");
    std::fs::create_dir(&target).unwrap();
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    output("mount", &["-o", "loop", file.to_str().unwrap(), target.to_str().unwrap()]);
    let mounted = Mounted(target.clone());
    let root = target.clone();
    let store = Store::with(|config| config.root = root.join("images")).await;
    Recipe::new(&[Tar::default().file("f", noise(30 << 20, 1)).end()]).serve(&server, "big", "latest");
    Recipe::small("x").serve(&server, "small", "latest");
    let (big, small) = (format!("{}/big", server.host()), format!("{}/small", server.host()));
    let (full, fine) = tokio::join!(store.pull(&big), store.pull(&small));
    assert!(matches!(full, Err(Error::Exhausted(_))), "{full:?}");
    fine.unwrap();
    until("its parts are gone", || children(&target.join("images/trash")).is_empty()).await;
    assert!(children(&target.join("images/staging")).is_empty());
    Recipe::new(&[Tar::default().file("g", noise(2 << 20, 2)).end()]).serve(&server, "next", "latest");
    store.pull(&format!("{}/next", server.host())).await.unwrap();
    drop(store);
    drop(mounted);
}

async fn s46_a_hundred_pulls_that_fail_do_not_slow_the_next() {
    let (server, store) = (Server::start().await, Store::new().await);
    let mut broken = Recipe::new(&[Tar::default().file("f", noise(50_000, 1)).end()]);
    let cut = broken.layers[0].0[..20_000].to_vec();
    broken.layers[0].1 = gzip(&cut);
    broken.serve(&server, "broken", "latest");
    for _ in 0..100 {
        let error = store.pull(&format!("{}/broken", server.host())).await.unwrap_err();
        assert!(matches!(error, Error::Unpack { .. }), "{error}");
    }
    let (name, _) = large(&server);
    let started = Instant::now();
    store.pull(&name).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
    content_is_whole(&store, &name).await;
}
