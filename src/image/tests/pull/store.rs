//! What is remembered, what is counted, and what goes when it is removed.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use image::Error;

use crate::facts;
use crate::fixtures::*;
use crate::server::Server;

facts![
    removing_an_image_takes_its_layers_with_it,
    an_image_in_use_loses_its_names_and_keeps_its_layers,
    a_removed_image_stays_while_a_container_has_it_mounted,
    a_snapshot_survives_the_daemon,
    preparing_again_answers_the_same,
    s61_odd_snapshot_keys_are_refused,
    f22_a_lost_layer_hides_the_image_and_a_pull_repairs_it,
    f22_a_damaged_row_hides_its_image_only,
    f20_a_layer_of_another_boot_that_was_never_synced_is_not_trusted,
    s54_directories_are_private,
    usage_is_what_the_disk_says,
    compressed_layers_are_kept_where_that_is_wanted,
    patterns_pin_images,
    s56_a_very_deep_snapshot_is_counted_and_released,
    others_may_use_the_same_database,
];

async fn removing_an_image_takes_its_layers_with_it() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let name = format!("{}/a", server.host());
    store.pull(&name).await.unwrap();
    assert!(store.images.remove(&name).await.unwrap());
    assert_eq!(store.layers(), 0);
    assert!(!store.images.remove(&name).await.unwrap());
    assert!(!store.images.remove("never/was").await.unwrap() && !store.images.remove("///").await.unwrap());
    store.is_clean().await;
    assert!(matches!(store.images.prepare(&name, "k").await, Err(Error::NotFound(_))));
}

async fn an_image_in_use_loses_its_names_and_keeps_its_layers() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let name = format!("{}/a", server.host());
    let image = store.pull(&name).await.unwrap();
    let snapshot = store.images.prepare(&image.id, "container").await.unwrap();
    assert!(store.images.remove(&image.id).await.unwrap());
    assert!(store.images.list().is_empty() && store.images.find(&name).is_none());
    assert_eq!(std::fs::read(snapshot.lower[0].join("file")).unwrap(), b"x");
    assert!(matches!(store.images.prepare(&image.id, "other").await, Err(Error::NotFound(_))));
    // Also over the daemon's death, and what runs can still be read.
    let store = store.reopened().await;
    assert_eq!(store.images.snapshot("container").unwrap(), snapshot);
    assert!(store.images.read_file(&image.id, "file", 10).await.unwrap().is_some());
    // Pulled again it is back, without a download.
    server.forget();
    store.pull(&name).await.unwrap();
    assert!(
        server
            .log()
            .iter()
            .all(|request| request.path.contains("manifests") || request.path.contains(&image.id))
    );
    store.images.remove(&name).await.unwrap();
    assert_eq!(store.layers(), 1);
    store.images.release("container").await.unwrap();
    assert_eq!(store.layers(), 0);
    assert!(!snapshot.upper.exists());
    store.is_clean().await;
}

async fn a_removed_image_stays_while_a_container_has_it_mounted() {
    let (server, store) = (Server::start().await, Store::new().await);
    for word in ["root", "volume"] {
        Recipe::small(word).serve(&server, word, "latest");
    }
    let root = store.pull(&format!("{}/root", server.host())).await.unwrap();
    let volume = store.pull(&format!("{}/volume", server.host())).await.unwrap();
    for key in ["one", "two"] {
        store.images.prepare(&root.id, key).await.unwrap();
        let seen = store.images.view(&volume.id, key).await.unwrap();
        assert_eq!(store.images.view(&volume.id, key).await.unwrap(), seen, "asked again");
    }
    assert!(store.images.remove(&volume.id).await.unwrap());
    assert!(matches!(store.images.view(&volume.id, "one").await, Err(Error::NotFound(_))));
    store.images.release("one").await.unwrap();
    let store = store.reopened().await;
    assert_eq!(store.layers(), 2);
    store.images.release("two").await.unwrap();
    assert_eq!(store.layers(), 1);
    assert!(store.images.remove(&root.id).await.unwrap());
    store.is_clean().await;
}

async fn a_snapshot_survives_the_daemon() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    let snapshot = store.images.prepare(&image.id, "kept").await.unwrap();
    store.images.prepare(&image.id, "lost").await.unwrap();
    std::fs::write(snapshot.upper.join("written"), "y").unwrap();
    std::fs::create_dir(store.root().join("snapshots/stray")).unwrap();
    std::fs::remove_dir_all(store.root().join("snapshots/lost")).unwrap();
    let store = store.reopened().await;
    assert_eq!(store.images.snapshot("kept").unwrap(), snapshot);
    assert_eq!(std::fs::read(snapshot.upper.join("written")).unwrap(), b"y");
    assert!(store.images.snapshot("lost").is_none() && !store.root().join("snapshots/stray").exists());
    assert_eq!(store.images.snapshots(), ["kept"]);
}

async fn preparing_again_answers_the_same() {
    let (server, store) = (Server::start().await, Store::new().await);
    let ids: Vec<String> =
        ["x", "y"].map(|word| Recipe::small(word).serve(&server, word, "latest").id).into();
    for word in ["x", "y"] {
        store.pull(&format!("{}/{word}", server.host())).await.unwrap();
    }
    let first = store.images.prepare(&ids[0], "key").await.unwrap();
    assert_eq!(store.images.prepare(&ids[0], "key").await.unwrap(), first);
    assert!(matches!(store.images.prepare(&ids[1], "key").await, Err(Error::InvalidArgument(_))));
    store.images.release("key").await.unwrap();
    store.images.release("key").await.unwrap();
    assert!(store.images.prepare(&ids[1], "key").await.is_ok());
}

async fn s61_odd_snapshot_keys_are_refused() {
    let (server, store) = (Server::start().await, Store::new().await);
    let id = Recipe::small("x").serve(&server, "a", "latest").id;
    store.pull(&format!("{}/a", server.host())).await.unwrap();
    let long = "k".repeat(300);
    for key in ["", ".", "..", "../x", "a/b", "/etc", "a\0b", "\n", &long] {
        assert!(matches!(store.images.prepare(&id, key).await, Err(Error::InvalidArgument(_))), "{key:?}");
        assert!(store.images.release(key).await.is_err(), "{key:?}");
        assert!(store.images.snapshot_usage(key).await.is_err(), "{key:?}");
        assert!(store.images.snapshot(key).is_none());
    }
}

async fn f22_a_lost_layer_hides_the_image_and_a_pull_repairs_it() {
    let (server, store) = (Server::start().await, Store::new().await);
    let base = Tar::default().file("base", "b").end();
    Recipe::new(&[base, Tar::default().file("top", "t").end()]).serve(&server, "a", "latest");
    Recipe::small("other").serve(&server, "b", "latest");
    let (name, other) = (format!("{}/a", server.host()), format!("{}/b", server.host()));
    let image = store.pull(&name).await.unwrap();
    store.pull(&other).await.unwrap();
    let lost = store.images.view(&image.id, "seen").await.unwrap()[0].clone();
    std::fs::remove_dir_all(&lost).unwrap();
    let store = store.reopened().await;
    assert!(store.images.find(&name).is_none() && store.images.find(&other).is_some());
    assert_eq!(store.layers(), 2, "nothing is wiped");
    server.forget();
    let again = store.pull(&name).await.unwrap();
    assert_eq!(server.asked("blobs").len(), 2, "the configuration and one layer");
    assert!(store.images.read_file(&again.id, "top", 10).await.unwrap().is_some());
    // It goes missing while we run, too.
    std::fs::remove_dir_all(&lost).unwrap();
    store.pull(&name).await.unwrap();
    assert!(lost.exists());
    // And an image that is not listed can be removed.
    std::fs::remove_dir_all(&lost).unwrap();
    let store = store.reopened().await;
    assert!(store.images.remove(&name).await.unwrap());
    assert_eq!(store.layers(), 1);
}

async fn f22_a_damaged_row_hides_its_image_only() {
    let (server, store) = (Server::start().await, Store::new().await);
    let bad = Recipe::small("bad").serve(&server, "a", "latest").id;
    Recipe::small("good").serve(&server, "b", "latest");
    let (name, other) = (format!("{}/a", server.host()), format!("{}/b", server.host()));
    store.pull(&name).await.unwrap();
    store.pull(&other).await.unwrap();
    let database = rusqlite::Connection::open(store.directory.path().join("crisp.db")).unwrap();
    database.execute("UPDATE image_image SET config = x'7b7d' WHERE id = ?1", [&bad]).unwrap();
    drop(database);
    let store = store.reopened().await;
    assert!(store.images.find(&name).is_none() && store.images.find(&other).is_some());
    store.pull(&name).await.unwrap();
    assert_eq!(store.images.find(&name).unwrap().id, bad);
}

async fn f20_a_layer_of_another_boot_that_was_never_synced_is_not_trusted() {
    let (server, store) = (Server::start().await, Store::new().await);
    Recipe::small("x").serve(&server, "a", "latest");
    let name = format!("{}/a", server.host());
    store.pull(&name).await.unwrap();
    let database = rusqlite::Connection::open(store.directory.path().join("crisp.db")).unwrap();
    let unsynced = |boot: &str| {
        database.execute("UPDATE image_layer SET boot = ?1", [boot]).unwrap();
    };
    let marked: Option<String> =
        database.query_row("SELECT boot FROM image_layer", [], |row| row.get(0)).unwrap();
    assert_eq!(marked, None, "an image that was pulled is synced");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    unsynced(boot.trim());
    let store = store.reopened().await;
    assert!(store.images.find(&name).is_some());
    unsynced("00000000-0000-0000-0000-000000000000");
    let store = store.reopened().await;
    assert!(store.images.find(&name).is_none());
    assert_eq!(store.layers(), 0);
}

async fn s54_directories_are_private() {
    let store = Store::new().await;
    let open = std::fs::Permissions::from_mode(0o777);
    for path in [store.root(), store.root().join("layers"), store.root().join("snapshots")] {
        std::fs::set_permissions(path, open.clone()).unwrap();
    }
    let store = store.reopened().await;
    for name in ["", "layers", "snapshots", "staging", "trash", "blobs"] {
        let mode = std::fs::metadata(store.root().join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o700, "{name}");
    }
}

async fn usage_is_what_the_disk_says() {
    let (server, store) = (Server::start().await, Store::new().await);
    let mut tar = Tar::default().directory("d", 0o755, 0).file("d/big", noise(500_000, 1));
    for n in 0..500 {
        tar = tar.file(&format!("d/a-file-with-a-long-name-that-fills-the-directory-{n}"), "x");
    }
    let tar = tar
        .entry(b'1', "hard", 0o644, 0, "d/big", b"")
        .symlink("s", "d")
        .file("d/big2", "")
        .file("d/big2", "y");
    Recipe::new(&[tar.end(), Tar::default().file("e/.wh.f", "").end()]).serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    let snapshot = store.images.prepare(&image.id, "k").await.unwrap();
    std::fs::write(snapshot.upper.join("written"), noise(70_000, 2)).unwrap();
    let root = store.root();
    let du = |path: &std::path::Path, inodes: bool| -> u64 {
        let how = if inodes { "--inodes" } else { "--block-size=1" };
        let text = output("du", &["-s", how, path.to_str().unwrap()]);
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    // What is written is allocated for good only now; delayed allocation may have counted otherwise.
    output("sync", &["-f", root.to_str().unwrap()]);
    let usage = store.images.usage().await.unwrap();
    assert_eq!((usage.bytes, usage.inodes), (du(&root, false), du(&root, true)));
    assert_eq!(usage.mountpoint, root.canonicalize().unwrap());
    let own = store.images.snapshot_usage("k").await.unwrap();
    let directory = root.join("snapshots/k");
    assert_eq!((own.bytes, own.inodes), (du(&directory, false), du(&directory, true)));
    store.images.release("k").await.unwrap();
    store.images.remove(&image.id).await.unwrap();
    let usage = store.images.usage().await.unwrap();
    assert_eq!((usage.bytes, usage.inodes), (du(&root, false), du(&root, true)));
}

async fn compressed_layers_are_kept_where_that_is_wanted() {
    let server = Server::start().await;
    let store = Store::with(|config| config.discard_layers = false).await;
    let made = Recipe::small("x").serve(&server, "a", "latest");
    let name = format!("{}/a", server.host());
    let image = store.pull(&name).await.unwrap();
    let kept = children(&store.root().join("blobs"));
    assert_eq!(kept.len(), 1);
    assert_eq!(digest(&std::fs::read(&kept[0]).unwrap()), made.blobs[0]);
    // A lost layer is made again from it, without the registry.
    let lost = store.images.view(&image.id, "seen").await.unwrap()[0].clone();
    std::fs::remove_dir_all(&lost).unwrap();
    server.forget();
    store.pull(&name).await.unwrap();
    assert!(server.asked(&made.blobs[0]).is_empty() && lost.join("file").exists());
    // And from the registry when the kept one is damaged.
    std::fs::remove_dir_all(&lost).unwrap();
    std::fs::write(&kept[0], "rubbish").unwrap();
    store.pull(&name).await.unwrap();
    assert_eq!(server.asked(&made.blobs[0]).len(), 1);
    assert_eq!(digest(&std::fs::read(&kept[0]).unwrap()), made.blobs[0]);
    std::fs::write(store.root().join("blobs/stray"), "").unwrap();
    let store = store.reopened().await;
    assert_eq!(children(&store.root().join("blobs")), kept);
    store.images.remove(&name).await.unwrap();
    store.is_clean().await;
}

async fn patterns_pin_images() {
    let server = Server::start().await;
    let pattern = format!("{}/pin*", server.host());
    let store = Store::with(|config| config.pinned = vec![pattern]).await;
    for name in ["pinned", "other"] {
        Recipe::small(name).serve(&server, name, "latest");
        store.pull(&format!("{}/{name}", server.host())).await.unwrap();
    }
    let pinned = |name: &str| store.images.find(&format!("{}/{name}", server.host())).unwrap().pinned;
    assert!(pinned("pinned") && !pinned("other"));
    let mut next = config(store.directory.path());
    next.pinned = vec!["*/other:*".into()];
    store.images.reconfigure(next);
    assert!(!pinned("pinned") && pinned("other"));
    // Pinned is for garbage collection; who asks by name is obeyed.
    assert!(store.images.remove(&format!("{}/other", server.host())).await.unwrap());
}

async fn s56_a_very_deep_snapshot_is_counted_and_released() {
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    // In memory: a disk takes minutes for so many directories.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = memory.path().join("images");
    let (server, store) = (Server::start().await, Store::with(|config| config.root = root).await);
    Recipe::small("x").serve(&server, "a", "latest");
    let image = store.pull(&format!("{}/a", server.host())).await.unwrap();
    let snapshot = store.images.prepare(&image.id, "deep").await.unwrap();
    let depth = 100_000;
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = rustix::fs::open(&snapshot.upper, flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        mkdirat(&at, "d", Mode::from_raw_mode(0o700)).unwrap();
        at = openat(&at, "d", flags, Mode::empty()).unwrap();
    }
    drop(at);
    assert_eq!(store.images.snapshot_usage("deep").await.unwrap().inodes, depth + 3);
    store.images.release("deep").await.unwrap();
    assert!(!snapshot.upper.exists());
    store.is_clean().await;
}

async fn others_may_use_the_same_database() {
    let (server, store) = (Server::start().await, Store::new().await);
    let database = rusqlite::Connection::open(store.directory.path().join("crisp.db")).unwrap();
    database.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    database.execute_batch("CREATE TABLE pod (id TEXT) STRICT").unwrap();
    let writer = std::thread::spawn(move || {
        for n in 0..300 {
            database.execute("INSERT INTO pod VALUES (?1)", [format!("{n}")]).unwrap();
        }
    });
    for n in 0..10 {
        Recipe::small(&format!("{n}")).serve(&server, "a", &format!("t{n}"));
        store.pull(&format!("{}/a:t{n}", server.host())).await.unwrap();
    }
    writer.join().unwrap();
    assert_eq!(store.images.list().len(), 10);
}
