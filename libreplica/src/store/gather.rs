//! The bytes of consecutive spans, brought together from where they are: the base in long reads,
//! also across what a log says otherwise, which is then put over it; the logs' pieces all at once.

use hrl_format::units::Extent;

use super::base::BaseReader;
use super::frames::{Frames, Wanted};
use super::layers::{Layers, Origin, Span};
use crate::error::Result;

/// What lies between two parts of the base is read with them if it is not longer.
const ACROSS: u64 = 16 << 10;

/// Fills `buffer` with the bytes of `spans`, which follow one another without a gap and are together
/// as long.
pub(super) fn gather(
    layers: &Layers,
    frames: &mut Frames,
    spans: &[Span],
    buffer: &mut [u8],
) -> Result<()> {
    if let Some(base) = &layers.base {
        read_base(base, spans, buffer)?;
    }
    let mut wanted = Vec::new();
    let mut rest = buffer;
    for span in spans {
        let (into, behind) = rest.split_at_mut(span.extent.len().get() as usize);
        rest = behind;
        match span.origin {
            Origin::Log(piece) => wanted.push(Wanted { piece, into }),
            Origin::Zeroes => into.fill(0),
            Origin::Base if layers.base.is_none() => into.fill(0),
            Origin::Base => {}
        }
    }
    frames.read_all(&layers.logs, wanted)
}

/// Reads what is of the base, and what is between.
fn read_base(base: &BaseReader, spans: &[Span], buffer: &mut [u8]) -> Result<()> {
    let Some(begin) = spans.first().map(|span| span.extent.offset()) else {
        return Ok(());
    };
    let mut read = |run: Extent| {
        let start = (run.offset().get() - begin.get()) as usize;
        let into = &mut buffer[start..start + run.len().get() as usize];
        base.read_at(run.offset(), into)
    };
    let mut run: Option<Extent> = None;
    for span in spans.iter().filter(|span| span.origin == Origin::Base) {
        let extent = span.extent;
        run = match run {
            Some(run) if extent.offset().get() - run.end().get() <= ACROSS => {
                Some(Extent::between(run.offset(), extent.end()))
            }
            Some(run) => {
                read(run)?;
                Some(extent)
            }
            None => Some(extent),
        };
    }
    run.map_or(Ok(()), read)
}
