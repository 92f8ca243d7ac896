//! The images that the tests, critest, the bench and the demo ask for, under the names they ask for, made of
//! Debian's files and small programs of our own.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{Layer, Packing, Process, Store, Tree, debian, hex};
use crate::{place, run, setup};

/// critest's default image, and ours.
pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// A web server on port 80.
pub const NGINX: &str = "registry.k8s.io/e2e-test-images/nginx:1.14-2";
/// Waits for a signal; also the pause image of other runtimes.
pub const PAUSE: &str = "crisp.test/pause:1";
/// Small programs of ours: flood, hog.
pub const TOOLS: &str = "crisp.test/tools:1";
/// busybox under a short name, packed with zstd.
pub const SMALL: &str = "crisp.test/small:1";
/// The same behind an index of two platforms.
pub const INDEXED: &str = "crisp.test/indexed:1";
/// The same, not compressed.
pub const PLAIN: &str = "crisp.test/plain:1";
/// Three layers that replace and delete each other's files.
pub const WHITEOUTS: &str = "crisp.test/whiteouts:1";
/// Environment, working directory, stop signal and volume set in the config.
pub const CONFIGURED: &str = "crisp.test/configured:1";

/// Changes when the images are made differently from the same files.
const RECIPE: &str = "5";

/// The store with every image of the catalogue: from the cache, or made now.
pub fn ensure() -> Result<Store> {
    let root = place::cache()?.join("images");
    std::fs::create_dir_all(&root)?;
    // Several test programs may start at once on a cold cache.
    let lock = std::fs::File::create(root.join("lock"))?;
    rustix::fs::flock(lock.as_fd(), rustix::fs::FlockOperation::LockExclusive)?;
    let dir = root.join(key()?);
    if let Ok(store) = Store::open(&dir) {
        return Ok(store);
    }
    println!("images: making the test images in {}", dir.display());
    let mut store = Store::create(&dir)?;
    make(&mut store)?;
    store.save()?;
    Ok(store)
}

/// Names what the images are made of: our recipe and programs, and the versions of Debian's.
fn key() -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(RECIPE);
    for program in PROGRAMS {
        hash.update(std::fs::read(source(program))?);
    }
    for file in ["busybox", "nginx"] {
        hash.update(std::fs::read(setup::unpacked(file)?)?);
    }
    Ok(hex(&hash.finalize())[..16].to_owned())
}

const PROGRAMS: &[&str] = &["nnp", "pause", "flood", "hog"];

fn source(program: &str) -> PathBuf {
    place::package().join("programs").join(format!("{program}.rs"))
}

/// Compiles one of our small programs, static.
pub fn compile(program: &str, into: &Path) -> Result<PathBuf> {
    let output = into.join(program);
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "--target", "x86_64-unknown-linux-musl", "-O"]);
    rustc.args(["-C", "strip=symbols", "-C", "panic=abort", "-o"]).arg(&output).arg(source(program));
    run::status(&mut rustc, Duration::from_secs(120)).with_context(|| format!("compile {program}"))?;
    Ok(output)
}

fn make(store: &mut Store) -> Result<()> {
    let programs = place::scratch("crisp-programs-")?;
    for program in PROGRAMS {
        compile(program, programs.path())?;
    }
    let bin = |name: &str| programs.path().join(name);
    let docker = Packing::DockerGzip;

    let shell = Process { cmd: strings(&["sh"]), ..Process::default() };
    let mut tree = debian::busybox()?;
    let small = store.layer(&tree, Packing::OciZstd)?;
    let plain = store.layer(&tree, Packing::OciPlain)?;
    debian::extras(&mut tree)?;
    let busybox = store.layer(&tree, docker)?;
    store.image(&[BUSYBOX], std::slice::from_ref(&busybox), &shell, docker)?;

    for (port, name) in [(80, NGINX.to_owned()), (12003, hostnet_nginx())] {
        let layer = store.layer(&debian::nginx(port)?, Packing::OciGzip)?;
        let process = Process { cmd: strings(&["nginx"]), ..Process::default() };
        store.image(&[&name], &[busybox.clone(), layer], &process, Packing::OciGzip)?;
    }

    let mut www = Tree::default();
    www.file("www/index.html", 0o644, b"<html>It works!</html>\n");
    let layer = store.layer(&www, docker)?;
    let process = Process {
        cmd: strings(&["sh", "-c", "echo httpd: serving /www; exec httpd -f -p 80 -h /www"]),
        ..Process::default()
    };
    store.image(
        &["registry.k8s.io/e2e-test-images/httpd:2.4.39-4"],
        &[busybox.clone(), layer],
        &process,
        docker,
    )?;

    let mut nnp = Tree::default();
    nnp.copy(&bin("nnp"), "usr/bin/nnp", 0o6755)?;
    let layer = store.layer(&nnp, docker)?;
    let process = Process { cmd: strings(&["nnp"]), ..Process::default() };
    let nnp = "registry.k8s.io/e2e-test-images/nonewprivs:1.3";
    store.image(&[nnp], &[busybox.clone(), layer], &process, docker)?;

    users(store, &busybox)?;
    marked(store, &busybox)?;
    pauses(store, &bin("pause"))?;

    let mut tools = Tree::default();
    tools.copy(&bin("flood"), "bin/flood", 0o755)?.copy(&bin("hog"), "bin/hog", 0o755)?;
    tools.copy(&bin("pause"), "bin/pause", 0o755)?.copy(&bin("nnp"), "bin/nnp", 0o6755)?;
    let layer = store.layer(&tools, Packing::OciZstd)?;
    store.image(&[TOOLS], &[small.clone(), layer], &shell, Packing::OciZstd)?;

    let manifest = store.image(&[SMALL], std::slice::from_ref(&small), &shell, Packing::OciZstd)?;
    let foreign = store.image(&[], &[small.clone(), small.clone()], &shell, Packing::OciZstd)?;
    store.index(&[INDEXED], &manifest, &foreign)?;
    store.image(&[PLAIN], &[plain], &shell, Packing::OciPlain)?;
    whiteouts(store, &small, &shell)?;

    let process = Process {
        user: "nobody".to_owned(),
        entrypoint: strings(&["/bin/sh", "-c"]),
        cmd: strings(&["echo from the image; exec sleep 1000"]),
        env: strings(&["COLOUR=green", "SHAPE=round"]),
        dir: "/work/here".to_owned(),
        stop_signal: "SIGUSR1".to_owned(),
        volumes: strings(&["/data"]),
    };
    store.image(&[CONFIGURED], &[small], &process, Packing::OciZstd)?;
    Ok(())
}

fn users(store: &mut Store, busybox: &Layer) -> Result<()> {
    let named = [
        ("test-image-user-uid", "1002"),
        ("test-image-user-username", "www-data"),
        ("test-image-user-uid-group", "1003:1004"),
        ("test-image-user-username-group", "www-data:1004"),
    ];
    for (name, user) in named {
        let process = Process { user: user.to_owned(), cmd: strings(&["sh"]), ..Process::default() };
        store.image(&[&staging(name)], std::slice::from_ref(busybox), &process, Packing::DockerGzip)?;
    }
    let mut tree = Tree::default();
    let passwd = "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n\
                  nobody:x:65534:65534:nobody:/home:/bin/false\n";
    let group =
        "root:x:0:\ndefault-user:x:1000:\nnogroup:x:65534:\ngroup-defined-in-image:x:50000:default-user\n";
    tree.file("etc/passwd", 0o644, passwd.as_bytes()).file("etc/group", 0o644, group.as_bytes());
    let layer = store.layer(&tree, Packing::DockerGzip)?;
    let process = Process { user: "1000".to_owned(), cmd: strings(&["sh"]), ..Process::default() };
    let name = staging("test-image-predefined-group");
    store.image(&[&name], &[busybox.clone(), layer], &process, Packing::DockerGzip)?;
    Ok(())
}

/// Images that differ by one file, and one image with three tags.
fn marked(store: &mut Store, busybox: &Layer) -> Result<()> {
    let images: [&[&str]; 7] = [
        &["test-image-latest:latest"],
        &["test-image-tag:test"],
        &["test-image-tag:all"],
        &["test-image-1:latest"],
        &["test-image-2:latest"],
        &["test-image-3:latest"],
        &["test-image-tags:1", "test-image-tags:2", "test-image-tags:3"],
    ];
    for tags in images {
        let mut tree = Tree::default();
        tree.file(&format!("marks/{}", tags[0].replace(':', "-")), 0o644, tags[0].as_bytes());
        let layer = store.layer(&tree, Packing::DockerGzip)?;
        let process = Process { cmd: strings(&["sh"]), ..Process::default() };
        let names: Vec<String> = tags.iter().map(|tag| staging(tag)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        store.image(&names, &[busybox.clone(), layer], &process, Packing::DockerGzip)?;
    }
    Ok(())
}

/// The pause image of critest has bytes of its own: a further tag on its digest would be a third repo tag where
/// critest wants two.
fn pauses(store: &mut Store, program: &Path) -> Result<()> {
    let critest = ["registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"];
    for (mark, names) in [("critest", &critest[..]), ("peers", &[PAUSE][..])] {
        let mut tree = Tree::default();
        tree.copy(program, "pause", 0o755)?.file("etc/for", 0o644, mark.as_bytes());
        let layer = store.layer(&tree, Packing::DockerGzip)?;
        let process = Process {
            entrypoint: strings(&["/pause"]),
            user: "65535:65535".to_owned(),
            ..Process::default()
        };
        store.image(names, &[layer], &process, Packing::DockerGzip)?;
    }
    Ok(())
}

/// Deletes one file, replaces one directory, empties one directory (opaque), leaves the rest.
fn whiteouts(store: &mut Store, small: &Layer, shell: &Process) -> Result<()> {
    let mut first = Tree::default();
    for file in ["w/deleted", "w/replaced/old", "w/opaque/old", "w/kept"] {
        first.file(file, 0o644, b"first\n");
    }
    first.directory("w/replaced", 0o700).owner("w/replaced", 7, 8);
    let mut second = Tree::default();
    second.file("w/.wh.deleted", 0o644, b"").file("w/.wh.replaced", 0o644, b"");
    second.file("w/opaque/.wh..wh..opq", 0o644, b"").file("w/opaque/new", 0o644, b"second\n");
    let mut third = Tree::default();
    third.file("w/replaced", 0o644, b"third\n");
    let layers = [
        small.clone(),
        store.layer(&first, Packing::OciGzip)?,
        store.layer(&second, Packing::OciZstd)?,
        store.layer(&third, Packing::OciPlain)?,
    ];
    store.image(&[WHITEOUTS], &layers, shell, Packing::OciGzip)?;
    Ok(())
}

fn hostnet_nginx() -> String {
    staging(&format!("hostnet-nginx-{}:latest", super::architecture()))
}

fn staging(name: &str) -> String {
    let tag = if name.contains(':') { "" } else { ":latest" };
    format!("gcr.io/k8s-staging-cri-tools/{name}{tag}")
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}
