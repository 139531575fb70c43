//! What a daemon has open: each a state of some store's volume behind a socket. What is open is
//! written down in the state folder, so that it is served again after a restart:
//! a branch with all that was flushed to it, a state to be read if it is still there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::export::PointExport;
use super::notes::Notes;
use super::opened::{Opened, Wanted};
use crate::capture::nbd::handshake::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{BranchId, VolumeId};
use crate::key_file::read_key_file;
use crate::store::{PointSelector, Store, VolumeReader};
use crate::time::rfc3339;

const OPEN: &str = "open a point";
const CLOSE: &str = "close what is open";

/// Where a volume lies, and where it is to be served.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// The store's folder.
    pub store: PathBuf,
    /// The volume in it.
    pub volume: VolumeId,
    /// The file with its key.
    pub key_file: Option<PathBuf>,
    /// What of it.
    pub wanted: Wanted,
    /// The socket's path, absolute.
    pub socket: PathBuf,
}

/// What becomes of what was written when a point is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is removed.
    Discarded,
    /// It stays in the store as a branch, and can be opened again.
    Kept,
}

/// What is open, for people and scripts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportStatus {
    /// What it is closed by; of what can be written to, the branch's id.
    pub id: String,
    /// The volume's id and name.
    pub volume: String,
    /// See there.
    pub name: String,
    /// The store's folder.
    pub store: String,
    /// The point's id, or the moment; empty if it could not be opened.
    pub point: String,
    /// When the volume was so; empty if it could not be opened.
    pub time: String,
    /// Whether it can be written to.
    pub writable: bool,
    /// What clients are told to use.
    pub uri: String,
    /// How many are connected.
    pub clients: usize,
    /// Why it is not served, or not protected where it is used now.
    pub error: Option<String>,
}

impl ExportStatus {
    /// The socket's path; none if it is not served.
    pub fn socket(&self) -> Option<PathBuf> {
        let path = self.uri.split_once("socket=")?.1;
        (!path.is_empty()).then(|| path.into())
    }
}

/// How it stands in the state folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    store: PathBuf,
    volume: String,
    name: String,
    key_file: Option<PathBuf>,
    socket: PathBuf,
    /// The branch, or none, and then the state: a point's id or a moment.
    branch: Option<String>,
    state: String,
}

struct Entry {
    note: Note,
    served: Result<PointExport>,
}

/// What a daemon has open.
pub struct Exports {
    notes: Notes<Note>,
    open: Mutex<BTreeMap<String, Entry>>,
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exports")
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

impl Exports {
    /// Serves again what is written down in `folder`, which is made if it is not there. What cannot
    /// be served is listed with the reason.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn start(folder: &Path) -> Result<Self> {
        let notes = Notes::<Note>::open(folder)?;
        let mut open = BTreeMap::new();
        for (id, note) in notes.all()? {
            let served = note.serve();
            if let Err(error) = &served {
                if note.branch.is_some() && is_gone(&note, error) {
                    // It was being closed.
                    let _ = notes.remove(&id);
                    continue;
                }
                tracing::warn!(%error, "an opened point is not served");
            }
            open.insert(id, Entry { note, served });
        }
        Ok(Self {
            notes,
            open: Mutex::new(open),
        })
    }

    /// Opens what is asked for, and serves it. It is written down when this returns.
    ///
    /// # Errors
    /// Those of [`Opened::open`] and [`PointExport::start`].
    pub fn open(&self, spec: &ExportSpec) -> Result<ExportStatus> {
        let (volume, name) = find(&spec.store, spec.volume, spec.key_file.as_deref())?;
        self.forget_over(&|note| note.socket == spec.socket)?;
        let here = |entry: &Entry| entry.note.socket == spec.socket;
        let is_taken = self.lock().values().any(here);
        if is_taken {
            return Err(Error::new(ErrorKind::Busy, OPEN)
                .path(&spec.socket)
                .detail("something is open there"));
        }
        let opened = Opened::open(&volume, spec.wanted)?;
        let branch = opened.branch().map(|branch| branch.info().id);
        let is_new = matches!(spec.wanted, Wanted::Write(..));
        let id = match branch {
            Some(id) => id,
            None => BranchId::random().map_err(|e| Error::new(ErrorKind::Io, OPEN).source(e))?,
        };
        let note = Note {
            store: spec.store.clone(),
            volume: spec.volume.to_string(),
            name,
            key_file: spec.key_file.clone(),
            socket: spec.socket.clone(),
            branch: branch.map(|id| id.to_string()),
            state: opened.name(),
        };
        let served = PointExport::start(opened, &spec.socket);
        let written = served.and_then(|served| {
            self.notes.write(&id.to_string(), &note)?;
            Ok(served)
        });
        let served = written.inspect_err(|_| {
            if let Some(id) = branch.filter(|_| is_new) {
                // Nobody has got to know of it.
                let _ = volume.discard_branch(id);
            }
        })?;
        let entry = Entry {
            note,
            served: Ok(served),
        };
        let status = entry.status(&id.to_string());
        self.lock().insert(id.to_string(), entry);
        Ok(status)
    }

    /// What was served for a volume that has gone home makes room, if it `is_meant`.
    fn forget_over(&self, is_meant: &dyn Fn(&Note) -> bool) -> Result<()> {
        let is_over = |entry: &Entry| {
            is_meant(&entry.note) && entry.served.as_ref().is_ok_and(PointExport::is_over)
        };
        let over: Vec<String> = {
            let open = self.lock();
            let found = open.iter().filter(|(_, entry)| is_over(entry));
            found.map(|(id, _)| id.clone()).collect()
        };
        for id in over {
            self.close(&id, Written::Discarded)?;
        }
        Ok(())
    }

    /// Closes what is open: named by its id, its socket's path, or by the volume if only one
    /// thing of that is open. Says what it was.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] if several are meant; what the store refuses.
    pub fn close(&self, what: &str, written: Written) -> Result<ExportStatus> {
        let id = self.find(what)?;
        if written == Written::Discarded {
            let note = self.lock().get(&id).map(|entry| entry.note.clone());
            note.map_or(Ok(()), |note| note.may_be_discarded())?;
        }
        let entry = self.lock().remove(&id);
        let Some(Entry { note, served }) = entry else {
            return Err(not_open(what));
        };
        let mut status = Entry::status_of(&id, &note, served.as_ref());
        status.clients = 0;
        let closed = close(&note, served, written);
        if let Err(error) = closed {
            // It can be tried again.
            let served = Err(Error::new(ErrorKind::State, CLOSE).detail(error.to_string()));
            self.lock().insert(id, Entry { note, served });
            return Err(error);
        }
        self.notes.remove(&id)?;
        Ok(status)
    }

    /// What is open. What was served for a volume that has gone home is not any more: it is
    /// closed, so that it holds no room.
    pub fn list(&self) -> Vec<ExportStatus> {
        if let Err(error) = self.forget_over(&|_| true) {
            tracing::warn!(%error, "what is not needed any more is open still");
        }
        let open = self.lock();
        open.iter().map(|(id, entry)| entry.status(id)).collect()
    }

    /// Serves nothing any more; the next start does again.
    pub fn stop(&self) {
        let open = std::mem::take(&mut *self.lock());
        for entry in open.into_values() {
            let Ok(served) = entry.served else { continue };
            let flushed = served.stop().and_then(|opened| opened.flush());
            if let Err(error) = flushed {
                tracing::warn!(%error, "an opened point was not closed cleanly");
            }
        }
    }

    fn find(&self, what: &str) -> Result<String> {
        let open = self.lock();
        if open.contains_key(what) {
            return Ok(what.to_owned());
        }
        let path = Path::new(what.strip_prefix("unix:").unwrap_or(what));
        let named = |entry: &Entry| {
            entry.note.socket == path || entry.note.name == what || entry.note.volume == what
        };
        let found = open.iter().filter(|(_, entry)| named(entry));
        let ids: Vec<&String> = found.map(|(id, _)| id).collect();
        match ids[..] {
            [id] => Ok(id.clone()),
            [] => Err(not_open(what)),
            _ => {
                let ids: Vec<&str> = ids.iter().map(|id| id.as_str()).collect();
                Err(Error::new(ErrorKind::Invalid, CLOSE)
                    .detail(format!("`{what}` may mean {}", ids.join(", ")))
                    .advice("give the id"))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Nothing that panics is done under it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close(note: &Note, served: Result<PointExport>, written: Written) -> Result<()> {
    let opened = served.ok().map(PointExport::stop).transpose()?;
    let branch = opened.and_then(Opened::into_branch);
    match (branch, written) {
        (Some(branch), Written::Discarded) => branch.discard(),
        (Some(branch), Written::Kept) => branch.seal(),
        (None, Written::Kept) => Ok(()),
        (None, Written::Discarded) => match note.branch_id() {
            // It was not served, and is not wanted any more.
            Some(id) => note.volume()?.discard_branch(id),
            None => Ok(()),
        },
    }
}

impl Note {
    fn branch_id(&self) -> Option<BranchId> {
        self.branch.as_ref()?.parse().ok()
    }

    fn volume(&self) -> Result<VolumeReader> {
        let volume = self.volume.parse();
        let volume = volume.map_err(|e| Error::new(ErrorKind::Damaged, OPEN).source(e))?;
        find(&self.store, volume, self.key_file.as_deref()).map(|(volume, _)| volume)
    }

    fn may_be_discarded(&self) -> Result<()> {
        let Some(id) = self.branch_id() else {
            return Ok(());
        };
        let volume = self.volume()?;
        let branches = volume.branches()?;
        let branch = branches.iter().find(|branch| branch.info.id == id);
        branch.map_or(Ok(()), |branch| volume.refuse_in_use(&branch.info))
    }

    fn wanted(&self) -> Result<Wanted> {
        let selector = || {
            let id = self.state.parse().map(PointSelector::Id).ok();
            id.or_else(|| self.state.parse().map(PointSelector::Moment).ok())
        };
        let wanted = match &self.branch {
            Some(_) => self.branch_id().map(Wanted::Branch),
            None => selector().map(Wanted::Read),
        };
        wanted.ok_or_else(|| {
            let why = format!("`{}` is no state", self.state);
            Error::new(ErrorKind::Damaged, OPEN).detail(why)
        })
    }

    fn serve(&self) -> Result<PointExport> {
        let opened = Opened::open(&self.volume()?, self.wanted()?)?;
        PointExport::start(opened, &self.socket)
    }
}

impl Entry {
    fn status(&self, id: &str) -> ExportStatus {
        Self::status_of(id, &self.note, self.served.as_ref())
    }

    fn status_of(id: &str, note: &Note, served: Result<&PointExport, &Error>) -> ExportStatus {
        let is_writable = |export: &PointExport| export.opened().access() == Access::ReadWrite;
        ExportStatus {
            id: id.to_owned(),
            volume: note.volume.clone(),
            name: note.name.clone(),
            store: note.store.display().to_string(),
            point: note.state.clone(),
            time: served.map_or_else(|_| String::new(), |e| rfc3339(e.opened().time())),
            writable: served.map_or(note.branch.is_some(), is_writable),
            uri: served.map_or_else(|_| String::new(), PointExport::uri),
            clients: served.map_or(0, PointExport::clients),
            error: served.map_or_else(|error| Some(error.to_string()), PointExport::trouble),
        }
    }
}

/// The volume, and what it is called.
fn find(store: &Path, id: VolumeId, key_file: Option<&Path>) -> Result<(VolumeReader, String)> {
    let key = key_file.map(read_key_file).transpose()?;
    let volume = Store::open(store)?.volume(id, key)?;
    let name = volume.catalogue()?.name;
    Ok((volume, name))
}

/// Whether a branch is not there any more, though its volume is.
fn is_gone(note: &Note, error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound
        && note.volume().is_ok_and(|volume| {
            let branches = volume.branches();
            branches.is_ok_and(|all| all.iter().all(|b| Some(b.info.id) != note.branch_id()))
        })
}

fn not_open(what: &str) -> Error {
    Error::new(ErrorKind::NotFound, CLOSE)
        .detail(format!("nothing called `{what}` is open"))
        .advice("`replica status` lists what is")
}
