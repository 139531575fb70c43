//! The header: which log of which volume this is, and which log came before it.

use std::fmt;

use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{Generation, GenerationId, KeyId, LogId, VolumeId};
use crate::layout::{
    FEATURE_ENCRYPTED, FEATURE_IN_ORDER, FEATURE_LZ4, FEATURE_MOVED, FEATURES_KNOWN, HEADER_MAGIC,
    PAGE, PAGE_SUMMED, RawHeader, VERSION,
};
use crate::units::{
    BlockSize, Epoch, FileOffset, GenerationNumber, SectorSize, Timestamp, VolumeSize,
};

/// SHA-256 over a log's trailer: names the sealed log with all that it holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SealDigest([u8; 32]);

impl SealDigest {
    /// From its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn of(trailer: &[u8]) -> Self {
        Self(Sha256::digest(trailer).into())
    }

    /// As it stands in a file, where all zeroes mean "none".
    pub(crate) fn from_raw(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then_some(Self(bytes))
    }
}

impl fmt::Display for SealDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SealDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealDigest({self})")
    }
}

/// The epochs whose changes a log holds, both ends included: one, unless it was merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EpochRange {
    /// The first.
    pub first: Epoch,
    /// The last.
    pub last: Epoch,
}

impl EpochRange {
    /// One epoch.
    pub const fn single(epoch: Epoch) -> Self {
        Self {
            first: epoch,
            last: epoch,
        }
    }
}

/// What the order of a log's records says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RecordOrder {
    /// Nothing: blocks were read some time after they changed. Only the state after the last
    /// record is one that the volume had.
    #[default]
    AsRead,
    /// They are all changes of the epoch in the order in which they completed, each with the
    /// time of its completion; the first follows the state in which the log before this one
    /// ends. So the volume was what the records up to any one of them leave behind.
    AsCompleted,
}

impl RecordOrder {
    /// As it stands in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AsRead => "as-read",
            Self::AsCompleted => "as-completed",
        }
    }
}

impl fmt::Display for RecordOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A log by its id, and by its seal if it had one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChainEnd {
    /// Which log.
    pub log: LogId,
    /// Its seal; `None` if it was never sealed.
    pub seal: Option<SealDigest>,
}

/// What a log says of itself in its first page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// This log.
    pub log: LogId,
    /// The log before it in the chain; `None` for the first.
    pub previous: Option<LogId>,
    /// The seal of the log before it, if it is known.
    pub previous_seal: Option<SealDigest>,
    /// The log whose place this one takes for the log that follows: the last of those it
    /// was merged from, or the torn one it was salvaged from.
    pub stands_for: Option<ChainEnd>,
    /// Whose changes.
    pub volume: VolumeId,
    /// Under which generation they were made.
    pub generation: Generation,
    /// Which epochs.
    pub epochs: EpochRange,
    /// What the order of its records says; as completed only in a log of one epoch.
    pub order: RecordOrder,
    /// What one dirty bit covered.
    pub block: BlockSize,
    /// What the device reads and writes at least.
    pub sector: SectorSize,
    /// The volume's size before the first record.
    pub volume_size: VolumeSize,
    /// When the log was begun.
    pub created: Timestamp,
    /// What it is encrypted with; `None` if it is not. The writer fills it in.
    pub key: Option<KeyId>,
}

/// What else the header's features say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub lz4: bool,
    pub moved: bool,
}

/// The first 16 bytes of SHA-256 over the header page, which a frame's origin bears.
pub(crate) type HeaderDigest = [u8; 16];

/// A header page with what was read from it.
pub(crate) struct HeaderPage {
    pub header: LogHeader,
    pub features: Features,
    pub digest: HeaderDigest,
    pub page: Box<[u8; PAGE]>,
}

impl HeaderPage {
    /// Reads a header page.
    pub(crate) fn decode(page: Box<[u8; PAGE]>) -> Result<Self> {
        let (header, features) = parse(&page).map_err(|error| error.at(FileOffset::ZERO))?;
        Ok(Self {
            header,
            features,
            digest: header_digest(&*page),
            page,
        })
    }
}

fn header_digest(page: &[u8]) -> HeaderDigest {
    let mut digest = [0; 16];
    digest.copy_from_slice(&Sha256::digest(page)[..16]);
    digest
}

impl LogHeader {
    /// The header of a new log that follows none: with a new id, created now, block and
    /// sector at their defaults, the generation nil.
    ///
    /// # Errors
    /// [`ErrorKind::Random`].
    pub fn new(volume: VolumeId, volume_size: VolumeSize, epoch: Epoch) -> Result<Self> {
        Ok(Self {
            log: LogId::random()?,
            previous: None,
            previous_seal: None,
            stands_for: None,
            volume,
            generation: Generation::default(),
            epochs: EpochRange::single(epoch),
            order: RecordOrder::AsRead,
            block: BlockSize::default_for(volume_size),
            sector: SectorSize::B512,
            volume_size,
            created: Timestamp::now(),
            key: None,
        })
    }

    pub(crate) fn encode(&self, features: Features) -> Result<HeaderPage> {
        if self.log.is_nil() || self.epochs.first > self.epochs.last {
            return Err(Error::invalid("a log needs an id, and epochs in order"));
        }
        if self.order == RecordOrder::AsCompleted && self.epochs.first != self.epochs.last {
            return Err(Error::invalid("a log in order holds one epoch"));
        }
        let mut raw = RawHeader::new_zeroed();
        raw.magic = HEADER_MAGIC;
        raw.version.set(VERSION);
        raw.page.set(PAGE as u32);
        let bit = |on: bool, feature: u64| if on { feature } else { 0 };
        let in_order = self.order == RecordOrder::AsCompleted;
        raw.compatible.set(bit(in_order, FEATURE_IN_ORDER));
        raw.incompatible.set(
            bit(features.lz4, FEATURE_LZ4)
                | bit(self.key.is_some(), FEATURE_ENCRYPTED)
                | bit(features.moved, FEATURE_MOVED),
        );
        raw.log = *self.log.as_bytes();
        raw.previous = *self.previous.unwrap_or_default().as_bytes();
        raw.volume = *self.volume.as_bytes();
        raw.generation.set(self.generation.number.get());
        raw.generation_id = *self.generation.id.as_bytes();
        raw.first_epoch.set(self.epochs.first.get());
        raw.last_epoch.set(self.epochs.last.get());
        raw.volume_size.set(self.volume_size.get());
        raw.block.set(self.block.get());
        raw.sector.set(self.sector.get());
        raw.created.set(self.created.as_nanos());
        raw.key = *self.key.unwrap_or_default().as_bytes();
        raw.previous_seal = self.previous_seal.map_or([0; 32], |seal| seal.0);
        if let Some(end) = self.stands_for {
            raw.stands_for = *end.log.as_bytes();
            raw.stands_for_seal = end.seal.map_or([0; 32], |seal| seal.0);
        }
        raw.crc.set(crc32fast::hash(&raw.as_bytes()[..PAGE_SUMMED]));
        let mut page = Box::new([0; PAGE]);
        page.copy_from_slice(raw.as_bytes());
        Ok(HeaderPage {
            header: self.clone(),
            features,
            digest: header_digest(&*page),
            page,
        })
    }

    /// The log and the seal that the next log of the chain must name as before it, given
    /// this log's own seal.
    pub fn chain_end(&self, seal: SealDigest) -> ChainEnd {
        self.stands_for.unwrap_or(ChainEnd {
            log: self.log,
            seal: Some(seal),
        })
    }

    /// Whether `next` follows this log, sealed as `seal`: same volume, the log and the
    /// seal that it names as before it, the next epoch, a generation not older.
    ///
    /// # Errors
    /// [`ErrorKind::Chain`], saying what does not follow.
    pub fn check_followed_by(&self, seal: SealDigest, next: &Self) -> Result<()> {
        let end = self.chain_end(seal);
        let broken = if next.volume != self.volume {
            format!("volume {} follows volume {}", next.volume, self.volume)
        } else if next.previous != Some(end.log) {
            let named = next
                .previous
                .map_or("none".to_owned(), |log| log.to_string());
            format!("log {} follows {named}, not {}", next.log, end.log)
        } else if next.previous_seal.is_some() && next.previous_seal != end.seal {
            format!("log {} follows another seal of log {}", next.log, end.log)
        } else if next.epochs.first != self.epochs.last.next() {
            format!(
                "epoch {} follows epoch {}",
                next.epochs.first, self.epochs.last
            )
        } else if next.generation.number < self.generation.number
            || (next.generation.number == self.generation.number
                && next.generation.id != self.generation.id)
        {
            let (theirs, ours) = (next.generation, self.generation);
            format!(
                "generation {} {} follows generation {} {}",
                theirs.number, theirs.id, ours.number, ours.id
            )
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Chain, broken))
    }
}

fn parse(page: &[u8; PAGE]) -> Result<(LogHeader, Features)> {
    let raw = RawHeader::ref_from_bytes(page)
        .map_err(|_| Error::damaged("the header is not one page long"))?;
    if raw.magic != HEADER_MAGIC {
        let kind = ErrorKind::NotALog;
        return Err(Error::new(kind, "not a change log: it begins otherwise"));
    }
    // The version first: another version may keep its checksum elsewhere.
    if raw.version.get() != VERSION {
        let found = format!(
            "version {} of the format, and {VERSION} is known",
            raw.version
        );
        return Err(Error::new(ErrorKind::Unsupported, found));
    }
    if raw.crc.get() != crc32fast::hash(&page[..PAGE_SUMMED]) {
        return Err(Error::damaged("the header's checksum does not agree"));
    }
    let unknown = raw.incompatible.get() & !FEATURES_KNOWN;
    if unknown != 0 {
        let found = format!("features {unknown:#x}, which are not known");
        return Err(Error::new(ErrorKind::Unsupported, found));
    }
    let has = |feature: u64| raw.incompatible.get() & feature != 0;
    let order = match raw.compatible.get() & FEATURE_IN_ORDER {
        0 => RecordOrder::AsRead,
        _ => RecordOrder::AsCompleted,
    };
    let key = some_id(KeyId::from_bytes(raw.key), KeyId::is_nil);
    let stands_for = some_id(LogId::from_bytes(raw.stands_for), LogId::is_nil);
    let sound = raw.page.get() == PAGE as u32
        && raw.reserved.iter().all(|&byte| byte == 0)
        && raw.log != [0; 16]
        && raw.first_epoch <= raw.last_epoch
        && (order == RecordOrder::AsRead || raw.first_epoch == raw.last_epoch)
        && key.is_some() == has(FEATURE_ENCRYPTED)
        && (stands_for.is_some() || raw.stands_for_seal == [0; 32]);
    let (true, Some(block), Some(sector)) = (
        sound,
        BlockSize::new(raw.block.get()),
        SectorSize::new(raw.sector.get()),
    ) else {
        return Err(Error::damaged(
            "a field of the header is not what it may be",
        ));
    };
    let header = LogHeader {
        log: LogId::from_bytes(raw.log),
        previous: some_id(LogId::from_bytes(raw.previous), LogId::is_nil),
        previous_seal: SealDigest::from_raw(raw.previous_seal),
        stands_for: stands_for.map(|log| ChainEnd {
            log,
            seal: SealDigest::from_raw(raw.stands_for_seal),
        }),
        volume: VolumeId::from_bytes(raw.volume),
        generation: Generation {
            number: GenerationNumber::new(raw.generation.get()),
            id: GenerationId::from_bytes(raw.generation_id),
        },
        epochs: EpochRange {
            first: Epoch::new(raw.first_epoch.get()),
            last: Epoch::new(raw.last_epoch.get()),
        },
        order,
        block,
        sector,
        volume_size: VolumeSize::new(raw.volume_size.get()),
        created: Timestamp::from_nanos(raw.created.get()),
        key,
    };
    Ok((
        header,
        Features {
            lz4: has(FEATURE_LZ4),
            moved: has(FEATURE_MOVED),
        },
    ))
}

fn some_id<I>(id: I, is_nil: impl Fn(&I) -> bool) -> Option<I> {
    (!is_nil(&id)).then_some(id)
}
