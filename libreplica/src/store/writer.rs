//! The one writer of a volume: it takes epochs in, drops points, folds logs, and puts right what
//! a crash left. It holds the volume's lock for as long as it lives.

use hrl_format::id::{Generation, LogId, PointId, VolumeId};
use hrl_format::units::{ByteLen, Epoch, Timestamp};
use hrl_format::{Compression, EpochRange, LogHeader, LogOptions, RecordOrder, VolumeKey};

use super::baseline::Baseline;
use super::catalogue::{Catalogue, Point};
use super::durable::{self, Replaced};
use super::epoch::{EpochLog, SealedEpoch};
use super::folder::Store;
use super::layout::VolumeFolder;
use super::levels::Keeper;
use super::lock::Lock;
use super::{catalogue_file, fence, ingest, lease, recover};
use crate::error::{Error, ErrorKind, Result};

/// The exclusive right to change a volume of a store.
///
/// ```
/// use libreplica::geometry::Geometry;
/// use libreplica::id::PointId;
/// use libreplica::record::{Consistency, Record, Tag};
/// use libreplica::store::{PointSelector, Store, VolumeSpec};
/// use libreplica::units::*;
///
/// let folder = tempfile::tempdir()?;
/// let store = Store::create(&folder.path().join("store"))?;
/// let size = VolumeSize::new(1 << 20);
/// let geometry = Geometry { size, block: BlockSize::MIN, sector: SectorSize::B512 };
/// let id = store.create_volume(VolumeSpec::new("database", geometry)?)?;
///
/// let mut writer = store.volume_writer(id, None)?;
/// let mut baseline = writer.begin_baseline()?;
/// baseline.write(ByteOffset::ZERO, b"as it was at first")?;
/// baseline.finish()?;
///
/// let time = Timestamp::now();
/// let mut epoch = writer.begin_epoch()?;
/// let extent = Extent::new(ByteOffset::new(3), ByteLen::new(6)).unwrap();
/// epoch.append(&Record::Write { extent, data: b"became" }, time)?;
/// let tag = Tag {
///     id: PointId::at(time)?,
///     time,
///     consistency: Consistency::Crash,
///     label: "after the change".to_owned(),
///     group: None,
///     root: None,
/// };
/// epoch.append(&Record::Tag(tag), time)?;
/// let committed = writer.commit(epoch)?;
/// assert_eq!(committed.points[0].label, "after the change");
///
/// let reader = store.volume(id, None)?;
/// let point = reader.point(PointSelector::Latest)?;
/// let mut bytes = [0; 12];
/// reader.open_point(point.id)?.read_at(ByteOffset::ZERO, &mut bytes)?;
/// assert_eq!(&bytes, b"as became at");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct VolumeWriter {
    pub(super) folder: VolumeFolder,
    pub(super) catalogue: Catalogue,
    sequence: u64,
    pub(super) key: Option<VolumeKey>,
    pub(super) options: LogOptions,
    trust: Trust,
    /// How long the logs grow that the store makes of its own: those of an encrypted base, and
    /// merged ones. Up to this, logs are folded at a time.
    pub(super) log_bytes: ByteLen,
    /// Logs of which too little is needed still, the one with the least last.
    pub(super) sparse: Vec<LogId>,
    /// The merged indexes of its logs.
    pub(super) levels: Keeper,
    _lock: Lock,
}

/// Small enough to be written anew in a few seconds.
const LOG_BYTES: ByteLen = ByteLen::new(256 << 20);

/// Whether what is in memory is what is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Sound,
    /// A catalogue was replaced, and whether that lasts is unknown.
    Lost,
}

/// What a commit made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Committed {
    /// The last epoch that is in the store now.
    pub epoch: Epoch,
    /// The log that brought it; `None` for a raw base.
    pub log: Option<LogId>,
    /// The recovery points that can be had from now on, with what an encrypted volume's
    /// catalogue leaves out.
    pub points: Vec<Point>,
    /// What was written for it, in bytes.
    pub bytes: ByteLen,
}

const OPEN: &str = "open the volume for writing";

impl Store {
    /// Opens a volume for writing, and puts right what a crash left behind.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process writes to it; [`ErrorKind::Key`] if it is encrypted and the
    /// key is missing or another, or it is not and one was given; [`ErrorKind::NotFound`];
    /// [`ErrorKind::Damaged`] if neither copy of the catalogue can be used.
    pub fn volume_writer(&self, id: VolumeId, key: Option<VolumeKey>) -> Result<VolumeWriter> {
        if key.is_none() {
            let catalogue = catalogue_file::load(&self.volume_folder(id))?.catalogue;
            check_key_given(&catalogue, key.as_ref())?;
        }
        self.open_writer(id, key)
    }

    /// Opens a volume for its upkeep alone: retention, folding, dropping a point. For that an
    /// encrypted one needs no key; frames are then moved as they are, and those of which little is
    /// needed still wait for a writer with the key.
    ///
    /// # Errors
    /// Those of [`Store::volume_writer`], the key's aside.
    pub fn volume_keeper(&self, id: VolumeId) -> Result<VolumeWriter> {
        self.open_writer(id, None)
    }

    /// Whether the primary of a generation may write to a volume.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] if the volume was promoted since, naming where and when;
    /// [`ErrorKind::Foreign`] if two generations of one number are about.
    pub fn check_generation(&self, id: VolumeId, generation: Generation) -> Result<()> {
        fence::check(
            &catalogue_file::load(&self.volume_folder(id))?.catalogue,
            generation,
        )
    }

    /// Opens a volume for writing, as [`Store::volume_writer`] does, for the primary of one
    /// generation.
    ///
    /// # Errors
    /// As there; [`ErrorKind::Fenced`] if the volume was promoted since, naming where and when;
    /// [`ErrorKind::Foreign`] if two generations of one number are about.
    pub fn volume_writer_of(
        &self,
        id: VolumeId,
        key: Option<VolumeKey>,
        generation: Generation,
    ) -> Result<VolumeWriter> {
        // Who took over may hold the lock: what is to be said then is that, not "busy".
        self.check_generation(id, generation)?;
        let writer = self.volume_writer(id, key)?;
        fence::check(&writer.catalogue, generation)?;
        Ok(writer)
    }

    fn open_writer(&self, id: VolumeId, key: Option<VolumeKey>) -> Result<VolumeWriter> {
        let folder = self.volume_folder(id);
        // Before the lock, which would make its file in a folder that is none of a volume.
        catalogue_file::load(&folder)?;
        let lock = Lock::take(&folder.lock(), OPEN)?;
        let loaded = catalogue_file::load(&folder)?;
        check_key(&loaded.catalogue, key.as_ref(), OPEN)?;
        let mut writer = VolumeWriter {
            folder,
            catalogue: loaded.catalogue,
            sequence: loaded.sequence,
            key,
            options: LogOptions::default(),
            trust: Trust::Sound,
            log_bytes: LOG_BYTES,
            sparse: Vec::new(),
            levels: Keeper::default(),
            _lock: lock,
        };
        if loaded.stale.is_some() {
            writer.save(writer.catalogue.clone())?;
        }
        recover::clean(&mut writer)?;
        Ok(writer)
    }
}

/// The error for an encrypted volume that is to be read or written without a key.
pub(super) fn key_missing(catalogue: &Catalogue, operation: &'static str) -> Error {
    let key = catalogue.key.unwrap_or_default();
    Error::new(ErrorKind::Key, operation)
        .volume(catalogue.volume)
        .detail(format!(
            "it is encrypted with key {key}, and no key was given"
        ))
        .advice("give it with --key-file")
}

/// Whether a given key is the volume's; a missing one is the caller's to judge.
pub(super) fn check_key(
    catalogue: &Catalogue,
    key: Option<&VolumeKey>,
    operation: &'static str,
) -> Result<()> {
    let Some(given) = key.map(VolumeKey::key_id) else {
        return Ok(());
    };
    let error = Error::new(ErrorKind::Key, operation).volume(catalogue.volume);
    match catalogue.key {
        Some(key) if key == given => Ok(()),
        Some(key) => Err(error.detail(format!(
            "it is encrypted with key {key}, the one given is {given}"
        ))),
        None => Err(error
            .detail("a key was given, and the volume is not encrypted")
            .advice("leave --key-file away")),
    }
}

/// Whether the volume can be written to: an encrypted one not without the key.
fn check_key_given(catalogue: &Catalogue, key: Option<&VolumeKey>) -> Result<()> {
    match (catalogue.key, key) {
        (Some(_), None) => Err(key_missing(catalogue, OPEN)),
        _ => Ok(()),
    }
}

impl VolumeWriter {
    /// What the store holds of the volume now.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Whether frames of the epochs to come are compressed; they are not unless asked for.
    pub fn set_compression(&mut self, compression: Compression) {
        self.options.compression = compression;
    }

    /// Begins the first full copy. Whatever an interrupted one left is gone.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if there is a complete one: later copies are epochs, so that the points
    /// before them stay.
    pub fn begin_baseline(&mut self) -> Result<Baseline<'_>> {
        self.usable()?;
        check_key_given(&self.catalogue, self.key.as_ref())?;
        if self.catalogue.base.is_some() {
            return Err(Error::new(ErrorKind::State, "begin the first full copy")
                .volume(self.catalogue.volume)
                .detail("the volume has one")
                .advice("deliver what differs as an epoch"));
        }
        Baseline::begin(self)
    }

    /// Begins the next epoch, of records that were read some time after they changed. One at a
    /// time: only the first that is committed follows the catalogue as it is now.
    ///
    /// # Errors
    /// [`ErrorKind::State`] before the first full copy; what the system refuses.
    pub fn begin_epoch(&self) -> Result<EpochLog> {
        self.begin_epoch_in(RecordOrder::AsRead)
    }

    /// Begins the next epoch, as [`VolumeWriter::begin_epoch`] does. With
    /// [`RecordOrder::AsCompleted`] the caller promises what that says of the records that will
    /// be appended; each of them is a moment that can be restored once the epoch is committed.
    ///
    /// # Errors
    /// As [`VolumeWriter::begin_epoch`].
    pub fn begin_epoch_in(&self, order: RecordOrder) -> Result<EpochLog> {
        self.usable()?;
        check_key_given(&self.catalogue, self.key.as_ref())?;
        if self.catalogue.base.is_none() {
            return Err(Error::new(ErrorKind::State, "begin an epoch")
                .volume(self.catalogue.volume)
                .detail("the volume has no first full copy yet"));
        }
        let begun = self.begin_log(&self.catalogue, order);
        begun.map_err(|e| lease::explain_full(&self.folder, e))
    }

    /// The header of the log that follows `catalogue`.
    pub(super) fn next_header(
        &self,
        catalogue: &Catalogue,
        order: RecordOrder,
    ) -> Result<LogHeader> {
        let log =
            LogId::random().map_err(|e| Error::new(ErrorKind::Io, "begin a log").source(e))?;
        let head = catalogue.head();
        Ok(LogHeader {
            log,
            previous: head.map(|link| link.log),
            previous_seal: head.map(|link| link.seal),
            stands_for: None,
            volume: catalogue.volume,
            generation: catalogue.generation.generation(),
            epochs: EpochRange::single(catalogue.last_epoch().next()),
            order,
            block: catalogue.block,
            sector: catalogue.sector,
            volume_size: catalogue.size,
            created: Timestamp::now(),
            key: catalogue.key,
        })
    }

    pub(super) fn begin_log(&self, catalogue: &Catalogue, order: RecordOrder) -> Result<EpochLog> {
        let header = self.next_header(catalogue, order)?;
        EpochLog::create(&self.folder, header, &self.options, self.key.as_ref())
    }

    /// Seals an epoch and takes it in. When this returns the epoch is durable, and its
    /// points can be had.
    ///
    /// # Errors
    /// [`ErrorKind::Foreign`] if it does not follow the last log here; [`ErrorKind::Full`] and others
    /// of the system's. The store is then as before, and the epoch must be written again.
    /// After [`ErrorKind::State`], which says so, the volume must be opened again.
    pub fn commit(&mut self, epoch: EpochLog) -> Result<Committed> {
        self.usable()?;
        let sealed = epoch
            .seal()
            .map_err(|e| lease::explain_full(&self.folder, e))?;
        let taken = self.take_in(&sealed);
        if taken.is_err() && self.trust == Trust::Sound {
            // Nothing names it, wherever it got to.
            let _ = durable::remove(&self.folder.incoming_log(&sealed.name));
            let _ = durable::remove(&self.folder.log(&sealed.name));
        }
        taken.map_err(|e| lease::explain_full(&self.folder, e))
    }

    fn take_in(&mut self, sealed: &SealedEpoch) -> Result<Committed> {
        ingest::check_next(&self.catalogue, &sealed.header)?;
        let (entry, mut points) = ingest::added(&self.catalogue, sealed)?;
        for point in &points {
            lease::prepare(&self.folder.point_lease(point.id))?;
        }
        self.place(sealed)?;
        durable::sync_folder(&self.folder.logs())?;
        let mut next = self.catalogue.clone();
        next.size = entry.size;
        next.logs.push(entry);
        next.points.extend(points.iter().cloned());
        self.save(next)?;
        ingest::reveal(&mut points, &sealed.tags);
        Ok(Committed {
            epoch: entry.last,
            log: Some(entry.log),
            points,
            bytes: entry.bytes,
        })
    }

    /// Moves a sealed log to where the catalogue will look for it.
    pub(super) fn place(&self, sealed: &SealedEpoch) -> Result<()> {
        let (from, to) = (
            self.folder.incoming_log(&sealed.name),
            self.folder.log(&sealed.name),
        );
        durable::rename(&from, &to)
    }

    /// Makes `next` the catalogue. Durable when it returns.
    pub(super) fn save(&mut self, next: Catalogue) -> Result<()> {
        let sequence = self.sequence + 1;
        match catalogue_file::save(&self.folder, &next, sequence) {
            Ok(()) => {
                self.catalogue = next;
                self.sequence = sequence;
                Ok(())
            }
            Err(Replaced::None(error)) => Err(error),
            Err(Replaced::Unknown(error)) => {
                self.trust = Trust::Lost;
                Err(error)
            }
        }
    }

    pub(super) fn usable(&self) -> Result<()> {
        match self.trust {
            Trust::Sound => Ok(()),
            Trust::Lost => Err(Error::new(ErrorKind::State, "write to the volume")
                .volume(self.catalogue.volume)
                .detail("an earlier change of the catalogue failed halfway")
                .advice("open the volume again")),
        }
    }

    /// The expired points that readers hold, and so hold the room of the logs behind them.
    pub fn leased_points(&self) -> Result<Vec<PointId>> {
        lease::held_points(&self.folder, &self.catalogue)
    }
}
