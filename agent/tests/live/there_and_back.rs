//! The whole road: a virtual machine whose two disks are protected commits transactions in
//! PostgreSQL; its host is gone; it goes on elsewhere, from the newest point, then from an earlier
//! one; what it does there is protected; it comes home with everything; and it goes over once
//! more, by plan, and lacks nothing. Each time PostgreSQL itself says what it has.

use std::path::PathBuf;
use std::time::Duration;

use libreplica::machine::{MachineDefinition, Source};

use crate::stage::{Daemon, Guest, LoopDevice, Place, guest_disks, recovered};

const MACHINE: &str = r#"
    name = "db1"
    memory = "384M"
    life = { console = "guest: ready" }
    [[disk]]
    [[disk]]
    volume = "wal"
    serial = "WAL1"
"#;

const VOLUMES: [&str; 2] = ["root", "wal"];
/// The console's lines lag behind the commits by what a terminal's buffer holds, and QEMU's.
const LAG: u64 = 600;

struct Side {
    place: Place,
    daemon: Daemon,
}

impl Side {
    fn new() -> Self {
        let place = Place::new();
        let daemon = Daemon::start(&place);
        Self { place, daemon }
    }

    /// Does a command for each of the disks.
    #[track_caller]
    fn each(&self, command: &str, more: &[&str]) {
        for volume in VOLUMES {
            let args = [&[command, volume][..], more].concat();
            self.daemon.replica(&args).ok();
        }
    }

    /// Fails both disks over; where they are served.
    #[track_caller]
    fn over(&self, how: &[&str]) -> [Source; 2] {
        VOLUMES.map(|volume| {
            let socket = self.place.at(&format!("{volume}.nbd"));
            let nbd = format!("unix:{}", socket.display());
            let args = [&["failover", volume, "--nbd", &nbd][..], how].concat();
            self.daemon.replica(&args).ok();
            Source::Nbd(socket)
        })
    }
}

fn boot(place: &Place, disks: &[Source]) -> Guest {
    let machine = MachineDefinition::from_toml(MACHINE).unwrap();
    let mut guest = Guest::start(place, &machine, disks);
    guest.hears("guest: ready");
    guest
}

/// What PostgreSQL had at the start: all from the first to the last, which is given.
#[track_caller]
fn last(guest: &Guest) -> u64 {
    let (count, last) = recovered(&guest.said());
    assert_eq!(count, last, "a transaction between others is missing");
    last
}

/// Shuts it down; the last that it committed.
fn stop(mut guest: Guest) -> u64 {
    guest.tell("pause");
    // What is in the pipe to PostgreSQL is committed still.
    let mut same = (0, 0);
    while same.1 < 3 {
        std::thread::sleep(Duration::from_millis(500));
        guest.tell("count");
        let said = guest.hears("recovered");
        let last: u64 = said.split_once(' ').unwrap().1.parse().unwrap();
        same = if same.0 == last {
            (last, same.1 + 1)
        } else {
            (last, 0)
        };
    }
    guest.tell("stop");
    guest.hears("stopped");
    same.0
}

/// A point of both disks, and the commits that it must and that it may have.
fn point(side: &Side, guest: &mut Guest) -> ([String; 2], std::ops::RangeInclusive<u64>) {
    let before = guest.committed();
    let options = ["--consistency", "crash"];
    side.daemon.point("root", &options);
    let after = guest.committed() + LAG;
    let points = VOLUMES.map(|volume| {
        let point = &side.daemon.status(volume)["last_point"]["id"];
        point.as_str().unwrap().to_owned()
    });
    // What must not be there follows.
    guest.commits(after + 100);
    (points, before..=after)
}

#[test]
fn a_machine_goes_over_and_comes_home() {
    let files = Place::new();
    let disks = guest_disks(&files).map(|file| LoopDevice::over(&file, &[]));
    let store = files.folder("store");
    let to = store.to_str().unwrap();
    let mut first = Side::new();
    let sources: Vec<Source> = std::iter::zip(&disks, VOLUMES)
        .map(|(disk, name)| {
            let device = disk.path().to_str().unwrap();
            let args = ["protect", device, "--to", to, "--name", name, "--wait"];
            let options = ["--capture", "nbd", "--every", "1h", "--group", "db1"];
            let reply = first.daemon.replica(&[&args[..], &options].concat());
            Source::Nbd(PathBuf::from(reply.ok().split_once("socket=").unwrap().1))
        })
        .collect();
    let mut guest = boot(&files, &sources);
    guest.commits(100);
    let (earlier, has_earlier) = point(&first, &mut guest);
    let (_, has_newest) = point(&first, &mut guest);
    first.daemon.kill();
    drop(guest);

    // Elsewhere, with nothing but the store: from the newest point, then from an earlier one.
    let other = Side::new();
    other.daemon.replica(&["adopt", to]).ok();
    let served = other.over(&["--unplanned", "--point", "latest-processed"]);
    let guest = boot(&other.place, &served);
    assert!(has_newest.contains(&last(&guest)), "{has_newest:?}");
    drop(guest);
    for (volume, point) in std::iter::zip(VOLUMES, &earlier) {
        let args = ["change-point", volume, "--point", point];
        other.daemon.replica(&args).ok();
    }
    let mut guest = boot(&other.place, &served);
    let kept = last(&guest);
    assert!(has_earlier.contains(&kept), "{has_earlier:?}");
    other.each("commit", &["--yes"]);
    other.each("reprotect", &["--every", "1s"]);
    guest.commits(kept + 200);
    let done = stop(guest);

    // Home: the original boots, with everything.
    first.daemon.start_again();
    for volume in VOLUMES {
        first
            .daemon
            .until("it is fenced", volume, |v| v["state"] == "failed_over");
    }
    first.each("failback", &[]);
    for volume in VOLUMES {
        first
            .daemon
            .until("it is home", volume, |v| v["state"] == "replicating");
    }
    let mut guest = boot(&files, &sources);
    assert_eq!(last(&guest), done);
    guest.commits(done + 100);
    let done = stop(guest);

    let served = other.over(&["--planned"]);
    let guest = boot(&other.place, &served);
    assert_eq!(last(&guest), done, "a planned failover lost something");
    drop(guest);
}
