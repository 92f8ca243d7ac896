//! A tree of files in memory and its form as a tar file (ustar, deterministic: sorted, time zero). Knows no images.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What stands at one path.
#[derive(Clone, Debug)]
enum Node {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Hardlink(String),
}

#[derive(Clone, Debug)]
struct Entry {
    node: Node,
    mode: u32,
    owner: (u32, u32),
}

/// Files by path, without a leading slash. Directories on the way are made, 0755 and root's.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// A directory.
    pub fn directory(&mut self, path: &str, mode: u32) -> &mut Tree {
        self.put(path, Node::Directory, mode)
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Tree {
        self.put(path, Node::File(content.to_vec()), mode)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Tree {
        self.put(path, Node::Symlink(target.to_owned()), 0o777)
    }

    /// Another name of a file that is put here as well, given by its path.
    pub fn hardlink(&mut self, path: &str, target: &str) -> &mut Tree {
        // Unpackers apply the mode of a link's header to the file that it names.
        let mode = self.entries.get(target).map_or(0o644, |entry| entry.mode);
        self.put(path, Node::Hardlink(target.to_owned()), mode)
    }

    /// A copy of a file of this machine.
    pub fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<&mut Tree> {
        let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
        Ok(self.put(path, Node::File(content), mode))
    }

    /// Changes the owner of what was put.
    pub fn owner(&mut self, path: &str, uid: u32, gid: u32) -> &mut Tree {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.owner = (uid, gid);
        }
        self
    }

    /// Takes over everything of another tree.
    pub fn merge(&mut self, other: &Tree) -> &mut Tree {
        self.entries.extend(other.entries.iter().map(|(path, entry)| (path.clone(), entry.clone())));
        self
    }

    /// Whether something stands at a path.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    /// The tree as a tar file.
    pub fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = Vec::new();
        // A link names a file that was there before.
        let link = |entry: &Entry| matches!(entry.node, Node::Hardlink(_));
        let (links, others): (Vec<_>, Vec<_>) = self.entries.iter().partition(|(_, entry)| link(entry));
        for (path, entry) in others.into_iter().chain(links) {
            let (kind, target, content): (u8, &str, &[u8]) = match &entry.node {
                Node::Directory => (b'5', "", &[]),
                Node::File(content) => (b'0', "", content),
                Node::Symlink(target) => (b'2', target, &[]),
                Node::Hardlink(target) => (b'1', target, &[]),
            };
            let name = if kind == b'5' { format!("{path}/") } else { path.clone() };
            tar.extend_from_slice(&header(
                &name,
                kind,
                entry.mode,
                entry.owner,
                content.len() as u64,
                target,
            )?);
            tar.extend_from_slice(content);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.resize(tar.len() + 1024, 0);
        Ok(tar)
    }

    fn put(&mut self, path: &str, node: Node, mode: u32) -> &mut Tree {
        let path = path.trim_matches('/');
        let mut parent = path;
        while let Some((up, _)) = parent.rsplit_once('/') {
            self.entries.entry(up.to_owned()).or_insert(Entry {
                node: Node::Directory,
                mode: 0o755,
                owner: (0, 0),
            });
            parent = up;
        }
        self.entries.insert(path.to_owned(), Entry { node, mode, owner: (0, 0) });
        self
    }
}

/// One header block of the ustar format (POSIX pax, "ustar Interchange Format"). Takes any name as it is, so that
/// tests can make archives that no honest tool would.
pub fn header(
    name: &str,
    kind: u8,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    target: &str,
) -> Result<[u8; 512]> {
    let (prefix, name) = split(name)?;
    if target.len() > 100 {
        bail!("link target is too long for ustar: {target}");
    }
    let mut block = [0u8; 512];
    put(&mut block, 0, name.as_bytes());
    put(&mut block, 100, format!("{mode:07o}").as_bytes());
    put(&mut block, 108, format!("{:07o}", owner.0).as_bytes());
    put(&mut block, 116, format!("{:07o}", owner.1).as_bytes());
    put(&mut block, 124, format!("{size:011o}").as_bytes());
    put(&mut block, 136, b"00000000000");
    block[156] = kind;
    put(&mut block, 157, target.as_bytes());
    put(&mut block, 257, b"ustar\x0000");
    put(&mut block, 345, prefix.as_bytes());
    // The checksum counts its own field as blanks.
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

fn put(block: &mut [u8; 512], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn split(name: &str) -> Result<(&str, &str)> {
    if name.len() <= 100 {
        return Ok(("", name));
    }
    let cut = name
        .char_indices()
        .filter(|(at, c)| *c == '/' && *at <= 155 && *at > 0 && *at + 1 < name.len())
        .map(|(at, _)| at)
        .find(|at| name.len() - at - 1 <= 100);
    match cut {
        Some(at) => Ok((&name[..at], &name[at + 1..])),
        None => bail!("name is too long for ustar: {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn tar_reads_back_what_was_put() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/{}", "d".repeat(80), "f".repeat(90));
        let mut tree = Tree::default();
        tree.file("bin/su", 0o4755, b"x")
            .owner("bin/su", 3, 4)
            .symlink("sh", "bin/su")
            .directory("tmp", 0o1777);
        tree.file(&long, 0o600, &[7; 1000]).hardlink("a", "bin/su");
        let archive = dir.path().join("a.tar");
        std::fs::write(&archive, tree.tar().unwrap()).unwrap();
        let list = Command::new("tar").arg("--numeric-owner").arg("-tvf").arg(&archive).output().unwrap();
        assert!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
        let text = String::from_utf8(list.stdout).unwrap();
        assert!(
            text.contains("-rwsr-xr-x 3/4")
                && text.contains("sh -> bin/su")
                && text.contains("a link to bin/su")
                && text.contains("drwxrwxrwt")
        );
        assert!(text.contains(&long), "{text}");
    }
}
