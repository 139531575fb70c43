//! The machine's side: what starts at boot. It finds a volume, a state folder and a store on
//! three disks; looks what the last cut has left; and loads the volume until the next.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::kept::{Kept, changed_by};
use crate::stage::{Bank, Daemon, Fio, LoopDevice, MIB, Mount, Place, restore, run, until};

/// The argument that makes this program the machine's.
pub const ROLE: &str = "--machine";
/// What it says when the load runs.
pub const LOADED: &str = "loaded";

const VOLUME: &str = "/dev/vda";
/// The same at every boot, for the settings name the store.
const FOLDER: &str = "/srv/power";

/// Which boot it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing is protected yet.
    First,
    /// After a cut, before another.
    Again,
    /// After the last cut.
    Last,
}

/// How the volume is replicated when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// All the time.
    Shipped,
    /// Not at all any more; and the agent was killed meanwhile. What was written before that
    /// is dirty in the ledger, and what came after is in the activity log.
    Held,
}

/// What the machine knows to be durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Transactions of the database.
    transactions: u64,
    /// Numbers in the file that is flushed after each.
    numbers: u64,
}

impl Said {
    /// From a line of the machine's.
    pub fn parse(line: &str) -> Option<Self> {
        let (transactions, numbers) = line.strip_prefix("durable ")?.split_once(' ')?;
        Some(Self {
            transactions: transactions.parse().ok()?,
            numbers: numbers.parse().ok()?,
        })
    }
}

/// What this program is started with in the machine.
pub fn arguments(stage: Stage, durable: Said, load: Load) -> Vec<String> {
    vec![
        ROLE.to_owned(),
        format!("{stage:?}"),
        format!("durable {} {}", durable.transactions, durable.numbers),
        format!("{load:?}"),
    ]
}

/// A boot.
pub fn boot(arguments: &[String]) {
    let [stage, durable, load] = arguments else {
        panic!("{arguments:?}");
    };
    let durable = Said::parse(durable).unwrap();
    let machine = Machine::new();
    if stage == "First" {
        let mut daemon = machine.daemon();
        let store = machine.store.path().to_str().unwrap();
        let how = [
            "--name",
            "v",
            "--capture",
            "ublk",
            "--every",
            "2s",
            "--wait",
        ];
        let protect = [&["protect", VOLUME, "--to", store][..], &how].concat();
        let device = daemon.replica(&protect).ok().to_owned();
        // Without a discard of all, which would make every region one that is written.
        run("mkfs.ext4", ["-qE", "nodiscard", &device]);
        let mount = Mount::new(Path::new(&device), &machine.place.at("mnt"), "defaults");
        let bank = Bank::open(mount.path());
        machine.load(&mut daemon, &mount, &bank, load);
    } else {
        let mut daemon = machine.look(durable);
        if stage == "Last" {
            assert!(daemon.terminate().success());
            return;
        }
        let device = daemon.status("v")["address"].as_str().unwrap().to_owned();
        let mount = Mount::new(Path::new(&device), &machine.place.at("mnt"), "defaults");
        let bank = Bank::resume(mount.path());
        machine.load(&mut daemon, &mount, &bank, load);
    }
}

struct Machine {
    place: Place,
    state: Mount,
    store: Mount,
}

impl Machine {
    fn new() -> Self {
        let mount = |disk: &str, name: &str| {
            Mount::new(Path::new(disk), &Path::new(FOLDER).join(name), "defaults")
        };
        Self {
            place: Place::new(),
            state: mount("/dev/vdb", "state"),
            store: mount("/dev/vdc", "store"),
        }
    }

    /// Log and socket are in memory, and new with each boot.
    fn daemon(&self) -> Daemon {
        let (socket, log) = (self.place.at("agent.sock"), self.place.at("agent.log"));
        Daemon::start_with(&self.state.at("agent"), &socket, &log)
    }

    /// Starts the agent after a cut, and judges what it makes of what it finds.
    fn look(&self, durable: Said) -> Daemon {
        let kept = Kept::read(&only_in(&self.state.at("agent/volumes")));
        let before = self.logs();
        let daemon = self.daemon();
        if daemon.status("v")["state"] == "paused" {
            daemon.replica(&["resume", "v"]).ok();
        }
        let status = daemon.until("it replicates", "v", |status| {
            status["mode"] == "data" && status["state"] == "replicating"
        });
        // Nobody uses the volume yet: whatever is shipped is what was compared.
        let point = daemon.point("v", &["--consistency", "crash"]);
        let (dirty, active) = (kept.dirty_bytes(), kept.active_bytes());
        let mut shipped = 0;
        for log in self.logs().difference(&before) {
            for range in changed_by(log) {
                shipped += range.end - range.start;
                assert!(
                    kept.covers(range.clone()),
                    "{range:?} was not to be read again"
                );
            }
        }
        println!("{dirty} bytes were dirty, {active} active, {shipped} were shipped");
        assert!(shipped <= kept.bytes());
        assert!(kept.bytes() < status["size_bytes"].as_u64().unwrap());
        let said = format!(
            "the machine was restarted; {dirty} bytes were not yet in the store, and {active} \
             were being written"
        );
        let log = daemon.log_text();
        assert!(log.contains(&said), "nothing of `{said}`: {log}");
        daemon.assert_no_resync("v");

        let image = restore(&self.place, self.store.path(), "v", &point);
        run("blockdev", ["--flushbufs", VOLUME]);
        run("cmp", [Path::new(VOLUME), &image]);
        self.check(&image, durable);
        daemon
    }

    /// What was durable is in the image, and its filesystem is sound.
    fn check(&self, image: &Path, durable: Said) {
        let device = LoopDevice::over(image, &[]);
        let mount = Mount::new(device.path(), &self.place.at("checked"), "defaults");
        let transactions = Bank::check(mount.path(), &self.place);
        let numbers = fs::read(mount.at(NUMBERS)).unwrap_or_default();
        mount.unmount();
        drop(device);
        run("e2fsck", ["-fn", image.to_str().unwrap()]);
        assert!(
            transactions >= durable.transactions,
            "{transactions} transactions of {}",
            durable.transactions
        );
        let (end, start) = (durable.numbers, durable.numbers.saturating_sub(SLOTS));
        for number in start + 1..=end {
            let at = place_of(number) as usize;
            let found = u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
            assert!(found >= number, "{number} is lost, {found} is in its place");
        }
        fs::remove_file(image).unwrap();
    }

    /// The logs of the store.
    fn logs(&self) -> BTreeSet<PathBuf> {
        let logs = only_in(&self.store.at("volumes")).join("logs");
        let logs = fs::read_dir(logs).unwrap();
        logs.map(|entry| entry.unwrap().path()).collect()
    }

    /// Loads the volume until the power goes.
    fn load(&self, daemon: &mut Daemon, mount: &Mount, bank: &Bank, load: &str) {
        let numbers = count(&mount.at(NUMBERS));
        let file = mount.at("load");
        let mut fio = Fio::start(&self.place, &file, 16 * MIB, 2);
        let progress = |what: &str| {
            let (transactions, number) = (bank.acknowledged(), numbers.load(Ordering::SeqCst));
            until(what, Duration::from_secs(60), || {
                let further = bank.acknowledged() > transactions
                    && numbers.load(Ordering::SeqCst) > number + 3;
                further.then_some(())
            });
        };
        progress("the load runs");
        if load == "Held" {
            daemon.replica(&["pause", "v"]).ok();
            progress("the load runs while nothing is shipped");
            daemon.kill();
            daemon.start_again();
            progress("the load runs on");
        }
        println!("{LOADED}");
        let mut said = (0, 0);
        loop {
            let now = (bank.acknowledged(), numbers.load(Ordering::SeqCst));
            if now != said {
                println!("durable {} {}", now.0, now.1);
                said = now;
            }
            std::thread::sleep(Duration::from_millis(10));
            fio.assert_running();
        }
    }
}

/// A file of numbers, flushed after each.
const NUMBERS: &str = "numbers";
/// So many of the last are in it.
const SLOTS: u64 = 64;

fn place_of(number: u64) -> u64 {
    number % SLOTS * 4096
}

/// Writes numbers into a file, without end; the last that is durable.
fn count(path: &Path) -> Arc<AtomicU64> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(path).unwrap();
    let mut slot = [0; 8];
    let slots = (0..SLOTS).map(|n| match file.read_exact_at(&mut slot, place_of(n)) {
        Ok(()) => u64::from_le_bytes(slot),
        Err(_) => 0,
    });
    let last = Arc::new(AtomicU64::new(slots.max().unwrap()));
    let durable = Arc::clone(&last);
    std::thread::spawn(move || {
        loop {
            let next = durable.load(Ordering::SeqCst) + 1;
            file.write_all_at(&next.to_le_bytes(), place_of(next))
                .unwrap();
            file.sync_data().unwrap();
            durable.store(next, Ordering::SeqCst);
        }
    });
    last
}

/// The only folder in `folder`.
fn only_in(folder: &Path) -> PathBuf {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().flatten().collect();
    entries.retain(|entry| entry.path().is_dir());
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries[0].path()
}
