//! The kernel's own NBD client against the agent's server, with a filesystem on it; and cuts
//! of the stream that was recorded meanwhile, at random: each is what an independent recorder
//! between the two saw acknowledged up to there, and ext4 recovers its journal on it. On the
//! test bench only (`scripts/vm-test`), whose kernel has the module.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "the stories use a part of the stage")]

#[path = "inline_rig/kernel_nbd.rs"]
mod kernel_nbd;
#[path = "inline_rig/recorder.rs"]
mod recorder;
#[path = "../../libreplica/tests/rig/runner.rs"]
mod runner;
#[path = "live/stage/mod.rs"]
#[allow(unused_imports, reason = "as above")]
mod stage;
#[path = "inline_rig/stream.rs"]
mod stream;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kernel_nbd::KernelNbd;
use recorder::{Acknowledged, Recorder, now};
use stage::{Bank, Daemon, LoopDevice, MIB, Mount, Place, assert_restores, number, restore, run};
use stream::Record;

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        (
            "the_kernels_client_over_four_connections",
            the_kernels_client_over_four_connections,
        ),
        (
            "every_cut_is_what_was_acknowledged_and_ext4_recovers_on_it",
            every_cut_is_what_was_acknowledged_and_ext4_recovers_on_it,
        ),
    ])
}

/// Protects `disk` as volume `v`; gives the socket of its server.
fn protect(daemon: &Daemon, disk: &Path, store: &Path) -> PathBuf {
    let (disk, store) = (disk.to_str().unwrap(), store.to_str().unwrap());
    let args = [
        "protect", disk, "--to", store, "--name", "v", "--every", "1h",
    ];
    let reply = daemon.replica(&[&args[..], &["--capture", "nbd", "--wait"]].concat());
    PathBuf::from(reply.ok().split_once("socket=").unwrap().1)
}

fn the_kernels_client_over_four_connections() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 48 * MIB);
    let daemon = Daemon::start(&place);
    let socket = protect(&daemon, disk.path(), &store);
    let client = KernelNbd::connect(&socket, 4);
    let mount = Mount::make("ext4", client.path(), &place.at("mnt"));
    let file = mount.at("file");
    run(
        "fio",
        [
            "--name=load",
            &format!("--filename={}", file.display()),
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--bsrange=4k-128k",
            "--size=12m",
            "--iodepth=32",
            "--fsync=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ],
    );
    fs::write(mount.at("given-up"), vec![1; 12 << 20]).unwrap();
    mount.sync();
    fs::remove_file(mount.at("given-up")).unwrap();
    mount.sync();
    run("fstrim", [mount.path()]);
    mount.unmount();
    run("e2fsck", ["-fn", client.path().to_str().unwrap()]);
    let point = daemon.point("v", &[]);
    let status = daemon.status("v");
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
    assert_eq!(status["mode"], "data", "{status}");
    client.disconnect();
    daemon.unprotect("v");
    drop(daemon);
    assert_restores(&place, &store, "v", &point, disk.path());
}

/// Small, for it is restored often.
const SIZE: u64 = 32 * MIB;

/// What a run of the load left behind.
struct Run {
    acknowledged: Vec<Acknowledged>,
    /// How many of them made the filesystem.
    made: usize,
    /// Moments at which it was written to.
    times: Vec<u64>,
    /// What the store has of the others.
    stream: Vec<Record>,
}

fn every_cut_is_what_was_acknowledged_and_ext4_recovers_on_it() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", SIZE);
    let run = record(&place, &store, &disk);
    let n = run.acknowledged.len();
    println!("{n} changes, of which {} made the filesystem", run.made);
    assert_same_order(&run);
    let seed = u64::from(std::process::id()) ^ now();
    println!("seed {seed}");
    let mut random = Random(seed | 1);
    let cuts = number("REPLICA_CUTS", 6) as usize;
    let mut counts: Vec<usize> = (0..cuts)
        .map(|_| run.made + random.below(n - run.made) + 1)
        .collect();
    counts.sort_unstable();
    let mut image = vec![0; SIZE as usize];
    let (mut applied, mut recovered) = (0, 0);
    let began = Instant::now();
    for count in counts {
        for change in &run.acknowledged[applied..count] {
            change.apply(&mut image);
        }
        applied = count;
        let cut = run.stream[count - run.made - 1].moment();
        let restored = restore(&place, &store, "v", &cut);
        assert_same(&fs::read(&restored).unwrap(), &image, &cut);
        recovered += usize::from(recovers(&place, &restored) == Journal::Replayed);
        fs::remove_file(restored).unwrap();
    }
    assert!(recovered > 0, "no cut lay within a transaction");
    println!("{cuts} cuts in {:?}", began.elapsed());
    for time in &run.times {
        assert_time(&place, &store, &run, *time);
    }
}

/// A filesystem on the kernel's client, under load, over a proxy that records.
fn record(place: &Place, store: &Path, disk: &LoopDevice) -> Run {
    let daemon = Daemon::start(place);
    let socket = protect(&daemon, disk.path(), store);
    let recorder = Recorder::start(&place.at("recorder.sock"), &socket);
    let client = KernelNbd::connect(recorder.socket(), 1);
    let node = client.path().to_str().unwrap();
    let how = ["-q", "-b", "4096", "-J", "size=4", "-E", "nodiscard", node];
    run("mkfs.ext4", how);
    run("blockdev", ["--flushbufs", node]);
    // A longer change is recorded in pieces.
    fs::write("/sys/block/nbd0/queue/discard_max_bytes", "16777216").unwrap();
    let made = recorder.count();
    let mount = Mount::new(client.path(), &place.at("mnt"), "discard,data=ordered");
    // Half the time is without such an end.
    let rounds = 2 + number("REPLICA_CUTS", 6) / 50;
    let mut times = Vec::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bank = Bank::open(mount.path());
        for n in 0..2 {
            let (mount, stop) = (&mount, &stop);
            scope.spawn(move || come_and_go(&mount.at(&format!("files{n}")), stop));
        }
        // Epochs end under load; their ends are cuts of the stream like others.
        for _ in 0..rounds {
            std::thread::sleep(Duration::from_secs(2));
            times.push(now());
            daemon.point("v", &["--consistency", "crash"]);
            std::thread::sleep(Duration::from_millis(700));
        }
        stop.store(true, Ordering::Relaxed);
        bank.close();
    });
    mount.unmount();
    run("blockdev", ["--flushbufs", node]);
    daemon.point("v", &[]);
    let windows = daemon.replica(&["points", "v", "--json"]).json();
    assert_eq!(windows["windows"].as_array().unwrap().len(), 1, "{windows}");
    client.disconnect();
    daemon.unprotect("v");
    let acknowledged = recorder.end();
    let later = &acknowledged[made..];
    let long = later.iter().find(|change| change.len > 32 * MIB);
    assert!(long.is_none(), "{:?}", long.map(Acknowledged::shape));
    let mut stream = stream::of(store);
    let before = stream.len().checked_sub(later.len());
    stream.drain(..before.expect("the stream lacks some"));
    Run {
        acknowledged,
        made,
        times,
        stream,
    }
}

/// Files are written, made durable, renamed and removed.
fn come_and_go(folder: &Path, stop: &AtomicBool) {
    fs::create_dir(folder).unwrap();
    for n in 0_usize.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (new, name) = (folder.join("new"), folder.join(format!("{}", n % 24)));
        fs::write(&new, vec![n as u8; 1000 + n * 7919 % 120_000]).unwrap();
        if n % 3 != 0 {
            File::open(&new).unwrap().sync_all().unwrap();
        }
        fs::rename(&new, &name).unwrap();
        if n % 5 == 0 {
            let _ = fs::remove_file(folder.join(format!("{}", (n / 5) % 24)));
        }
    }
}

/// One connection is answered in the order in which the device was done, and so is the
/// stream: no change is missing, none is there twice, none that failed.
fn assert_same_order(run: &Run) {
    let later = &run.acknowledged[run.made..];
    let seen = later.iter().map(Acknowledged::shape);
    let kept = run.stream.iter().map(Record::shape);
    let differs = seen.zip(kept).position(|(seen, kept)| seen != kept);
    if let Some(at) = differs {
        let (seen, kept) = (later[at].shape(), run.stream[at].shape());
        panic!("change {at} was {seen:?}, the stream has {kept:?}");
    }
}

fn assert_same(restored: &[u8], image: &[u8], cut: &str) {
    if restored == image {
        return;
    }
    let mut blocks = restored.chunks(4096).zip(image.chunks(4096));
    let differs = blocks.position(|(a, b)| a != b);
    panic!("the state at {cut} differs from block {differs:?} on");
}

/// The state at a time: all that was acknowledged by then, nothing that was sent later.
fn assert_time(place: &Place, store: &Path, run: &Run, time: u64) {
    let text = stream::rfc3339(time);
    let restored = restore(place, store, "v", &text);
    let content = fs::read(&restored).unwrap();
    let all = &run.acknowledged;
    let least = all.iter().filter(|change| change.answered <= time).count();
    let later = all.iter().position(|change| change.sent > time);
    let most = later.unwrap_or(all.len());
    assert!(least > run.made && least <= most, "{least}..{most}");
    let mut image = vec![0; content.len()];
    all[..least]
        .iter()
        .for_each(|change| change.apply(&mut image));
    let mut rest = all[least..most].iter();
    while content != image {
        let next = rest.next();
        let next = next.unwrap_or_else(|| panic!("{text} is none of {least}..={most} changes"));
        next.apply(&mut image);
    }
    recovers(place, &restored);
    fs::remove_file(restored).unwrap();
}

#[derive(Debug, PartialEq, Eq)]
enum Journal {
    Empty,
    Replayed,
}

/// Mounting an image replays its journal, and leaves nothing that is wrong.
fn recovers(place: &Place, image: &Path) -> Journal {
    let path = image.to_str().unwrap();
    let before = run("dumpe2fs", ["-h", path]);
    let device = LoopDevice::over(image, &[]);
    Mount::new(device.path(), &place.at("recovered"), "data=ordered").unmount();
    let began = Instant::now();
    drop(device);
    run("e2fsck", ["-fn", path]);
    assert!(began.elapsed() < Duration::from_secs(60));
    if before.contains("needs_recovery") {
        Journal::Replayed
    } else {
        Journal::Empty
    }
}

/// Numbers by xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}
