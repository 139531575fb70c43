//! A small test harness for binaries that start themselves again in other roles, or that run
//! only on the test bench, and so have a `main` of their own: runs the named tests one by
//! one, understands a filter, `--exact` and `--list`, and fails and counts as cargo's does.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

pub type Test = (&'static str, fn());

/// Runs them on the test bench (`scripts/vm-test`), which has the devices that they need.
/// Elsewhere none is run, and none counted as passed.
pub fn run_on_the_bench(tests: &[Test]) -> ExitCode {
    if std::env::var_os("REPLICA_VM").is_some() {
        return run(tests);
    }
    println!("on the test bench only: scripts/vm-test");
    ExitCode::SUCCESS
}

pub fn run(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| {
        filters.is_empty()
            || filters.iter().any(|filter| {
                if has("--exact") {
                    name == *filter
                } else {
                    name.contains(filter.as_str())
                }
            })
    };
    let tests: Vec<&Test> = tests.iter().filter(|(name, _)| wanted(name)).collect();
    if has("--list") {
        for (name, _) in tests {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
    }
    let (verdict, code) = if failed.is_empty() {
        ("ok", ExitCode::SUCCESS)
    } else {
        println!("\nfailures:");
        failed.iter().for_each(|name| println!("    {name}"));
        ("FAILED", ExitCode::FAILURE)
    };
    let passed = tests.len() - failed.len();
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured\n",
        failed.len()
    );
    code
}
