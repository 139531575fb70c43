//! How the moment of a point is come by where the device's users go through us: it is a cut
//! of the stream of changes, at once and without a freeze, or, while capture knew only which
//! blocks changed, a copy of those as they were at one moment, while writes go on.
//!
//! Between two points the stream is put into an epoch as it comes, so that little waits in
//! memory. Such an epoch is in order: every change of it can be gone back to.

use std::time::{Duration, Instant};

use hrl_format::RecordOrder;
use hrl_format::units::{ByteLen, Extent, Timestamp};

use crate::capture::inline::{Cut, Moment, Service};
use crate::device::Filesystem;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::policy::Mode;
use crate::primary::draft::EpochDraft;
use crate::primary::environment::Environment;
use crate::primary::member::{Member, Sink, Source};
use crate::primary::point::{Missed, Part, all_well, each};
use crate::primary::still::Reached;

/// Bytes taken out of the backlog at a time.
const TAKE: ByteLen = ByteLen::new(8 << 20);
/// Bytes of one read of a moment's blocks.
const READ: u64 = 1 << 20;
/// How long to wait until what failed writes have left was read back.
const SETTLE: Duration = Duration::from_secs(5);

/// Whether the parts' users go through us. All of a group's do, or none's.
pub fn is_inline(parts: &mut [Part<'_>]) -> bool {
    let mut inline = false;
    each(parts, |part| {
        inline |= part.source()?.service().is_some();
        Ok(())
    });
    inline
}

/// Takes one moment of all parts, frozen if something is mounted, and puts what it is made
/// of into their drafts.
pub fn reach(parts: &mut [Part<'_>], environment: &Environment, frozen: &[Filesystem]) -> Reached {
    let mut blocked = Duration::ZERO;
    let taken = if frozen.is_empty() {
        take(parts)
    } else {
        let mut freezer = environment.freezer();
        let taken = match freezer.freeze(frozen, environment.options.freeze_limit) {
            Ok(freeze) => {
                let taken = take(parts);
                let thawed = freeze.thaw();
                taken.and_then(|taken| thawed.map(|_| taken).map_err(Missed::from))
            }
            Err(error) => Err(error.into()),
        };
        // Also when it failed: writers were blocked all the same.
        blocked = freezer.blocked();
        taken
    };
    let moment = taken.and_then(|(time, moments)| {
        let mut moments = moments.into_iter();
        each(parts, |part| {
            let moment = moments.next();
            moment.map_or(Ok(()), |moment| part.gather(moment))
        });
        all_well(parts).map(|()| time)
    });
    if moment.is_err() {
        // What was taken and not put into a draft is dirty again.
        each(parts, |part| {
            part.member_without_draft().map_or(Ok(()), |member| {
                member.reclaim();
                Ok(())
            })
        });
    }
    Reached {
        moment,
        frozen: Some(blocked),
    }
}

/// Takes one moment of all parts.
///
/// # Errors
/// Why there was none.
fn take(parts: &mut [Part<'_>]) -> Result<(Timestamp, Vec<Moment>), Missed> {
    let mut services = Vec::with_capacity(parts.len());
    each(parts, |part| {
        let source = part.source()?;
        source.begin_round();
        services.extend(source.service().cloned());
        Ok(())
    });
    all_well(parts)?;
    let services: Vec<&Service> = services.iter().map(AsRef::as_ref).collect();
    let deadline = Instant::now() + SETTLE;
    loop {
        match Service::moment(&services) {
            Ok(taken) => return Ok(taken),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl Member {
    /// Puts what a moment is made of into an epoch.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] when the moment was lost meanwhile; what source or store failed
    /// with.
    pub fn gather(&mut self, moment: Moment) -> Result<EpochDraft> {
        match moment {
            Moment::Stream(mut cut) => {
                self.ship_stream(&mut cut)?;
                self.take_stream()
            }
            Moment::Blocks => {
                self.end_stream()?;
                self.copy_blocks()
            }
        }
    }

    /// Puts what the backlog has now into the epoch under way.
    ///
    /// # Errors
    /// As [`Self::ship_stream`].
    pub fn ship_now(&mut self) -> Result<()> {
        let Some(service) = self.live()?.0.service() else {
            return Ok(());
        };
        let mut cut = service.end_now();
        if cut.entries == 0 {
            return Ok(());
        }
        self.ship_stream(&mut cut)
    }

    /// Puts what the backlog has up to `cut` into the epoch under way.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] when changes of it were lost to a full buffer; what the store
    /// failed with.
    pub fn ship_stream(&mut self, cut: &mut Cut) -> Result<()> {
        let geometry = self.geometry();
        let order = self.order();
        let mut stream = self.stream.take();
        let (source, sink) = self.live()?;
        let Some(service) = source.service() else {
            return Ok(());
        };
        let mut draft = match stream.take() {
            Some(draft) => draft,
            None => EpochDraft::begin_in(&sink.writer, order)?,
        };
        loop {
            let Some(entries) = service.take(cut, TAKE) else {
                self.stream = Some(draft);
                return Err(Error::new(ErrorKind::Full, "ship the stream of changes")
                    .detail("the buffer was full, and changes are known by their blocks only")
                    .advice("a point of those is made by itself"));
            };
            if entries.is_empty() {
                break;
            }
            for entry in &entries {
                draft.change(&geometry, &sink.function, entry)?;
            }
            if draft.is_large() {
                draft.roll(&mut sink.writer, &mut sink.tree)?;
            }
        }
        self.stream = Some(draft);
        Ok(())
    }

    /// Ships what waits in memory as an epoch without a point.
    ///
    /// # Errors
    /// What the store failed with.
    pub fn bring_home(&mut self) -> Result<()> {
        if !self.is_up() {
            return Ok(());
        }
        let Some(service) = self.live()?.0.service().cloned() else {
            return Ok(());
        };
        if service.waiting().mode != Mode::Data {
            return Ok(());
        }
        let (_, moments) = Service::moment(&[&service])?;
        for moment in moments {
            let draft = self.gather(moment)?;
            let (source, sink) = self.live()?;
            if !draft.is_empty() {
                draft.commit(&mut sink.writer, &mut sink.tree)?;
            }
            source.acknowledge()?;
        }
        Ok(())
    }

    /// The epoch that the stream was put into, begun if there is none.
    fn take_stream(&mut self) -> Result<EpochDraft> {
        let order = self.order();
        match self.stream.take() {
            Some(draft) => Ok(draft),
            None => EpochDraft::begin_in(&self.live()?.1.writer, order),
        }
    }

    /// The stream has broken off: what came before is an epoch of its own, whole and in
    /// order; what follows is not.
    fn end_stream(&mut self) -> Result<()> {
        let Some(draft) = self.stream.take() else {
            return Ok(());
        };
        if draft.is_empty() {
            return Ok(());
        }
        let (_, sink) = self.live()?;
        draft.commit(&mut sink.writer, &mut sink.tree).map(drop)
    }

    /// An epoch is in order if the image was one state of the volume when it began.
    fn order(&self) -> RecordOrder {
        if self.is_at_a_point {
            RecordOrder::AsCompleted
        } else {
            RecordOrder::AsRead
        }
    }

    /// Reads the blocks of a moment as they were then.
    fn copy_blocks(&mut self) -> Result<EpochDraft> {
        let geometry = self.geometry();
        let order = self.order();
        let (source, sink) = self.live()?;
        let Some(service) = source.service().cloned() else {
            return Err(Error::new(ErrorKind::State, "read the moment of a point"));
        };
        let copied = if service.round().is_empty() {
            // Nothing was missed: the stream goes on where the last one ended.
            EpochDraft::begin_in(&sink.writer, order)
        } else {
            self.is_at_a_point = false;
            let (source, sink) = self.live()?;
            copy_round(&service, source, sink, &geometry)
        };
        service.end_moment();
        copied
    }
}

fn copy_round(
    service: &Service,
    source: &mut Source,
    sink: &mut Sink,
    geometry: &Geometry,
) -> Result<EpochDraft> {
    let mut draft = EpochDraft::begin(&sink.writer)?;
    let block = u64::from(geometry.block.get());
    let mut data = vec![0; READ.max(block) as usize];
    let mut at = BlockNumber::new(0);
    while let Some(run) = service.next_run(at, (READ / block).max(1)) {
        let extent = geometry.extent_of(run);
        let data = &mut data[..extent.len().get() as usize];
        read(source, extent, data)?;
        take_blocks(service, geometry, run, data)?;
        draft.add(geometry, &sink.function, extent, data)?;
        if draft.is_large() {
            draft.roll(&mut sink.writer, &mut sink.tree)?;
        }
        at = run.end;
    }
    Ok(draft)
}

fn read(source: &mut Source, extent: Extent, data: &mut [u8]) -> Result<()> {
    let mut pieces = source.reader()?.pieces([extent]);
    let mut filled = 0;
    while let Some((_, piece)) = pieces.next()? {
        data[filled..filled + piece.len()].copy_from_slice(piece);
        filled += piece.len();
    }
    Ok(())
}

/// Puts what the blocks held at the moment in place of what was written since.
fn take_blocks(service: &Service, geometry: &Geometry, run: Run, data: &mut [u8]) -> Result<()> {
    let start = geometry.extent_of(run).offset().get();
    for n in run.range() {
        let block = BlockNumber::new(n);
        let end = BlockNumber::new(n + 1);
        let extent = geometry.extent_of(Run { start: block, end });
        let from = (extent.offset().get() - start) as usize;
        let bytes = &mut data[from..from + extent.len().get() as usize];
        service.take_block(block, bytes)?;
    }
    Ok(())
}
