//! A bitmap that outlives a reboot: a file with a header page, then the words of the
//! bitmap, both mapped or written in place. The header says whether the file was closed in
//! order. Opening marks it unclean, durably, before anything can be changed, so that a
//! crash in between is seen: then the bitmap says nothing, and the caller takes the whole
//! volume for dirty.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bitmap::{Bitmap, Layout};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::memory::SharedWords;

/// The header: magic 8, version 4, mark 4, blocks 8, words 8, CRC32 of what is before it 4;
/// little-endian; zeroes to 4096.
const HEADER: usize = 4096;
const MAGIC: [u8; 8] = *b"\x89HRLBM\r\n";
const VERSION: u32 = 1;
const CRC_AT: usize = 32;

/// How the file was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Closed in order: the bitmap is whole.
    Clean,
    /// Not closed: bits may be missing.
    Unclean,
}

/// A bitmap in a file.
#[derive(Debug)]
pub struct BitmapFile {
    file: File,
    path: PathBuf,
    region: Arc<SharedWords>,
    bitmap: Bitmap,
}

impl BitmapFile {
    /// Makes a new file with an empty bitmap, marked unclean until [`Self::close`].
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; what the file system says.
    pub fn create(path: &Path, blocks: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .at("create the bitmap", path)?;
        let layout = Layout::for_blocks(blocks);
        let len = (HEADER + layout.words() * 8) as u64;
        file.set_len(len).at("create the bitmap", path)?;
        Self::map(file, path, layout)?.marked(Mark::Unclean)
    }

    /// Opens the file, says how it was left, and marks it unclean.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Damaged`] if it is no bitmap or its header or
    /// length is wrong; [`ErrorKind::Unsupported`] for a newer version;
    /// [`ErrorKind::Resized`] if it is for another number of blocks.
    pub fn open(path: &Path, blocks: u64) -> Result<(Self, Mark)> {
        const OPERATION: &str = "open the bitmap";
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .at(OPERATION, path)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map_err(|source| {
            Error::new(ErrorKind::Damaged, OPERATION)
                .path(path)
                .source(source)
        })?;
        let damaged = |what: &str| {
            Error::new(ErrorKind::Damaged, OPERATION)
                .path(path)
                .detail(what)
        };
        let (version, mark, of_blocks) = parse(&header).map_err(damaged)?;
        if version != VERSION {
            return Err(Error::new(ErrorKind::Unsupported, OPERATION)
                .path(path)
                .detail(format!("version {version}; this program knows {VERSION}")));
        }
        if of_blocks != blocks {
            return Err(Error::new(ErrorKind::Resized, OPERATION)
                .path(path)
                .detail(format!("for {of_blocks} blocks, the volume has {blocks}")));
        }
        let layout = Layout::for_blocks(blocks);
        let len = file.metadata().at(OPERATION, path)?.len();
        if len != (HEADER + layout.words() * 8) as u64 {
            return Err(damaged("its length does not fit its header"));
        }
        let opened = Self::map(file, path, layout)?.marked(Mark::Unclean)?;
        Ok((opened, mark))
    }

    fn map(file: File, path: &Path, layout: Layout) -> Result<Self> {
        let region = SharedWords::map(file.as_fd(), HEADER / 8 + layout.words());
        let region = Arc::new(region.at("map the bitmap", path)?);
        let bitmap = Bitmap::shared(layout, Arc::clone(&region), HEADER / 8)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "map the bitmap").path(path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            region,
            bitmap,
        })
    }

    /// The bitmap. What is set in it is in the file once [`Self::close`] has returned.
    pub const fn bitmap(&self) -> &Bitmap {
        &self.bitmap
    }

    /// Writes the bitmap, then the mark that says it is whole.
    ///
    /// # Errors
    /// What the file system says; the file is then unclean.
    pub fn close(self) -> Result<()> {
        self.region.flush().at("write the bitmap", &self.path)?;
        self.file.sync_all().at("write the bitmap", &self.path)?;
        self.marked(Mark::Clean).map(|_| ())
    }

    fn marked(self, mark: Mark) -> Result<Self> {
        let layout = self.bitmap.layout();
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&u32::from(mark == Mark::Clean).to_le_bytes());
        header[16..24].copy_from_slice(&layout.blocks().to_le_bytes());
        header[24..32].copy_from_slice(&(layout.words() as u64).to_le_bytes());
        let crc = crc32fast::hash(&header[..CRC_AT]);
        header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        self.file
            .write_all_at(&header, 0)
            .at("mark the bitmap", &self.path)?;
        self.file.sync_all().at("mark the bitmap", &self.path)?;
        Ok(self)
    }
}

fn number<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header[at + i])
}

/// Version, mark and blocks of a header; or what is wrong with it.
fn parse(header: &[u8; HEADER]) -> std::result::Result<(u32, Mark, u64), &'static str> {
    if header[..8] != MAGIC {
        return Err("no bitmap: the magic is wrong");
    }
    if u32::from_le_bytes(number(header, CRC_AT)) != crc32fast::hash(&header[..CRC_AT]) {
        return Err("the header's CRC32 is wrong");
    }
    let mark = match u32::from_le_bytes(number(header, 12)) {
        0 => Mark::Unclean,
        1 => Mark::Clean,
        _ => return Err("the mark is neither clean nor unclean"),
    };
    let version = u32::from_le_bytes(number(header, 8));
    Ok((version, mark, u64::from_le_bytes(number(header, 16))))
}
