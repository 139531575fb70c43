//! The open log of a branch: what was written and is not in a sealed log yet. Each change goes
//! to the log's file and into memory, from where it is read back; when that is enough the
//! log is sealed. A flush ends the frame, and syncs the file.

use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use hrl_format::id::LogId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, Epoch, Extent, Timestamp};
use hrl_format::{ChainEnd, EpochRange, LogHeader, LogOptions, LogWriter, RecordOrder, VolumeKey};

use super::info::BranchInfo;
use super::map::{ExtentMap, Place};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::store::durable::{self, StoreFile};
use crate::store::epoch::BUFFER;
use crate::store::layout::{BranchFolder, LogName};

/// Data that is held in memory before the log is sealed.
const MOST_HELD: u64 = 32 << 20;
/// Records that it has by then at most.
const MOST_RECORDS: u64 = 1 << 16;

const BEGIN: &str = "begin a log of the branch";
const WRITE: &str = "write to the branch";
const SEAL: &str = "seal a log of the branch";

/// Bytes of the open log: their data; `None` for zeroes.
#[derive(Clone, Debug)]
pub(super) struct Held(pub(super) Option<Bytes>);

impl Place for Held {
    fn behind(&self, skipped: ByteLen) -> Self {
        let skipped = |data: &Bytes| data.slice((skipped.get() as usize).min(data.len())..);
        Self(self.0.as_ref().map(skipped))
    }
}

/// A change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    Write(&'a [u8]),
    Zeroes,
    Discard,
}

/// What the logs of a branch have in common.
pub(super) struct LogSpec {
    pub(super) info: BranchInfo,
    pub(super) geometry: Geometry,
    pub(super) folder: BranchFolder,
    pub(super) key: Option<VolumeKey>,
}

/// The end of a branch's chain, where it is written.
pub(super) struct Tail {
    open: Option<OpenLog>,
    /// The epoch of the next log, and the log that it follows.
    next: Epoch,
    follows: Option<ChainEnd>,
    /// An earlier write or sync failed: what is in the file is not known.
    broken: bool,
}

struct OpenLog {
    writer: LogWriter<BufWriter<StoreFile>>,
    path: PathBuf,
    held: u64,
    /// Another handle of the file, so that it is synced while others write.
    sync: Arc<StoreFile>,
    /// How many records were in the file when it was synced last.
    synced: u64,
}

/// What is to be synced, and the record before which all is durable then.
pub(super) struct Due {
    pub(super) file: Arc<StoreFile>,
    log: PathBuf,
    records: u64,
}

impl LogSpec {
    /// The header of a new log.
    pub(super) fn header(&self, epoch: Epoch, follows: Option<ChainEnd>) -> Result<LogHeader> {
        let log = LogId::random().map_err(|e| Error::new(ErrorKind::Io, BEGIN).source(e))?;
        Ok(LogHeader {
            log,
            previous: follows.map(|end| end.log),
            previous_seal: follows.and_then(|end| end.seal),
            stands_for: None,
            volume: self.info.volume,
            generation: self.info.generation.generation(),
            epochs: EpochRange::single(epoch),
            order: RecordOrder::AsCompleted,
            block: self.geometry.block,
            sector: self.geometry.sector,
            volume_size: self.info.size,
            created: Timestamp::now(),
            key: None,
        })
    }

    pub(super) fn path(&self, header: &LogHeader) -> PathBuf {
        let name = LogName {
            first: header.epochs.first,
            log: header.log,
        };
        self.folder.logs().join(name.to_string())
    }

    /// Begins a log in the file at `path`.
    pub(super) fn create(
        &self,
        path: &Path,
        header: LogHeader,
    ) -> Result<LogWriter<BufWriter<StoreFile>>> {
        let file = BufWriter::with_capacity(BUFFER, StoreFile::create(path.to_owned())?);
        let writer = LogWriter::create(file, header, &LogOptions::default(), self.key.as_ref());
        let mut writer = writer.map_err(|e| Error::log(BEGIN, e).path(path))?;
        writer
            .flush()
            .map_err(|e| Error::log(BEGIN, e).path(path))?;
        Ok(writer)
    }
}

/// Seals a log, and makes it durable; its frames first, so that what lies before a seal was on the
/// medium once, and is damaged if it is not there any more.
pub(super) fn seal(mut writer: LogWriter<BufWriter<StoreFile>>, path: &Path) -> Result<()> {
    writer.flush().map_err(|e| Error::log(SEAL, e).path(path))?;
    writer.get_ref().get_ref().sync()?;
    let (file, _) = writer.seal().map_err(|e| Error::log(SEAL, e).path(path))?;
    let file = file
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error);
    file.at(SEAL, path)?.sync()
}

impl Tail {
    /// Where the next log has epoch `next`, and follows `follows`.
    pub(super) const fn new(next: Epoch, follows: Option<ChainEnd>) -> Self {
        Self {
            open: None,
            next,
            follows,
            broken: false,
        }
    }

    /// Appends a change.
    pub(super) fn append(
        &mut self,
        spec: &LogSpec,
        extent: Extent,
        change: Change<'_>,
    ) -> Result<()> {
        let record = match change {
            Change::Write(data) => Record::Write { extent, data },
            Change::Zeroes => Record::Zeroes { extent },
            Change::Discard => Record::Discard { extent },
        };
        self.append_record(spec, &record, Timestamp::now())?;
        if let (Change::Write(data), Some(open)) = (change, &mut self.open) {
            open.held += data.len() as u64;
        }
        Ok(())
    }

    /// Appends a record, to a new log if none is open.
    pub(super) fn append_record(
        &mut self,
        spec: &LogSpec,
        record: &Record<&[u8]>,
        time: Timestamp,
    ) -> Result<()> {
        self.sound(spec)?;
        if self.open.is_none() {
            self.open = Some(self.begin(spec)?);
        }
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        if let Err(e) = open.writer.append(record, time) {
            // What makes no sense was not begun.
            self.broken = e.kind() != hrl_format::ErrorKind::Invalid;
            return Err(Error::log(WRITE, e).path(&open.path));
        }
        Ok(())
    }

    /// Whether something was written since a log was sealed last.
    pub(super) const fn has_news(&self) -> bool {
        self.open.is_some()
    }

    /// A new log: its header and its name are durable when this returns, so that one without a
    /// header was never written to.
    fn begin(&self, spec: &LogSpec) -> Result<OpenLog> {
        let header = spec.header(self.next, self.follows)?;
        let path = spec.path(&header);
        let writer = spec.create(&path, header)?;
        let sync = Arc::new(StoreFile::open(path.clone())?);
        sync.sync()?;
        durable::sync_folder(&spec.folder.logs())?;
        Ok(OpenLog {
            writer,
            path,
            held: 0,
            sync,
            synced: 0,
        })
    }

    /// Whether so much is held in memory that the log should be sealed.
    pub(super) fn is_full(&self) -> bool {
        let full = |open: &OpenLog| open.held >= MOST_HELD || open.writer.records() >= MOST_RECORDS;
        self.open.as_ref().is_some_and(full)
    }

    /// Puts all that was appended into the file; what is to be synced then, if anything.
    pub(super) fn cut(&mut self, spec: &LogSpec) -> Result<Option<Due>> {
        self.sound(spec)?;
        let Some(open) = &mut self.open else {
            return Ok(None);
        };
        let records = open.writer.records();
        if records == open.synced {
            return Ok(None);
        }
        if let Err(e) = open.writer.flush() {
            self.broken = true;
            return Err(Error::log(WRITE, e).path(&open.path));
        }
        Ok(Some(Due {
            file: Arc::clone(&open.sync),
            log: open.path.clone(),
            records,
        }))
    }

    /// What was due is durable, or nobody knows.
    pub(super) fn synced(&mut self, due: &Due, done: &Result<()>) {
        if done.is_err() {
            self.broken = true;
            return;
        }
        if let Some(open) = &mut self.open
            && open.path == due.log
        {
            open.synced = open.synced.max(due.records);
        }
    }

    /// Seals the open log, if there is one. The caller reads its end from the file, and says so
    /// with [`Self::follow`].
    pub(super) fn seal(&mut self, spec: &LogSpec) -> Result<Option<PathBuf>> {
        self.sound(spec)?;
        let Some(OpenLog { writer, path, .. }) = self.open.take() else {
            return Ok(None);
        };
        // Until that is known the branch takes no more.
        self.broken = true;
        seal(writer, &path)?;
        Ok(Some(path))
    }

    /// The next log follows this end.
    pub(super) fn follow(&mut self, end: ChainEnd) {
        self.next = self.next.next();
        self.follows = Some(end);
        self.broken = false;
    }

    fn sound(&self, spec: &LogSpec) -> Result<()> {
        match self.broken {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::State, WRITE)
                .path(spec.folder.path())
                .detail("an earlier write to the store failed")
                .advice("what was flushed before is safe: close it, and open it again")),
        }
    }
}

/// What the open log holds.
pub(super) type HeldMap = ExtentMap<Held>;
