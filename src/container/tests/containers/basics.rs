//! A container comes up, runs, and ends.

use crate::lab::Lab;

pub(crate) fn a_container_runs_its_program(lab: &Lab) {
    let output = lab.sh("echo out; echo err >&2; exit 7").run().unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code), ("out\n", "err\n", 7));
}

pub(crate) fn an_exec_sees_the_container(lab: &Lab) {
    let (running, _created) = lab.container(&["sleep", "1000"]).start().unwrap();
    assert_eq!(running.exec_says("hostname; cat /proc/1/comm"), "box\nsleep");
}
