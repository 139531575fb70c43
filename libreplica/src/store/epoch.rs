//! An epoch on its way into the store: a log that grows in `incoming/`. Nothing of it counts
//! before it is committed, and dropped uncommitted it leaves nothing behind.

use std::io::BufWriter;

use hrl_format::id::LogId;
use hrl_format::record::{Record, Tag};
use hrl_format::units::{ByteLen, Epoch, Sequence, Timestamp, VolumeSize};
use hrl_format::{LogHeader, LogOptions, LogWriter, RecordOrder, Seal, VolumeKey};

use super::durable::{self, StoreFile};
use super::layout::{LogName, VolumeFolder};
use super::lease;
use super::moment::{InOrder, LogOrder};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Frames are gathered until they are this long; longer ones go to the file as they are.
pub(super) const BUFFER: usize = 1 << 20;
/// A log should not grow past this.
const MOST_BYTES: u64 = 1 << 30;
/// Nor its index: in memory it takes 50 bytes an entry while the log is written.
const MOST_INDEX: usize = 2 << 20;

/// The log of one epoch, being written.
///
/// Made by [`VolumeWriter::begin_epoch`], ended by [`VolumeWriter::commit`].
///
/// [`VolumeWriter::begin_epoch`]: super::VolumeWriter::begin_epoch
/// [`VolumeWriter::commit`]: super::VolumeWriter::commit
pub struct EpochLog {
    writer: Option<LogWriter<BufWriter<StoreFile>>>,
    folder: VolumeFolder,
    name: LogName,
    tags: Vec<Tag>,
    /// How many bytes of the volume it says something about, at most.
    covers: ByteLen,
    size: VolumeSize,
    /// When its first and its last record completed.
    times: Option<(Timestamp, Timestamp)>,
}

/// A sealed and synced log that still lies in `incoming/`.
pub(super) struct SealedEpoch {
    pub(super) header: LogHeader,
    pub(super) seal: Seal,
    pub(super) tags: Vec<Tag>,
    pub(super) name: LogName,
    pub(super) covers: ByteLen,
    pub(super) order: LogOrder,
}

const APPEND: &str = "append to the log";

impl EpochLog {
    pub(super) fn create(
        folder: &VolumeFolder,
        header: LogHeader,
        options: &LogOptions,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        let name = LogName {
            first: header.epochs.first,
            log: header.log,
        };
        let path = folder.incoming_log(&name);
        let file = BufWriter::with_capacity(BUFFER, StoreFile::create(path.clone())?);
        let mut epoch = Self {
            writer: None,
            folder: folder.clone(),
            name,
            tags: Vec::new(),
            covers: ByteLen::ZERO,
            size: header.volume_size,
            times: None,
        };
        let writer = LogWriter::create(file, header, options, key);
        epoch.writer = Some(writer.map_err(|e| Error::log("begin a log", e).path(path))?);
        Ok(epoch)
    }

    /// The log's id.
    pub fn log(&self) -> LogId {
        self.name.log
    }

    /// The epoch that it holds.
    pub fn epoch(&self) -> Epoch {
        self.name.first
    }

    /// How long the file is so far.
    pub fn bytes(&self) -> ByteLen {
        let written = self.writer.as_ref().map(LogWriter::bytes_written);
        ByteLen::new(written.unwrap_or(0))
    }

    /// How many records it has so far; the last one's number is one less.
    pub fn records(&self) -> u64 {
        self.writer.as_ref().map_or(0, LogWriter::records)
    }

    /// Whether it ends in a recovery point, so that nothing but another one may follow.
    pub fn has_point(&self) -> bool {
        !self.tags.is_empty()
    }

    /// Whether the log has grown so long that it should be committed, and what follows go into
    /// another epoch: at 1 GiB, or 2 million changed extents.
    pub fn is_full(&self) -> bool {
        let index = self.writer.as_ref().map_or(0, LogWriter::index_len);
        self.bytes().get() >= MOST_BYTES || index >= MOST_INDEX
    }

    /// Appends a change or a mark. After a tag only tags may follow: a recovery point is the
    /// end of an epoch.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] and others of the system's; the log is then lost, and the epoch must be
    /// written again. [`ErrorKind::Invalid`] if the record makes no sense; then nothing happened.
    pub fn append(&mut self, record: &Record<&[u8]>, time: Timestamp) -> Result<Sequence> {
        match record {
            Record::Tag(tag) => self.tags.push(tag.clone()),
            _ if !self.tags.is_empty() => {
                return Err(Error::new(ErrorKind::Invalid, APPEND)
                    .detail("a change behind a recovery point in one epoch"));
            }
            _ => {}
        }
        let appended = self.writer()?.append(record, time);
        let sequence = appended.map_err(|e| {
            let path = self.folder.incoming_log(&self.name);
            lease::explain_full(&self.folder, Error::log(APPEND, e).path(path))
        })?;
        self.note(record);
        let last = self.writer()?.last_time();
        self.times = last.map(|last| match self.times {
            Some((first, before)) => (first, before.max(last)),
            None => (last, last),
        });
        Ok(sequence)
    }

    /// Counts what a record says something about.
    fn note(&mut self, record: &Record<&[u8]>) {
        let covered = match record {
            Record::Write { extent, .. }
            | Record::Zeroes { extent }
            | Record::Discard { extent } => extent.len().get(),
            Record::Resize { size } => {
                let before = std::mem::replace(&mut self.size, *size);
                before.get().abs_diff(size.get())
            }
            Record::Tag(_) => 0,
        };
        self.covers = ByteLen::new(self.covers.get().saturating_add(covered));
    }

    /// What the catalogue is to say of the order of the records.
    fn order(&mut self, header: &LogHeader) -> Result<LogOrder> {
        let (from, to) = self.times.unwrap_or((header.created, header.created));
        Ok(match header.order {
            RecordOrder::AsRead => LogOrder::AsRead,
            RecordOrder::AsCompleted => LogOrder::AsCompleted(InOrder {
                records: self.writer()?.records(),
                from: from.min(header.created),
                to,
            }),
        })
    }

    fn writer(&mut self) -> Result<&mut LogWriter<BufWriter<StoreFile>>> {
        let gone = || Error::new(ErrorKind::State, APPEND).detail("the log is sealed");
        self.writer.as_mut().ok_or_else(gone)
    }

    /// Seals the log and makes the file durable, still in `incoming/`.
    pub(super) fn seal(mut self) -> Result<SealedEpoch> {
        const SEAL: &str = "seal the log";
        let path = self.folder.incoming_log(&self.name);
        let header = self.writer()?.header().clone();
        let order = self.order(&header)?;
        let gone = || Error::new(ErrorKind::State, SEAL).detail("the log is sealed");
        let writer = self.writer.take().ok_or_else(gone)?;
        let sealed = writer.seal().map_err(|e| Error::log(SEAL, e).path(&path));
        let synced = sealed.and_then(|(buffered, seal)| {
            let file = buffered
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error);
            file.at(SEAL, &path)?.sync()?;
            Ok(seal)
        });
        let seal = synced.inspect_err(|_| {
            // What is left is useless, and may be what filled the disk.
            let _ = durable::remove(&path);
        })?;
        Ok(SealedEpoch {
            header,
            seal,
            tags: std::mem::take(&mut self.tags),
            name: self.name,
            covers: self.covers,
            order,
        })
    }
}

impl Drop for EpochLog {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Not flushed: into_parts drops the buffer.
            drop(writer.abandon().into_parts());
            // The next writer removes it otherwise.
            let _ = durable::remove(&self.folder.incoming_log(&self.name));
        }
    }
}
