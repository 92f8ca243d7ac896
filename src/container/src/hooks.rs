//! Hooks of the specification: programs of the host that run at points of a container's life (OCI runtime
//! specification, "Hooks"). crispd never sends any; they are for those who use the library as an OCI runtime.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::spec::{Hook, Spec};

/// Where a hook that names no timeout ends.
const LIMIT: Duration = Duration::from_secs(60);
/// As much of a hook's stderr as an error quotes.
const QUOTE: u64 = 1024;

#[derive(Clone, Debug)]
pub(crate) struct Hooks {
    hooks: crate::spec::Hooks,
    state: State,
}

/// What a hook reads from its standard input.
#[derive(Clone, Debug)]
struct State {
    version: String,
    id: String,
    bundle: String,
    annotations: serde_json::Value,
}

impl Hooks {
    /// None when there are none.
    pub(crate) fn new(spec: &Spec, id: &str, bundle: &Path) -> Option<Hooks> {
        let hooks = spec.hooks.clone().filter(|hooks| *hooks != crate::spec::Hooks::default())?;
        let state = State {
            version: spec.oci_version.clone(),
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            annotations: serde_json::json!(spec.annotations),
        };
        Some(Hooks { hooks, state })
    }

    /// Parent: `prestart` and `createRuntime`, when the namespaces exist.
    pub(crate) fn create_runtime(&self, pid: u32) -> Result<(), Error> {
        self.all("prestart", &self.hooks.prestart, "creating", pid)?;
        self.all("createRuntime", &self.hooks.create_runtime, "creating", pid)
    }

    /// Child: in the container's namespaces, with the host's paths.
    pub(crate) fn create_container(&self) -> Result<(), Error> {
        self.all("createContainer", &self.hooks.create_container, "creating", std::process::id())
    }

    /// Child: in the container, before the exec.
    pub(crate) fn start_container(&self) -> Result<(), Error> {
        self.all("startContainer", &self.hooks.start_container, "created", std::process::id())
    }

    /// Parent: the container runs.
    pub(crate) fn poststart(&self, pid: u32) -> Result<(), Error> {
        self.all("poststart", &self.hooks.poststart, "running", pid)
    }

    /// Parent: the container is gone. All of them run; what they answer changes nothing, and is handed back.
    pub(crate) fn poststop(&self) -> Vec<Error> {
        let state = self.state.json("stopped", 0);
        let run = |hook| run("poststop", hook, &state).err();
        self.hooks.poststop.iter().filter_map(run).collect()
    }

    fn all(&self, kind: &'static str, hooks: &[Hook], status: &str, pid: u32) -> Result<(), Error> {
        let state = self.state.json(status, pid);
        hooks.iter().try_for_each(|hook| run(kind, hook, &state))
    }
}

impl State {
    fn json(&self, status: &str, pid: u32) -> Vec<u8> {
        let mut state = serde_json::json!({
            "ociVersion": self.version, "id": self.id, "status": status, "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if let (true, Some(object)) = (pid != 0, state.as_object_mut()) {
            object.insert("pid".into(), pid.into());
        }
        state.to_string().into_bytes()
    }
}

fn run(kind: &'static str, hook: &Hook, state: &[u8]) -> Result<(), Error> {
    let failed = |why: String| Error::Hook { kind, path: hook.path.clone(), why };
    if !hook.path.starts_with('/') {
        return Err(failed("its path is not absolute".into()));
    }
    let mut command = Command::new(&hook.path);
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some((name, rest)) = hook.args.split_first() {
        use std::os::unix::process::CommandExt;
        command.arg0(name).args(rest);
    }
    command.envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state);
    }
    let limit = hook.timeout.map_or(LIMIT, |seconds| Duration::from_secs(seconds.into()));
    let Some(status) = wait(&mut child, Instant::now() + limit) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed(format!("did not end within {} s", limit.as_secs())));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(QUOTE).read_to_string(&mut said);
    }
    Err(failed(format!("{status} {}", said.trim()).trim_end().to_owned()))
}

fn wait(child: &mut Child, deadline: Instant) -> Option<std::process::ExitStatus> {
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
