//! A volume at a point, as the layers that it is made of: the base, and the logs over it. Here it is
//! said which layer each byte comes from, in the order of the volume and without reading a byte
//! of data.
//!
//! What it costs follows what is touched. A log is opened when it is first needed; where its
//! bytes are, the levels say as far as there are any (`levels/`).

use std::sync::{Mutex, PoisonError};

use hrl_format::units::{ByteLen, ByteOffset, Extent, Sequence, VolumeSize};
use hrl_format::{ExtentKind, Overlay, Piece, Prefix, VolumeKey};

use super::base::BaseReader;
use super::catalogue::{Catalogue, LogEntry};
use super::chain::Chain;
use super::layout::VolumeFolder;
use super::levels::{Tile, TileStream, Tiles, Trouble};
use crate::error::Result;

/// The base and the logs up to one epoch, or to one of its records.
pub(super) struct Layers {
    /// The oldest first.
    pub(super) logs: Chain,
    /// What counts of the last one, if not all of it does.
    until: Option<Prefix>,
    /// How the logs that count whole are asked.
    tiles: Mutex<Tiles>,
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
        Ok(Self {
            tiles: Mutex::new(Tiles::choose(folder, logs)),
            logs: Chain::new(folder, logs, key),
            until: None,
            base,
            size,
        })
    }

    /// Leaves out what the last log says behind this record.
    pub(super) fn cut_behind(&mut self, last: Sequence) -> Result<()> {
        let Some(number) = self.logs.entries().len().checked_sub(1) else {
            return Ok(());
        };
        let log = self.logs.get(number)?;
        let until = log.log.index_until(last);
        self.until = Some(until.map_err(|e| log.error("read the index of a log", e))?);
        self.tiles = Mutex::new(Tiles::choose(self.logs.folder(), self.whole()));
        Ok(())
    }

    /// The logs of which all counts.
    fn whole(&self) -> &[LogEntry] {
        let logs = self.logs.entries();
        match &self.until {
            Some(_) => &logs[..logs.len().saturating_sub(1)],
            None => logs,
        }
    }

    /// What `extent` is made of, in order and without a gap.
    pub(super) fn spans(&self, extent: Extent) -> Result<Spans<'_>> {
        let extent = extent.intersect(self.size.extent()).unwrap_or_default();
        Ok(Spans {
            layers: self,
            overlay: self.overlay(extent)?,
            next: None,
            at: extent.offset(),
            end: extent.end(),
            known: None,
        })
    }

    /// What the logs say about `extent`, by the tiles that can be read.
    fn overlay(&self, extent: Extent) -> Result<Overlay<TileStream<'_>, Piece>> {
        loop {
            match self.streams(extent) {
                Ok(streams) => return Ok(Overlay::new(streams, self.size)),
                Err(trouble) => self.do_without(trouble)?,
            }
        }
    }

    fn streams(&self, extent: Extent) -> Result<Vec<TileStream<'_>>, Trouble> {
        let tiles = self.lock_tiles().get();
        let mut streams = Vec::with_capacity(tiles.len() + 1);
        for tile in tiles.iter() {
            streams.push(match tile {
                Tile::Level(file, first) => TileStream::level(file, *first, extent)?,
                Tile::Log(number) => {
                    let log = self.logs.get(*number).map_err(Trouble::Log)?;
                    TileStream::log(&log, *number, extent)?
                }
            });
        }
        let cut = self.until.as_ref();
        streams.extend(cut.map(|until| {
            let last = self.whole().len();
            TileStream::Prefix(until.entries_in(extent), last)
        }));
        Ok(streams)
    }

    /// What is damaged of the levels is done without; what is of a log cannot.
    fn do_without(&self, trouble: Trouble) -> Result<()> {
        match trouble {
            Trouble::Log(error) => Err(error),
            Trouble::Level(run, error) => {
                let volume = self.logs.folder().id();
                tracing::warn!(%volume, "a level is not used: {error}");
                let logs = self.whole();
                self.lock_tiles().distrust(run, self.logs.folder(), logs);
                Ok(())
            }
        }
    }

    fn lock_tiles(&self) -> std::sync::MutexGuard<'_, Tiles> {
        // A panic elsewhere leaves them as they were, or changed.
        self.tiles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The spans of an extent. After an error it ends.
pub(super) struct Spans<'a> {
    layers: &'a Layers,
    overlay: Overlay<TileStream<'a>, Piece>,
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
            self.next = self.fetch()?;
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

    /// The next piece of a log. If a level turns out to be damaged, those that follow come
    /// from elsewhere.
    fn fetch(&mut self) -> Result<Option<Piece>> {
        loop {
            match self.overlay.next().transpose() {
                Ok(next) => return Ok(next.map(|piece| piece.entry)),
                Err(trouble) => self.layers.do_without(trouble)?,
            }
            let rest = Extent::between(self.at, self.end);
            self.overlay = self.layers.overlay(rest)?;
        }
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
