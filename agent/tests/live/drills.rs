//! Drills: a virtual machine whose two disks are protected commits transactions in PostgreSQL; a
//! point of both is booted beside it, and what PostgreSQL makes of it is compared with what had
//! been reported as committed.

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use libreplica::machine::{MachineDefinition, Source};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::stage::{
    BOOT_LIMIT, Daemon, Guest, LoopDevice, Place, guest_disks, path_with_qemu, recovered, until,
};

const MACHINE: &str = r#"
    name = "db1"
    memory = "384M"
    life = { console = "guest: ready" }
    [[disk]]
    [[disk]]
    volume = "wal"
    serial = "WAL1"
    [[network]]
    source = "production"
    address = "10.0.2.15/24"
"#;

/// The console's lines lag behind the commits by what a terminal's buffer holds, and QEMU's.
const LAG: u64 = 600;

/// Protects a disk behind an NBD server, in the group of its machine; gives what QEMU takes.
fn protect(daemon: &Daemon, disk: &LoopDevice, name: &str, store: &Path) -> Source {
    let device = disk.path().to_str().unwrap();
    let to = store.to_str().unwrap();
    let args = ["protect", device, "--to", to, "--name", name, "--wait"];
    let options = ["--capture", "nbd", "--every", "1h", "--group", "db1"];
    let reply = daemon.replica(&[&args[..], &options].concat());
    let socket = reply.ok().split_once("socket=").unwrap().1;
    Source::Nbd(socket.into())
}

fn drill(daemon: &Daemon, more: &[&str]) -> Output {
    let args = [&["drill", "root", "--accelerator", "tcg"][..], more].concat();
    let mut command = daemon.command(&args);
    command.env("PATH", path_with_qemu()).output().unwrap()
}

#[track_caller]
fn json(output: &Output) -> serde_json::Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {errors}"))
}

/// What drills have shown of a volume's point, as `points` has it.
fn proven(daemon: &Daemon, volume: &str, point: &str) -> serde_json::Value {
    let listed = daemon.replica(&["points", volume, "--json"]).json();
    let points = listed["points"].as_array().unwrap();
    let found = points.iter().find(|one| one["id"] == point);
    found.unwrap_or_else(|| panic!("no {point}: {listed}"))["proven"].clone()
}

/// The id of the point of `volume` that was made last.
fn newest(daemon: &Daemon, volume: &str) -> String {
    daemon.status(volume)["last_point"]["id"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// The names of whatever begins with `prefix` in a folder.
fn names(folder: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Nothing of a drill is left: no branch in the store.
#[track_caller]
fn assert_clean(store: &Path) {
    for volume in names(&store.join("volumes"), "") {
        let branches = store.join("volumes").join(volume).join("branches");
        let left: Vec<String> = names(&branches, "")
            .into_iter()
            .filter(|name| branches.join(name).is_dir())
            .collect();
        assert_eq!(left, [] as [&str; 0], "in {}", branches.display());
    }
}

#[test]
fn a_drill_shows_every_transaction_of_before_the_point_and_none_after() {
    let place = Place::new();
    let store = place.folder("store");
    let disks = guest_disks(&place).map(|file| LoopDevice::over(&file, &[]));
    let daemon = Daemon::start(&place);
    let sources = [
        protect(&daemon, &disks[0], "root", &store),
        protect(&daemon, &disks[1], "wal", &store),
    ];
    let definition = place.at("machine.toml");
    fs::write(&definition, MACHINE).unwrap();
    let file = definition.to_str().unwrap();
    daemon.replica(&["machine", "set", "root", file]).ok();
    let machine = MachineDefinition::from_toml(MACHINE).unwrap();

    let mut guest = Guest::start(&place, &machine, &sources);
    guest.hears("guest: ready");
    guest.commits(100);
    let before = guest.committed();
    daemon.point("root", &["--consistency", "crash"]);
    let after = guest.committed() + LAG;
    let [root, wal] = ["root", "wal"].map(|volume| newest(&daemon, volume));
    // The drill is to find the point, not the newest that there is.
    guest.commits(after + 100);

    let console = place.at("console");
    let console_option = ["--console", console.to_str().unwrap()];
    let limit = format!("{}s", BOOT_LIMIT.as_secs());
    let asked = ["--point", root.as_str(), "--timeout", &limit, "--json"];
    let during = guest.committed();
    let output = drill(&daemon, &[&asked[..], &console_option].concat());
    let said = fs::read_to_string(&console).unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{said}");
    let told = json(&output);
    assert_eq!(
        (&told["verdict"], &told["point"]),
        (&"alive".into(), &root.as_str().into())
    );

    let (count, last) = recovered(&said);
    assert_eq!(
        count, last,
        "a transaction between others is missing: {said}"
    );
    assert!(
        (before..=after).contains(&last),
        "{before} to {after} expected: {said}"
    );
    assert!(
        said.contains("automatic recovery in progress"),
        "no recovery was needed: {said}"
    );
    assert!(
        guest.committed() > during,
        "the machine stood still while its point was drilled"
    );

    for (volume, point) in [("root", &root), ("wal", &wal)] {
        let proven = proven(&daemon, volume, point);
        assert_eq!(proven["verdict"], "alive", "{volume}: {proven}");
        assert!(proven["seconds"].as_f64().unwrap() > 0.5, "{proven}");
    }
    let listed = daemon.replica(&["points", "root"]);
    assert!(listed.ok().contains("alive ") && listed.ok().contains("not drilled"));
    assert_clean(&store);

    drills_that_fail_leave_nothing(&daemon, &place, &store, &root);
    guest.tell("stop");
    guest.hears("stopped");
    for volume in ["root", "wal"] {
        daemon.replica(&["verify", volume]).ok();
        daemon.unprotect(volume);
    }
}

/// One whose machine says nothing of what is waited for; one that is told to end; and one
/// that is killed, whose leavings the next removes.
fn drills_that_fail_leave_nothing(daemon: &Daemon, place: &Place, store: &Path, point: &str) {
    let other = place.at("other.toml");
    fs::write(&other, MACHINE.replace("guest: ready", "never said")).unwrap();
    let options = ["--machine", other.to_str().unwrap(), "--point", point];
    let silent = [&options[..], &["--timeout", "2s", "--json"]].concat();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let args = [&["drill", "root", "--accelerator", "tcg"][..], &options].concat();
        let mut command = daemon.command(&args);
        command.env("PATH", path_with_qemu()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let qemu = until("QEMU runs", Duration::from_secs(60), || {
            child_of(child.id())
        });
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        assert!(!child.wait().unwrap().success());
        let gone = || (!Path::new(&format!("/proc/{qemu}/fd/0")).exists()).then_some(());
        until("QEMU is gone, too", Duration::from_secs(30), gone);
        if signal == Signal::SIGTERM {
            assert_clean(store);
        }
    }
    let output = drill(daemon, &silent);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output)["verdict"], "silent");
    assert_eq!(proven(daemon, "root", point)["verdict"], "silent");
    assert_clean(store);
}

/// The process id of a process's child that is QEMU by now.
fn child_of(pid: u32) -> Option<String> {
    let all = fs::read_dir("/proc").unwrap();
    let mut names = all
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap());
    names.find(|name| {
        // "PID (NAME) STATE PARENT ..."
        let stat = fs::read_to_string(format!("/proc/{name}/stat")).unwrap_or_default();
        let (head, rest) = stat.split_once(") ").unwrap_or_default();
        let parent = rest.split_whitespace().nth(1);
        head.contains("(qemu-system") && parent == Some(pid.to_string().as_str())
    })
}
