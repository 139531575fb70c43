//! A writer of an encrypted volume is killed with SIGKILL at any moment, and another goes on
//! where it was; again and again. No pair of key and nonce may ever occur with two different
//! contents, in no log that was ever on disk, torn ones included; and what was acknowledged
//! must be there. `REPLICA_CONTINUES` says how often.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hrl_format::VolumeKey;
use hrl_format::layout::{
    FRAME_AUTHENTICATED, FRAME_MAGIC, PAGE, RawFrame, RawTrailer, TRAILER_MAGIC, pages,
};
use libreplica::geometry::Geometry;
use libreplica::id::{LogId, PointId};
use libreplica::record::{Consistency, Record, Tag};
use libreplica::store::{PointSelector, Store, VolumeSpec, VolumeWriter};
use libreplica::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};
use zerocopy::FromBytes;

/// Set for the writer, which is this program again: the folder of its store.
const WRITER: &str = "REPLICA_TEST_WRITER";
const SIZE: u64 = 4 << 20;

fn key() -> VolumeKey {
    VolumeKey::from_bytes([0x5A; 32])
}

/// Random bytes, from the source that ids come from.
fn random() -> [u8; 16] {
    *LogId::random().unwrap().as_bytes()
}

/// The killed program: ships epochs for ever, and prints each point that is durable.
#[test]
fn writer() {
    let Some(folder) = env::var_os(WRITER) else {
        return;
    };
    let store = Store::open_or_create(Path::new(&folder)).unwrap();
    let id = store.find("v").unwrap_or_else(|_| {
        let geometry = Geometry {
            size: VolumeSize::new(SIZE),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let mut spec = VolumeSpec::new("v", geometry).unwrap();
        spec.key = Some(key().key_id());
        store.create_volume(spec).unwrap()
    });
    let mut writer = store.volume_writer(id, Some(key())).unwrap();
    if writer.catalogue().base.is_none() {
        let mut baseline = writer.begin_baseline().unwrap();
        baseline.write(ByteOffset::new(0), &[1; 100_000]).unwrap();
        baseline.finish().unwrap();
    }
    loop {
        let point = ship_epoch(&mut writer);
        println!("\npoint {point}");
        std::io::stdout().flush().unwrap();
        let keep = "#6".parse().unwrap();
        writer.retain(&keep, Timestamp::now()).unwrap();
        writer.fold_step().unwrap();
    }
}

fn ship_epoch(writer: &mut VolumeWriter) -> PointId {
    let mut log = writer.begin_epoch().unwrap();
    for _ in 0..12 {
        let [place, seed, len, ..] = random();
        let data = vec![seed; 512 * (1 + usize::from(len % 64))];
        let offset = ByteOffset::new(u64::from(place) * (SIZE - 65536) / 256 / 512 * 512);
        let extent = Extent::new(offset, ByteLen::new(data.len() as u64)).unwrap();
        let record = Record::Write {
            extent,
            data: &data[..],
        };
        log.append(&record, Timestamp::now()).unwrap();
    }
    let time = Timestamp::now();
    let id = PointId::at(time).unwrap();
    let tag = Tag {
        id,
        time,
        consistency: Consistency::Crash,
        label: "a label is data, too".to_owned(),
        group: None,
        root: None,
    };
    log.append(&Record::Tag(tag), time).unwrap();
    writer.commit(log).unwrap();
    id
}

/// Runs the writer and kills it after `time`; gives the last point it acknowledged.
fn killed_after(folder: &Path, time: Duration) -> Option<PointId> {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture", "--test-threads=1"])
        .env(WRITER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(time);
    // It never ends by itself: if it did, it has failed.
    let ended = child.try_wait().unwrap();
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(ended.is_none(), "the writer failed: {complaint}");
    let lines = BufReader::new(&output.stdout[..]).lines();
    let points = lines.filter_map(|line| line.unwrap().strip_prefix("point ")?.parse().ok());
    points.last()
}

/// What a nonce goes with: each log has a key for its frames and one for its seal. A frame's
/// is that of the log that it was first written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Frames([u8; 16]),
    Seal([u8; 16]),
}

/// Each pair of key and nonce that was ever seen, and what it was used for.
#[derive(Default)]
struct Nonces(BTreeMap<(Key, [u8; 12]), Vec<u8>>);

impl Nonces {
    fn used(&mut self, key: Key, nonce: [u8; 12], what: Vec<u8>, in_: &Path) {
        match self.0.entry((key, nonce)) {
            Entry::Vacant(entry) => drop(entry.insert(what)),
            // The same frame again, in the file it was in, or moved whole to another.
            Entry::Occupied(entry) => {
                assert!(
                    *entry.get() == what,
                    "a nonce twice under a key: {}",
                    in_.display()
                );
            }
        }
    }

    /// Takes note of all that is in a log, whole, open or torn.
    fn take(&mut self, path: &Path) {
        let file = fs::read(path).unwrap();
        let mut at = PAGE;
        while let Some(rest) = file.get(at..) {
            let mut span = PAGE;
            if rest.starts_with(&FRAME_MAGIC)
                && let Ok((frame, _)) = RawFrame::read_from_prefix(rest)
            {
                let head = size_of::<RawFrame>();
                let bytes = frame.records.get() as usize * 32 + frame.stored.get() as usize;
                span = pages(head + bytes) * PAGE;
                let mut what = rest[FRAME_AUTHENTICATED..head].to_vec();
                what.extend_from_slice(&frame.data_crc.get().to_le_bytes());
                self.used(Key::Frames(frame.origin_log), frame.nonce, what, path);
            } else if rest.starts_with(&TRAILER_MAGIC)
                && let Ok((trailer, _)) = RawTrailer::read_from_prefix(rest)
                && trailer.cipher_tag != [0; 16]
            {
                self.used(Key::Seal(trailer.log), trailer.nonce, rest.to_vec(), path);
            }
            at += span;
        }
    }
}

/// Every log below `folder`, those in the making included.
fn logs(folder: &Path) -> Vec<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    let mut logs = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder)
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
        {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "hrl") {
                logs.push(path);
            }
        }
    }
    logs
}

#[test]
fn no_key_and_nonce_twice_and_nothing_acknowledged_is_lost() {
    let continues = env::var("REPLICA_CONTINUES").ok();
    let continues: u32 = continues.and_then(|n| n.parse().ok()).unwrap_or(30);
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("store");
    let mut nonces = Nonces::default();
    let (mut acknowledged, mut torn) = (0, 0);
    for run in 1..=continues {
        let moment = u64::from(random()[0]) * 400;
        let last = killed_after(&folder, Duration::from_micros(2_000 + moment));
        if !folder.exists() {
            continue;
        }
        for log in logs(&folder) {
            torn += u32::from(log.parent().unwrap().ends_with("incoming"));
            nonces.take(&log);
        }
        let Some(last) = last else { continue };
        acknowledged += 1;
        let store = Store::open(&folder).unwrap();
        let volume = store.volume(store.find("v").unwrap(), Some(key())).unwrap();
        let point = volume.point(PointSelector::Id(last));
        let point = point.unwrap_or_else(|error| panic!("run {run} lost a point: {error}"));
        let mut reader = volume.open_point(point.id).unwrap();
        reader
            .read_at(ByteOffset::new(0), &mut vec![0; SIZE as usize])
            .unwrap();
    }
    let pairs = nonces.0.len();
    println!("{continues} runs, {acknowledged} with points, {torn} torn logs, {pairs} nonces");
    assert!(
        acknowledged > 0,
        "no writer lived long enough to tell anything"
    );
    assert!(pairs > acknowledged, "each point has frames of its own");
}
