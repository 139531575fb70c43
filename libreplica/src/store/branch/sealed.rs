//! The sealed logs of a branch, open for reading: those of the volume between the point and
//! the moment that it stands on, then its own. Their indexes are one map in memory, some 60
//! bytes for each extent that was written; frames are read when they are needed, and a few kept.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hrl_format::units::{ByteLen, Epoch, Extent, FrameNumber, Sequence};
use hrl_format::{
    ChainEnd, DataOffset, ExtentKind, FrameBuffer, IndexEntry, Log, LogHeader, Seal, VolumeKey,
};

use super::map::{ExtentMap, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::store::durable::damaged;
use crate::store::sources::{LogFile, OpenFiles};

/// Bytes of frames that are kept.
const KEPT: usize = 32 << 20;

const OPEN: &str = "open a log of the branch";
const INDEX: &str = "read the index of a log of the branch";
const READ: &str = "read a log of the branch";

/// A sealed log of a branch.
pub(super) struct SealedLog {
    pub(super) log: Log<LogFile>,
    pub(super) path: PathBuf,
}

/// Where bytes are: in a frame of one of the logs, or zeroes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SealedPlace {
    log: u32,
    frame: u32,
    /// `u32::MAX`: zeroes.
    at: u32,
}

const ZEROES: u32 = u32::MAX;

impl SealedPlace {
    fn of(log: u32, entry: &IndexEntry) -> Self {
        let at = match entry.kind {
            ExtentKind::Write => entry.at.get(),
            ExtentKind::Zeroes | ExtentKind::Discard => ZEROES,
        };
        let frame = entry.frame.get();
        Self { log, frame, at }
    }

    pub(super) const fn is_zeroes(self) -> bool {
        self.at == ZEROES
    }
}

impl Place for SealedPlace {
    fn behind(&self, skipped: ByteLen) -> Self {
        if self.is_zeroes() {
            return *self;
        }
        // A frame's data is far shorter.
        let at = self.at.saturating_add(skipped.get() as u32);
        Self { at, ..*self }
    }
}

/// The logs and what they come to.
#[derive(Default)]
pub(super) struct Sealed {
    logs: Vec<Arc<SealedLog>>,
    map: ExtentMap<SealedPlace>,
    /// Whether only a part of the last log counts: then the volume's size at its end says nothing.
    is_cut: bool,
    files: Arc<OpenFiles>,
}

impl Sealed {
    /// Opens a log, which must follow the one before it. Nothing of it counts yet.
    pub(super) fn open(&self, path: &Path, key: Option<&VolumeKey>) -> Result<SealedLog> {
        let file = LogFile::new(path.to_owned(), &self.files);
        let log = Log::open(file, key).map_err(|e| Error::log(OPEN, e).path(path))?;
        if let Some(before) = self.logs.last() {
            let follows = match self.is_cut {
                false => before.log.check_followed_by(log.header()),
                true => before
                    .header()
                    .check_followed_by(before.seal().digest, log.header()),
            };
            follows.map_err(|e| damaged(OPEN, path, e.to_string()))?;
        }
        let path = path.to_owned();
        Ok(SealedLog { log, path })
    }

    /// What `log` says counts from now on; up to a record, if one is given.
    pub(super) fn push(&mut self, log: SealedLog, until: Option<Sequence>) -> Result<()> {
        let error = |e| Error::log(INDEX, e).path(&log.path);
        let number = u32::try_from(self.logs.len())
            .map_err(|_| Error::new(ErrorKind::Invalid, OPEN).detail("more logs than can be"))?;
        match until {
            Some(last) => {
                let prefix = log.log.index_until(last).map_err(error)?;
                for entry in prefix.entries() {
                    self.map
                        .insert(entry.extent, SealedPlace::of(number, entry));
                }
            }
            None => {
                for entry in log.log.index() {
                    let entry = entry.map_err(error)?;
                    self.map
                        .insert(entry.extent, SealedPlace::of(number, &entry));
                }
            }
        }
        self.is_cut = until.is_some();
        self.logs.push(Arc::new(log));
        Ok(())
    }

    /// What is known of `extent`.
    pub(super) fn pieces(&self, extent: Extent) -> Vec<(Extent, Option<SealedPlace>)> {
        self.map.pieces(extent)
    }

    /// The log that a place is in.
    pub(super) fn log_of(&self, place: SealedPlace) -> Option<Arc<SealedLog>> {
        self.logs.get(place.log as usize).cloned()
    }

    /// Those from `first` on, oldest first.
    pub(super) fn logs_from(&self, first: Epoch) -> impl Iterator<Item = &SealedLog> {
        let logs = self.logs.iter().map(AsRef::as_ref);
        logs.filter(move |log| log.header().epochs.first >= first)
    }

    /// How many extents are known.
    pub(super) fn extents(&self) -> usize {
        self.map.len()
    }
}

impl SealedLog {
    pub(super) fn header(&self) -> &LogHeader {
        self.log.header()
    }

    pub(super) fn seal(&self) -> &Seal {
        self.log.seal()
    }

    /// What the next log names as before it.
    pub(super) fn end(&self) -> ChainEnd {
        self.header().chain_end(self.seal().digest)
    }
}

/// Frames that were read a moment ago, by log and number.
#[derive(Default)]
pub(super) struct KeptFrames(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    frames: HashMap<(u32, u32), (Arc<FrameBuffer>, u64)>,
    bytes: usize,
    uses: u64,
}

impl KeptFrames {
    /// Fills `buffer` with what is at `place`, in `log`.
    pub(super) fn read(
        &self,
        log: &SealedLog,
        place: SealedPlace,
        buffer: &mut [u8],
    ) -> Result<()> {
        let error = |e| Error::log(READ, e).path(&log.path);
        let frame = match self.known(place) {
            Some(frame) => frame,
            None => {
                let mut frame = FrameBuffer::new();
                let number = FrameNumber::new(place.frame);
                log.log.read_frame(number, &mut frame).map_err(error)?;
                self.keep(place, frame)
            }
        };
        let len = ByteLen::new(buffer.len() as u64);
        let bytes = frame.slice(DataOffset::new(place.at), len).map_err(error)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn known(&self, place: SealedPlace) -> Option<Arc<FrameBuffer>> {
        let mut kept = self.lock();
        kept.uses += 1;
        let now = kept.uses;
        let (frame, used) = kept.frames.get_mut(&(place.log, place.frame))?;
        *used = now;
        Some(Arc::clone(frame))
    }

    fn keep(&self, place: SealedPlace, frame: FrameBuffer) -> Arc<FrameBuffer> {
        let frame = Arc::new(frame);
        let mut kept = self.lock();
        while kept.bytes >= KEPT {
            let oldest = kept.frames.iter().min_by_key(|(_, (_, used))| *used);
            let Some(oldest) = oldest.map(|(key, _)| *key) else {
                break;
            };
            if let Some((old, _)) = kept.frames.remove(&oldest) {
                kept.bytes = kept.bytes.saturating_sub(old.data_len());
            }
        }
        kept.bytes += frame.data_len();
        let now = kept.uses;
        let key = (place.log, place.frame);
        if let Some((twice, _)) = kept.frames.insert(key, (Arc::clone(&frame), now)) {
            kept.bytes = kept.bytes.saturating_sub(twice.data_len());
        }
        frame
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
