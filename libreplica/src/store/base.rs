//! The base of a volume without a key: a raw, sparse image of it as it was at one epoch. It is
//! the one file of a store that is written in place. That is safe because whatever is written
//! there also stands in the logs over it until the write is durable and the catalogue
//! says so: a reader never sees a byte of the image that is being replaced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use hrl_format::units::{ByteLen, ByteOffset, Extent, VolumeSize};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::durable::{StoreFile, damaged};
use super::layout::VolumeFolder;
use crate::error::{Error, Result};

/// Zeroes shorter than this, within data, are written as they are: a hole would cost more
/// calls than it saves room.
const SHORTEST_HOLE: usize = 64 << 10;
/// Where holes may begin: filesystems keep no finer ones.
const GRAIN: usize = 4 << 10;

/// The base, open for writing.
#[derive(Debug)]
pub(super) struct BaseWriter {
    file: StoreFile,
    /// From here on all is a hole, and zeroes need not be punched: so a first copy in the order of
    /// the volume punches nothing.
    untouched: ByteOffset,
}

impl BaseWriter {
    /// A new, empty base of `size`.
    pub(super) fn create(folder: &VolumeFolder, size: VolumeSize) -> Result<Self> {
        let file = StoreFile::create(folder.base())?;
        file.set_len(ByteLen::new(size.get()))?;
        Ok(Self {
            file,
            untouched: ByteOffset::ZERO,
        })
    }

    /// The base that is there.
    pub(super) fn open(folder: &VolumeFolder) -> Result<Self> {
        Ok(Self {
            file: StoreFile::open(folder.base())?,
            untouched: ByteOffset::new(u64::MAX),
        })
    }

    /// Makes the image at least this long.
    pub(super) fn grow(&self, size: VolumeSize) -> Result<()> {
        let len = ByteLen::new(size.get());
        if self.file.len()? < len {
            self.file.set_len(len)?;
        }
        Ok(())
    }

    /// Makes the image at most this long. That need not last: nothing reads what lies behind.
    pub(super) fn cut(&self, size: VolumeSize) -> Result<()> {
        let len = ByteLen::new(size.get());
        if self.file.len()? > len {
            self.file.set_len(len)?;
        }
        Ok(())
    }

    /// Writes `data` at `offset`; longer stretches of zeroes become holes.
    pub(super) fn write(&mut self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        for stretch in Stretches::new(data) {
            let at = ByteOffset::new(offset.get() + stretch.start as u64);
            let end = ByteOffset::new(offset.get() + stretch.end as u64);
            match stretch.kind {
                StretchKind::Data => {
                    self.untouched = self.untouched.max(end);
                    self.file.write_at(at, &data[stretch.start..stretch.end])?;
                }
                StretchKind::Zeroes => self.zeroes(Extent::between(at, end))?,
            }
        }
        Ok(())
    }

    /// Makes `extent` read as zeroes.
    pub(super) fn zeroes(&self, extent: Extent) -> Result<()> {
        let end = extent.end().min(self.untouched);
        if extent.offset() >= end {
            return Ok(());
        }
        self.file.punch(Extent::between(extent.offset(), end))
    }

    /// Returns when all that was written is durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync()
    }
}

/// The base, open for reading.
#[derive(Debug)]
pub(super) struct BaseReader {
    file: File,
    path: PathBuf,
}

impl BaseReader {
    pub(super) fn open(folder: &VolumeFolder) -> Result<Self> {
        const OPEN: &str = "open the base image";
        let path = folder.base();
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(damaged(OPEN, &path, "the base image is not there"))
            }
            Err(e) => Err(Error::io(OPEN, e).path(path)),
        }
    }

    /// Fills `buffer` from `offset` on; beyond the image's end it reads zeroes.
    pub(super) fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.get() + done as u64;
            match self.file.read_at(&mut buffer[done..], at) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let error = Error::io("read the base image", e);
                    return Err(error.path(&self.path).offset(ByteOffset::new(at)));
                }
            }
        }
        Ok(())
    }

    /// The first byte at or after `offset` that is not in a hole; `None` if there is none.
    pub(super) fn next_data(&self, offset: ByteOffset) -> Result<Option<ByteOffset>> {
        self.seek(offset, Whence::SeekData)
    }

    /// The first byte at or after `offset` that is in a hole: at the latest the end.
    pub(super) fn next_hole(&self, offset: ByteOffset) -> Result<Option<ByteOffset>> {
        self.seek(offset, Whence::SeekHole)
    }

    fn seek(&self, offset: ByteOffset, whence: Whence) -> Result<Option<ByteOffset>> {
        match lseek(&self.file, offset.get().cast_signed(), whence) {
            Ok(at) => Ok(Some(ByteOffset::new(at.cast_unsigned()))),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(Error::io("look for holes", errno.into()).path(&self.path)),
        }
    }
}

/// What a stretch of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StretchKind {
    Data,
    Zeroes,
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) kind: StretchKind,
}

/// Cuts a buffer into data and stretches of zeroes that are worth a hole.
pub(super) struct Stretches<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Stretches<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0 }
    }

    /// Where the zeroes that begin at `start` end, in whole grains.
    fn zeroes_from(&self, start: usize) -> usize {
        let grains = self.data[start..].chunks(GRAIN);
        let zeroes = grains.take_while(|grain| is_zero(grain));
        start + zeroes.map(<[u8]>::len).sum::<usize>()
    }
}

impl Iterator for Stretches<'_> {
    type Item = Stretch;

    fn next(&mut self) -> Option<Stretch> {
        let start = self.at;
        let len = self.data.len();
        if start == len {
            return None;
        }
        let mut end = start;
        while end < len {
            let zeroes = self.zeroes_from(end);
            if zeroes - end >= SHORTEST_HOLE || (end == 0 && zeroes == len) {
                if end > start {
                    break;
                }
                self.at = zeroes;
                let kind = StretchKind::Zeroes;
                return Some(Stretch {
                    start,
                    end: zeroes,
                    kind,
                });
            }
            // The grain behind the zeroes holds data.
            end = len.min(zeroes + GRAIN);
        }
        self.at = end;
        Some(Stretch {
            start,
            end,
            kind: StretchKind::Data,
        })
    }
}

/// Whether all bytes are zero. Compared by words, which the compiler widens.
pub(super) fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<64>();
    let word_is_zero = |word: &[u8; 64]| word.iter().fold(0, |all, &b| all | b) == 0;
    words.iter().all(word_is_zero) && rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretches(data: &[u8]) -> Vec<(usize, usize, StretchKind)> {
        Stretches::new(data)
            .map(|s| (s.start, s.end, s.kind))
            .collect()
    }

    #[test]
    fn only_long_zeroes_are_cut_out() {
        use StretchKind::{Data, Zeroes};
        let mut data = vec![0; 1 << 20];
        assert_eq!(stretches(&data), [(0, 1 << 20, Zeroes)]);
        data[5000] = 1;
        assert_eq!(stretches(&data), [(0, 8192, Data), (8192, 1 << 20, Zeroes)]);
        data[8192 + SHORTEST_HOLE - 1] = 1;
        assert_eq!(
            stretches(&data),
            [
                (0, 8192 + SHORTEST_HOLE, Data),
                (8192 + SHORTEST_HOLE, 1 << 20, Zeroes)
            ]
        );
        data[(1 << 20) - 1] = 1;
        assert_eq!(
            stretches(&data),
            [
                (0, 8192 + SHORTEST_HOLE, Data),
                (8192 + SHORTEST_HOLE, (1 << 20) - GRAIN, Zeroes),
                ((1 << 20) - GRAIN, 1 << 20, Data)
            ]
        );
        assert_eq!(stretches(&[]), []);
        assert_eq!(stretches(&[1; 100]), [(0, 100, Data)]);
        assert_eq!(stretches(&[0; 100]), [(0, 100, Zeroes)]);
    }

    #[test]
    fn zeroes_are_told_from_any_single_bit() {
        for len in [1, 63, 64, 65, 4096] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in [0, len / 2, len - 1] {
                data[at] = 0x80;
                assert!(!is_zero(&data), "{at} of {len}");
                data[at] = 0;
            }
        }
    }
}
