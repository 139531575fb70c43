//! Freezing real filesystems, and thawing them whoever is killed meanwhile. Needs root.
//!
//! This binary plays three parts: the tests, the watchdog that they start, and an agent
//! that freezes and then waits to be killed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libreplica::device::{BlockDevice, Filesystem, Layers};
use libreplica::primary::quiesce::{Freezer, Recovery, recover};
use libreplica::primary::watchdog;
use libreplica::{ErrorKind, Result};
use rig::runner::{self, Test};
use rig::{LoopDisk, MIB, Mounted, Running, mkfs_that_cannot_freeze, run, thaw, until};
use tempfile::TempDir;

const TESTS: &[Test] = &[
    ("writes_wait_while_frozen", writes_wait_while_frozen),
    (
        "what_others_froze_stays_frozen",
        what_others_froze_stays_frozen,
    ),
    ("what_others_thaw_is_no_point", what_others_thaw_is_no_point),
    (
        "a_type_that_cannot_freeze_is_synced",
        a_type_that_cannot_freeze_is_synced,
    ),
    ("a_late_freeze_is_undone", a_late_freeze_is_undone),
    (
        "the_watchdog_thaws_past_the_limit",
        the_watchdog_thaws_past_the_limit,
    ),
    (
        "a_killed_agent_leaves_nothing_frozen",
        a_killed_agent_leaves_nothing_frozen,
    ),
    (
        "killing_the_agents_group_spares_the_watchdog",
        killing_the_agents_group_spares_the_watchdog,
    ),
    (
        "a_killed_watchdog_is_noticed_and_replaced",
        a_killed_watchdog_is_noticed_and_replaced,
    ),
    (
        "the_next_start_thaws_what_both_left",
        the_next_start_thaws_what_both_left,
    ),
    (
        "the_mark_of_a_living_agent_is_left_alone",
        the_mark_of_a_living_agent_is_left_alone,
    ),
    (
        "a_mount_in_another_namespace_is_frozen",
        a_mount_in_another_namespace_is_frozen,
    ),
    (
        "a_filesystem_in_a_file_is_frozen_before_its_host",
        a_filesystem_in_a_file_is_frozen_before_its_host,
    ),
    (
        "the_disk_of_the_mark_itself_can_be_frozen",
        the_disk_of_the_mark_itself_can_be_frozen,
    ),
    (
        "the_watchdog_ends_with_the_agent",
        the_watchdog_ends_with_the_agent,
    ),
    (
        "a_watchdog_that_does_not_start_freezes_nothing",
        a_watchdog_that_does_not_start_freezes_nothing,
    ),
];

const LIMIT: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["watchdog"] => done(watchdog::run()),
        ["agent", run_dir, disk] => done(play_agent(run_dir, disk)),
        _ => runner::run(TESTS),
    }
}

fn done(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Freezes what is on `disk`, says so, and waits to be killed.
fn play_agent(run_dir: &str, disk: &str) -> Result<()> {
    let mut freezer = Freezer::guarded(run_dir);
    println!("shortcomings: {}", freezer.start()?.join("; "));
    let frozen = freezer.freeze(&filesystems(Path::new(disk)), Duration::from_secs(60))?;
    println!("frozen");
    sleep(Duration::from_secs(300));
    frozen.thaw().map(drop)
}

fn filesystems(disk: &Path) -> Vec<Filesystem> {
    let disk = BlockDevice::open(disk).unwrap();
    Layers::above(&[&disk]).unwrap().filesystems().to_vec()
}

/// A folder, and a mounted disk in it.
struct Bench {
    mounted: Mounted,
    disk: LoopDisk,
    folder: TempDir,
}

impl Bench {
    fn new(kind: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("replica-quiesce.")
            .tempdir()
            .unwrap();
        let disk = LoopDisk::new(folder.path(), "disk", 384 * MIB);
        disk.mkfs(kind);
        let mounted = Mounted::new(&disk.path, &folder.path().join("m"));
        Self {
            mounted,
            disk,
            folder,
        }
    }

    fn filesystems(&self) -> Vec<Filesystem> {
        filesystems(&self.disk.path)
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn freezer(&self) -> Freezer {
        Freezer::guarded(self.run_dir())
    }

    /// An agent that has frozen the disk.
    fn agent(&self, prepare: impl FnOnce(&mut Command)) -> Running {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("agent")
            .arg(self.run_dir())
            .arg(&self.disk.path)
            .stdout(Stdio::piped());
        prepare(&mut command);
        let mut agent = Running(command.spawn().unwrap());
        let mut lines = BufReader::new(agent.0.stdout.take().unwrap()).lines();
        let shortcomings = lines.next().unwrap().unwrap();
        assert!(!shortcomings.contains("group"), "{shortcomings}");
        assert!(!shortcomings.contains("memory:"), "{shortcomings}");
        assert_eq!(lines.next().unwrap().unwrap(), "frozen");
        agent
    }

    /// The process that made the calls, by the mark.
    fn watchdog(&self) -> i32 {
        let mark = fs::read_dir(self.run_dir())
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        let text = fs::read_to_string(mark.path()).unwrap();
        text.split_ascii_whitespace()
            .nth(4)
            .unwrap()
            .parse()
            .unwrap()
    }

    fn marks(&self) -> usize {
        fs::read_dir(self.run_dir()).unwrap().count()
    }
}

/// A process that makes a file on the filesystem; it ends when it may.
fn writer(point: &Path) -> Running {
    let file = point.join("written");
    Running(Command::new("touch").arg(file).spawn().unwrap())
}

fn is_done(child: &mut Child) -> bool {
    child
        .try_wait()
        .unwrap()
        .is_some_and(|status| status.success())
}

fn writes_pass(point: &Path) -> bool {
    let mut writer = writer(point);
    let start = Instant::now();
    while start.elapsed() < SOON {
        if is_done(&mut writer.0) {
            return true;
        }
        sleep(Duration::from_millis(2));
    }
    false
}

fn kill(pid: i32) {
    run("kill", &["-KILL", &pid.to_string()]);
    until(SOON, || !is_running(pid));
}

/// Whether the process is there, and no zombie.
fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn writes_wait_while_frozen() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let bench = Bench::new(kind);
        for mut freezer in [bench.freezer(), Freezer::unguarded(bench.run_dir())] {
            let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
            let mut writer = writer(&bench.mounted.point);
            sleep(Duration::from_millis(200));
            assert!(!is_done(&mut writer.0), "{kind}: written while frozen");
            assert_eq!(bench.marks(), 1);
            let blocked = frozen.thaw().unwrap();
            until(SOON, || is_done(&mut writer.0));
            assert!(
                blocked >= Duration::from_millis(200) && blocked < LIMIT,
                "{blocked:?}"
            );
            assert_eq!(freezer.blocked(), blocked);
            assert_eq!(bench.marks(), 0);
        }
    }
}

fn what_others_froze_stays_frozen() {
    let ours = Bench::new("ext4");
    let theirs = Bench::new("ext4");
    run("fsfreeze", &[Path::new("--freeze"), &theirs.mounted.point]);
    let both = [ours.filesystems(), theirs.filesystems()].concat();
    for mut freezer in [ours.freezer(), Freezer::unguarded(ours.run_dir())] {
        let error = freezer.freeze(&both, LIMIT).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let point = theirs.mounted.point.to_str().unwrap();
        assert!(error.to_string().contains(point), "{error}");
        assert!(writes_pass(&ours.mounted.point));
    }
    assert!(thaw(&theirs.mounted.point), "it was thawed");
}

fn what_others_thaw_is_no_point() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    assert!(thaw(&bench.mounted.point));
    assert_eq!(frozen.thaw().unwrap_err().kind(), ErrorKind::State);
    freezer
        .freeze(&bench.filesystems(), LIMIT)
        .unwrap()
        .thaw()
        .unwrap();
}

fn a_type_that_cannot_freeze_is_synced() {
    let bench = Bench::new("ext4");
    let other = LoopDisk::new(bench.folder.path(), "efi", 64 * MIB);
    let kind = mkfs_that_cannot_freeze(&other.path);
    let _efi = Mounted::new(&other.path, &bench.mounted.point.join("efi"));
    let mut all = filesystems(&other.path);
    assert_eq!(all[0].kind(), kind);
    all.extend(bench.filesystems());
    let mut freezer = bench.freezer();
    freezer.freeze(&all, LIMIT).unwrap().thaw().unwrap();
    // Alone there is nothing to freeze, and that is no error.
    all.truncate(1);
    freezer.freeze(&all, LIMIT).unwrap().thaw().unwrap();
}

fn a_late_freeze_is_undone() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    freezer.start().unwrap();
    // Syncing goes before the clock, so a limit that no call can keep stands for a slow one.
    let error = freezer
        .freeze(&bench.filesystems(), Duration::from_nanos(1))
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(freezer.blocked() > Duration::ZERO);
    assert!(writes_pass(&bench.mounted.point));
    assert_eq!(bench.marks(), 0);
    freezer
        .freeze(&bench.filesystems(), LIMIT)
        .unwrap()
        .thaw()
        .unwrap();
}

fn the_watchdog_thaws_past_the_limit() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    let limit = Duration::from_millis(200);
    let frozen = freezer.freeze(&bench.filesystems(), limit).unwrap();
    let start = Instant::now();
    assert!(writes_pass(&bench.mounted.point));
    let thawed_after = start.elapsed();
    assert!(
        thawed_after > limit && thawed_after < limit + watchdog::GRACE * 3,
        "{thawed_after:?}"
    );
    assert_eq!(frozen.thaw().unwrap_err().kind(), ErrorKind::TimedOut);
    freezer
        .freeze(&bench.filesystems(), LIMIT)
        .unwrap()
        .thaw()
        .unwrap();
}

fn a_killed_agent_leaves_nothing_frozen() {
    let bench = Bench::new("xfs");
    let mut agent = bench.agent(|_| {});
    let watchdog = bench.watchdog();
    let mut writer = writer(&bench.mounted.point);
    sleep(Duration::from_millis(100));
    assert!(!is_done(&mut writer.0));
    agent.0.kill().unwrap();
    until(SOON, || is_done(&mut writer.0));
    until(SOON, || !is_running(watchdog));
    // The mark is of a freeze that is over: nothing is left to thaw.
    assert!(recover(&bench.run_dir()).unwrap().is_empty());
    assert_eq!(bench.marks(), 0);
}

/// A control group of ours in one hierarchy.
struct Group(PathBuf);

impl Group {
    fn members(&self) -> Vec<i32> {
        let list = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        list.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn killing_the_agents_group_spares_the_watchdog() {
    let tops = [
        "", "unified", "freezer", "memory", "pids", "cpuset", "systemd",
    ];
    let name = format!("replica-test-{}", std::process::id());
    let groups: Vec<Group> = tops
        .iter()
        .map(|top| Path::new("/sys/fs/cgroup").join(top))
        .filter(|top| top.join("cgroup.procs").exists())
        .map(|top| {
            let group = top.join(&name);
            fs::create_dir(&group).unwrap();
            for rule in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read(top.join(rule)) {
                    let _ = fs::write(group.join(rule), value);
                }
            }
            Group(group)
        })
        .collect();
    assert!(!groups.is_empty(), "no control groups on this machine");
    let bench = Bench::new("ext4");
    let script: String = groups
        .iter()
        .map(|group| format!("echo $$ > {}/cgroup.procs && ", group.0.display()))
        .collect();
    let mut shell = Command::new("sh");
    let exe = std::env::current_exe().unwrap();
    shell
        .args(["-c", &format!("{script} exec \"$0\" \"$@\"")])
        .arg(exe);
    let mut agent = bench.agent(|command| {
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        shell.args(arguments).stdout(Stdio::piped());
        *command = shell;
    });
    let watchdog = bench.watchdog();
    for group in &groups {
        assert_eq!(
            group.members(),
            [agent.0.id() as i32],
            "{}",
            group.0.display()
        );
    }
    let mut writer = writer(&bench.mounted.point);
    sleep(Duration::from_millis(100));
    assert!(!is_done(&mut writer.0));
    for group in &groups {
        for pid in group.members() {
            run("kill", &["-KILL", &pid.to_string()]);
        }
    }
    agent.0.wait().unwrap();
    until(SOON, || is_done(&mut writer.0));
    until(SOON, || !is_running(watchdog));
}

fn a_killed_watchdog_is_noticed_and_replaced() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    let first = bench.watchdog();
    kill(first);
    assert_eq!(frozen.thaw().unwrap_err().kind(), ErrorKind::State);
    assert!(writes_pass(&bench.mounted.point));
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    let second = bench.watchdog();
    assert_ne!(second, first);
    frozen.thaw().unwrap();
    // Killed between two freezes it is simply replaced.
    kill(second);
    freezer
        .freeze(&bench.filesystems(), LIMIT)
        .unwrap()
        .thaw()
        .unwrap();
}

fn the_next_start_thaws_what_both_left() {
    let bench = Bench::new("xfs");
    let mut agent = bench.agent(|_| {});
    let watchdog = bench.watchdog();
    // Stopped first, so that the watchdog's death does not move it to thaw.
    run("kill", &["-STOP", &agent.0.id().to_string()]);
    kill(watchdog);
    agent.0.kill().unwrap();
    agent.0.wait().unwrap();
    let mut writer = writer(&bench.mounted.point);
    sleep(Duration::from_millis(100));
    assert!(!is_done(&mut writer.0));
    let recovered = recover(&bench.run_dir()).unwrap();
    assert_eq!(recovered.len(), 1);
    assert_eq!(recovered[0].mount_point, bench.mounted.point);
    assert!(
        matches!(recovered[0].outcome, Recovery::Thawed),
        "{recovered:?}"
    );
    until(SOON, || is_done(&mut writer.0));
    assert_eq!(bench.marks(), 0);
    assert!(
        recover(Path::new("/run/no-such-folder"))
            .unwrap()
            .is_empty()
    );
}

fn the_mark_of_a_living_agent_is_left_alone() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    assert!(recover(&bench.run_dir()).unwrap().is_empty());
    assert_eq!(bench.marks(), 1);
    frozen.thaw().unwrap();
}

fn a_mount_in_another_namespace_is_frozen() {
    let bench = Bench::new("ext4");
    let disk = LoopDisk::new(bench.folder.path(), "other", 64 * MIB);
    disk.mkfs("ext4");
    let keeper = rig::mount_in_other_namespace(&disk.path, &bench.folder.path().join("hidden"));
    let seen = format!(
        "/proc/{}/root{}/hidden",
        keeper.0.id(),
        bench.folder.path().display()
    );
    let mut freezer = bench.freezer();
    let frozen = freezer.freeze(&filesystems(&disk.path), LIMIT).unwrap();
    let mut writer = writer(Path::new(&seen));
    sleep(Duration::from_millis(100));
    assert!(!is_done(&mut writer.0));
    frozen.thaw().unwrap();
    until(SOON, || is_done(&mut writer.0));
}

fn a_filesystem_in_a_file_is_frozen_before_its_host() {
    let bench = Bench::new("ext4");
    let inner = LoopDisk::new(&bench.mounted.point, "inner", 128 * MIB);
    inner.mkfs("ext4");
    let inner = Mounted::new(&inner.path, &bench.folder.path().join("inner"));
    let mut file = fs::File::create(inner.point.join("data")).unwrap();
    // Dirty data within the inner one must pass through the outer one as it freezes.
    file.write_all(&vec![7; 32 << 20]).unwrap();
    drop(file);
    let mut freezer = bench.freezer();
    let filesystems = bench.filesystems();
    assert_eq!(filesystems.len(), 2);
    let frozen = freezer
        .freeze(&filesystems, Duration::from_secs(20))
        .unwrap();
    frozen.thaw().unwrap();
    assert!(writes_pass(&inner.point));
}

fn the_disk_of_the_mark_itself_can_be_frozen() {
    let bench = Bench::new("ext4");
    let run_dir = bench.mounted.point.join("run");
    let mut freezer = Freezer::guarded(&run_dir);
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    frozen.thaw().unwrap();
    assert_eq!(fs::read_dir(run_dir).unwrap().count(), 0);
}

fn the_watchdog_ends_with_the_agent() {
    let bench = Bench::new("ext4");
    let mut freezer = bench.freezer();
    let frozen = freezer.freeze(&bench.filesystems(), LIMIT).unwrap();
    let watchdog = bench.watchdog();
    frozen.thaw().unwrap();
    assert!(is_running(watchdog));
    // Between freezes it holds no mount.
    run("umount", &[&bench.mounted.point]);
    run("mount", &[&bench.disk.path, &bench.mounted.point]);
    drop(freezer);
    assert!(!is_running(watchdog));
}

fn a_watchdog_that_does_not_start_freezes_nothing() {
    let bench = Bench::new("ext4");
    for (program, argument) in [
        ("/no/such/program", ""),
        ("/bin/true", ""),
        ("/bin/echo", "hello"),
    ] {
        let command = watchdog::Command::new(program, [argument]);
        let mut freezer = Freezer::guarded_by(command, bench.run_dir());
        let error = freezer.freeze(&bench.filesystems(), LIMIT).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
    }
    assert!(writes_pass(&bench.mounted.point));
    // And the command is not for people.
    let by_hand = Command::new("/proc/self/exe")
        .arg("watchdog")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!by_hand.status.success());
}
