//! An epoch in the making: what was read from the source goes into a log, and the leaf of
//! every block read is kept until the log is durable and the digest tree may follow.

use std::collections::BTreeMap;

use hrl_format::RecordOrder;
use hrl_format::record::{Record, Root, Tag};
use hrl_format::units::{ByteLen, Epoch, Extent, Timestamp};

use crate::digest::{DigestTree, Leaf, LeafFunction};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::store::{Committed, EpochLog, VolumeWriter};

/// An epoch that touches more blocks than this is sealed, and the rest goes into the next:
/// their leaves wait in memory.
const LEAVES_MAX: usize = 1 << 20;

/// An epoch in the making.
pub struct EpochDraft {
    /// Taken only while one log is sealed and before the next is begun.
    log: Option<EpochLog>,
    order: RecordOrder,
    /// `None` for a block of which only a part is known.
    leaves: BTreeMap<BlockNumber, Option<Leaf>>,
    shipped: u64,
}

impl EpochDraft {
    /// The epoch after the newest one in the store.
    ///
    /// # Errors
    /// When the store cannot take a log.
    pub fn begin(writer: &VolumeWriter) -> Result<Self> {
        Self::begin_in(writer, RecordOrder::AsRead)
    }

    /// The same, for records in this order.
    ///
    /// # Errors
    /// When the store cannot take a log.
    pub fn begin_in(writer: &VolumeWriter, order: RecordOrder) -> Result<Self> {
        let log = writer.begin_epoch_in(order)?;
        Ok(Self {
            log: Some(log),
            order,
            leaves: BTreeMap::new(),
            shipped: 0,
        })
    }

    fn log(&mut self) -> Result<&mut EpochLog> {
        self.log.as_mut().ok_or_else(sealed_before)
    }

    /// Which epoch it will be; none while it is sealed.
    pub fn epoch(&self) -> Option<Epoch> {
        self.log.as_ref().map(EpochLog::epoch)
    }

    /// Whether nothing was put into it yet.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Bytes of the source that were put into it.
    pub fn shipped(&self) -> ByteLen {
        ByteLen::new(self.shipped)
    }

    /// Whether it should be sealed without a point, and the rest go into the next.
    pub fn is_large(&self) -> bool {
        self.leaves.len() >= LEAVES_MAX || self.log.as_ref().is_some_and(EpochLog::is_full)
    }

    /// Takes `data`, read from `extent`, which begins at a block's start and ends at a
    /// block's or the volume's end. Blocks of zeroes become a zeroes record.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn add(
        &mut self,
        geometry: &Geometry,
        function: &LeafFunction,
        extent: Extent,
        data: &[u8],
    ) -> Result<()> {
        let block = u64::from(geometry.block.get());
        let first = extent.offset().get() / block;
        let mut pending = Pending::default();
        for (n, bytes) in (first..).zip(data.chunks(block as usize)) {
            let number = BlockNumber::new(n);
            let content = Content::of(function, bytes);
            self.leaves
                .insert(number, Some(function.leaf(number, bytes)));
            let at = geometry.extent_of(crate::geometry::Run {
                start: number,
                end: BlockNumber::new(n + 1),
            });
            if let Some(done) = pending.extend(at, content) {
                self.append(&done, extent, data)?;
            }
        }
        if let Some(rest) = pending.take() {
            self.append(&rest, extent, data)?;
        }
        self.shipped += data.len() as u64;
        Ok(())
    }

    /// Takes `data`, read from `extent` as [`Self::add`] has it, of which only `parts` may
    /// differ from what the image holds; those go into the log.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn add_parts(
        &mut self,
        geometry: &Geometry,
        function: &LeafFunction,
        (extent, data): (Extent, &[u8]),
        parts: &[Extent],
    ) -> Result<()> {
        let block = u64::from(geometry.block.get());
        let first = extent.offset().get() / block;
        for (n, bytes) in (first..).zip(data.chunks(block as usize)) {
            let number = BlockNumber::new(n);
            let leaf = function.leaf(number, bytes);
            self.leaves.insert(number, Some(leaf));
        }
        for part in parts.iter().filter_map(|part| part.intersect(extent)) {
            let start = (part.offset().get() - extent.offset().get()) as usize;
            let bytes = &data[start..start + part.len().get() as usize];
            let piece = Piece {
                extent: part,
                content: Content::of(function, bytes),
            };
            self.append(&piece, extent, data)?;
            self.shipped += part.len().get();
        }
        Ok(())
    }

    /// Takes a change in the order in which it completed, with its time. What it leaves of a
    /// block that it does not cover whole is not known.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn change(
        &mut self,
        geometry: &Geometry,
        function: &LeafFunction,
        record: &Record<&[u8]>,
        time: Timestamp,
    ) -> Result<()> {
        let (extent, data) = match record {
            Record::Write { extent, data } => (*extent, Some(*data)),
            Record::Zeroes { extent } | Record::Discard { extent } => (*extent, None),
            Record::Tag(_) | Record::Resize { .. } => {
                return Err(Error::new(ErrorKind::Invalid, "write to the epoch's log")
                    .detail("a mark among the changes"));
            }
        };
        self.log()?.append(record, time)?;
        self.shipped += extent.len().get();
        let Some(run) = geometry.run_of(extent) else {
            return Ok(());
        };
        for n in run.range() {
            let number = BlockNumber::new(n);
            let end = BlockNumber::new(n + 1);
            let block = geometry.extent_of(Run { start: number, end });
            let is_whole = block.intersect(extent) == Some(block);
            let leaf = match data {
                _ if !is_whole => None,
                Some(data) => {
                    let start = (block.offset().get() - extent.offset().get()) as usize;
                    let bytes = &data[start..start + block.len().get() as usize];
                    Some(function.leaf(number, bytes))
                }
                None => Some(function.zero_leaf(number, block.len())),
            };
            self.leaves.insert(number, leaf);
        }
        Ok(())
    }

    fn append(&mut self, piece: &Piece, whole: Extent, data: &[u8]) -> Result<()> {
        let start = (piece.extent.offset().get() - whole.offset().get()) as usize;
        let record = match piece.content {
            Content::Zeroes => Record::Zeroes {
                extent: piece.extent,
            },
            Content::Data => {
                let end = start + piece.extent.len().get() as usize;
                Record::Write {
                    extent: piece.extent,
                    data: &data[start..end],
                }
            }
        };
        self.log()?.append(&record, Timestamp::now()).map(drop)
    }

    /// The root that `tree` will have once this epoch is applied.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn root(&self, tree: &DigestTree) -> Result<Option<Root>> {
        tree.preview_root(&self.leaves)
    }

    /// Ends the epoch with a recovery point.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn tag(&mut self, tag: Tag) -> Result<()> {
        let time = tag.time;
        self.log()?.append(&Record::Tag(tag), time).map(drop)
    }

    /// Seals the log, makes it durable in the store, and lets the digest tree follow.
    ///
    /// # Errors
    /// When either cannot be written. If it is the tree, the epoch is in the store, and
    /// the tree catches up when the volume is brought up again.
    pub fn commit(mut self, writer: &mut VolumeWriter, tree: &mut DigestTree) -> Result<Committed> {
        self.seal(writer, tree)
    }

    /// Seals what there is as an epoch without a point, and goes on in the next.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn roll(&mut self, writer: &mut VolumeWriter, tree: &mut DigestTree) -> Result<()> {
        self.seal(writer, tree)?;
        self.log = Some(writer.begin_epoch_in(self.order)?);
        Ok(())
    }

    fn seal(&mut self, writer: &mut VolumeWriter, tree: &mut DigestTree) -> Result<Committed> {
        let log = self.log.take().ok_or_else(sealed_before)?;
        let epoch = log.epoch();
        let committed = writer.commit(log)?;
        let leaves = std::mem::take(&mut self.leaves);
        tree.apply(epoch, leaves)?;
        Ok(committed)
    }
}

fn sealed_before() -> Error {
    Error::new(ErrorKind::State, "write to the epoch's log")
        .detail("the log before it could not be sealed")
}

/// What a block holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Content {
    #[default]
    Data,
    Zeroes,
}

impl Content {
    /// With a key, nobody else shall learn which blocks are empty: they are data like others.
    fn of(function: &LeafFunction, bytes: &[u8]) -> Self {
        if !function.is_keyed() && is_zero(bytes) {
            Self::Zeroes
        } else {
            Self::Data
        }
    }
}

/// A stretch of blocks that are all zeroes, or all not.
struct Piece {
    extent: Extent,
    content: Content,
}

#[derive(Default)]
struct Pending {
    extent: Option<Extent>,
    content: Content,
}

impl Pending {
    /// Adds the next block; returns the stretch before it if it is of the other sort.
    fn extend(&mut self, at: Extent, content: Content) -> Option<Piece> {
        match self.extent {
            Some(extent) if self.content == content => {
                self.extent = Some(Extent::between(extent.offset(), at.end()));
                None
            }
            _ => {
                let done = self.take();
                (self.extent, self.content) = (Some(at), content);
                done
            }
        }
    }

    fn take(&mut self) -> Option<Piece> {
        let content = self.content;
        self.extent.take().map(|extent| Piece { extent, content })
    }
}

/// Whether `bytes` are all zero. Written so that the compiler compares words at a time,
/// and that data ends it at its first words.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines
        .iter()
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        assert!(is_zero(&[]));
        assert!(is_zero(&[0; 4099]));
        for at in [0, 63, 64, 4095, 4096, 4098] {
            let mut bytes = [0; 4099];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
