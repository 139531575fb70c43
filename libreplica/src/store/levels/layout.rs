//! Every byte of a level file, as docs/store.md has them in tables: one page of header, pages
//! of entries by ascending offset, and pages of fences, with which the page that holds an
//! offset is found as in a tree. All little-endian; each page is checked on its own.

use std::fmt;

use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, FrameNumber, VolumeSize};
use hrl_format::{DataOffset, ExtentKind, IndexEntry, Piece, SourceNumber};
use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::store::catalogue::LogEntry;
use hrl_format::id::VolumeId;
use hrl_format::layout::MAX_DATA;

/// Every part of the file begins at a multiple of this.
pub(super) const PAGE: usize = 4096;
/// What a page has room for, before its footer.
const PAYLOAD: usize = PAGE - size_of::<Footer>();
/// How many entries a page holds, the last one aside.
pub(super) const ENTRIES: u64 = (PAYLOAD / size_of::<RawEntry>()) as u64;
/// How many fences a page holds, the last one of a row aside.
pub(super) const FENCES: u64 = (PAYLOAD / size_of::<U64>()) as u64;
/// The longest extent an entry can have; longer ones become several.
const LONGEST: u64 = 1 << 43;

const MAGIC: [u8; 8] = *b"\x89HLVL\r\n\x1a";
const VERSION: u32 = 1;
const LENGTH_BITS: u32 = 44;
const LOG_BITS: u32 = 30;
/// The checksum of a page stands in its last four bytes.
const SUMMED: usize = PAGE - size_of::<U32>();

/// One page of a file.
pub(super) type Page = [u8; PAGE];

/// Which logs a file is made of: SHA-256 over the volume's id, and each log's id and seal's
/// digest, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::store) struct Run(pub(super) [u8; 32]);

impl Run {
    pub(super) fn of(volume: VolumeId, logs: &[LogEntry]) -> Self {
        let mut digest = Sha256::new();
        digest.update(volume.as_bytes());
        for log in logs {
            digest.update(log.log.as_bytes());
            digest.update(log.seal.as_bytes());
        }
        Self(digest.finalize().into())
    }

    /// What the pages bear of it, and the file's name.
    pub(super) fn short(&self) -> [u8; 16] {
        let mut short = [0; 16];
        short.copy_from_slice(&self.0[..16]);
        short
    }
}

/// In hex, all of it.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) volume: VolumeId,
    pub(super) run: Run,
    pub(super) level: u32,
    /// How many logs it was made of.
    pub(super) logs: u64,
    pub(super) first: Epoch,
    pub(super) last: Epoch,
    /// The volume's size at the end of the last log.
    pub(super) size: VolumeSize,
    pub(super) entries: u64,
}

/// The first page.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    page: U32,
    volume: [u8; 16],
    run: [u8; 32],
    level: U32,
    reserved: U32,
    logs: U64,
    first_epoch: U64,
    last_epoch: U64,
    volume_size: U64,
    entries: U64,
    rest: [u8; 3980],
    crc: U32,
}

const _: () = assert!(size_of::<RawHead>() == PAGE);

/// What every other page ends with.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Footer {
    run: [u8; 16],
    kind: [u8; 4],
    number: U32,
    used: U32,
    crc: U32,
}

/// An entry: which bytes of the volume, and which log says where they are.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawEntry {
    offset: U64,
    /// The length in the lower 44 bits; above them where in the frame's data it begins.
    length_at: U64,
    frame: U32,
    /// Which log of the run in the lower 30 bits; above them the kind.
    log_kind: U32,
}

const _: () = assert!(size_of::<RawEntry>() == 24);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Entries,
    Fences,
}

impl Kind {
    const fn code(self) -> [u8; 4] {
        match self {
            Self::Entries => *b"LENT",
            Self::Fences => *b"LFEN",
        }
    }
}

impl Head {
    pub(super) fn encode(&self) -> Box<Page> {
        let mut raw = RawHead::new_zeroed();
        raw.magic = MAGIC;
        raw.version.set(VERSION);
        raw.page.set(PAGE as u32);
        raw.volume = *self.volume.as_bytes();
        raw.run = self.run.0;
        raw.level.set(self.level);
        raw.logs.set(self.logs);
        raw.first_epoch.set(self.first.get());
        raw.last_epoch.set(self.last.get());
        raw.volume_size.set(self.size.get());
        raw.entries.set(self.entries);
        raw.crc.set(crc32fast::hash(&raw.as_bytes()[..SUMMED]));
        let mut page = Box::new([0; PAGE]);
        page.copy_from_slice(raw.as_bytes());
        page
    }

    /// Reads a header; says what is wrong with it if it is none.
    pub(super) fn decode(page: &Page) -> Result<Self, &'static str> {
        let raw = RawHead::ref_from_bytes(page).map_err(|_| "the header is not one page long")?;
        if raw.magic != MAGIC {
            return Err("it is no level file");
        }
        if raw.crc.get() != crc32fast::hash(&page[..SUMMED]) {
            return Err("the checksum of its header does not agree");
        }
        if raw.version.get() != VERSION || raw.page.get() != PAGE as u32 {
            return Err("it is of another version");
        }
        if raw.reserved.get() != 0 || raw.rest != [0; 3980] {
            return Err("its header holds what this version does not know");
        }
        Ok(Self {
            volume: VolumeId::from_bytes(raw.volume),
            run: Run(raw.run),
            level: raw.level.get(),
            logs: raw.logs.get(),
            first: Epoch::new(raw.first_epoch.get()),
            last: Epoch::new(raw.last_epoch.get()),
            size: VolumeSize::new(raw.volume_size.get()),
            entries: raw.entries.get(),
        })
    }

    /// How many pages the entries take, and each row of fences, the lowest first; the last row
    /// is one page, unless there is but one page of entries.
    pub(super) fn rows(&self) -> Vec<u64> {
        let mut rows = vec![self.entries.div_ceil(ENTRIES)];
        let mut pages = rows[0];
        while pages > 1 {
            pages = pages.div_ceil(FENCES);
            rows.push(pages);
        }
        rows
    }
}

/// Fills in the footer behind `used` bytes of payload.
pub(super) fn close(page: &mut Page, run: &Run, kind: Kind, number: u32, used: usize) {
    let mut footer = Footer {
        run: run.short(),
        kind: kind.code(),
        number: number.into(),
        used: (used as u32).into(),
        crc: 0.into(),
    };
    page[used..PAYLOAD].fill(0);
    page[PAYLOAD..].copy_from_slice(footer.as_bytes());
    footer.crc.set(crc32fast::hash(&page[..SUMMED]));
    page[PAYLOAD..].copy_from_slice(footer.as_bytes());
}

/// The payload of a page that must be this one and hold `used` bytes.
fn payload<'a>(
    page: &'a Page,
    run: &Run,
    kind: Kind,
    number: u64,
    used: usize,
) -> Result<&'a [u8], &'static str> {
    let footer = Footer::ref_from_bytes(&page[PAYLOAD..]).map_err(|_| "a page has no footer")?;
    if footer.crc.get() != crc32fast::hash(&page[..SUMMED]) {
        return Err("the checksum of a page does not agree");
    }
    let is_it = footer.run == run.short()
        && footer.kind == kind.code()
        && u64::from(footer.number) == number
        && footer.used.get() as usize == used;
    if is_it {
        page.get(..used)
            .ok_or("a page is fuller than a page can be")
    } else {
        Err("a page belongs elsewhere")
    }
}

/// The fences of a page: with what offset each page below begins.
pub(super) fn fences<'a>(
    page: &'a Page,
    run: &Run,
    number: u64,
    count: u64,
) -> Result<&'a [U64], &'static str> {
    let used = count as usize * size_of::<U64>();
    let payload = payload(page, run, Kind::Fences, number, used)?;
    <[U64]>::ref_from_bytes(payload).map_err(|_| "a page of fences is cut")
}

/// The entries of a page.
pub(super) fn entries<'a>(
    page: &'a Page,
    run: &Run,
    number: u64,
    count: u64,
) -> Result<&'a [RawEntry], &'static str> {
    let used = count as usize * size_of::<RawEntry>();
    let payload = payload(page, run, Kind::Entries, number, used)?;
    <[RawEntry]>::ref_from_bytes(payload).map_err(|_| "a page of entries is cut")
}

impl RawEntry {
    /// Of a piece whose source is the number of a log in the run.
    pub(super) fn of(piece: &Piece) -> Self {
        let entry = &piece.entry;
        let kind: u32 = match entry.kind {
            ExtentKind::Write => 1,
            ExtentKind::Zeroes => 2,
            ExtentKind::Discard => 3,
        };
        let at = u64::from(entry.at.get());
        Self {
            offset: entry.extent.offset().get().into(),
            length_at: (entry.extent.len().get() | at << LENGTH_BITS).into(),
            frame: entry.frame.get().into(),
            log_kind: (piece.source.get() as u32 | kind << LOG_BITS).into(),
        }
    }

    pub(super) fn offset(&self) -> ByteOffset {
        ByteOffset::new(self.offset.get())
    }

    /// What it says, if it can say so: of one of `logs` logs, of a volume of `size`.
    pub(super) fn piece(&self, logs: u64, size: VolumeSize) -> Option<Piece> {
        let (length_at, log_kind) = (self.length_at.get(), self.log_kind.get());
        let len = length_at & ((1 << LENGTH_BITS) - 1);
        let at = length_at >> LENGTH_BITS;
        let extent = Extent::new(self.offset(), ByteLen::new(len))?;
        let kind = match log_kind >> LOG_BITS {
            1 => ExtentKind::Write,
            2 => ExtentKind::Zeroes,
            3 => ExtentKind::Discard,
            _ => return None,
        };
        let placed = match kind {
            ExtentKind::Write => at + len <= MAX_DATA as u64,
            ExtentKind::Zeroes | ExtentKind::Discard => at == 0,
        };
        let log = log_kind & ((1 << LOG_BITS) - 1);
        let sound = placed && len > 0 && u64::from(log) < logs && extent.end().get() <= size.get();
        let entry = IndexEntry {
            extent,
            kind,
            frame: FrameNumber::new(self.frame.get()),
            at: DataOffset::new(u32::try_from(at).ok()?),
        };
        let source = SourceNumber::new(log as usize);
        sound.then_some(Piece { source, entry })
    }
}

/// Cuts what is longer than an entry can say.
pub(super) fn parts(piece: Piece) -> impl Iterator<Item = Piece> {
    let extent = piece.extent();
    let count = extent.len().get().div_ceil(LONGEST);
    (0..count).filter_map(move |n| {
        let start = ByteOffset::new(extent.offset().get() + n * LONGEST);
        let end = extent.end().get().min(start.get().saturating_add(LONGEST));
        let entry = piece
            .entry
            .clip(Extent::between(start, ByteOffset::new(end)))?;
        Some(Piece { entry, ..piece })
    })
}
