//! Checksums made right in mutated files, where their structures can still be found.

use std::mem::offset_of;

use hrl_format::layout::{
    FRAME_HEAD_SUMMED, FRAME_MAGIC, MAX_DATA, MAX_RECORDS, PAGE, PAGE_SUMMED, RawDirectoryEntry,
    RawFooter, RawFrame, RawRecord, SECTION_DIRECTORY, pages,
};
use hrl_format::ms;

/// In a native log: header, frames, directory entries, section pages and trailer. Digests
/// and ciphers are left as they are.
pub fn native(file: &mut [u8]) {
    let whole = file.len() / PAGE * PAGE;
    let mut at = 0;
    while at < whole {
        at += if file[at..].starts_with(&FRAME_MAGIC) {
            frame(file, at)
        } else {
            page(file, at);
            PAGE
        };
    }
}

/// Sums a frame and returns how many bytes it takes, as far as it lies in the file.
fn frame(file: &mut [u8], at: usize) -> usize {
    let field = |offset: usize| u32_at(file, at + offset);
    let records = field(offset_of!(RawFrame, records)).min(MAX_RECORDS);
    let stored = field(offset_of!(RawFrame, stored)).min(MAX_DATA + 16);
    let table_end = size_of::<RawFrame>() + records * size_of::<RawRecord>();
    let span = pages(table_end + stored);
    if at + span > file.len() {
        return PAGE;
    }
    let data_crc = crc32fast::hash(&file[at + table_end..at + span]);
    put(file, at + offset_of!(RawFrame, data_crc), data_crc);
    let head_crc = crc32fast::hash(&file[at + FRAME_HEAD_SUMMED..at + table_end]);
    put(file, at + offset_of!(RawFrame, head_crc), head_crc);
    span
}

/// Sums any other page; in a page of the directory, each frame's sums are taken over first.
fn page(file: &mut [u8], at: usize) {
    let footer = at + PAGE - size_of::<RawFooter>();
    let kind = footer + offset_of!(RawFooter, kind);
    if file[kind..kind + 4] == SECTION_DIRECTORY {
        let used = u32_at(file, footer + offset_of!(RawFooter, used));
        let entries = used.min(PAGE) / size_of::<RawDirectoryEntry>();
        for entry in (0..entries).map(|n| at + n * size_of::<RawDirectoryEntry>()) {
            let frame = u64_at(file, entry + offset_of!(RawDirectoryEntry, position)) as usize;
            if entry + size_of::<RawDirectoryEntry>() > footer || frame > file.len() {
                break;
            }
            let head = u32_at(file, frame + offset_of!(RawFrame, head_crc)) as u32;
            put(file, entry + offset_of!(RawDirectoryEntry, head_crc), head);
            let data = u32_at(file, frame + offset_of!(RawFrame, data_crc)) as u32;
            put(file, entry + offset_of!(RawDirectoryEntry, data_crc), data);
        }
    }
    let crc = crc32fast::hash(&file[at..at + PAGE_SUMMED]);
    put(file, at + PAGE_SUMMED, crc);
}

/// In an [MS-HRL] file: the header, the metadata headers back from the end, and their
/// entries. Data checksums are left as they are; zero means none.
pub fn ms_hrl(file: &mut [u8]) {
    if file.len() < 4096 || !ms::is_ms_hrl(file) {
        return;
    }
    ms_sum(file, 0, 40, 4096);
    let size = u32_at(file, 56);
    let mut next = (u64_at(file, 44) as usize).checked_sub(size);
    while let Some(at) = next.filter(|at| *at >= 4096 && *at <= file.len().saturating_sub(32)) {
        ms_sum(file, at, 12, 32);
        let entries = u32_at(file, at + 8).min(size / 32);
        let end = file.len();
        for entry in (1..=entries)
            .map(|n| at + n * 32)
            .take_while(|at| at + 32 <= end)
        {
            ms_sum(file, entry, 8, 32);
        }
        let distance = u64_at(file, at) as usize;
        next = (distance >= 32).then(|| at.checked_sub(distance)).flatten();
    }
}

/// Puts the [MS-HRL] checksum of the `len` bytes at `start` into its field.
fn ms_sum(file: &mut [u8], start: usize, field: usize, len: usize) {
    let field = start + field;
    let sum = ms::checksum(&[&file[start..field], &file[field + 4..start + len]]);
    put(file, field, sum);
}

fn put(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn u64_at(file: &[u8], at: usize) -> u64 {
    let bytes = file.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

fn u32_at(file: &[u8], at: usize) -> usize {
    u64_at(file, at) as u32 as usize
}
