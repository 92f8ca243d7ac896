//! Waits for a signal and ends: the first process of the pods of other runtimes, and a container that does nothing.

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn pause() -> i32;
    fn _exit(code: i32) -> !;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;
const WNOHANG: i32 = 1;

extern "C" fn end(_: i32) {
    // SAFETY: _exit(2) is async-signal-safe.
    unsafe { _exit(0) }
}

extern "C" fn reap(_: i32) {
    // SAFETY: waitpid(2) is async-signal-safe and a null status is allowed.
    while unsafe { waitpid(-1, std::ptr::null_mut(), WNOHANG) } > 0 {}
}

fn main() {
    // SAFETY: both handlers only make async-signal-safe calls.
    unsafe {
        signal(SIGINT, end);
        signal(SIGTERM, end);
        signal(SIGCHLD, reap);
        loop {
            pause();
        }
    }
}
