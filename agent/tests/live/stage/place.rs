//! A folder for one test, the commands that it runs, and waiting for what must come.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A folder of its own for one test, on a real disk, removed with it.
#[derive(Debug)]
pub struct Place(tempfile::TempDir);

impl Place {
    /// A new, empty folder in `REPLICA_TMP`, or `/var/tmp`.
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make loop devices: run them as root"
        );
        let parent = env::var_os("REPLICA_TMP").unwrap_or_else(|| "/var/tmp".into());
        let folder = tempfile::Builder::new()
            .prefix("replica-test.")
            .tempdir_in(parent)
            .unwrap();
        Self(folder)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new folder in it.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

/// Runs a command that must succeed; gives what it printed.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(program)
        .args(args)
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default()),
        )
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: scripts/packages installs it"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program}: {}: {text}{errors}",
        output.status
    );
    text
}

/// Waits until `happened` gives something, at most `limit`; fails with `what` then.
pub fn until<T>(what: &str, limit: Duration, mut happened: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(result) = happened() {
            return result;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A number of the tests: from the environment, or the small one for every day.
pub fn number(name: &str, small: u32) -> u32 {
    env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(small)
}
