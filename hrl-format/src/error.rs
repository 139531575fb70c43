//! The one error of the format: what kind, where in the file, in which frame, and what
//! was found. Callers match the kind; the text is for people.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::id::RandomError;
use crate::units::{FileOffset, FrameNumber};

/// What went wrong, to be matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The system failed to read or write; see [`Error::io`].
    Io,
    /// The file does not begin as a log does.
    NotALog,
    /// Another version, or a feature that this version does not know.
    Unsupported,
    /// The file ends without a seal, at a frame's end: never sealed, or cut there.
    NotSealed,
    /// The file ends within something that it began.
    Cut,
    /// A checksum or a field is not what it must be.
    Damaged,
    /// A part that belongs to another log, or to another place in this one.
    Foreign,
    /// The checksums agree, but the cipher's proof does not: altered by intent, or
    /// sealed with another key under the same name.
    Forged,
    /// The log is encrypted and no key was given.
    KeyMissing,
    /// The log is encrypted with another key than the one given.
    KeyWrong,
    /// A key was given and the log is not encrypted.
    KeyUnused,
    /// The logs do not follow one another.
    Chain,
    /// The caller asked for what makes no sense.
    Invalid,
    /// An earlier write failed; nothing more may follow it.
    Broken,
    /// The system gave no random bytes.
    Random,
}

/// What went wrong, where, and why.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    what: String,
    at: Option<FileOffset>,
    frame: Option<FrameNumber>,
    // Shared, so that a report may hold the error and its caller too.
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// The format's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; `what` says what was found, in a few words.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        let what = what.into();
        Self(Box::new(Inner {
            kind,
            what,
            at: None,
            frame: None,
            source: None,
        }))
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, what)
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    pub(crate) fn from_io(what: &'static str, source: io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, what);
        error.0.source = Some(Arc::new(source));
        error
    }

    /// Where in the file. An earlier, more exact answer stays.
    #[must_use]
    pub(crate) fn at(mut self, at: FileOffset) -> Self {
        self.0.at.get_or_insert(at);
        self
    }

    /// In which frame. An earlier, more exact answer stays.
    #[must_use]
    pub(crate) fn in_frame(mut self, frame: FrameNumber) -> Self {
        self.0.frame.get_or_insert(frame);
        self
    }

    /// The kind, to be matched.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Where in the file it was found, if it was in one place.
    pub fn offset(&self) -> Option<FileOffset> {
        self.0.at
    }

    /// In which frame, if it was in one.
    pub fn frame(&self) -> Option<FrameNumber> {
        self.0.frame
    }

    /// Whether the file ended where more was expected: the file's fault, not the system's.
    pub(crate) fn is_past_end(&self) -> bool {
        self.io()
            .is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
    }

    /// The system's error, if there was one.
    pub fn io(&self) -> Option<&io::Error> {
        self.0
            .source
            .as_deref()
            .and_then(|source| source.downcast_ref())
    }
}

impl From<RandomError> for Error {
    fn from(source: RandomError) -> Self {
        let mut error = Self::new(ErrorKind::Random, "make a nonce or an id");
        error.0.source = Some(Arc::new(source));
        error
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.write_str(&inner.what)?;
        match (inner.frame, inner.at) {
            (Some(frame), Some(at)) => write!(f, " (frame {frame}, byte {at} of the file)")?,
            (Some(frame), None) => write!(f, " (frame {frame})")?,
            (None, Some(at)) => write!(f, " (byte {at} of the file)")?,
            (None, None) => {}
        }
        inner
            .source
            .as_ref()
            .map_or(Ok(()), |source| write!(f, ": {source}"))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
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
