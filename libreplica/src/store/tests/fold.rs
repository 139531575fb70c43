//! Folding where there is no image: the room that an encrypted base takes, with the key and without;
//! and the logs between points that were dropped.

use std::collections::BTreeMap;
use std::fs;

use hrl_format::VolumeKey;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, VolumeSize};

use super::model::{History, SHORT, extent, same};
use super::{Scratch, geometry};
use crate::error::ErrorKind;
use crate::store::{FoldStep, PointReader, Store, VolumeSpec, VolumeWriter};

const KEY: [u8; 32] = [7; 32];
/// What a log takes besides its frames: header, sections, trailer.
const PAGES: u64 = 6 << 12;

fn encrypted(scratch: &Scratch) -> History {
    let key = VolumeKey::from_bytes(KEY);
    let mut history = History::begin(&scratch.path().join("store"), Some(key), 21);
    // Larger than the model's own.
    let mut spec = VolumeSpec::new("large", geometry(4 << 20)).unwrap();
    spec.key = history.key.as_ref().map(VolumeKey::key_id);
    history.volume = history.store.create_volume(spec).unwrap();
    history.model.image = vec![0; 4 << 20];
    history.log_bytes = ByteLen::new(1 << 20);
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    for region in 0..48 {
        history.write_baseline(
            &mut baseline,
            extent(region << 16, 1 << 16),
            region as u8 + 1,
        );
    }
    baseline.finish().unwrap();
    history
}

/// Folds all there is to fold, and counts the steps by kind.
fn fold(writer: &mut VolumeWriter, steps: &mut BTreeMap<&'static str, usize>) {
    loop {
        let kind = match writer.fold_step().unwrap() {
            FoldStep::Nothing => return,
            FoldStep::Folded { .. } => "folded",
            FoldStep::Merged { .. } => "merged",
            FoldStep::Compacted { .. } => "compacted",
            FoldStep::Indexed => continue,
        };
        *steps.entry(kind).or_default() += 1;
    }
}

/// Writes whole regions, and makes a point.
fn change(history: &mut History, writer: &mut VolumeWriter, regions: u64) {
    let mut epoch = writer.begin_epoch().unwrap();
    for _ in 0..regions {
        let (region, byte) = (history.random.below(64), history.random.next() as u8 | 1);
        history.write(&mut epoch, extent(region << 16, 1 << 16), byte);
    }
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
}

fn keep(history: &mut History, writer: &mut VolumeWriter, count: usize) {
    let now = history.now();
    let policy = format!("#{count}").parse().unwrap();
    let retained = writer.retain(&policy, now).unwrap();
    history
        .model
        .points
        .retain(|known| !retained.dropped.contains(&known.id));
}

/// The base takes at most twice what the volume holds, besides what each log needs to be one.
fn assert_bounded(history: &History, writer: &VolumeWriter) {
    let image = &history.model.points[0].image;
    let live = image
        .chunks(1 << 16)
        .filter(|region| region.iter().any(|&b| b != 0));
    let live = live.count() as u64 * ((1 << 16) + (1 << 12));
    let logs = &writer.catalogue().logs;
    let bytes: u64 = logs.iter().map(|log| log.bytes.get()).sum();
    let allowed = 2 * live + logs.len() as u64 * PAGES;
    assert!(
        bytes <= allowed,
        "{bytes} bytes in {} logs for {live}",
        logs.len()
    );
    assert!(logs.len() < 40, "{} logs", logs.len());
    let folder = fs::read_dir(writer.folder.logs()).unwrap();
    let files: u64 = folder
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert_eq!(files, bytes);
}

#[test]
fn an_encrypted_base_takes_at_most_twice_what_it_holds() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    let mut steps = BTreeMap::new();
    let (mut written, mut rewritten) = (0, 0);
    for round in 0..200 {
        if round % 50 == 20 {
            drop(writer);
            writer = history.writer();
        }
        change(&mut history, &mut writer, 3);
        let logs = &writer.catalogue().logs;
        written += logs.last().unwrap().bytes.get();
        let before: Vec<_> = logs.iter().map(|log| log.log).collect();
        keep(&mut history, &mut writer, 1);
        fold(&mut writer, &mut steps);
        let made = writer.catalogue().logs.iter();
        let made = made.filter(|log| !before.contains(&log.log));
        rewritten += made.map(|log| log.bytes.get()).sum::<u64>();
        assert_bounded(&history, &writer);
    }
    history.check();
    assert!(steps["merged"] > 50 && steps["compacted"] > 10, "{steps:?}");
    assert!(!steps.contains_key("folded"), "there is no image");
    assert!(rewritten < 8 * written, "{rewritten} of {written}");
    assert!(!writer.folder.base().exists());
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn an_encrypted_base_shrinks_when_all_of_it_is_discarded() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    let mut epoch = writer.begin_epoch().unwrap();
    let time = history.now();
    let all = Record::Discard {
        extent: extent(0, 4 << 20),
    };
    epoch.append(&all, time).unwrap();
    history.model.image.fill(0);
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    let before = writer.catalogue().log_bytes().get();
    fold(&mut writer, &mut BTreeMap::new());
    let after = writer.catalogue().log_bytes().get();
    assert!(
        before > 3 << 20 && after <= 2 * PAGES,
        "{before} to {after}"
    );
    history.check();
}

#[test]
fn a_resized_encrypted_volume_is_what_it_was() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    for size in [1 << 20, 6 << 20, 5 << 20, 5 << 20, 2 << 20, 4 << 20] {
        let mut epoch = writer.begin_epoch().unwrap();
        let time = history.now();
        let resize = Record::Resize {
            size: VolumeSize::new(size),
        };
        epoch.append(&resize, time).unwrap();
        history.model.image.resize(size as usize, 0);
        history.write(&mut epoch, extent(size - 4096, 4096), 9);
        history.point_with_root(&mut epoch);
        writer.commit(epoch).unwrap();
        keep(&mut history, &mut writer, 1);
        fold(&mut writer, &mut BTreeMap::new());
        history.check();
    }
}

#[test]
fn without_the_key_logs_are_merged_and_can_be_proved() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    for _ in 0..12 {
        change(&mut history, &mut writer, 2);
    }
    drop(writer);
    let mut keeper = history.keeper();
    let before = keeper.catalogue().clone();
    keep(&mut history, &mut keeper, 2);
    let mut steps = BTreeMap::new();
    fold(&mut keeper, &mut steps);
    assert!(steps["merged"] > 0 && steps.len() == 1, "{steps:?}");
    assert!(keeper.catalogue().logs.len() < before.logs.len());
    assert_eq!(keeper.catalogue().last_epoch(), before.last_epoch());
    // Nothing can be written, and nothing needs to be read.
    assert_eq!(keeper.begin_epoch().err().unwrap().kind(), ErrorKind::Key);
    let waiting = keeper.catalogue().waiting();
    assert!(
        waiting.logs > 0 && waiting.bytes > ByteLen::ZERO,
        "{waiting:?}"
    );
    drop(keeper);
    history.check();
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
    let keyless = history.store.volume(history.volume, None).unwrap();
    assert!(keyless.check(&mut |_| {}).unwrap().is_sound());
    // Whoever has the key writes what was moved anew, and goes on.
    let mut writer = history.writer();
    let mut steps = BTreeMap::new();
    change(&mut history, &mut writer, 40);
    keep(&mut history, &mut writer, 1);
    fold(&mut writer, &mut steps);
    assert!(steps["compacted"] > 0, "{steps:?}");
    let after = writer.catalogue().waiting();
    assert!(after.bytes < waiting.bytes, "{after:?}, {waiting:?}");
    assert_bounded(&history, &writer);
    history.check();
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn nothing_is_folded_past_a_point_that_is_read() {
    for key in [None, Some(VolumeKey::from_bytes(KEY))] {
        let scratch = Scratch::in_memory();
        let mut history = History::begin(&scratch.path().join("store"), key, 5);
        history.log_bytes = SHORT;
        let mut writer = history.writer();
        history.baseline(&mut writer);
        for _ in 0..3 {
            change_some(&mut history, &mut writer);
        }
        let known = history.model.points[1].clone();
        let mut held = history.reader().open_point(known.id).unwrap();
        for _ in 0..12 {
            change_some(&mut history, &mut writer);
        }
        keep(&mut history, &mut writer, 1);
        assert_eq!(
            history.model.points.len(),
            2,
            "the newest, and the one that is read"
        );
        let mut steps = BTreeMap::new();
        fold(&mut writer, &mut steps);
        // What lies between the two became few logs; the point that is read still ends one.
        assert!(steps["merged"] > 0, "{steps:?}");
        let logs = &writer.catalogue().logs;
        assert!(logs.len() <= 5, "{} logs", logs.len());
        let read = held.state().point().unwrap().epoch;
        let base = writer.catalogue().base.unwrap().epoch;
        assert!(base <= read);
        assert!(logs.iter().all(|log| log.last <= read || log.first > read));
        same(&mut held, &known.image);
        history.check();
        let view = read_again(&history, &held);
        assert_eq!(view, known.image);
        drop(held);
        keep(&mut history, &mut writer, 1);
        fold(&mut writer, &mut BTreeMap::new());
        history.check();
    }
}

fn change_some(history: &mut History, writer: &mut VolumeWriter) {
    let mut epoch = writer.begin_epoch().unwrap();
    let (at, byte) = (history.random.below(16), history.random.next() as u8);
    history.write(&mut epoch, extent(at << 12, 4096), byte);
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
}

fn read_again(history: &History, held: &PointReader) -> Vec<u8> {
    let mut again = history.reader().open(held.state().id()).unwrap();
    let mut bytes = vec![0; held.state().size().get() as usize];
    again.read_at(Default::default(), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_damaged_log_is_neither_merged_nor_compacted() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    for _ in 0..6 {
        change(&mut history, &mut writer, 1);
    }
    keep(&mut history, &mut writer, 1);
    let logs = writer.catalogue().logs.clone();
    let path = writer.folder.log(&logs[logs.len() - 2].name());
    let whole = fs::read(&path).unwrap();
    let mut broken = whole.clone();
    broken[8192] ^= 1;
    fs::write(&path, &broken).unwrap();
    let error = writer.fold_step().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains(".hrl"), "{error}");
    let kept = |writer: &VolumeWriter| {
        let logs = writer.catalogue().logs.iter();
        logs.map(|log| log.log).collect::<Vec<_>>()
    };
    assert_eq!(
        kept(&writer),
        logs.iter().map(|log| log.log).collect::<Vec<_>>()
    );
    assert_eq!(fs::read_dir(writer.folder.incoming()).unwrap().count(), 0);
    assert_eq!(
        fs::read_dir(writer.folder.logs()).unwrap().count(),
        logs.len()
    );
    // Ingest goes on.
    change(&mut history, &mut writer, 1);
    fs::write(&path, &whole).unwrap();
    fold(&mut writer, &mut BTreeMap::new());
    history.check();
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn a_log_that_was_merged_untruly_is_not_vouched_for() {
    let scratch = Scratch::in_memory();
    let mut history = encrypted(&scratch);
    let mut writer = history.writer();
    for _ in 0..6 {
        change(&mut history, &mut writer, 1);
    }
    keep(&mut history, &mut writer, 1);
    drop(writer);
    let mut keeper = history.keeper();
    fold(&mut keeper, &mut BTreeMap::new());
    let merged = keeper.catalogue().logs.last().unwrap();
    let path = keeper.folder.log(&merged.name());
    // A bit of what it took over of its sources: no data, but what proves it.
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 2 * 4096 + 100;
    bytes[at] ^= 1;
    fs::write(&path, &bytes).unwrap();
    drop(keeper);
    let mut writer = history.writer();
    let error = loop {
        change(&mut history, &mut writer, 30);
        keep(&mut history, &mut writer, 1);
        match writer.fold_step() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert!(!history.reader().check(&mut |_| {}).unwrap().is_sound());
    drop(writer);
    assert!(Store::open(history.store.path()).is_ok());
}
