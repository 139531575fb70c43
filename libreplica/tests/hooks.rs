//! Hooks, with real programs: shell scripts that note when they were run, and fail, hang,
//! talk without end or leave something behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libreplica::ErrorKind;
use libreplica::primary::hooks::{HookSetup, Hooks, recover};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(10);

/// Held by each test: a script that one thread writes cannot be run while another thread
/// has just forked ("text file busy").
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Folder(
    TempDir,
    #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>,
);

impl Folder {
    fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self(TempDir::new().unwrap(), turn)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("hooks.d")
    }

    fn run_dir(&self) -> PathBuf {
        self.0.path().join("run")
    }

    /// How many marks say that something is at rest.
    fn marks(&self) -> usize {
        fs::read_dir(self.run_dir()).map_or(0, Iterator::count)
    }

    /// A shell script; it notes its name, phase and volumes before `body`.
    fn hook(&self, name: &str, body: &str) -> PathBuf {
        fs::create_dir_all(self.path()).unwrap();
        let path = self.path().join(name);
        let notes = self.0.path().join("notes").display().to_string();
        let note = format!("echo {name} $1 $REPLICA_PHASE $REPLICA_VOLUME >> {notes}");
        fs::write(&path, format!("#!/bin/sh\n{note}\n{body}\n")).unwrap();
        chmod(&path, 0o755);
        path
    }

    fn notes(&self) -> Vec<String> {
        let text = fs::read_to_string(self.0.path().join("notes")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn pre(folder: &Folder, volumes: &[&str], limit: Duration) -> libreplica::Result<Hooks> {
    pre_until(folder, volumes, limit, Instant::now() + 10 * LIMIT)
}

fn pre_until(
    folder: &Folder,
    volumes: &[&str],
    limit: Duration,
    deadline: Instant,
) -> libreplica::Result<Hooks> {
    let setup = HookSetup {
        folder: &folder.path(),
        run_dir: &folder.run_dir(),
        limit,
        deadline,
    };
    Hooks::pre(&setup, volumes)
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn hooks_run_in_order_and_back() {
    let folder = Folder::new();
    folder.hook("20-app", "");
    folder.hook("10-database", "");
    folder.hook(".hidden", "exit 1");
    folder.hook("10-database~", "exit 1");
    fs::write(folder.path().join("README"), "no program").unwrap();
    let hooks = pre(&folder, &["data", "log"], LIMIT).unwrap();
    assert_eq!(
        folder.notes(),
        ["10-database pre pre data log", "20-app pre pre data log"]
    );
    assert_eq!(folder.marks(), 1);
    assert!(recover(&folder.run_dir(), LIMIT).unwrap().is_empty());
    hooks.post().unwrap();
    assert_eq!(folder.marks(), 0);
    assert_eq!(
        folder.notes()[2..],
        [
            "20-app post post data log",
            "10-database post post data log"
        ]
    );
}

#[test]
fn a_failing_hook_ends_it_and_those_that_ran_are_released() {
    let folder = Folder::new();
    folder.hook("1", "");
    let bad = folder.hook(
        "2",
        "[ $1 = post ] || { echo the database is away >&2; exit 7; }",
    );
    folder.hook("3", "");
    let error = pre(&folder, &["v"], LIMIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    let text = error.to_string();
    assert!(text.contains(bad.to_str().unwrap()), "{text}");
    assert!(
        text.contains("exit status: 7; it said: the database is away"),
        "{text}"
    );
    assert_eq!(
        folder.notes(),
        [
            "1 pre pre v",
            "2 pre pre v",
            "2 post post v",
            "1 post post v"
        ]
    );
}

#[test]
fn post_runs_all_and_tells_the_first_failure() {
    let folder = Folder::new();
    folder.hook("1", "");
    folder.hook("2", "[ $1 = pre ]");
    let hooks = pre(&folder, &["v"], LIMIT).unwrap();
    assert_eq!(hooks.post().unwrap_err().kind(), ErrorKind::State);
    assert_eq!(folder.notes()[2..], ["2 post post v", "1 post post v"]);
}

#[test]
fn a_slow_hook_is_killed_with_what_it_started() {
    let folder = Folder::new();
    let pid = folder.0.path().join("pid");
    let body = format!(
        "[ $1 = post ] || {{ sleep 300 & echo $! > {}; wait; }}",
        pid.display()
    );
    folder.hook("slow", &body);
    let start = Instant::now();
    let error = pre(&folder, &["v"], Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(folder.notes(), ["slow pre pre v", "slow post post v"]);
    let pid = fs::read_to_string(pid).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
}

#[test]
fn all_hooks_together_meet_the_deadline() {
    let folder = Folder::new();
    for name in ["1", "2", "3"] {
        folder.hook(name, "[ $1 = post ] || sleep 0.3");
    }
    let deadline = Instant::now() + Duration::from_millis(450);
    let error = pre_until(&folder, &["v"], LIMIT, deadline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(
        folder.notes(),
        [
            "1 pre pre v",
            "2 pre pre v",
            "2 post post v",
            "1 post post v"
        ]
    );
    assert_eq!(folder.marks(), 0);
    let late = pre_until(&folder, &["v"], LIMIT, Instant::now()).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    assert_eq!(folder.notes().len(), 4, "nothing was started");
}

#[test]
fn a_hook_that_ignores_the_end_is_killed() {
    let folder = Folder::new();
    folder.hook(
        "deaf",
        "[ $1 = post ] || { trap '' TERM; while :; do sleep 1; done; }",
    );
    let start = Instant::now();
    let error = pre(&folder, &["v"], Duration::from_millis(100)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_a_hook_leaves_in_the_background_is_not_waited_for() {
    let folder = Folder::new();
    let pid = folder.0.path().join("pid");
    folder.hook(
        "leaves",
        &format!(
            "[ $1 = post ] || {{ sleep 300 & echo $! > {}; }}",
            pid.display()
        ),
    );
    let start = Instant::now();
    let hooks = pre(&folder, &["v"], LIMIT).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    let pid = fs::read_to_string(pid).unwrap();
    let alive = Path::new("/proc").join(pid.trim()).exists();
    std::process::Command::new("kill")
        .arg(pid.trim())
        .status()
        .unwrap();
    assert!(alive, "a session that the hook holds open was killed");
    hooks.post().unwrap();
}

#[test]
fn endless_output_is_bounded_and_meets_the_limit() {
    let folder = Folder::new();
    folder.hook("loud", "[ $1 = post ] || yes all is well");
    let error = pre(&folder, &["v"], Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().len() < 6000);
}

#[test]
fn what_cannot_be_run_safely_is_refused() {
    let refused = |folder: &Folder| pre(folder, &["v"], LIMIT).unwrap_err().kind();
    let folder = Folder::new();
    assert_eq!(refused(&folder), ErrorKind::NotFound);
    fs::create_dir(folder.path()).unwrap();
    assert_eq!(refused(&folder), ErrorKind::NotFound);
    let hook = folder.hook("hook", "");
    chmod(&hook, 0o644);
    assert_eq!(refused(&folder), ErrorKind::Invalid);
    chmod(&hook, 0o757);
    assert_eq!(refused(&folder), ErrorKind::Invalid);
    chmod(&hook, 0o755);
    chmod(&folder.path(), 0o777);
    assert_eq!(refused(&folder), ErrorKind::Invalid);
    chmod(&folder.path(), 0o755);
    pre(&folder, &["v"], LIMIT).unwrap().post().unwrap();
}
