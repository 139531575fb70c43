//! How a side that is to take over asks the one that writes to the volume, where both see one
//! store: by a small file in the volume's folder, answered by another. Asking is no right: what
//! makes a promotion safe is the volume's lock, which the asked lets go and the asker takes.
//!
//! Nobody waits for ever. Who asks holds a lock as long as the question stands: of an asker that
//! died nothing is left to be answered, and the asked goes on. And a question has a limit, counted
//! by each side's own clock from when it saw it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use hrl_format::id::{HandoverId, PointId, VolumeId};
use hrl_format::record::Root;
use serde::{Deserialize, Serialize};

use super::durable::{self, Replaced, damaged};
use super::folder::Store;
use super::json::{maybe_text, text};
use super::layout::VolumeFolder;
use super::lock::Lock;
use crate::error::{Error, ErrorKind, IoContext, Result};

const ASK: &str = "ask the volume's primary";
const LOOK: &str = "read a question to the volume's primary";
/// How often it is tried to ask, and how long after each other.
const TRIES: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(20);
/// The longest of the two files, in bytes.
const LONGEST: u64 = 16 << 10;

/// What the primary is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// To come to rest: no write any more, and all that was written shipped, as a point.
    Rest,
    /// To let go of the volume at once, whatever has not been shipped.
    LetGo,
}

/// A question to a volume's primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Handover {
    /// Its name.
    #[serde(with = "text")]
    pub id: HandoverId,
    /// What for.
    pub ask: Ask,
    /// How long it stands, in milliseconds from when it is seen.
    pub limit_ms: u64,
    /// Who asks: a host name.
    pub host: String,
}

/// What the primary says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// It is at rest, and has let go; this point holds everything.
    Rests {
        /// The point.
        #[serde(with = "text")]
        point: PointId,
        /// The root of the digest tree over the device, read again after it came to rest.
        #[serde(with = "maybe_text")]
        root: Option<Root>,
    },
    /// It has let go.
    LetsGo,
    /// It does not, and goes on.
    Refuses {
        /// Why.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Answered {
    #[serde(with = "text")]
    id: HandoverId,
    #[serde(flatten)]
    answer: Answer,
}

impl Handover {
    /// How long it stands, from when it is seen.
    pub const fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }
}

/// A question that stands: until this is dropped, or its process ends.
#[derive(Debug)]
pub struct Asking {
    folder: VolumeFolder,
    handover: Handover,
    _lock: Lock,
}

impl Asking {
    /// What is asked.
    pub const fn handover(&self) -> &Handover {
        &self.handover
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // What is left of it is no question once the lock is gone.
        let files = [self.folder.handover(), self.folder.handover_answer()];
        let removed: Result<()> = files.iter().try_for_each(|file| durable::remove(file));
        let removed = removed.and_then(|()| durable::sync_folder(self.folder.path()));
        if let Err(error) = removed {
            tracing::debug!(%error, "a question was not taken back");
        }
    }
}

impl Store {
    /// Asks whoever writes to the volume. The question stands until what is returned is dropped,
    /// or its process ends, and is forgotten by the asked after `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] while another question stands; the system's.
    pub fn ask_handover(
        &self,
        volume: VolumeId,
        ask: Ask,
        limit: Duration,
        host: &str,
    ) -> Result<Asking> {
        let folder = self.volume_folder(volume);
        let path = folder.handover();
        let lock = self.asker(&folder).map_err(|busy| {
            let who = read::<Handover>(&path).ok().flatten();
            let who = who.map_or_else(String::new, |stands| format!("`{}` asks, ", stands.host));
            let why = format!("{who}and waits for the answer");
            match busy.kind() {
                ErrorKind::Busy => Error::new(ErrorKind::Busy, ASK)
                    .path(&path)
                    .detail(why)
                    .source(busy)
                    .advice("wait for that command to end"),
                _ => busy,
            }
        })?;
        let id = HandoverId::random().map_err(|e| Error::new(ErrorKind::Io, ASK).source(e))?;
        let handover = Handover {
            id,
            ask,
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            host: host.to_owned(),
        };
        durable::remove(&folder.handover_answer())?;
        write(&path, folder.path(), &handover)?;
        Ok(Asking {
            folder,
            handover,
            _lock: lock,
        })
    }

    /// The right to ask. Whoever looks for a question holds its lock for a moment.
    fn asker(&self, folder: &VolumeFolder) -> Result<Lock> {
        for _ in 0..TRIES {
            match Lock::take(&folder.handover_lock(), ASK) {
                Err(busy) if busy.kind() == ErrorKind::Busy => std::thread::sleep(BETWEEN),
                taken => return taken,
            }
        }
        Lock::take(&folder.handover_lock(), ASK)
    }

    /// What the volume's primary is asked for now.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if that cannot be made out; the system's.
    pub fn handover(&self, volume: VolumeId) -> Result<Option<Handover>> {
        let folder = self.volume_folder(volume);
        match Lock::is_held(&folder.handover_lock())? {
            true => read(&folder.handover()),
            // Whoever asked has ended.
            false => Ok(None),
        }
    }

    /// Answers a question.
    ///
    /// # Errors
    /// The system's.
    pub fn answer_handover(&self, volume: VolumeId, id: HandoverId, answer: Answer) -> Result<()> {
        let folder = self.volume_folder(volume);
        let answered = Answered { id, answer };
        write(&folder.handover_answer(), folder.path(), &answered)
    }

    /// The answer to a question, if it has come.
    ///
    /// # Errors
    /// As [`Store::handover`].
    pub fn handover_answer(&self, volume: VolumeId, id: HandoverId) -> Result<Option<Answer>> {
        let path = self.volume_folder(volume).handover_answer();
        let answered: Option<Answered> = read(&path)?;
        Ok(answered
            .filter(|answered| answered.id == id)
            .map(|answered| answered.answer))
    }
}

fn write<T: Serialize>(path: &Path, folder: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec(value)
        .map_err(|e| Error::new(ErrorKind::Invalid, ASK).path(path).source(e))?;
    let replaced = durable::replace_all(&[(path.to_owned(), &text)], folder);
    replaced.map_err(Replaced::into_error)
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.at(LOOK, path)?,
    };
    let mut bytes = Vec::new();
    file.take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .at(LOOK, path)?;
    if bytes.len() as u64 > LONGEST {
        return Err(damaged(LOOK, path, "it is too long to be one"));
    }
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|e| {
        damaged(LOOK, path, "it is not one")
            .source(e)
            .advice("remove the file")
    })
}
