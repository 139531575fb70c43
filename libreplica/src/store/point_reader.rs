//! A recovery point, or a moment between two, open for reading: at any place, or all of it in
//! order. Nothing is prepared or copied: each read finds its bytes through the indexes of the logs.

use hrl_format::units::{ByteLen, ByteOffset, Extent};

use super::frames::Frames;
use super::layers::{Layers, Origin, Span};
use super::lease::Lease;
use super::state::State;
use crate::error::{Error, ErrorKind, Result};

/// What is found out at once where a read hits: the spans of so much of the volume, and twice as
/// much each time that reading goes on where that ended.
const SHORTEST_WINDOW: u64 = 128 << 10;
const LONGEST_WINDOW: u64 = 32 << 20;
/// No more than so many spans, so that memory is bounded however small they are.
const SPANS: usize = 4096;
/// How many such windows are remembered.
const WINDOWS: usize = 64;
/// Data is streamed in parts of at most this.
pub(super) const PART: usize = 4 << 20;
/// Zeroes shorter than this are streamed with the data around them.
const SHORTEST_ZEROES: u64 = 64 << 10;

/// A recovery point, or a moment between two, open for reading. While it lives it is leased:
/// retention neither drops it nor takes away what it is made of.
///
/// Made by [`VolumeReader::open`](super::VolumeReader::open).
pub struct PointReader {
    _lease: Lease,
    state: State,
    layers: Layers,
    frames: Frames,
    windows: Vec<Window>,
    /// Where the last window that was found out ended, and how much of the volume it was to be.
    ahead: (ByteOffset, u64),
    uses: u64,
}

/// The spans of a part of the volume.
struct Window {
    extent: Extent,
    spans: Vec<Span>,
    used: u64,
}

/// What a point holds in an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointPiece {
    /// Which bytes of the volume.
    pub extent: Extent,
    /// What they are.
    pub kind: PieceKind,
}

/// What bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Bytes that were written, which may be zeroes.
    Data,
    /// Zeroes.
    Zeroes,
}

/// The next bytes of a point that streams by.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// Whoever takes them may keep the buffer, and leave another.
    Data(&'a mut Vec<u8>),
    Zeroes(ByteLen),
}

impl PointReader {
    pub(super) fn new(lease: Lease, state: State, layers: Layers) -> Self {
        Self {
            _lease: lease,
            state,
            layers,
            frames: Frames::default(),
            windows: Vec::new(),
            ahead: (ByteOffset::ZERO, SHORTEST_WINDOW),
            uses: 0,
        }
    }

    /// What is open.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Fills `buffer` with what the volume held from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] past the volume's end; [`ErrorKind::Damaged`] if what it needs of a log does
    /// not hold what it must; what the system refuses.
    pub fn read_at(&mut self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        let wanted = Extent::new(offset, ByteLen::new(buffer.len() as u64))
            .filter(|wanted| wanted.end().get() <= self.state.size().get());
        let Some(wanted) = wanted else {
            return Err(Error::new(ErrorKind::Invalid, "read a recovery point")
                .offset(offset)
                .detail(format!(
                    "{} bytes there end past the volume's {}",
                    buffer.len(),
                    self.state.size()
                )));
        };
        let mut rest = wanted;
        while !rest.is_empty() {
            let window = self.window(rest.offset())?;
            let window = &self.windows[window];
            let first = window
                .spans
                .partition_point(|span| span.extent.end() <= rest.offset());
            let here = rest.intersect(window.extent).unwrap_or_default();
            for span in &window.spans[first..] {
                let Some(span) = span.clip(here) else { break };
                let start = (span.extent.offset().get() - offset.get()) as usize;
                let part = &mut buffer[start..start + span.extent.len().get() as usize];
                fill(&self.layers, &mut self.frames, &span, part)?;
            }
            rest = Extent::between(here.end(), rest.end());
        }
        Ok(())
    }

    /// The window that holds `at`, by its place in the list.
    fn window(&mut self, at: ByteOffset) -> Result<usize> {
        self.uses += 1;
        let holds = |w: &Window| w.extent.offset() <= at && at < w.extent.end();
        let known = self.windows.iter().position(holds);
        if let Some(known) = known {
            self.windows[known].used = self.uses;
            return Ok(known);
        }
        let window = self.look(at)?;
        if self.windows.len() < WINDOWS {
            self.windows.push(window);
            return Ok(self.windows.len() - 1);
        }
        let oldest = self.windows.iter().enumerate().min_by_key(|(_, w)| w.used);
        let place = oldest.map_or(0, |(place, _)| place);
        self.windows[place] = window;
        Ok(place)
    }

    /// Finds out what the bytes from `at` on are made of.
    fn look(&mut self, at: ByteOffset) -> Result<Window> {
        let (end, len) = self.ahead;
        let len = match at == end {
            true => (len * 2).min(LONGEST_WINDOW),
            false => SHORTEST_WINDOW,
        };
        let end = at.get().saturating_add(len).min(self.state.size().get());
        let extent = Extent::between(at, ByteOffset::new(end));
        let spans = self.layers.spans(extent)?.take(SPANS);
        let spans = spans.collect::<Result<Vec<_>>>()?;
        let end = spans.last().map_or(extent.end(), |last| last.extent.end());
        self.ahead = (end, len);
        Ok(Window {
            extent: Extent::between(at, end),
            spans,
            used: self.uses,
        })
    }

    /// What the point holds where, in the volume's order and without a gap, without reading data.
    ///
    /// # Errors
    /// Those of reading the indexes, also of each item.
    pub fn pieces(&self) -> Result<impl Iterator<Item = Result<PointPiece>> + '_> {
        self.pieces_in(self.state.size().extent())
    }

    /// The same of one extent.
    ///
    /// # Errors
    /// As [`PointReader::pieces`].
    pub fn pieces_in(
        &self,
        extent: Extent,
    ) -> Result<impl Iterator<Item = Result<PointPiece>> + '_> {
        let spans = self.layers.spans(extent)?;
        Ok(spans.map(|span| {
            let Span { extent, origin } = span?;
            let kind = match origin {
                Origin::Zeroes => PieceKind::Zeroes,
                Origin::Base | Origin::Log(_) => PieceKind::Data,
            };
            Ok(PointPiece { extent, kind })
        }))
    }

    /// All of the volume in order: data in parts of at most [`PART`], and stretches of zeroes.
    pub(super) fn stream(&mut self, mut each: impl FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        let mut buffer = Vec::with_capacity(PART);
        for span in self.layers.spans(self.state.size().extent())? {
            let mut rest = Some(span?);
            while let Some(span) = rest {
                let len = span.extent.len();
                if span.origin == Origin::Zeroes && len.get() >= SHORTEST_ZEROES {
                    if !buffer.is_empty() {
                        each(Part::Data(&mut buffer))?;
                        buffer.clear();
                    }
                    each(Part::Zeroes(len))?;
                    break;
                }
                let (head, tail) = span.split(PART - buffer.len());
                if let Some(head) = head {
                    let start = buffer.len();
                    buffer.resize(start + head.extent.len().get() as usize, 0);
                    fill(&self.layers, &mut self.frames, &head, &mut buffer[start..])?;
                }
                if buffer.len() == PART {
                    each(Part::Data(&mut buffer))?;
                    buffer.clear();
                }
                rest = tail;
            }
        }
        if !buffer.is_empty() {
            each(Part::Data(&mut buffer))?;
        }
        Ok(())
    }
}

/// Reads the bytes of `span`, which `buffer` is as long as.
fn fill(layers: &Layers, frames: &mut Frames, span: &Span, buffer: &mut [u8]) -> Result<()> {
    match (&span.origin, &layers.base) {
        (Origin::Log(piece), _) => {
            buffer.copy_from_slice(frames.bytes_of(&layers.logs, piece)?);
            Ok(())
        }
        (Origin::Base, Some(base)) => base.read_at(span.extent.offset(), buffer),
        (Origin::Zeroes, _) | (Origin::Base, None) => {
            buffer.fill(0);
            Ok(())
        }
    }
}
