//! Writing a frame: records are gathered until it is full, then head, data and padding
//! go out in one write, in that order, from where they are.

use zerocopy::{FromZeros, IntoBytes};

use super::codec::Compressor;
use super::{Home, Place, table};
use crate::error::Result;
use crate::extents::DataOffset;
use crate::key::{Cipher, CipherTag, fresh_nonce};
use crate::layout::{
    CIPHER_TAG, FRAME_AUTHENTICATED, FRAME_ENCRYPTED, FRAME_HEAD_SUMMED, FRAME_LZ4, FRAME_MAGIC,
    MAX_DATA, MAX_RECORDS, PAGE, REGION, RawDirectoryEntry, RawFrame, RawRecord, pages,
};
use crate::record::{Record, Tag};
use crate::units::{Extent, Sequence, Timestamp};

/// A frame in the making.
pub(crate) struct FrameBuilder {
    home: Home,
    cipher: Option<Cipher>,
    compressor: Option<Compressor>,
    // The header's place, then the table.
    head: Vec<u8>,
    data: Vec<u8>,
    // The cipher's proof, then zeroes; what is written of it is at most a page and a proof.
    tail: Box<[u8; PAGE + CIPHER_TAG]>,
    // The region that the writes of an encrypted frame lie in, once there is one.
    region: Option<u64>,
}

/// A frame as it goes out: the parts follow one another in the file.
pub(crate) struct Finished<'a> {
    pub parts: [&'a [u8]; 3],
    pub span: usize,
    pub entry: RawDirectoryEntry,
}

impl FrameBuilder {
    pub(crate) fn new(home: Home, cipher: Option<Cipher>) -> Self {
        let compressor = home.lz4.then(Compressor::new);
        let head = vec![0; size_of::<RawFrame>()];
        let tail = Box::new([0; PAGE + CIPHER_TAG]);
        Self {
            home,
            cipher,
            compressor,
            head,
            data: Vec::new(),
            tail,
            region: None,
        }
    }

    pub(crate) fn records(&self) -> usize {
        (self.head.len() - size_of::<RawFrame>()) / size_of::<RawRecord>()
    }

    /// Where the next record's data will be.
    pub(crate) fn at(&self) -> DataOffset {
        DataOffset::new(self.data.len() as u32)
    }

    /// How much of a write to `extent` one frame may hold: up to the next region, or all
    /// that fits into a frame.
    pub(crate) fn longest(&self, extent: Extent) -> usize {
        let limit = match self.cipher {
            Some(_) => REGION - (extent.offset().get() % REGION as u64) as usize,
            None => MAX_DATA,
        };
        usize::try_from(extent.len().get()).map_or(limit, |len| len.min(limit))
    }

    /// Whether a record with `data` bytes may join those that are here.
    pub(crate) fn takes<D>(&self, record: &Record<D>, data: usize) -> bool {
        let encrypted = self.cipher.is_some();
        let limit = if encrypted { REGION } else { MAX_DATA };
        let near = match record {
            Record::Write { extent, .. } if encrypted => self
                .region
                .is_none_or(|region| region == region_of(*extent)),
            _ => true,
        };
        self.records() == 0
            || (self.records() < MAX_RECORDS && near && self.data.len() + data <= limit)
    }

    /// Whether data may be passed to [`Self::finish`] rather than copied here first.
    pub(crate) fn takes_outside_data(&self) -> bool {
        self.cipher.is_none() && self.records() == 0
    }

    /// Adds a write without its data, which will be given to [`Self::finish`].
    pub(crate) fn push_outside(&mut self, extent: Extent, len: usize, time: Timestamp) {
        let record = Record::Write { extent, data: () };
        self.head
            .extend_from_slice(table::encode(&record, len, time).as_bytes());
    }

    /// Adds a record.
    pub(crate) fn push(&mut self, record: &Record<&[u8]>, time: Timestamp) -> Result<()> {
        let len = match record {
            Record::Write { extent, data } => {
                self.region = Some(region_of(*extent));
                self.data.extend_from_slice(data);
                data.len()
            }
            Record::Tag(tag) => table::encode_tag(tag, &mut self.data)?,
            Record::Zeroes { .. } | Record::Discard { .. } | Record::Resize { .. } => 0,
        };
        self.head
            .extend_from_slice(table::encode(record, len, time).as_bytes());
        Ok(())
    }

    /// The frame's bytes; `outside` is its data if that was not copied here.
    pub(crate) fn finish<'a>(
        &'a mut self,
        place: Place,
        first: Sequence,
        outside: Option<&'a [u8]>,
    ) -> Result<Finished<'a>> {
        let mut raw = RawFrame::new_zeroed();
        raw.magic = FRAME_MAGIC;
        raw.number.set(place.number.get());
        raw.log = *self.home.log.as_bytes();
        raw.position.set(place.position.get());
        raw.origin_log = raw.log;
        raw.origin_header = self.home.digest;
        raw.origin_number = raw.number;
        raw.first_sequence.set(first.get());
        raw.records.set(self.records() as u32);
        raw.plain.set(outside.unwrap_or(&self.data).len() as u32);
        let packed = self
            .compressor
            .as_mut()
            .and_then(|compressor| compressor.compress(outside.unwrap_or(&self.data)));
        let mut flags = if packed.is_some() { FRAME_LZ4 } else { 0 };
        let mut proof = None;
        let data: &[u8] = if let Some(cipher) = &self.cipher {
            flags |= FRAME_ENCRYPTED;
            raw.nonce = fresh_nonce()?;
            raw.flags.set(flags);
            let data = packed.unwrap_or(&mut self.data[..]);
            raw.stored.set((data.len() + CIPHER_TAG) as u32);
            self.head[..size_of::<RawFrame>()].copy_from_slice(raw.as_bytes());
            proof = Some(cipher.seal(&raw.nonce, &self.head[FRAME_AUTHENTICATED..], data)?);
            data
        } else {
            let data = packed.map_or(outside.unwrap_or(&self.data), |packed| packed);
            raw.flags.set(flags);
            raw.stored.set(data.len() as u32);
            data
        };
        let stored = raw.stored.get() as usize;
        let span = pages(self.head.len() + stored);
        let proof_len = proof.map_or(0, |proof: CipherTag| proof.len());
        self.tail.fill(0);
        self.tail[..proof_len].copy_from_slice(&proof.unwrap_or_default()[..proof_len]);
        let tail = &self.tail[..span - self.head.len() - data.len()];
        let mut sum = crc32fast::Hasher::new();
        sum.update(data);
        sum.update(tail);
        raw.data_crc.set(sum.finalize());
        self.head[..size_of::<RawFrame>()].copy_from_slice(raw.as_bytes());
        raw.head_crc
            .set(crc32fast::hash(&self.head[FRAME_HEAD_SUMMED..]));
        self.head[..size_of::<RawFrame>()].copy_from_slice(raw.as_bytes());
        let entry = RawDirectoryEntry {
            position: raw.position,
            first_sequence: raw.first_sequence,
            span: (span as u32).into(),
            records: raw.records,
            head_crc: raw.head_crc,
            data_crc: raw.data_crc,
            cipher_tag: proof.unwrap_or_default(),
        };
        Ok(Finished {
            parts: [&self.head, data, tail],
            span,
            entry,
        })
    }

    /// Makes room for the next frame.
    pub(crate) fn clear(&mut self) {
        self.head.truncate(size_of::<RawFrame>());
        self.data.clear();
        self.region = None;
    }
}

fn region_of(extent: Extent) -> u64 {
    extent.offset().get() / REGION as u64
}

/// A tag's data at its longest, which an encrypted frame must take beside nothing else.
const _: () = assert!(Tag::LABEL_MAX + size_of::<crate::layout::RawTag>() <= REGION);
