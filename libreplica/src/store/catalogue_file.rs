//! The catalogue on disk: two copies, alike but for the moment between their writings. Each is
//! one line of text (format, sequence number, length, CRC32 of all else) and a body of JSON.
//! The newest valid copy counts. Both are written before a change is acknowledged, so that
//! losing either loses nothing.

use std::path::{Path, PathBuf};

use super::catalogue::Catalogue;
use super::durable::{self, Replaced, damaged, read_small};
use super::layout::VolumeFolder;
use crate::error::{Error, ErrorKind, Result};

/// The first word of a copy, and the format's version.
const MAGIC: &str = "replica-catalogue 1";
const READ: &str = "read the catalogue";

/// A catalogue as it was read, and what was wrong with its copies.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) catalogue: Catalogue,
    pub(super) sequence: u64,
    /// The copy that was damaged, missing or older than the other; a writer renews it.
    pub(super) stale: Option<Error>,
}

/// Reads the newest valid copy.
pub(super) fn load(folder: &VolumeFolder) -> Result<Loaded> {
    let [first, second] = folder.catalogues().map(|path| load_copy(&path, folder));
    match (first, second) {
        (Ok((first, a)), Ok((second, b))) => {
            let older = |than: u64| {
                Error::new(ErrorKind::Damaged, READ)
                    .path(folder.path())
                    .detail(format!("a copy is older than sequence number {than}"))
            };
            let stale = (a != b).then(|| older(a.max(b)));
            let (catalogue, sequence) = if a >= b { (first, a) } else { (second, b) };
            Ok(Loaded {
                catalogue,
                sequence,
                stale,
            })
        }
        (Ok((catalogue, sequence)), Err(error)) | (Err(error), Ok((catalogue, sequence))) => {
            // Only what is in the copy makes it doubtful; what is of a newer version, or cannot
            // be read now, must not be passed over.
            match error.kind() {
                ErrorKind::Damaged | ErrorKind::NotFound | ErrorKind::Foreign => Ok(Loaded {
                    catalogue,
                    sequence,
                    stale: Some(error),
                }),
                _ => Err(error),
            }
        }
        (Err(first), Err(second)) => Err(neither(folder, first, second)),
    }
}

/// The error if neither copy can be used: of the one that says more.
fn neither(folder: &VolumeFolder, first: Error, second: Error) -> Error {
    const LOST: &str = "neither copy of the catalogue can be used, and nothing was changed; the logs \
                        and the image are still there: docs/store.md says what can be done";
    match (first.kind(), second.kind()) {
        (ErrorKind::NotFound, ErrorKind::NotFound) => Error::new(ErrorKind::NotFound, READ)
            .path(folder.path())
            .detail("no volume of this id is there"),
        (ErrorKind::Foreign, ErrorKind::Foreign) => {
            first.advice("a volume's folder bears its id: give it its name back")
        }
        (ErrorKind::Damaged, ErrorKind::Damaged | ErrorKind::NotFound) => first.advice(LOST),
        (ErrorKind::NotFound, ErrorKind::Damaged) => second.advice(LOST),
        (ErrorKind::Damaged | ErrorKind::NotFound, _) => second,
        _ => first,
    }
}

/// Writes both copies. Returns when they are durable.
pub(super) fn save(
    folder: &VolumeFolder,
    catalogue: &Catalogue,
    sequence: u64,
) -> Result<(), Replaced> {
    let bytes = encode(catalogue, sequence).map_err(Replaced::None)?;
    let copies: [(PathBuf, &[u8]); 2] = folder.catalogues().map(|path| (path, &bytes[..]));
    durable::replace_all(&copies, folder.path())
}

fn encode(catalogue: &Catalogue, sequence: u64) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(catalogue)
        .map_err(|e| Error::new(ErrorKind::Invalid, "write the catalogue").source(e))?;
    let head = format!("{MAGIC} {sequence} {}", body.len());
    let mut bytes = format!("{head} {:08x}\n", checksum(&head, &body)).into_bytes();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn checksum(head: &str, body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head.as_bytes());
    crc.update(body);
    crc.finalize()
}

fn load_copy(path: &Path, folder: &VolumeFolder) -> Result<(Catalogue, u64)> {
    let bytes =
        read_small(path)?.ok_or_else(|| Error::new(ErrorKind::NotFound, READ).path(path))?;
    let (sequence, body) = open_envelope(&bytes, path)?;
    let catalogue: Catalogue = serde_json::from_slice(body)
        .map_err(|e| damaged(READ, path, "not the JSON of a catalogue").source(e))?;
    if catalogue.volume != folder.id() {
        return Err(Error::new(ErrorKind::Foreign, READ)
            .path(path)
            .detail(format!("it is of volume {}", catalogue.volume)));
    }
    match catalogue.fault() {
        Some(fault) => Err(damaged(READ, path, fault)),
        None => Ok((catalogue, sequence)),
    }
}

/// Whether a copy can be used, whatever the other is.
pub(super) fn check_copy(path: &Path, folder: &VolumeFolder) -> Result<()> {
    load_copy(path, folder).map(|_| ())
}

/// Checks the first line against the body.
fn open_envelope<'a>(bytes: &'a [u8], path: &Path) -> Result<(u64, &'a [u8])> {
    let bad = |why: &str| damaged(READ, path, why);
    let end = bytes.iter().position(|&b| b == b'\n');
    let (line, body) = bytes.split_at(end.ok_or_else(|| bad("no first line"))?);
    let body = &body[1..];
    let line = str::from_utf8(line).map_err(|_| bad("the first line is not text"))?;
    let (head, crc) = line
        .rsplit_once(' ')
        .ok_or_else(|| bad("the first line is short"))?;
    if crc != format!("{:08x}", checksum(head, body)) {
        return Err(bad("the checksum does not match"));
    }
    let Some(fields) = head
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.strip_prefix(' '))
    else {
        return Err(Error::new(ErrorKind::Unsupported, READ)
            .path(path)
            .detail(format!("`{head}` is not `{MAGIC}`"))
            .advice("it was written by a newer version; use that one"));
    };
    let fields = fields.split_once(' ');
    let (sequence, len) = fields.ok_or_else(|| bad("the first line is short"))?;
    match (sequence.parse(), len.parse::<usize>()) {
        (Ok(sequence), Ok(len)) if len == body.len() => Ok((sequence, body)),
        _ => Err(bad("the first line does not fit the rest")),
    }
}
