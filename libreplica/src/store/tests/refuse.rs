//! What does not belong is refused, and said so: logs of other volumes and generations, forks, other
//! keys, second writers.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use hrl_format::VolumeKey;
use hrl_format::id::{GenerationId, PointId};
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{ByteOffset, GenerationNumber, Timestamp, VolumeSize};

use super::model::{History, extent};
use super::{Scratch, geometry};
use crate::error::{Error, ErrorKind};
use crate::store::{FoldStep, PointSelector, RestoreOptions, Store, VolumeSpec};

fn plain(scratch: &Scratch, name: &str) -> History {
    let history = History::begin(&scratch.path().join(name), None, 5);
    history.writer().begin_baseline().unwrap().finish().unwrap();
    history
}

fn says(error: &Error, kind: ErrorKind, parts: &[String]) {
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{error} names {part}");
    }
}

#[test]
fn a_log_of_another_volume_is_foreign() {
    let scratch = Scratch::new();
    let (ours, theirs) = (plain(&scratch, "ours"), plain(&scratch, "theirs"));
    let log = theirs.writer().begin_epoch().unwrap();
    let named = [log.log().to_string(), theirs.volume.to_string()];
    let mut writer = ours.writer();
    let error = writer.commit(log).unwrap_err();
    says(&error, ErrorKind::Foreign, &named);
    assert!(error.to_string().contains(&ours.volume.to_string()));
    writer.commit(writer.begin_epoch().unwrap()).unwrap();
}

#[test]
fn the_second_of_two_successors_is_a_fork() {
    let scratch = Scratch::new();
    let history = plain(&scratch, "store");
    let mut writer = history.writer();
    writer.commit(writer.begin_epoch().unwrap()).unwrap();
    let (first, second) = (writer.begin_epoch().unwrap(), writer.begin_epoch().unwrap());
    let late = second.log().to_string();
    writer.commit(first).unwrap();
    let error = writer.commit(second).unwrap_err();
    says(&error, ErrorKind::Foreign, &[late]);
    assert_eq!(writer.catalogue().last_epoch().get(), 3);
    drop(writer);
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn stale_and_forked_generations_are_named() {
    let scratch = Scratch::new();
    let history = plain(&scratch, "store");
    let mut writer = history.writer();
    for (number, word) in [(1, "a fork"), (2, "stale")] {
        let log = writer.begin_epoch().unwrap();
        let ours = writer.catalogue.generation.id;
        // As a promotion leaves it.
        writer.catalogue.generation.number = GenerationNumber::new(number);
        writer.catalogue.generation.id = GenerationId::random().unwrap();
        let now = writer.catalogue.generation.id;
        let error = writer.commit(log).unwrap_err();
        let named = [word.to_owned(), ours.to_string(), now.to_string()];
        says(&error, ErrorKind::Foreign, &named);
    }
}

#[test]
fn a_missing_wrong_or_needless_key_is_a_key_error() {
    let scratch = Scratch::new();
    let (right, wrong) = (
        VolumeKey::from_bytes([1; 32]),
        VolumeKey::from_bytes([2; 32]),
    );
    let mut history = History::begin(&scratch.path().join("store"), Some(right.clone()), 7);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    let mut epoch = writer.begin_epoch().unwrap();
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    drop(writer);
    let (store, volume) = (&history.store, history.volume);
    let key = |error: Error| says(&error, ErrorKind::Key, &[right.key_id().to_string()]);
    key(store.volume_writer(volume, None).unwrap_err());
    key(store
        .volume_writer(volume, Some(wrong.clone()))
        .unwrap_err());
    key(store.volume(volume, Some(wrong.clone())).unwrap_err());
    // Without the key: listed, not read, checked as far as checksums go.
    let reader = store.volume(volume, None).unwrap();
    let point = reader.point(PointSelector::Latest).unwrap();
    assert_eq!((point.label.as_str(), point.root), ("", None));
    key(reader.open_point(point.id).err().unwrap());
    let options = RestoreOptions::default();
    let output = scratch.path().join("out");
    key(reader
        .restore(point.id, &output, &options, &mut |_| {})
        .unwrap_err());
    assert!(!output.exists());
    assert!(reader.check(&mut |_| {}).unwrap().is_sound());
    let plain = plain(&scratch, "plain");
    let error = plain
        .store
        .volume(plain.volume, Some(wrong.clone()))
        .unwrap_err();
    says(&error, ErrorKind::Key, &[]);
    let error = plain
        .store
        .volume_writer(plain.volume, Some(wrong))
        .unwrap_err();
    says(&error, ErrorKind::Key, &[]);
}

#[test]
fn an_encrypted_store_gives_up_no_byte_of_data_and_no_label() {
    let scratch = Scratch::new();
    let key = VolumeKey::from_bytes([1; 32]);
    let mut history = History::begin(&scratch.path().join("store"), Some(key), 7);
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    let secret = b"the quick brown fox jumps over the lazy dog".repeat(100);
    baseline.write(ByteOffset::new(512), &secret).unwrap();
    baseline.finish().unwrap();
    let mut epoch = writer.begin_epoch().unwrap();
    let extent = extent(4096, secret.len() as u64);
    let (time, data) = (history.now(), &secret[..]);
    epoch.append(&Record::Write { extent, data }, time).unwrap();
    let tag = Tag {
        id: PointId::at(time).unwrap(),
        time,
        consistency: Consistency::Application,
        label: "before the merger".to_owned(),
        group: None,
        root: None,
    };
    epoch.append(&Record::Tag(tag), time).unwrap();
    writer.commit(epoch).unwrap();
    let mut files = vec![history.store.path().to_owned()];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        seen += 1;
        assert_ne!(path.file_name().unwrap(), "base.img");
        let bytes = std::fs::read(&path).unwrap();
        for word in [&b"quick brown"[..], b"merger"] {
            let found = bytes.windows(word.len()).any(|window| window == word);
            assert!(!found, "{}", path.display());
        }
    }
    assert!(seen > 6, "{seen} files");
    let point = history.reader().point(PointSelector::Latest).unwrap();
    assert_eq!(point.label, "before the merger");
}

#[test]
fn one_writer_at_a_time() {
    let scratch = Scratch::new();
    let history = plain(&scratch, "store");
    let writer = history.writer();
    let error = history
        .store
        .volume_writer(history.volume, None)
        .unwrap_err();
    says(&error, ErrorKind::Busy, &[std::process::id().to_string()]);
    drop(writer);
    history.writer();
}

#[test]
fn locks_and_leases_end_while_other_threads_start_processes() {
    let scratch = Scratch::in_memory();
    let mut history = plain(&scratch, "store");
    history.epoch(&mut history.writer());
    let ended = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                Command::new("true").status().unwrap();
            }
        });
        let _end = AtEnd(&ended);
        for _ in 0..100 {
            let mut writer = history.writer();
            let mut epoch = writer.begin_epoch().unwrap();
            history.point_with_root(&mut epoch);
            writer.commit(epoch).unwrap();
            let point = history.reader().point(PointSelector::Latest).unwrap();
            drop(history.reader().open_point(point.id).unwrap());
            assert_eq!(writer.leased_points().unwrap(), []);
        }
    });
}

/// Says so when it ends, also by a panic.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_point_is_taken_back_and_what_its_log_brought_stays() {
    for key in [None, Some(VolumeKey::from_bytes([4; 32]))] {
        let scratch = Scratch::new();
        let mut history = History::begin(&scratch.path().join("store"), key, 5);
        let mut writer = history.writer();
        history.baseline(&mut writer);
        for byte in 1..4 {
            let mut epoch = writer.begin_epoch().unwrap();
            history.write(&mut epoch, extent(byte << 12, 4096), byte as u8);
            history.point_with_root(&mut epoch);
            writer.commit(epoch).unwrap();
        }
        let newest = history.model.points[2].id;
        let held = history.reader().open_point(newest).unwrap();
        let error = writer.drop_point(newest).unwrap_err();
        says(&error, ErrorKind::Busy, &[newest.to_string()]);
        drop(held);
        let epoch = writer.catalogue().last_epoch();
        writer.drop_point(newest).unwrap();
        history.model.points.pop();
        history.check();
        assert_eq!(writer.catalogue().last_epoch(), epoch);
        let gone = writer.drop_point(newest).unwrap_err();
        says(&gone, ErrorKind::NotFound, &[newest.to_string()]);
        // Also for who opens it anew; and the next point holds what the log brought.
        drop(writer);
        let mut writer = history.writer();
        let mut epoch = writer.begin_epoch().unwrap();
        history.point_with_root(&mut epoch);
        let committed = writer.commit(epoch).unwrap();
        let logs = &writer.catalogue().logs;
        let bytes: u64 = logs[logs.len() - 2..]
            .iter()
            .map(|log| log.bytes.get())
            .sum();
        assert_eq!(committed.points[0].bytes.get(), bytes);
        history.check();
        let now = history.now();
        let retained = writer.retain(&"#1".parse().unwrap(), now).unwrap();
        history.model.points.drain(..retained.dropped.len());
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        history.check();
        assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
    }
}

#[test]
fn calls_out_of_order_are_refused() {
    let scratch = Scratch::new();
    let store = Store::create(&scratch.path().join("store")).unwrap();
    let id = store
        .create_volume(VolumeSpec::new("v", geometry(1 << 20)).unwrap())
        .unwrap();
    let mut writer = store.volume_writer(id, None).unwrap();
    assert_eq!(writer.begin_epoch().err().unwrap().kind(), ErrorKind::State);
    let mut baseline = writer.begin_baseline().unwrap();
    let past = baseline
        .write(ByteOffset::new((1 << 20) - 1), &[1, 2])
        .unwrap_err();
    assert_eq!(past.kind(), ErrorKind::Invalid);
    let past = baseline.zeroes(extent(1 << 20, 1)).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::Invalid);
    baseline.finish().unwrap();
    assert_eq!(
        writer.begin_baseline().err().unwrap().kind(),
        ErrorKind::State
    );
    let time = Timestamp::from_nanos(1);
    let tag = |id| {
        Record::Tag(Tag {
            id,
            time,
            consistency: Consistency::Crash,
            label: String::new(),
            group: None,
            root: None,
        })
    };
    let point = PointId::at(time).unwrap();
    let mut epoch = writer.begin_epoch().unwrap();
    epoch.append(&tag(point), time).unwrap();
    let size = VolumeSize::new(512);
    let late = epoch.append(&Record::Resize { size }, time).unwrap_err();
    assert_eq!(
        late.kind(),
        ErrorKind::Invalid,
        "a point is the end of an epoch"
    );
    writer.commit(epoch).unwrap();
    let mut epoch = writer.begin_epoch().unwrap();
    epoch.append(&tag(point), time).unwrap();
    let twice = writer.commit(epoch).unwrap_err();
    says(&twice, ErrorKind::Exists, &[point.to_string()]);
    let reader = store.volume(id, None).unwrap();
    assert_eq!(reader.points().unwrap().len(), 1);
    let mut open = reader.open_point(point).unwrap();
    let past = open
        .read_at(ByteOffset::new(1 << 20), &mut [0])
        .unwrap_err();
    assert_eq!(past.kind(), ErrorKind::Invalid);
    for selector in [
        PointSelector::Id(PointId::at(time).unwrap()),
        PointSelector::AtOrBefore(Timestamp::from_nanos(0)),
    ] {
        let error = reader.point(selector).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
