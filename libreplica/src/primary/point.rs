//! How a recovery point is made from a source that is in use.
//!
//! Rounds first: flush the filesystems, swap the bitmaps, read what was dirty; each round
//! leaves less for the next. When little is left, freeze; read the rest into memory that
//! is there already; see that nothing is dirty and no write in flight; thaw. Then seal,
//! ship, and list the point once it is durable. With nothing mounted there is nothing to
//! freeze, and the point is made when a round ends with nothing dirty.
//!
//! Whatever goes wrong, what was read is shipped all the same, as an epoch without a
//! point; what was not read is dirty again before the rest is acknowledged.

use std::time::{Duration, Instant};

use hrl_format::id::{GroupId, PointId};
use hrl_format::record::{Consistency, Tag};
use hrl_format::units::Timestamp;

use crate::device::{BlockDevice, Filesystem, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::primary::draft::EpochDraft;
use crate::primary::environment::Environment;
use crate::primary::hooks::{HookSetup, Hooks};
use crate::primary::lifecycle;
use crate::primary::member::Member;
use crate::primary::spec::PointOptions;
use crate::primary::status::PointSummary;
use crate::primary::tail::Tail;
use crate::primary::volume::Volume;
use crate::store::Point;

/// Rounds before the freeze, at most; a source that changes faster than it is read is
/// frozen all the same, and the freeze's limit decides.
const ROUNDS_MAX: u32 = 8;
/// Little enough, over all members, to be read while frozen.
const FEW_BYTES: u64 = 4 << 20;
/// How long to look for a quiet moment of a source that has nothing to freeze.
const QUIET_LIMIT: Duration = Duration::from_secs(10);
/// The longest pause between two such looks: under load without a gap, every look ships
/// what changed since the last.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// One volume of the point, with its member held.
pub struct Part<'a> {
    /// The volume.
    pub volume: &'a Volume,
    /// Its working part.
    pub member: &'a mut Member,
}

/// What is mounted over the members, and what the point can promise therefore.
struct Plan {
    filesystems: Vec<Filesystem>,
    consistency: Consistency,
}

/// Makes one point of all `parts`; returns each one's, in order.
///
/// # Errors
/// What failed. Nothing dirty is lost: what was shipped is acknowledged, the rest stays
/// dirty.
pub fn make(
    parts: &mut [Part<'_>],
    environment: &Environment,
    options: &PointOptions,
    deadline: Instant,
) -> Result<Vec<PointSummary>> {
    for part in &mut *parts {
        part.member.bring_up(part.volume, environment)?;
        part.member.live()?.0.still_there()?;
    }
    let plan = plan(parts, options)?;
    let mut drafts = begin(parts)?;
    let moment = capture(parts, &mut drafts, environment, &plan, deadline)?;
    finish(parts, drafts, &plan, options, moment)
}

fn plan(parts: &mut [Part<'_>], options: &PointOptions) -> Result<Plan> {
    let devices = parts
        .iter_mut()
        .map(|part| part.member.live().map(|(source, _)| &source.device))
        .collect::<Result<Vec<&BlockDevice>>>()?;
    let layers = Layers::above(&devices)?;
    let filesystems = layers.filesystems().to_vec();
    let possible = if filesystems.is_empty() {
        Consistency::Crash
    } else {
        Consistency::Filesystem
    };
    match options.minimum {
        Some(Consistency::Filesystem) if filesystems.is_empty() => {
            Err(Error::new(ErrorKind::Invalid, "make a point")
                .detail("no filesystem of it is mounted, so none can be frozen")
                .advice("ask for --consistency crash, or mount it"))
        }
        Some(Consistency::Application) => Ok(Plan {
            filesystems,
            consistency: Consistency::Application,
        }),
        _ => Ok(Plan {
            filesystems,
            consistency: possible,
        }),
    }
}

fn run_pre_hooks(
    parts: &[Part<'_>],
    environment: &Environment,
    deadline: Instant,
) -> Result<Hooks> {
    let names: Vec<_> = parts.iter().map(|part| part.volume.config().name).collect();
    let setup = HookSetup {
        folder: &environment.options.hooks_dir,
        run_dir: &environment.options.run_dir,
        limit: environment.options.hook_limit,
        deadline,
    };
    Hooks::pre(&setup, &names)
}

fn begin(parts: &mut [Part<'_>]) -> Result<Vec<EpochDraft>> {
    parts
        .iter_mut()
        .map(|part| EpochDraft::begin(&part.member.live()?.1.writer))
        .collect()
}

/// Brings everything up to one moment into the drafts; returns that moment, or why there
/// was none.
///
/// # Errors
/// What failed so that the drafts are worth nothing.
fn capture(
    parts: &mut [Part<'_>],
    drafts: &mut [EpochDraft],
    environment: &Environment,
    plan: &Plan,
    deadline: Instant,
) -> Result<Result<Timestamp>> {
    rounds(parts, drafts, plan, deadline)?;
    let hooks = match plan.consistency {
        Consistency::Application => match run_pre_hooks(parts, environment, deadline) {
            Ok(hooks) => Some(hooks),
            // Whatever is wrong with a hook, nothing is wrong with the volume.
            Err(error) => {
                let refused = Error::new(ErrorKind::State, "make a point");
                return Ok(Err(refused.source(error)));
            }
        },
        _ => None,
    };
    let captured = last_round(parts, drafts, environment, plan, deadline)
        .map(|moment| moment.and_then(|moment| still_settled(parts).map(|()| moment)));
    if let Some(Err(error)) = hooks.map(Hooks::post) {
        // The state was captured; what the application missed is the operator's to know.
        parts
            .iter()
            .for_each(|part| part.volume.publish_error(&error));
    }
    captured
}

/// The round that ends in a moment without writes: under a freeze where there is
/// something to freeze.
fn last_round(
    parts: &mut [Part<'_>],
    drafts: &mut [EpochDraft],
    environment: &Environment,
    plan: &Plan,
    deadline: Instant,
) -> Result<Result<Timestamp>> {
    if plan.filesystems.is_empty() {
        return quiet_moment(parts, drafts, deadline);
    }
    let mut tails = parts
        .iter_mut()
        .map(|part| Tail::prepare(part.member.live()?.0))
        .collect::<Result<Vec<_>>>()?;
    let moment = read_frozen(parts, &mut tails, environment, plan);
    for ((part, draft), tail) in parts.iter_mut().zip(drafts).zip(tails) {
        let geometry = part.member.geometry();
        let (source, sink) = part.member.live()?;
        tail.hand_over(source, draft, &geometry, &sink.function)?;
    }
    Ok(moment)
}

/// Whether what is left out of each volume was the same thing from the first round on.
fn still_settled(parts: &mut [Part<'_>]) -> Result<()> {
    for part in parts {
        let config = part.volume.config();
        part.member.live()?.0.is_settled(&config)?;
    }
    Ok(())
}

/// With nothing to freeze: rounds until one ends with nothing dirty and nothing in flight.
/// A write marks its blocks when it is submitted and again when it ends, so that none can
/// hide between the two looks.
fn quiet_moment(
    parts: &mut [Part<'_>],
    drafts: &mut [EpochDraft],
    until: Instant,
) -> Result<Result<Timestamp>> {
    let until = until.min(Instant::now() + QUIET_LIMIT);
    let mut pause = Duration::from_micros(100);
    loop {
        let mut quiet = true;
        for part in parts.iter_mut() {
            quiet &= part.member.live()?.0.is_quiet()?;
        }
        if quiet {
            return Ok(Ok(Timestamp::now()));
        }
        if Instant::now() >= until || parts.iter().any(|part| part.volume.is_stopping()) {
            return Ok(Err(no_quiet_moment()));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LOOK_AGAIN_MAX);
        for (part, draft) in parts.iter_mut().zip(&mut *drafts) {
            round(part, draft)?;
        }
    }
}

fn no_quiet_moment() -> Error {
    Error::new(ErrorKind::TimedOut, "make a point")
        .detail("there was no moment without writes within the limit, and no filesystem to freeze")
        .advice("what changed is shipped; a point is tried again at the next interval")
}

/// Reads the rest while the filesystems are frozen. Between freeze and thaw nothing is
/// allocated, logged or written: what is frozen may hold our own state folder.
fn read_frozen(
    parts: &mut [Part<'_>],
    tails: &mut [Tail],
    environment: &Environment,
    plan: &Plan,
) -> Result<Timestamp> {
    for filesystem in &plan.filesystems {
        filesystem.sync()?;
    }
    let mut freezer = environment.freezer();
    let frozen = freezer.freeze(&plan.filesystems, environment.options.freeze_limit)?;
    let read = read_tails(parts, tails, frozen.deadline());
    let thawed = frozen.thaw();
    parts
        .iter()
        .for_each(|part| note_freeze(part.volume, &thawed));
    read.and_then(|moment| thawed.map(|_| moment))
}

/// Rounds of reading while writes go on, until little is dirty.
fn rounds(
    parts: &mut [Part<'_>],
    drafts: &mut [EpochDraft],
    plan: &Plan,
    deadline: Instant,
) -> Result<()> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS_MAX {
        for filesystem in &plan.filesystems {
            filesystem.sync()?;
        }
        let mut read = 0;
        for part in parts.iter_mut() {
            part.member.live()?.0.sync()?;
        }
        for (part, draft) in parts.iter_mut().zip(&mut *drafts) {
            read += round(part, draft)?;
        }
        // Little came, or as much as the last time: more rounds would not leave less.
        if read <= FEW_BYTES || read > before / 4 * 3 || Instant::now() >= deadline {
            break;
        }
        before = read;
    }
    Ok(())
}

/// One round of one volume; returns the bytes read.
fn round(part: &mut Part<'_>, draft: &mut EpochDraft) -> Result<u64> {
    let geometry = part.member.geometry();
    let (source, sink) = part.member.live()?;
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

/// Reads what is left of every volume, until nothing is dirty and nothing in flight.
fn read_tails(parts: &mut [Part<'_>], tails: &mut [Tail], until: Instant) -> Result<Timestamp> {
    loop {
        for (part, tail) in parts.iter_mut().zip(&mut *tails) {
            tail.read(part.member.live()?.0, until)?;
        }
        let mut quiet = true;
        for part in parts.iter_mut() {
            quiet &= part.member.live()?.0.is_quiet()?;
        }
        if quiet {
            return Ok(Timestamp::now());
        }
        if Instant::now() >= until {
            return Err(Error::new(ErrorKind::TimedOut, "make a point")
                .detail("writes went on under the freeze, past its limit")
                .advice("it is tried again at the next interval"));
        }
    }
}

fn note_freeze(volume: &Volume, thawed: &Result<Duration>) {
    if let Ok(length) = thawed {
        let millis = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        volume.publish(|status| {
            status.counters.freeze_ms_last = millis;
            status.counters.freeze_ms_max = status.counters.freeze_ms_max.max(millis);
        });
    }
}

/// Seals and ships the drafts, with a tag each if there was a moment for one.
fn finish(
    parts: &mut [Part<'_>],
    drafts: Vec<EpochDraft>,
    plan: &Plan,
    options: &PointOptions,
    moment: Result<Timestamp>,
) -> Result<Vec<PointSummary>> {
    let group = if parts.len() > 1 {
        Some(
            GroupId::random()
                .map_err(|source| Error::new(ErrorKind::Io, "make an id").source(source))?,
        )
    } else {
        None
    };
    let mut made = Vec::new();
    for (part, draft) in parts.iter_mut().zip(drafts) {
        let tag = match moment {
            Ok(time) => Some(tag(plan, options, group, time)?),
            Err(_) => None,
        };
        match ship(part, draft, tag) {
            Ok(point) => made.extend(point),
            Err(error) => {
                // A group's point is one of all its members, or none.
                take_back(parts, &made);
                return Err(error);
            }
        }
    }
    moment.map(|_| made.iter().map(PointSummary::from).collect())
}

/// Seals and ships one volume's draft; returns its point.
fn ship(part: &mut Part<'_>, mut draft: EpochDraft, tag: Option<Tag>) -> Result<Option<Point>> {
    let (source, sink) = part.member.live()?;
    let mut point = None;
    let shipped = draft.shipped().get();
    let began = source.round_began();
    if tag.is_some() || !draft.is_empty() {
        if let Some(mut tag) = tag {
            tag.root = draft.root(&sink.tree)?;
            draft.tag(tag)?;
        }
        let committed = draft.commit(&mut sink.writer, &mut sink.tree)?;
        point = committed.points.into_iter().next();
    }
    source.acknowledge()?;
    part.member.caught_up_to(began);
    part.volume.publish(|status| {
        status.counters.bytes_shipped += shipped;
        lifecycle::show_that_it_ships(status);
    });
    Ok(point)
}

/// Takes back the points of the members that came first. What they shipped stays.
fn take_back(parts: &mut [Part<'_>], made: &[Point]) {
    for (part, point) in parts.iter_mut().zip(made) {
        let taken = part
            .member
            .live()
            .and_then(|(_, sink)| sink.writer.drop_point(point.id));
        if let Err(error) = taken {
            part.volume.publish_error(&error);
        }
    }
}

fn tag(
    plan: &Plan,
    options: &PointOptions,
    group: Option<GroupId>,
    time: Timestamp,
) -> Result<Tag> {
    let id = PointId::at(time)
        .map_err(|source| Error::new(ErrorKind::Io, "make a point's id").source(source))?;
    Ok(Tag {
        id,
        time,
        consistency: plan.consistency,
        label: options.label.clone(),
        group,
        root: None,
    })
}
