//! The thread that takes the oldest part of a volume's stream out of memory when the target is
//! far behind, into the spool. It alone waits for the disk that the spool lies on; neither the
//! device's users nor whoever ships do.
//!
//! When the spooled logs pass half of the volume's size they are given up: by then a resync
//! by checksums costs less than shipping them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use hrl_format::id::VolumeId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, Sequence, Timestamp};

use crate::capture::inline::{Batch, Service};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::key_file::read_key_file;
use crate::primary::volume::locked;
use crate::spool::{Spool, SpoolSpec};

/// How long the thread sleeps at most.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Of which volume, and where its spool lies.
#[derive(Clone, Debug)]
pub struct SpoolerSpec {
    /// The folder of its logs alone.
    pub folder: PathBuf,
    /// The volume.
    pub volume: VolumeId,
    /// Its size and units.
    pub geometry: Geometry,
    /// Where its key is, if it is encrypted.
    pub key_file: Option<PathBuf>,
}

/// The spool of one volume, and the thread that fills it.
pub struct Spooler {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    service: Arc<Service>,
    spec: SpoolerSpec,
    /// Opened by the thread, again and again if need be: the key may be on a disk that is not
    /// there yet.
    spool: Mutex<Option<Arc<Spool>>>,
    /// Held by who opens it, which may take time.
    opening: Mutex<()>,
    trouble: Mutex<Option<String>>,
    overflow: Mutex<Option<String>>,
}

impl Spooler {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be started. A spool that cannot be used is no error: see
    /// [`Self::trouble`].
    pub fn start(service: &Arc<Service>, spec: SpoolerSpec) -> Result<Self> {
        let shared = Arc::new(Shared {
            service: Arc::clone(service),
            spec,
            spool: Mutex::new(None),
            opening: Mutex::new(()),
            trouble: Mutex::new(None),
            overflow: Mutex::new(None),
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("spooler".to_owned())
            .spawn(move || own.run())
            .at("start a thread", &shared.spec.folder)?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How long the spooled logs are.
    pub fn bytes(&self) -> ByteLen {
        let spool = locked(&self.shared.spool).clone();
        spool.map_or(ByteLen::ZERO, |spool| spool.bytes())
    }

    /// Why the spool cannot be used, if it cannot.
    pub fn trouble(&self) -> Option<String> {
        locked(&self.shared.trouble).clone()
    }

    /// Why the volume must be compared, if the spool has passed its limit since this was last
    /// asked.
    pub fn take_overflow(&self) -> Option<String> {
        locked(&self.shared.overflow).take()
    }

    /// Gives `put` the spooled changes from number `from` on and before `upto`, as far as they
    /// are in one log; returns the number of the change after the last one.
    ///
    /// # Errors
    /// What `put` returned. If the spool cannot be read the stream is given up, and
    /// [`ErrorKind::State`] says so.
    pub fn read(
        &self,
        from: Sequence,
        upto: Sequence,
        mut put: impl FnMut(&Record<&[u8]>, Timestamp) -> Result<()>,
    ) -> Result<Sequence> {
        let mut failed = None;
        let read = self.shared.open().and_then(|spool| {
            spool.read(from, upto, |record, time| {
                put(record, time).map_err(|error| {
                    failed = Some(error);
                    Error::new(ErrorKind::State, "ship a spooled change")
                })
            })
        });
        match (failed, read) {
            (Some(error), _) => Err(error),
            (None, Ok(upto)) => Ok(upto),
            (None, Err(error)) => {
                let cause = format!("the spool cannot be read: {error}");
                tracing::warn!(volume = %self.shared.spec.volume, "{cause}");
                self.shared.service.lose_stream(&cause);
                Err(Error::new(ErrorKind::State, "ship a spooled change").source(error))
            }
        }
    }

    /// Removes what the store has by now.
    pub fn trim(&self) {
        let spool = locked(&self.shared.spool).clone();
        if let Some(spool) = spool {
            spool.remove_before(self.shared.service.stored_up_to());
        }
    }

    /// Ends the thread; the service must end too. What is spooled is forgotten.
    pub fn stop(&self) {
        if let Some(thread) = locked(&self.thread).take() {
            let _ = thread.join();
        }
        *locked(&self.shared.spool) = None;
    }
}

impl Shared {
    fn run(&self) {
        // What an earlier run has left takes room.
        self.note(self.open().map(drop));
        while !self.service.is_ending() {
            let Some(batch) = self.service.wait_to_spool(LOOK_AGAIN) else {
                continue;
            };
            let spooled = self.spool(&batch);
            let failed = spooled.is_err();
            self.note(spooled);
            if failed {
                self.service.wait_for_end(LOOK_AGAIN);
            }
        }
    }

    fn open(&self) -> Result<Arc<Spool>> {
        let _alone = locked(&self.opening);
        if let Some(spool) = &*locked(&self.spool) {
            return Ok(Arc::clone(spool));
        }
        let spec = &self.spec;
        let key = spec.key_file.as_deref().map(read_key_file).transpose()?;
        let begun = Arc::new(Spool::begin(SpoolSpec {
            folder: spec.folder.clone(),
            volume: spec.volume,
            geometry: spec.geometry,
            key,
        })?);
        *locked(&self.spool) = Some(Arc::clone(&begun));
        Ok(begun)
    }

    fn note(&self, done: Result<()>) {
        let trouble = done.err().map(|error| error.to_string());
        let mut before = locked(&self.trouble);
        // Once, until it can be used again: what is said of room changes all the time.
        if let (Some(trouble), None) = (&trouble, &*before) {
            tracing::warn!(volume = %self.spec.volume, "the spool cannot be used: {trouble}");
        }
        *before = trouble;
    }

    fn spool(&self, batch: &Batch) -> Result<()> {
        let spool = self.open()?;
        let changes = batch.entries.iter();
        let end = spool.add(
            batch.first,
            changes.map(|entry| (entry.time, entry.record())),
        )?;
        self.service.spooled(end);
        spool.remove_before(self.service.stored_up_to());
        let (bytes, size) = (spool.bytes().get(), self.spec.geometry.size.get());
        if bytes > size / 2 {
            let cause = format!(
                "the target was so far behind that the spooled logs, {bytes} bytes, passed half \
                 of the volume's {size}"
            );
            self.service.lose_stream(&cause);
            spool.remove_before(self.service.stored_up_to());
            *locked(&self.overflow) = Some(cause);
        }
        Ok(())
    }
}
