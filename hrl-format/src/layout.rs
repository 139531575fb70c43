//! Every byte of the format, as it lies in the file: constants, and structures that are
//! the file's bytes (little-endian, no padding, no alignment). docs/hrl-format.md has the
//! same in tables; `tests/layout_doc.rs` holds the two together.

use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Header, frames, sections and trailer all begin and end at multiples of this.
pub const PAGE: usize = 4096;
/// The version of the format that is written, and the only one that is read.
pub const VERSION: u32 = 3;
/// What a log begins with: a high bit that a seven-bit channel would drop, the name, a
/// line end of either kind and an end-of-text mark that a text channel would change.
pub const HEADER_MAGIC: [u8; 8] = *b"\x89HRL\r\n\x1a\n";
/// What the last page of a sealed log begins with.
pub const TRAILER_MAGIC: [u8; 8] = *b"\x89HRLEND\n";
/// What every frame begins with. No directory page can: its first byte is zero.
pub const FRAME_MAGIC: [u8; 4] = *b"\x89HFR";

/// Most bytes of plain data in a frame of a log without encryption.
pub const MAX_DATA: usize = 1 << 20;
/// Most bytes of plain data in an encrypted frame, and the span of the volume, aligned to
/// itself, that all its writes lie in.
pub const REGION: usize = 64 << 10;
/// Most records in a frame.
pub const MAX_RECORDS: usize = 4096;
/// What the cipher adds to the stored data.
pub const CIPHER_TAG: usize = 16;
/// Most bytes that a frame can take in the file.
pub const MAX_SPAN: usize =
    pages(size_of::<RawFrame>() + MAX_RECORDS * size_of::<RawRecord>() + MAX_DATA + CIPHER_TAG);

/// Compatible feature: the records are every change of the epoch, in order of completion.
pub const FEATURE_IN_ORDER: u64 = 1;

/// Incompatible feature: frames may be compressed with LZ4.
pub const FEATURE_LZ4: u64 = 1;
/// Incompatible feature: every frame is encrypted.
pub const FEATURE_ENCRYPTED: u64 = 1 << 1;
/// Incompatible feature: frames may have been moved here whole from other logs.
pub const FEATURE_MOVED: u64 = 1 << 2;
/// All incompatible ones that this version knows.
pub const FEATURES_KNOWN: u64 = FEATURE_LZ4 | FEATURE_ENCRYPTED | FEATURE_MOVED;

/// Frame flag: the data is compressed with LZ4.
pub const FRAME_LZ4: u32 = 1;
/// Frame flag: the data, compressed or not, is encrypted.
pub const FRAME_ENCRYPTED: u32 = 1 << 1;

/// Trailer flag: sealed by whoever had the key.
pub const SEAL_AUTHENTICATED: u32 = 1;

/// Record and index kinds.
pub const KIND_WRITE: u8 = 1;
/// See [`KIND_WRITE`].
pub const KIND_ZEROES: u8 = 2;
/// See [`KIND_WRITE`].
pub const KIND_DISCARD: u8 = 3;
/// See [`KIND_WRITE`].
pub const KIND_TAG: u8 = 4;
/// See [`KIND_WRITE`].
pub const KIND_RESIZE: u8 = 5;

/// Tag flag in its data: the group id is there.
pub const TAG_GROUP: u16 = 1;
/// Tag flag in its data: the root is there.
pub const TAG_ROOT: u16 = 1 << 1;

/// What kind of section a page belongs to.
pub const SECTION_DIRECTORY: [u8; 4] = *b"DIRY";
/// See [`SECTION_DIRECTORY`].
pub const SECTION_INDEX: [u8; 4] = *b"INDX";
/// See [`SECTION_DIRECTORY`].
pub const SECTION_MARKS: [u8; 4] = *b"MARK";
/// Bytes of a section's page that are its own; the footer follows.
pub const PAYLOAD: usize = PAGE - size_of::<RawFooter>();

/// `bytes` rounded up to whole pages.
pub const fn pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}

macro_rules! raw {
    ($(#[$doc:meta])* $name:ident, $size:expr, { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        #[allow(missing_docs, reason = "docs/hrl-format.md says what each field is")]
        pub struct $name {
            $(pub $field: $type,)*
        }

        const _: () = assert!(size_of::<$name>() == $size);

        impl $name {
            /// Each field's name, offset and length.
            pub const FIELDS: &'static [(&'static str, usize, usize)] = &[
                $((
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    size_of::<$type>(),
                ),)*
            ];
        }
    };
}

raw!(
    /// The first page of the file.
    RawHeader, PAGE, {
        magic: [u8; 8],
        version: U32,
        page: U32,
        compatible: U64,
        incompatible: U64,
        log: [u8; 16],
        previous: [u8; 16],
        volume: [u8; 16],
        generation: U64,
        generation_id: [u8; 16],
        first_epoch: U64,
        last_epoch: U64,
        volume_size: U64,
        block: U32,
        sector: U32,
        created: I64,
        key: [u8; 16],
        previous_seal: [u8; 32],
        stands_for: [u8; 16],
        stands_for_seal: [u8; 32],
        reserved: [u8; 3852],
        crc: U32,
    }
);

raw!(
    /// What a frame begins with.
    RawFrame, 128, {
        magic: [u8; 4],
        head_crc: U32,
        data_crc: U32,
        number: U32,
        log: [u8; 16],
        position: U64,
        origin_log: [u8; 16],
        origin_header: [u8; 16],
        origin_number: U32,
        flags: U32,
        first_sequence: U64,
        records: U32,
        plain: U32,
        stored: U32,
        nonce: [u8; 12],
        reserved: [u8; 16],
    }
);

raw!(
    /// An entry of a frame's table.
    RawRecord, 32, {
        kind: u8,
        flags: u8,
        reserved: [u8; 2],
        data: U32,
        offset: U64,
        length: U64,
        time: I64,
    }
);

raw!(
    /// What a tag's data begins with; the label follows.
    RawTag, 56, {
        flags: zerocopy::little_endian::U16,
        label: zerocopy::little_endian::U16,
        reserved: [u8; 4],
        group: [u8; 16],
        root: [u8; 32],
    }
);

raw!(
    /// What a section's page ends with.
    RawFooter, 32, {
        log: [u8; 16],
        kind: [u8; 4],
        number: U32,
        used: U32,
        crc: U32,
    }
);

raw!(
    /// An entry of the frame directory.
    RawDirectoryEntry, 48, {
        position: U64,
        first_sequence: U64,
        span: U32,
        records: U32,
        head_crc: U32,
        data_crc: U32,
        cipher_tag: [u8; 16],
    }
);

raw!(
    /// An entry of the sorted index.
    RawIndexEntry, 32, {
        offset: U64,
        length: U64,
        frame: U32,
        at: U32,
        kind: u8,
        reserved: [u8; 7],
    }
);

raw!(
    /// An entry of the list of tags and resizes.
    RawMark, 48, {
        kind: u8,
        flags: u8,
        reserved: [u8; 2],
        frame: U32,
        record: U32,
        reserved2: [u8; 4],
        sequence: U64,
        time: I64,
        detail: [u8; 16],
    }
);

raw!(
    /// Where a section is.
    RawSection, 24, {
        position: U64,
        pages: U64,
        entries: U64,
    }
);

raw!(
    /// The last page of a sealed log.
    RawTrailer, PAGE, {
        magic: [u8; 8],
        version: U32,
        flags: U32,
        log: [u8; 16],
        frames: U64,
        records: U64,
        data: U64,
        volume_size: U64,
        sealed: I64,
        directory: RawSection,
        index: RawSection,
        marks: RawSection,
        provenance: RawSection,
        digest: [u8; 32],
        previous_seal: [u8; 32],
        reserved: [u8; 3832],
        nonce: [u8; 12],
        cipher_tag: [u8; 16],
        crc: U32,
    }
);

/// The part of a frame that the cipher vouches for: from its origin on, the table included.
pub const FRAME_AUTHENTICATED: usize = std::mem::offset_of!(RawFrame, origin_log);
/// The part of the trailer that the cipher vouches for ends here.
pub const TRAILER_AUTHENTICATED: usize = std::mem::offset_of!(RawTrailer, cipher_tag);
/// A frame's head checksum covers from here to the table's end.
pub const FRAME_HEAD_SUMMED: usize = std::mem::offset_of!(RawFrame, data_crc);
/// The checksums of header, trailer and section pages stand in their last four bytes.
pub const PAGE_SUMMED: usize = PAGE - 4;
