//! Pulls as the daemon makes them: a real store, real unpack helpers, registries on loopback that behave or do not.
//! A program of its own, because the unpack helper is this very program, started with `unpack` as first argument.
//! Arguments other than that are parts of test names to run.

// A test without the harness is no test to clippy.
#![allow(clippy::unwrap_used, clippy::type_complexity)]

mod auth;
mod faults;
mod fixtures;
mod hosts;
mod registry;
mod server;
mod store;
mod trees;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::time::{Duration, Instant};

type Test = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

/// Names a list of async functions.
#[macro_export]
macro_rules! facts {
    ($($name:ident),* $(,)?) => {
        pub(crate) fn facts() -> Vec<$crate::Fact> {
            vec![$((stringify!($name), || Box::pin($name()))),*]
        }
    };
}
pub(crate) type Fact = Test;

/// No fact takes longer, on a busy machine either.
const DEADLINE: Duration = Duration::from_secs(120);

fn main() {
    if std::env::args().nth(1).is_some_and(|first| first == "unpack") {
        image::unpack_main();
    }
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let all =
        [registry::facts(), store::facts(), trees::facts(), hosts::facts(), auth::facts(), faults::facts()];
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, test) in all.into_iter().flatten() {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let started = Instant::now();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let run =
            || runtime.block_on(async { tokio::time::timeout(DEADLINE, test()).await.expect("in time") });
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(run));
        runtime.shutdown_timeout(Duration::from_secs(5));
        match outcome {
            Ok(()) => passed += 1,
            Err(_) => failed.push(name),
        }
        let word = if failed.last() == Some(&name) { "FAILED" } else { "ok" };
        println!("test {name} ... {word} ({:.2} s)", started.elapsed().as_secs_f32());
    }
    println!("\ntest result: {passed} passed; {} failed {failed:?}", failed.len());
    std::process::exit(i32::from(!failed.is_empty()));
}
