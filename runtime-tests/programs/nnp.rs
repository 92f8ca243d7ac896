//! Prints the effective user id, the way critest's no-new-privileges specs want to read it. Installed setuid root.

fn main() {
    // Uid: real, effective, saved, file system (proc_pid_status(5)).
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a line with Uid");
    println!("Effective uid: {}", line.split_whitespace().nth(1).expect("a second number"));
}
