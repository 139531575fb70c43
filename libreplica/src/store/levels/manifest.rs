//! The manifest: which level files there are, and which logs each was made of. One line of
//! text and a body of JSON, as the catalogue; replaced whole, after the files that it lists are
//! durable and before those that it does not are removed.

use std::path::PathBuf;

use hrl_format::id::VolumeId;
use hrl_format::units::{ByteLen, Epoch, VolumeSize};
use serde::{Deserialize, Serialize};

use super::layout::{Head, Run};
use crate::error::{Error, ErrorKind, Result};
use crate::store::durable::{self, Replaced, damaged, read_small};
use crate::store::json::{Text, number, parse_hex32, text};
use crate::store::layout::VolumeFolder;

/// The first word, and the version.
const MAGIC: &str = "replica-levels 1";
const READ: &str = "read the manifest of the levels";

/// The level files of a volume, in no order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    #[serde(with = "text")]
    pub(super) volume: VolumeId,
    pub(super) files: Vec<Listed>,
}

/// A level file, as the manifest lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    #[serde(with = "text")]
    pub(super) run: Run,
    pub(super) level: u32,
    pub(super) logs: u64,
    #[serde(with = "number", rename = "first_epoch")]
    pub(super) first: Epoch,
    #[serde(with = "number", rename = "last_epoch")]
    pub(super) last: Epoch,
    #[serde(with = "number", rename = "size_bytes")]
    pub(super) size: VolumeSize,
    pub(super) entries: u64,
    #[serde(with = "number")]
    pub(super) bytes: ByteLen,
}

impl Text for Run {
    fn write(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }

    fn read(text: &str) -> Option<Self> {
        parse_hex32(text).map(Self)
    }
}

impl Listed {
    pub(super) fn of(head: &Head, bytes: ByteLen) -> Self {
        Self {
            run: head.run,
            level: head.level,
            logs: head.logs,
            first: head.first,
            last: head.last,
            size: head.size,
            entries: head.entries,
            bytes,
        }
    }

    /// What the file must say of itself.
    pub(super) fn head(&self, volume: VolumeId) -> Head {
        Head {
            volume,
            run: self.run,
            level: self.level,
            logs: self.logs,
            first: self.first,
            last: self.last,
            size: self.size,
            entries: self.entries,
        }
    }

    /// The file's name: its first epoch, so that a listing is in order, and half of the run.
    pub(super) fn name(&self) -> String {
        name(self.first, &self.run)
    }
}

pub(super) fn name(first: Epoch, run: &Run) -> String {
    let run = run.to_string();
    format!("{:016x}-{}.lvl", first.get(), &run[..32])
}

/// Where a level file is.
pub(super) fn path_of(folder: &VolumeFolder, name: &str) -> PathBuf {
    folder.levels().join(name)
}

/// The manifest; empty if there is none.
pub(super) fn load(folder: &VolumeFolder) -> Result<Manifest> {
    let path = folder.level_manifest();
    let Some(bytes) = read_small(&path)? else {
        return Ok(empty(folder));
    };
    let bad = |why: &str| damaged(READ, &path, why);
    let end = bytes.iter().position(|&b| b == b'\n');
    let (line, body) = bytes.split_at(end.ok_or_else(|| bad("no first line"))?);
    let body = &body[1..];
    let line = str::from_utf8(line).map_err(|_| bad("the first line is not text"))?;
    if line != first_line(body) {
        return Err(bad("its first line does not fit the rest"));
    }
    let manifest: Manifest =
        serde_json::from_slice(body).map_err(|e| bad("not the JSON of a manifest").source(e))?;
    match manifest.volume == folder.id() {
        true => Ok(manifest),
        false => Err(bad("it is of another volume")),
    }
}

/// One without files.
pub(super) fn empty(folder: &VolumeFolder) -> Manifest {
    Manifest {
        volume: folder.id(),
        files: Vec::new(),
    }
}

/// Replaces the manifest. Durable when it returns.
pub(super) fn save(folder: &VolumeFolder, manifest: &Manifest) -> Result<()> {
    let body = serde_json::to_vec(manifest)
        .map_err(|e| Error::new(ErrorKind::Invalid, "write the levels' manifest").source(e))?;
    let mut bytes = first_line(&body).into_bytes();
    bytes.push(b'\n');
    bytes.extend_from_slice(&body);
    let file = [(folder.level_manifest(), &bytes[..])];
    durable::replace_all(&file, &folder.levels()).map_err(Replaced::into_error)
}

fn first_line(body: &[u8]) -> String {
    let head = format!("{MAGIC} {}", body.len());
    let mut crc = crc32fast::Hasher::new();
    crc.update(head.as_bytes());
    crc.update(body);
    format!("{head} {:08x}", crc.finalize())
}
