//! Making, finding and removing branches. A branch begins to be with its `branch.json`, and ends
//! with it; all that time retention drops nothing that it stands on.

use std::path::Path;
use std::sync::{Mutex, RwLock};

use hrl_format::id::{BranchId, GenerationId, PointId};
use hrl_format::units::{ByteLen, Epoch, GenerationNumber};

use super::info::{BranchInfo, BranchPurpose, Standing};
use super::sealed::{KeptFrames, Sealed};
use super::tail::{HeldMap, LogSpec};
use super::{Branch, Content, take_up};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::catalogue::{Catalogue, CatalogueGeneration, LogEntry};
use crate::store::durable;
use crate::store::layout::{BranchFolder, VolumeFolder};
use crate::store::lease::{Lease, Wanted, no_such_point};
use crate::store::lock::Lock;
use crate::store::reader::{PointSelector, VolumeReader, logs_up_to};
use crate::store::state::{self, State};
use crate::store::writer::key_missing;

const MAKE: &str = "make a branch";
const OPEN: &str = "open a branch";
const REMOVE: &str = "remove a branch";

/// A branch, as a listing finds it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BranchEntry {
    /// What it is.
    pub info: BranchInfo,
    /// What its logs take, in bytes.
    pub bytes: ByteLen,
    /// Whether a process has it open now.
    pub in_use: bool,
}

impl Catalogue {
    /// A generation that may follow the volume's own.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn next_generation(&self) -> Result<CatalogueGeneration> {
        let id = GenerationId::random();
        Ok(CatalogueGeneration {
            number: GenerationNumber::new(self.generation.number.get().saturating_add(1)),
            id: id.map_err(|e| Error::new(ErrorKind::Io, MAKE).source(e))?,
            parent: Some(self.generation.id),
        })
    }
}

impl VolumeReader {
    /// Makes a branch on the state that is meant, to be written to under `generation`. It is
    /// durable when this returns: from then on retention drops nothing that it stands on, until
    /// it is [discarded](Branch::discard).
    ///
    /// # Errors
    /// Those of [`VolumeReader::state`] and [`VolumeReader::open_point`];
    /// [`ErrorKind::Key`] without the key of an encrypted volume; what the system refuses.
    pub fn create_branch(
        &self,
        selector: PointSelector,
        purpose: BranchPurpose,
        generation: CatalogueGeneration,
    ) -> Result<Branch> {
        let state = self.state(selector)?;
        // Held until the branch is durable, and holds it by itself.
        let (_lease, catalogue) = Lease::take(&self.folder, wanted(&state))?;
        if catalogue.key.is_some() && self.key.is_none() {
            return Err(key_missing(&catalogue, MAKE));
        }
        let (standing, below) = stand(&self.folder, &catalogue, &state)?;
        let id = BranchId::random().map_err(|e| Error::new(ErrorKind::Io, MAKE).source(e))?;
        let info = BranchInfo::new(id, self.folder.id(), &standing, generation, purpose);
        let folder = self.folder.branch(id);
        {
            durable::create_folder(&self.folder.branches())?;
            durable::sync_folder(self.folder.path())?;
            let _making = Lock::take(&self.folder.branches_lock(), MAKE)?;
            sweep(&self.folder)?;
            durable::create_folder(folder.path())?;
            for path in folder.folders() {
                durable::create_folder(&path)?;
            }
            for log in below {
                let name = log.name();
                let to = folder.below().join(name.to_string());
                durable::link(&self.folder.log(&name), &to)?;
            }
            durable::sync_folder(&folder.below())?;
            info.save(&folder)?;
            durable::sync_folder(&self.folder.branches())?;
        }
        self.open_branch(id)
    }

    /// Opens a branch, and puts right what a killed process left. One at a time may have it open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if another process has it open;
    /// [`ErrorKind::Key`] without the key of an encrypted volume; [`ErrorKind::Damaged`];
    /// what the system refuses.
    pub fn open_branch(&self, id: BranchId) -> Result<Branch> {
        let folder = self.folder.branch(id);
        let info = BranchInfo::load(&folder)?.ok_or_else(|| no_such_branch(&self.folder, id))?;
        let lock = Lock::take(&folder.lock(), OPEN)?;
        let catalogue = self.catalogue()?;
        if catalogue.key.is_some() && self.key.is_none() {
            return Err(key_missing(&catalogue, OPEN));
        }
        let point = self.open_shared(info.point)?;
        let spec = LogSpec {
            geometry: catalogue.geometry(),
            key: self.key.clone(),
            folder,
            info,
        };
        let mut sealed = Sealed::default();
        take_up::load_below(&mut sealed, &spec)?;
        let tail = take_up::load_own(&mut sealed, &spec)?;
        let held = HeldMap::default();
        Ok(Branch {
            spec,
            point,
            content: RwLock::new(Content { held, sealed }),
            tail: Mutex::new(tail),
            frames: KeptFrames::default(),
            _lock: lock,
        })
    }

    /// The branches of the volume, oldest first.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if what one is cannot be read; what the system refuses.
    pub fn branches(&self) -> Result<Vec<BranchEntry>> {
        let mut entries = Vec::new();
        for folder in folders(&self.folder)? {
            let Some(info) = BranchInfo::load(&folder)? else {
                continue;
            };
            let in_use = Lock::is_held(&folder.lock())?;
            let bytes = bytes_in(&folder.logs())?;
            entries.push(BranchEntry {
                info,
                bytes,
                in_use,
            });
        }
        entries.sort_by_key(|entry| (entry.info.created, entry.info.id));
        Ok(entries)
    }

    /// Removes a branch that nobody has open, with all that was written to it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if a process has it open;
    /// [`ErrorKind::State`] if it is in use in place of the source; what the system refuses.
    pub fn discard_branch(&self, id: BranchId) -> Result<()> {
        let folder = self.folder.branch(id);
        let Some(info) = BranchInfo::load(&folder)? else {
            return Err(no_such_branch(&self.folder, id));
        };
        self.refuse_in_use(&info)?;
        let lock = Lock::take(&folder.lock(), REMOVE)?;
        remove(&folder)?;
        drop(lock);
        Ok(())
    }
}

impl VolumeReader {
    /// What was written since a failover is the volume: no slip of the hand shall remove it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if that is what the branch holds.
    pub fn refuse_in_use(&self, info: &BranchInfo) -> Result<()> {
        let is_failover = info.purpose == BranchPurpose::Failover;
        if !is_failover || self.catalogue()?.generation.id != info.generation.id {
            return Ok(());
        }
        Err(Error::new(ErrorKind::State, REMOVE)
            .volume(info.volume)
            .detail(format!(
                "branch {} is what the volume was failed over to",
                info.id
            ))
            .advice("keep it (`replica close --keep`); `replica change-point` gives it up"))
    }
}

/// What holds a state until a branch does.
const fn wanted(state: &State) -> Wanted {
    match state {
        State::Point(point) => Wanted::Point(point.id),
        State::Moment(moment) => match &moment.point {
            Some(point) => Wanted::Point(point.id),
            None => Wanted::Moment(moment.moment.epoch),
        },
    }
}

/// What a branch on `state` stands on, and the logs between its point and it.
fn stand(
    folder: &VolumeFolder,
    catalogue: &Catalogue,
    state: &State,
) -> Result<(Standing, Vec<LogEntry>)> {
    let moment = match state {
        State::Point(_) => None,
        State::Moment(state) if state.point.is_some() => None,
        State::Moment(state) => Some(state.moment),
    };
    let (point, epoch, below) = match (moment, state.point()) {
        (None, Some(point)) => (catalogue.point(point.id), point.epoch, Vec::new()),
        (Some(moment), _) => {
            let (at, log, _) = state::find(folder, catalogue, moment)?;
            let points = catalogue.points.iter().rev();
            let point = points.clone().find(|point| point.epoch < log.first);
            let first = point.map_or(0, |point| logs_up_to(catalogue, point).len());
            let end = at + usize::from(moment.after.is_some());
            let below = catalogue.logs[first..end].to_vec();
            let before = moment.epoch.get().saturating_sub(1);
            let epoch = match moment.after {
                Some(_) => moment.epoch,
                None => Epoch::new(before),
            };
            (point, epoch, below)
        }
        (None, None) => (None, catalogue.last_epoch(), Vec::new()),
    };
    let point = point.ok_or_else(|| {
        let id = state.point().map_or(PointId::NIL, |point| point.id);
        no_such_point(folder, id)
    })?;
    let last = below.last().or(logs_up_to(catalogue, point).last());
    let of_base = catalogue.base.and_then(|base| base.last);
    let standing = Standing {
        point: point.id,
        moment,
        time: state.time(),
        size: state.size(),
        epoch,
        follows: last.map(LogEntry::link).or(of_base),
    };
    Ok((standing, below))
}

/// The folders of branches, whole or not.
fn folders(volume: &VolumeFolder) -> Result<Vec<BranchFolder>> {
    let path = volume.branches();
    if !path.exists() {
        return Ok(Vec::new());
    }
    let names = durable::names_in(&path)?.into_iter();
    let ids = names.filter_map(|name| name.parse().ok());
    Ok(ids.map(|id| volume.branch(id)).collect())
}

/// Takes away what is left of branches that were cut short in the making, or in the removing.
fn sweep(volume: &VolumeFolder) -> Result<()> {
    for folder in folders(volume)? {
        if BranchInfo::load(&folder)?.is_none() {
            remove(&folder)?;
        }
    }
    Ok(())
}

/// Without `branch.json` there is no branch: it goes first.
pub(super) fn remove(folder: &BranchFolder) -> Result<()> {
    durable::remove(&folder.info())?;
    durable::sync_folder(folder.path())?;
    for inner in folder.folders() {
        if inner.exists() {
            for name in durable::names_in(&inner)? {
                durable::remove(&inner.join(name))?;
            }
        }
    }
    std::fs::remove_dir_all(folder.path()).at(REMOVE, folder.path())
}

fn bytes_in(folder: &Path) -> Result<ByteLen> {
    let mut bytes = 0;
    for name in durable::names_in(folder)? {
        let path = folder.join(name);
        bytes += std::fs::metadata(&path)
            .at("look at a branch", &path)?
            .len();
    }
    Ok(ByteLen::new(bytes))
}

fn no_such_branch(volume: &VolumeFolder, id: BranchId) -> Error {
    Error::new(ErrorKind::NotFound, OPEN)
        .path(volume.path())
        .detail(format!("there is no branch {id}"))
}
