//! Where the changes of a volume wait that memory has no room for while the target is behind:
//! a folder of sealed logs, each with an unbroken part of the volume's stream of changes, in
//! order. They are HRL logs like any other, encrypted with the volume's key if it has one.
//!
//! The spool belongs to one run of the agent. What it holds is dirty in the bitmaps too, so
//! that its loss costs the way back to each moment, and no write; a new run begins with an
//! empty one.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hrl_format::id::{Generation, LogId, VolumeId};
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, Epoch, Sequence, Timestamp};
use hrl_format::{
    Ending, EpochRange, LogHeader, LogOptions, LogWriter, RecordOrder, Scanner, VolumeKey,
};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;

/// Bytes gathered for one write to the file.
const BUFFER: usize = 1 << 20;
/// What is left free of the file system: so many bytes, or a twentieth of it if that is less.
const LEFT_FREE: u64 = 1 << 30;

const SPOOL: &str = "spool changes";
const READ: &str = "read spooled changes";

/// Of which volume, and where.
#[derive(Clone, Debug)]
pub struct SpoolSpec {
    /// The folder of this volume's logs alone; it is made if it is not there.
    pub folder: PathBuf,
    /// Whose changes.
    pub volume: VolumeId,
    /// The volume's size and units.
    pub geometry: Geometry,
    /// What the logs are encrypted with.
    pub key: Option<VolumeKey>,
}

#[derive(Debug)]
struct SpooledLog {
    /// The numbers of its changes.
    first: u64,
    end: u64,
    /// Those that are more than one record there: an encrypted frame has data of one aligned
    /// region only. Their numbers, ascending, and how many records each is.
    split: Vec<(u64, u64)>,
    bytes: u64,
    path: PathBuf,
}

impl SpooledLog {
    /// How many records change `number` is.
    fn records(&self, number: u64) -> u64 {
        let found = self
            .split
            .binary_search_by_key(&number, |(number, _)| *number);
        found.map_or(1, |at| self.split[at].1)
    }
}

/// The spool of one volume.
#[derive(Debug)]
pub struct Spool {
    spec: SpoolSpec,
    /// In order.
    logs: Mutex<VecDeque<Arc<SpooledLog>>>,
}

impl Spool {
    /// An empty one. Logs that an earlier run has left in the folder are removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn begin(spec: SpoolSpec) -> Result<Self> {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&spec.folder);
        made.at("make the spool's folder", &spec.folder)?;
        let spool = Self {
            spec,
            logs: Mutex::default(),
        };
        spool.remove_all()?;
        Ok(spool)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.spec.folder
    }

    fn logs(&self) -> MutexGuard<'_, VecDeque<Arc<SpooledLog>>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a log with changes, of which the first has number `first`; returns the number of
    /// the change after its last. It need not outlast a loss of power.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] if less than 1 GiB, or a twentieth, of the file system is free; what
    /// it says. The spool is then as it was.
    pub fn add<'a>(
        &self,
        first: Sequence,
        changes: impl Iterator<Item = (Timestamp, Record<&'a [u8]>)>,
    ) -> Result<Sequence> {
        self.has_room()?;
        let path = self.spec.folder.join(format!("{:016x}.hrl", first.get()));
        let written = self.write(&path, first, changes).inspect_err(|_| {
            // It may be what filled the disk.
            let _ = fs::remove_file(&path);
        })?;
        let end = written.end;
        self.logs().push_back(Arc::new(written));
        Ok(Sequence::new(end))
    }

    fn write<'a>(
        &self,
        path: &Path,
        first: Sequence,
        changes: impl Iterator<Item = (Timestamp, Record<&'a [u8]>)>,
    ) -> Result<SpooledLog> {
        let mut options = fs::OpenOptions::new();
        let made = options.write(true).create(true).truncate(true).mode(0o600);
        let file = made.open(path).at(SPOOL, path)?;
        let log = |error| Error::log(SPOOL, error).path(path);
        let mut changes = changes.peekable();
        let created = changes
            .peek()
            .map_or_else(Timestamp::now, |(time, _)| *time);
        let (header, key) = (self.header(created)?, self.spec.key.as_ref());
        let out = BufWriter::with_capacity(BUFFER, file);
        let writer = LogWriter::create(out, header, &LogOptions::default(), key);
        let mut writer = writer.map_err(log)?;
        let (mut end, mut split) = (first.get(), Vec::new());
        for (time, record) in changes {
            let before = writer.records();
            writer.append(&record, time).map_err(log)?;
            let records = writer.records() - before;
            if records != 1 {
                split.push((end, records));
            }
            end += 1;
        }
        let (out, _) = writer.seal().map_err(log)?;
        let file = out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .at(SPOOL, path)?;
        Ok(SpooledLog {
            first: first.get(),
            end,
            split,
            bytes: file.metadata().at(SPOOL, path)?.len(),
            path: path.to_owned(),
        })
    }

    fn header(&self, created: Timestamp) -> Result<LogHeader> {
        let id = LogId::random().map_err(|e| Error::new(ErrorKind::Io, SPOOL).source(e))?;
        let geometry = &self.spec.geometry;
        // No part of the volume's chain: which epoch it becomes is for the store to say.
        Ok(LogHeader {
            log: id,
            previous: None,
            previous_seal: None,
            stands_for: None,
            volume: self.spec.volume,
            generation: Generation::default(),
            epochs: EpochRange::single(Epoch::ZERO.next()),
            order: RecordOrder::AsCompleted,
            block: geometry.block,
            sector: geometry.sector,
            volume_size: geometry.size,
            created,
            key: None,
        })
    }

    fn has_room(&self) -> Result<()> {
        let folder = &self.spec.folder;
        let seen = nix::sys::statvfs::statvfs(folder).at("look at the spool", folder)?;
        let free = seen.blocks_available() * seen.fragment_size();
        let needed = LEFT_FREE.min(seen.blocks() * seen.fragment_size() / 20);
        if free >= needed {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Full, SPOOL)
            .path(folder)
            .detail(format!(
                "{free} bytes of its file system are free, and {needed} are left so"
            ))
            .advice("make room there, or protect the volume with another --spool DIR"))
    }

    /// Gives `take` the changes from number `from` on and before `upto`, as far as they are in
    /// one log; returns the number of the change after the last one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if number `from` is not here; [`ErrorKind::Damaged`], and what
    /// the file system says; what `take` returns.
    pub fn read(
        &self,
        from: Sequence,
        upto: Sequence,
        mut take: impl FnMut(&Record<&[u8]>, Timestamp) -> Result<()>,
    ) -> Result<Sequence> {
        let spooled = self.find(from)?;
        let path = &spooled.path;
        let log = |error| Error::log(READ, error).path(path);
        let source = BufReader::with_capacity(BUFFER, File::open(path).at(READ, path)?);
        let mut scanner = Scanner::new(source, self.spec.key.as_ref()).map_err(log)?;
        let until = spooled.end.min(upto.get());
        for number in spooled.first..until {
            for _ in 0..spooled.records(number) {
                let Some(entry) = scanner.next_record().map_err(log)? else {
                    return Err(cut_short(&scanner, path));
                };
                if number >= from.get() {
                    take(&entry.record, entry.time)?;
                }
            }
        }
        Ok(Sequence::new(until.max(from.get())))
    }

    /// The log that has change number `from`.
    fn find(&self, from: Sequence) -> Result<Arc<SpooledLog>> {
        let logs = self.logs();
        let number = from.get();
        let found = logs
            .iter()
            .find(|log| (log.first..log.end).contains(&number));
        found.cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, READ)
                .path(&self.spec.folder)
                .detail(format!("change {number} is not there"))
        })
    }

    /// Removes the logs that have only changes before number `upto`.
    pub fn remove_before(&self, upto: Sequence) {
        let mut logs = self.logs();
        let count = logs.partition_point(|log| log.end <= upto.get());
        let removed: Vec<_> = logs.drain(..count).collect();
        // Nobody who asks how much there is waits for the disk.
        drop(logs);
        for log in removed {
            if let Err(error) = fs::remove_file(&log.path) {
                tracing::warn!("{}: {error}", log.path.display());
            }
        }
    }

    /// How long its logs are together.
    pub fn bytes(&self) -> ByteLen {
        ByteLen::new(self.logs().iter().map(|log| log.bytes).sum())
    }

    /// Removes what is in the folder and has a spooled log's name, ours or an earlier run's.
    fn remove_all(&self) -> Result<()> {
        let folder = &self.spec.folder;
        self.logs().clear();
        for entry in fs::read_dir(folder).at("read the spool's folder", folder)? {
            let path = entry.at("read the spool's folder", folder)?.path();
            if is_spooled_log(&path) {
                fs::remove_file(&path).at("empty the spool", &path)?;
            }
        }
        Ok(())
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // Whoever comes next begins with an empty one in any case.
        let _ = self.remove_all();
        let _ = fs::remove_dir(&self.spec.folder);
    }
}

fn cut_short<R>(scanner: &Scanner<R>, path: &Path) -> Error
where
    R: std::io::Read,
{
    let why = match scanner.ending() {
        Some(Ending::Torn { cause, .. }) => cause.to_string(),
        _ => "it has fewer changes than were written".to_owned(),
    };
    Error::new(ErrorKind::Damaged, READ).path(path).detail(why)
}

fn is_spooled_log(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    path.extension().is_some_and(|extension| extension == "hrl")
        && stem.is_some_and(|stem| {
            stem.len() == 16 && stem.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

#[cfg(test)]
mod tests;
