//! The data of pieces, by ascending offset: what a restore, a fold and a merge read. Logs
//! that were written in no order would be read a frame for every piece; so pieces are
//! taken in batches, and each batch reads each frame once, in the order of the file.

use std::borrow::Borrow;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::extents::ExtentKind;
use crate::frame::FrameBuffer;
use crate::log::Log;
use crate::overlay::Piece;
use crate::source::ReadAt;
use crate::units::ByteLen;

/// A piece is taken for at least this much memory, so that pieces without data are
/// bounded, too.
const LEAST: usize = 256;

/// Reads the data of pieces, in batches of bounded memory.
///
/// The logs are those that the pieces come from, the oldest first: `Log`, `&Log`,
/// `Arc<Log>` alike. The pieces are an [`crate::Overlay`], or part of one.
pub struct Gather<'a, L, R, I> {
    logs: &'a [L],
    pieces: I,
    memory: usize,
    batch: Vec<Gathered>,
    // The numbers of the batch's writes, by where they are read.
    order: Vec<u32>,
    data: Vec<u8>,
    frame: FrameBuffer,
    source: PhantomData<R>,
}

/// A piece of a batch, and where its data is.
struct Gathered {
    piece: Piece,
    data: Range<usize>,
}

/// Pieces with their data, by ascending offset.
pub struct Batch<'a> {
    pieces: &'a [Gathered],
    data: &'a [u8],
}

impl<'a> Batch<'a> {
    /// The pieces; the data is empty unless it is a write, then as long as the extent.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a Piece, &'a [u8])> + use<'a> {
        let data = self.data;
        self.pieces
            .iter()
            .map(move |held| (&held.piece, &data[held.data.clone()]))
    }
}

impl<'a, L, R, I> Gather<'a, L, R, I>
where
    L: Borrow<Log<R>>,
    R: ReadAt,
    I: Iterator<Item = Result<Piece>>,
{
    /// Over `pieces` of `logs`, with about `memory` bytes a batch; a frame's worth is the
    /// least.
    pub fn new(logs: &'a [L], pieces: I, memory: ByteLen) -> Self {
        Self {
            logs,
            pieces,
            memory: usize::try_from(memory.get()).unwrap_or(usize::MAX),
            batch: Vec::new(),
            order: Vec::new(),
            data: Vec::new(),
            frame: FrameBuffer::new(),
            source: PhantomData,
        }
    }

    /// The next batch; `None` when all pieces were read.
    ///
    /// # Errors
    /// As [`Log::read_frame`] and [`crate::IndexStream`].
    pub fn next_batch(&mut self) -> Result<Option<Batch<'_>>> {
        let len = self.take()?;
        if self.batch.is_empty() {
            return Ok(None);
        }
        if self.data.len() < len {
            self.data.resize(len, 0);
        }
        self.read()?;
        Ok(Some(Batch {
            pieces: &self.batch,
            data: &self.data,
        }))
    }

    /// Takes the batch's pieces; returns how many bytes of data they have.
    fn take(&mut self) -> Result<usize> {
        self.batch.clear();
        self.order.clear();
        let (mut len, mut taken) = (0, 0);
        while taken < self.memory {
            let Some(piece) = self.pieces.next().transpose()? else {
                break;
            };
            let own = match piece.kind() {
                // At most a frame's data, as every index entry.
                ExtentKind::Write => piece.extent().len().get() as usize,
                ExtentKind::Zeroes | ExtentKind::Discard => 0,
            };
            if own > 0 {
                self.order.push(self.batch.len() as u32);
            }
            self.batch.push(Gathered {
                piece,
                data: len..len + own,
            });
            len += own;
            taken = taken.saturating_add(own.max(LEAST));
        }
        Ok(len)
    }

    /// Reads the batch's data, each frame once.
    fn read(&mut self) -> Result<()> {
        let place = |piece: &Piece| (piece.source, piece.entry.frame, piece.entry.at);
        let batch = &self.batch;
        self.order
            .sort_unstable_by_key(|&n| place(&batch[n as usize].piece));
        let mut held = None;
        for &n in &self.order {
            let Gathered { piece, data } = &batch[n as usize];
            let of = (piece.source, piece.entry.frame);
            if held != Some(of) {
                let log = self
                    .logs
                    .get(piece.source.get())
                    .ok_or_else(|| Error::invalid("a piece of a log that was not given"))?;
                log.borrow()
                    .read_frame(piece.entry.frame, &mut self.frame)?;
                held = Some(of);
            }
            let bytes = self.frame.slice(piece.entry.at, piece.extent().len())?;
            self.data[data.clone()].copy_from_slice(bytes);
        }
        Ok(())
    }
}
