//! Our [MS-HRL] codec against what Microsoft published: the 58 entries of the sample log,
//! its metadata headers, and where its structures lie.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Cursor;

use hrl_format::ms::{self, Entry, MsTime, Reader, Writer, WriterOptions};
use hrl_format::units::{ByteLen, ByteOffset, Extent};

/// An entry of the sample, and its published checksum.
fn published() -> Vec<(Entry, u32)> {
    let text = include_str!("data/ms-hrl-entries.csv");
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some("id,meta_operation,data_length,byte_offset,timestamp,data_checksum,checksum")
    );
    let entry = |line: &str| {
        let fields: Vec<u64> = line
            .split(',')
            .map(|field| field.parse().unwrap())
            .collect();
        let [_, operation, len, offset, time, data_checksum, sum] = fields[..] else {
            panic!("{line}");
        };
        assert_eq!(operation, 1);
        let entry = Entry {
            extent: Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap(),
            time: MsTime::from_seconds(time as u32),
            data_checksum: data_checksum as u32,
        };
        (entry, sum as u32)
    };
    lines.map(entry).collect()
}

#[test]
fn the_58_published_entries_have_their_published_checksums() {
    let entries = published();
    assert_eq!(entries.len(), 58);
    for (entry, sum) in entries {
        let bytes = entry.encode().unwrap();
        assert_eq!(
            u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            sum,
            "{entry:?}"
        );
        assert_eq!(ms::checksum(&[&bytes[..8], &bytes[12..]]), sum);
        assert_eq!(Entry::decode(&bytes), Ok(entry));
    }
}

#[test]
fn a_log_of_these_writes_lies_as_the_sample_does() {
    let mut writer = Writer::create(Cursor::new(Vec::new()), &WriterOptions::default()).unwrap();
    for (entry, _) in published() {
        let data = vec![0xa5; entry.extent.len().get() as usize];
        writer
            .write(entry.extent.offset(), &data, entry.time.to_timestamp())
            .unwrap();
    }
    let file = writer.finish().unwrap().into_inner();
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    assert_eq!(file.len(), 332_288);
    assert_eq!(u64_at(44), 332_288, "EOLLocation");
    assert_eq!(u64_at(4096), 0, "first PreviousMetadataLocation");
    assert_eq!(u32_at(4096 + 8), 0, "first ValidMetadataEntries");
    assert_eq!(
        u32_at(4096 + 12),
        4_294_967_295,
        "first metadata header's checksum"
    );
    assert_eq!(u64_at(328_192), 324_096, "second PreviousMetadataLocation");
    assert_eq!(u32_at(328_192 + 8), 58, "second ValidMetadataEntries");
    assert_eq!(
        u32_at(328_192 + 12),
        4_294_966_991,
        "second metadata header's checksum"
    );

    let mut reader = Reader::open(Cursor::new(&file)).unwrap();
    for (entry, _) in published() {
        let read = reader.next_write().unwrap().unwrap();
        assert_eq!(
            (read.entry().extent, read.entry().time),
            (entry.extent, entry.time)
        );
    }
    assert_eq!(reader.next_write().unwrap(), None);
}

#[test]
fn the_header_lies_as_published() {
    let options = WriterOptions {
        id: [1; 16],
        previous: [2; 16],
        created: MsTime::from_seconds(539_842_381).to_timestamp(),
        data_write: [3; 16],
    };
    let writer = Writer::create(Cursor::new(Vec::new()), &options).unwrap();
    let file = writer.finish().unwrap().into_inner();
    assert_eq!(&file[..8], b"msctlog ");
    assert_eq!(file[8..12], 0x0002_0000_u32.to_le_bytes());
    assert_eq!(file[12..16], 539_842_381_u32.to_le_bytes());
    assert_eq!(&file[16..20], b"ct  ");
    assert_eq!(file[56..60], 4096_u32.to_le_bytes());
    assert_eq!(file[60..76], [1; 16]);
    assert_eq!(file[76..92], [2; 16]);
    assert_eq!(file[104..108], [0; 4], "FileType");
    assert_eq!(file[108..110], [0; 2], "Flags");
    assert_eq!(file[110..126], [3; 16]);
    assert!(file[126..4096].iter().all(|byte| *byte == 0));
}
