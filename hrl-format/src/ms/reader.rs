//! Reading a closed log: back from its end along the metadata blocks, then forward,
//! oldest write first. No length is trusted: blocks cannot overlap, so that their list
//! is at most an eighth of the file's size, and data is handed out in the caller's buffer.

use std::io::{self, Read, Seek, SeekFrom};

use super::HEADER_LEN;
use super::error::{Damage, Error, Finding};
use super::header::Header;
use super::metadata::{BlockHeader, Entry, UNIT};
use super::sum::Sum;
use crate::units::FileOffset;

/// A log that is read.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use hrl_format::ms::Reader;
/// let mut reader = Reader::open(std::fs::File::open("disk.hrl")?)?;
/// let mut buffer = vec![0; 1 << 20];
/// while let Some(write) = reader.next_write()? {
///     println!("{}", write.entry().extent);
///     let mut data = reader.data(&write)?;
///     while let piece @ 1.. = data.read(&mut buffer)? {
///         // buffer[..piece] follows what came before.
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    header: Header,
    /// Where the metadata blocks begin, ascending.
    blocks: Vec<u64>,
    /// How many of them were begun.
    begun: usize,
    /// The entries of the block begun last.
    block: Block,
    /// How many of those were given.
    given: usize,
}

/// A write, and where its data lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocatedEntry {
    entry: Entry,
    position: u64,
}

impl LocatedEntry {
    /// What was written where and when.
    pub const fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Where its data lies in the file.
    pub const fn position(&self) -> FileOffset {
        FileOffset::new(self.position)
    }
}

/// The entries of a metadata block.
#[derive(Debug, Default)]
pub(super) struct Block {
    start: u64,
    /// Where the data of the next entry begins.
    data: u64,
    entries: Vec<[u8; UNIT]>,
}

impl Block {
    pub(super) const fn len(&self) -> usize {
        self.entries.len()
    }

    const fn entry_at(&self, index: usize) -> u64 {
        self.start + (UNIT + index * UNIT) as u64
    }

    /// Entry `index`, if whole.
    pub(super) fn entry(&self, index: usize) -> Result<Entry, Finding> {
        let damaged = |damage| Finding::new(self.entry_at(index), damage);
        Entry::decode(&self.entries[index]).map_err(damaged)
    }

    /// Entry `index`, whose data follows that of the entry located last.
    pub(super) fn locate(&mut self, index: usize) -> Result<LocatedEntry, Finding> {
        let entry = self.entry(index)?;
        let len = entry.extent.len().get();
        if len > self.start - self.data {
            return Err(Finding::new(
                self.entry_at(index),
                Damage::DataOverlap(len as u32),
            ));
        }
        let position = self.data;
        self.data += len;
        Ok(LocatedEntry { entry, position })
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Opens a closed log and finds its metadata.
    ///
    /// # Errors
    /// [`Error::NotMsHrl`]; [`Error::Unsupported`]; [`Error::NotClosed`];
    /// [`Error::Damaged`] if header or chain of metadata are not whole.
    pub fn open(inner: R) -> Result<Self, Error> {
        Self::open_noting(inner, &mut |finding| Err(Error::Damaged(finding)))
    }

    /// Opens a log, and gives wrong checksums to `note`, which may let them pass.
    pub(super) fn open_noting(
        mut inner: R,
        note: &mut dyn FnMut(Finding) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let file_len = inner
            .seek(SeekFrom::End(0))
            .map_err(io("find the log's end"))?;
        inner.rewind().map_err(io("read the header"))?;
        let header = read_header(&mut inner, file_len, note)?;
        header.bounds(file_len)?;
        let blocks = find_blocks(&mut inner, &header, note)?;
        Ok(Self {
            inner,
            header,
            blocks,
            begun: 0,
            block: Block::default(),
            given: 0,
        })
    }

    /// The file header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The next write; `None` after the last.
    ///
    /// # Errors
    /// [`Error::Damaged`] if its entry is not whole, or its data not within bounds.
    pub fn next_write(&mut self) -> Result<Option<LocatedEntry>, Error> {
        while self.given == self.block.len() {
            if self.begun == self.blocks.len() {
                return Ok(None);
            }
            self.block = self.load(self.begun)?;
            self.begun += 1;
            self.given = 0;
        }
        let write = self.block.locate(self.given).map_err(Error::Damaged)?;
        self.given += 1;
        Ok(Some(write))
    }

    /// The data of a write that this log gave.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn data(&mut self, write: &LocatedEntry) -> Result<Data<'_, R>, Error> {
        let position = SeekFrom::Start(write.position);
        self.inner.seek(position).map_err(io("read the data"))?;
        Ok(Data {
            inner: &mut self.inner,
            left: write.entry.extent.len().get(),
            sum: Sum::default(),
            expected: write.entry.data_checksum,
            position: write.position,
        })
    }

    pub(super) const fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Reads the metadata block `index`; its header's checksum was judged before.
    pub(super) fn load(&mut self, index: usize) -> Result<Block, Error> {
        let start = self.blocks[index];
        let size = u64::from(self.header.metadata_size);
        let data = match index.checked_sub(1) {
            Some(before) => self.blocks[before] + size,
            None => HEADER_LEN,
        };
        self.inner
            .seek(SeekFrom::Start(start))
            .map_err(io("read the metadata"))?;
        let (header, _) = BlockHeader::decode(&read_unit(&mut self.inner)?);
        if u64::from(header.entries) > size / UNIT as u64 - 1 {
            let damage = Damage::TooManyEntries(header.entries);
            return Err(Error::damaged(start, damage));
        }
        // The block was found within the file, so this is not more than the file holds.
        let mut entries = vec![[0; UNIT]; header.entries as usize];
        let bytes = entries.as_flattened_mut();
        self.inner
            .read_exact(bytes)
            .map_err(io("read the metadata"))?;
        Ok(Block {
            start,
            data,
            entries,
        })
    }
}

/// The data of one write, piece by piece.
#[derive(Debug)]
pub struct Data<'a, R> {
    inner: &'a mut R,
    left: u64,
    sum: Sum,
    expected: u32,
    position: u64,
}

impl<R: Read> Data<'_, R> {
    /// Fills `buffer` with what comes next, as far as there is any, and says how many bytes
    /// that was; zero at the end.
    ///
    /// # Errors
    /// [`Error::Damaged`] in place of the last piece if the data has a checksum that does not
    /// agree with it: what came before is not to be used, either.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let len = self.left.min(buffer.len() as u64) as usize;
        if len == 0 {
            return Ok(0);
        }
        let piece = &mut buffer[..len];
        self.inner.read_exact(piece).map_err(io("read the data"))?;
        self.sum.add(piece);
        self.left -= len as u64;
        if self.left == 0 && self.expected != 0 && self.expected != self.sum.finish() {
            return Err(Error::damaged(self.position, Damage::DataChecksum));
        }
        Ok(len)
    }
}

fn read_header<R: Read>(
    inner: &mut R,
    file_len: u64,
    note: &mut dyn FnMut(Finding) -> Result<(), Error>,
) -> Result<Header, Error> {
    let mut bytes = Box::new([0; HEADER_LEN as usize]);
    if file_len < HEADER_LEN {
        let start = &mut bytes[..file_len as usize];
        inner.read_exact(start).map_err(io("read the header"))?;
        let whole = super::is_ms_hrl(start);
        let short = Error::damaged(file_len, Damage::ShortHeader);
        return Err(if whole { short } else { Error::NotMsHrl });
    }
    inner
        .read_exact(&mut *bytes)
        .map_err(io("read the header"))?;
    if !super::is_ms_hrl(&*bytes) {
        return Err(Error::NotMsHrl);
    }
    if let Some(finding) = Header::checksum_finding(&bytes) {
        note(finding)?;
    }
    Header::decode(&bytes)
}

/// Where the metadata blocks begin, oldest first.
fn find_blocks<R: Read + Seek>(
    inner: &mut R,
    header: &Header,
    note: &mut dyn FnMut(Finding) -> Result<(), Error>,
) -> Result<Vec<u64>, Error> {
    let size = u64::from(header.metadata_size);
    let mut blocks = Vec::new();
    let mut at = header.end_of_log.get() - size;
    loop {
        inner
            .seek(SeekFrom::Start(at))
            .map_err(io("read the metadata"))?;
        let (block, damage) = BlockHeader::decode(&read_unit(inner)?);
        if let Some(damage) = damage {
            note(Finding::new(at, damage))?;
        }
        blocks.push(at);
        match block.distance {
            0 => break,
            distance if distance >= size && distance <= at - HEADER_LEN => at -= distance,
            distance => return Err(Error::damaged(at, Damage::Distance(distance))),
        }
    }
    blocks.reverse();
    Ok(blocks)
}

fn read_unit<R: Read>(inner: &mut R) -> Result<[u8; UNIT], Error> {
    let mut bytes = [0; UNIT];
    inner
        .read_exact(&mut bytes)
        .map_err(io("read the metadata"))?;
    Ok(bytes)
}

pub(super) fn io(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { operation, source }
}
