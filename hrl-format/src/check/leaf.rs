//! The logs that a moved log was made of, as far as it has taken them over: header, lists
//! and trailer, without the frames.

use std::io;

use crate::error::{Error, Result};
use crate::header::HeaderPage;
use crate::layout::{HEADER_MAGIC, PAGE, RawTrailer};
use crate::log::Log;
use crate::seal::Trailer;
use crate::source::ReadAt;
use crate::units::FileOffset;
use zerocopy::FromBytes;

/// A log that frames came from.
pub(super) struct Leaf {
    pub header: HeaderPage,
    // Where its pages behind the header are here, and how many; the last is its trailer.
    at: FileOffset,
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
        let next = FileOffset::new(at.get() + PAGE as u64);
        if page.starts_with(&HEADER_MAGIC) {
            let header = HeaderPage::decode(page.clone()).map_err(|error| error.at(at))?;
            leaves.push(Leaf {
                header,
                at: next,
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
        let past_header = at.get().saturating_add(buffer.len() as u64) > PAGE as u64;
        if !past_header {
            return self.leaf.header.page.as_slice().read_exact_at(buffer, at);
        }
        let offset = at.get().checked_sub(self.sections_at.get());
        let len = self.leaf.pages * PAGE as u64;
        let inside = |offset: &u64| {
            offset
                .checked_add(buffer.len() as u64)
                .is_some_and(|end| end <= len)
        };
        let offset = offset.filter(inside).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.source
            .read_exact_at(buffer, FileOffset::new(self.leaf.at.get() + offset))
    }
}
