//! The one error of the library: what kind, during what, where, and why. Callers match
//! the kind; the text is for people and says what to do next where there is something
//! to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use hrl_format::id::VolumeId;
use hrl_format::units::ByteOffset;

/// What went wrong, to be matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The system refused or failed an operation; see the source for errno.
    Io,
    /// No room in the store, the spool or the state folder.
    Full,
    /// The store, or a file of it, does not hold what it must; not usable as it is.
    Damaged,
    /// Encrypted with another key, or a key is missing, or given where none is used.
    Key,
    /// The thing asked for is not there.
    NotFound,
    /// It is there already, or another holds it.
    Exists,
    /// In use by another process: a lock, a mount, a lease.
    Busy,
    /// Belongs to another state folder, volume, device or generation.
    Foreign,
    /// Written by a newer version, or with a feature this version does not know.
    Unsupported,
    /// The kernel lacks what is needed.
    Kernel,
    /// The device is gone.
    Vanished,
    /// The device has another size than before.
    Resized,
    /// An argument, a configuration or a request that makes no sense.
    Invalid,
    /// It took longer than its limit.
    TimedOut,
    /// The state of the volume does not allow it now.
    State,
    /// Source and image differ, or tracking was lost: a resync is needed.
    ResyncNeeded,
    /// The volume was promoted elsewhere: what an older generation ships is refused.
    Fenced,
}

impl ErrorKind {
    /// As it stands in JSON: a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Full => "full",
            Self::Damaged => "damaged",
            Self::Key => "key",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Busy => "busy",
            Self::Foreign => "foreign",
            Self::Unsupported => "unsupported",
            Self::Kernel => "kernel",
            Self::Vanished => "vanished",
            Self::Resized => "resized",
            Self::Invalid => "invalid",
            Self::TimedOut => "timed_out",
            Self::State => "state",
            Self::ResyncNeeded => "resync_needed",
            Self::Fenced => "fenced",
        }
    }
}

/// What went wrong, during what, where and why.
///
/// ```
/// use libreplica::{Error, ErrorKind};
/// let error = Error::new(ErrorKind::Full, "append to the log")
///     .path("/backup/replica")
///     .advice("free space there, or shorten --retain");
/// assert_eq!(error.kind(), ErrorKind::Full);
/// assert!(error.to_string().starts_with("append to the log: /backup/replica"));
/// ```
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    detail: Option<String>,
    path: Option<PathBuf>,
    offset: Option<ByteOffset>,
    volume: Option<VolumeId>,
    advice: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` while doing `operation` ("read the device").
    pub fn new(kind: ErrorKind, operation: &'static str) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            detail: None,
            path: None,
            offset: None,
            volume: None,
            advice: None,
            source: None,
        }))
    }

    /// An error from the system. `ENOSPC`, `EDQUOT`, `ENODEV`, `ENXIO`, `ENOENT`, `EBUSY`
    /// and `ETIMEDOUT` become the kinds they mean; the rest is [`ErrorKind::Io`].
    pub fn io(operation: &'static str, source: io::Error) -> Self {
        Self::new(Self::io_kind(&source), operation).source(source)
    }

    fn io_kind(source: &io::Error) -> ErrorKind {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::Full,
            Some(libc::ENODEV | libc::ENXIO) => ErrorKind::Vanished,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EEXIST) => ErrorKind::Exists,
            Some(libc::EBUSY) => ErrorKind::Busy,
            Some(libc::ETIMEDOUT) => ErrorKind::TimedOut,
            _ => ErrorKind::Io,
        }
    }

    /// An error from a log. What a log file holds that it must not is [`ErrorKind::Damaged`]; what
    /// the system refused is the kind that it means.
    pub fn log(operation: &'static str, source: hrl_format::Error) -> Self {
        use hrl_format::ErrorKind as Log;
        let kind = match (source.kind(), source.io()) {
            (Log::Io, Some(io)) => Self::io_kind(io),
            (Log::Io | Log::Broken | Log::Random, _) => ErrorKind::Io,
            (Log::Unsupported, _) => ErrorKind::Unsupported,
            (Log::KeyMissing | Log::KeyWrong | Log::KeyUnused, _) => ErrorKind::Key,
            (Log::Invalid, _) => ErrorKind::Invalid,
            _ => ErrorKind::Damaged,
        };
        Self::new(kind, operation).source(source)
    }

    /// What exactly, in a few words.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Which file, folder or device.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// Where on it.
    #[must_use]
    pub fn offset(mut self, offset: ByteOffset) -> Self {
        self.0.offset = Some(offset);
        self
    }

    /// Which volume.
    #[must_use]
    pub fn volume(mut self, volume: VolumeId) -> Self {
        self.0.volume = Some(volume);
        self
    }

    /// What to do next.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Why.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The kind, to be matched.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno of the innermost system error, if there is one.
    pub fn errno(&self) -> Option<i32> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(self);
        while let Some(error) = next {
            if let Some(errno) = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::raw_os_error)
            {
                return Some(errno);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.write_str(inner.operation)?;
        if let Some(path) = &inner.path {
            write!(f, ": {}", path.display())?;
        }
        if let Some(offset) = inner.offset {
            write!(f, " at byte {offset}")?;
        }
        if let Some(volume) = inner.volume {
            write!(f, " (volume {volume})")?;
        }
        match (&inner.detail, &inner.source) {
            (Some(detail), Some(source)) => write!(f, ": {detail}: {source}")?,
            (Some(detail), None) => write!(f, ": {detail}")?,
            (None, Some(source)) => write!(f, ": {source}")?,
            (None, None) => write!(f, ": {}", inner.kind.as_str())?,
        }
        if let Some(advice) = &inner.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// Names the operation and the path of a failed system call.
pub trait IoContext<T> {
    /// Turns an [`io::Error`] into an [`Error`] that says what was done to what.
    ///
    /// # Errors
    /// The error that was there, with its context.
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::io(operation, source).path(path))
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|errno| Error::io(operation, errno.into()).path(path))
    }
}
