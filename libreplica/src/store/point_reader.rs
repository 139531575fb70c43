//! A recovery point, or a moment between two, open for reading: at any place, or all of it in
//! order. Nothing is prepared or copied: each read finds its bytes through the indexes of the logs.

use hrl_format::units::{ByteLen, ByteOffset, Extent};

use super::frames::Frames;
use super::gather::gather;
use super::layers::{Layers, Origin, Span};
use super::lease::Lease;
use super::state::State;
use super::windows::{Window, Windows};
use crate::error::{Error, ErrorKind, Result};

/// What is found out at once where a read hits: the spans of so much of the volume, and twice as
/// much each time that reading goes on where that ended.
const SHORTEST_WINDOW: u64 = 128 << 10;
const LONGEST_WINDOW: u64 = 32 << 20;
/// No more than so many spans, so that memory is bounded however small they are.
const SPANS: usize = 4096;
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
    windows: Windows,
    /// Where the last window that was found out ended, and how much of the volume it was to be.
    ahead: (ByteOffset, u64),
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
            windows: Windows::default(),
            ahead: (ByteOffset::ZERO, SHORTEST_WINDOW),
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
            if self.windows.get(rest.offset()).is_none() {
                let window = self.look(rest.offset())?;
                self.windows.keep(window);
            }
            let Some(window) = self.windows.get(rest.offset()) else {
                let why = "what was just found out is gone";
                return Err(Error::new(ErrorKind::Invalid, "read a recovery point").detail(why));
            };
            let first = window
                .spans
                .partition_point(|span| span.extent.end() <= rest.offset());
            let here = rest.intersect(window.extent).unwrap_or_default();
            let spans = window.spans[first..].iter();
            let spans: Vec<Span> = spans.map_while(|span| span.clip(here)).collect();
            let start = (here.offset().get() - offset.get()) as usize;
            let part = &mut buffer[start..start + here.len().get() as usize];
            gather(&self.layers, &mut self.frames, &spans, part)?;
            rest = Extent::between(here.end(), rest.end());
        }
        Ok(())
    }

    /// Finds out what the bytes from `at` on are made of.
    fn look(&mut self, at: ByteOffset) -> Result<Window> {
        let (end, len) = self.ahead;
        let len = match at == end {
            true => (len * 2).min(LONGEST_WINDOW),
            false => SHORTEST_WINDOW,
        };
        let end = at.get().saturating_add(len).min(self.state.size().get());
        let known = self.windows.next_behind(at);
        let end = known.map_or(end, |known| known.get().min(end));
        let extent = Extent::between(at, ByteOffset::new(end));
        let spans = self.layers.spans(extent)?.take(SPANS);
        let spans = spans.collect::<Result<Vec<_>>>()?;
        let end = spans.last().map_or(extent.end(), |last| last.extent.end());
        self.ahead = (end, len);
        Ok(Window {
            extent: Extent::between(at, end),
            spans,
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
        let (layers, frames) = (&self.layers, &mut self.frames);
        let mut part = NextPart::default();
        for span in layers.spans(self.state.size().extent())? {
            let mut rest = Some(span?);
            while let Some(span) = rest {
                let zeroes = span.extent.len();
                if span.origin == Origin::Zeroes && zeroes.get() >= SHORTEST_ZEROES {
                    part.give(layers, frames, &mut each)?;
                    each(Part::Zeroes(zeroes))?;
                    break;
                }
                let (head, tail) = span.split(PART - part.len);
                part.len += head.map_or(0, |head| head.extent.len().get() as usize);
                part.spans.extend(head);
                if part.len == PART {
                    part.give(layers, frames, &mut each)?;
                }
                rest = tail;
            }
        }
        part.give(layers, frames, &mut each)
    }
}

/// What the next part that streams by is made of, and how long it is.
#[derive(Default)]
struct NextPart {
    spans: Vec<Span>,
    len: usize,
    buffer: Vec<u8>,
}

impl NextPart {
    /// Brings the part together, and hands it on.
    fn give(
        &mut self,
        layers: &Layers,
        frames: &mut Frames,
        each: &mut impl FnMut(Part<'_>) -> Result<()>,
    ) -> Result<()> {
        if self.len > 0 {
            self.buffer.resize(self.len, 0);
            gather(layers, frames, &self.spans, &mut self.buffer)?;
            each(Part::Data(&mut self.buffer))?;
            self.spans.clear();
            self.len = 0;
        }
        Ok(())
    }
}
