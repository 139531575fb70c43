//! The second half of the check: each point is read, and its root computed. The oldest is read
//! whole; of each younger one only what changed since the one before it, while the leaves of all
//! blocks are kept in memory. So every point is proved at the price of reading each log once.
//! A block that cannot be read is unknown until a later epoch writes it anew: that names
//! exactly the points that are damaged.

use hrl_format::record::Root;
use hrl_format::units::{ByteLen, ByteOffset, Extent};

use super::catalogue::{Catalogue, Point};
use super::check::{BadLog, CheckReport, PointCheck, PointState, Steps};
use super::point_reader::{PART, PieceKind, PointReader};
use super::reader::VolumeReader;
use super::sources::{OpenFiles, open_log};
use crate::digest::{LeafFunction, LeafTable};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};

/// What the points have in common, as they are followed.
struct Followed {
    table: LeafTable,
    /// Blocks that could not be read, with the first reason.
    unreadable: Option<Error>,
}

impl VolumeReader {
    pub(super) fn check_points(
        &self,
        catalogue: &Catalogue,
        bad: &[BadLog],
        report: &mut CheckReport,
        steps: &mut Steps<'_>,
    ) -> Result<()> {
        let mut followed = None;
        let mut before: Option<&Point> = None;
        for point in &catalogue.points {
            let state = if catalogue.key.is_some() && self.key.is_none() {
                unread(bad, point)
            } else if let Some(why) = unusable(bad, point) {
                PointState::Damaged(why)
            } else {
                match self.follow(catalogue, before, point, &mut followed, steps) {
                    Ok(state) => state,
                    Err(e) if e.kind() == ErrorKind::NotFound => continue,
                    Err(e) => PointState::Damaged(e.to_string()),
                }
            };
            if followed.is_some() {
                before = Some(point);
            }
            report.points.push(PointCheck {
                id: point.id,
                time: point.time,
                state,
            });
        }
        Ok(())
    }

    /// Brings the leaves to `point`, and says what became of it.
    fn follow(
        &self,
        catalogue: &Catalogue,
        before: Option<&Point>,
        point: &Point,
        followed: &mut Option<Followed>,
        steps: &mut Steps<'_>,
    ) -> Result<PointState> {
        let mut reader = self.open_point(point.id)?;
        let geometry = Geometry {
            size: point.size,
            ..catalogue.geometry()
        };
        let runs = match (&followed, before) {
            (Some(_), Some(before)) => self.changed(catalogue, before, point, &geometry)?,
            _ => all_data(&reader, &geometry)?,
        };
        let followed = followed.get_or_insert_with(|| Followed {
            table: LeafTable::zeroes(geometry, LeafFunction::for_volume(self.key.as_ref())),
            unreadable: None,
        });
        followed.table.resize(point.size);
        for run in runs {
            followed.read(&mut reader, run, steps);
        }
        match (
            followed.state(reader.state().root()),
            self.tag_fault(catalogue, point),
        ) {
            (PointState::Proved | PointState::Readable, Some(fault)) => {
                Ok(PointState::Damaged(fault.to_string()))
            }
            (state, _) => Ok(state),
        }
    }

    /// Why the point's tag cannot be read in its log. The catalogue may still say all that
    /// stood there, but it can be lost, and the log cannot bear it out any more.
    fn tag_fault(&self, catalogue: &Catalogue, point: &Point) -> Option<Error> {
        let entry = catalogue.logs.iter().find(|log| log.last == point.epoch)?;
        let files = OpenFiles::default().into();
        let log = match open_log(&self.folder, entry, &files, self.key.as_ref()) {
            Ok(log) => log,
            Err(error) => return Some(error),
        };
        let mut fault = None;
        for tag in log.log.tags() {
            match tag {
                Ok(tag) if tag.id == point.id => return None,
                Ok(_) => {}
                Err(error) => fault = fault.or(Some(log.error("read a point's tag", error))),
            }
        }
        fault
    }

    /// The blocks that changed between two points, from the indexes of the logs.
    fn changed(
        &self,
        catalogue: &Catalogue,
        before: &Point,
        point: &Point,
        geometry: &Geometry,
    ) -> Result<Vec<Run>> {
        let between = |last| last > before.epoch && last <= point.epoch;
        let mut runs = Vec::new();
        for entry in catalogue.logs.iter().filter(|log| between(log.last)) {
            let files = OpenFiles::default().into();
            let log = open_log(&self.folder, entry, &files, self.key.as_ref())?;
            for entry in log.log.index() {
                let entry = entry.map_err(|e| log.error("read the index of a log", e))?;
                runs.extend(geometry.run_of(entry.extent));
            }
        }
        // A resize makes the last block another one.
        let sizes = [before.size, point.size];
        let ends = sizes.iter().filter_map(|size| size.get().checked_sub(1));
        let last_bytes = ends.filter_map(|at| Extent::new(ByteOffset::new(at), ByteLen::new(1)));
        runs.extend(last_bytes.filter_map(|extent| geometry.run_of(extent)));
        Ok(joined(runs))
    }
}

/// Why a point cannot be had, whatever it reads as: a log below it says nothing.
fn unusable(bad: &[BadLog], point: &Point) -> Option<String> {
    let mut below = bad.iter().filter(|bad| bad.first <= point.epoch);
    below.find_map(|bad| bad.unusable.clone())
}

/// Without the key: whether a log with something wrong is below the point.
fn unread(bad: &[BadLog], point: &Point) -> PointState {
    match bad.iter().find(|bad| bad.first <= point.epoch) {
        Some(bad) => PointState::Damaged(format!(
            "log {} is damaged; without the key it cannot be told whether that shows here",
            bad.log
        )),
        None => PointState::Unread,
    }
}

/// Where the point may hold anything but zeroes.
fn all_data(reader: &PointReader, geometry: &Geometry) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for piece in reader.pieces()? {
        let piece = piece?;
        if piece.kind == PieceKind::Data {
            runs.extend(geometry.run_of(piece.extent));
        }
    }
    Ok(joined(runs))
}

/// The same blocks in order, each once.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

impl Followed {
    /// Brings the leaves of `run` up to date.
    fn read(&mut self, reader: &mut PointReader, run: Run, steps: &mut Steps<'_>) {
        let geometry = self.table.geometry();
        let blocks_at_once = (PART as u64 >> geometry.block.shift()).max(1);
        let mut start = run.start.get();
        while start < run.end.get() {
            let end = run.end.get().min(start + blocks_at_once);
            let part = Run {
                start: BlockNumber::new(start),
                end: BlockNumber::new(end),
            };
            let len = geometry.extent_of(part).len().get();
            if self.read_part(reader, part).is_err() {
                // Which of the blocks it is.
                for block in part.range().map(BlockNumber::new) {
                    let one = Run {
                        start: block,
                        end: BlockNumber::new(block.get() + 1),
                    };
                    if let Err(error) = self.read_part(reader, one) {
                        self.table.forget(block);
                        self.unreadable.get_or_insert(error);
                    }
                }
            }
            steps.add(len);
            start = end;
        }
    }

    fn read_part(&mut self, reader: &mut PointReader, part: Run) -> Result<()> {
        let geometry = self.table.geometry();
        let extent = geometry.extent_of(part);
        let mut buffer = vec![0; extent.len().get() as usize];
        reader.read_at(extent.offset(), &mut buffer)?;
        let blocks = buffer.chunks(geometry.block.get() as usize);
        for (number, block) in part.range().zip(blocks) {
            self.table.set(BlockNumber::new(number), block);
        }
        Ok(())
    }

    fn state(&mut self, root: Option<Root>) -> PointState {
        match (self.table.root(), root) {
            (None, _) => {
                let why = self.unreadable.as_ref().map(ToString::to_string);
                PointState::Damaged(why.unwrap_or_else(|| "a block cannot be read".to_owned()))
            }
            (Some(_), None) => PointState::Readable,
            (Some(found), Some(root)) if found == root => PointState::Proved,
            (Some(found), Some(root)) => PointState::Damaged(format!(
                "its root is {found}, and must be {root}: it is not what was captured"
            )),
        }
    }
}
