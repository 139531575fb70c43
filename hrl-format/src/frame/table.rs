//! A frame's table: one entry of 32 bytes a record, readable without the key. What is
//! secret of a record is in the frame's data.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{Error, Result};
use crate::extents::{DataOffset, ExtentKind, IndexEntry};
use crate::id::{GroupId, PointId};
use crate::layout::{
    KIND_DISCARD, KIND_RESIZE, KIND_TAG, KIND_WRITE, KIND_ZEROES, MAX_DATA, REGION, RawRecord,
    RawTag, TAG_GROUP, TAG_ROOT,
};
use crate::record::{Consistency, Record, Root, Tag};
use crate::units::{ByteLen, ByteOffset, Extent, FrameNumber, Timestamp, VolumeSize};

/// What the table says of a record: all but its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Bytes were written.
    Write(Extent),
    /// The range became zeroes.
    Zeroes(Extent),
    /// The range became undefined.
    Discard(Extent),
    /// A recovery point.
    Tag {
        /// Which.
        id: PointId,
        /// What it promises.
        consistency: Consistency,
    },
    /// Another size of the volume.
    Resize(VolumeSize),
}

impl Shape {
    /// The range it changes; `None` for marks.
    pub const fn extent(&self) -> Option<Extent> {
        match self {
            Self::Write(extent) | Self::Zeroes(extent) | Self::Discard(extent) => Some(*extent),
            Self::Tag { .. } | Self::Resize(_) => None,
        }
    }

    /// What the index says once this record is the last word on its range.
    pub(crate) fn state(&self, frame: FrameNumber, at: DataOffset) -> Option<IndexEntry> {
        let (extent, kind, at) = match *self {
            Self::Write(extent) => (extent, ExtentKind::Write, at),
            Self::Zeroes(extent) => (extent, ExtentKind::Zeroes, DataOffset::default()),
            Self::Discard(extent) => (extent, ExtentKind::Discard, DataOffset::default()),
            Self::Tag { .. } | Self::Resize(_) => return None,
        };
        Some(IndexEntry {
            extent,
            kind,
            frame,
            at,
        })
    }
}

/// What a mark in the seal's list says of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagMark {
    /// Which point.
    pub id: PointId,
    /// What it promises.
    pub consistency: Consistency,
    /// When it was.
    pub time: Timestamp,
}

/// A mark's own part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkDetail {
    /// A recovery point.
    Tag(TagMark),
    /// Another size of the volume.
    Resize(VolumeSize),
}

pub(crate) const fn consistency_code(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::Crash => 0,
        Consistency::Filesystem => 1,
        Consistency::Application => 2,
    }
}

pub(crate) const fn consistency_from(code: u8) -> Option<Consistency> {
    match code {
        0 => Some(Consistency::Crash),
        1 => Some(Consistency::Filesystem),
        2 => Some(Consistency::Application),
        _ => None,
    }
}

/// A record's entry in the table; `data` is how long its data is.
pub(crate) fn encode<D>(record: &Record<D>, data: usize, time: Timestamp) -> RawRecord {
    let mut raw = RawRecord::new_zeroed();
    raw.data.set(data as u32);
    raw.time.set(time.as_nanos());
    let (kind, extent) = match record {
        Record::Write { extent, .. } => (KIND_WRITE, *extent),
        Record::Zeroes { extent } => (KIND_ZEROES, *extent),
        Record::Discard { extent } => (KIND_DISCARD, *extent),
        Record::Tag(tag) => {
            raw.kind = KIND_TAG;
            raw.flags = consistency_code(tag.consistency);
            let (offset, length) = tag.id.as_bytes().split_at(8);
            raw.offset.as_mut_bytes().copy_from_slice(offset);
            raw.length.as_mut_bytes().copy_from_slice(length);
            // A tag's time is the point's own.
            raw.time.set(tag.time.as_nanos());
            return raw;
        }
        Record::Resize { size } => {
            raw.kind = KIND_RESIZE;
            raw.offset.set(size.get());
            return raw;
        }
    };
    raw.kind = kind;
    raw.offset.set(extent.offset().get());
    raw.length.set(extent.len().get());
    raw
}

/// What an entry says, if it may say so.
pub(crate) fn shape(raw: &RawRecord) -> Result<Shape> {
    if raw.reserved != [0; 2] || (raw.flags != 0 && raw.kind != KIND_TAG) {
        return Err(Error::damaged("a record has reserved bits set"));
    }
    let (offset, length, data) = (raw.offset.get(), raw.length.get(), raw.data.get());
    let extent = || {
        Extent::new(ByteOffset::new(offset), ByteLen::new(length))
            .filter(|extent| !extent.is_empty())
            .ok_or_else(|| Error::damaged("a record is empty, or ends past 2^64"))
    };
    let shape = match raw.kind {
        KIND_WRITE if length == u64::from(data) => Shape::Write(extent()?),
        KIND_ZEROES if data == 0 => Shape::Zeroes(extent()?),
        KIND_DISCARD if data == 0 => Shape::Discard(extent()?),
        KIND_RESIZE if length == 0 && data == 0 => Shape::Resize(VolumeSize::new(offset)),
        KIND_TAG if data as usize >= size_of::<RawTag>() => {
            let mut id = [0; 16];
            id[..8].copy_from_slice(raw.offset.as_bytes());
            id[8..].copy_from_slice(raw.length.as_bytes());
            let consistency = consistency_from(raw.flags)
                .ok_or_else(|| Error::damaged("a tag of unknown consistency"))?;
            Shape::Tag {
                id: PointId::from_bytes(id),
                consistency,
            }
        }
        KIND_WRITE..=KIND_RESIZE => {
            return Err(Error::damaged("a record's lengths do not agree"));
        }
        kind => return Err(Error::damaged(format!("a record of unknown kind {kind}"))),
    };
    Ok(shape)
}

/// Whether each entry is sound and all data together is `plain` bytes; in an encrypted
/// frame also whether all writes lie in one region.
pub(crate) fn check(table: &[RawRecord], plain: usize, region: Option<ByteLen>) -> Result<()> {
    let mut data = 0;
    let mut home = None;
    for raw in table {
        if let (Shape::Write(extent), Some(region)) = (shape(raw)?, region) {
            let of = |offset: u64| offset / region.get();
            let first = of(extent.offset().get());
            if first != of(extent.end().get() - 1) || *home.get_or_insert(first) != first {
                return Err(Error::damaged(
                    "an encrypted frame holds more than one region",
                ));
            }
        }
        data += raw.data.get() as usize;
    }
    let most = if region.is_some() { REGION } else { MAX_DATA };
    if data != plain || plain > most {
        return Err(Error::damaged(
            "a frame's data is not as long as its records say",
        ));
    }
    Ok(())
}

/// A tag's data, appended to `out`.
pub(crate) fn encode_tag(tag: &Tag, out: &mut Vec<u8>) -> Result<usize> {
    if tag.label.len() > Tag::LABEL_MAX {
        return Err(Error::invalid("a label is longer than 1024 bytes"));
    }
    let mut raw = RawTag::new_zeroed();
    let flag = |on: bool, bit: u16| if on { bit } else { 0 };
    raw.flags
        .set(flag(tag.group.is_some(), TAG_GROUP) | flag(tag.root.is_some(), TAG_ROOT));
    raw.label.set(tag.label.len() as u16);
    raw.group = *tag.group.unwrap_or_default().as_bytes();
    raw.root = tag.root.map_or([0; 32], |root| *root.as_bytes());
    out.extend_from_slice(raw.as_bytes());
    out.extend_from_slice(tag.label.as_bytes());
    Ok(size_of::<RawTag>() + tag.label.len())
}

/// A record, from its entry and its data.
pub(crate) fn decode<'a>(raw: &RawRecord, data: &'a [u8]) -> Result<Record<&'a [u8]>> {
    Ok(match shape(raw)? {
        Shape::Write(extent) => Record::Write { extent, data },
        Shape::Zeroes(extent) => Record::Zeroes { extent },
        Shape::Discard(extent) => Record::Discard { extent },
        Shape::Resize(size) => Record::Resize { size },
        Shape::Tag { id, consistency } => {
            let time = Timestamp::from_nanos(raw.time.get());
            Record::Tag(decode_tag(
                data,
                TagMark {
                    id,
                    consistency,
                    time,
                },
            )?)
        }
    })
}

fn decode_tag(data: &[u8], mark: TagMark) -> Result<Tag> {
    let bad = |what: &str| Error::damaged(format!("a tag's data {what}"));
    let (raw, label) = RawTag::ref_from_prefix(data).map_err(|_| bad("is too short"))?;
    let has = |flag: u16| raw.flags.get() & flag != 0;
    let sound = raw.flags.get() & !(TAG_GROUP | TAG_ROOT) == 0
        && raw.reserved == [0; 4]
        && usize::from(raw.label.get()) == label.len()
        && label.len() <= Tag::LABEL_MAX
        && (has(TAG_GROUP) || raw.group == [0; 16])
        && (has(TAG_ROOT) || raw.root == [0; 32]);
    if !sound {
        return Err(bad("has a field that is not what it may be"));
    }
    let label = std::str::from_utf8(label).map_err(|_| bad("has a label that is not UTF-8"))?;
    Ok(Tag {
        id: mark.id,
        time: mark.time,
        consistency: mark.consistency,
        label: label.to_owned(),
        group: has(TAG_GROUP).then(|| GroupId::from_bytes(raw.group)),
        root: has(TAG_ROOT).then(|| Root::from_bytes(raw.root)),
    })
}
