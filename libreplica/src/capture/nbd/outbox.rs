//! Replies on their way to a client, in order: short ones gathered, so that one message
//! carries many; data that was read sent from where the device has put it. One message is
//! sent at a time, and what comes meanwhile is gathered for the next.

use std::collections::VecDeque;
use std::io;

use crate::capture::nbd::memory::Pool;
use crate::sys::memory::AlignedMemory;
use crate::sys::uring::Part;

/// Bytes that are gathered in one message.
pub const GATHERED: usize = 128 << 10;
/// Messages that are kept for later.
const SPARE: usize = 2;

/// Where a message's memory belongs.
#[derive(Clone, Copy, Debug)]
enum Of {
    Outbox,
    Pool,
}

/// Replies of one connection.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// What is gathered; the part ends where it ends.
    open: Option<Part>,
    queue: VecDeque<(Part, Of)>,
    sending: Option<Of>,
    spare: Vec<AlignedMemory>,
    /// Bytes gathered, and not yet sent.
    waiting: usize,
}

impl Outbox {
    /// Adds what is in `pieces`, together at most [`GATHERED`] bytes.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn put(&mut self, pieces: &[&[u8]]) -> io::Result<()> {
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let room = |part: &Part| part.range.end + len <= part.buffer.as_slice().len();
        if !self.open.as_ref().is_some_and(room) {
            self.close();
            let buffer = match self.spare.pop() {
                Some(buffer) => buffer,
                None => AlignedMemory::new(GATHERED)?,
            };
            self.open = Some(Part::first(buffer, 0));
        }
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        for piece in pieces {
            let start = open.range.end;
            open.range.end += piece.len();
            open.buffer.as_mut_slice()[start..open.range.end].copy_from_slice(piece);
        }
        self.waiting += len;
        Ok(())
    }

    /// Adds a buffer of the pool, to be sent as it is.
    pub fn put_whole(&mut self, part: Part) {
        self.close();
        self.queue.push_back((part, Of::Pool));
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.queue.push_back((open, Of::Outbox));
        }
    }

    /// What to send now; `None` while something is being sent, or there is nothing.
    pub fn next(&mut self) -> Option<Part> {
        if self.sending.is_some() {
            return None;
        }
        if self.queue.is_empty() {
            self.close();
        }
        let (part, of) = self.queue.pop_front()?;
        self.sending = Some(of);
        Some(part)
    }

    /// What [`Self::next`] gave has been sent, or cannot be.
    pub fn sent(&mut self, part: Part, pool: &mut Pool) {
        match self.sending.take() {
            Some(Of::Pool) => pool.give(part.buffer),
            _ => {
                self.waiting -= part.range.len();
                if self.spare.len() < SPARE {
                    self.spare.push(part.buffer);
                }
            }
        }
    }

    /// Forgets what has not begun to be sent: nobody is there to take it.
    pub fn give_up(&mut self, pool: &mut Pool) {
        self.close();
        for (part, of) in self.queue.drain(..) {
            match of {
                Of::Pool => pool.give(part.buffer),
                Of::Outbox => self.waiting -= part.range.len(),
            }
        }
    }

    /// Bytes gathered, and not yet sent.
    pub const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether all has been sent.
    pub fn is_empty(&self) -> bool {
        self.open.is_none() && self.queue.is_empty() && self.sending.is_none()
    }
}
