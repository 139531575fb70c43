//! Writing a log: header, an empty metadata block as in the published sample, then data,
//! each 127 writes followed by their metadata, and the header once more, closed.

use std::io::{Seek, SeekFrom, Write};

use super::HEADER_LEN;
use super::error::Error;
use super::header::{FormatVersion, Header};
use super::metadata::{BlockHeader, Entry, UNIT};
use super::reader::io;
use super::sum::{Sum, checksum};
use super::time::MsTime;
use crate::units::{ByteLen, ByteOffset, Extent, FileOffset, Timestamp};

const METADATA_SIZE: usize = 4096;
const ENTRIES_PER_BLOCK: usize = METADATA_SIZE / UNIT - 1;
/// The longest run of zeroes in one entry: the longest whole number of 4-KiB blocks that
/// a 32-bit length can tell.
const LONGEST_ZEROES: u64 = (1 << 32) - 4096;
const ZEROES: &[u8] = &[0; 64 << 10];

/// What the header of a new log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriterOptions {
    /// The id of the log.
    pub id: [u8; 16],
    /// The id of the log before it; zeroes if none.
    pub previous: [u8; 16],
    /// When it was created.
    pub created: Timestamp,
    /// The data-write id of the VHDX, if the log belongs to one.
    pub data_write: [u8; 16],
}

/// A log that is written. Until [`Self::finish`] it says that it is open, and no reader
/// takes it. After an error nothing more can be written to it.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
    header: Header,
    position: u64,
    /// Where the metadata block before begins; zero before the first.
    block_before: u64,
    pending: Vec<[u8; UNIT]>,
}

impl<W: Write + Seek> Writer<W> {
    /// Starts a log at the beginning of `inner`, which is empty.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(inner: W, options: &WriterOptions) -> Result<Self, Error> {
        let created = MsTime::from_timestamp(options.created);
        let size = HEADER_LEN + METADATA_SIZE as u64;
        let mut writer = Self {
            inner,
            header: Header {
                version: FormatVersion::V2,
                created,
                original_size: ByteLen::new(size),
                current_size: ByteLen::new(size),
                end_of_log: FileOffset::ZERO,
                error_code: 0,
                metadata_size: METADATA_SIZE as u32,
                id: options.id,
                previous: options.previous,
                modified: created,
                entries: 0,
                data_write: options.data_write,
            },
            position: 0,
            block_before: 0,
            pending: Vec::with_capacity(ENTRIES_PER_BLOCK),
        };
        writer.put(&*writer.header.encode())?;
        writer.end_block()?;
        Ok(writer)
    }

    /// Appends a write of `data` at `offset` of the volume.
    ///
    /// # Errors
    /// [`Error::TooLong`] for 4 GiB and more, or past the last address; [`Error::Io`].
    pub fn write(&mut self, offset: ByteOffset, data: &[u8], time: Timestamp) -> Result<(), Error> {
        let len = ByteLen::new(data.len() as u64);
        let extent = Extent::new(offset, len);
        let extent = extent.ok_or(Error::TooLong { offset, len })?;
        let entry = encode(extent, checksum(&[data]), time)?;
        self.put(data)?;
        self.entry(entry, time)
    }

    /// Appends writes of zeroes over `extent`: one, or as many as its length takes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn zeroes(&mut self, extent: Extent, time: Timestamp) -> Result<(), Error> {
        let mut offset = extent.offset();
        while offset < extent.end() {
            let left = Extent::between(offset, extent.end()).len().get();
            let len = left.min(LONGEST_ZEROES);
            let end = ByteOffset::new(offset.get() + len);
            let entry = encode(Extent::between(offset, end), Sum::default().finish(), time)?;
            self.put_zeroes(len)?;
            self.entry(entry, time)?;
            offset = end;
        }
        Ok(())
    }

    /// Writes what is left, and closes the log. Making it durable is the caller's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self) -> Result<W, Error> {
        if !self.pending.is_empty() {
            self.end_block()?;
        }
        self.header.end_of_log = FileOffset::new(self.position);
        self.header.current_size = ByteLen::new(self.position);
        let header = self.header.encode();
        self.inner
            .seek(SeekFrom::Start(0))
            .map_err(io("close the log"))?;
        self.inner
            .write_all(&*header)
            .map_err(io("close the log"))?;
        self.inner.flush().map_err(io("close the log"))?;
        Ok(self.inner)
    }

    fn entry(&mut self, entry: [u8; UNIT], time: Timestamp) -> Result<(), Error> {
        self.pending.push(entry);
        self.header.entries += 1;
        self.header.modified = self.header.modified.max(MsTime::from_timestamp(time));
        if self.pending.len() == ENTRIES_PER_BLOCK {
            self.end_block()?;
        }
        Ok(())
    }

    /// Writes the metadata block for the pending entries.
    fn end_block(&mut self) -> Result<(), Error> {
        let start = self.position;
        let distance = match self.block_before {
            0 => 0,
            before => start - before,
        };
        let header = BlockHeader {
            distance,
            entries: self.pending.len() as u32,
        };
        let mut block = Vec::with_capacity(METADATA_SIZE);
        block.extend_from_slice(&header.encode());
        block.extend_from_slice(self.pending.as_flattened());
        block.resize(METADATA_SIZE, 0);
        self.put(&block)?;
        self.pending.clear();
        self.block_before = start;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.inner.write_all(bytes).map_err(io("write the log"))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn put_zeroes(&mut self, len: u64) -> Result<(), Error> {
        let mut left = len;
        while left > 0 {
            let part = left.min(ZEROES.len() as u64);
            self.put(&ZEROES[..part as usize])?;
            left -= part;
        }
        Ok(())
    }
}

fn encode(extent: Extent, data_checksum: u32, time: Timestamp) -> Result<[u8; UNIT], Error> {
    let entry = Entry {
        extent,
        time: MsTime::from_timestamp(time),
        data_checksum,
    };
    entry.encode().ok_or(Error::TooLong {
        offset: extent.offset(),
        len: extent.len(),
    })
}
