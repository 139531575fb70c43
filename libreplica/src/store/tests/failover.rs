//! Promotion and commit: who may write afterwards, what is left, and what a crash leaves.

use std::path::Path;

use hrl_format::VolumeKey;
use hrl_format::id::Generation;
use hrl_format::units::Epoch;

use super::Scratch;
use super::crash::{self, Loss};
use super::model::{History, Known, same};
use super::random::Random;
use crate::error::ErrorKind;
use crate::store::{Catalogue, FoldStep, How, PointReader, Recovery, Store, VolumeWriter};

fn begun(path: &Path, key: Option<VolumeKey>, seed: u64) -> (History, VolumeWriter) {
    let mut history = History::begin(path, key, seed);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for _ in 0..5 {
        history.epoch_as_read(&mut writer);
    }
    // Behind the newest point, too.
    let mut epoch = writer.begin_epoch().unwrap();
    history.change(&mut epoch);
    writer.commit(epoch).unwrap();
    (history, writer)
}

fn generation(writer: &VolumeWriter) -> Generation {
    writer.catalogue().generation.generation()
}

#[test]
fn a_promotion_fences_the_old_primary_and_loses_nothing() {
    let scratch = Scratch::new();
    let (history, mut writer) = begun(&scratch.path().join("store"), None, 1);
    let old = generation(&writer);
    let (before, chosen) = (writer.catalogue().clone(), &history.model.points[2]);
    let late = writer.begin_epoch().unwrap();

    let promotion = writer.promote(chosen.id, How::Unplanned, "b").unwrap();
    assert_eq!(promotion.replaced, old.id);
    let newest = history.model.points.last().unwrap();
    assert_eq!(promotion.loss.since, chosen.time);
    assert_eq!(promotion.loss.known_until, newest.time);
    let behind = before
        .logs
        .iter()
        .filter(|log| log.first > before.points[2].epoch);
    let behind: u64 = behind.map(|log| log.bytes.get()).sum();
    assert_eq!(promotion.loss.bytes.get(), behind);

    // A log that was under way is of the old generation.
    let refused = writer.commit(late).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Foreign, "{refused}");
    let new = generation(&writer);
    assert_eq!(new.number.get(), old.number.get() + 1);
    drop(writer);
    let store = &history.store;
    let fenced = store
        .volume_writer_of(history.volume, None, old)
        .unwrap_err();
    assert_eq!(fenced.kind(), ErrorKind::Fenced);
    assert!(fenced.to_string().contains("`b` took over"), "{fenced}");
    let writer = store.volume_writer_of(history.volume, None, new).unwrap();
    // Its history is as it was.
    assert_eq!(writer.catalogue().logs, before.logs);
    for known in &history.model.points {
        same(
            &mut history.reader().open_point(known.id).unwrap(),
            &known.image,
        );
    }
}

#[test]
fn another_point_may_be_chosen_until_the_commit_and_none_after_it() {
    for key in [None, Some(VolumeKey::from_bytes([7; 32]))] {
        let scratch = Scratch::new();
        let (history, mut writer) = begun(&scratch.path().join("store"), key, 2);
        let points = &history.model.points;
        assert_eq!(
            writer.commit_failover().unwrap_err().kind(),
            ErrorKind::State
        );
        writer.promote(points[4].id, How::Unplanned, "b").unwrap();
        let first = generation(&writer);
        let again = writer.promote(points[1].id, How::Unplanned, "b").unwrap();
        assert_eq!(again.replaced, first.id);
        assert_eq!(writer.catalogue().points.len(), points.len());

        // Not while somebody reads what is to go.
        let held = history.reader().open_point(points[3].id).unwrap();
        assert_eq!(
            writer.commit_failover().unwrap_err().kind(),
            ErrorKind::Busy
        );
        assert_eq!(writer.catalogue().points.len(), points.len());
        drop(held);
        assert_eq!(writer.commit_failover().unwrap(), points.len() - 1);
        assert_eq!(writer.commit_failover().unwrap(), 0);
        let left = writer.catalogue();
        assert_eq!(left.points.len(), 1);
        assert_eq!(left.last_epoch(), left.points[0].epoch);
        assert_eq!(left.size.get() as usize, points[1].image.len());
        let refused = writer
            .promote(points[1].id, How::Unplanned, "b")
            .unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::State);

        // Logs behind it are gone, and the history goes on from there.
        writer.delete_retired().unwrap();
        let logs = std::fs::read_dir(writer.folder.logs()).unwrap().count();
        assert_eq!(logs, writer.catalogue().logs.len());
        let epoch = writer.begin_epoch().unwrap();
        writer.commit(epoch).unwrap();
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        same(
            &mut history.reader().open_point(points[1].id).unwrap(),
            &points[1].image,
        );
    }
}

#[test]
fn a_reader_of_the_chosen_point_goes_on_through_the_commit() {
    let scratch = Scratch::new();
    let (history, mut writer) = begun(&scratch.path().join("store"), None, 3);
    let chosen = &history.model.points[0];
    let mut reader: PointReader = history.reader().open_point(chosen.id).unwrap();
    writer.promote(chosen.id, How::Unplanned, "b").unwrap();
    writer.commit_failover().unwrap();
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    same(&mut reader, &chosen.image);
}

#[test]
fn a_point_that_is_not_there_is_not_promoted() {
    let scratch = Scratch::new();
    let (history, mut writer) = begun(&scratch.path().join("store"), None, 4);
    let before = writer.catalogue().clone();
    let gone = history.model.points[0].id;
    writer.drop_point(gone).unwrap();
    let refused = writer.promote(gone, How::Unplanned, "b").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    assert_eq!(writer.catalogue().generation, before.generation);
}

/// What is left to see of a failover.
type Seen = (u64, &'static str, Epoch, Vec<hrl_format::id::PointId>);

fn seen(catalogue: &Catalogue) -> Seen {
    (
        catalogue.generation.number.get(),
        catalogue.recovery.as_str(),
        catalogue.last_epoch(),
        catalogue.points.iter().map(|point| point.id).collect(),
    )
}

/// A failover, another choice, and a commit, recorded; what was acknowledged after how many steps.
fn recorded(seed: u64) -> (Vec<(usize, Seen)>, Vec<Known>, crash::Recorder) {
    let scratch = Scratch::in_memory();
    let path = scratch.path().join("store");
    crash::start(&path);
    let key = key_of(seed);
    let (history, mut writer) = begun(&path, key, seed);
    let points = history.model.points.clone();
    let mut all = vec![(crash::steps(), seen(writer.catalogue()))];
    let mut note = |writer: &VolumeWriter| all.push((crash::steps(), seen(writer.catalogue())));
    writer.promote(points[3].id, How::Planned, "b").unwrap();
    note(&writer);
    writer.promote(points[1].id, How::Unplanned, "b").unwrap();
    note(&writer);
    writer.commit_failover().unwrap();
    note(&writer);
    writer.delete_retired().unwrap();
    note(&writer);
    (all, points, crash::stop())
}

fn key_of(seed: u64) -> Option<VolumeKey> {
    (seed % 2 == 1).then(|| VolumeKey::from_bytes([seed as u8; 32]))
}

#[test]
fn a_crash_at_every_step_leaves_the_state_before_or_the_one_after() {
    for seed in [10, 11] {
        let (all, points, recorder) = recorded(seed);
        let mut random = Random::new(seed);
        let mut states = std::collections::BTreeSet::new();
        for at in all[0].0..=recorder.len() {
            let losses = [
                Loss::Nothing,
                Loss::Everything,
                Loss::Contents,
                Loss::Names,
                Loss::Some(random.next()),
            ];
            for loss in losses {
                println!("seed {seed}, crash before step {at}, {loss:?}");
                let scratch = Scratch::in_memory();
                recorder.rebuild(at, loss, scratch.path());
                let next = all.partition_point(|(steps, _)| *steps <= at);
                let possible = &all[next - 1..(next + 1).min(all.len())];
                let store = Store::open(scratch.path()).unwrap();
                let volume = store.volumes().unwrap()[0].id;
                let writer = store.volume_writer(volume, key_of(seed)).unwrap();
                let found = seen(writer.catalogue());
                assert!(possible.iter().any(|(_, seen)| *seen == found), "{found:?}");
                states.insert((found.0, found.1));
                let reader = store.volume(volume, key_of(seed)).unwrap();
                for point in &writer.catalogue().points {
                    let known = points.iter().find(|known| known.id == point.id).unwrap();
                    same(&mut reader.open_point(point.id).unwrap(), &known.image);
                }
                go_on(writer, seed);
            }
        }
        let states: Vec<_> = states.into_iter().collect();
        let all = [
            (1, "replicating"),
            (2, "failed-over"),
            (3, "committed"),
            (3, "failed-over"),
        ];
        assert_eq!(states, all);
    }
}

/// Whatever a crash left can be brought to its end.
fn go_on(mut writer: VolumeWriter, seed: u64) {
    if writer.catalogue().recovery == Recovery::Replicating {
        let newest = writer.catalogue().points.last().unwrap().id;
        writer.promote(newest, How::Unplanned, "c").unwrap();
    }
    writer.commit_failover().unwrap();
    let epoch = writer.begin_epoch().unwrap();
    writer.commit(epoch).unwrap();
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    assert_eq!(writer.catalogue().points.len(), 1, "seed {seed}");
}
