//! A branch at rest: whoever serves it has said that nobody writes to it any more, so that
//! another side may take the volume over. That stands in the branch's folder, durable before
//! it is said, for a process that is killed and started again must not serve it unawares.

use hrl_format::id::{BranchId, HandoverId};

use super::Branch;
use crate::error::{Error, ErrorKind, Result};
use crate::store::durable::{self, Replaced, read_small};
use crate::store::reader::VolumeReader;

const REST: &str = "bring a branch to rest";

impl Branch {
    /// Who takes its volume over asked in `asked` that nobody writes any more: from now on
    /// that is so.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn come_to_rest(&self, asked: HandoverId) -> Result<()> {
        let folder = &self.spec.folder;
        let text = asked.to_string();
        let files = [(folder.at_rest(), text.as_bytes())];
        durable::replace_all(&files, folder.path()).map_err(Replaced::into_error)
    }

    /// Whether it is at rest, and since which question.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if that cannot be told; what the system refuses.
    pub fn rests_for(&self) -> Result<Option<HandoverId>> {
        let path = self.spec.folder.at_rest();
        let Some(bytes) = read_small(&path)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&bytes);
        let asked = text.trim().parse();
        asked
            .map(Some)
            .map_err(|e| Error::new(ErrorKind::Damaged, REST).path(path).source(e))
    }

    /// Whether its volume has all of it, and is used elsewhere.
    pub fn is_over(&self) -> bool {
        self.spec.folder.over().exists()
    }

    /// It may be written to again.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn end_rest(&self) -> Result<()> {
        let folder = &self.spec.folder;
        durable::remove(&folder.at_rest())?;
        durable::sync_folder(folder.path())
    }
}

impl VolumeReader {
    /// Tells whoever has a branch open that the volume has all of it, and is used elsewhere.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn end_branch(&self, id: BranchId) -> Result<()> {
        let folder = self.folder.branch(id);
        durable::replace_all(&[(folder.over(), b"")], folder.path()).map_err(Replaced::into_error)
    }
}
