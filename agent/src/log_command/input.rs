//! A log as a file to be read: which format it is of, and what its errors mean to whoever
//! gave its name.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use hrl_format::units::ByteOffset;
use hrl_format::{VolumeKey, ms};
use libreplica::key_file::read_key_file;
use libreplica::{Error, ErrorKind, IoContext, Result};

/// Bytes read at a time where a log is read from front to back.
const READ_AHEAD: usize = 1 << 20;

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Ours, version 3.
    Native,
    /// [MS-HRL].
    MsHrl,
}

impl Format {
    /// As the command line and JSON call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "hrl",
            Self::MsHrl => "ms-hrl",
        }
    }
}

/// A log to be read.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    file: File,
    format: Format,
}

impl Input {
    /// Opens the file at `path` and looks how it begins. What begins otherwise is taken as a
    /// native log, whose reader says what is wrong with it.
    ///
    /// # Errors
    /// If it cannot be opened, or is a folder.
    pub fn open(path: &Path) -> Result<Self> {
        let operation = "open the log";
        let mut file = File::open(path).at(operation, path)?;
        let mut start = Vec::new();
        (&mut file)
            .take(8)
            .read_to_end(&mut start)
            .at(operation, path)?;
        file.rewind().at(operation, path)?;
        let format = if ms::is_ms_hrl(&start) {
            Format::MsHrl
        } else {
            Format::Native
        };
        let path = path.to_owned();
        Ok(Self { path, file, format })
    }

    /// Refuses a log of the other format.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] then.
    pub fn must_be_native(&self, operation: &'static str) -> Result<()> {
        match self.format {
            Format::Native => Ok(()),
            Format::MsHrl => Err(Error::new(ErrorKind::Invalid, operation)
                .path(&self.path)
                .detail("it is an [MS-HRL] log")
                .advice("make it a native one with `replica log convert --to hrl`")),
        }
    }

    /// Which format it is of.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be read at any place.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The file, given away.
    pub fn into_file(self) -> File {
        self.file
    }

    /// How long it is.
    ///
    /// # Errors
    /// What the system says.
    pub fn len(&self) -> Result<u64> {
        let metadata = self.file.metadata().at("open the log", &self.path)?;
        Ok(metadata.len())
    }

    /// The file, to be read once from its start.
    ///
    /// # Errors
    /// If it cannot be wound back.
    pub fn stream(&self) -> Result<BufReader<&File>> {
        let mut file = &self.file;
        file.rewind().at("read the log", &self.path)?;
        Ok(BufReader::with_capacity(READ_AHEAD, file))
    }

    /// A native log's error, with its file and the way out.
    pub fn native_error(&self, operation: &'static str, error: hrl_format::Error) -> Error {
        native_error(operation, &self.path, error)
    }

    /// An [MS-HRL] log's error, with its file and the way out.
    pub fn ms_error(&self, operation: &'static str, error: ms::Error) -> Error {
        ms_error(operation, &self.path, error)
    }
}

/// The key in the file at `path`, if there is a path.
///
/// # Errors
/// If it cannot be read, or holds no key.
pub fn key(path: Option<&Path>) -> Result<Option<VolumeKey>> {
    path.map(read_key_file).transpose()
}

/// A native log's error, with its file and the way out.
pub fn native_error(operation: &'static str, path: &Path, error: hrl_format::Error) -> Error {
    use hrl_format::ErrorKind as Kind;
    let advice = match error.kind() {
        Kind::KeyMissing => Some("give the volume's key with --key-file"),
        Kind::KeyWrong => Some("give the key that it was written with"),
        Kind::KeyUnused => Some("leave --key-file away"),
        Kind::NotSealed | Kind::Cut => Some("`replica log salvage` keeps what is whole"),
        Kind::Damaged | Kind::Foreign => {
            Some("take another copy, or keep what is whole before it with `replica log salvage`")
        }
        _ => None,
    };
    let offset = error.offset();
    let mut shown = Error::log(operation, error).path(path);
    if let Some(offset) = offset {
        shown = shown.offset(ByteOffset::new(offset.get()));
    }
    match advice {
        Some(advice) => shown.advice(advice),
        None => shown,
    }
}

/// An [MS-HRL] log's error, with its file and the way out.
pub fn ms_error(operation: &'static str, path: &Path, error: ms::Error) -> Error {
    let (kind, advice) = match error {
        ms::Error::Io { source, .. } => return Error::io(operation, source).path(path),
        ms::Error::NotMsHrl | ms::Error::TooLong { .. } => (ErrorKind::Invalid, None),
        ms::Error::Unsupported(_) => (ErrorKind::Unsupported, None),
        ms::Error::NotClosed => {
            let advice = "have its writer close it: only its end leads to what it holds";
            (ErrorKind::Damaged, Some(advice))
        }
        _ => (ErrorKind::Damaged, Some("take another copy")),
    };
    let shown = Error::new(kind, operation).path(path).source(error);
    match advice {
        Some(advice) => shown.advice(advice),
        None => shown,
    }
}
