//! What a daemon writes down so that it knows it after its next start: a small JSON file a
//! thing, in a folder of the state folder, named by the thing's id. Each is replaced as a whole,
//! and durable when that returns.

use std::fs::{self, File};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, IoContext, Result};

const READ: &str = "read what was written down";
const WRITE: &str = "write down what is to be remembered";

/// A folder of notes.
#[derive(Debug)]
pub(super) struct Notes<T> {
    folder: PathBuf,
    what: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Notes<T> {
    /// Those in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(folder);
        made.at(READ, folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            what: PhantomData,
        })
    }

    /// All of them, each with its id. One that cannot be understood is left where it is, and
    /// said.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn all(&self) -> Result<Vec<(String, T)>> {
        let mut notes = Vec::new();
        for file in fs::read_dir(&self.folder).at(READ, &self.folder)? {
            let path = file.at(READ, &self.folder)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(id) = name.and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let bytes = fs::read(&path).at(READ, &path)?;
            match serde_json::from_slice(&bytes) {
                Ok(note) => notes.push((id.to_owned(), note)),
                Err(error) => tracing::warn!(path = %path.display(), %error, "not a note of ours"),
            }
        }
        Ok(notes)
    }

    /// Writes one down, durably and as a whole.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn write(&self, id: &str, note: &T) -> Result<()> {
        let text = serde_json::to_vec_pretty(note)
            .map_err(|e| Error::new(ErrorKind::Invalid, WRITE).source(e))?;
        let path = self.path(id);
        let scratch = path.with_extension("json.new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&scratch)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&scratch, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().at(WRITE, &path)
    }

    /// Removes one; none of that id is no error.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.at(WRITE, &path),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}
