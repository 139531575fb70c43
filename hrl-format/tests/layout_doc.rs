//! The document and the code say the same: every structure's fields, offsets and lengths, and
//! every constant, as docs/hrl-format.md has them in its tables.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use hrl_format::layout;

const DOCUMENT: &str = include_str!("../../docs/hrl-format.md");

/// The cells of the rows of all tables that follow `heading`, up to the next heading.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let start = DOCUMENT.find(&format!("\n{heading}\n")).unwrap() + heading.len() + 2;
    let section = DOCUMENT[start..].split("\n#").next().unwrap();
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect();
    section
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(cells)
        .collect()
}

/// Rows that describe fields: offset, bytes, `name`.
fn fields(heading: &str) -> Vec<(String, usize, usize)> {
    rows(heading)
        .into_iter()
        .filter_map(|cells| {
            let name = cells.get(2)?.strip_prefix('`')?.strip_suffix('`')?;
            Some((
                name.to_owned(),
                cells[0].parse().ok()?,
                cells[1].parse().ok()?,
            ))
        })
        .collect()
}

#[test]
fn every_field_lies_where_the_document_says() {
    let section = "position";
    let structures = [
        ("## The header", layout::RawHeader::FIELDS),
        ("### The frame header", layout::RawFrame::FIELDS),
        ("### The record table", layout::RawRecord::FIELDS),
        ("### The data", layout::RawTag::FIELDS),
        ("### Section pages", layout::RawFooter::FIELDS),
        ("### The frame directory", layout::RawDirectoryEntry::FIELDS),
        ("### The sorted index", layout::RawIndexEntry::FIELDS),
        ("### The marks", layout::RawMark::FIELDS),
    ];
    let coded = |fields: &[(&str, usize, usize)]| -> Vec<_> {
        fields
            .iter()
            .map(|&(name, at, len)| (name.to_owned(), at, len))
            .collect()
    };
    for (heading, expected) in structures {
        assert_eq!(fields(heading), coded(expected), "{heading}");
    }
    // Two tables: the trailer's own, and that of where a section is.
    let found = fields("### The trailer");
    let inner = found.iter().position(|(name, ..)| name == section).unwrap();
    assert_eq!(found[..inner], coded(layout::RawTrailer::FIELDS));
    assert_eq!(found[inner..], coded(layout::RawSection::FIELDS));
}

macro_rules! numbers {
    ($($name:ident)*) => {
        vec![$((stringify!($name), layout::$name as u64),)*]
    };
}

macro_rules! texts {
    ($($name:ident)*) => {
        vec![$((stringify!($name), &layout::$name[..]),)*]
    };
}

#[test]
fn every_constant_is_what_the_document_says() {
    let rows = rows("## Constants");
    let find = |name: &str| {
        let quoted = format!("`{name}`");
        let row = rows.iter().find(|cells| cells[0] == quoted);
        row.unwrap_or_else(|| panic!("{name} is not in the document"))[1]
    };
    let numbers = numbers!(PAGE VERSION MAX_DATA REGION MAX_RECORDS CIPHER_TAG MAX_SPAN PAYLOAD
        FEATURE_IN_ORDER FEATURE_LZ4 FEATURE_ENCRYPTED FEATURE_MOVED FRAME_LZ4 FRAME_ENCRYPTED SEAL_AUTHENTICATED
        KIND_WRITE KIND_ZEROES KIND_DISCARD KIND_TAG KIND_RESIZE TAG_GROUP TAG_ROOT);
    for (name, value) in &numbers {
        assert_eq!(find(name).parse(), Ok(*value), "{name}");
    }
    let texts = texts!(HEADER_MAGIC FRAME_MAGIC TRAILER_MAGIC SECTION_DIRECTORY
        SECTION_INDEX SECTION_MARKS);
    for (name, value) in &texts {
        let hex: Vec<_> = value.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(find(name), format!("`{}`", hex.join(" ")), "{name}");
    }
    let described = rows.iter().filter(|cells| cells[0].starts_with('`'));
    assert_eq!(described.count(), numbers.len() + texts.len());
}

#[test]
fn what_checksums_and_ciphers_cover_is_what_the_document_says() {
    let said = [
        ("bytes 8 to the table's end", layout::FRAME_HEAD_SUMMED == 8),
        (
            "bytes 40 to the table's end of the frame",
            layout::FRAME_AUTHENTICATED == 40,
        ),
        (
            "with bytes 0 to 4075 of the trailer",
            layout::TRAILER_AUTHENTICATED == 4076,
        ),
        (
            "CRC32 over bytes 0 to 4091 of the page",
            layout::PAGE_SUMMED == 4092,
        ),
        (
            "A page holds 84 entries of the directory, 127 of\nthe index or 84 marks",
            [
                size_of::<layout::RawDirectoryEntry>(),
                size_of::<layout::RawIndexEntry>(),
                size_of::<layout::RawMark>(),
            ]
            .map(|size| layout::PAYLOAD / size)
                == [84, 127, 84],
        ),
    ];
    for (text, holds) in said {
        assert!(DOCUMENT.contains(text) && holds, "{text}");
    }
}
