//! Streaming for exec, attach and port-forward: HTTP in, byte streams out. Speaks SPDY/3.1 and WebSocket as every
//! client of the ecosystem does; what a stream is connected to is left to the caller ([`Backend`]).
//!
//! ```text
//! request → token (URL) ┄ client ┄▶ server ─┬─ spdy ──────┬─ remote ──▶ Backend::exec, attach
//!                                           ├─ websocket ─┘
//!                                           └─ forward (SPDY, WebSocket, SPDY in WebSocket) ──▶ Backend::connect
//! ```
//! A slow or stuck client is bounded in memory and holds up nobody but itself.

mod copy;
mod forward;
#[cfg(fuzzing)]
pub mod fuzz;
mod idle;
mod negotiate;
mod remote;
mod server;
pub mod spdy;
mod status;
pub mod tls;
mod token;
mod websocket;

use std::{future::Future, io, pin::Pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};

pub use copy::copy;
pub use server::Server;
pub use token::Full;

/// Bytes from the client.
pub type Reader = Pin<Box<dyn AsyncRead + Send>>;
/// Bytes to the client.
pub type Writer = Pin<Box<dyn AsyncWrite + Send>>;

/// What streams are connected to.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command and answers with its exit code, when all its output was written. The client's stdin may still be
    /// open then. An error is text for the client.
    fn exec(&self, request: Exec, streams: Streams) -> impl Future<Output = Result<i32, String>> + Send;

    /// Connects to the first process of a container until it ends or the client leaves.
    fn attach(&self, request: Attach, streams: Streams) -> impl Future<Output = Result<(), String>> + Send;

    /// A connection to a port on the pod's own localhost.
    fn connect(&self, pod: &str, port: u16) -> impl Future<Output = io::Result<(Reader, Writer)>> + Send;
}

/// A command in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    /// Id of the container.
    pub container: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Which streams there are.
    pub streams: Wanted,
}

/// A look at a container's first process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Id of the container.
    pub container: String,
    /// Which streams there are.
    pub streams: Wanted,
}

/// Which streams a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A terminal: output and errors are one stream, and sizes may come.
    pub tty: bool,
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Errors.
    pub stderr: bool,
}

/// The streams of one exec or attach, as far as they were asked for.
pub struct Streams {
    /// Ends where the client closed it.
    pub stdin: Option<Reader>,
    /// Output.
    pub stdout: Option<Writer>,
    /// Errors.
    pub stderr: Option<Writer>,
    /// Sizes of the client's terminal, the newest few; ends when the client leaves.
    pub resize: mpsc::Receiver<Size>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

/// Bounds in time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A connection on which nothing moves for so long is closed.
    pub idle: Duration,
    /// Time for a client to open the streams it asked for.
    pub creation: Duration,
    /// Time for a client to come with its token.
    pub token: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            idle: Duration::from_secs(4 * 3600),
            creation: Duration::from_secs(30),
            token: Duration::from_secs(60),
        }
    }
}
