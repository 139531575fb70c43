//! The volumes of stores that a daemon was told of (`replica adopt`): it knows where they lie and
//! what opens them, so that a failover needs a name only, and `status` shows what would be
//! recovered. What becomes of a volume stands in its store alone; here nothing of that is kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::failover::Failover;
use super::notes::Notes;
use crate::error::{Error, ErrorKind, Result};
use crate::id::VolumeId;
use crate::key_file::read_key_file;
use crate::store::{Catalogue, Store};
use crate::time::rfc3339;

const ADOPT: &str = "adopt a volume";

/// Where a volume lies that was adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedVolume {
    /// The store's folder, absolute.
    pub store: PathBuf,
    /// The volume's id.
    pub volume: String,
    /// What it was called when it was adopted.
    pub name: String,
    /// The file with its key.
    pub key_file: Option<PathBuf>,
}

impl AdoptedVolume {
    /// The volume's id.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if what was written down is none.
    pub fn id(&self) -> Result<VolumeId> {
        let id = self.volume.parse();
        id.map_err(|e| Error::new(ErrorKind::Damaged, ADOPT).source(e))
    }

    /// Its failover, by the machine called `host`.
    ///
    /// # Errors
    /// If the store or the key cannot be read.
    pub fn failover(&self, host: &str) -> Result<Failover> {
        let key = self.key_file.as_deref().map(read_key_file).transpose()?;
        Ok(Failover::new(
            Store::open(&self.store)?,
            self.id()?,
            key,
            host,
        ))
    }
}

/// How an adopted volume is, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedStatus {
    /// Where it lies.
    #[serde(flatten)]
    pub volume: AdoptedVolume,
    /// Its state in the table of docs/failover.md; empty if the store cannot be read.
    pub state: String,
    /// The generation in force.
    pub generation: u64,
    /// The machine that it is in use on, if it was failed over.
    pub host: Option<String>,
    /// The branch that is in use in place of the source.
    pub branch: Option<String>,
    /// How many recovery points there are.
    pub points: usize,
    /// When the newest was made; empty if there is none.
    pub newest: String,
    /// Why nothing is known.
    pub error: Option<String>,
}

/// The volumes that a daemon was told of.
#[derive(Debug)]
pub struct Adopted {
    notes: Notes<AdoptedVolume>,
    known: Mutex<BTreeMap<String, AdoptedVolume>>,
}

impl Adopted {
    /// Those that are written down in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn start(folder: &Path) -> Result<Self> {
        let notes = Notes::<AdoptedVolume>::open(folder)?;
        let known = notes.all()?.into_iter().collect();
        Ok(Self {
            notes,
            known: Mutex::new(known),
        })
    }

    /// Adopts a volume of `store` (its name or id), or all that it has. One that is known already
    /// gets the new store and key file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the store has no such volume, or none at all;
    /// [`ErrorKind::Key`] if the key is another; those of reading the store.
    pub fn adopt(
        &self,
        store: &Path,
        volume: Option<&str>,
        key_file: Option<&Path>,
    ) -> Result<Vec<AdoptedVolume>> {
        let opened = Store::open(store)?;
        let ids = match volume {
            Some(volume) => vec![opened.find(volume)?],
            None => opened
                .volumes()?
                .into_iter()
                .map(|entry| entry.id)
                .collect(),
        };
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, ADOPT)
                .path(store)
                .detail("no volume is in this store"));
        }
        let key = key_file.map(read_key_file).transpose()?;
        let mut adopted = Vec::new();
        for id in ids {
            let plain = opened.volume(id, None)?.catalogue()?;
            // A key that is not this volume's is told now, not when it is needed.
            let key = key.clone().filter(|_| plain.key.is_some());
            let key_file = key_file.filter(|_| key.is_some());
            opened.volume(id, key)?;
            let note = AdoptedVolume {
                store: store.to_owned(),
                volume: id.to_string(),
                name: plain.name,
                key_file: key_file.map(Path::to_owned),
            };
            self.notes.write(&note.volume, &note)?;
            self.lock().insert(note.volume.clone(), note.clone());
            adopted.push(note);
        }
        Ok(adopted)
    }

    /// The volume of that name or id.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] if several are called so.
    pub fn find(&self, what: &str) -> Result<AdoptedVolume> {
        let known = self.lock();
        let is_it = |volume: &&AdoptedVolume| volume.volume == what || volume.name == what;
        let found: Vec<&AdoptedVolume> = known.values().filter(is_it).collect();
        match found[..] {
            [volume] => Ok(volume.clone()),
            [] => Err(Error::new(ErrorKind::NotFound, "find the volume")
                .detail(format!("`{what}` is neither protected nor adopted here"))
                .advice("`replica status` lists the volumes; else name its --store")),
            _ => Err(Error::new(ErrorKind::Invalid, "find the volume")
                .detail(format!("several volumes are called `{what}`"))
                .advice("give the id")),
        }
    }

    /// Forgets a volume; its store is not touched.
    ///
    /// # Errors
    /// Those of [`Adopted::find`]; what the system refuses.
    pub fn forget(&self, what: &str) -> Result<()> {
        let id = self.find(what)?.volume;
        self.notes.remove(&id)?;
        self.lock().remove(&id);
        Ok(())
    }

    /// All of them, and how each is: read from the stores now.
    pub fn list(&self) -> Vec<AdoptedStatus> {
        let known: Vec<AdoptedVolume> = self.lock().values().cloned().collect();
        known.iter().map(status).collect()
    }

    /// Finishes what a killed process left of a failover to this machine.
    pub fn finish(&self, host: &str) {
        let known: Vec<AdoptedVolume> = self.lock().values().cloned().collect();
        for volume in known {
            let finish = || {
                let failover = volume.failover(host)?;
                let situation = failover.situation()?;
                let here = situation
                    .recovery
                    .promotion()
                    .is_some_and(|p| p.host == host);
                if here {
                    failover.finish()?;
                }
                Ok::<(), Error>(())
            };
            if let Err(error) = finish() {
                tracing::warn!(volume = volume.name, %error, "a failover may be unfinished");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, AdoptedVolume>> {
        // Nothing that panics is done under it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn status(volume: &AdoptedVolume) -> AdoptedStatus {
    let read = || {
        let failover = volume.failover("")?;
        let catalogue = Store::open(&volume.store)?
            .volume(volume.id()?, None)?
            .catalogue()?;
        Ok::<_, Error>((failover.situation()?, catalogue))
    };
    let mut status = AdoptedStatus {
        volume: volume.clone(),
        state: String::new(),
        generation: 0,
        host: None,
        branch: None,
        points: 0,
        newest: String::new(),
        error: None,
    };
    match read() {
        Err(error) => status.error = Some(error.to_string()),
        Ok((situation, catalogue)) => {
            status.state = situation.state.to_string();
            status.generation = catalogue.generation.number.get();
            status.host = situation.recovery.promotion().map(|p| p.host.clone());
            status.branch = situation.branch.map(|branch| branch.to_string());
            status.points = catalogue.points.len();
            status.newest = newest(&catalogue);
        }
    }
    status
}

fn newest(catalogue: &Catalogue) -> String {
    let newest = catalogue.points.last();
    newest.map_or_else(String::new, |point| rfc3339(point.time))
}
