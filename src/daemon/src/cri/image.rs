//! ImageService: one function per call. Translates between CRI and the image room; knows nothing of registries.

use std::{collections::HashMap, sync::Arc};

use cri_api::v1::{self, image_service_server::ImageService};
use futures_util::{StreamExt, stream::BoxStream};
use serde_json::{Value, json};
use tonic::{Code, Request, Response, Status, async_trait};

use super::{Answer, call, pieces};
use crate::{
    containers::spec::user,
    daemon::{Daemon, now},
    error::{Fault, Result},
};

/// The service.
#[derive(Clone)]
pub struct Images(pub Arc<Daemon>);

#[async_trait]
impl ImageService for Images {
    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let images = self.list(request.into_inner().filter);
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    type StreamImagesStream = BoxStream<'static, Result<v1::StreamImagesResponse, Status>>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.list(request.into_inner().filter);
        Ok(Response::new(pieces(images, |images| v1::StreamImagesResponse { images }).boxed()))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Answer<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        // An absent image is an empty answer: the kubelet takes an error for a failed look.
        let Some(image) = self.0.images.find(&name) else {
            return Ok(Response::new(v1::ImageStatusResponse::default()));
        };
        let info = if request.verbose { info(&image) } else { HashMap::new() };
        Ok(Response::new(v1::ImageStatusResponse { image: Some(of(&image)), info }))
    }

    /// Has no deadline: ends when the client goes away, by dropping the work.
    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        let request = request.into_inner();
        let wanted = request.image.unwrap_or_default();
        let name = wanted.image.clone();
        call("PullImage", &name, async {
            if wanted.image.is_empty() {
                return Err(Fault::invalid("image is not named"));
            }
            if self.0.config().handler(&wanted.runtime_handler).is_none() {
                return Err(Fault::invalid(format!(
                    "runtime handler {:?} is not known",
                    wanted.runtime_handler
                )));
            }
            let auth = auth(request.auth.as_ref()).map_err(Fault::image("read credentials"))?;
            let image = self.0.images.pull(&wanted.image, auth).await.map_err(Fault::image("pull image"))?;
            Ok(v1::PullImageResponse { image_ref: image.id.clone() })
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        call("RemoveImage", &name.clone(), async {
            if name.is_empty() {
                return Err(Fault::invalid("image is not named"));
            }
            // Whether there was one makes no difference to who wants none.
            self.0.images.remove(&name).await.map_err(Fault::image("remove image"))?;
            Ok(v1::RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        call("ImageFsInfo", "", async {
            let usage = self.0.images.usage().await.map_err(Fault::image("sum up images"))?;
            let usage = v1::FilesystemUsage {
                timestamp: now(),
                fs_id: Some(v1::FilesystemIdentifier { mountpoint: usage.mountpoint.display().to_string() }),
                // Absent figures would panic a kubelet.
                used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
                inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
            };
            // Layers and what containers write are on one file system.
            Ok(v1::ImageFsInfoResponse {
                image_filesystems: vec![usage.clone()],
                container_filesystems: vec![usage],
            })
        })
        .await
    }
}

impl Images {
    fn list(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let wanted = filter.and_then(|filter| filter.image).unwrap_or_default().image;
        match wanted.as_str() {
            "" => self.0.images.list().iter().map(|image| of(image)).collect(),
            name => self.0.images.find(name).iter().map(|image| of(image)).collect(),
        }
    }
}

/// An image as clients see it.
fn of(image: &image::Image) -> v1::Image {
    let (uid, username) = user::of_image(&image.config.user);
    v1::Image {
        id: image.id.clone(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid: uid.map(|value| v1::Int64Value { value }),
        username,
        spec: Some(v1::ImageSpec { image: image.id.clone(), ..Default::default() }),
        pinned: image.pinned,
    }
}

/// The image's own configuration, in the shape that operators know from containerd.
fn info(image: &image::Image) -> HashMap<String, String> {
    let spec: Value = serde_json::from_slice(&image.raw_config).unwrap_or(Value::Null);
    let layers: Vec<String> = image.diff_ids.iter().map(ToString::to_string).collect();
    let one = json!({"imageSpec": spec, "diffIDs": layers, "pinned": image.pinned});
    HashMap::from([("info".to_owned(), one.to_string())])
}

/// Every form that CRI has for credentials; none when all of them are empty.
fn auth(auth: Option<&v1::AuthConfig>) -> Result<Option<image::Auth>, image::Error> {
    let Some(auth) = auth else { return Ok(None) };
    image::Auth::from_parts(
        &auth.username,
        &auth.password,
        &auth.auth,
        &auth.server_address,
        &auth.identity_token,
        &auth.registry_token,
    )
}

/// What clients are told of a failure of the image room.
pub fn code(error: &image::Error) -> Code {
    use image::Error::*;
    match error {
        InvalidReference { .. } | InvalidDigest(_) | InvalidArgument(_) => Code::InvalidArgument,
        NotFound(_) | Platform { .. } => Code::NotFound,
        Unauthorized { .. } => Code::PermissionDenied,
        Exhausted(_) | TooLarge { .. } => Code::ResourceExhausted,
        Cancelled => Code::Cancelled,
        Digest { .. } | Manifest { .. } | Refused { .. } => Code::FailedPrecondition,
        // The kubelet looks for this by a prefix of the text, and only where the code is Unknown.
        RegistryUnavailable { .. } => Code::Unknown,
        Registry { .. } | Unpack { .. } | Config { .. } | Store(_) | Io { .. } => Code::Unknown,
    }
}

/// The text that goes with it.
pub fn text(error: &image::Error, fault: &Fault) -> String {
    match error {
        image::Error::RegistryUnavailable { .. } => format!("RegistryUnavailable: {fault}"),
        _ => fault.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_registry_is_told_the_way_kubelets_look_for_it() {
        let source = image::Error::RegistryUnavailable { host: "r.example".into(), why: "refused".into() };
        let fault = Fault::Image { act: "pull image", source: source.clone() };
        assert_eq!(code(&source), Code::Unknown);
        assert!(text(&source, &fault).starts_with("RegistryUnavailable"));
    }

    #[test]
    fn failures_have_the_codes_that_clients_tell_apart() {
        for (error, expected) in [
            (image::Error::InvalidReference { reference: "a b".into(), why: "blank" }, Code::InvalidArgument),
            (image::Error::NotFound("x".into()), Code::NotFound),
            (image::Error::Cancelled, Code::Cancelled),
            (image::Error::Exhausted("x".into()), Code::ResourceExhausted),
            (
                image::Error::Unauthorized { host: "h".into(), what: "x".into(), why: "no".into() },
                Code::PermissionDenied,
            ),
        ] {
            assert_eq!(code(&error), expected, "{error}");
        }
    }

    #[test]
    fn credentials_of_every_form_are_taken_and_broken_ones_refused() {
        let full = |change: fn(&mut v1::AuthConfig)| {
            let mut config = v1::AuthConfig::default();
            change(&mut config);
            auth(Some(&config))
        };
        assert!(auth(None).unwrap().is_none());
        assert!(full(|_| ()).unwrap().is_none());
        assert!(full(|auth| auth.username = "u".into()).unwrap().is_some());
        assert!(full(|auth| auth.identity_token = "t".into()).unwrap().is_some());
        assert!(full(|auth| auth.registry_token = "t".into()).unwrap().is_some());
        assert!(full(|auth| auth.auth = "dTpw".into()).unwrap().is_some());
        assert!(full(|auth| auth.auth = "not base64 !".into()).is_err());
    }
}
