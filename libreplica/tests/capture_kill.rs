//! Whoever holds the tracker is killed at any moment, again and again, while the device is
//! written to: whoever comes next finds everything. The one that is killed is this test's
//! own program, started again as a worker that keeps a copy of the device in a file.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use devices::{Loop, MIB, Pinned, write_direct};
use libreplica::ErrorKind;
use libreplica::capture::{AttachSpec, Tracker, WidenCause, list_pins};
use libreplica::device::BlockDevice;
use libreplica::sys::reader::{Reader, ReaderOptions};

const WORKER: &str = "REPLICA_TEST_WORKER";

/// Takes the tracker over, or attaches it, and what it may not have been told yet.
fn take(spec: &AttachSpec, begun: &Path) -> Tracker {
    let mut tracker = match Tracker::adopt(spec) {
        Ok(tracker) => tracker,
        Err(error) if error.kind() == ErrorKind::NotFound => Tracker::attach(spec).unwrap(),
        Err(error) => panic!("{error}"),
    };
    if !begun.exists() {
        tracker.mark_all(WidenCause::Asked);
        fs::write(begun, "").unwrap();
    }
    tracker.reclaim();
    tracker
}

/// One round into the copy.
fn round(tracker: &mut Tracker, reader: &mut Reader, copy: &fs::File) {
    let report = tracker.swap().unwrap();
    assert_eq!(report.widened, None);
    let geometry = tracker.geometry();
    let runs: Vec<_> = tracker
        .round()
        .runs()
        .map(|run| geometry.extent_of(run))
        .collect();
    let mut pieces = reader.pieces(runs);
    while let Some((extent, bytes)) = pieces.next().unwrap() {
        copy.write_all_at(bytes, extent.offset().get()).unwrap();
    }
    drop(pieces);
    tracker.finish_round();
}

struct Place {
    spec: AttachSpec,
    copy: PathBuf,
    begun: PathBuf,
}

impl Place {
    fn open(&self) -> (Tracker, Reader, fs::File) {
        let disk = &self.spec.disk;
        let reader =
            Reader::open(disk.node(), disk.logical_sector(), ReaderOptions::default()).unwrap();
        let copy = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.copy)
            .unwrap();
        (take(&self.spec, &self.begun), reader, copy)
    }
}

/// The worker: does rounds until it is killed.
#[test]
fn worker() {
    let Ok(arguments) = std::env::var(WORKER) else {
        return;
    };
    let mut arguments = arguments.split(' ');
    let mut next = || arguments.next().unwrap();
    let disk = BlockDevice::open(Path::new(next())).unwrap();
    let volume = next().parse().unwrap();
    let mut spec = AttachSpec::new(devices::FOLDER, volume, disk, devices::BLOCK);
    spec.pins = next().into();
    let place = Place {
        spec,
        copy: next().into(),
        begun: next().into(),
    };
    let (mut tracker, mut reader, copy) = place.open();
    for turn in 0.. {
        round(&mut tracker, &mut reader, &copy);
        match turn % 3 {
            0 => tracker.acknowledge().unwrap(),
            1 => tracker.reclaim(),
            _ => {}
        }
    }
}

struct Files(Vec<PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

#[test]
fn nothing_is_lost_to_kills() {
    let kills: u64 = std::env::var("REPLICA_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(6);
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let copy = disk.file.with_extension("copy");
    let begun = disk.file.with_extension("begun");
    let _files = Files(vec![copy.clone(), begun.clone()]);
    fs::File::create(&copy).unwrap().set_len(16 * MIB).unwrap();
    let place = Place {
        spec: pinned.spec.clone(),
        copy,
        begun,
    };
    let arguments = format!(
        "{} {} {} {} {}",
        disk.name(),
        place.spec.volume,
        place.spec.pins.display(),
        place.copy.display(),
        place.begun.display()
    );
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let _stop = devices::StopAtEnd(&stop);
        for thread in 1..=2_u64 {
            let (stop, written, path) = (&stop, &written, &disk.path);
            scope.spawn(move || {
                let mut random = devices::Random(thread);
                while !stop.load(Ordering::Relaxed) {
                    let at = random.below(16 * MIB / 512 - 16) * 512;
                    let len = (1 + random.below(16) as usize) * 512;
                    write_direct(path, at, len, random.next() as u8);
                    written.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(random.below(500)));
                }
            });
        }
        let mut random = devices::Random(99);
        for kill in 0..kills {
            let mut worker = Command::new(std::env::current_exe().unwrap())
                .args(["worker", "--exact", "--nocapture"])
                .env(WORKER, &arguments)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            // Soon enough at times to hit it while it attaches or adopts.
            let limit = if kill % 2 == 0 { 60 } else { 500 };
            std::thread::sleep(Duration::from_millis(random.below(limit)));
            assert_eq!(
                worker.try_wait().unwrap(),
                None,
                "the worker failed by itself"
            );
            worker.kill().unwrap();
            worker.wait().unwrap();
            std::thread::sleep(Duration::from_millis(random.below(20)));
        }
    });
    assert!(written.load(Ordering::Relaxed) > kills);
    let (mut tracker, mut reader, copy) = place.open();
    devices::wait_until_settled(&tracker);
    round(&mut tracker, &mut reader, &copy);
    assert_eq!(tracker.pending().count(), 0);
    assert!(fs::read(&place.copy).unwrap() == fs::read(&disk.path).unwrap());
    let left = list_pins(&place.spec.pins).unwrap();
    assert_eq!(left.len(), 1);
}
