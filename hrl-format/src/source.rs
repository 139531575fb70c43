//! Where a sealed log is read from: positioned reads through a shared reference, so that
//! an index streams while frames are read, from as many threads as there are.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::units::FileOffset;

/// Bytes that can be read anywhere, in any order.
pub trait ReadAt {
    /// How many there are.
    ///
    /// # Errors
    /// What the system says.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buffer` from `at` on.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()>;
}

impl ReadAt for File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, at.get())
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        let start = usize::try_from(at.get()).unwrap_or(usize::MAX);
        let from = self.get(start..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        self.as_slice().size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        self.as_slice().read_exact_at(buffer, at)
    }
}

macro_rules! forward {
    ($pointer:ty) => {
        impl<T: ReadAt + ?Sized> ReadAt for $pointer {
            fn size(&self) -> io::Result<u64> {
                (**self).size()
            }

            fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
                (**self).read_exact_at(buffer, at)
            }
        }
    };
}

forward!(&T);
forward!(Arc<T>);
forward!(Box<T>);

/// Makes anything that reads and seeks readable at any place, one reader at a time.
#[derive(Debug)]
pub struct Seekable<R>(Mutex<R>);

impl<R: Read + Seek> Seekable<R> {
    /// Takes the reader over; where it stands does not matter.
    pub const fn new(reader: R) -> Self {
        Self(Mutex::new(reader))
    }
}

impl<R: Read + Seek> ReadAt for Seekable<R> {
    fn size(&self) -> io::Result<u64> {
        // A panic elsewhere leaves the reader at some place; every read seeks first.
        let mut reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reader.seek(SeekFrom::End(0))
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        let mut reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reader.seek(SeekFrom::Start(at.get()))?;
        reader.read_exact(buffer)
    }
}
