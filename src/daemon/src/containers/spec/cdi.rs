//! Devices by their CDI names: finds what the specs on this node say of them and gathers it as edits of a container.
//! Only the typed field of a request asks for devices; annotations never do.
//! (Container Device Interface, tags.cncf.io/container-device-interface, specification 1.0.)

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Error, devices::Device, read};

/// Bounds of a directory and of one spec.
const FILES: usize = 1024;
const FILE_LIMIT: u64 = 4 << 20;

/// What the devices change in a container.
#[derive(Debug, Default)]
pub struct Edits {
    /// `NAME=value`.
    pub env: Vec<String>,
    pub devices: Vec<Device>,
    /// Entries of `mounts`.
    pub mounts: Vec<Value>,
    /// Entries of `hooks`, by name.
    pub hooks: BTreeMap<String, Vec<Value>>,
    pub groups: Vec<u32>,
}

/// Gathers the edits of all named devices; what a spec says for any of its devices comes once, and first.
pub fn edits(names: &[String], directories: &[PathBuf]) -> Result<Edits, Error> {
    let mut edits = Edits::default();
    if names.is_empty() {
        return Ok(edits);
    }
    let specs = specs(directories);
    let mut begun = BTreeSet::new();
    for name in names {
        let (kind, device) = parse(name).ok_or_else(|| Error::CdiName(short(name)))?;
        let (index, spec, device) =
            find(&specs, kind, device).ok_or_else(|| Error::CdiMissing(short(name)))?;
        if begun.insert(index) {
            edits.add(&spec.container_edits).map_err(|why| Error::Cdi { name: short(name), why })?;
        }
        edits.add(&device.container_edits).map_err(|why| Error::Cdi { name: short(name), why })?;
    }
    Ok(edits)
}

/// `vendor.example/class=device`.
fn parse(name: &str) -> Option<(&str, &str)> {
    let (kind, device) = name.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    let word = |text: &str, others: &[u8]| {
        !text.is_empty()
            && text.len() <= 255
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
    };
    (word(vendor, b"._-") && word(class, b"_-.") && word(device, b"._:-")).then_some((kind, device))
}

fn short(text: &str) -> String {
    text.escape_debug().take(200).collect()
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    kind: String,
    #[serde(default)]
    devices: Vec<Entry>,
    #[serde(default)]
    container_edits: Wanted,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(default)]
    container_edits: Wanted,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Wanted {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    #[serde(rename = "additionalGids")]
    additional_gids: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: String,
    #[serde(default)]
    host_path: String,
    #[serde(default, rename = "type")]
    kind: String,
    major: Option<u32>,
    minor: Option<u32>,
    file_mode: Option<u32>,
    #[serde(default)]
    permissions: String,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default, rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: String,
    path: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<u32>,
}

/// The specs of a node, with the place of their directory: later directories win. One that cannot be read concerns
/// only those who ask for its devices.
fn specs(directories: &[PathBuf]) -> Vec<(usize, Spec)> {
    let mut specs = Vec::new();
    for (place, directory) in directories.iter().enumerate() {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().take(FILES).map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            match load(&path) {
                Ok(Some(spec)) => specs.push((place, spec)),
                Ok(None) => (),
                Err(e) => tracing::warn!(path = %path.display(), error = %e, "CDI spec is passed over"),
            }
        }
    }
    specs
}

fn load(path: &Path) -> io::Result<Option<Spec>> {
    let kind = path.extension().and_then(|kind| kind.to_str());
    if !matches!(kind, Some("json" | "yaml" | "yml")) {
        return Ok(None);
    }
    // Hooks of a spec run as root on the host: only root may have written it.
    let meta = fs::metadata(path)?;
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(io::Error::other("can be written by others than root"));
    }
    let bytes = read(path, FILE_LIMIT)?;
    let spec = match kind {
        Some("json") => serde_json::from_slice(&bytes).map_err(io::Error::other)?,
        _ => serde_saphyr::from_slice(&bytes).map_err(|e| io::Error::other(e.to_string()))?,
    };
    Ok(Some(spec))
}

fn find<'a>(specs: &'a [(usize, Spec)], kind: &str, device: &str) -> Option<(usize, &'a Spec, &'a Entry)> {
    let having = specs.iter().enumerate().filter(|(_, (_, spec))| spec.kind == kind);
    let all = having.filter_map(|(index, (place, spec))| {
        let entry = spec.devices.iter().find(|entry| entry.name == device)?;
        Some((*place, index, spec, entry))
    });
    all.max_by_key(|(place, ..)| *place).map(|(_, index, spec, entry)| (index, spec, entry))
}

impl Edits {
    fn add(&mut self, wanted: &Wanted) -> Result<(), String> {
        for entry in &wanted.env {
            match entry.find('=') {
                Some(at) if at > 0 && !entry.contains('\0') => self.env.push(entry.clone()),
                _ => return Err(format!("environment entry {entry:?} is malformed")),
            }
        }
        for node in &wanted.device_nodes {
            let device = node.look()?;
            self.devices.retain(|other| other.path != device.path);
            self.devices.push(device);
        }
        for mount in &wanted.mounts {
            if !mount.host_path.starts_with('/') || !mount.container_path.starts_with('/') {
                return Err(format!("mount at {:?}: both paths must be absolute", mount.container_path));
            }
            let mut options = mount.options.clone();
            if mount.kind.is_empty() || mount.kind == "bind" {
                if !options.iter().any(|option| option == "bind" || option == "rbind") {
                    options.push("rbind".into());
                }
            } else {
                return Err(format!(
                    "mount at {:?}: type {:?} is not offered",
                    mount.container_path, mount.kind
                ));
            }
            self.mounts
                .push(json!({"destination": mount.container_path, "source": mount.host_path, "type": "bind",
                "options": options}));
        }
        for hook in &wanted.hooks {
            const NAMES: [&str; 6] =
                ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
            if !NAMES.contains(&hook.hook_name.as_str()) || !hook.path.starts_with('/') {
                return Err(format!("hook {:?} is malformed", hook.hook_name));
            }
            let mut entry = json!({"path": hook.path, "args": hook.args, "env": hook.env});
            if let Some(timeout) = hook.timeout {
                entry["timeout"] = timeout.into();
            }
            self.hooks.entry(hook.hook_name.clone()).or_default().push(entry);
        }
        // Root's group would be more than a device is for.
        self.groups.extend(wanted.additional_gids.iter().filter(|gid| **gid != 0));
        Ok(())
    }
}

impl Node {
    /// What the spec leaves out, the host's node says.
    fn look(&self) -> Result<Device, String> {
        let host = if self.host_path.is_empty() { &self.path } else { &self.host_path };
        if !self.path.starts_with("/dev/") || self.path.split('/').any(|part| part == "..") {
            return Err(format!("device {:?} is not below /dev", self.path));
        }
        let meta = fs::metadata(host);
        let there = meta.as_ref().ok();
        let kind = match (self.kind.as_str(), there.map(fs::Metadata::file_type)) {
            ("c" | "u", _) => "c",
            ("b", _) => "b",
            ("", Some(kind)) if kind.is_char_device() => "c",
            ("", Some(kind)) if kind.is_block_device() => "b",
            ("", Some(_)) => return Err(format!("{host} is not a device")),
            ("", None) => return Err(format!("{host} is not there")),
            (other, _) => return Err(format!("device type {other:?} is not offered")),
        };
        let number = |given: Option<u32>, of: fn(u64) -> u32| given.or(there.map(|meta| of(meta.rdev())));
        let (Some(major), Some(minor)) =
            (number(self.major, |dev| libc::major(dev)), number(self.minor, |dev| libc::minor(dev)))
        else {
            return Err(format!("{host} is not there"));
        };
        let access = match self.permissions.as_str() {
            "" => "rwm",
            some if some.len() <= 3 && some.bytes().all(|b| b"rwm".contains(&b)) => some,
            other => return Err(format!("device permissions {other:?} are not some of rwm")),
        };
        Ok(Device {
            path: self.path.clone(),
            kind,
            major,
            minor,
            mode: self.file_mode.or(there.map(|meta| meta.mode())).unwrap_or(0o666) & 0o7777,
            uid: self.uid.or(there.map(MetadataExt::uid)).unwrap_or(0),
            gid: self.gid.or(there.map(MetadataExt::gid)).unwrap_or(0),
            access: access.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const YAML: &str = "cdiVersion: 0.6.0
kind: vendor.example/gpu
containerEdits:
  env: [ALL=1]
  hooks:
    - {hookName: createContainer, path: /usr/bin/hook, args: [hook, x], timeout: 5}
devices:
  - name: \"0\"
    containerEdits:
      env: [ONE=0]
      deviceNodes:
        - {path: /dev/gpu0, hostPath: /dev/null, permissions: rw}
      mounts:
        - {hostPath: /usr/lib/x, containerPath: /usr/lib/x, options: [ro, nosuid]}
      additionalGids: [0, 44]
  - name: broken
    containerEdits:
      deviceNodes:
        - {path: /etc/x, hostPath: /dev/null}
";

    fn here(files: &[(&str, &str)]) -> tempfile::TempDir {
        let here = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::create_dir_all(here.path().join(name).parent().unwrap()).unwrap();
            fs::write(here.path().join(name), text).unwrap();
            fs::set_permissions(here.path().join(name), fs::Permissions::from_mode(0o644)).unwrap();
        }
        here
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_device_brings_what_its_spec_says() {
        let here = here(&[("gpu.yaml", YAML), ("note.txt", "x"), ("bad.json", "{")]);
        let both = names(&["vendor.example/gpu=0", "vendor.example/gpu=0"]);
        let edits = edits(&both, &[here.path().to_owned()]).unwrap();
        assert_eq!(edits.env, ["ALL=1", "ONE=0", "ONE=0"]);
        assert_eq!(edits.devices.len(), 1);
        assert_eq!(
            (edits.devices[0].major, edits.devices[0].minor, edits.devices[0].access.as_str()),
            (1, 3, "rw")
        );
        assert_eq!(edits.mounts[0]["options"], json!(["ro", "nosuid", "rbind"]));
        assert_eq!(edits.hooks["createContainer"][0]["timeout"], 5);
        assert_eq!(edits.groups, [44, 44]);
    }

    #[test]
    fn later_directories_win() {
        let json = r#"{"cdiVersion":"0.6.0","kind":"vendor.example/gpu","devices":[
            {"name":"0","containerEdits":{"env":["FROM=run"]}}]}"#;
        let here = here(&[("etc/gpu.yaml", YAML), ("run/gpu.json", json)]);
        let dirs = [here.path().join("etc"), here.path().join("run"), here.path().join("absent")];
        assert_eq!(edits(&names(&["vendor.example/gpu=0"]), &dirs).unwrap().env, ["FROM=run"]);
    }

    #[test]
    fn what_is_not_there_or_makes_no_sense_is_an_error() {
        let here = here(&[("gpu.yaml", YAML)]);
        for name in [
            "vendor.example/gpu=1",
            "vendor.example/nic=0",
            "vendor.example/gpu",
            "gpu=0",
            "/=",
            "a/b=c d",
            "",
            "vendor.example/gpu=broken",
        ] {
            assert!(edits(&names(&[name]), &[here.path().to_owned()]).is_err(), "{name}");
        }
        assert!(edits(&[], &[here.path().to_owned()]).unwrap().devices.is_empty());
    }

    #[test]
    fn a_spec_that_others_can_write_is_passed_over() {
        let here = here(&[("gpu.yaml", YAML)]);
        fs::set_permissions(here.path().join("gpu.yaml"), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(edits(&names(&["vendor.example/gpu=0"]), &[here.path().to_owned()]).is_err());
    }
}
