//! Hooks of the specification run where and when it says, and a failure of one stops the container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use container::spec::{Hook, Hooks};
use container::{Error, Stdio, poststop};

use crate::lab::{Lab, soon};

fn script(directory: &Path, name: &str, body: &str) -> Hook {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Hook { path: path.to_str().unwrap().into(), env: vec!["PATH=/usr/bin:/bin".into()], ..Hook::default() }
}

pub(crate) fn hooks_run_in_their_order_and_places(lab: &Lab) {
    let dir = lab.directory();
    let log = dir.join("log");
    fs::write(&log, "").unwrap();
    let note = |name: &str| {
        script(
            &dir,
            name,
            &format!("grep -o '\"status\":\"[a-z]*\"' | sed 's/^/{name} /' >> {}", log.display()),
        )
    };
    let inside = Hook {
        path: "/bin/sh".into(),
        args: vec!["sh".into(), "-c".into(), "cat > /hooked".into()],
        env: vec!["PATH=/bin".into()],
        ..Hook::default()
    };
    let container = lab.sh("grep -c created /hooked").with(|spec| {
        spec.hooks = Some(Hooks {
            prestart: vec![note("prestart")],
            create_runtime: vec![note("createRuntime")],
            create_container: vec![note("createContainer")],
            start_container: vec![inside],
            poststart: vec![note("poststart")],
            poststop: vec![note("poststop")],
        });
    });
    let (spec, id, bundle) = (container.spec.clone(), container.id.clone(), container.bundle.clone());
    let output = container.run().unwrap();
    assert_eq!(output.stdout, "1\n");
    assert!(poststop(&id, &spec, &bundle).is_empty());
    let said = fs::read_to_string(&log).unwrap().replace("\"status\":", "").replace('"', "");
    assert_eq!(
        said,
        "prestart creating\ncreateRuntime creating\ncreateContainer creating\npoststart running\npoststop stopped\n"
    );
}

pub(crate) fn a_hook_that_fails_stops_the_container(lab: &Lab) {
    let dir = lab.directory();
    let failing = || vec![script(&dir, "fail", "echo no luck >&2; exit 3")];
    let lists: [fn(Vec<Hook>) -> Hooks; 4] = [
        |hooks| Hooks { prestart: hooks, ..Hooks::default() },
        |hooks| Hooks { create_runtime: hooks, ..Hooks::default() },
        |hooks| Hooks { create_container: hooks, ..Hooks::default() },
        |hooks| Hooks { poststart: hooks, ..Hooks::default() },
    ];
    for list in lists {
        let container = lab.container(&["sleep", "1000"]).with(|spec| spec.hooks = Some(list(failing())));
        let started = container
            .create(Stdio::null())
            .and_then(|(_running, mut created)| created.start()?.finish(soon()));
        let error = started.unwrap_err();
        assert!(matches!(error, Error::Hook { .. } | Error::HookInside(_)), "{error:?}");
        assert!(error.to_string().contains("no luck"), "{error}");
    }
}

pub(crate) fn a_hook_that_takes_too_long_is_ended(lab: &Lab) {
    let dir = lab.directory();
    let mut hook = script(&dir, "slow", "exec sleep 1000");
    hook.timeout = Some(1);
    let container =
        lab.sh("true").with(|spec| spec.hooks = Some(Hooks { prestart: vec![hook], ..Hooks::default() }));
    let error = container.run().unwrap_err();
    assert!(error.to_string().contains("did not end within 1 s"), "{error}");
}
