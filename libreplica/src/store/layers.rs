//! A volume at a point, as the layers that it is made of: the base, and the logs over it. Here it is
//! said which layer each byte comes from, in the order of the volume and without reading a byte
//! of data.

use hrl_format::units::{ByteLen, ByteOffset, Extent, Sequence, VolumeSize};
use hrl_format::{
    ExtentKind, IndexEntry, IndexStream, Overlay, Piece, Prefix, PrefixEntries, VolumeKey,
};

use super::base::BaseReader;
use super::catalogue::{Catalogue, LogEntry};
use super::layout::VolumeFolder;
use super::sources::{LogFile, StoredLog, open_chain};
use crate::error::{Error, Result};

/// The base and the logs up to one epoch, or to one of its records.
pub(super) struct Layers {
    /// The oldest first.
    pub(super) logs: Vec<StoredLog>,
    /// What counts of the last one, if not all of it does.
    until: Option<Prefix>,
    /// Below them; zeroes if there is none.
    pub(super) base: Option<BaseReader>,
    /// How large the volume is at the end of the last log.
    pub(super) size: VolumeSize,
}

/// Where the bytes of a span come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// They are zeroes.
    Zeroes,
    /// The base.
    Base,
    /// A frame of a log.
    Log(Piece),
}

/// A part of the volume whose bytes come from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) extent: Extent,
    pub(super) origin: Origin,
}

impl Layers {
    /// Opens what the state of `size` that `logs` end in is made of.
    pub(super) fn open(
        folder: &VolumeFolder,
        catalogue: &Catalogue,
        logs: &[LogEntry],
        size: VolumeSize,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        let base = match catalogue.key {
            None => Some(BaseReader::open(folder)?),
            Some(_) => None,
        };
        let logs = open_chain(folder, logs, key)?;
        Ok(Self {
            logs,
            until: None,
            base,
            size,
        })
    }

    /// Leaves out what the last log says behind this record.
    pub(super) fn cut_behind(&mut self, last: Sequence) -> Result<()> {
        let Some(log) = self.logs.last() else {
            return Ok(());
        };
        let until = log.log.index_until(last);
        self.until = Some(until.map_err(|e| log.error(INDEX, e))?);
        Ok(())
    }

    /// What `extent` is made of, in order and without a gap.
    pub(super) fn spans(&self, extent: Extent) -> Result<Spans<'_>> {
        let extent = extent.intersect(self.size.extent()).unwrap_or_default();
        let mut indexes = Vec::with_capacity(self.logs.len());
        let (whole, cut) = match &self.until {
            Some(until) => (self.logs.len().saturating_sub(1), Some(until)),
            None => (self.logs.len(), None),
        };
        for log in &self.logs[..whole] {
            let index = log.log.index_in(extent);
            indexes.push(Index::Sealed(index.map_err(|e| log.error(INDEX, e))?));
        }
        indexes.extend(cut.map(|until| Index::Prefix(until.entries_in(extent))));
        Ok(Spans {
            layers: self,
            overlay: Overlay::new(indexes, self.size),
            next: None,
            at: extent.offset(),
            end: extent.end(),
            known: None,
        })
    }
}

const INDEX: &str = "read the index of a log";

/// What a log says about a part of the volume.
enum Index<'a> {
    /// All of it.
    Sealed(IndexStream<&'a LogFile>),
    /// Its first records.
    Prefix(PrefixEntries<'a>),
}

impl Iterator for Index<'_> {
    type Item = hrl_format::Result<IndexEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Sealed(entries) => entries.next(),
            Self::Prefix(entries) => entries.next().map(Ok),
        }
    }
}

/// The spans of an extent. After an error it ends.
pub(super) struct Spans<'a> {
    layers: &'a Layers,
    overlay: Overlay<Index<'a>>,
    /// The next piece of a log, if it was fetched: it may lie behind a gap.
    next: Option<Piece>,
    at: ByteOffset,
    end: ByteOffset,
    /// What is known of the base around here, so that not every gap asks the filesystem.
    known: Option<(Extent, Origin)>,
}

impl Spans<'_> {
    fn read(&mut self) -> Result<Option<Span>> {
        if self.at >= self.end {
            return Ok(None);
        }
        if self.next.is_none() {
            let next = self.overlay.next().transpose();
            self.next = next.map_err(|e| Error::log(INDEX, e))?;
        }
        let span = match self.next {
            Some(piece) if piece.extent().offset() <= self.at => {
                self.next = None;
                let origin = match piece.kind() {
                    ExtentKind::Write => Origin::Log(piece),
                    ExtentKind::Zeroes | ExtentKind::Discard => Origin::Zeroes,
                };
                Span {
                    extent: piece.extent(),
                    origin,
                }
            }
            next => {
                let until = next.map_or(self.end, |piece| piece.extent().offset());
                self.below(Extent::between(self.at, until))?
            }
        };
        self.at = span.extent.end();
        Ok(Some(span))
    }

    /// The first span of a gap between logs.
    fn below(&mut self, gap: Extent) -> Result<Span> {
        let Some(base) = &self.layers.base else {
            return Ok(Span {
                extent: gap,
                origin: Origin::Zeroes,
            });
        };
        let (extent, origin) = match self.known {
            Some(known) if known.0.end() > gap.offset() => known,
            _ => look(base, gap.offset())?,
        };
        self.known = Some((extent, origin));
        let extent = Extent::between(gap.offset(), gap.end().min(extent.end()));
        Ok(Span { extent, origin })
    }
}

/// What of the base begins at `at`: data or a hole, and up to where.
fn look(base: &BaseReader, at: ByteOffset) -> Result<(Extent, Origin)> {
    let end = ByteOffset::new(u64::MAX);
    match base.next_data(at)? {
        None => Ok((Extent::between(at, end), Origin::Zeroes)),
        Some(data) if data > at => Ok((Extent::between(at, data), Origin::Zeroes)),
        Some(_) => {
            let hole = base.next_hole(at)?.unwrap_or(end);
            Ok((Extent::between(at, hole), Origin::Base))
        }
    }
}

impl Iterator for Spans<'_> {
    type Item = Result<Span>;

    fn next(&mut self) -> Option<Result<Span>> {
        let read = self.read();
        if !matches!(read, Ok(Some(_))) {
            self.at = self.end;
        }
        read.transpose()
    }
}

impl Span {
    /// What is left of it within `extent`; `None` if nothing.
    pub(super) fn clip(&self, extent: Extent) -> Option<Self> {
        let extent = self.extent.intersect(extent)?;
        let origin = match self.origin {
            Origin::Log(piece) => Origin::Log(Piece {
                entry: piece.entry.clip(extent)?,
                ..piece
            }),
            other => other,
        };
        Some(Self { extent, origin })
    }

    /// Its first `len` bytes at most, and the rest.
    pub(super) fn split(&self, len: usize) -> (Option<Self>, Option<Self>) {
        let cut = self.extent.offset().checked_add(ByteLen::new(len as u64));
        let cut = cut.unwrap_or(self.extent.end()).min(self.extent.end());
        let head = Extent::between(self.extent.offset(), cut);
        (
            self.clip(head),
            self.clip(Extent::between(cut, self.extent.end())),
        )
    }
}
