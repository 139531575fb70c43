//! Somebody else's crate: it lies outside this workspace, depends on `libreplica` without
//! default features, and runs as a user that may do nothing. It must get neither a BPF
//! loader nor a command-line parser, and be able to write a log, open a store and read a
//! recovery point.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const NOBODY: &str = "65534";

const MANIFEST: &str = r#"
[package]
name = "outside"
version = "0.0.0"
edition = "2024"

[dependencies]
libreplica = { path = "LIBREPLICA", default-features = false }

[profile.dev]
debug = false

[workspace]
"#;

const PROGRAM: &str = include_str!("outside_crate/program.rs");

/// Runs a command that must succeed; gives what it printed.
fn run(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let errors = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}: {errors}");
    String::from_utf8_lossy(&stdout).into_owned()
}

fn cargo(folder: &Path, target: &Path) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(folder)
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_NET_OFFLINE", "true");
    command
}

#[test]
fn it_builds_without_our_features_and_runs_unprivileged() {
    let library = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    // Where cargo puts what tests build: kept between runs, so that only the first is slow.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("outside");
    fs::create_dir(path.join("src")).unwrap();
    let manifest = MANIFEST.replace("LIBREPLICA", library.to_str().unwrap());
    fs::write(path.join("Cargo.toml"), manifest).unwrap();
    fs::write(path.join("src/main.rs"), PROGRAM).unwrap();
    fs::copy(library.join("../Cargo.lock"), path.join("Cargo.lock")).unwrap();

    let tree = run(cargo(path, &target).args(["tree", "--edges", "normal", "--prefix", "none"]));
    assert!(tree.contains("hrl-format"), "{tree}");
    for unwanted in ["aya", "clap", "criterion", "openssl-sys", "ring"] {
        let found = tree
            .lines()
            .find(|line| line.split(' ').next() == Some(unwanted));
        assert_eq!(found, None, "among the dependencies: {tree}");
    }

    run(cargo(path, &target).args(["build", "--quiet"]));
    let program = path.join("outside");
    fs::copy(target.join("debug/outside"), &program).unwrap();
    let home = path.join("home");
    fs::create_dir(&home).unwrap();
    for (path, mode) in [(path, 0o755), (&program, 0o755), (&home, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut unprivileged = if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]);
        command.args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]);
        command.arg(&program);
        command
    } else {
        Command::new(&program)
    };
    let printed = run(unprivileged.arg(&home).current_dir("/"));
    assert_eq!(printed, "what was written is what the point holds\n");
}
