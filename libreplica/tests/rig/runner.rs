//! A small test harness for binaries that start themselves again in other roles, and so
//! have a `main` of their own: runs the named tests one by one, understands a filter,
//! `--exact` and `--list`, and fails as cargo expects it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

pub type Test = (&'static str, fn());

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
    let mut failed = 0;
    for (name, test) in tests.iter().filter(|(name, _)| wanted(name)) {
        if has("--list") {
            println!("{name}: test");
            continue;
        }
        let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += u32::from(!passed);
    }
    if failed > 0 {
        println!("{failed} FAILED");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
