//! Any moment of epochs in order, against the model: which can be had, what they are, whatever
//! is folded, merged or dropped meanwhile and while somebody reads them; and which cannot.

use std::fs;

use hrl_format::id::PointId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, Epoch, Sequence, Timestamp};
use hrl_format::{RecordOrder, VolumeKey};

use super::Scratch;
use super::model::{History, SHORT, cases, extent, same};
use crate::error::ErrorKind;
use crate::store::catalogue::Point;
use crate::store::{
    EpochLog, FoldStep, LogOrder, Moment, PointReader, PointSelector, RestoreOptions, RestoreProof,
    Retained, StateId, VolumeWriter,
};

/// The volume behind one call of `append`, as the model remembers it.
#[derive(Clone, Debug)]
pub(super) struct KnownMoment {
    pub(super) moment: Moment,
    pub(super) time: Timestamp,
    pub(super) image: Vec<u8>,
    /// When the last record of its epoch completed.
    epoch_end: Timestamp,
    /// Whether it is older than what retention keeps.
    given_up: bool,
}

impl History {
    pub(super) fn order(&mut self) -> RecordOrder {
        match self.random.below(3) {
            0 => RecordOrder::AsRead,
            _ => RecordOrder::AsCompleted,
        }
    }

    /// After a change: how many records it became is known by the next, or by the seal.
    pub(super) fn remember(&mut self, epoch: &EpochLog) {
        let records = epoch.records();
        let moment = Moment {
            epoch: epoch.epoch(),
            after: records.checked_sub(1).map(Sequence::new),
        };
        self.pending.push(KnownMoment {
            moment,
            time: self.time(),
            image: self.model.image.clone(),
            epoch_end: self.time(),
            given_up: false,
        });
    }

    pub(super) fn forget(&mut self) {
        self.pending.clear();
    }

    /// The epoch was committed: its moments count if it is in order.
    pub(super) fn keep_moments(&mut self, writer: &VolumeWriter) {
        let last = writer.catalogue().logs.last().unwrap();
        let mut pending = std::mem::take(&mut self.pending);
        if let LogOrder::AsCompleted(records) = last.order {
            for known in &mut pending {
                known.epoch_end = self.time();
            }
            assert!(records.records == 0 || records.to == self.time());
            let known = pending.last().and_then(|known| known.moment.after);
            assert!(known <= records.last());
            self.model.moments.extend(pending);
        }
    }

    /// Retention left the moments since `since`, and behind the oldest point that the policy keeps.
    pub(super) fn give_up(
        &mut self,
        before: &[Point],
        retained: &Retained,
        since: Option<Timestamp>,
    ) {
        let gone = |id: &PointId| retained.dropped.contains(id) || retained.leased.contains(id);
        let kept = before.iter().filter(|point| !gone(&point.id));
        let oldest = kept.map(|point| point.epoch).min();
        for known in &mut self.model.moments {
            let is_old = since.is_some_and(|since| known.epoch_end < since);
            known.given_up |= is_old || oldest.is_some_and(|epoch| known.moment.epoch <= epoch);
        }
    }

    /// Those that must be there.
    fn moments(&self) -> Vec<KnownMoment> {
        let catalogue = self.reader().catalogue().unwrap();
        let Some(oldest) = catalogue.points.first().map(|point| point.epoch) else {
            return Vec::new();
        };
        let can = |known: &&KnownMoment| !known.given_up && known.moment.epoch > oldest;
        self.model.moments.iter().filter(can).cloned().collect()
    }

    /// Opens one of the moments; the point that holds it comes along.
    pub(super) fn hold_a_moment(&mut self) -> Option<(PointReader, Vec<u8>, PointId)> {
        let moments = self.moments();
        let known = moments.get(self.random.below(moments.len().max(1) as u64) as usize)?;
        let catalogue = self.reader().catalogue().unwrap();
        let mut before = catalogue.points.iter().rev();
        let point = before.find(|point| point.epoch < known.moment.epoch)?;
        let open = self.reader().open(known.moment).unwrap();
        Some((open, known.image.clone(), point.id))
    }

    pub(super) fn check_some_moments(&mut self) {
        let moments = self.moments();
        for _ in 0..moments.len().min(5) {
            let pick = self.random.below(moments.len() as u64) as usize;
            self.check_moment(&moments[pick]);
        }
    }

    fn check_moment(&self, known: &KnownMoment) {
        let reader = self.reader();
        let mut open = reader.open(known.moment).unwrap();
        assert_eq!(open.state().time(), known.time);
        assert_eq!(open.state().size().get() as usize, known.image.len());
        same(&mut open, &known.image);
    }

    /// All moments that there must be are there, and are what they were; the others are not.
    pub(super) fn check_moments(&mut self) {
        let moments = self.moments();
        moments.iter().for_each(|known| self.check_moment(known));
        let windows = self.reader().windows().unwrap();
        for known in &self.model.moments {
            let can = moments.iter().any(|other| other.moment == known.moment);
            let inside = |w: &&crate::store::Window| {
                w.from.moment <= known.moment && known.moment <= w.to.moment
            };
            assert_eq!(windows.iter().filter(inside).count(), usize::from(can));
            if !can {
                let error = self.reader().open(known.moment).err().unwrap();
                assert_eq!(error.kind(), ErrorKind::NotFound);
            }
        }
        self.check_times(&moments);
    }

    /// Each time means what it must.
    fn check_times(&self, moments: &[KnownMoment]) {
        let reader = self.reader();
        for seconds in 1_000..=self.time().as_nanos() / 1_000_000_000 {
            let time = Timestamp::from_nanos(seconds * 1_000_000_000 + 1);
            let point = self.model.points.iter().rfind(|known| known.time <= time);
            let moment = moments.iter().rfind(|known| known.time <= time);
            let state = reader.state(PointSelector::AtOrBefore(time));
            let (found, image) = match (point, moment) {
                (None, None) => {
                    assert_eq!(state.unwrap_err().kind(), ErrorKind::NotFound);
                    continue;
                }
                (Some(point), Some(moment)) if moment.time > point.time => {
                    (moment.moment.into(), &moment.image)
                }
                (None, Some(moment)) => (moment.moment.into(), &moment.image),
                (Some(point), _) => (point.id.into(), &point.image),
            };
            let state = state.unwrap();
            if state.id() != found {
                // The tag of a point that was taken back: it changes nothing.
                let wrong = format!("{seconds} s: {:?} for {found:?}", state.id());
                assert!(matches!(state.id(), StateId::Moment(_)), "{wrong}");
                same(&mut reader.open(state.id()).unwrap(), image);
            }
            assert_eq!(state.size().get() as usize, image.len());
        }
    }
}

/// A store with epochs in order, each with a point behind it.
fn streamed(scratch: &Scratch, key: Option<VolumeKey>) -> (History, VolumeWriter) {
    let mut history = History::begin(&scratch.path().join("store"), key, 77);
    history.log_bytes = SHORT;
    let mut writer = history.writer();
    history.baseline(&mut writer);
    let mut epoch = writer.begin_epoch().unwrap();
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    for _ in 0..4 {
        in_order(&mut history, &mut writer);
    }
    (history, writer)
}

/// An epoch in order, with a point.
fn in_order(history: &mut History, writer: &mut VolumeWriter) {
    let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
    for _ in 0..6 {
        history.change(&mut epoch);
        history.remember(&epoch);
    }
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    history.keep_moments(writer);
}

/// It is begun later than what is recorded behind it happened: what was recorded counts.
#[test]
fn a_window_that_begins_with_an_empty_epoch_begins_with_its_first_record() {
    for key in keys() {
        let scratch = Scratch::new();
        let (mut history, mut writer) = streamed(&scratch, key);
        let mut read = writer.begin_epoch().unwrap();
        history.change(&mut read);
        writer.commit(read).unwrap();
        let empty = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
        writer.commit(empty).unwrap();
        in_order(&mut history, &mut writer);
        history.check_moments();
    }
}

fn keys() -> [Option<VolumeKey>; 2] {
    [None, Some(VolumeKey::from_bytes([9; 32]))]
}

fn moment(text: &str) -> Moment {
    text.parse().unwrap()
}

#[test]
fn random_cuts_of_a_recorded_stream_are_what_a_replay_comes_to() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let mut history = History::begin(&scratch.path().join("store"), key, 3);
        let mut writer = history.writer();
        history.baseline(&mut writer);
        let mut epoch = writer.begin_epoch().unwrap();
        history.point_with_root(&mut epoch);
        writer.commit(epoch).unwrap();
        let base = history.model.image.clone();
        let size = base.len() as u64;
        // Every write of three epochs, with the records that it became.
        let mut stream = Vec::new();
        for _ in 0..3 {
            let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
            for _ in 0..200 {
                let at = history.random.below(size);
                let len = 1 + history.random.below((size - at).min(9000));
                let data: Vec<u8> = (0..len).map(|_| history.random.next() as u8).collect();
                let (extent, time) = (extent(at, len), history.now());
                let data = &data[..];
                epoch.append(&Record::Write { extent, data }, time).unwrap();
                let after = Some(Sequence::new(epoch.records() - 1));
                let epoch = epoch.epoch();
                stream.push((Moment { epoch, after }, time, at as usize, data.to_vec()));
            }
            writer.commit(epoch).unwrap();
        }
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        let reader = history.reader();
        for n in 0..cases().count() {
            let cut = history.random.below(stream.len() as u64) as usize;
            let mut replayed = base.clone();
            for (_, _, at, data) in &stream[..=cut] {
                replayed[*at..*at + data.len()].copy_from_slice(data);
            }
            let (moment, time, ..) = stream[cut];
            let selector = match n % 2 {
                0 => PointSelector::Moment(moment),
                _ => PointSelector::AtOrBefore(time),
            };
            let state = reader.state(selector).unwrap();
            assert_eq!((state.id(), state.time()), (moment.into(), time));
            let output = scratch.path().join("restored");
            let options = RestoreOptions::default();
            let restored = reader.restore(state.id(), &output, &options, &mut |_| {});
            assert_eq!(restored.unwrap().proof, RestoreProof::None);
            assert!(fs::read(&output).unwrap() == replayed, "cut {moment}");
            fs::remove_file(&output).unwrap();
        }
    }
}

#[test]
fn a_moment_that_is_a_point_is_proved_by_its_root() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (history, _writer) = streamed(&scratch, key);
        let reader = history.reader();
        let points = reader.points().unwrap();
        let ends = points[1..].iter().map(|point| {
            let mut known = history.model.moments.iter();
            let last = known.rfind(|known| known.moment.epoch == point.epoch);
            (last.unwrap().moment, point)
        });
        let starts = points.iter().map(|point| {
            let epoch = point.epoch.next();
            (Moment { epoch, after: None }, point)
        });
        // Behind the newest point no epoch follows.
        let starts = starts.take(points.len() - 1);
        for (moment, point) in ends.chain(starts) {
            let state = reader.state(PointSelector::Moment(moment)).unwrap();
            assert_eq!(state.point(), Some(point), "{moment}");
            assert_eq!(&reader.point(PointSelector::Moment(moment)).unwrap(), point);
            let output = scratch.path().join("restored");
            let options = RestoreOptions::default();
            let restored = reader.restore(moment, &output, &options, &mut |_| {});
            assert_eq!(restored.unwrap().proof, RestoreProof::Root);
            let known = history.model.points.iter().find(|p| p.id == point.id);
            assert!(fs::read(&output).unwrap() == known.unwrap().image);
            fs::remove_file(&output).unwrap();
        }
        let between = reader.state(PointSelector::Moment(moment("3:0"))).unwrap();
        assert_eq!(between.point(), None);
        let error = reader.point(PointSelector::Moment(moment("3:0")));
        assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn what_lies_in_no_window_is_refused_and_the_windows_are_named() {
    let scratch = Scratch::in_memory();
    let (mut history, mut writer) = streamed(&scratch, None);
    history.epoch_as_read(&mut writer);
    in_order(&mut history, &mut writer);
    let reader = history.reader();
    let windows = reader.windows().unwrap();
    let ends: Vec<_> = windows
        .iter()
        .map(|window| format!("{} {}", window.from.moment, window.to.moment))
        .collect();
    // The tag is a record, too.
    assert_eq!(ends, ["3:start 6:6", "8:start 8:6"]);
    let points = reader.points().unwrap();
    assert_eq!(windows[0].from.time, points[0].time);
    assert_eq!(windows[0].to.time, points[4].time);
    assert_eq!(windows[1].from.time, points[5].time);
    for (text, why) in [
        ("1:0", "has been folded into the base"),
        ("2:0", "no recovery point lies before epoch 2"),
        ("7:0", "epoch 7 is not kept write by write"),
        ("3:7", "epoch 3 has the records 0 to 6"),
        ("9:0", "epoch 9 is not in the store"),
    ] {
        let error = reader.state(PointSelector::Moment(moment(text)));
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let said = error.to_string();
        let named = said.contains("from 3:start to 6:6 (") && said.contains("from 8:start to 8:6");
        assert!(named, "{said}");
        // Nothing is older than epoch 2's point, and the base is not looked at before that.
        assert!(text == "1:0" || said.contains(why), "{said}");
    }
}

/// A time behind the last record of a window must not fall back to the point before it.
#[test]
fn a_time_behind_a_window_means_its_last_record() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = streamed(&scratch, key);
        // Records behind the newest point, and no point behind them.
        let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
        for _ in 0..3 {
            history.change(&mut epoch);
            history.remember(&epoch);
        }
        writer.commit(epoch).unwrap();
        history.keep_moments(&writer);
        let last = history.model.moments.last().unwrap().clone();
        let at = |time| PointSelector::AtOrBefore(time);
        let little = Timestamp::from_nanos(last.time.as_nanos() + 1);
        let never = Timestamp::from_nanos(i64::MAX);
        let reader = history.reader();
        assert!(reader.windows().unwrap().iter().all(|w| !w.holds(little)));
        for time in [last.time, little, never] {
            let state = reader.state(at(time)).unwrap();
            assert_eq!((state.id(), state.time()), (last.moment.into(), last.time));
            same(&mut reader.open(state.id()).unwrap(), &last.image);
        }
        // What follows is read later: of the gap nothing is known, up to its point.
        history.now();
        let gap = history.now();
        history.epoch_as_read(&mut writer);
        let reader = history.reader();
        let newest = reader.points().unwrap().last().unwrap().clone();
        assert!(gap < newest.time && !reader.windows().unwrap().iter().any(|w| w.holds(gap)));
        assert_eq!(reader.state(at(gap)).unwrap().id(), last.moment.into());
        for time in [newest.time, never] {
            assert_eq!(reader.state(at(time)).unwrap().id(), newest.id.into());
        }
        history.check_moments();
    }
}

#[test]
fn a_moment_being_read_is_held_and_not_folded_over() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = streamed(&scratch, key);
        let known = history.model.moments[14].clone();
        assert_eq!(known.moment.epoch, Epoch::new(5));
        let mut open = history.reader().open(known.moment).unwrap();
        for _ in 0..5 {
            in_order(&mut history, &mut writer);
        }
        let before = history.model.points[2].clone();
        let now = history.now();
        let retained = writer.retain(&"#1".parse().unwrap(), now).unwrap();
        assert_eq!(retained.leased, [before.id]);
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        same(&mut open, &known.image);
        let error = history.reader().open(known.moment).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        drop(open);
        let now = history.now();
        writer.retain(&"#1".parse().unwrap(), now).unwrap();
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        assert_eq!(writer.catalogue().points.len(), 1);
        assert!(history.reader().windows().unwrap().is_empty());
    }
}

#[test]
fn logs_of_a_window_are_left_alone_until_a_point_beside_them_is_dropped() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = streamed(&scratch, key);
        history.log_bytes = ByteLen::new(64 << 20);
        drop(writer);
        writer = history.writer();
        // Epochs without a point: neighbours that could be merged.
        for _ in 0..3 {
            let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
            history.change(&mut epoch);
            history.remember(&epoch);
            writer.commit(epoch).unwrap();
            history.keep_moments(&writer);
        }
        in_order(&mut history, &mut writer);
        let logs = writer.catalogue().logs.clone();
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        let left: Vec<_> = logs.iter().rev().take(8).map(|log| log.log).collect();
        let now_left = writer.catalogue().logs.iter().rev().take(8);
        assert!(now_left.map(|log| log.log).eq(left));
        history.check_moments();
        // A point that is taken back leaves its moments.
        let taken = history.model.points.remove(3);
        writer.drop_point(taken.id).unwrap();
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        history.check_moments();
        let windows = history.reader().windows().unwrap().len();
        assert_eq!(windows, 1);
        // One that has expired does not.
        let points = writer.catalogue().points.clone();
        let oldest = points[0].time;
        let policy = "#2".parse().unwrap();
        let now = history.now();
        let retained = writer.retain(&policy, now).unwrap();
        assert!(oldest < points[points.len() - 2].time);
        let dropped = &retained.dropped;
        history.model.points.retain(|p| !dropped.contains(&p.id));
        history.give_up(&points, &retained, None);
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
        history.check();
        history.check_moments();
    }
}

#[test]
fn a_catalogue_that_calls_a_log_in_order_which_is_not_is_found_out() {
    let scratch = Scratch::in_memory();
    let (mut history, mut writer) = streamed(&scratch, None);
    history.epoch_as_read(&mut writer);
    let mut next = writer.catalogue().clone();
    let order = next.logs[3].order;
    next.logs.last_mut().unwrap().order = order;
    writer.save(next).unwrap();
    let epoch = writer.catalogue().last_epoch();
    let error = history.reader().open(Moment { epoch, after: None });
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Damaged);
    assert!(!history.reader().check(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn a_moment_before_any_point_is_not_to_be_had() {
    let scratch = Scratch::in_memory();
    let mut history = History::begin(&scratch.path().join("store"), None, 5);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
    history.change(&mut epoch);
    writer.commit(epoch).unwrap();
    assert!(history.reader().windows().unwrap().is_empty());
    let error = history.reader().open(moment("2:0")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let said = error.to_string();
    assert!(said.contains("there are only recovery points"), "{said}");
}
