//! The read side of a volume: its points, and each of them opened. It needs the folder alone:
//! no daemon, no source machine, and no right to write.

use std::sync::Arc;

use hrl_format::VolumeKey;
use hrl_format::id::{PointId, VolumeId};
use hrl_format::units::Timestamp;

use super::catalogue::{Catalogue, LogEntry, Point};
use super::catalogue_file::Known;
use super::folder::Store;
use super::layers::Layers;
use super::layout::VolumeFolder;
use super::lease::{Lease, Wanted, no_such_point};
use super::moment::Moment;
use super::point_reader::PointReader;
use super::sources::{OpenFiles, open_log};
use super::state::State;
use super::writer::{check_key, key_missing};
use crate::error::{Error, ErrorKind, Result};
use crate::time::rfc3339;

/// Which recovery point is meant, or which state between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointSelector {
    /// The one of this id.
    Id(PointId),
    /// The newest.
    Latest,
    /// The newest that is not younger than this. As a [`State`](super::State): the state after
    /// the last record that had completed by then, where logs are in order.
    AtOrBefore(Timestamp),
    /// This moment between points.
    Moment(Moment),
}

/// A volume of a store, for reading. Any number of them may read while one process writes.
///
/// ```no_run
/// use std::path::Path;
/// use libreplica::store::{PointSelector, Store};
/// use libreplica::units::ByteOffset;
///
/// let store = Store::open(Path::new("/backup/replica"))?;
/// let volume = store.volume(store.find("database")?, None)?;
/// for point in volume.points()? {
///     println!("{} {} {}", point.id, point.consistency, point.label);
/// }
/// let latest = volume.point(PointSelector::Latest)?;
/// let mut superblock = [0; 1024];
/// volume.open_point(latest.id)?.read_at(ByteOffset::new(1024), &mut superblock)?;
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VolumeReader {
    pub(super) folder: VolumeFolder,
    pub(super) key: Option<VolumeKey>,
    /// So that one thing after the other is asked of a long catalogue at the price of one.
    pub(super) known: Arc<Known>,
}

impl Store {
    /// A volume for reading. Without the key of an encrypted one its points can be listed, not
    /// read.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Key`] if the key is another, or the volume not encrypted;
    /// [`ErrorKind::Damaged`] if neither copy of the catalogue can be used.
    pub fn volume(&self, id: VolumeId, key: Option<VolumeKey>) -> Result<VolumeReader> {
        let folder = self.volume_folder(id);
        let known = Arc::new(Known::default());
        let catalogue = known.load(&folder)?;
        check_key(&catalogue, key.as_ref(), "open the volume")?;
        Ok(VolumeReader { folder, key, known })
    }
}

impl VolumeReader {
    /// What the store holds of the volume now.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if neither copy of the catalogue can be used; the system's.
    pub fn catalogue(&self) -> Result<Catalogue> {
        self.known_catalogue().map(Arc::unwrap_or_clone)
    }

    /// The same, shared.
    pub(super) fn known_catalogue(&self) -> Result<Arc<Catalogue>> {
        self.known.load(&self.folder)
    }

    pub(super) fn lease(&self, wanted: Wanted) -> Result<(Lease, Arc<Catalogue>)> {
        Lease::take_knowing(&self.folder, wanted, &self.known)
    }

    /// The volume.
    pub fn id(&self) -> VolumeId {
        self.folder.id()
    }

    /// The key that it was opened with.
    pub const fn key(&self) -> Option<&VolumeKey> {
        self.key.as_ref()
    }

    /// The store that it is in.
    ///
    /// # Errors
    /// Those of [`Store::open`].
    pub fn store(&self) -> Result<Store> {
        let volumes = self.folder.path().parent();
        let store = volumes.and_then(std::path::Path::parent);
        Store::open(store.unwrap_or(self.folder.path()))
    }

    /// Whether it was opened with the volume's key.
    pub const fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// The recovery points, oldest first. Of an encrypted volume labels, groups and roots are there
    /// only if the reader has the key.
    ///
    /// # Errors
    /// As [`VolumeReader::catalogue`]; with the key also those of reading the logs.
    pub fn points(&self) -> Result<Vec<Point>> {
        if self.key.is_none() {
            return Ok(self.known_catalogue()?.points.clone());
        }
        let (_lease, catalogue) = self.lease(Wanted::View)?;
        let mut points = catalogue.points.clone();
        for point in &mut points {
            self.reveal(&catalogue, point)?;
        }
        Ok(points)
    }

    /// The point that is meant. Moments between points are had by [`VolumeReader::state`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none, or a moment is no point.
    pub fn point(&self, selector: PointSelector) -> Result<Point> {
        const FIND: &str = "find the recovery point";
        let catalogue = self.known_catalogue()?;
        let (found, wanted) = match selector {
            PointSelector::Id(id) => {
                let point = catalogue.point(id);
                (
                    Some(point.ok_or_else(|| no_such_point(&self.folder, id))?),
                    String::new(),
                )
            }
            PointSelector::Latest => (catalogue.points.last(), "there is none yet".to_owned()),
            PointSelector::AtOrBefore(time) => {
                let mut newest_first = catalogue.points.iter().rev();
                let found = newest_first.find(|point| point.time <= time);
                (found, format!("none is as old as {}", rfc3339(time)))
            }
            PointSelector::Moment(moment) => match self.state(selector)? {
                State::Point(point) => return Ok(point),
                State::Moment(state) => match state.point {
                    Some(point) => return Ok(point),
                    None => (None, format!("there is none at {moment}")),
                },
            },
        };
        let none = || {
            Error::new(ErrorKind::NotFound, FIND)
                .path(self.folder.path())
                .detail(wanted)
        };
        let mut point = found.ok_or_else(none)?.clone();
        if self.key.is_some() {
            let (_lease, catalogue) = self.lease(Wanted::Point(point.id))?;
            self.reveal(&catalogue, &mut point)?;
        }
        Ok(point)
    }

    /// Opens a point for reading, and leases it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not there (any more); [`ErrorKind::Key`] if the volume is encrypted
    /// and the reader has no key; [`ErrorKind::Damaged`] if a log that it needs is not what the
    /// catalogue says.
    pub fn open_point(&self, id: PointId) -> Result<PointReader> {
        const OPEN: &str = "open a recovery point";
        let (lease, catalogue) = self.lease(Wanted::Point(id))?;
        if catalogue.key.is_some() && self.key.is_none() {
            return Err(key_missing(&catalogue, OPEN));
        }
        let point = catalogue
            .point(id)
            .ok_or_else(|| no_such_point(&self.folder, id))?;
        let mut point = point.clone();
        self.reveal(&catalogue, &mut point)?;
        let logs = logs_up_to(&catalogue, &point);
        let key = self.key.as_ref();
        let layers = Layers::open(&self.folder, &catalogue, logs, point.size, key)?;
        Ok(PointReader::new(lease, State::Point(point), layers))
    }

    /// Fills in what an encrypted volume's catalogue leaves out.
    pub(super) fn reveal(&self, catalogue: &Catalogue, point: &mut Point) -> Result<()> {
        let Some(key) = &self.key else { return Ok(()) };
        let log = catalogue.logs.iter().find(|log| log.last == point.epoch);
        let Some(entry) = log else { return Ok(()) };
        let files = OpenFiles::default().into();
        let log = open_log(&self.folder, entry, &files, Some(key))?;
        for tag in log.log.tags() {
            let tag = tag.map_err(|e| log.error("read the points of a log", e))?;
            if tag.id == point.id {
                point.label = tag.label;
                point.group = tag.group;
                point.root = tag.root;
                break;
            }
        }
        Ok(())
    }
}

/// The logs that a point is made of.
pub(super) fn logs_up_to<'a>(catalogue: &'a Catalogue, point: &Point) -> &'a [LogEntry] {
    let count = catalogue
        .logs
        .partition_point(|log| log.last <= point.epoch);
    &catalogue.logs[..count]
}
