//! Mounts that are overlays: image volumes, and the volumes that an image declares.

use std::fs;
use std::path::{Path, PathBuf};

use container::Rootfs;
use container::rootfs;
use container::spec::{IdMapping, Mount, Namespace, NamespaceKind};

use crate::lab::{Container, Lab};

/// Two layers: both have `dir`, each a file of its own in it.
fn layers(lab: &Lab) -> [PathBuf; 2] {
    ["upper", "lower"].map(|name| {
        let layer = lab.directory();
        fs::create_dir(layer.join("dir")).unwrap();
        fs::write(layer.join("dir").join(name), name).unwrap();
        layer
    })
}

fn overlay(options: Vec<String>) -> Mount {
    Mount {
        destination: "/volume".into(),
        kind: "overlay".into(),
        source: "overlay".into(),
        options,
        ..Mount::default()
    }
}

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

pub(crate) fn the_layers_of_an_image_are_a_volume_that_nobody_writes(lab: &Lab) {
    let [one, two] = layers(lab);
    let mount = overlay(vec![format!("lowerdir={}:{}", shown(&one), shown(&two)), "ro".into()]);
    let script = "cat /volume/dir/*; touch /volume/dir/x 2>&1 | grep -c Read-only";
    assert_eq!(lab.sh(script).with(|spec| spec.mounts.push(mount)).says(), "lowerupper1");
}

pub(crate) fn a_declared_volume_is_written_beside_the_image(lab: &Lab) {
    let [one, two] = layers(lab);
    let own = lab.directory();
    let (upper, work) = (own.join("fs"), own.join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let lower = format!("lowerdir={}:{}", shown(&one), shown(&two));
    let mount = overlay(vec![
        lower,
        format!("upperdir={}", shown(&upper)),
        format!("workdir={}", shown(&work)),
        "rw".into(),
    ]);
    let script = "cat /volume/dir/*; echo more > /volume/dir/new";
    assert_eq!(lab.sh(script).with(|spec| spec.mounts.push(mount)).says(), "lowerupper");
    assert_eq!(fs::read_to_string(upper.join("dir/new")).unwrap(), "more\n");
    assert!(!one.join("dir/new").exists());
}

pub(crate) fn more_layers_than_fit_one_option_are_a_volume_too(lab: &Lab) {
    let layers: Vec<String> = (0..20)
        .map(|number| {
            let layer = lab.directory();
            fs::write(layer.join(format!("f{number}")), "").unwrap();
            layer.display().to_string()
        })
        .collect();
    let mount = overlay(vec![format!("lowerdir={}", layers.join(":")), "ro".into()]);
    assert_eq!(lab.sh("ls /volume | wc -l").with(|spec| spec.mounts.push(mount)).says(), "20");
}

pub(crate) fn in_a_user_namespace_an_image_volume_belongs_to_its_root(lab: &Lab) {
    let [one, two] = layers(lab);
    let lower = format!("lowerdir={}:{}", shown(&one), shown(&two));
    let mount = overlay(vec![lower, "ro".into(), "idmap".into()]);
    let mut container = in_user_namespace(lab.sh("stat -c %u:%g /volume/dir/upper /bin/busybox"));
    container.spec.mounts.push(mount);
    assert_eq!(container.says(), "0:0\n0:0");
}

pub(crate) fn a_single_layer_is_a_volume_too(lab: &Lab) {
    let [layer, _] = layers(lab);
    let mount = overlay(vec![format!("lowerdir={}", shown(&layer)), "nosuid".into()]);
    let script = "cat /volume/dir/upper; touch /volume/dir/x 2>&1 | grep -c Read-only";
    assert_eq!(lab.sh(script).with(|spec| spec.mounts.push(mount)).says(), "upper1");
}

/// The same layers twice, which can be covered only once.
pub(crate) fn in_a_user_namespace_a_container_mounts_its_own_image(lab: &Lab) {
    let mount = overlay(vec![format!("lowerdir={}", shown(&lab.image())), "ro".into(), "idmap".into()]);
    let mut container = in_user_namespace(lab.sh("stat -c %u:%g /volume/bin/busybox /bin/busybox"));
    container.spec.mounts.push(mount);
    assert_eq!(container.says(), "0:0\n0:0");
}

fn in_user_namespace(mut container: Container<'_>) -> Container<'_> {
    let map = vec![IdMapping { container_id: 0, host_id: 100_000, size: 65536 }];
    container.spec.linux.namespaces.push(Namespace { kind: NamespaceKind::User, path: String::new() });
    container.spec.linux.uid_mappings = map.clone();
    container.spec.linux.gid_mappings = map;
    if let Rootfs::Mounts(mounts) = &mut container.rootfs {
        mounts.iter_mut().for_each(|mount: &mut rootfs::Mount| mount.options.push("idmap".into()));
    }
    container
}
