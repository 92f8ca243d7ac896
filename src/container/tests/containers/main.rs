//! Real containers on this kernel, as root: what the library promises, as facts.
//!
//! This binary has a harness of its own. The library clones without an exec and its children allocate, which is
//! sound in a process with one thread only; the usual harness runs each test in a thread of its own.

mod basics;
mod lab;
mod volumes;

use std::panic::{AssertUnwindSafe, catch_unwind};

use lab::Lab;

type Test = (&'static str, fn(&Lab));

/// Names the functions of a module as tests.
macro_rules! facts {
    ($($module:ident: $($test:ident,)*;)*) => {
        &[$($((concat!(stringify!($module), "::", stringify!($test)), $module::$test as fn(&Lab)),)*)*]
    };
}

const TESTS: &[Test] = facts! {
    basics:
        a_container_runs_its_program,
        an_exec_sees_the_container,
    ;
    volumes:
        the_layers_of_an_image_are_a_volume_that_nobody_writes,
        a_declared_volume_is_written_beside_the_image,
        more_layers_than_fit_one_option_are_a_volume_too,
        in_a_user_namespace_an_image_volume_belongs_to_its_root,
    ;
};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let chosen = |name: &str| {
        let mut filters = words.iter().filter(|word| !word.starts_with("--")).peekable();
        filters.peek().is_none() || filters.any(|filter| name.contains(filter.as_str()))
    };
    let tests: Vec<&Test> = TESTS.iter().filter(|(name, _)| chosen(name)).collect();
    if words.iter().any(|word| word == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let lab = Lab::new();
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = catch_unwind(AssertUnwindSafe(|| test(&lab))).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
        lab.reap_strays();
    }
    let leaks = lab.close();
    println!("\n{} passed; {} failed", tests.len() - failed.len(), failed.len());
    for leak in &leaks {
        println!("left behind: {leak}");
    }
    if !failed.is_empty() || !leaks.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
