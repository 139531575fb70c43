//! Leases: whoever reads a point holds shared locks on two files, with or without a daemon, and
//! without the right to write to the store. One is the point's: while it is held the
//! point is not dropped, and so nothing is folded past it; whoever reads a moment between points
//! holds that of the last one before. The other is the view's: while it
//! is held no log that the view needs is deleted.
//!
//! The writer makes both files before it lists the point or the view. A reader locks, then
//! reads the catalogue again: the point and the view that it locked must still be there. The
//! writer lets go in the other order: first the catalogue, then the file, under an exclusive lock.
//!
//! Files, not byte ranges of one: flock ends with the process that holds it, works on
//! read-only filesystems, and `lsof` names the reader.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use hrl_format::id::PointId;
use hrl_format::units::Epoch;

use super::catalogue::{Catalogue, View};
use super::catalogue_file::{self, Known};
use super::durable::{self, StoreFile, advise};
use super::held::durable_leases;
use super::layout::VolumeFolder;
use super::lock::FileLock;
use super::state::no_such_moment;
use crate::error::{Error, ErrorKind, IoContext, Result};

const TAKE: &str = "take a lease";
const LOOK: &str = "look for readers";

/// A reader's hold on a view and, unless it reads logs only, on a point.
#[derive(Debug)]
pub(super) struct Lease {
    _view: Option<FileLock>,
    _point: Option<FileLock>,
}

/// What a lease is wanted for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    /// The logs and the base of the current view.
    View,
    /// The same, and one point.
    Point(PointId),
    /// The same, and the point that holds the moments of an epoch: the newest before it.
    Moment(Epoch),
}

impl Lease {
    /// Takes a lease and returns it with the catalogue that it protects.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the point is not listed (any more); [`ErrorKind::Busy`] if the
    /// store changed faster than the lease could be taken.
    pub(super) fn take(folder: &VolumeFolder, wanted: Wanted) -> Result<(Self, Arc<Catalogue>)> {
        Self::take_knowing(folder, wanted, &Known::default())
    }

    /// The same, for whoever may know the catalogue already.
    pub(super) fn take_knowing(
        folder: &VolumeFolder,
        wanted: Wanted,
        known: &Known,
    ) -> Result<(Self, Arc<Catalogue>)> {
        // Each round is lost only to a fold that ended right then; folds take far longer.
        for _ in 0..100 {
            let before = known.load(folder)?;
            let view = before.view;
            let point = wanted.point(folder, &before)?;
            let Some(view_lock) = share_view(folder, view)? else {
                continue;
            };
            let point_lock = match point {
                None => None,
                Some(id) => match share_point(folder, id) {
                    Ok(Some(lock)) => Some(lock),
                    Ok(None) => continue,
                    // Just dropped; an older point may hold the moment still.
                    Err(e) if e.kind() == ErrorKind::NotFound && wanted.is_moment() => continue,
                    Err(e) => return Err(e),
                },
            };
            let catalogue = known.load(folder)?;
            let listed = point.is_none_or(|id| catalogue.point(id).is_some());
            match wanted {
                Wanted::Point(id) if !listed => return Err(no_such_point(folder, id)),
                Wanted::Moment(_) if !listed => continue,
                _ => {}
            }
            if catalogue.view == view {
                let lease = Self {
                    _view: view_lock.0,
                    _point: point_lock.and_then(|lock| lock.0),
                };
                return Ok((lease, catalogue));
            }
        }
        Err(Error::new(ErrorKind::Busy, TAKE)
            .path(folder.leases())
            .detail("the store is being changed")
            .advice("try again"))
    }
}

impl Wanted {
    const fn is_moment(self) -> bool {
        matches!(self, Self::Moment(_))
    }

    /// Which point's file is to be locked.
    fn point(self, folder: &VolumeFolder, catalogue: &Catalogue) -> Result<Option<PointId>> {
        match self {
            Self::View => Ok(None),
            Self::Point(id) => Ok(Some(id)),
            Self::Moment(epoch) => {
                let mut points = catalogue.points.iter().rev();
                let holding = points.find(|point| point.epoch < epoch);
                holding.map(|point| Some(point.id)).ok_or_else(|| {
                    let why = format!("no recovery point lies before epoch {epoch}");
                    no_such_moment(folder, catalogue, &why)
                })
            }
        }
    }
}

/// The error for a point that is not in the catalogue.
pub(super) fn no_such_point(folder: &VolumeFolder, id: PointId) -> Error {
    Error::new(ErrorKind::NotFound, "open a recovery point")
        .path(folder.path())
        .detail(format!("there is no point {id}"))
        .advice("`replica points` lists those there are; retention may have dropped it")
}

/// A shared lock; of a store on a read-only filesystem, where nothing can change, none.
struct Shared(Option<FileLock>);

/// Locks a lease file; `None` if the writer is just taking it away.
fn share(path: &Path) -> Result<Option<Shared>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => match make(path) {
            Ok(file) => file,
            Err(e) if e.raw_os_error() == Some(libc::EROFS) => return Ok(Some(Shared(None))),
            Err(e) => return Err(Error::io(TAKE, e).path(path)),
        },
        Err(e) => return Err(Error::io(TAKE, e).path(path)),
    };
    let lock = FileLock::shared(file).at(TAKE, path)?;
    Ok(lock.map(|lock| Shared(Some(lock))))
}

/// Like [`share`], but makes no file for a view that is no longer the current one.
fn share_view(folder: &VolumeFolder, view: View) -> Result<Option<Shared>> {
    let path = folder.view_lease(view);
    if !path.exists() && catalogue_file::load(folder)?.catalogue.view != view {
        return Ok(None);
    }
    share(&path)
}

/// Like [`share`], but makes no file for a point that is not listed.
fn share_point(folder: &VolumeFolder, id: PointId) -> Result<Option<Shared>> {
    let path = folder.point_lease(id);
    if !path.exists() && catalogue_file::load(folder)?.catalogue.point(id).is_none() {
        return Err(no_such_point(folder, id));
    }
    share(&path)
}

fn make(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

/// Makes the lease file of a point or a view. Not synced: a lost one is made again when the
/// store is opened for writing.
pub(super) fn prepare(path: &Path) -> Result<()> {
    match path.exists() {
        true => Ok(()),
        false => StoreFile::create(path.to_owned()).map(drop),
    }
}

/// An exclusive lock on a lease file: no reader holds it, and none can take it.
#[derive(Debug)]
pub(super) struct Withdrawn {
    _lock: FileLock,
}

/// Keeps readers away; `None` if one is there.
pub(super) fn withdraw(path: &Path) -> Result<Option<Withdrawn>> {
    let file = make(path).at(LOOK, path).map_err(advise)?;
    let lock = FileLock::exclusive(file).at(LOOK, path)?;
    Ok(lock.map(|lock| Withdrawn { _lock: lock }))
}

/// The points that somebody reads now, or a branch stands on, in the order of `catalogue`.
pub(super) fn held_points(folder: &VolumeFolder, catalogue: &Catalogue) -> Result<Vec<PointId>> {
    let branches = durable_leases(folder)?;
    let mut held = Vec::new();
    for point in &catalogue.points {
        let is_stood_on = branches.iter().any(|branch| branch.point == point.id);
        if is_stood_on || is_held(&folder.point_lease(point.id))? {
            held.push(point.id);
        }
    }
    Ok(held)
}

/// A full store names whoever holds its room. Other errors are passed on.
pub(super) fn explain_full(folder: &VolumeFolder, error: Error) -> Error {
    if error.kind() != ErrorKind::Full {
        return error;
    }
    let mut advice = "free room there".to_owned();
    if let Ok(loaded) = catalogue_file::load(folder) {
        let held = held_points(folder, &loaded.catalogue).unwrap_or_default();
        let waiting = waiting_bytes(folder, &loaded.catalogue);
        if held.is_empty() && waiting == 0 {
            advice.push_str(", or keep fewer points (--retain)");
        }
        if !held.is_empty() {
            let held: Vec<String> = held.iter().map(ToString::to_string).collect();
            let held = held.join(", ");
            advice.push_str(&format!(
                "; point {held} is being read and cannot be dropped"
            ));
        }
        if waiting > 0 {
            advice.push_str(&format!(
                "; {waiting} bytes of folded logs are still being read"
            ));
        }
        if !held.is_empty() || waiting > 0 {
            let leases = folder.leases();
            advice.push_str(&format!(" (see `lsof {}/*`)", leases.display()));
        }
    }
    error.advice(advice)
}

/// How long the logs are that left the chain and wait for their last reader.
fn waiting_bytes(folder: &VolumeFolder, catalogue: &Catalogue) -> u64 {
    let retired = catalogue.retired.iter().map(|retired| retired.entry);
    // The catalogue may list some that are gone already.
    let waiting = retired.filter(|entry| folder.log(&entry.name()).exists());
    waiting.map(|entry| entry.bytes.get()).sum()
}

fn is_held(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(LOOK, e).path(path)),
    };
    // Let go at once: for that moment a reader that comes has to try again.
    Ok(FileLock::exclusive(file).at(LOOK, path)?.is_none())
}

/// Takes away the lease files of views before `current` that nobody holds, and returns the
/// oldest view that is needed still.
pub(super) fn oldest_view(folder: &VolumeFolder, current: View) -> Result<View> {
    let mut oldest = current;
    for name in durable::names_in(&folder.leases())? {
        let Some(view) = name.strip_prefix("view-").and_then(View::parse) else {
            continue;
        };
        if view >= current {
            continue;
        }
        let path = folder.view_lease(view);
        match withdraw(&path)? {
            Some(_withdrawn) => durable::remove(&path)?,
            None => oldest = oldest.min(view),
        }
    }
    Ok(oldest)
}
