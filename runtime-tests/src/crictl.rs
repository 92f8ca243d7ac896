//! crictl against one socket.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::Result;

use crate::{run, setup};

/// crictl with its endpoint.
#[derive(Clone, Debug)]
pub struct Crictl {
    program: PathBuf,
    socket: PathBuf,
}

impl Crictl {
    /// For a socket.
    pub fn new(socket: &Path) -> Result<Crictl> {
        Ok(Crictl { program: setup::go_program("crictl")?, socket: socket.to_owned() })
    }

    /// The command, to be run or spawned.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Never a file of the machine: it may name another runtime.
        command.args(["--config", "/dev/null", "--timeout", "60s", "--runtime-endpoint"]);
        command.arg(format!("unix://{}", self.socket.display())).args(args);
        command
    }

    /// Runs to the end; a failure is an error. Gives stdout without the last line end.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        Ok(run::stdout(&mut self.command(args), Duration::from_secs(120))?.trim_end_matches('\n').to_owned())
    }

    /// Runs to the end, whatever it says.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        run::output(&mut self.command(args), Duration::from_secs(120))
    }

    /// Runs a command with `-o json` and parses what is said. crictl knows flags only before arguments.
    pub fn json(&self, command: &str, args: &[&str]) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.run(&[&[command, "-o", "json"], args].concat())?)?)
    }
}
