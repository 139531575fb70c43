//! How a side that is to take over asks the one that writes to the volume, where both see one
//! store: by a small file in the volume's folder, answered by another. Asking is no right: what
//! makes a promotion safe is the volume's lock, which the asked lets go and the asker takes.
//!
//! Nobody waits for ever. A question has a limit, counted by each side's own clock from when it
//! saw it: an asker that died leaves a question that the asked forgets, and writes on.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use hrl_format::id::{HandoverId, PointId, VolumeId};
use hrl_format::record::Root;
use serde::{Deserialize, Serialize};

use super::durable::{self, Replaced, damaged};
use super::folder::Store;
use super::json::{maybe_text, text};
use crate::error::{Error, ErrorKind, IoContext, Result};

const ASK: &str = "ask the volume's primary";
const LOOK: &str = "read a question to the volume's primary";
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

impl Store {
    /// Asks whoever writes to the volume. The question stands until it is
    /// [withdrawn](Store::withdraw_handover), and is forgotten by the asked after `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] while another question stands; the system's.
    pub fn ask_handover(
        &self,
        volume: VolumeId,
        ask: Ask,
        limit: Duration,
        host: &str,
    ) -> Result<Handover> {
        let folder = self.volume_folder(volume);
        let path = folder.handover();
        if let Some(stands) = self.handover(volume)?
            && age(&path)?.is_some_and(|age| age < stands.limit())
        {
            return Err(Error::new(ErrorKind::Busy, ASK)
                .path(&path)
                .detail(format!("`{}` asks for it already", stands.host))
                .advice("wait for that command to end; a question nobody waits for is forgotten"));
        }
        let id = HandoverId::random().map_err(|e| Error::new(ErrorKind::Io, ASK).source(e))?;
        let question = Handover {
            id,
            ask,
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            host: host.to_owned(),
        };
        durable::remove(&folder.handover_answer())?;
        write(&path, folder.path(), &question)?;
        Ok(question)
    }

    /// What the volume's primary is asked for now.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if that cannot be made out; the system's.
    pub fn handover(&self, volume: VolumeId) -> Result<Option<Handover>> {
        read(&self.volume_folder(volume).handover())
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

    /// Takes a question back, and its answer away.
    ///
    /// # Errors
    /// The system's.
    pub fn withdraw_handover(&self, volume: VolumeId) -> Result<()> {
        let folder = self.volume_folder(volume);
        durable::remove(&folder.handover())?;
        durable::remove(&folder.handover_answer())?;
        durable::sync_folder(folder.path())
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

/// How old a file is; `None` if its time lies in the future, as after a clock was set back.
fn age(path: &Path) -> Result<Option<Duration>> {
    let meta = fs::metadata(path).at(LOOK, path)?;
    Ok(meta.modified().at(LOOK, path)?.elapsed().ok())
}
