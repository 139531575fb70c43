//! The words that tracker and BPF programs share, beside the bitmaps: whose pins these are
//! and which disk they watch, which bitmap is active, and counters. The order is that of
//! `struct state` in `bpf/track.bpf.c`.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::Layout;
use crate::capture::counters::WidenCause;
use crate::capture::spec::{AttachSpec, FolderId};
use crate::device::{DevNo, DiskSeq, Queue};
use crate::geometry::Geometry;
use crate::id::VolumeId;
use crate::sys::memory::SharedWords;
use crate::units::{BlockSize, SectorSize, VolumeSize};

/// "HRLTRACK".
const MAGIC: u64 = u64::from_be_bytes(*b"HRLTRACK");
/// Changes with the programs' behaviour and with the words' meaning.
pub(super) const VERSION: u64 = 3;
/// How many words there are.
pub(super) const WORDS: usize = 88;
/// The kernel's unit of sectors.
const SECTOR_SHIFT: u32 = 9;
/// The parts of the bitmap map: two that take marks in turn, and the epoch's.
pub(super) const PARTS: usize = 3;
/// The part that only user space touches.
pub(super) const EPOCH: usize = 2;

/// A word's place.
#[cfg_attr(
    not(feature = "ebpf"),
    allow(dead_code, reason = "for those who attach")
)]
#[derive(Clone, Copy)]
#[repr(usize)]
pub(super) enum Word {
    Magic = 0,
    Version = 1,
    Major = 2,
    Minor = 3,
    Diskseq = 4,
    Sectors = 5,
    BlockShift = 6,
    Level1 = 7,
    Level2 = 8,
    Stride = 9,
    Completion = 10,
    Volume = 11,
    Folder = 13,
    Name = 15,
    SectorSize = 19,
    Settings = 20,
    Active = 24,
    Probing = 25,
    NotedMisses = 26,
    NotedCauses = 29,
    Widened = 37,
    SurplusBounded = 46,
    SurplusBound = 47,
    Submitted = 48,
    SubmittedSectors = 49,
    Completed = 56,
    CompletedSectors = 57,
    Requests = 64,
    RequestSectors = 65,
    Stale = 66,
    StaleSectors = 67,
    Causes = 72,
    ProbeSubmitted = 80,
    ProbeCompleted = 81,
    ProbeRequests = 82,
}

/// How many of [`WidenCause::ALL`] the programs themselves count.
pub(super) const PROGRAM_CAUSES: usize = 6;

/// The shared words, typed.
#[derive(Debug)]
pub(super) struct State {
    words: SharedWords,
}

/// Whose pins these are, and what they watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub volume: VolumeId,
    pub folder: FolderId,
    pub name: String,
    pub devno: DevNo,
    pub diskseq: DiskSeq,
    pub geometry: Geometry,
    pub queue: Queue,
}

impl Identity {
    pub(super) fn of(spec: &AttachSpec) -> Self {
        Self {
            volume: spec.volume,
            folder: spec.folder,
            name: spec.disk.name().to_owned(),
            devno: spec.disk.devno(),
            diskseq: spec.disk.diskseq(),
            geometry: spec.geometry(),
            queue: spec.disk.queue(),
        }
    }

    pub(super) const fn layout(&self) -> Layout {
        Layout::for_blocks(self.geometry.blocks())
    }
}

/// Sixteen bytes as two words.
#[cfg_attr(
    not(feature = "ebpf"),
    allow(dead_code, reason = "for those who attach")
)]
fn pair(bytes: &[u8; 16]) -> [u64; 2] {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    [word(0), word(8)]
}

impl State {
    pub(super) const fn new(words: SharedWords) -> Self {
        Self { words }
    }

    pub(super) fn at(&self, word: Word, index: usize) -> &AtomicU64 {
        &self.words.words()[word as usize + index]
    }

    pub(super) fn get(&self, word: Word) -> u64 {
        self.at(word, 0).load(Ordering::Acquire)
    }

    pub(super) fn set(&self, word: Word, value: u64) {
        self.at(word, 0).store(value, Ordering::Release);
    }

    #[cfg_attr(
        not(feature = "ebpf"),
        allow(dead_code, reason = "for those who attach")
    )]
    fn set_all(&self, word: Word, values: &[u64]) {
        for (i, &value) in values.iter().enumerate() {
            self.at(word, i).store(value, Ordering::Release);
        }
    }

    fn bytes<const N: usize>(&self, word: Word) -> [u8; N] {
        std::array::from_fn(|i| {
            let value = self.at(word, i / 8).load(Ordering::Acquire);
            value.to_le_bytes()[i % 8]
        })
    }

    /// Writes who and what; the magic last.
    #[cfg_attr(
        not(feature = "ebpf"),
        allow(dead_code, reason = "for those who attach")
    )]
    pub(super) fn set_identity(&self, identity: &Identity) {
        let layout = identity.layout();
        let geometry = identity.geometry;
        self.set(Word::Version, VERSION);
        self.set(Word::Major, u64::from(identity.devno.major));
        self.set(Word::Minor, u64::from(identity.devno.minor));
        self.set(Word::Diskseq, identity.diskseq.get());
        self.set(Word::Sectors, geometry.size.get() >> SECTOR_SHIFT);
        self.set(
            Word::BlockShift,
            u64::from(geometry.block.shift() - SECTOR_SHIFT),
        );
        self.set(Word::Level1, layout.level1() as u64);
        self.set(Word::Level2, layout.level2() as u64);
        self.set(Word::Stride, layout.words() as u64);
        let completion = match identity.queue {
            Queue::Requests => 1,
            Queue::Bios => 2,
        };
        self.set(Word::Completion, completion);
        self.set_all(Word::Volume, &pair(identity.volume.as_bytes()));
        self.set_all(Word::Folder, &pair(identity.folder.as_bytes()));
        let mut name = [0; 32];
        let len = identity.name.len().min(name.len());
        name[..len].copy_from_slice(&identity.name.as_bytes()[..len]);
        for (i, half) in name.as_chunks::<16>().0.iter().enumerate() {
            self.at(Word::Name, i * 2)
                .store(pair(half)[0], Ordering::Release);
            self.at(Word::Name, i * 2 + 1)
                .store(pair(half)[1], Ordering::Release);
        }
        self.set(Word::SectorSize, u64::from(geometry.sector.get()));
        self.set(Word::Magic, MAGIC);
    }

    /// The version these words are of; `None` if they are not a tracker's.
    pub(super) fn version(&self) -> Option<u64> {
        (self.get(Word::Magic) == MAGIC).then(|| self.get(Word::Version))
    }

    /// Who and what; `None` if it makes no sense. Only for [`VERSION`].
    pub(super) fn identity(&self) -> Option<Identity> {
        let small = |word| u32::try_from(self.get(word)).ok();
        let name: [u8; 32] = self.bytes(Word::Name);
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let block = 1_u32.checked_shl(small(Word::BlockShift)?.checked_add(SECTOR_SHIFT)?)?;
        let identity = Identity {
            volume: VolumeId::from_bytes(self.bytes(Word::Volume)),
            folder: FolderId::from_bytes(self.bytes(Word::Folder)),
            name: String::from_utf8_lossy(name).into_owned(),
            devno: DevNo {
                major: small(Word::Major)?,
                minor: small(Word::Minor)?,
            },
            diskseq: DiskSeq::new(self.get(Word::Diskseq)),
            geometry: Geometry {
                size: VolumeSize::new(self.get(Word::Sectors).checked_shl(SECTOR_SHIFT)?),
                block: BlockSize::new(block)?,
                sector: SectorSize::new(small(Word::SectorSize)?)?,
            },
            queue: match self.get(Word::Completion) {
                1 => Queue::Requests,
                2 => Queue::Bios,
                _ => return None,
            },
        };
        let fits = self.get(Word::Stride) == identity.layout().words() as u64;
        fits.then_some(identity)
    }

    /// Which part takes the marks now.
    pub(super) fn active(&self) -> usize {
        (self.get(Word::Active) & 1) as usize
    }

    /// Counts what the programs count for an operation that changes data somewhere.
    pub(super) fn count_unknown_operation(&self) {
        let index = WidenCause::ALL
            .iter()
            .position(|&one| one == WidenCause::UnknownOperation)
            .unwrap_or_default();
        self.at(Word::Causes, index).fetch_add(1, Ordering::AcqRel);
    }

    /// Counts that the volume was widened.
    pub(super) fn count_widening(&self, cause: WidenCause) {
        let index = WidenCause::ALL
            .iter()
            .position(|&one| one == cause)
            .unwrap_or_default();
        self.at(Word::Widened, index).fetch_add(1, Ordering::AcqRel);
    }
}
