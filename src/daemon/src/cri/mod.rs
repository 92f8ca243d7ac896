//! The door. Checks nothing but what gRPC is about, calls one function per verb and translates its error: the only
//! place that names a gRPC code, and the only one that logs a failed call.

use std::{future::Future, panic::AssertUnwindSafe, time::Instant};

use futures_util::FutureExt;
use tokio_stream::Stream;
use tonic::{Code, Response, Status};
use tracing::{debug, error, info};

use crate::{
    containers::spec,
    error::{Error, Fault, Result},
    shim,
};

pub mod image;
pub mod info;
pub mod runtime;

/// What a unary call answers.
pub type Answer<T> = Result<Response<T>, Status>;

/// Items of a list in pieces of so many: a message of them stays far below what clients take.
const PIECE: usize = 64;

/// Runs one call: a panic in it is Internal, a failure is logged with the name of the call, once.
pub async fn call<T>(name: &'static str, id: &str, work: impl Future<Output = Result<T>>) -> Answer<T> {
    let begun = Instant::now();
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(Ok(answer)) => {
            debug!(call = name, id, took = ?begun.elapsed(), "answered");
            Ok(Response::new(answer))
        }
        Ok(Err(fault)) => {
            let code = code(&fault);
            match code {
                Code::NotFound => debug!(call = name, id, error = %fault, "not found"),
                _ => {
                    info!(call = name, id, error = %fault, code = ?code, took = ?begun.elapsed(), "call failed")
                }
            }
            Err(Status::new(code, text(&fault)))
        }
        Err(_) => {
            error!(call = name, id, "call panicked");
            Err(Status::internal(format!("{name} ended by an internal error")))
        }
    }
}

/// As [`call`], in a task of its own: what was begun is carried on when the client goes away.
pub async fn detached<T: Send + 'static>(
    name: &'static str,
    id: &str,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Answer<T> {
    call(
        name,
        id,
        async move { tokio::spawn(work).await.unwrap_or_else(|_| Err(Fault::Panicked(name).into())) },
    )
    .await
}

/// A list in pieces, each with at least one item.
pub fn pieces<T: Send + 'static, M: Send + 'static>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> impl Stream<Item = Result<M, Status>> + Send + 'static {
    let mut items = items.into_iter();
    tokio_stream::iter(std::iter::from_fn(move || {
        let piece: Vec<T> = items.by_ref().take(PIECE).collect();
        (!piece.is_empty()).then(|| Ok(message(piece)))
    }))
}

fn code(error: &Error) -> Code {
    match **error {
        Fault::NoPod(_) | Fault::NoContainer(_) | Fault::NoImage(_) => Code::NotFound,
        Fault::Ambiguous(_) | Fault::Invalid(_) => Code::InvalidArgument,
        Fault::PodNotReady(_) | Fault::ContainerState(..) => Code::FailedPrecondition,
        Fault::Full(_) => Code::ResourceExhausted,
        Fault::Taken(..) => Code::AlreadyExists,
        Fault::Unsupported(_) => Code::Unimplemented,
        Fault::Deadline { .. } => Code::DeadlineExceeded,
        Fault::Panicked(_) => Code::Internal,
        // What the host or the operator's configuration lacks is not the client's fault.
        Fault::Spec(spec::Error::Look { .. } | spec::Error::Ulimit(_)) => Code::Unknown,
        Fault::Spec(_) => Code::InvalidArgument,
        Fault::Shim { source: shim::Error::Deadline, .. } => Code::DeadlineExceeded,
        Fault::Shim { source: shim::Error::Invalid(_), .. } => Code::InvalidArgument,
        Fault::Shim { source: shim::Error::State(_), .. } => Code::FailedPrecondition,
        Fault::Image { ref source, .. } => image::code(source),
        Fault::Unkillable(_)
        | Fault::Slow(_)
        | Fault::Io { .. }
        | Fault::Shim { .. }
        | Fault::Network { .. }
        | Fault::Start { .. }
        | Fault::Store(_) => Code::Unknown,
    }
}

/// Longest text of a failure. It travels in a trailer, and clients break off when their bound for headers is passed;
/// an id or a path that a client sent may be of any length.
const TEXT: usize = 2048;

/// What the client reads. The kubelet tells some failures apart by how the text begins.
fn text(error: &Error) -> String {
    let mut text = match &**error {
        Fault::Image { source, .. } => image::text(source, error),
        _ => error.to_string(),
    };
    if text.len() > TEXT {
        text.truncate(text.floor_char_boundary(TEXT));
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn every_item_comes_once_and_no_piece_is_empty() {
        for count in [0, 1, PIECE, PIECE + 1, 3 * PIECE] {
            let pieces: Vec<Vec<usize>> =
                pieces((0..count).collect(), |piece| piece).map(Result::unwrap).collect().await;
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            assert_eq!(pieces.concat(), (0..count).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error() {
        let answer: Answer<()> = call("Test", "", async { panic!("boom") }).await;
        assert_eq!(answer.unwrap_err().code(), Code::Internal);
    }
}
