//! The state that a log's records leave behind: which bytes of the volume come from
//! where. Kept while writing, sorted and disjoint; it becomes the sealed index.

use std::collections::BTreeMap;

use crate::units::{ByteLen, ByteOffset, Extent, FrameNumber, VolumeSize};

/// What reading an extent gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes from a frame.
    Write,
    /// Zeroes.
    Zeroes,
    /// Undefined: whatever suits the reader; an image has zeroes there.
    Discard,
}

/// The final state of one extent, as the sorted index has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IndexEntry {
    /// Which bytes of the volume.
    pub extent: Extent,
    /// What they are.
    pub kind: ExtentKind,
    /// The frame whose record says so.
    pub frame: FrameNumber,
    /// Where in the frame's plain data they begin; zero unless it is a write.
    pub at: DataOffset,
}

/// A position in a frame's plain data, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataOffset(u32);

impl DataOffset {
    /// Wraps the plain number.
    pub const fn new(at: u32) -> Self {
        Self(at)
    }

    /// The plain number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl IndexEntry {
    /// What is left of it within `extent`; `None` if nothing.
    pub fn clip(&self, extent: Extent) -> Option<Self> {
        let common = self.extent.intersect(extent)?;
        let skipped = common.offset().get() - self.extent.offset().get();
        Some(Self {
            extent: common,
            at: self.at_after(skipped),
            ..*self
        })
    }

    /// Where the bytes `skipped` after its start lie.
    fn at_after(&self, skipped: u64) -> DataOffset {
        match self.kind {
            ExtentKind::Write => DataOffset(self.at.0.wrapping_add(skipped as u32)),
            ExtentKind::Zeroes | ExtentKind::Discard => self.at,
        }
    }

    /// Whether `next` goes on where this one ends, in the volume and in the frame.
    pub(crate) fn continues_in(&self, next: &Self) -> bool {
        self.extent.end() == next.extent.offset()
            && self.kind == next.kind
            && self.frame == next.frame
            && self.at_after(self.extent.len().get()) == next.at
    }
}

/// A map from bytes of the volume to what they are, built record by record.
#[derive(Debug, Default)]
pub(crate) struct ExtentMap {
    // By the entry's offset. Entries are disjoint, and none continues in the next.
    entries: BTreeMap<u64, Held>,
}

/// An entry without its offset, in 16 bytes: there may be millions.
#[derive(Clone, Copy, Debug)]
struct Held {
    len: u64,
    frame: u32,
    // The kind in the upper two bits; a frame's data has far fewer than 2^30 bytes.
    at: u32,
}

impl Held {
    const KIND_SHIFT: u32 = 30;
    const ZEROES: u32 = 1 << Self::KIND_SHIFT;
    const DISCARD: u32 = 2 << Self::KIND_SHIFT;

    const fn new(entry: &IndexEntry) -> Self {
        let kind = match entry.kind {
            ExtentKind::Write => 0,
            ExtentKind::Zeroes => Self::ZEROES,
            ExtentKind::Discard => Self::DISCARD,
        };
        let (len, frame) = (entry.extent.len().get(), entry.frame.get());
        Self {
            len,
            frame,
            at: entry.at.0 | kind,
        }
    }

    fn entry(&self, offset: u64) -> IndexEntry {
        let start = ByteOffset::new(offset);
        // The end fits: it was taken from an extent.
        let end = start.checked_add(ByteLen::new(self.len)).unwrap_or(start);
        let kind = match self.at & !(Self::ZEROES - 1) {
            0 => ExtentKind::Write,
            Self::ZEROES => ExtentKind::Zeroes,
            _ => ExtentKind::Discard,
        };
        IndexEntry {
            extent: Extent::between(start, end),
            kind,
            frame: FrameNumber::new(self.frame),
            at: DataOffset(self.at & (Self::ZEROES - 1)),
        }
    }
}

impl ExtentMap {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = IndexEntry> + '_ {
        self.entries
            .iter()
            .map(|(&offset, held)| held.entry(offset))
    }

    /// Puts `new` over whatever is there.
    pub(crate) fn insert(&mut self, new: IndexEntry) {
        if new.extent.is_empty() {
            return;
        }
        self.cut(new.extent);
        let mut new = new;
        if let Some(before) = self.before(new.extent.offset())
            && before.continues_in(&new)
        {
            new = join(&before, &new);
        }
        if let Some(held) = self.entries.get(&new.extent.end().get()) {
            let after = held.entry(new.extent.end().get());
            if new.continues_in(&after) {
                self.entries.remove(&after.extent.offset().get());
                new = join(&new, &after);
            }
        }
        self.hold(&new);
    }

    /// The volume has another size: bytes past its new end are gone, new bytes undefined.
    pub(crate) fn resize(&mut self, old: VolumeSize, new: VolumeSize, frame: FrameNumber) {
        let end = |size: VolumeSize| ByteOffset::new(size.get());
        if new < old {
            self.cut(Extent::between(end(new), ByteOffset::new(u64::MAX)));
        } else {
            self.insert(IndexEntry {
                extent: Extent::between(end(old), end(new)),
                kind: ExtentKind::Discard,
                frame,
                at: DataOffset::default(),
            });
        }
    }

    /// The last entry that begins before `offset`.
    fn before(&self, offset: ByteOffset) -> Option<IndexEntry> {
        let (&at, held) = self.entries.range(..offset.get()).next_back()?;
        Some(held.entry(at))
    }

    /// Takes `extent` out of the map.
    fn cut(&mut self, extent: Extent) {
        if let Some(before) = self.before(extent.offset()) {
            if let Some(left) = before.clip(Extent::between(ByteOffset::ZERO, extent.offset())) {
                self.hold(&left);
            }
            if let Some(right) = before.clip(after(extent)) {
                self.hold(&right);
            }
        }
        while let Some((&offset, held)) = self.entries.range(extent.offset().get()..).next() {
            if offset >= extent.end().get() {
                break;
            }
            let right = held.entry(offset).clip(after(extent));
            self.entries.remove(&offset);
            if let Some(right) = right {
                self.hold(&right);
            }
        }
    }

    fn hold(&mut self, entry: &IndexEntry) {
        self.entries
            .insert(entry.extent.offset().get(), Held::new(entry));
    }
}

fn after(extent: Extent) -> Extent {
    Extent::between(extent.end(), ByteOffset::new(u64::MAX))
}

fn join(first: &IndexEntry, second: &IndexEntry) -> IndexEntry {
    IndexEntry {
        extent: Extent::between(first.extent.offset(), second.extent.end()),
        ..*first
    }
}
