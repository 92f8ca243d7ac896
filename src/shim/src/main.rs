//! containerd-shim-crisp-v1: one per pod, the parent of its processes. Takes a pod's containers from clone3 to
//! the record of their exit, and writes their logs. Knows no images, no registries, no HTTP and no CRI.
//!
//! One thread, because a child that is cloned without exec would inherit whatever lock another thread holds:
//! so no `spawn_blocking`, no `tokio::fs`, no `tokio::process`. A test reads `Threads: 1`.

mod serve;
mod service;

mod pod;

mod attach;
mod container;
mod exec;
mod log;
mod stream;

mod events;
mod reap;
mod record;

mod containerd;

mod error;
mod kernel;

use std::{
    io::Write,
    process::ExitCode,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use error::{Act, Error};
use rustix::fs::Mode;

const USAGE: &str = "\
usage: containerd-shim-crisp-v1 [-namespace NAME] [-id ID] [-bundle DIRECTORY] ACTION
  start   start a shim for the bundle in the current directory and print where it listens
  delete  clean up after a shim that is gone
  serve   serve a pod on the listening socket at descriptor 3
  -info   print what this runtime is
  -v      print the version
";

/// The command line. Flags as Go's package writes them, since containerd is the caller.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    id: String,
    namespace: String,
    bundle: String,
    /// containerd's own socket; tells the shims of two containerds apart.
    address: String,
    /// Where events go.
    events: String,
    debug: bool,
    info: bool,
    version: bool,
    action: String,
}

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Result<Arguments, Error> {
        let mut arguments = Arguments::default();
        let mut words = words;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                arguments.action = word;
                break;
            };
            let (flag, value) = match flag.split_once('=') {
                Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            let switch = match flag.as_str() {
                "debug" => Some(&mut arguments.debug),
                "info" => Some(&mut arguments.info),
                "v" | "version" => Some(&mut arguments.version),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = value.is_none_or(|value| value == "true");
                continue;
            }
            let value = value.or_else(|| words.next());
            let value = value.ok_or_else(|| Error::Invalid(format!("flag -{flag} needs a value")))?;
            match flag.as_str() {
                "id" => arguments.id = value,
                "namespace" => arguments.namespace = value,
                "bundle" => arguments.bundle = value,
                "address" => arguments.address = value,
                "events" => arguments.events = value,
                // What containerd passes and we have no use for.
                _ => {}
            }
        }
        Ok(arguments)
    }
}

fn main() -> ExitCode {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let arguments = Arguments::parse(std::env::args().skip(1));
    match arguments.and_then(|arguments| act(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; there is nobody else to tell.
            let _ = writeln!(std::io::stderr(), "containerd-shim-crisp-v1: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> Result<(), Error> {
    if arguments.version {
        let version = format!("containerd-shim-crisp-v1 {}\n", env!("CARGO_PKG_VERSION"));
        return std::io::stdout().write_all(version.as_bytes()).act("print the version");
    }
    if arguments.info {
        return containerd::info();
    }
    Logger::install(arguments.debug);
    let place = |foreign| serve::Place {
        id: arguments.id.clone(),
        namespace: arguments.namespace.clone(),
        events: Some(arguments.events.clone()).filter(|_| foreign),
        foreign,
    };
    match arguments.action.as_str() {
        "start" => containerd::start(arguments),
        "delete" => containerd::delete(arguments),
        "serve" => {
            pod::check_id(&arguments.id)?;
            serve::serve(place(false), kernel::inherited_listener().act("take the socket")?)
        }
        // By `start`, which cannot choose a descriptor's number without unsafe code.
        "serve-stdin" => {
            let listener = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).act("take the socket")?;
            let null = std::fs::File::open("/dev/null").act("open /dev/null")?;
            rustix::stdio::dup2_stdin(null).act("give up the socket's first number")?;
            // containerd's process group is not to take us along.
            rustix::process::setsid().act("begin a session")?;
            serve::serve(place(true), listener)
        }
        _ => Err(Error::Invalid(USAGE.to_owned())),
    }
}

/// One thread, so a lock is never waited for; a panic while it was held costs the call that panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines on standard error, which the daemon points at a file. Bounded: the file is on tmpfs, and a client that
/// makes the same mistake for ever must not fill it.
struct Logger {
    written: AtomicUsize,
}

/// The most that a shim says in its life.
const LOGGED: usize = 256 * 1024;

impl Logger {
    fn install(debug: bool) {
        static LOGGER: Logger = Logger { written: AtomicUsize::new(0) };
        ::log::set_max_level(if debug { ::log::LevelFilter::Debug } else { ::log::LevelFilter::Warn });
        // Fails only when there is one already.
        let _ = ::log::set_logger(&LOGGER);
    }
}

impl ::log::Log for Logger {
    fn enabled(&self, _: &::log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &::log::Record<'_>) {
        let seconds = record::now() / 1_000_000_000;
        let line = format!("{seconds} {} {}: {}\n", record.level(), record.target(), record.args());
        if self.written.fetch_add(line.len(), Ordering::Relaxed) < LOGGED {
            // There is nobody to tell that telling failed.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, Error> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_are_read_as_go_writes_them() {
        let got = parse("-namespace k8s.io --id=a1 -debug -address /x -publish-binary /y start").unwrap();
        let wanted = Arguments {
            namespace: "k8s.io".into(),
            id: "a1".into(),
            debug: true,
            address: "/x".into(),
            action: "start".into(),
            ..Arguments::default()
        };
        assert_eq!(got, wanted);
        assert!(parse("-id").is_err());
        assert!(!parse("-debug=false start").unwrap().debug);
    }
}
