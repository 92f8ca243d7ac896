//! Layers as one tree: what a container sees through overlayfs, and what we read without mounting it.

use std::path::Path;

use image::{Error, Snapshot};

use crate::facts;
use crate::fixtures::*;
use crate::server::Server;

facts![
    implied_directories_look_as_the_layers_below_say,
    the_root_looks_as_the_image_says,
    whiteouts_and_opaque_directories_hide_what_is_below,
    files_are_read_through_layers_and_links,
    s22_what_is_no_small_regular_file_is_not_read,
    s32_a_hostile_layer_changes_nothing_outside,
    s31_layers_unpacked_at_once_stay_where_they_are,
];

/// Runs a command in the overlay of a snapshot, in mount and other namespaces that end with it.
fn within(snapshot: &Snapshot, command: &str) -> String {
    let lower: Vec<&str> = snapshot.lower.iter().map(|path| path.to_str().unwrap()).collect();
    let place = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t overlay overlay -o lowerdir={},upperdir={},workdir={} {place} && cd {place} && {command}",
        lower.join(":"),
        snapshot.upper.display(),
        snapshot.work.display(),
        place = place.path().display(),
    );
    output("unshare", &["--mount", "--propagation", "private", "sh", "-ec", &script])
}

async fn snapshot(store: &Store, server: &Server, layers: &[Vec<u8>], name: &str) -> Snapshot {
    Recipe::new(layers).serve(server, name, "latest");
    let image = store.pull(&format!("{}/{name}", server.host())).await.unwrap();
    store.images.prepare(&image.id, name).await.unwrap()
}

async fn implied_directories_look_as_the_layers_below_say() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default()
        .directory("tmp", 0o1777, 0)
        .directory("home", 0o751, 5)
        .directory("home/me", 0o700, 1000)
        .file("home/me/.profile", "p")
        .end();
    let middle = Tar::default().file("home/me/work/x", "m").end();
    let top = Tar::default().file("home/me/y", "t").file("tmp/z", "t").file("new/a", "n").end();
    let layers = [base, middle.clone(), top.clone()];
    let one = snapshot(&store, &server, &layers, "one").await;
    let look = "stat -c '%n %a %u' tmp home home/me home/me/work new && cat home/me/.profile home/me/y home/me/work/x";
    let seen = within(&one, look);
    assert_eq!(seen, "tmp 1777 0\nhome 751 5\nhome/me 700 1000\nhome/me/work 755 0\nnew 755 0\nptm");
    // The same layers on another base, which says otherwise: they are shared, and right for both.
    let other = Tar::default()
        .directory("home", 0o711, 0)
        .directory("home/me", 0o750, 2000)
        .file("home/me/.profile", "q");
    let two = snapshot(&store, &server, &[other.end(), middle, top], "two").await;
    assert!(within(&two, look).starts_with("tmp 755 0\nhome 711 0\nhome/me 750 2000\n"));
    assert_eq!(within(&one, look), seen);
    // Three layers for one, one more base for the other, and a mend each.
    assert_eq!(store.layers(), 3 + 1 + 2);
    let store = store.reopened().await;
    assert_eq!(store.images.snapshot("one").unwrap(), one);
    for name in ["one", "two"] {
        store.images.release(name).await.unwrap();
        store.images.remove(&format!("{}/{name}", server.host())).await.unwrap();
    }
    assert_eq!(store.layers(), 0);
}

async fn the_root_looks_as_the_image_says() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default().directory("./", 0o711, 9).file("a", "1").end();
    let top = Tar::default().file("b", "2").end();
    let snapshot = snapshot(&store, &server, &[base, top], "a").await;
    assert_eq!(within(&snapshot, "stat -c '%a %u' . && cat a b"), "711 9\n12");
}

async fn whiteouts_and_opaque_directories_hide_what_is_below() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default()
        .file("gone", "1")
        .file("d/one", "1")
        .file("d/two", "2")
        .file("e/old", "3")
        .directory("f", 0o700, 4)
        .file("f/old", "4")
        .file("g/old", "5")
        .end();
    let top = Tar::default()
        .file(".wh.gone", "")
        .file("d/.wh.one", "")
        .file("e/.wh..wh..opq", "")
        .file("e/new", "n")
        .file("f/.wh..wh..opq", "")
        // Replaced altogether, and by a file of an implied directory at that.
        .file(".wh.g", "")
        .file("g/new", "n")
        .end();
    let snapshot = snapshot(&store, &server, &[base, top], "a").await;
    let seen = within(&snapshot, "find . -mindepth 1 | sort && stat -c %a-%u f");
    assert_eq!(seen, "./d\n./d/two\n./e\n./e/new\n./f\n./g\n./g/new\n700-4\n");
    for (path, content) in
        [("gone", None), ("d/one", None), ("d/two", Some("2")), ("e/old", None), ("e/new", Some("n"))]
    {
        let read = store.images.read_file(&format!("{}/a", server.host()), path, 10).await.unwrap();
        assert_eq!(read.as_deref(), content.map(str::as_bytes), "{path}");
    }
}

async fn files_are_read_through_layers_and_links() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default()
        .file("usr/etc/passwd", "root:x:0:0")
        .symlink("etc", "usr/etc")
        .symlink("abs", "/usr/./etc//passwd")
        .symlink("up", "../../../usr/etc/passwd")
        .symlink("loop", "loop")
        .symlink("out", "/proc/self/environ")
        .end();
    let top = Tar::default().file("usr/etc/group", "g").symlink("usr/link", "../etc/group").end();
    Recipe::new(&[base, top]).serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    let read = async |path: &str| store.images.read_file(&image.id, path, 100).await;
    for path in ["etc/passwd", "/etc/passwd", "abs", "up", "etc/../etc/passwd", "../../etc/passwd"] {
        assert_eq!(read(path).await.unwrap().as_deref(), Some(&b"root:x:0:0"[..]), "{path}");
    }
    assert_eq!(read("usr/link").await.unwrap().as_deref(), Some(&b"g"[..]));
    for path in ["absent", "out", "etc", "etc/passwd/x", "", "/"] {
        assert_eq!(read(path).await.unwrap(), None, "{path}");
    }
    assert!(read("loop").await.is_err());
}

async fn s22_what_is_no_small_regular_file_is_not_read() {
    let (server, store) = (Server::start().await, Store::new().await);
    let tar = Tar::default()
        .entry(b'6', "fifo", 0o644, 0, "", b"")
        .symlink("zero", "/dev/zero")
        .entry(b'3', "device", 0o644, 0, "", b"")
        .file("long", vec![b'x'; 2000]);
    let chain =
        (0..60).fold(tar, |tar, n| tar.symlink(&format!("l{n}"), &format!("l{}", n + 1))).file("l60", "end");
    Recipe::new(&[chain.end()]).serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    let read = async |path: &str| store.images.read_file(&image.id, path, 1000).await;
    assert_eq!(read("fifo").await.unwrap(), None);
    assert_eq!(read("zero").await.unwrap(), None);
    assert_eq!(read("device").await.unwrap(), None);
    assert!(matches!(read("long").await, Err(Error::TooLarge { .. })));
    assert!(read("l0").await.is_err() && read("l30").await.unwrap().is_some());
}

/// Everything below a directory: names, kinds, modes, owners, times and content.
fn fingerprint(path: &Path) -> String {
    let script = format!(
        "cd {} && find . -printf '%p %y %m %u %T@ %l\\n' | sort && find . -type f | sort | xargs sha256sum",
        path.display()
    );
    output("sh", &["-ec", &script])
}

async fn s32_a_hostile_layer_changes_nothing_outside() {
    let (server, store) = (Server::start().await, Store::new().await);
    let canary = tempfile::tempdir().unwrap();
    std::fs::create_dir(canary.path().join("d")).unwrap();
    std::fs::write(canary.path().join("file"), "untouched").unwrap();
    let before = fingerprint(canary.path());
    let out = canary.path().to_str().unwrap().to_owned();
    let up = format!("../../../../../../../../../..{out}");
    let mut archives = Vec::new();
    for way in [out.as_str(), up.as_str()] {
        let file = format!("{way}/file");
        for link in [b'2', b'1'] {
            archives.push(
                Tar::default().entry(link, "l", 0o777, 0, way, b"").file("l/x", "x").file("l/file", "x"),
            );
            archives.push(Tar::default().entry(link, "l", 0o777, 0, &file, b"").file("l", "x"));
            archives.push(Tar::default().entry(link, "l", 0o777, 0, way, b"").directory("l", 0o4777, 7));
            archives.push(
                Tar::default()
                    .entry(link, "l", 0o777, 0, way, b"")
                    .file("l/.wh.file", "")
                    .file("l/.wh..wh..opq", ""),
            );
            archives.push(
                Tar::default()
                    .directory("d", 0o755, 0)
                    .entry(link, "d", 0o777, 0, way, b"")
                    .directory("d/d", 0o4777, 7),
            );
            archives.push(
                Tar::default()
                    .entry(link, "a", 0o777, 0, way, b"")
                    .entry(b'1', "b", 0o644, 0, "a/file", b"")
                    .file("b", "x"),
            );
        }
        archives
            .push(Tar::default().symlink("a", "b").symlink("b", "c").symlink("c", way).file("a/file", "x"));
        archives.push(
            Tar::default().symlink("a", way).symlink("a/b", "/").entry(b'3', "a/dev", 0o666, 0, "", b""),
        );
        if file.len() < 100 {
            archives.push(Tar::default().file(&file, "x").directory(way, 0o4777, 7));
            archives.push(Tar::default().file(&format!("{way}/.wh.file"), ""));
            archives.push(Tar::default().entry(b'6', &format!("{way}/fifo"), 0o666, 0, "", b""));
        }
    }
    assert!(archives.len() > 30);
    for (n, archive) in archives.into_iter().enumerate() {
        let name = format!("hostile{n}");
        Recipe::new(&[archive.end()]).serve(&server, &name, "latest");
        // It may be refused, or land inside; what is outside stays as it was.
        let _ = store.pull(&format!("{}/{name}", server.host())).await;
        assert_eq!(fingerprint(canary.path()), before, "archive {n}");
    }
    store.is_clean().await;
}

async fn s31_layers_unpacked_at_once_stay_where_they_are() {
    let (server, store) = (Server::start().await, Store::new().await);
    let canary = tempfile::tempdir().unwrap();
    let before = fingerprint(canary.path());
    // Layers that share parents; in each second one a link stands where the others have a directory.
    let layers: Vec<Vec<u8>> = (0..12)
        .map(|n| {
            let mut tar = match n % 2 {
                0 => Tar::default().directory("shared", 0o755, 0).directory("shared/d", 0o755, 0),
                _ => Tar::default().symlink("shared", canary.path().to_str().unwrap()),
            };
            for m in 0..50 {
                tar = tar.file(&format!("shared/d/f{n}-{m}"), format!("{n} {m}"));
            }
            tar.end()
        })
        .collect();
    Recipe::new(&layers).serve(&server, "a", "latest");
    let _ = store.pull(&format!("{}/a", server.host())).await;
    assert_eq!(fingerprint(canary.path()), before);
    store.is_clean().await;
}
