//! The states of a volume that can be had: its recovery points, and the moments between them
//! where logs are in order. Here a time or a name becomes one of them, and a moment is opened:
//! whole logs up to the epoch before, and over them the first records of the epoch's own.

use std::fmt;

use hrl_format::id::PointId;
use hrl_format::record::Root;
use hrl_format::units::{Epoch, Sequence, Timestamp, VolumeSize};
use hrl_format::{Log, MarkDetail, VolumeKey};

use super::catalogue::{Catalogue, LogEntry, Point};
use super::layers::Layers;
use super::layout::VolumeFolder;
use super::lease::Wanted;
use super::moment::{InOrder, Moment, Window};
use super::point_reader::PointReader;
use super::reader::{PointSelector, VolumeReader};
use super::sources::{LogFile, OpenFiles, StoredLog, open_log};
use super::writer::key_missing;
use crate::error::{Error, ErrorKind, Result};
use crate::time::rfc3339;

/// Names a state of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateId {
    /// A recovery point.
    Point(PointId),
    /// A moment in a window.
    Moment(Moment),
}

impl From<PointId> for StateId {
    fn from(id: PointId) -> Self {
        Self::Point(id)
    }
}

impl From<Moment> for StateId {
    fn from(moment: Moment) -> Self {
        Self::Moment(moment)
    }
}

/// A state of the volume that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A recovery point.
    Point(Point),
    /// A moment in a window.
    Moment(MomentState),
}

/// The volume at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MomentState {
    /// Which.
    pub moment: Moment,
    /// When its last record completed.
    pub time: Timestamp,
    /// How large the volume was.
    pub size: VolumeSize,
    /// The recovery point that is the same state, if one is.
    pub point: Option<Point>,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Point(point) => write!(f, "point {}", point.id),
            Self::Moment(state) => write!(f, "moment {}", state.moment),
        }
    }
}

impl State {
    /// Its name.
    pub const fn id(&self) -> StateId {
        match self {
            Self::Point(point) => StateId::Point(point.id),
            Self::Moment(state) => StateId::Moment(state.moment),
        }
    }

    /// When the volume was so.
    pub const fn time(&self) -> Timestamp {
        match self {
            Self::Point(point) => point.time,
            Self::Moment(state) => state.time,
        }
    }

    /// How large the volume was.
    pub const fn size(&self) -> VolumeSize {
        match self {
            Self::Point(point) => point.size,
            Self::Moment(state) => state.size,
        }
    }

    /// The recovery point that it is.
    pub const fn point(&self) -> Option<&Point> {
        match self {
            Self::Point(point) => Some(point),
            Self::Moment(state) => state.point.as_ref(),
        }
    }

    /// What the root of the digest tree must be, where that is known.
    pub fn root(&self) -> Option<Root> {
        self.point().and_then(|point| point.root)
    }
}

const FIND: &str = "find the moment";

impl VolumeReader {
    /// The stretches of time of which every moment can be had, the oldest first.
    ///
    /// # Errors
    /// As [`VolumeReader::catalogue`].
    pub fn windows(&self) -> Result<Vec<Window>> {
        Ok(self.known_catalogue()?.windows())
    }

    /// The state that is meant. A time means the state after the last record that had completed
    /// by then, of those that are known: within a window, of its records; behind one, its last.
    /// If a point that is not younger than the time holds as much, that point is meant.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none, naming the windows if a moment was meant;
    /// [`ErrorKind::Damaged`] if a log in order is not what the catalogue says.
    pub fn state(&self, selector: PointSelector) -> Result<State> {
        let moment = match selector {
            PointSelector::Moment(moment) => moment,
            PointSelector::AtOrBefore(time) => match self.moment_at(time)? {
                Some(moment) => moment,
                None => return self.point(selector).map(State::Point),
            },
            PointSelector::Id(_) | PointSelector::Latest => {
                return self.point(selector).map(State::Point);
            }
        };
        let (_lease, catalogue) = self.lease(Wanted::Moment(moment.epoch))?;
        self.moment_state(&catalogue, moment).map(State::Moment)
    }

    /// Opens a state for reading, and leases it.
    ///
    /// # Errors
    /// Those of [`VolumeReader::open_point`] and [`VolumeReader::open_moment`].
    pub fn open(&self, state: impl Into<StateId>) -> Result<PointReader> {
        match state.into() {
            StateId::Point(id) => self.open_point(id),
            StateId::Moment(moment) => self.open_moment(moment),
        }
    }

    /// Opens a moment for reading, and leases the point that holds it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], naming the windows, if it is in none (any more);
    /// [`ErrorKind::Key`] if the volume is encrypted and the reader has no key;
    /// [`ErrorKind::Damaged`] if a log that it needs is not what the catalogue says.
    pub fn open_moment(&self, moment: Moment) -> Result<PointReader> {
        const OPEN: &str = "open a moment";
        let (lease, catalogue) = self.lease(Wanted::Moment(moment.epoch))?;
        if catalogue.key.is_some() && self.key.is_none() {
            return Err(key_missing(&catalogue, OPEN));
        }
        let state = self.moment_state(&catalogue, moment)?;
        let (at, ..) = find(&self.folder, &catalogue, moment)?;
        let logs = match moment.after {
            Some(_) => &catalogue.logs[..=at],
            None => &catalogue.logs[..at],
        };
        let key = self.key.as_ref();
        let mut layers = Layers::open(&self.folder, &catalogue, logs, state.size, key)?;
        if let Some(last) = moment.after {
            layers.cut_behind(last)?;
        }
        Ok(PointReader::new(lease, State::Moment(state), layers))
    }

    /// The moment that a time within or behind a window means; `None` if it lies before all
    /// windows, or a point not younger than it holds as much.
    fn moment_at(&self, time: Timestamp) -> Result<Option<Moment>> {
        let (_lease, catalogue) = self.lease(Wanted::View)?;
        let mut windows = catalogue.window_logs().into_iter().rev();
        // The newest that has begun. If it has ended by then, its last record is meant: nothing
        // newer is known until the next point or window.
        let begun = |window: Window| window.from.time <= time;
        let found = windows.find(|range| {
            let window = catalogue.window(&catalogue.logs[range.clone()]);
            window.is_some_and(begun)
        });
        let Some(range) = found else { return Ok(None) };
        let logs = &catalogue.logs[range];
        let begun = |log: &&LogEntry| {
            let records = log.in_order().filter(|records| records.records > 0);
            records.is_some_and(|records| records.from <= time)
        };
        let Some(entry) = logs.iter().rfind(begun).or(logs.first()) else {
            return Ok(None);
        };
        let log = open_one(&self.folder, entry, self.key.as_ref())?;
        let after = log.log.last_record_at(time);
        let moment = Moment {
            epoch: entry.first,
            after: after.map_err(|e| log.error(FIND, e))?,
        };
        let mut points = catalogue.points.iter().rev();
        let newest = points.find(|point| point.time <= time);
        let holds_as_much = newest.is_some_and(|point| match moment.after {
            Some(_) => point.epoch >= moment.epoch,
            None => point.epoch.next() >= moment.epoch,
        });
        Ok(Some(moment).filter(|_| !holds_as_much))
    }

    /// What is known of a moment without reading any data.
    fn moment_state(&self, catalogue: &Catalogue, moment: Moment) -> Result<MomentState> {
        let (at, entry, records) = find(&self.folder, catalogue, moment)?;
        let log = open_one(&self.folder, entry, self.key.as_ref())?;
        let marks = Marks::up_to(&log.log, moment.after).map_err(|e| log.error(FIND, e))?;
        // The point that ends in the same state.
        let (time, epoch) = match moment.after {
            Some(sequence) => {
                let time = log.log.time_of(sequence).map_err(|e| log.error(FIND, e))?;
                (time, marks.is_end.then_some(entry.first))
            }
            None => {
                let first = catalogue.window(&catalogue.logs[at..=at]);
                let time = first.map_or(records.from, |window| window.from.time);
                let before = entry.first.get().checked_sub(1);
                (time, before.map(Epoch::new))
            }
        };
        let mut points = catalogue.points.iter().rev();
        let mut point = points.find(|point| Some(point.epoch) == epoch).cloned();
        if let Some(point) = &mut point {
            self.reveal(catalogue, point)?;
        }
        Ok(MomentState {
            moment,
            time,
            size: marks.size,
            point,
        })
    }
}

fn open_one(folder: &VolumeFolder, entry: &LogEntry, key: Option<&VolumeKey>) -> Result<StoredLog> {
    open_log(folder, entry, &OpenFiles::default().into(), key)
}

/// What the marks of a log say of its state after a record.
struct Marks {
    size: VolumeSize,
    /// Whether only tags follow.
    is_end: bool,
}

impl Marks {
    fn up_to(log: &Log<LogFile>, after: Option<Sequence>) -> hrl_format::Result<Self> {
        let mut size = log.header().volume_size;
        let mut next = after.map_or(0, |after| after.get() + 1);
        for mark in log.marks() {
            let mark = mark?;
            let before = Some(mark.sequence) <= after;
            match mark.detail {
                MarkDetail::Resize(to) if before => size = to,
                MarkDetail::Tag(_) if mark.sequence.get() == next => next += 1,
                MarkDetail::Resize(_) | MarkDetail::Tag(_) => {}
            }
        }
        Ok(Self {
            size,
            is_end: next == log.seal().records,
        })
    }
}

/// The log that a moment lies in: its place in the chain, and its records.
pub(super) fn find<'a>(
    folder: &VolumeFolder,
    catalogue: &'a Catalogue,
    moment: Moment,
) -> Result<(usize, &'a LogEntry, InOrder)> {
    let refuse = |why: String| Err(no_such_moment(folder, catalogue, &why));
    let epoch = moment.epoch;
    let mut logs = catalogue.logs.iter().enumerate();
    let Some((at, log)) = logs.find(|(_, log)| log.first <= epoch && epoch <= log.last) else {
        let why = match catalogue.base {
            Some(base) if epoch <= base.epoch => "has been folded into the base",
            _ => "is not in the store",
        };
        return refuse(format!("epoch {epoch} {why}"));
    };
    let Some(records) = catalogue.window_log(log) else {
        let why = match log.in_order() {
            Some(_) => "lies before the oldest recovery point",
            None => "is not kept write by write",
        };
        return refuse(format!("epoch {epoch} {why}"));
    };
    match (moment.after, records.last()) {
        (None, _) => {}
        (after, last) if after <= last => {}
        (_, None) => return refuse(format!("epoch {epoch} has no records")),
        (_, Some(last)) => return refuse(format!("epoch {epoch} has the records 0 to {last}")),
    }
    Ok((at, log, records))
}

/// The error for a moment that cannot be had.
pub(super) fn no_such_moment(folder: &VolumeFolder, catalogue: &Catalogue, why: &str) -> Error {
    let windows = catalogue.windows();
    let named = windows.iter().map(|window| {
        let [from, to] = [window.from, window.to].map(|end| (end.moment, rfc3339(end.time)));
        format!("{} to {} ({} to {})", from.0, to.0, from.1, to.1)
    });
    let named: Vec<String> = named.collect();
    let can_be_had = match named.is_empty() {
        true => "there are only recovery points".to_owned(),
        false => format!("any moment can be had from {}", named.join(", and from ")),
    };
    Error::new(ErrorKind::NotFound, FIND)
        .path(folder.path())
        .detail(format!("{why}; {can_be_had}"))
        .advice("`replica points` lists them")
}
