//! Damage, done by hand to the files of a store: found, named, and kept from spreading.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hrl_format::VolumeKey;
use hrl_format::id::LogId;

use super::Scratch;
use super::model::{History, extent};
use crate::error::ErrorKind;
use crate::store::{CheckReport, FoldStep, PointState, RestoreOptions};

/// Points 0 to 3. Log k writes block k, and log 2 writes block 1 anew; with a key or without.
fn four_points(scratch: &Scratch, key: Option<VolumeKey>) -> (History, Vec<PathBuf>) {
    let mut history = History::begin(&scratch.path().join("store"), key, 1);
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    history.write_baseline(&mut baseline, extent(0, 64 << 10), 0x11);
    baseline.finish().unwrap();
    for k in 0..4 {
        let mut epoch = writer.begin_epoch().unwrap();
        let blocks: &[u64] = if k == 2 { &[2, 1] } else { &[k] };
        for block in blocks {
            history.write(&mut epoch, extent(block * 4096, 4096), 0x20 + k as u8);
        }
        history.point_with_root(&mut epoch);
        writer.commit(epoch).unwrap();
    }
    let logs = writer
        .catalogue()
        .logs
        .iter()
        .map(|log| writer.folder.log(&log.name()));
    let logs = logs.collect::<Vec<_>>();
    let epochs = logs[logs.len() - 4..].to_vec();
    (history, epochs)
}

fn check(history: &History) -> CheckReport {
    let mut last = (0, 0);
    let report = history.reader().check(&mut |progress| {
        assert!(progress.done.get() >= last.0 && progress.done <= progress.total);
        last = (progress.done.get(), progress.total.get());
    });
    assert_eq!(last.0, last.1, "the check ends at its end");
    report.unwrap()
}

/// Which points the check calls damaged.
fn damaged(history: &History, report: &CheckReport) -> Vec<usize> {
    let number = |id| {
        history
            .model
            .points
            .iter()
            .position(|known| known.id == id)
            .unwrap()
    };
    report.damaged().map(|point| number(point.id)).collect()
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn find(path: &Path, pattern: &[u8]) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes
        .windows(pattern.len())
        .position(|w| w == pattern)
        .unwrap() as u64
}

#[test]
fn a_sound_store_is_proved_point_by_point() {
    for key in [None, Some(VolumeKey::from_bytes([9; 32]))] {
        let scratch = Scratch::new();
        let (history, _) = four_points(&scratch, key);
        let report = check(&history);
        assert!(report.is_sound(), "{report:?}");
        assert!(
            report
                .points
                .iter()
                .all(|point| point.state == PointState::Proved)
        );
        assert_eq!((report.points.len(), report.name.as_str()), (4, "model"));
    }
}

#[test]
fn a_flipped_bit_damages_the_points_that_show_it() {
    let scratch = Scratch::new();
    let (history, logs) = four_points(&scratch, None);
    // Block 1 as log 1 wrote it: point 1 shows it, in point 2 it is overwritten.
    let at = find(&logs[1], &[0x21; 4096]);
    flip(&logs[1], at + 7);
    let report = check(&history);
    assert_eq!(damaged(&history, &report), [1]);
    assert_eq!(report.faults.len(), 1);
    assert_eq!(report.faults[0].path, logs[1]);
    // The points around it can be had, the damaged one is not passed off as whole.
    let reader = history.reader();
    for (number, known) in history.model.points.iter().enumerate() {
        let output = scratch.path().join(number.to_string());
        let restored = reader.restore(known.id, &output, &RestoreOptions::default(), &mut |_| {});
        if number == 1 {
            assert_eq!(restored.unwrap_err().kind(), ErrorKind::Damaged);
            assert!(!output.exists());
        } else {
            restored.unwrap();
            assert!(fs::read(&output).unwrap() == known.image);
        }
    }
}

#[test]
fn a_tag_that_cannot_be_read_damages_its_point() {
    let scratch = Scratch::new();
    let (mut history, _) = four_points(&scratch, None);
    // Nothing but the tag: no block of any point is in this log.
    let mut writer = history.writer();
    let mut epoch = writer.begin_epoch().unwrap();
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    let catalogue = writer.catalogue();
    let log = writer.folder.log(&catalogue.logs.last().unwrap().name());
    drop(writer);
    assert!(check(&history).is_sound());
    flip(&log, find(&log, b"point 4"));
    let report = check(&history);
    assert_eq!(damaged(&history, &report), [4]);
    assert!(report.faults.iter().all(|fault| fault.path == log));
}

#[test]
fn every_flipped_bit_of_a_log_is_a_fault() {
    for key in [None, Some(VolumeKey::from_bytes([9; 32]))] {
        let scratch = Scratch::in_memory();
        let (history, logs) = four_points(&scratch, key);
        let len = fs::metadata(&logs[2]).unwrap().len();
        for at in (0..len).step_by(61) {
            flip(&logs[2], at);
            let report = check(&history);
            assert!(!report.is_sound(), "byte {at} of {len}");
            let before = damaged(&history, &report).into_iter().filter(|&k| k < 2);
            assert_eq!(
                before.count(),
                0,
                "byte {at}: points before the log are sound"
            );
            flip(&logs[2], at);
        }
        assert!(check(&history).is_sound());
    }
}

#[test]
fn a_cut_or_missing_log_damages_all_points_above_it() {
    let scratch = Scratch::new();
    let (history, logs) = four_points(&scratch, None);
    let whole = fs::read(&logs[2]).unwrap();
    for len in [whole.len() - 4096, whole.len() / 2, 4096, 100, 0] {
        fs::write(&logs[2], &whole[..len]).unwrap();
        let report = check(&history);
        assert_eq!(damaged(&history, &report), [2, 3], "cut to {len}");
    }
    fs::remove_file(&logs[2]).unwrap();
    assert_eq!(damaged(&history, &check(&history)), [2, 3]);
    fs::write(&logs[2], &whole).unwrap();
    assert!(check(&history).is_sound());
}

#[test]
fn a_log_in_another_ones_place_is_found() {
    let scratch = Scratch::new();
    let (history, logs) = four_points(&scratch, None);
    let other = fs::read(&logs[1]).unwrap();
    let own = fs::read(&logs[3]).unwrap();
    fs::write(&logs[3], other).unwrap();
    assert_eq!(damaged(&history, &check(&history)), [3]);
    fs::write(&logs[3], own).unwrap();
    assert!(check(&history).is_sound());
}

#[test]
fn a_damaged_base_damages_the_points_that_show_it() {
    let scratch = Scratch::new();
    let (history, _) = four_points(&scratch, None);
    let base = history.writer().folder.base();
    // Block 3 of the base shows until log 3 writes it.
    flip(&base, 3 * 4096);
    let report = check(&history);
    assert_eq!(damaged(&history, &report), [0, 1, 2]);
    let PointState::Damaged(why) = &report.points[0].state else {
        panic!("not damaged: {:?}", report.points[0].state)
    };
    assert!(why.contains("root"), "{why}");
    flip(&base, 3 * 4096);
    fs::OpenOptions::new()
        .write(true)
        .open(&base)
        .unwrap()
        .set_len(20_000)
        .unwrap();
    let report = check(&history);
    assert_eq!(damaged(&history, &report), [0, 1, 2, 3]);
    assert_eq!(report.faults[0].path, base);
    fs::remove_file(&base).unwrap();
    let error = history.reader().open_point(history.model.points[0].id);
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Damaged);
}

#[test]
fn a_log_that_does_not_follow_the_base_is_a_fault() {
    let scratch = Scratch::new();
    let (mut history, logs) = four_points(&scratch, None);
    let mut writer = history.writer();
    let now = history.now();
    writer.retain(&"#2".parse().unwrap(), now).unwrap();
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    history.model.points.drain(..2);
    assert!(check(&history).is_sound());
    let mut next = writer.catalogue().clone();
    let base = next.base.as_mut().unwrap();
    base.last.as_mut().unwrap().log = LogId::random().unwrap();
    writer.save(next).unwrap();
    let report = check(&history);
    assert_eq!(report.faults.len(), 1, "{report:?}");
    assert_eq!(report.faults[0].path, logs[3]);
}

#[test]
fn a_damaged_log_is_not_folded() {
    let scratch = Scratch::new();
    let (mut history, logs) = four_points(&scratch, None);
    let at = find(&logs[2], &[0x22; 4096]);
    flip(&logs[2], at);
    let mut writer = history.writer();
    let now = history.now();
    writer.retain(&"#1".parse().unwrap(), now).unwrap();
    assert_eq!(writer.fold_step().unwrap_err().kind(), ErrorKind::Damaged);
    assert!(logs.iter().all(|log| log.exists()));
    // Ingest goes on.
    history.epoch(&mut writer);
    flip(&logs[2], at);
    writer.fold_step().unwrap();
    assert!(check(&history).is_sound());
}

#[test]
fn either_copy_of_the_catalogue_is_enough() {
    let scratch = Scratch::new();
    let (mut history, _) = four_points(&scratch, None);
    let copies = history.writer().folder.catalogues();
    for copy in &copies {
        let whole = fs::read(copy).unwrap();
        for at in (0..whole.len() as u64).step_by(13) {
            flip(copy, at);
            let report = check(&history);
            assert_eq!(report.faults.len(), 1, "byte {at}");
            assert_eq!(damaged(&history, &report), [] as [usize; 0]);
            flip(copy, at);
        }
        for broken in [&whole[..0], &whole[..20], &whole[..whole.len() - 1]] {
            fs::write(copy, broken).unwrap();
            assert!(!check(&history).is_sound());
            // The writer goes on from the other copy, and renews this one.
            let mut writer = history.writer();
            history.epoch(&mut writer);
            assert!(check(&history).is_sound());
        }
        fs::remove_file(copy).unwrap();
        assert!(!check(&history).is_sound());
        drop(history.writer());
        assert!(check(&history).is_sound());
    }
    history.check();
    for copy in &copies {
        flip(copy, 30);
    }
    let error = history.reader_error();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("neither copy"), "{error}");
    assert!(
        history.store.volumes().unwrap()[0].catalogue.is_err(),
        "listed still"
    );
}
