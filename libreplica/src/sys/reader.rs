//! Reads a volume past the page cache, many pieces in flight, and hands them out in the
//! order asked for, whatever order the device finishes them in. Memory is taken once, when
//! the reader is made; nothing is allocated while reading.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::memory::AlignedMemory;
use crate::sys::ring::{Read, Ring, Token};
use crate::units::{ByteLen, ByteOffset, Extent, SectorSize, VolumeSize};

/// How much a [`Reader`] has in flight.
#[derive(Clone, Copy, Debug)]
pub struct ReaderOptions {
    /// How many pieces at a time; 1 to 4096.
    pub depth: u32,
    /// The longest piece, in bytes: a power of two, at least a sector, at most 64 MiB.
    pub piece: u32,
    /// Through io_uring where the kernel allows it, or never.
    pub engine: ReadEngine,
}

/// By which system call a [`Reader`] reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadEngine {
    /// io_uring; pread(2), one piece at a time, where it is not allowed.
    #[default]
    Best,
    /// pread(2), one piece at a time.
    Plain,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            depth: 32,
            piece: 256 << 10,
            engine: ReadEngine::Best,
        }
    }
}

/// A read that was started: what is wanted, and how much of it has come.
#[derive(Clone, Copy)]
struct Slot {
    extent: Extent,
    /// Where its memory begins, in bytes from the start of whatever is read into.
    place: usize,
    filled: u32,
    /// `None` while in flight.
    end: Option<std::result::Result<(), i32>>,
}

const IDLE: Slot = Slot {
    extent: VolumeSize::new(0).extent(),
    place: 0,
    filled: 0,
    end: Some(Ok(())),
};

/// Stands for "the file ended before the extent did"; no errno is negative.
const ENDED: i32 = -1;

/// Reads a block device or an image file with direct I/O.
///
/// It never writes, and never opens the device exclusively. A read goes around the page
/// cache: it returns what the device has, dirty pages of a mounted file system aside.
pub struct Reader {
    ring: Ring,
    slots: Vec<Slot>,
    memory: AlignedMemory,
    piece: u32,
    sector: SectorSize,
    path: PathBuf,
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
    match direct {
        // A file system without direct I/O; an image file may lie on one.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let file = options.open(path).at("open the volume", path)?;
            let kind = file.metadata().at("look at the volume", path)?.file_type();
            if kind.is_block_device() {
                return Err(Error::io("open the volume for direct reads", error).path(path));
            }
            Ok(file)
        }
        direct => direct.at("open the volume for direct reads", path),
    }
}

impl Reader {
    /// Opens `path`, whose logical sectors are `sector` long.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for options out of range; what open(2), mmap(2) and
    /// io_uring_setup(2) say.
    pub fn open(path: &Path, sector: SectorSize, options: ReaderOptions) -> Result<Self> {
        let ReaderOptions {
            depth,
            piece,
            engine,
        } = options;
        let fits = piece.is_power_of_two() && piece >= sector.get() && piece <= 64 << 20;
        if depth == 0 || depth > 4096 || !fits {
            return Err(Error::new(ErrorKind::Invalid, "make a reader")
                .detail(format!("{depth} pieces of {piece} bytes")));
        }
        let mut ring = Ring::new(open(path)?, depth).at("set up io_uring for", path)?;
        if engine == ReadEngine::Plain {
            ring.without_uring();
        }
        let memory = AlignedMemory::new(depth as usize * piece as usize)
            .at("allocate memory to read", path)?;
        Ok(Self {
            ring,
            slots: vec![IDLE; depth as usize],
            memory,
            piece,
            sector,
            path: path.to_owned(),
        })
    }

    /// Reads `extents`, cut into pieces, in the order given. Their offsets must be whole
    /// sectors; a length need not be at the end of a file.
    pub fn pieces<I>(&mut self, extents: I) -> Pieces<'_, I::IntoIter>
    where
        I: IntoIterator<Item = Extent>,
    {
        Pieces {
            reader: self,
            extents: extents.into_iter(),
            rest: None,
            head: 0,
            busy: 0,
            lent: false,
        }
    }

    /// Bytes of memory that [`Self::read_into`] needs for an extent: its length, rounded up
    /// to whole sectors.
    pub const fn room_for(&self, extent: Extent) -> ByteLen {
        ByteLen::new(
            extent
                .len()
                .get()
                .next_multiple_of(self.sector.get() as u64),
        )
    }

    /// Reads `extents` into `memory`, one behind the other, each beginning where
    /// [`Self::room_for`] those before it ends. Allocates nothing; made for the moment in
    /// which the file system is frozen. Keep `memory` locked and touched.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `memory` is too small or an offset is no whole sector;
    /// [`ErrorKind::Io`] with offset and errno for what could not be read.
    pub fn read_into(&mut self, extents: &[Extent], memory: &mut AlignedMemory) -> Result<()> {
        let needed: u64 = extents
            .iter()
            .map(|&extent| self.room_for(extent).get())
            .sum();
        if needed > memory.as_slice().len() as u64 {
            return Err(Error::new(ErrorKind::Invalid, "read into memory set aside")
                .path(&self.path)
                .detail(format!("{needed} bytes into {}", memory.as_slice().len())));
        }
        let result = self.fill(extents, memory);
        // Nothing may write to `memory` once it is the caller's again.
        self.ring.drain();
        self.slots.fill(IDLE);
        result
    }

    fn fill(&mut self, extents: &[Extent], memory: &mut AlignedMemory) -> Result<()> {
        let base = memory.start();
        let mut place = 0;
        let longest = self.piece;
        for piece in extents.iter().flat_map(|&extent| cut(extent, longest)) {
            let index = loop {
                match self.slots.iter().position(|slot| slot.end.is_some()) {
                    Some(index) => break index,
                    None => self.one_end(base)?,
                }
            };
            self.slots[index] = Slot {
                extent: piece,
                place,
                filled: 0,
                end: None,
            };
            place += self.room_for(piece).get() as usize;
            // SAFETY: `place` and what follows lie inside `memory`, whose length the caller
            // has checked; it is borrowed mutably until nothing is in flight.
            unsafe { self.start(index, base) }?;
        }
        while self.ring.in_flight() > 0 {
            self.one_end(base)?;
        }
        Ok(())
    }

    /// Waits until one slot's extent is read whole, or has failed.
    fn one_end(&mut self, base: NonNull<u8>) -> Result<()> {
        loop {
            // SAFETY: the same `base` that the slots in flight were started with.
            let index = unsafe { self.wait(base) }?;
            if self.slots[index].end.is_some() {
                return self.outcome(index);
            }
        }
    }

    /// Starts to read what slot `index` still lacks.
    ///
    /// # Safety
    /// From `base` plus the slot's place, memory for its extent in whole sectors must be
    /// valid and nobody else's until the ring has nothing of this slot in flight.
    unsafe fn start(&mut self, index: usize, base: NonNull<u8>) -> Result<()> {
        let Slot {
            extent,
            place,
            filled,
            ..
        } = self.slots[index];
        let offset = extent.offset().get() + u64::from(filled);
        let whole = self.room_for(extent).get() as u32;
        if !offset.is_multiple_of(u64::from(self.sector.get())) {
            self.slots[index].end = Some(Err(libc::EINVAL));
            let detail = format!("not a multiple of the sector, {} bytes", self.sector.get());
            return Err(self.error(ErrorKind::Invalid, offset).detail(detail));
        }
        // SAFETY: `filled` is less than the extent's length: still inside its memory.
        let to = unsafe { base.add(place + filled as usize) };
        let read = Read {
            to,
            len: whole - filled,
            offset,
        };
        // SAFETY: the caller's promise.
        unsafe { self.ring.start(Token(index as u64), read) }.map_err(|source| {
            self.slots[index].end = Some(Err(libc::EIO));
            self.error(ErrorKind::Io, offset).source(source)
        })
    }

    /// Takes the next end from the ring, and starts again what has come in part; returns
    /// which slot it was.
    ///
    /// # Safety
    /// As for [`Self::start`], for all slots in flight.
    unsafe fn wait(&mut self, base: NonNull<u8>) -> Result<usize> {
        let (token, result) = self.ring.wait().at("read the volume", &self.path)?;
        let index = token.0 as usize;
        let sector = self.sector.get();
        let slot = &mut self.slots[index];
        match result {
            0 => slot.end = Some(Err(ENDED)),
            errno if errno < 0 => match -errno {
                libc::EAGAIN | libc::EINTR => {}
                errno => slot.end = Some(Err(errno)),
            },
            bytes => {
                slot.filled += bytes as u32;
                if u64::from(slot.filled) >= slot.extent.len().get() {
                    slot.end = Some(Ok(()));
                } else if !slot.filled.is_multiple_of(sector) {
                    slot.end = Some(Err(ENDED));
                }
            }
        }
        if slot.end.is_none() {
            // SAFETY: the caller's promise.
            unsafe { self.start(index, base) }?;
        }
        Ok(index)
    }

    fn outcome(&self, index: usize) -> Result<()> {
        let slot = &self.slots[index];
        let at = slot.extent.offset().get() + u64::from(slot.filled);
        match slot.end {
            Some(Err(ENDED)) => Err(self.error(ErrorKind::Resized, at).detail("it ends here")),
            Some(Err(errno)) => {
                let source = io::Error::from_raw_os_error(errno);
                Err(Error::io("read the volume", source)
                    .path(&self.path)
                    .offset(ByteOffset::new(at)))
            }
            Some(Ok(())) | None => Ok(()),
        }
    }

    fn error(&self, kind: ErrorKind, at: u64) -> Error {
        Error::new(kind, "read the volume")
            .path(&self.path)
            .offset(ByteOffset::new(at))
    }
}

/// The pieces of `extent`: cut at whole multiples of `piece` bytes on the volume.
fn cut(extent: Extent, piece: u32) -> impl Iterator<Item = Extent> {
    let piece = u64::from(piece);
    let mut at = extent.offset();
    std::iter::from_fn(move || {
        let bound = (at.get() / piece + 1)
            .saturating_mul(piece)
            .min(extent.end().get());
        let cut = Extent::between(at, ByteOffset::new(bound));
        at = cut.end();
        (!cut.is_empty()).then_some(cut)
    })
}

/// Pieces of a volume in the order asked for; see [`Reader::pieces`].
pub struct Pieces<'r, I> {
    reader: &'r mut Reader,
    extents: I,
    /// What is left of the extent taken last.
    rest: Option<Extent>,
    /// The slot whose piece is next, and how many slots from there on are in use.
    head: usize,
    busy: usize,
    /// Whether the head's piece was handed out.
    lent: bool,
}

impl<I: Iterator<Item = Extent>> Pieces<'_, I> {
    /// The next piece: which extent, and its bytes. `None` at the end. After an error, goes
    /// on with the piece behind the one that failed.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an offset that is no whole sector;
    /// [`ErrorKind::Resized`] if the device or file ends before the extent does; what
    /// read(2) says, with the offset: [`ErrorKind::Io`], [`ErrorKind::Vanished`].
    // Not an `Iterator`: a piece borrows the reader's memory until the next one is taken.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<(Extent, &[u8])>> {
        let slots = self.reader.slots.len();
        if self.lent {
            self.lent = false;
            self.head = (self.head + 1) % slots;
            self.busy -= 1;
        }
        self.refill()?;
        if self.busy == 0 {
            return Ok(None);
        }
        self.lent = true;
        let base = self.reader.memory.start();
        while self.reader.slots[self.head].end.is_none() {
            // SAFETY: the slots in flight were all started by `refill` with this `base`.
            unsafe { self.reader.wait(base) }?;
        }
        self.reader.outcome(self.head)?;
        let Slot { extent, place, .. } = self.reader.slots[self.head];
        // SAFETY: each slot's place is inside the memory.
        let from = unsafe { base.add(place) }.as_ptr();
        // SAFETY: the slot's own memory, filled by the read that has ended; nothing is
        // started into it before the next call, which ends this borrow.
        let bytes = unsafe { std::slice::from_raw_parts(from, extent.len().get() as usize) };
        Ok(Some((extent, bytes)))
    }

    /// Starts reads into all slots that are free.
    fn refill(&mut self) -> Result<()> {
        let slots = self.reader.slots.len();
        while self.busy < slots {
            let Some(extent) = self.rest.take().or_else(|| self.extents.next()) else {
                break;
            };
            let Some(piece) = cut(extent, self.reader.piece).next() else {
                continue;
            };
            if piece.end() < extent.end() {
                self.rest = Some(Extent::between(piece.end(), extent.end()));
            }
            let index = (self.head + self.busy) % slots;
            let place = index * self.reader.piece as usize;
            self.reader.slots[index] = Slot {
                extent: piece,
                place,
                filled: 0,
                end: None,
            };
            // SAFETY: each slot has `piece` bytes of the reader's memory to itself, which
            // lives until drop, and the ring is drained before.
            unsafe { self.reader.start(index, self.reader.memory.start()) }?;
            self.busy += 1;
        }
        // Not at every piece: a call into the kernel costs more than the read's start.
        let waiting = self.reader.ring.unsubmitted() as usize;
        if waiting > 0 && (waiting * 4 >= slots || self.rest.is_none()) {
            self.reader
                .ring
                .submit(0)
                .at("read the volume", &self.reader.path)?;
        }
        Ok(())
    }
}

impl<I> Drop for Pieces<'_, I> {
    fn drop(&mut self) {
        self.reader.ring.drain();
        self.reader.slots.fill(IDLE);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const LEN: usize = 300_000;

    fn image() -> (tempfile::NamedTempFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..LEN).map(|i| (i * 7 + i / 251) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        (file, bytes)
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
    }

    fn options(engine: ReadEngine) -> ReaderOptions {
        ReaderOptions {
            depth: 3,
            piece: 8192,
            engine,
        }
    }

    #[test]
    fn pieces_come_in_order_with_the_tail_of_a_file() {
        let (file, bytes) = image();
        for engine in [ReadEngine::Best, ReadEngine::Plain] {
            let mut reader = Reader::open(file.path(), SectorSize::B512, options(engine)).unwrap();
            let wanted = [
                extent(4096, 50_000 / 512 * 512),
                extent(0, 512),
                extent(200_192, 99_808),
            ];
            let mut pieces = reader.pieces(wanted);
            let (mut read, mut at) = (Vec::new(), Vec::new());
            while let Some((extent, piece)) = pieces.next().unwrap() {
                assert_eq!(extent.len().get(), piece.len() as u64);
                assert!(piece.len() <= 8192);
                at.push(extent.offset().get());
                read.extend_from_slice(piece);
            }
            let expected: Vec<u8> = wanted
                .iter()
                .flat_map(|e| &bytes[e.offset().get() as usize..e.end().get() as usize])
                .copied()
                .collect();
            assert!(read == expected);
            assert_eq!(at[..3], [4096, 8192, 16384]);
        }
    }

    #[test]
    fn an_abandoned_pass_leaves_nothing_behind() {
        let (file, bytes) = image();
        let mut reader =
            Reader::open(file.path(), SectorSize::B512, options(ReadEngine::Best)).unwrap();
        for _ in 0..10 {
            let mut pieces = reader.pieces([extent(0, LEN as u64)]);
            let (_, piece) = pieces.next().unwrap().unwrap();
            assert!(piece == &bytes[..8192]);
        }
        let mut pieces = reader.pieces([extent(16_384, 8192)]);
        assert!(pieces.next().unwrap().unwrap().1 == &bytes[16_384..24_576]);
        assert!(pieces.next().unwrap().is_none());
    }

    #[test]
    fn memory_set_aside_is_filled_end_to_end() {
        let (file, bytes) = image();
        let mut reader =
            Reader::open(file.path(), SectorSize::B512, options(ReadEngine::Best)).unwrap();
        let extents = [
            extent(1024, 512),
            extent(8192, 40_960),
            extent(299_520, 480),
        ];
        let room: u64 = extents.iter().map(|&e| reader.room_for(e).get()).sum();
        let mut memory = AlignedMemory::new(room as usize).unwrap();
        reader.read_into(&extents, &mut memory).unwrap();
        let mut at = 0;
        for e in extents {
            let len = e.len().get() as usize;
            let from = e.offset().get() as usize;
            assert!(memory.as_slice()[at..at + len] == bytes[from..from + len]);
            at += reader.room_for(e).get() as usize;
        }
        let mut small = AlignedMemory::new(512).unwrap();
        let error = reader.read_into(&extents, &mut small).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn errors_name_the_place() {
        let (file, bytes) = image();
        let mut reader =
            Reader::open(file.path(), SectorSize::B512, options(ReadEngine::Best)).unwrap();
        let mut pieces = reader.pieces([extent(299_008, 4096), extent(0, 512)]);
        let error = pieces.next().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Resized);
        assert!(error.to_string().contains("299008") || error.to_string().contains("300000"));
        // The pass goes on behind what failed.
        assert!(pieces.next().unwrap().unwrap().1 == &bytes[..512]);
        assert!(pieces.next().unwrap().is_none());
        drop(pieces);
        let error = reader.pieces([extent(100, 512)]).next().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
