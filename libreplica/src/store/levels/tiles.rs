//! The levels as a reader uses them: the chain up to a point, covered by few tiles. Each is a
//! level file, or a log on its own. What cannot be used is passed over, with a word in
//! the program's log, and the tiles below it are taken instead.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use hrl_format::units::Extent;
use hrl_format::{IndexStream, Piece, PrefixEntries, SourceNumber};

use super::file::{Fences, LevelFile, LevelStream};
use super::layout::Run;
use super::manifest::{self, Manifest};
use super::plan::{self, Placed};
use crate::error::{Error, ErrorKind, Result};
use crate::store::catalogue::LogEntry;
use crate::store::layout::VolumeFolder;
use crate::store::sources::{LogFile, StoredLog};

/// A part of the chain that is asked as one.
#[derive(Clone, Debug)]
pub(in crate::store) enum Tile {
    /// A log, by its number in the chain.
    Log(usize),
    /// A level file, and the number of its first log.
    Level(Arc<LevelFile>, usize),
}

/// The tiles that a chain of logs is covered with.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Tiles {
    tiles: Arc<Vec<Tile>>,
    /// Files that turned out to be damaged.
    bad: HashSet<[u8; 16]>,
    fences: Arc<Fences>,
}

impl Tiles {
    /// Covers the chain with what the manifest lists and is sound as far as can be seen.
    pub(in crate::store) fn choose(folder: &VolumeFolder, logs: &[LogEntry]) -> Self {
        let mut tiles = Self::default();
        tiles.cover(folder, logs);
        tiles
    }

    /// The tiles, the oldest first.
    pub(in crate::store) fn get(&self) -> Arc<Vec<Tile>> {
        Arc::clone(&self.tiles)
    }

    /// Does without the file of this run from now on.
    pub(in crate::store) fn distrust(
        &mut self,
        run: Run,
        folder: &VolumeFolder,
        logs: &[LogEntry],
    ) {
        self.bad.insert(run.short());
        self.cover(folder, logs);
    }

    fn cover(&mut self, folder: &VolumeFolder, logs: &[LogEntry]) {
        let mut vanished = false;
        for _ in 0..3 {
            let manifest = manifest::load(folder).unwrap_or_else(|error| {
                tracing::warn!(volume = %folder.id(), "the levels are not used: {error}");
                manifest::empty(folder)
            });
            let tiles = self.cover_with(&manifest, folder, logs, &mut vanished);
            self.tiles = Arc::new(tiles);
            // The writer may just have replaced some; then the manifest is another one now.
            if !std::mem::take(&mut vanished) {
                break;
            }
        }
    }

    fn cover_with(
        &self,
        manifest: &Manifest,
        folder: &VolumeFolder,
        logs: &[LogEntry],
        vanished: &mut bool,
    ) -> Vec<Tile> {
        let files = manifest.files.iter();
        let good = files.filter(|file| !self.bad.contains(&file.run.short()));
        let placed = good.filter_map(|file| plan::place(file, logs)).collect();
        let cover = plan::cover(logs.len(), placed, |placed| {
            match open(placed, folder, logs, &self.fences) {
                Ok(file) => file.map(Arc::new),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    *vanished = true;
                    None
                }
                Err(error) => {
                    tracing::warn!(volume = %folder.id(), "a level is not used: {error}");
                    None
                }
            }
        });
        let tile = |(logs, file): (std::ops::Range<usize>, Option<Arc<LevelFile>>)| match file {
            Some(file) => Tile::Level(file, logs.start),
            None => Tile::Log(logs.start),
        };
        cover.into_iter().map(tile).collect()
    }
}

/// Opens the file, if it was made of these logs.
fn open(
    placed: &Placed,
    folder: &VolumeFolder,
    logs: &[LogEntry],
    fences: &Arc<Fences>,
) -> Result<Option<LevelFile>> {
    if !plan::is_of(placed, folder, logs) {
        return Ok(None);
    }
    open_listed(placed, folder, fences).map(Some)
}

/// Opens a listed file.
pub(super) fn open_listed(
    placed: &Placed,
    folder: &VolumeFolder,
    fences: &Arc<Fences>,
) -> Result<LevelFile> {
    let path = manifest::path_of(folder, &placed.file.name());
    LevelFile::open(&path, &placed.file.head(folder.id()), fences)
}

/// Why the tiles could not be read.
#[derive(Debug)]
pub(in crate::store) enum Trouble {
    /// A level file is damaged: the logs are to be asked instead.
    Level(Run, Error),
    /// A log is.
    Log(Error),
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Level(_, error) | Trouble::Log(error) => error,
        }
    }
}

/// What a tile says about a part of the volume, by ascending offset.
pub(in crate::store) enum TileStream<'a> {
    /// Of a level file, and the number of its first log.
    Level(LevelStream, usize),
    /// Of a log, its number and path.
    Log(IndexStream<LogFile>, usize, Arc<Path>),
    /// Of the first records of a log.
    Prefix(PrefixEntries<'a>, usize),
}

impl TileStream<'_> {
    /// What a level file says.
    pub(in crate::store) fn level(
        file: &Arc<LevelFile>,
        first: usize,
        extent: Extent,
    ) -> Result<Self, Trouble> {
        let stream = LevelStream::new(Arc::clone(file), extent);
        let stream = stream.map_err(|error| Trouble::Level(file.run(), error))?;
        Ok(Self::Level(stream, first))
    }

    /// What the log of this number says.
    pub(in crate::store) fn log(
        log: &StoredLog,
        number: usize,
        extent: Extent,
    ) -> Result<Self, Trouble> {
        let index = log.log.own_index_in(extent);
        let index = index.map_err(|e| Trouble::Log(log.error(INDEX, e)))?;
        Ok(Self::Log(index, number, Arc::clone(&log.path)))
    }
}

const INDEX: &str = "read the index of a log";

impl Iterator for TileStream<'_> {
    type Item = Result<Piece, Trouble>;

    fn next(&mut self) -> Option<Self::Item> {
        let number = SourceNumber::new;
        match self {
            Self::Level(stream, first) => Some(match stream.next()? {
                Ok(piece) => {
                    let source = number(*first + piece.source.get());
                    Ok(Piece { source, ..piece })
                }
                Err(error) => Err(Trouble::Level(stream.run(), error)),
            }),
            Self::Log(stream, log, path) => Some(match stream.next()? {
                Ok(entry) => Ok(Piece {
                    source: number(*log),
                    entry,
                }),
                Err(error) => {
                    let error = Error::log(INDEX, error);
                    Err(Trouble::Log(error.path(&**path)))
                }
            }),
            Self::Prefix(entries, log) => entries.next().map(|entry| {
                let source = number(*log);
                Ok(Piece { source, entry })
            }),
        }
    }
}
