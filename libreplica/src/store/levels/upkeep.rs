//! The writer's side of the levels: after a change of the chain it drops what no longer fits,
//! and makes what is missing, a bounded part of the work at each step. In this order: a file is
//! written in `incoming/` and synced, renamed into `levels/`, and that folder synced; then the
//! manifest that lists it is made durable. What the manifest does not list is removed. Readers
//! have the files that they use open, and so keep them.
//!
//! Nothing that fails here keeps the store from anything else: it is said, and tried again when the
//! chain has changed.

use std::sync::Arc;

use hrl_format::units::{ByteLen, Epoch, VolumeSize};
use hrl_format::{Overlay, Piece};

use super::build::LevelWriter;
use super::file::Fences;
use super::layout::{Head, Run};
use super::manifest::{self, Listed, Manifest};
use super::plan::{self, Job, Part, Placed, RADIX};
use super::tiles::{TileStream, Trouble, open_listed};
use crate::error::Result;
use crate::store::catalogue::{LogEntry, View};
use crate::store::durable;
use crate::store::sources::{OpenFiles, open_log};
use crate::store::writer::VolumeWriter;

/// How many entries are merged in a step: about half a second's work.
const STEP: usize = 1 << 20;

/// What the writer knows of its volume's levels.
#[derive(Debug)]
pub(in crate::store) struct Keeper {
    /// The files there are; `None` until they were looked at.
    files: Option<Vec<Listed>>,
    /// The view that they were last compared with.
    view: View,
    building: Option<Box<Building>>,
    /// The chain for which nothing more can be done: its view and newest epoch.
    settled: Option<(View, Epoch)>,
    /// How many tiles become a file.
    pub(in crate::store) radix: usize,
    /// How many entries are merged in a step.
    pub(in crate::store) step: usize,
}

impl Default for Keeper {
    fn default() -> Self {
        Self {
            files: None,
            view: View::default(),
            building: None,
            settled: None,
            radix: RADIX,
            step: STEP,
        }
    }
}

#[cfg(test)]
impl Keeper {
    /// The names of the files there are.
    pub(in crate::store) fn names(&self) -> Vec<String> {
        self.files.iter().flatten().map(Listed::name).collect()
    }
}

/// A file that is being made.
struct Building {
    writer: LevelWriter,
    pieces: Overlay<TileStream<'static>, Piece>,
    /// The number of the run's first log when it was begun: pieces count from there.
    base: usize,
    name: String,
}

impl std::fmt::Debug for Building {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Building")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum LevelStep {
    /// There is nothing to do.
    Nothing,
    /// A part of the work was done.
    Worked,
}

impl VolumeWriter {
    /// A part of what makes points quick to open.
    pub(in crate::store) fn level_step(&mut self) -> LevelStep {
        let chain = (self.catalogue.view, self.catalogue.last_epoch());
        if self.levels.settled == Some(chain) {
            return LevelStep::Nothing;
        }
        let step = self.try_level_step().unwrap_or_else(|error| {
            let volume = self.catalogue.volume;
            tracing::warn!(%volume, "points will take longer to open: {error}");
            self.stop_building();
            LevelStep::Nothing
        });
        if step == LevelStep::Nothing {
            self.levels.settled = Some(chain);
        }
        step
    }

    fn try_level_step(&mut self) -> Result<LevelStep> {
        self.compare_levels()?;
        if self.levels.building.is_none() {
            let Some(job) = self.next_level() else {
                return Ok(LevelStep::Nothing);
            };
            match self.begin_level(&job) {
                Ok(building) => self.levels.building = Some(Box::new(building)),
                Err(trouble) => return self.without(trouble),
            }
        }
        match self.merge_some() {
            Ok(step) => Ok(step),
            Err(trouble) => self.without(trouble),
        }
    }

    fn next_level(&self) -> Option<Job> {
        let logs = &self.catalogue.logs;
        let files = self.levels.files.iter().flatten();
        let placed: Vec<Placed> = files.filter_map(|file| plan::place(file, logs)).collect();
        plan::next(logs.len(), &placed, self.levels.radix)
    }

    /// A damaged file is dropped, and the work goes on without it.
    fn without(&mut self, trouble: Trouble) -> Result<LevelStep> {
        let Trouble::Level(run, error) = trouble else {
            return Err(trouble.into());
        };
        let volume = self.catalogue.volume;
        tracing::warn!(%volume, "a level is made anew: {error}");
        self.stop_building();
        self.keep_levels(|file| file.run != run)?;
        Ok(LevelStep::Worked)
    }

    /// Drops the files whose logs are not in the chain any more, or not all.
    fn compare_levels(&mut self) -> Result<()> {
        let view = self.catalogue.view;
        let first = self.levels.files.is_none();
        if !first && self.levels.view == view {
            return Ok(());
        }
        if first {
            let manifest = manifest::load(&self.folder).unwrap_or_else(|error| {
                let volume = self.catalogue.volume;
                tracing::warn!(%volume, "the levels are made anew: {error}");
                manifest::empty(&self.folder)
            });
            self.levels.files = Some(manifest.files);
        }
        let (folder, logs) = (self.folder.clone(), self.catalogue.logs.clone());
        let fences = Arc::default();
        let fits = |file: &Listed| {
            let placed = plan::place(file, &logs);
            let placed = placed.filter(|placed| plan::is_of(placed, &folder, &logs));
            // Once it is also looked whether they are there.
            placed.is_some_and(|placed| !first || open_listed(&placed, &folder, &fences).is_ok())
        };
        let building = self.levels.building.as_ref();
        if building.is_some_and(|building| !building.is_in(&folder, &logs)) {
            self.stop_building();
        }
        self.keep_levels(fits)?;
        if first {
            self.remove_strange_levels()?;
        }
        self.levels.view = view;
        Ok(())
    }

    /// Keeps some of the files, and removes the others once the manifest does without.
    fn keep_levels(&mut self, keep: impl Fn(&Listed) -> bool) -> Result<()> {
        let files = self.levels.files.clone().unwrap_or_default();
        let (kept, gone): (Vec<_>, Vec<_>) = files.into_iter().partition(keep);
        if gone.is_empty() {
            return Ok(());
        }
        self.list_levels(kept)?;
        for file in gone {
            durable::remove(&manifest::path_of(&self.folder, &file.name()))?;
        }
        Ok(())
    }

    /// Makes these the files that count.
    fn list_levels(&mut self, files: Vec<Listed>) -> Result<()> {
        let manifest = Manifest {
            volume: self.catalogue.volume,
            files,
        };
        // Whatever it comes to, what is on disk is looked at again.
        self.levels.files = None;
        manifest::save(&self.folder, &manifest)?;
        self.levels.files = Some(manifest.files);
        Ok(())
    }

    /// Files that the manifest does not list.
    fn remove_strange_levels(&self) -> Result<()> {
        let files = self.levels.files.iter().flatten();
        let known: Vec<String> = files.map(Listed::name).collect();
        let manifest = self.folder.level_manifest();
        for name in durable::names_in(&self.folder.levels())? {
            let path = manifest::path_of(&self.folder, &name);
            if path != manifest && !known.contains(&name) {
                durable::remove(&path)?;
            }
        }
        Ok(())
    }

    fn begin_level(&self, job: &Job) -> Result<Building, Trouble> {
        let range = job.logs();
        let logs = &self.catalogue.logs[range.clone()];
        let run = Run::of(self.catalogue.volume, logs);
        let size = logs.last().map_or_else(VolumeSize::default, |log| log.size);
        let head = Head {
            volume: self.catalogue.volume,
            run,
            level: job.level,
            logs: logs.len() as u64,
            first: logs.first().map_or(Epoch::ZERO, |log| log.first),
            last: logs.last().map_or(Epoch::ZERO, |log| log.last),
            size,
            entries: 0,
        };
        let streams = self.streams_of(job, size)?;
        let name = manifest::name(head.first, &run);
        let path = self.folder.incoming().join(&name);
        Ok(Building {
            writer: LevelWriter::create(path, head).map_err(Trouble::Log)?,
            pieces: Overlay::new(streams, size),
            base: range.start,
            name,
        })
    }

    /// What the parts of a run say.
    fn streams_of(&self, job: &Job, size: VolumeSize) -> Result<Vec<TileStream<'static>>, Trouble> {
        let (folder, logs) = (&self.folder, &self.catalogue.logs);
        let open_files = Arc::new(OpenFiles::default());
        let fences = Arc::new(Fences::default());
        let stream = |part: &Part| {
            let first = part.logs.start;
            if let Some(file) = part.file {
                let logs = part.logs.clone();
                let opened = open_listed(&Placed { logs, file }, folder, &fences);
                let opened = opened.map_err(|error| Trouble::Level(file.run, error))?;
                return TileStream::level(&Arc::new(opened), first, size.extent());
            }
            let key = self.key.as_ref();
            let log = open_log(folder, &logs[first], &open_files, key).map_err(Trouble::Log)?;
            TileStream::log(&log, first, size.extent())
        };
        job.parts.iter().map(stream).collect()
    }

    fn merge_some(&mut self) -> Result<LevelStep, Trouble> {
        let Some(building) = &mut self.levels.building else {
            return Ok(LevelStep::Nothing);
        };
        for _ in 0..self.levels.step {
            let Some(piece) = building.pieces.next() else {
                return self.finish_level().map_err(Trouble::Log);
            };
            building.push(piece?.entry).map_err(Trouble::Log)?;
        }
        Ok(LevelStep::Worked)
    }

    fn finish_level(&mut self) -> Result<LevelStep> {
        let Some(building) = self.levels.building.take() else {
            return Ok(LevelStep::Nothing);
        };
        let name = building.name;
        let from = self.folder.incoming().join(&name);
        let finished = building.writer.finish();
        let (head, bytes) = finished.inspect_err(|_| {
            // It may be what filled the disk.
            let _ = durable::remove(&from);
        })?;
        durable::rename(&from, &manifest::path_of(&self.folder, &name))?;
        durable::sync_folder(&self.folder.levels())?;
        let mut files = self.levels.files.clone().unwrap_or_default();
        files.retain(|file| file.run != head.run);
        files.push(Listed::of(&head, bytes));
        self.list_levels(files)?;
        Ok(LevelStep::Worked)
    }

    fn stop_building(&mut self) {
        if let Some(building) = self.levels.building.take() {
            let path = self.folder.incoming().join(&building.name);
            if let Err(error) = durable::remove(&path) {
                tracing::warn!("an unfinished level stays for now: {error}");
            }
        }
    }
}

impl Building {
    fn push(&mut self, piece: Piece) -> Result<()> {
        let in_run = piece.source.get() - self.base;
        self.writer.push(Piece {
            source: hrl_format::SourceNumber::new(in_run),
            ..piece
        })
    }

    /// Whether the logs that it is made of are all in the chain still.
    fn is_in(&self, folder: &crate::store::layout::VolumeFolder, logs: &[LogEntry]) -> bool {
        let head = self.writer.head();
        let listed = Listed::of(head, ByteLen::ZERO);
        let placed = plan::place(&listed, logs);
        placed.is_some_and(|placed| plan::is_of(&placed, folder, logs))
    }
}
