//! `crisp-oci`: the command line that OCI runtimes share, over the library `container`, so that the OCI world's own
//! test suites and tools can drive it. What a container is, is decided there; here are arguments, a directory for
//! each container, and exit codes. One thread, as the library wants.

mod create;
mod exec;
mod keeper;
mod list;
mod remove;
mod signal;
mod state;
mod terminal;
mod wait;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(name = "crisp-oci", version, about = "Runs OCI containers from bundles")]
struct Cli {
    /// Where the state of containers is kept.
    #[arg(long, global = true, default_value = "/run/crisp-oci")]
    root: PathBuf,
    /// Also write errors to this file.
    #[arg(long, global = true)]
    log: Option<PathBuf>,
    /// Shape of that file's lines.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Accepted for the sake of callers; there is nothing more to say.
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Verb {
    /// Set up a container that waits for its start.
    Create(Create),
    /// Let a created container run its program.
    Start { id: String },
    /// Print the state of a container as JSON.
    State { id: String },
    /// Send a signal to a container.
    Kill {
        /// To all its processes, not only the first.
        #[arg(short, long)]
        all: bool,
        id: String,
        #[arg(default_value = "SIGTERM")]
        signal: String,
    },
    /// Remove what is left of a stopped container.
    Delete {
        /// Kill it first when it has not stopped.
        #[arg(short, long)]
        force: bool,
        id: String,
    },
    /// Create, start, wait, delete.
    Run {
        #[command(flatten)]
        create: Create,
        /// Leave it running.
        #[arg(short, long)]
        detach: bool,
    },
    /// Run one more process in a running container.
    Exec(Exec),
    /// List containers.
    List {
        /// Print ids only.
        #[arg(short, long)]
        quiet: bool,
        /// `table` or `json`.
        #[arg(short, long, default_value = "table")]
        format: String,
    },
    /// Hold a created container until its start. Run by `create`.
    #[command(hide = true)]
    Keep(Create),
}

#[derive(Args, Clone)]
struct Create {
    /// Directory of config.json.
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// Write the pid of the container here.
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Send the terminal to this unix socket.
    #[arg(long)]
    console_socket: Option<PathBuf>,
    id: String,
}

#[derive(Args)]
struct Exec {
    /// The process as JSON.
    #[arg(short, long, conflicts_with_all = ["env", "cwd", "user"])]
    process: Option<PathBuf>,
    /// Give it a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Leave it running.
    #[arg(short, long)]
    detach: bool,
    /// Write its pid here.
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Send its terminal to this unix socket.
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// NAME=value, more than once.
    #[arg(short, long)]
    env: Vec<String>,
    /// Working directory.
    #[arg(long)]
    cwd: Option<String>,
    /// uid or uid:gid.
    #[arg(short, long)]
    user: Option<String>,
    id: String,
    /// Program and arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let root = cli.root.as_path();
    let done = match cli.verb {
        Verb::Create(wanted) => create::create(root, &wanted),
        Verb::Start { id } => create::start(root, &id),
        Verb::State { id } => list::state(root, &id),
        Verb::Kill { all, id, signal } => signal::kill(root, &id, &signal, all),
        Verb::Delete { force, id } => remove::delete(root, &id, force),
        Verb::Run { create, detach } => create::run(root, &create, detach),
        Verb::Exec(wanted) => exec::exec(root, &wanted),
        Verb::List { quiet, format } => list::list(root, quiet, &format),
        Verb::Keep(wanted) => keeper::keep(root, &wanted),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = format!("{error:#}");
            eprintln!("crisp-oci: {text}");
            if let Some(path) = &cli.log {
                log(path, cli.log_format, &text);
            }
            ExitCode::FAILURE
        }
    }
}

/// containerd and others read the reason of a failure from here.
fn log(path: &Path, format: LogFormat, text: &str) {
    let line = match format {
        LogFormat::Json => {
            serde_json::json!({ "level": "error", "msg": text, "time": state::now() }).to_string()
        }
        LogFormat::Text => format!("time={:?} level=error msg={text:?}", state::now()),
    };
    if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path) {
        let _ = writeln!(file, "{line}");
    }
}
