//! Several logs seen as one: their sorted indexes merged, the newest winning, in one
//! pass, with one entry of each in memory.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::extents::{ExtentKind, IndexEntry};
use crate::units::{ByteOffset, Extent, VolumeSize};

/// One of the logs under an [`Overlay`], by its place in the chain: 0 is the oldest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceNumber(usize);

impl SourceNumber {
    /// Wraps the plain number.
    pub const fn new(number: usize) -> Self {
        Self(number)
    }

    /// The plain number.
    pub const fn get(self) -> usize {
        self.0
    }
}

/// What an [`Overlay`] can be made of: entries that each say something about an extent.
pub trait Layered: Copy {
    /// Which bytes of the volume.
    fn extent(&self) -> Extent;

    /// What is left of it within `extent`; `None` if nothing.
    fn clip(&self, extent: Extent) -> Option<Self>;
}

impl Layered for IndexEntry {
    fn extent(&self) -> Extent {
        self.extent
    }

    fn clip(&self, extent: Extent) -> Option<Self> {
        Self::clip(self, extent)
    }
}

/// A part of the volume, and which log says what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece<T = IndexEntry> {
    /// Which log.
    pub source: SourceNumber,
    /// What that log says, cut to what no newer log says otherwise.
    pub entry: T,
}

/// What was merged already can be merged again.
impl Layered for Piece {
    fn extent(&self) -> Extent {
        self.entry.extent
    }

    fn clip(&self, extent: Extent) -> Option<Self> {
        let entry = self.entry.clip(extent)?;
        Some(Self { entry, ..*self })
    }
}

impl Piece {
    /// Which bytes of the volume.
    pub const fn extent(&self) -> Extent {
        self.entry.extent
    }

    /// What they are.
    pub const fn kind(&self) -> ExtentKind {
        self.entry.kind
    }
}

/// Merges indexes: yields disjoint pieces by ascending offset. After an error it ends.
///
/// ```
/// use hrl_format::{Error, ExtentKind, IndexEntry, Overlay};
/// use hrl_format::units::{ByteLen, ByteOffset, Extent, FrameNumber, VolumeSize};
/// let entry = |at, len| IndexEntry {
///     extent: Extent::new(ByteOffset::new(at), ByteLen::new(len)).unwrap(),
///     kind: ExtentKind::Zeroes,
///     frame: FrameNumber::ZERO,
///     at: Default::default(),
/// };
/// let (old, new) = (vec![Ok::<_, Error>(entry(0, 30))], vec![Ok(entry(10, 10))]);
/// let size = VolumeSize::new(100);
/// let pieces: Vec<_> = Overlay::new([old.into_iter(), new.into_iter()], size)
///     .map(|piece| piece.unwrap())
///     .map(|piece| (piece.source.get(), piece.extent().offset().get()))
///     .collect();
/// assert_eq!(pieces, [(0, 0), (1, 10), (0, 20)]);
/// ```
pub struct Overlay<I, T = IndexEntry> {
    sources: Vec<I>,
    // Entries that lie ahead, the nearest first.
    ahead: BinaryHeap<Reverse<Ahead<T>>>,
    // Entries that begin before the end of one that was newer when they came up: the
    // newest first. They may have ended since.
    here: BinaryHeap<Here<T>>,
    position: ByteOffset,
    limit: Extent,
    state: State,
}

enum State {
    Unread,
    Running,
    Done,
}

/// Ordered by where it begins.
struct Ahead<T>(Piece<T>);
/// Ordered by how new it is.
struct Here<T>(Piece<T>);

macro_rules! ordered_by {
    ($name:ident, $key:expr) => {
        impl<T: Layered> Ord for $name<T> {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                let key: fn(&Piece<T>) -> _ = $key;
                key(&self.0).cmp(&key(&other.0))
            }
        }
        impl<T: Layered> PartialOrd for $name<T> {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }
        impl<T: Layered> PartialEq for $name<T> {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }
        impl<T: Layered> Eq for $name<T> {}
    };
}

ordered_by!(Ahead, |piece| (
    piece.entry.extent().offset(),
    Reverse(piece.source)
));
ordered_by!(Here, |piece| piece.source);

impl<I: Iterator<Item = Result<T, E>>, T: Layered, E> Overlay<I, T> {
    /// Over `indexes`, the oldest first. What lies past `volume_size`, the size after the
    /// newest, is left out.
    pub fn new(indexes: impl IntoIterator<Item = I>, volume_size: VolumeSize) -> Self {
        Self {
            sources: indexes.into_iter().collect(),
            ahead: BinaryHeap::new(),
            here: BinaryHeap::new(),
            position: ByteOffset::ZERO,
            limit: volume_size.extent(),
            state: State::Unread,
        }
    }

    /// Brings up the next entry of `source`.
    fn advance(&mut self, source: SourceNumber) -> Result<(), E> {
        let next = self
            .sources
            .get_mut(source.0)
            .and_then(Iterator::next)
            .transpose()?;
        if let Some(entry) = next.and_then(|entry| entry.clip(self.limit)) {
            self.ahead.push(Reverse(Ahead(Piece { source, entry })));
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Piece<T>>, E> {
        if matches!(self.state, State::Unread) {
            (0..self.sources.len()).try_for_each(|n| self.advance(SourceNumber(n)))?;
            self.state = State::Running;
        }
        let Some(top) = self.newest()? else {
            return Ok(None);
        };
        let start = self.position.max(top.entry.extent().offset());
        let mut end = top.entry.extent().end();
        // Whoever begins within it: an older one waits behind it, a newer one ends it.
        while let Some(Reverse(Ahead(next))) = self.ahead.peek() {
            if next.entry.extent().offset() >= end {
                break;
            }
            if next.source > top.source {
                end = next.entry.extent().offset();
            } else if let Some(Reverse(Ahead(next))) = self.ahead.pop() {
                self.here.push(Here(next));
            }
        }
        self.position = end;
        let entry = top.entry.clip(Extent::between(start, end));
        Ok(entry.map(|entry| Piece { entry, ..top }))
    }

    /// The newest entry that holds at the position, which moves over gaps; it stays.
    fn newest(&mut self) -> Result<Option<Piece<T>>, E> {
        loop {
            while let Some(Reverse(Ahead(next))) = self.ahead.peek() {
                let begun = next.entry.extent().offset() <= self.position;
                if !begun && !self.here.is_empty() {
                    break;
                }
                self.position = self.position.max(next.entry.extent().offset());
                if let Some(Reverse(Ahead(next))) = self.ahead.pop() {
                    self.here.push(Here(next));
                }
            }
            match self.here.peek() {
                None => return Ok(None),
                Some(Here(top)) if top.entry.extent().end() > self.position => {
                    return Ok(Some(*top));
                }
                Some(Here(top)) => {
                    let source = top.source;
                    self.here.pop();
                    self.advance(source)?;
                }
            }
        }
    }
}

impl<I: Iterator<Item = Result<T, E>>, T: Layered, E> Iterator for Overlay<I, T> {
    type Item = Result<Piece<T>, E>;

    fn next(&mut self) -> Option<Self::Item> {
        if matches!(self.state, State::Done) {
            return None;
        }
        let read = self.read();
        if !matches!(read, Ok(Some(_))) {
            self.state = State::Done;
        }
        read.transpose()
    }
}
