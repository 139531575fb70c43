//! From the bytes that a socket has, in whatever pieces they come, to requests with their
//! data. One receive takes many small requests at once; the data of a large write is received
//! right where the device is written from.

use crate::capture::inline::REQUEST_MAX;
use crate::capture::nbd::handshake::Violation;
use crate::capture::nbd::memory::Pool;
use crate::capture::nbd::requests::{HEADER, Header};
use crate::capture::nbd::wire::command;
use crate::sys::memory::AlignedMemory;
use crate::sys::uring::Part;

/// Bytes that are received at once, at most.
pub const INBOX: usize = 256 << 10;
/// What is still to come of a write longer than this is received where it belongs. A shorter
/// one waits in the inbox, where there is always room for the rest of it.
const DIRECT: usize = 16 << 10;
/// After a large write only so much is received, for another one may follow.
const PEEK: usize = 4096;

/// What has come.
#[derive(Debug)]
pub enum Step {
    /// A request, and for a read or a write a buffer, which has the data of a write.
    Request(Header, Option<Part>),
    /// Nothing whole: more is to be received.
    Wants,
    /// A request for which there is no buffer before others have ended.
    Full,
}

/// A write whose data is received where it belongs.
#[derive(Debug)]
struct Filling {
    header: Header,
    /// `None` while it is received into.
    part: Option<Part>,
    filled: usize,
}

/// What was received and is not yet dealt with.
#[derive(Debug)]
pub struct Inbox {
    /// `None` while it is received into.
    memory: Option<AlignedMemory>,
    start: usize,
    end: usize,
    filling: Option<Filling>,
    /// What is received at most.
    appetite: usize,
}

impl Inbox {
    /// One that has `first`, which came with the last option; at most [`INBOX`] bytes.
    ///
    /// # Errors
    /// `ENOMEM`, or if `first` is too long.
    pub fn new(first: &[u8]) -> std::io::Result<Self> {
        let mut memory = AlignedMemory::new(INBOX)?;
        let target = memory.as_mut_slice().get_mut(..first.len());
        let too_long = || std::io::Error::from_raw_os_error(libc::EINVAL);
        target.ok_or_else(too_long)?.copy_from_slice(first);
        Ok(Self {
            memory: Some(memory),
            start: 0,
            end: first.len(),
            filling: None,
            appetite: INBOX,
        })
    }

    /// The next request. Not while something is received.
    ///
    /// # Errors
    /// If the client breaks the protocol, or there is no memory: nothing more can be taken.
    pub fn next(&mut self, pool: &mut Pool) -> Result<Step, Violation> {
        if let Some(filling) = &mut self.filling {
            if filling.filled < filling.header.payload() {
                return Ok(Step::Wants);
            }
            let (header, part) = (filling.header, filling.part.take());
            self.filling = None;
            self.appetite = PEEK;
            return Ok(Step::Request(header, part));
        }
        let Some(memory) = &self.memory else {
            return Ok(Step::Wants);
        };
        let unread = &memory.as_slice()[self.start..self.end];
        let Some((header, rest)) = unread.split_first_chunk::<HEADER>() else {
            return Ok(Step::Wants);
        };
        let header = Header::parse(header)?;
        let payload = header.payload();
        let missing = payload.saturating_sub(rest.len());
        if missing > 0 && payload <= DIRECT {
            return Ok(Step::Wants);
        }
        if !needs_buffer(&header) {
            self.start += HEADER;
            return Ok(Step::Request(header, None));
        }
        let taken = pool.take(header.len as usize);
        let Some(mut part) = taken.map_err(|_| Violation::Memory)? else {
            return Ok(Step::Full);
        };
        let here = payload - missing;
        part.bytes_mut()[..here].copy_from_slice(&rest[..here]);
        self.start += HEADER + here;
        if missing > 0 {
            self.filling = Some(Filling {
                header,
                part: Some(part),
                filled: here,
            });
            return Ok(Step::Wants);
        }
        self.appetite = INBOX;
        Ok(Step::Request(header, Some(part)))
    }

    /// Where to receive to, once [`Self::next`] wants more; `None` while that is done.
    pub fn receive(&mut self) -> Option<Part> {
        if let Some(filling) = &mut self.filling {
            let mut part = filling.part.take()?;
            part.range.start += filling.filled;
            return Some(part);
        }
        let mut memory = self.memory.take()?;
        // What is left is short: less than a header and `DIRECT`.
        memory.as_mut_slice().copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let range = self.end..INBOX.min(self.end + self.appetite);
        let buffer = memory;
        Some(Part { buffer, range })
    }

    /// `bytes` have been received to `part`.
    pub fn received(&mut self, mut part: Part, bytes: usize) {
        let bytes = bytes.min(part.range.len());
        match &mut self.filling {
            Some(filling) => {
                part.range.start -= filling.filled;
                filling.filled += bytes;
                filling.part = Some(part);
            }
            None => {
                self.end += bytes;
                self.memory = Some(part.buffer);
            }
        }
    }
}

/// Whether a request reads or writes, as far as it is short enough to be served.
fn needs_buffer(header: &Header) -> bool {
    let has_data = matches!(header.command, command::READ | command::WRITE);
    has_data && u64::from(header.len) <= REQUEST_MAX.get()
}
