//! The logs that a moved log was made of, as far as it has taken them over: header, lists
//! and trailer, without the frames.

use std::io;

use zerocopy::FromBytes;

use crate::error::{Error, Result};
use crate::header::HeaderPage;
use crate::layout::{HEADER_MAGIC, PAGE, RawTrailer};
use crate::log::Log;
use crate::seal::Trailer;
use crate::source::ReadAt;
use crate::units::FileOffset;

/// A log that frames came from, by where its pages are: a file may have many.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    // Where its header is here.
    header: FileOffset,
    // How many pages follow its header; the last of them is its trailer.
    pages: u64,
    // Where they were in its own file. `None` if it was torn, and there are none.
    sections_at: Option<FileOffset>,
}

/// Reads which logs the provenance of `log` speaks of.
pub(super) fn leaves_of<R: ReadAt>(log: &Log<R>) -> Result<Vec<Leaf>> {
    let provenance = &log.trailer.provenance;
    let mut leaves: Vec<Leaf> = Vec::new();
    let mut page = Box::new([0; PAGE]);
    for n in 0..provenance.pages {
        let at = FileOffset::new(provenance.position.get() + n * PAGE as u64);
        log.source
            .read_exact_at(page.as_mut_slice(), at)
            .map_err(|error| Error::from_io("read the provenance", error).at(at))?;
        if page.starts_with(&HEADER_MAGIC) {
            HeaderPage::decode(page.clone()).map_err(|error| error.at(at))?;
            leaves.push(Leaf {
                header: at,
                pages: 0,
                sections_at: None,
            });
            continue;
        }
        let leaf = leaves
            .last_mut()
            .filter(|leaf| leaf.sections_at.is_none())
            .ok_or_else(|| Error::damaged("provenance that belongs to no log").at(at))?;
        leaf.pages += 1;
        if Trailer::begins(&page) {
            leaf.sections_at = RawTrailer::ref_from_bytes(page.as_slice())
                .ok()
                .map(|raw| FileOffset::new(raw.directory.position.get()));
        }
    }
    let torn_within = |leaf: &Leaf| leaf.pages > 0 && leaf.sections_at.is_none();
    if leaves.iter().any(torn_within) {
        return Err(Error::damaged("provenance that ends within a log").at(provenance.position));
    }
    Ok(leaves)
}

/// Reads a leaf as the log that it was, but for its frames.
pub(super) struct LeafSource<'a, R> {
    source: &'a R,
    leaf: &'a Leaf,
    sections_at: FileOffset,
}

impl<'a, R: ReadAt> LeafSource<'a, R> {
    /// `None` if there is nothing but its header.
    pub(super) fn new(source: &'a R, leaf: &'a Leaf) -> Option<Self> {
        leaf.sections_at.map(|sections_at| Self {
            source,
            leaf,
            sections_at,
        })
    }
}

impl<R: ReadAt> ReadAt for LeafSource<'_, R> {
    fn size(&self) -> io::Result<u64> {
        let len = self.leaf.pages * PAGE as u64;
        self.sections_at
            .get()
            .checked_add(len)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        let end = at.get().saturating_add(buffer.len() as u64);
        let (start, len) = (self.sections_at.get(), self.leaf.pages * PAGE as u64);
        // The header is where the log begins; the frames are not there; all else follows it.
        let behind = if end <= PAGE as u64 {
            at.get()
        } else if at.get() >= start && end - start <= len {
            PAGE as u64 + (at.get() - start)
        } else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        self.source
            .read_exact_at(buffer, FileOffset::new(self.leaf.header.get() + behind))
    }
}
