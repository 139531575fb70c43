//! The catalogue on disk: two copies, alike but for the moment between their writings. Each is
//! one line of text (format, sequence number, length, CRC32 of all else) and a body of JSON.
//! The newest valid copy counts. Both are written before a change is acknowledged, so that
//! losing either loses nothing.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use super::catalogue::Catalogue;
use super::durable::{self, Replaced, damaged, read_small};
use super::layout::VolumeFolder;
use crate::error::{Error, ErrorKind, Result};

/// The first word of a copy, and the format's version.
const MAGIC: &str = "replica-catalogue 1";
const READ: &str = "read the catalogue";

/// A catalogue as it was read, and what was wrong with its copies.
#[derive(Debug)]
pub(super) struct Loaded<T = Catalogue> {
    pub(super) catalogue: T,
    pub(super) sequence: u64,
    /// The copy that was damaged, missing or older than the other; a writer renews it.
    pub(super) stale: Option<Error>,
}

/// Reads the newest valid copy. Only that one is understood whole: thousands of logs take tens of
/// milliseconds.
pub(super) fn load(folder: &VolumeFolder) -> Result<Loaded> {
    load_as(folder, Copy::catalogue)
}

/// What people call the volume, without the rest.
pub(super) fn load_name(folder: &VolumeFolder) -> Result<String> {
    Ok(load_as(folder, Copy::name)?.catalogue)
}

fn load_as<T>(
    folder: &VolumeFolder,
    understand: impl Fn(&Copy, &VolumeFolder) -> Result<T>,
) -> Result<Loaded<T>> {
    let [first, second] = folder.catalogues().map(Copy::read);
    let is_first = |a: &Copy, b: &Copy| a.sequence >= b.sequence;
    let (newer, other) = match (first, second) {
        (Ok(first), Ok(second)) if is_first(&first, &second) => (first, Ok(second)),
        (Ok(first), Ok(second)) => (second, Ok(first)),
        (Ok(copy), Err(error)) | (Err(error), Ok(copy)) => (copy, Err(error)),
        (Err(first), Err(second)) => return Err(neither(folder, first, second)),
    };
    match understand(&newer, folder) {
        Ok(catalogue) => Ok(Loaded {
            catalogue,
            sequence: newer.sequence,
            stale: stale(folder, &newer, other)?,
        }),
        Err(error) => {
            let error = passable(error)?;
            let copy = match other {
                Ok(copy) => copy,
                Err(other) => return Err(neither(folder, error, other)),
            };
            match understand(&copy, folder) {
                Ok(catalogue) => Ok(Loaded {
                    catalogue,
                    sequence: copy.sequence,
                    stale: Some(error),
                }),
                Err(other) => Err(neither(folder, error, other)),
            }
        }
    }
}

/// What is wrong with the copy that is not used.
fn stale(folder: &VolumeFolder, newer: &Copy, other: Result<Copy>) -> Result<Option<Error>> {
    let other = match other {
        Ok(other) => other,
        Err(error) => return passable(error).map(Some),
    };
    let is_same = other.bytes == newer.bytes;
    Ok((!is_same).then(|| {
        Error::new(ErrorKind::Damaged, READ)
            .path(folder.path())
            .detail(format!(
                "a copy is older than sequence number {}, or another one",
                newer.sequence
            ))
    }))
}

/// Only what is in a copy makes it doubtful; what is of a newer version, or cannot be read now,
/// must not be passed over.
fn passable(error: Error) -> Result<Error> {
    match error.kind() {
        ErrorKind::Damaged | ErrorKind::NotFound | ErrorKind::Foreign => Ok(error),
        _ => Err(error),
    }
}

/// The catalogue of a volume, as it was read last. As long as the first lines of both copies are
/// the same nothing has changed, and it is not read again.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<Option<(Lines, Arc<Catalogue>)>>);

/// The first lines of both copies.
type Lines = [Vec<u8>; 2];

/// A first line is shorter than this.
const LINE: usize = 128;

impl Known {
    /// The catalogue as it is now.
    pub(super) fn load(&self, folder: &VolumeFolder) -> Result<Arc<Catalogue>> {
        // Read first: whatever is understood behind it is at least as new.
        let lines = first_lines(folder);
        // A panic elsewhere leaves what was known before.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(lines), Some((known, catalogue))) = (&lines, known.as_ref())
            && lines == known
        {
            return Ok(Arc::clone(catalogue));
        }
        let loaded = load(folder)?;
        let catalogue = Arc::new(loaded.catalogue);
        // A doubtful pair is looked at again each time.
        let sound = loaded.stale.is_none();
        *known = lines
            .filter(|_| sound)
            .map(|lines| (lines, Arc::clone(&catalogue)));
        Ok(catalogue)
    }
}

/// `None` if a copy cannot be read.
fn first_lines(folder: &VolumeFolder) -> Option<Lines> {
    let [first, second] = folder.catalogues().map(|path| {
        let mut line = Vec::with_capacity(LINE);
        let file = File::open(path).ok()?;
        file.take(LINE as u64).read_to_end(&mut line).ok()?;
        let end = line.iter().position(|&b| b == b'\n')?;
        line.truncate(end);
        Some(line)
    });
    Some([first?, second?])
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

/// A copy whose first line fits the rest.
struct Copy {
    path: PathBuf,
    bytes: Vec<u8>,
    sequence: u64,
    /// Where the body begins.
    body: usize,
}

/// The one field that tells volumes apart for people.
#[derive(Deserialize)]
struct Name {
    name: String,
}

impl Copy {
    fn read(path: PathBuf) -> Result<Self> {
        let bytes =
            read_small(&path)?.ok_or_else(|| Error::new(ErrorKind::NotFound, READ).path(&path))?;
        let (sequence, body) = open_envelope(&bytes, &path)?;
        Ok(Self {
            sequence,
            body: bytes.len() - body.len(),
            path,
            bytes,
        })
    }

    fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        serde_json::from_slice(&self.bytes[self.body..])
            .map_err(|e| damaged(READ, &self.path, "not the JSON of a catalogue").source(e))
    }

    fn name(&self, _: &VolumeFolder) -> Result<String> {
        self.parse().map(|Name { name }| name)
    }

    fn catalogue(&self, folder: &VolumeFolder) -> Result<Catalogue> {
        let catalogue: Catalogue = self.parse()?;
        if catalogue.volume != folder.id() {
            return Err(Error::new(ErrorKind::Foreign, READ)
                .path(&self.path)
                .detail(format!("it is of volume {}", catalogue.volume)));
        }
        match catalogue.fault() {
            Some(fault) => Err(damaged(READ, &self.path, fault)),
            None => Ok(catalogue),
        }
    }
}

/// Whether a copy can be used, whatever the other is.
pub(super) fn check_copy(path: &Path, folder: &VolumeFolder) -> Result<()> {
    let copy = Copy::read(path.to_owned())?;
    copy.catalogue(folder).map(drop)
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
