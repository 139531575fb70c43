//! Moments between recovery points on the command line: `points` shows the windows, `restore`
//! takes a record's number or a time to the nanosecond, `log dump` says which those are. The
//! store is made with the library: the epochs are what an inline capture leaves.

use std::fs;
use std::path::{Path, PathBuf};

use hrl_format::id::PointId;
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};
use hrl_format::{RecordOrder, VolumeKey};
use libreplica::geometry::Geometry;
use libreplica::store::{Store, VolumeSpec, VolumeWriter};
use libreplica::time::rfc3339;
use serde_json::{Value, json};

use crate::stage::{MIB, Place, replica};

const KEY: [u8; 32] = [0x42; 32];
/// 2026-01-02 03:04:05.000000001 UTC.
const BEGIN: i64 = 1_767_323_045_000_000_001;

fn at(nanos: i64) -> Timestamp {
    Timestamp::from_nanos(BEGIN + nanos)
}

fn write(writer: &mut VolumeWriter, order: RecordOrder, writes: &[(u64, u8, i64)], point: i64) {
    let mut epoch = writer.begin_epoch_in(order).unwrap();
    for &(offset, byte, nanos) in writes {
        let extent = Extent::new(ByteOffset::new(offset), ByteLen::new(512)).unwrap();
        let data = &[byte; 512][..];
        let record = Record::Write { extent, data };
        epoch.append(&record, at(nanos)).unwrap();
    }
    let tag = Tag {
        id: PointId::at(at(point)).unwrap(),
        time: at(point),
        consistency: Consistency::Crash,
        label: String::new(),
        group: None,
        root: None,
    };
    let time = tag.time;
    epoch.append(&Record::Tag(tag), time).unwrap();
    writer.commit(epoch).unwrap();
}

/// Epoch 2 ends in a point, 3 and 4 are in order, 5 is not. Byte 0 of the volume says which
/// write was the last.
fn store(place: &Place, key: Option<[u8; 32]>) -> PathBuf {
    let path = place.at("store");
    let store = Store::create(&path).unwrap();
    let geometry = Geometry {
        size: VolumeSize::new(MIB),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    };
    let key = key.map(VolumeKey::from_bytes);
    let mut spec = VolumeSpec::new("v", geometry).unwrap();
    spec.key = key.as_ref().map(VolumeKey::key_id);
    let volume = store.create_volume(spec).unwrap();
    let mut writer = store.volume_writer(volume, key).unwrap();
    let mut baseline = writer.begin_baseline().unwrap();
    baseline.write(ByteOffset::ZERO, b"base").unwrap();
    baseline.finish().unwrap();
    write(&mut writer, RecordOrder::AsRead, &[(0, 20, 0)], 10);
    let in_order = RecordOrder::AsCompleted;
    write(&mut writer, in_order, &[(0, 30, 20), (0, 31, 21)], 30);
    write(
        &mut writer,
        in_order,
        &[(0, 40, 40), (4096, 9, 41), (0, 42, 50)],
        60,
    );
    write(&mut writer, RecordOrder::AsRead, &[(0, 50, 70)], 80);
    path
}

struct Restore<'a> {
    place: &'a Place,
    store: &'a Path,
    key: Vec<String>,
}

impl Restore<'_> {
    fn run(&self, point: &str) -> crate::stage::Reply {
        let (output, store) = (self.place.at("out.img"), self.store.to_str().unwrap());
        let mut args = vec!["restore", "v", "--store", store, "--point", point];
        args.extend(["--output", output.to_str().unwrap(), "--force", "--json"]);
        args.extend(self.key.iter().map(String::as_str));
        replica(&args)
    }

    /// The first byte of the volume there, and what was said.
    fn first(&self, point: &str) -> (u8, Value) {
        let said = self.run(point).json();
        let image = fs::read(self.place.at("out.img")).unwrap();
        assert_eq!(image.len() as u64, MIB);
        (image[0], said)
    }
}

fn restoring<'a>(place: &'a Place, store: &'a Path, key: Option<[u8; 32]>) -> Restore<'a> {
    let key = key.map(|key| {
        let file = place.at("key");
        fs::write(&file, key).unwrap();
        ["--key-file".to_owned(), file.display().to_string()]
    });
    let key = key.into_iter().flatten().collect();
    Restore { place, store, key }
}

#[test]
fn moments_are_listed_and_restored() {
    for key in [None, Some(KEY)] {
        let place = Place::new();
        let path = store(&place, key);
        let text = path.to_str().unwrap();
        // Times and records need no key.
        let listed = replica(&["points", "v", "--store", text, "--json"]).json();
        let (from, to) = (
            "2026-01-02T03:04:05.000000011Z",
            "2026-01-02T03:04:05.000000061Z",
        );
        let offset = listed["points"][0]["epoch"].as_u64().unwrap() - 2;
        let moment = |epoch: u64, rest: &str| format!("{}:{rest}", epoch + offset);
        let window = json!({
            "from": from, "to": to,
            "from_moment": moment(3, "start"), "to_moment": moment(4, "3"),
        });
        assert_eq!(listed["windows"], json!([window]));
        let all = replica(&["points", "--store", text, "--json"]).json();
        assert_eq!(all["volumes"][0]["windows"], listed["windows"]);
        let shown = replica(&["points", "v", "--store", text]);
        assert!(
            shown
                .ok()
                .contains(&format!("any moment from {from} to {to}"))
        );

        let restore = restoring(&place, &path, key);
        for (name, byte, is_point) in [
            (moment(3, "start"), 20, true),
            (moment(3, "0"), 30, false),
            (moment(3, "1"), 31, true),
            (moment(4, "start"), 31, true),
            (moment(4, "0"), 40, false),
            (moment(4, "1"), 40, false),
            (moment(4, "2"), 42, true),
            (moment(4, "3"), 42, true),
        ] {
            let (found, said) = restore.first(&name);
            assert_eq!(
                (found, said["moment"].as_str()),
                (byte, Some(&name[..])),
                "{name}"
            );
            assert_eq!(said["point"].is_object(), is_point, "{name}: {said}");
        }
        for (nanos, byte) in [
            (10, 20),
            (19, 20),
            (20, 30),
            (21, 31),
            (30, 31),
            (39, 31),
            (40, 40),
            (49, 40),
            (50, 42),
            (60, 42),
            // Outside of the window: the newest point.
            (79, 42),
            (80, 50),
        ] {
            let time = rfc3339(at(nanos));
            assert_eq!(restore.first(&time).0, byte, "{time}");
        }
        let (_, said) = restore.first(&rfc3339(at(45)));
        assert_eq!(said["moment"], moment(4, "1"));
        assert_eq!(said["time"], "2026-01-02T03:04:05.000000042Z");
        assert_eq!(
            (&said["point"], &said["proof"]),
            (&Value::Null, &json!("none"))
        );
        let (_, said) = restore.first("latest");
        assert_eq!(
            (&said["moment"], &said["time"]),
            (&Value::Null, &json!(rfc3339(at(80))))
        );
    }
}

#[test]
fn a_moment_that_cannot_be_had_names_the_window() {
    let place = Place::new();
    let path = store(&place, None);
    let restore = restoring(&place, &path, None);
    let window = "3:start to 4:3 (2026-01-02T03:04:05.000000011Z";
    for (point, why) in [
        ("5:0", "epoch 5 is not kept write by write"),
        ("4:4", "epoch 4 has the records 0 to 3"),
        ("6:0", "epoch 6 is not in the store"),
        ("1:0", "epoch 1"),
    ] {
        restore.run(point).fails(1, &[why, window]);
    }
    restore
        .run(&rfc3339(at(9)))
        .fails(1, &["none is as old as"]);
    for nonsense in ["3:", "3:x", ":", "3:+1"] {
        restore.run(nonsense).fails(2, &[nonsense, "EPOCH:SEQ"]);
    }
}

#[test]
fn a_dump_says_which_moments_there_are() {
    let place = Place::new();
    let path = store(&place, Some(KEY));
    let restore = restoring(&place, &path, Some(KEY));
    let mut in_order = 0;
    for volume in fs::read_dir(path.join("volumes")).unwrap() {
        for log in fs::read_dir(volume.unwrap().path().join("logs")).unwrap() {
            let log = log.unwrap().path();
            let log = log.to_str().unwrap();
            let stat = replica(&["log", "stat", log, "--json"]).json();
            if stat["order"] == "as-read" {
                continue;
            }
            assert_eq!(stat["order"], "as-completed");
            assert!(
                replica(&["log", "stat", log])
                    .ok()
                    .contains("order       as-completed")
            );
            in_order += 1;
            let dump = replica(&["log", "dump", log, "--json"]).json();
            for record in dump["records"].as_array().unwrap() {
                let name = format!("{}:{}", stat["first_epoch"], record["sequence"]);
                let (_, said) = restore.first(&name);
                assert_eq!(said["time"], record["time"], "{name}");
            }
        }
    }
    assert_eq!(in_order, 2);
}

#[test]
fn the_manual_tells_of_moments() {
    let place = Place::new();
    let pages = place.folder("man");
    replica(&["man", pages.to_str().unwrap()]).ok();
    let page = fs::read_to_string(pages.join("replica-restore.1")).unwrap();
    assert!(page.contains("EPOCH:SEQ"), "{page}");
    let help = replica(&["restore", "--help"]);
    assert!(help.ok().contains("EPOCH:start"));
}
