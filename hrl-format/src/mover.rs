//! Moving frames whole into a new log: what needs no key, for it neither opens a frame nor
//! changes what its cipher vouches for. Salvage and keyless merge both end here.

use std::io::{IoSlice, Write};

use zerocopy::IntoBytes;

use crate::error::{Error, Result};
use crate::extents::IndexEntry;
use crate::frame::{FrameBuffer, Place};
use crate::header::{Features, HeaderPage, LogHeader};
use crate::key::VolumeKey;
use crate::layout::{PAGE, RawDirectoryEntry};
use crate::seal::{self, Mark, Seal, Sections, Totals};
use crate::units::{FileOffset, FrameNumber, Timestamp, VolumeSize};
use crate::writer::write_all_vectored;

/// A log in the making, of frames from elsewhere.
pub(crate) struct Mover<W> {
    out: W,
    page: HeaderPage,
    position: FileOffset,
    directory: Vec<RawDirectoryEntry>,
    records: u64,
    data: u64,
}

impl<W: Write> Mover<W> {
    /// Begins the log.
    pub(crate) fn new(mut out: W, header: &LogHeader, features: Features) -> Result<Self> {
        let page = header.encode(features)?;
        out.write_all(page.page.as_slice())
            .map_err(|error| Error::from_io("write the header", error))?;
        let position = FileOffset::new(PAGE as u64);
        Ok(Self {
            out,
            page,
            position,
            directory: Vec::new(),
            records: 0,
            data: 0,
        })
    }

    /// Appends a frame, checked before; returns its number here.
    pub(crate) fn put(&mut self, frame: &FrameBuffer) -> Result<FrameNumber> {
        let number = u32::try_from(self.directory.len())
            .map(FrameNumber::new)
            .map_err(|_| Error::invalid("more frames than a log can have"))?;
        let place = Place {
            number,
            position: self.position,
        };
        let (head, rest, entry) = frame.moved(self.page.header.log, place);
        let mut parts = [IoSlice::new(head.as_bytes()), IoSlice::new(rest)];
        write_all_vectored(&mut self.out, &mut parts)
            .map_err(|error| Error::from_io("write a frame", error).at(self.position))?;
        self.position = FileOffset::new(self.position.get() + frame.span() as u64);
        self.directory.push(entry);
        self.records += frame.records() as u64;
        self.data += frame.data_len() as u64;
        Ok(number)
    }

    /// Seals it with the index and the marks that were made out for it.
    pub(crate) fn seal(
        self,
        volume_size: VolumeSize,
        key: Option<&VolumeKey>,
        index: impl Iterator<Item = Result<IndexEntry>>,
        marks: impl Iterator<Item = Result<Mark>>,
        provenance: impl Iterator<Item = Result<Box<[u8; PAGE]>>>,
    ) -> Result<(W, Seal)> {
        let totals = Totals {
            frames: self.directory.len() as u64,
            records: self.records,
            data: self.data,
            volume_size,
            sealed: Timestamp::now(),
        };
        let directory = self.directory.into_iter().map(Ok);
        let sections = Sections {
            directory,
            index,
            marks,
            provenance,
        };
        seal::write(self.out, self.position, &self.page, totals, key, sections)
    }
}
