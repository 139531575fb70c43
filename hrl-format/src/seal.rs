//! The seal: the lists behind the frames, and the trailer that vouches for them. A log
//! without one is torn: what it holds is whole frame by frame, but where it ends is
//! nobody's word.

use std::io::Write;

use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{Error, ErrorKind, Result};
use crate::extents::{DataOffset, ExtentKind, IndexEntry};
use crate::frame::{MarkDetail, TagMark, consistency_code, consistency_from};
use crate::header::{HeaderPage, SealDigest};
use crate::id::{LogId, PointId};
use crate::key::{VolumeKey, fresh_nonce};
use crate::layout::{
    KIND_DISCARD, KIND_RESIZE, KIND_TAG, KIND_WRITE, KIND_ZEROES, PAGE, PAGE_SUMMED,
    RawDirectoryEntry, RawIndexEntry, RawMark, RawSection, RawTrailer, SEAL_AUTHENTICATED,
    SECTION_DIRECTORY, SECTION_INDEX, SECTION_MARKS, TRAILER_AUTHENTICATED, TRAILER_MAGIC, VERSION,
};
use crate::section::{PageSink, Section};
use crate::units::{
    ByteLen, ByteOffset, Extent, FileOffset, FrameNumber, Sequence, Timestamp, VolumeSize,
};

/// How far the cipher vouches for a seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SealProof {
    /// Not at all: the log is not encrypted, or was sealed without the key.
    None,
    /// It says it does, but no key was given to try it.
    Untried,
    /// It does: whoever sealed it had the key.
    Proved,
}

/// What a log's seal says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Names the sealed log; the next log of the chain bears it.
    pub digest: SealDigest,
    /// Whether it is proved by the key.
    pub proof: SealProof,
    /// How many frames.
    pub frames: u32,
    /// How many records.
    pub records: u64,
    /// How many bytes of data the records have.
    pub data: ByteLen,
    /// The volume's size after the last record.
    pub volume_size: VolumeSize,
    /// When it was sealed.
    pub sealed: Timestamp,
    /// How many entries the sorted index has.
    pub index_len: u64,
    /// How long the file is.
    pub file_len: ByteLen,
}

/// A tag or a resize, as the seal lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// What it is.
    pub detail: MarkDetail,
    /// The frame that holds it.
    pub frame: FrameNumber,
    /// Which of the frame's records it is.
    pub record: u32,
    /// Its number among the log's records.
    pub sequence: Sequence,
    /// When.
    pub time: Timestamp,
}

/// A trailer, read and sound, with the sections it names.
#[derive(Clone)]
pub(crate) struct Trailer {
    pub seal: Seal,
    pub contents: [u8; 32],
    pub directory: Section<RawDirectoryEntry>,
    pub index: Section<RawIndexEntry>,
    pub marks: Section<RawMark>,
    pub provenance: Provenance,
    pub sections_at: FileOffset,
}

/// Where the pages lie that were taken over from the logs that frames were moved from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Provenance {
    pub position: FileOffset,
    pub pages: u64,
}

/// What the trailer states besides.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub frames: u64,
    pub records: u64,
    pub data: u64,
    pub volume_size: VolumeSize,
    pub sealed: Timestamp,
}

/// The sections in the order in which they are written.
pub(crate) struct Sections<D, I, M, P> {
    pub directory: D,
    pub index: I,
    pub marks: M,
    pub provenance: P,
}

/// Writes the sections and the trailer behind the last frame.
pub(crate) fn write<W: Write>(
    write: W,
    at: FileOffset,
    page: &HeaderPage,
    totals: Totals,
    key: Option<&VolumeKey>,
    sections: Sections<
        impl Iterator<Item = Result<RawDirectoryEntry>>,
        impl Iterator<Item = Result<IndexEntry>>,
        impl Iterator<Item = Result<Mark>>,
        impl Iterator<Item = Result<Box<[u8; PAGE]>>>,
    >,
) -> Result<(W, Seal)> {
    let log = page.header.log;
    let mut digest = Sha256::new();
    digest.update(page.page.as_slice());
    let mut sink = PageSink {
        write,
        position: at,
        digest,
    };
    let mut raw = RawTrailer::new_zeroed();
    raw.directory = sink.section(log, SECTION_DIRECTORY, sections.directory)?;
    let index = sections
        .index
        .map(|entry| entry.map(|entry| raw_index(&entry)));
    raw.index = sink.section(log, SECTION_INDEX, index)?;
    let marks = sections.marks.map(|mark| mark.map(|mark| raw_mark(&mark)));
    raw.marks = sink.section(log, SECTION_MARKS, marks)?;
    raw.provenance = sink.verbatim(sections.provenance)?;
    raw.magic = TRAILER_MAGIC;
    raw.version.set(VERSION);
    raw.log = *log.as_bytes();
    raw.frames.set(totals.frames);
    raw.records.set(totals.records);
    raw.data.set(totals.data);
    raw.volume_size.set(totals.volume_size.get());
    raw.sealed.set(totals.sealed.as_nanos());
    raw.digest = sink.digest.clone().finalize().into();
    raw.previous_seal = page
        .header
        .previous_seal
        .map_or([0; 32], |seal| *seal.as_bytes());
    let proof = match key.filter(|_| page.header.key.is_some()) {
        Some(key) => {
            raw.flags.set(SEAL_AUTHENTICATED);
            raw.nonce = fresh_nonce()?;
            let aad = &raw.as_bytes()[..TRAILER_AUTHENTICATED];
            raw.cipher_tag = key.seal_cipher(log).seal(&raw.nonce, aad, &mut [])?;
            SealProof::Proved
        }
        None => SealProof::None,
    };
    raw.crc.set(crc32fast::hash(&raw.as_bytes()[..PAGE_SUMMED]));
    let file_len = ByteLen::new(sink.position.get() + PAGE as u64);
    let seal = seal_of(&raw, proof, file_len)?;
    sink.write
        .write_all(raw.as_bytes())
        .and_then(|()| sink.write.flush())
        .map_err(|error| Error::from_io("write the seal", error))?;
    Ok((sink.write, seal))
}

fn seal_of(raw: &RawTrailer, proof: SealProof, file_len: ByteLen) -> Result<Seal> {
    let frames = u32::try_from(raw.frames.get())
        .map_err(|_| Error::damaged("the seal counts more frames than there can be"))?;
    Ok(Seal {
        digest: SealDigest::of(raw.as_bytes()),
        proof,
        frames,
        records: raw.records.get(),
        data: ByteLen::new(raw.data.get()),
        volume_size: VolumeSize::new(raw.volume_size.get()),
        sealed: Timestamp::from_nanos(raw.sealed.get()),
        index_len: raw.index.entries.get(),
        file_len,
    })
}

impl Trailer {
    /// Whether `page` begins as a trailer does.
    pub(crate) fn begins(page: &[u8; PAGE]) -> bool {
        page.starts_with(&TRAILER_MAGIC)
    }

    /// Reads the page that lies at `at`, the file's last.
    pub(crate) fn decode(
        page: &[u8; PAGE],
        header: &HeaderPage,
        at: FileOffset,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        parse(page, header, at, key).map_err(|error| error.at(at))
    }
}

fn parse(
    page: &[u8; PAGE],
    header: &HeaderPage,
    at: FileOffset,
    key: Option<&VolumeKey>,
) -> Result<Trailer> {
    let raw = RawTrailer::ref_from_bytes(page)
        .map_err(|_| Error::damaged("the trailer is not one page long"))?;
    if raw.magic != TRAILER_MAGIC {
        let found = "the log does not end with a seal";
        return Err(Error::new(ErrorKind::NotSealed, found));
    }
    if raw.crc.get() != crc32fast::hash(&page[..PAGE_SUMMED]) {
        return Err(Error::damaged("the seal's checksum does not agree"));
    }
    if raw.version.get() != VERSION {
        let found = format!("a seal of version {}, and {VERSION} is known", raw.version);
        return Err(Error::new(ErrorKind::Unsupported, found));
    }
    let log = header.header.log;
    if raw.log != *log.as_bytes() {
        let found = format!("the seal of log {}", LogId::from_bytes(raw.log));
        return Err(Error::new(ErrorKind::Foreign, found));
    }
    let proof = prove(page, raw, header, key)?;
    let sound = raw.reserved.iter().all(|&byte| byte == 0)
        && raw.frames == raw.directory.entries
        && raw.provenance.entries == raw.provenance.pages
        && (proof == SealProof::None || raw.provenance.pages.get() == 0)
        && (header.features.moved || raw.provenance.pages.get() == 0)
        && SealDigest::from_raw(raw.previous_seal) == header.header.previous_seal;
    if !sound {
        return Err(Error::damaged("a field of the seal is not what it may be"));
    }
    check_sections([raw.directory, raw.index, raw.marks, raw.provenance], at)?;
    Ok(Trailer {
        seal: seal_of(raw, proof, ByteLen::new(at.get() + PAGE as u64))?,
        contents: raw.digest,
        directory: Section::new(raw.directory, log, SECTION_DIRECTORY)?,
        index: Section::new(raw.index, log, SECTION_INDEX)?,
        marks: Section::new(raw.marks, log, SECTION_MARKS)?,
        provenance: Provenance {
            position: FileOffset::new(raw.provenance.position.get()),
            pages: raw.provenance.pages.get(),
        },
        sections_at: FileOffset::new(raw.directory.position.get()),
    })
}

/// Whether the sections follow one another, from behind the header at least up to `end`.
fn check_sections(sections: [RawSection; 4], end: FileOffset) -> Result<()> {
    let first = sections[0].position.get();
    let last = sections.iter().try_fold(first, |at, section| {
        let bytes = section.pages.get().checked_mul(PAGE as u64)?;
        at.checked_add(bytes)
            .filter(|_| section.position.get() == at)
    });
    if first < PAGE as u64 || !first.is_multiple_of(PAGE as u64) || last != Some(end.get()) {
        return Err(Error::damaged(
            "the seal's sections do not lie where it says",
        ));
    }
    Ok(())
}

fn prove(
    page: &[u8; PAGE],
    raw: &RawTrailer,
    header: &HeaderPage,
    key: Option<&VolumeKey>,
) -> Result<SealProof> {
    let encrypted = header.header.key.is_some();
    let (nothing, everything) = ([0; 12], SEAL_AUTHENTICATED);
    match raw.flags.get() {
        0 if raw.nonce == nothing && raw.cipher_tag == [0; 16] => {
            // Moved frames may be sealed by who has no key; own frames never are.
            if encrypted && !header.features.moved {
                let found = "an encrypted log whose seal is not authenticated";
                return Err(Error::new(ErrorKind::Forged, found));
            }
            Ok(SealProof::None)
        }
        flags if flags == everything && encrypted => {
            let Some(key) = key else {
                return Ok(SealProof::Untried);
            };
            let aad = &page[..TRAILER_AUTHENTICATED];
            key.seal_cipher(header.header.log)
                .open(&raw.nonce, aad, (&[], &mut []), &raw.cipher_tag)
                .map(|()| SealProof::Proved)
        }
        _ => Err(Error::damaged("the seal's flags are not what they may be")),
    }
}

pub(crate) fn raw_index(entry: &IndexEntry) -> RawIndexEntry {
    RawIndexEntry {
        offset: entry.extent.offset().get().into(),
        length: entry.extent.len().get().into(),
        frame: entry.frame.get().into(),
        at: entry.at.get().into(),
        kind: match entry.kind {
            ExtentKind::Write => KIND_WRITE,
            ExtentKind::Zeroes => KIND_ZEROES,
            ExtentKind::Discard => KIND_DISCARD,
        },
        reserved: [0; 7],
    }
}

pub(crate) fn index_entry(raw: &RawIndexEntry) -> Result<IndexEntry> {
    let kind = match raw.kind {
        KIND_WRITE => Some(ExtentKind::Write),
        KIND_ZEROES => Some(ExtentKind::Zeroes),
        KIND_DISCARD => Some(ExtentKind::Discard),
        _ => None,
    };
    let extent = Extent::new(
        ByteOffset::new(raw.offset.get()),
        ByteLen::new(raw.length.get()),
    )
    .filter(|extent| !extent.is_empty() && raw.reserved == [0; 7]);
    let (Some(kind), Some(extent)) = (kind, extent) else {
        return Err(Error::damaged(
            "an entry of the index is not what it may be",
        ));
    };
    let (frame, at) = (
        FrameNumber::new(raw.frame.get()),
        DataOffset::new(raw.at.get()),
    );
    Ok(IndexEntry {
        extent,
        kind,
        frame,
        at,
    })
}

pub(crate) fn raw_mark(mark: &Mark) -> RawMark {
    let mut raw = RawMark::new_zeroed();
    raw.frame.set(mark.frame.get());
    raw.record.set(mark.record);
    raw.sequence.set(mark.sequence.get());
    raw.time.set(mark.time.as_nanos());
    match mark.detail {
        MarkDetail::Tag(tag) => {
            raw.kind = KIND_TAG;
            raw.flags = consistency_code(tag.consistency);
            raw.detail = *tag.id.as_bytes();
        }
        MarkDetail::Resize(size) => {
            raw.kind = KIND_RESIZE;
            raw.detail[..8].copy_from_slice(&size.get().to_le_bytes());
        }
    }
    raw
}

pub(crate) fn mark(raw: &RawMark) -> Result<Mark> {
    let time = Timestamp::from_nanos(raw.time.get());
    let (size, rest) = raw.detail.split_at(8);
    let detail = match raw.kind {
        KIND_TAG => consistency_from(raw.flags).map(|consistency| {
            let id = PointId::from_bytes(raw.detail);
            MarkDetail::Tag(TagMark {
                id,
                consistency,
                time,
            })
        }),
        KIND_RESIZE if raw.flags == 0 && rest == [0; 8] => size
            .try_into()
            .ok()
            .map(|size| MarkDetail::Resize(VolumeSize::new(u64::from_le_bytes(size)))),
        _ => None,
    };
    let sound = raw.reserved == [0; 2] && raw.reserved2 == [0; 4];
    Ok(Mark {
        detail: detail
            .filter(|_| sound)
            .ok_or_else(|| Error::damaged("a mark of the seal is not what it may be"))?,
        frame: FrameNumber::new(raw.frame.get()),
        record: raw.record.get(),
        sequence: Sequence::new(raw.sequence.get()),
        time,
    })
}
