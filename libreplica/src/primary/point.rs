//! How an epoch is made from a source that is in use, and a recovery point of its end.
//!
//! Rounds first, then a moment without writes (`still.rs`); then seal, ship, and list the
//! point once it is durable. Whatever keeps the point from being made, what was read is
//! shipped all the same, as an epoch without a point; what was not read is dirty again
//! before the rest is acknowledged.
//!
//! Of a group only what all members reached is a point. A member that fails drops out; what
//! the others have changed is shipped, and they know why there is no point.

use std::time::{Duration, Instant};

use hrl_format::id::{GroupId, PointId};
use hrl_format::record::{Consistency, Tag};
use hrl_format::units::Timestamp;

use crate::capture::inline::Moment;
use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::Phase;
use crate::primary::draft::EpochDraft;
use crate::primary::environment::Environment;
use crate::primary::instant;
use crate::primary::member::{Member, Source};
use crate::primary::pace::Cause;
use crate::primary::spec::PointOptions;
use crate::primary::status::PointSummary;
use crate::primary::still::{self, Plan};
use crate::primary::tail::Tail;
use crate::primary::volume::Volume;
use crate::store::Point;

/// One volume of an epoch, with its member held.
pub struct Part<'a> {
    /// The volume.
    pub volume: &'a Volume,
    /// Its working part.
    pub member: &'a mut Member,
    /// What was read so far.
    draft: Option<EpochDraft>,
    /// Why it has dropped out.
    pub(super) failed: Option<Error>,
    point: Option<Point>,
}

/// Why there is no point.
pub struct Missed {
    /// In short.
    pub cause: Cause,
    /// In full.
    pub error: Error,
}

impl From<Error> for Missed {
    fn from(error: Error) -> Self {
        Self {
            cause: Cause::Failed,
            error,
        }
    }
}

/// What the epoch shall end with.
pub enum Wish<'a> {
    /// With a point.
    Point(&'a PointOptions),
    /// A point was wished for, and is known to be none: somebody is missing.
    NoPoint(Error),
    /// With nothing: it shall show that the volume ships.
    Epoch,
}

/// What came of it.
pub struct Made {
    /// Of each part, in order: its point, nothing if it was only shipped, or what failed.
    pub outcomes: Vec<Result<Option<PointSummary>>>,
    /// Why there is no point, unless there is one or none was wished for.
    pub missed: Option<Missed>,
    /// How long writers were blocked, if it came to that.
    pub frozen: Option<Duration>,
}

/// The state that becomes a point.
struct Captured<'a> {
    time: Timestamp,
    consistency: Consistency,
    options: &'a PointOptions,
}

/// Makes one epoch of all `parts`, with a point if that is wished for and can be. Nothing
/// dirty is lost: what was shipped is acknowledged, the rest stays dirty.
pub fn make(
    parts: &mut [Part<'_>],
    environment: &Environment,
    wish: Wish<'_>,
    deadline: Instant,
) -> Made {
    each(parts, |part| part.bring_up(environment));
    let inline = instant::is_inline(parts);
    let mut frozen = None;
    let ended = match wish {
        Wish::Point(options) => {
            let (captured, blocked) = capture(parts, environment, options, deadline);
            frozen = blocked;
            Some(captured)
        }
        Wish::NoPoint(error) if inline => {
            let reached = instant::reach(parts, environment, &[]);
            Some(Err(reached.moment.err().unwrap_or_else(|| error.into())))
        }
        Wish::Epoch if inline => instant::reach(parts, environment, &[])
            .moment
            .err()
            .map(Err),
        Wish::NoPoint(error) => {
            begin(parts);
            let read = still::rounds(parts, &[], deadline);
            Some(Err(read.err().unwrap_or_else(|| error.into())))
        }
        Wish::Epoch => {
            begin(parts);
            still::rounds(parts, &[], deadline).err().map(Err)
        }
    };
    let missed = finish(parts, ended);
    let outcomes = parts
        .iter_mut()
        .map(|part| match part.failed.take() {
            Some(error) => Err(error),
            None => Ok(part.point.take().as_ref().map(PointSummary::from)),
        })
        .collect();
    Made {
        outcomes,
        missed,
        frozen,
    }
}

/// Brings everything up to one moment into the drafts; that moment, or why there was none,
/// and how long writers were blocked for it.
fn capture<'a>(
    parts: &mut [Part<'_>],
    environment: &Environment,
    options: &'a PointOptions,
    deadline: Instant,
) -> (Result<Captured<'a>, Missed>, Option<Duration>) {
    let plan = match all_well(parts).and_then(|()| Plan::new(parts, options)) {
        Err(missed) if missed.cause == Cause::Refused => return (Err(missed), None),
        plan => plan,
    };
    if instant::is_inline(parts) {
        return match plan {
            Err(missed) => {
                // What the others have changed is shipped all the same.
                instant::reach(parts, environment, &[]);
                (Err(missed), None)
            }
            Ok(plan) => reach(parts, environment, &plan, options, deadline),
        };
    }
    begin(parts);
    let filesystems = plan.as_ref().map_or(&[][..], |plan| &plan.filesystems);
    let read = still::rounds(parts, filesystems, deadline);
    let plan = plan.and_then(|plan| read.and_then(|()| all_well(parts)).map(|()| plan));
    match plan {
        Err(missed) => (Err(missed), None),
        Ok(plan) => reach(parts, environment, &plan, options, deadline),
    }
}

fn reach<'a>(
    parts: &mut [Part<'_>],
    environment: &Environment,
    plan: &Plan,
    options: &'a PointOptions,
    deadline: Instant,
) -> (Result<Captured<'a>, Missed>, Option<Duration>) {
    let reached = still::reach(parts, environment, plan, deadline);
    let captured = reached.moment.map(|time| Captured {
        time,
        consistency: plan.consistency,
        options,
    });
    (captured, reached.frozen)
}

/// Does `work` for each part that has not failed; one that fails drops out.
pub fn each(parts: &mut [Part<'_>], mut work: impl FnMut(&mut Part<'_>) -> Result<()>) {
    for part in parts.iter_mut().filter(|part| part.failed.is_none()) {
        if let Err(error) = work(part) {
            part.failed = Some(error);
        }
    }
}

/// Whether none has dropped out.
///
/// # Errors
/// Why there is no point of the group, for those that have not.
pub fn all_well(parts: &[Part<'_>]) -> Result<(), Missed> {
    let failed = parts
        .iter()
        .find_map(|part| part.failed.as_ref().map(|error| (part, error)));
    match failed {
        None => Ok(()),
        Some((part, error)) => Err(Error::new(error.kind(), "make a point of the group")
            .detail(format!("{} failed: {error}", part.volume.config().name))
            .into()),
    }
}

fn begin(parts: &mut [Part<'_>]) {
    each(parts, |part| {
        part.draft = Some(EpochDraft::begin(&part.member.live()?.1.writer)?);
        Ok(())
    });
}

impl<'a> Part<'a> {
    /// A volume with its member held.
    pub fn new(volume: &'a Volume, member: &'a mut Member) -> Self {
        Self {
            volume,
            member,
            draft: None,
            failed: None,
            point: None,
        }
    }

    fn bring_up(&mut self, environment: &Environment) -> Result<()> {
        self.member.bring_up(self.volume, environment)?;
        if self.volume.config().phase != Phase::Replicating {
            // Found out just now: what is tracked does not make the image one state.
            return Err(Error::new(ErrorKind::ResyncNeeded, "make a point")
                .volume(self.volume.id())
                .detail("source and image must be compared first")
                .advice("that follows by itself; see `replica status`"));
        }
        self.source()?.still_there()
    }

    /// Its source side.
    ///
    /// # Errors
    /// As [`Member::live`].
    pub fn source(&mut self) -> Result<&mut Source> {
        self.member.live().map(|(source, _)| source)
    }

    /// One round; returns the bytes read.
    ///
    /// # Errors
    /// What source or store failed with.
    pub fn round(&mut self) -> Result<u64> {
        let geometry = self.member.geometry();
        let (source, sink) = self.member.live()?;
        let Some(draft) = &mut self.draft else {
            return Ok(0);
        };
        let before = draft.shipped().get();
        source.swap()?;
        source.read_round(|extent, data| {
            draft.add(&geometry, &sink.function, extent, data)?;
            if draft.is_large() {
                draft.roll(&mut sink.writer, &mut sink.tree)?;
            }
            Ok(())
        })?;
        source.finish_round();
        Ok(draft.shipped().get().saturating_sub(before))
    }

    /// Puts what was read in the moment into the draft.
    ///
    /// # Errors
    /// What the store failed with.
    pub fn hand_over(&mut self, tail: Tail) -> Result<()> {
        let geometry = self.member.geometry();
        let (source, sink) = self.member.live()?;
        match &mut self.draft {
            Some(draft) => tail.hand_over(source, draft, &geometry, &sink.function),
            None => Ok(()),
        }
    }

    /// Puts what a moment of the stream is made of into the draft.
    ///
    /// # Errors
    /// As [`Member::gather`].
    pub fn gather(&mut self, moment: &Moment) -> Result<()> {
        self.draft = Some(self.member.gather(moment)?);
        Ok(())
    }

    /// Its member, if nothing of it waits to be shipped.
    pub fn member_without_draft(&mut self) -> Option<&mut Member> {
        self.draft.is_none().then_some(&mut *self.member)
    }

    /// Seals and ships the draft; its point is listed then.
    fn ship(&mut self, mut draft: EpochDraft, tag: Option<Tag>) -> Result<()> {
        let (source, sink) = self.member.live()?;
        let (shipped, began) = (draft.shipped().get(), source.round_began());
        if tag.is_some() || !draft.is_empty() {
            if let Some(mut tag) = tag {
                tag.root = draft.root(&sink.tree)?;
                draft.tag(tag)?;
            }
            let committed = self.member.commit(draft)?;
            self.point = committed.points.into_iter().next();
        }
        self.member.live()?.0.acknowledge()?;
        self.member.epoch_is_stored();
        self.member.caught_up_to(began);
        self.volume
            .publish(|status| status.counters.bytes_shipped += shipped);
        Ok(())
    }

    /// Takes its point back. What it shipped stays; a store that fails at this is brought up
    /// anew.
    fn take_back(&mut self) {
        let Some(point) = self.point.take() else {
            return;
        };
        let taken = self
            .member
            .live()
            .and_then(|(_, sink)| sink.writer.drop_point(point.id));
        if let Err(error) = taken {
            self.volume.publish_error(&error);
            self.failed = self.failed.take().or(Some(error));
        }
    }
}

/// Seals and ships the drafts, with a tag each if there was a moment for one. Returns why
/// there is no point, if one was wished for.
fn finish(parts: &mut [Part<'_>], ended: Option<Result<Captured<'_>, Missed>>) -> Option<Missed> {
    let tags = ended.map(|captured| captured.and_then(|it| Ok(tags(&it, parts.len())?)));
    let (tags, mut missed) = match tags {
        None => (Vec::new(), None),
        Some(Ok(tags)) => (tags, None),
        Some(Err(missed)) => (Vec::new(), Some(missed)),
    };
    let mut tags = tags.into_iter();
    for index in 0..parts.len() {
        let part = &mut parts[index];
        let tag = tags.next();
        let Some(draft) = part.draft.take().filter(|_| part.failed.is_none()) else {
            continue;
        };
        let tag = tag.filter(|_| missed.is_none());
        let was_wished_for = tag.is_some();
        if let Err(error) = part.ship(draft, tag) {
            part.failed = Some(error);
            if was_wished_for {
                missed = all_well(parts).err();
                // A group's point is one of all its members, or none.
                parts[..=index].iter_mut().for_each(Part::take_back);
            }
        }
    }
    missed
}

/// The tags of one point, for as many volumes.
fn tags(captured: &Captured<'_>, volumes: usize) -> Result<Vec<Tag>> {
    let none = |source| Error::new(ErrorKind::Io, "make a point's id").source(source);
    let group = if volumes > 1 {
        Some(GroupId::random().map_err(none)?)
    } else {
        None
    };
    (0..volumes)
        .map(|_| {
            Ok(Tag {
                id: PointId::at(captured.time).map_err(none)?,
                time: captured.time,
                consistency: captured.consistency,
                label: captured.options.label.clone(),
                group,
                root: None,
            })
        })
        .collect()
}
