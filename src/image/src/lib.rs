//! A reference becomes directories: resolve, download, verify, unpack, stack, snapshot.
//!
//! `reference → registry → pull (verify, decompress, unpack, hash) → layers → snapshot`. Each layer is unpacked by a
//! confined child of ours ([`unpack_main`]) into `<root>/layers/<diff id>`, once for all images that share it, and
//! in any order: overlayfs stacks them. What a container writes goes to `<root>/snapshots/<key>`. Mounting is the
//! business of whoever asks; this library mounts nothing on the host and knows neither pods nor CRI.

mod auth;
pub mod config;
mod digest;
mod error;
mod flight;
#[cfg(fuzzing)]
pub mod fuzz;
mod images;
mod layers;
mod manifest;
mod platform;
mod pull;
mod reference;
mod registry;
mod settings;
mod snapshot;
mod store;
mod tree;
pub mod unpack;

pub use auth::Auth;
pub use digest::Digest;
pub use error::Error;
pub use images::{Image, Images, Usage};
pub use reference::Reference;
pub use settings::{Config, Proxy};
pub use snapshot::Snapshot;
pub use unpack::Unpacker;

/// The body of the hidden unpack helper, for a `main` that was started with the arguments of [`Config::unpacker`]:
/// what follows the word `unpack` is the helper's.
pub fn unpack_main() -> ! {
    let arguments = std::env::args_os().skip_while(|argument| argument != "unpack").skip(1);
    std::process::exit(unpack::main(arguments))
}
