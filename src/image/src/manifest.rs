//! Manifests, indexes and the caps on them (S36, S38). Whoever calls has compared the body's hash with the wanted
//! digest before: nothing is parsed that was not asked for. OCI and Docker schema 2 differ in media types only.

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::platform::{Host, Platform};

/// A manifest, an index, a configuration: none is longer.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// overlayfs takes 500 lower directories.
pub(crate) const MAX_LAYERS: usize = 500;
/// An index in an index in an index.
pub(crate) const MAX_DEPTH: usize = 3;
/// Entries over all indexes of one pull.
pub(crate) const MAX_DESCRIPTORS: usize = 10_000;
/// A layer as it is sent. Larger ones exist in no registry that we know of.
pub(crate) const MAX_BLOB: u64 = 1 << 40;

/// What we ask registries for, in order of preference.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// A reference to content, by digest.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// One image: a configuration and its layers, lowest first.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// What a registry may answer to a reference.
#[derive(Debug, Clone)]
pub(crate) enum Document {
    Manifest(Box<Manifest>),
    Index(Vec<Descriptor>),
}

/// The union of all shapes, so that a document which is two things at once is seen as such.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Parses a manifest or index, which whoever read it has bounded. `content_type` is the registry's header, or the descriptor's media type.
pub(crate) fn parse(what: &str, body: &[u8], content_type: Option<&str>) -> Result<Document> {
    let fail = |why: String| Error::Manifest { what: what.to_owned(), why };
    let raw: Raw = serde_json::from_slice(body).map_err(|error| fail(format!("not a manifest: {error}")))?;
    if raw.schema_version == 1 || raw.fs_layers.is_some() {
        return Err(fail(
            "schema 1 manifests are not supported; push the image again with a current client".into(),
        ));
    }
    if raw.schema_version != 2 {
        return Err(fail(format!("schema version {} is unknown", raw.schema_version)));
    }
    // Docker manifests must carry mediaType, OCI ones may; what they carry must agree with how they came.
    let sent = content_type.map(essence).filter(|sent| kind(sent).is_some());
    let own = raw.media_type.as_deref();
    if let (Some(sent), Some(own)) = (&sent, own)
        && sent != own
    {
        return Err(fail(format!("it says it is {own:?} but was sent as {sent:?}")));
    }
    let declared = match own.or(sent.as_deref()) {
        Some(media_type) => Some(
            kind(media_type).ok_or_else(|| fail(format!("media type {media_type:?} is not supported")))?,
        ),
        None => None,
    };
    match (raw.config, raw.layers, raw.manifests) {
        (Some(config), Some(layers), None) if declared != Some(Kind::Index) => {
            if layers.len() > MAX_LAYERS {
                return Err(Error::TooLarge {
                    what: what.to_owned(),
                    why: format!("{} layers, at most {MAX_LAYERS} are taken", layers.len()),
                });
            }
            if let Some(layer) = layers.iter().find(|layer| layer.size > MAX_BLOB) {
                return Err(Error::TooLarge {
                    what: layer.digest.to_string(),
                    why: format!("{} bytes are announced", layer.size),
                });
            }
            if config.size > MAX_DOCUMENT {
                return Err(too_long(&config.digest.to_string()));
            }
            Ok(Document::Manifest(Box::new(Manifest { config, layers })))
        }
        (None, None, Some(manifests)) if declared != Some(Kind::Manifest) => {
            if manifests.len() > MAX_DESCRIPTORS {
                return Err(Error::TooLarge {
                    what: what.to_owned(),
                    why: format!("{} entries, at most {MAX_DESCRIPTORS} are taken", manifests.len()),
                });
            }
            Ok(Document::Index(manifests))
        }
        (_, _, Some(_)) => Err(fail("it is both an index and a manifest".into())),
        _ => Err(fail("it is neither an image manifest nor an index".into())),
    }
}

/// The entries of an index that may be tried, best first: those for this platform, then nested indexes, then
/// entries that name no platform at all.
pub(crate) fn candidates<'a>(entries: &'a [Descriptor], host: &Host) -> Vec<&'a Descriptor> {
    let mut ranked: Vec<(u16, &Descriptor)> = entries
        .iter()
        .filter_map(|entry| match &entry.platform {
            Some(platform) => host.suits(platform).map(|rank| (0x200 + u16::from(rank), entry)),
            None if kind(&entry.media_type) == Some(Kind::Index) => Some((0x100, entry)),
            None if kind(&entry.media_type) == Some(Kind::Manifest) => Some((0, entry)),
            None => None,
        })
        .collect();
    // Stable: of equals the first in the index wins.
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    ranked.into_iter().map(|(_, entry)| entry).collect()
}

/// Parses an image configuration and compares it with its manifest.
pub(crate) fn config(what: &Digest, body: &[u8], layers: usize) -> Result<crate::config::Document> {
    let fail = |why: String| Error::Manifest { what: what.to_string(), why };
    let document: crate::config::Document =
        serde_json::from_slice(body).map_err(|error| fail(format!("not an image configuration: {error}")))?;
    if document.rootfs.diff_ids.len() != layers {
        return Err(fail(format!(
            "the manifest has {layers} layers, the configuration {}",
            document.rootfs.diff_ids.len()
        )));
    }
    Ok(document)
}

pub(crate) fn too_long(what: &str) -> Error {
    Error::TooLarge { what: what.to_owned(), why: format!("documents end at {MAX_DOCUMENT} bytes") }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Manifest,
    Index,
}

fn kind(media_type: &str) -> Option<Kind> {
    match media_type {
        "application/vnd.oci.image.manifest.v1+json"
        | "application/vnd.docker.distribution.manifest.v2+json" => Some(Kind::Manifest),
        "application/vnd.oci.image.index.v1+json"
        | "application/vnd.docker.distribution.manifest.list.v2+json" => Some(Kind::Index),
        _ => None,
    }
}

/// A content type without its parameters.
fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";

    fn manifest(layers: usize) -> String {
        let layer = format!(r#"{{"mediaType":"x","digest":"{D}","size":1}}"#);
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{D}","size":2}},"layers":[{}]}}"#,
            vec![layer; layers].join(",")
        )
    }

    #[test]
    fn manifests_and_indexes_are_told_apart() {
        assert!(
            matches!(parse("x", manifest(2).as_bytes(), Some(OCI)), Ok(Document::Manifest(m)) if m.layers.len() == 2)
        );
        let index =
            format!(r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{OCI}","digest":"{D}","size":1}}]}}"#);
        assert!(matches!(parse("x", index.as_bytes(), Some(INDEX)), Ok(Document::Index(i)) if i.len() == 1));
        assert!(parse("x", index.as_bytes(), None).is_ok());
    }

    #[test]
    fn s36_documents_without_bound_are_refused() {
        assert!(parse("x", manifest(500).as_bytes(), None).is_ok());
        assert!(matches!(parse("x", manifest(501).as_bytes(), None), Err(Error::TooLarge { .. })));
        let entry = format!(r#"{{"digest":"{D}","size":1}}"#);
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, vec![entry; 10_001].join(","));
        assert!(matches!(parse("x", index.as_bytes(), None), Err(Error::TooLarge { .. })));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse("x", format!(r#"{{"schemaVersion":2,"x":{deep}}}"#).as_bytes(), None).is_err());
    }

    #[test]
    fn s38_a_document_is_one_thing_only() {
        let both = manifest(1).replace(r#""layers""#, r#""manifests":[],"layers""#);
        assert!(parse("x", both.as_bytes(), None).is_err());
        let own = manifest(1).replacen('{', &format!(r#"{{"mediaType":"{OCI}","#), 1);
        assert!(parse("x", own.as_bytes(), Some(OCI)).is_ok());
        assert!(parse("x", own.as_bytes(), Some(INDEX)).is_err());
        assert!(parse("x", manifest(1).as_bytes(), Some(INDEX)).is_err());
        // A registry that sends a generic type says nothing about what it is.
        assert!(parse("x", own.as_bytes(), Some("application/json; charset=utf-8")).is_ok());
    }

    #[test]
    fn s37_malformed_digests_are_refused_wherever_they_stand() {
        for bad in ["", "sha256:", "sha256:../../x", "md5:d41d8cd98f00b204e9800998ecf8427e"] {
            assert!(parse("x", manifest(1).replacen(D, bad, 1).as_bytes(), None).is_err());
            assert!(
                config(
                    &D.parse().unwrap(),
                    format!(r#"{{"rootfs":{{"diff_ids":["{bad}"]}}}}"#).as_bytes(),
                    1
                )
                .is_err()
            );
        }
    }

    #[test]
    fn schema_1_is_named_in_the_refusal() {
        let error = parse("x", br#"{"schemaVersion":1,"fsLayers":[]}"#, None).unwrap_err();
        assert!(error.to_string().contains("schema 1"));
    }

    #[test]
    fn a_configuration_may_write_null_and_must_count_its_layers() {
        let id = D.parse().unwrap();
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Env":null,"User":null,"Cmd":["a"],"Volumes":{{"/v":{{}}}},
            "ExposedPorts":null,"Labels":{{"a":"b"}},"Healthcheck":{{}}}},"rootfs":{{"type":"layers","diff_ids":["{D}"]}}}}"#
        );
        let document = config(&id, text.as_bytes(), 1).unwrap();
        assert_eq!(document.config.cmd, ["a"]);
        assert!(document.config.volumes.contains("/v"));
        assert!(config(&id, text.as_bytes(), 2).is_err());
        assert!(config(&id, br#"{"config":null,"rootfs":{"diff_ids":null}}"#, 0).is_ok());
    }

    #[test]
    fn the_platform_comes_before_the_nested_index_and_the_nameless() {
        let entry = |media: &str, platform: &str| {
            format!(r#"{{"mediaType":"{media}","digest":"{D}","size":1{platform}}}"#)
        };
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let own = format!(r#","platform":{{"os":"linux","architecture":"{arch}"}}"#);
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
            entry(OCI, ""),
            entry(INDEX, ""),
            entry(OCI, r#","platform":{"os":"windows","architecture":"amd64"}"#),
            entry(OCI, &own),
        );
        let Document::Index(entries) = parse("x", index.as_bytes(), None).unwrap() else { panic!() };
        let picked = candidates(&entries, &Host::detect());
        assert_eq!(picked.len(), 3);
        assert!(picked[0].platform.is_some());
        assert_eq!(picked[1].media_type, INDEX);
    }

    proptest! {
        #[test]
        fn no_document_panics(body in proptest::collection::vec(any::<u8>(), 0..300), text in "[{}\\[\\]\",:a-z0-9]{0,200}") {
            let _ = parse("x", &body, None);
            let _ = parse("x", text.as_bytes(), Some(OCI));
            let _ = config(&D.parse().unwrap(), text.as_bytes(), 0);
        }
    }
}
