//! Verify: source and image are compared while writes go on. A block that differs and is
//! dirty is no difference: its change is on its way. One that differs and is clean is
//! read once more before it is reported, for a write may have been between the device
//! and the mark when it was read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::units::{ByteOffset, Extent};

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::primary::config::Phase;
use crate::primary::copy::{READ, next_slice};
use crate::primary::environment::Environment;
use crate::primary::lifecycle;
use crate::primary::member::{Sink, Source};
use crate::primary::status::{DifferingRange, VerifySummary};
use crate::primary::volume::Volume;

/// How long to wait for a point that is being made.
const PATIENCE: Duration = Duration::from_secs(300);
/// Ranges named in a report, at most.
const NAMED_MAX: usize = 1000;
/// How often a block that differs is read again.
const LOOKS: u32 = 3;

/// Compares the source of `volume` with its image, slice by slice, so that points are
/// made in between.
///
/// # Errors
/// [`ErrorKind::ResyncNeeded`] during the first copy and a resync; else what source or
/// store failed with.
pub fn verify(volume: &Arc<Volume>, environment: &Environment) -> Result<VerifySummary> {
    let mut summary = VerifySummary::default();
    let mut at = ByteOffset::ZERO;
    loop {
        if volume.config().phase != Phase::Replicating {
            return Err(Error::new(ErrorKind::ResyncNeeded, "verify the volume")
                .volume(volume.id())
                .detail("its baseline (first copy) or a resync has not ended")
                .advice("`replica status` shows how far it is"));
        }
        let mut member = volume.member_until(Instant::now() + PATIENCE)?;
        member.bring_up(volume, environment)?;
        let geometry = member.geometry();
        let Some(slice) = next_slice(&geometry, at) else {
            member.rest();
            return Ok(summary);
        };
        let (source, sink) = member.live()?;
        if let Err(error) = compare(source, sink, &geometry, slice, &mut summary) {
            lifecycle::note_failure(volume, &mut member, &error);
            volume.wake();
            return Err(error);
        }
        at = slice.end();
        drop(member);
        volume.give_way();
    }
}

fn compare(
    source: &mut Source,
    sink: &mut Sink,
    geometry: &Geometry,
    slice: Extent,
    summary: &mut VerifySummary,
) -> Result<()> {
    let mut image = sink.writer.read_tip()?;
    let mut expected = vec![0; READ as usize];
    let mut suspects = Vec::new();
    let exclusions = source.exclusions.clone();
    exclusions.read(geometry, slice, source.reader()?, |extent, data| {
        let Some(data) = data else { return Ok(()) };
        summary.bytes_compared += extent.len().get();
        let expected = &mut expected[..data.len()];
        image.read_at(extent.offset(), expected)?;
        if data != expected {
            let block = geometry.block.get() as usize;
            let first = extent.offset().get() / block as u64;
            let pairs = data.chunks(block).zip(expected.chunks(block));
            let differing = (first..)
                .zip(pairs)
                .filter(|(_, (ours, theirs))| ours != theirs);
            suspects.extend(differing.map(|(number, _)| BlockNumber::new(number)));
        }
        Ok(())
    })?;
    for block in suspects {
        let extent = geometry.extent_of(Run {
            start: block,
            end: BlockNumber::new(block.get() + 1),
        });
        if differs_for_good(source, &mut image, extent, block)? {
            report(summary, extent);
        } else {
            summary.bytes_in_motion += extent.len().get();
        }
    }
    Ok(())
}

/// Whether a block differs although nothing says that it was written.
fn differs_for_good(
    source: &mut Source,
    image: &mut crate::store::TipReader,
    extent: Extent,
    block: BlockNumber,
) -> Result<bool> {
    let mut expected = vec![0; extent.len().get() as usize];
    image.read_at(extent.offset(), &mut expected)?;
    for _ in 0..LOOKS {
        let same = {
            let mut pieces = source.reader()?.pieces([extent]);
            let mut same = true;
            let mut at = 0;
            while let Some((_, data)) = pieces.next()? {
                same &= data == &expected[at..at + data.len()];
                at += data.len();
            }
            same
        };
        // Asked after the read: a write marks its block before the device has it.
        if same || source.excuses(block) {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

fn report(summary: &mut VerifySummary, extent: Extent) {
    let (offset, len) = (extent.offset().get(), extent.len().get());
    summary.bytes_differing += len;
    let named = summary.differing.len();
    match summary.differing.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ if named < NAMED_MAX => summary.differing.push(DifferingRange { offset, len }),
        _ => {}
    }
}
