//! Trees made of this Debian machine's programs: each with its libraries and its loader.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Tree;
use crate::{place, run, setup};

/// Puts a program and every library it is linked with where the loader looks for them.
pub fn program(tree: &mut Tree, from: &Path, path: &str) -> Result<()> {
    tree.copy(from, path, 0o755)?;
    for library in libraries(from)? {
        if !tree.has(library.trim_start_matches('/')) {
            tree.copy(Path::new(&library), &library, 0o755)?;
        }
    }
    Ok(())
}

/// The paths that ldd(1) names.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let text = run::stdout(Command::new("ldd").arg(program), Duration::from_secs(20))?;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("not found") {
            bail!("{}: {line}", program.display());
        }
        // Either "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)".
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        if let Some(path) = path.split_whitespace().next().filter(|path| path.starts_with('/')) {
            found.push(path.to_owned());
        }
    }
    Ok(found)
}

/// Debian's busybox with all applets as hard links, and the files every image has. With symbolic links a mask over
/// /bin/ls would be a mask over busybox.
///
/// Not busybox-static: its shell runs applets without looking at the file system, so that a masked /bin/ls would
/// still list.
pub fn busybox() -> Result<Tree> {
    let mut tree = Tree::default();
    let busybox = setup::unpacked("busybox")?;
    program(&mut tree, &busybox, "bin/busybox")?;
    let applets = run::stdout(Command::new(&busybox).arg("--list"), Duration::from_secs(20))?;
    for applet in applets.lines().filter(|name| *name != "busybox" && !name.contains('/')) {
        tree.hardlink(&format!("bin/{applet}"), "bin/busybox");
    }
    base(&mut tree);
    Ok(tree)
}

/// What critest calls beyond busybox's applets.
pub fn extras(tree: &mut Tree) -> Result<()> {
    for name in ["pgrep", "ipcs"] {
        let path = place::program(name).with_context(|| format!("{name} is not on this machine"))?;
        program(tree, &path, &format!("usr/bin/{name}"))?;
    }
    Ok(())
}

/// nginx in the foreground, on one port, writing its pid where critest looks.
pub fn nginx(port: u16) -> Result<Tree> {
    let mut tree = Tree::default();
    program(&mut tree, &setup::unpacked("nginx")?, "usr/sbin/nginx")?;
    let config = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /dev/stderr;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n  access_log off;\n  server {{ listen {port}; root /usr/share/nginx/html; }}\n}}\n"
    );
    tree.file("etc/nginx/nginx.conf", 0o644, config.as_bytes());
    tree.file("usr/share/nginx/html/index.html", 0o644, b"<html>Welcome to nginx!</html>\n");
    // Opened before the configuration is read.
    tree.directory("var/log/nginx", 0o755).directory("var/lib/nginx", 0o755).directory("var/run", 0o755);
    Ok(tree)
}

fn base(tree: &mut Tree) {
    let passwd = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
                  www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
    let group = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n";
    tree.file("etc/passwd", 0o644, passwd.as_bytes())
        .file("etc/group", 0o644, group.as_bytes())
        .file("etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files dns\n")
        .directory("root", 0o700)
        .directory("home", 0o755)
        .directory("tmp", 0o1777)
        .directory("var/run", 0o755)
        .directory("var/tmp", 0o1777)
        .directory("proc", 0o555)
        .directory("sys", 0o555)
        .directory("dev", 0o755);
}
