//! Requests of the transmission phase ("Request message"): a header of 28 bytes, checked
//! against what is served before anything is done about it.

use crate::capture::inline::{Durability, Errno, REQUEST_MAX, Room};
use crate::capture::nbd::contexts::HowMany;
use crate::capture::nbd::handshake::{Access, Export, Replies, Session, Trim, Violation};
use crate::capture::nbd::wire::{self, command, flag};
use crate::units::{ByteLen, ByteOffset, Extent};

/// Bytes of a request without its data.
pub const HEADER: usize = 28;

/// What a client knows a request by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag(pub u64);

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Flags, see [`wire::flag`].
    pub flags: u16,
    /// Which, see [`wire::command`].
    pub command: u16,
    /// For the reply.
    pub tag: Tag,
    /// The first byte.
    pub offset: ByteOffset,
    /// How many bytes.
    pub len: u32,
}

impl Header {
    /// Takes one apart.
    ///
    /// # Errors
    /// If there is no request: then nobody knows where the next begins.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, Violation> {
        let mut rest = &bytes[..];
        let magic = wire::take_u32(&mut rest);
        if magic != Some(wire::REQUEST) {
            return Err(Violation::RequestMagic);
        }
        let mut u16 = || wire::take_u16(&mut rest).unwrap_or(0);
        let (flags, command) = (u16(), u16());
        let mut u64 = || wire::take(&mut rest).map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let (tag, offset) = (Tag(u64()), ByteOffset::new(u64()));
        let len = wire::take_u32(&mut rest).unwrap_or(0);
        let header = Self {
            flags,
            command,
            tag,
            offset,
            len,
        };
        if command == command::WRITE && u64::from(len) > REQUEST_MAX.get() {
            return Err(Violation::WriteLength);
        }
        Ok(header)
    }

    /// How many bytes of data follow.
    pub const fn payload(&self) -> usize {
        if self.command == command::WRITE {
            self.len as usize
        } else {
            0
        }
    }
}

/// What is to be done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Read.
    Read(Extent),
    /// Write what follows.
    Write(Extent, Durability),
    /// Write zeroes.
    Zeroes(Extent, Room, Durability),
    /// Give up.
    Discard(Extent, Durability),
    /// Make durable.
    Flush,
    /// Tell what the contexts say.
    Status(Extent, HowMany),
    /// Nothing; say that it is done.
    Nothing,
    /// End when all is answered.
    Disconnect,
}

impl Task {
    /// What `header` asks for.
    ///
    /// # Errors
    /// The number to answer with: `EINVAL` for what makes no sense or was not offered,
    /// `ENOSPC` for a change past the end, `EPERM` for any change of what can only be read
    /// ("Error values").
    pub fn of(header: &Header, session: &Session, export: &Export) -> Result<Self, Errno> {
        const INVALID: Errno = Errno(libc::EINVAL);
        let structured = session.replies == Replies::Structured;
        let changes = matches!(
            header.command,
            command::WRITE | command::WRITE_ZEROES | command::TRIM
        );
        if changes && export.access == Access::ReadOnly {
            return Err(Errno(libc::EPERM));
        }
        let (known, past_end) = match header.command {
            command::READ if structured => (flag::DF, INVALID),
            command::WRITE => (0, Errno(libc::ENOSPC)),
            command::WRITE_ZEROES => (flag::NO_HOLE | flag::FAST_ZERO, Errno(libc::ENOSPC)),
            command::BLOCK_STATUS => (flag::REQ_ONE, INVALID),
            _ => (0, INVALID),
        };
        // This one is allowed everywhere.
        if header.flags & !(known | flag::FUA) != 0 {
            return Err(INVALID);
        }
        if let command::DISC | command::FLUSH = header.command {
            let is_flush = header.command == command::FLUSH;
            return Ok(if is_flush {
                Self::Flush
            } else {
                Self::Disconnect
            });
        }
        let extent = extent_of(header, export, past_end)?;
        let durability = if header.flags & flag::FUA != 0 {
            Durability::Durable
        } else {
            Durability::Cached
        };
        match header.command {
            command::READ if extent.len() > REQUEST_MAX => Err(INVALID),
            command::READ => Ok(Self::Read(extent)),
            command::WRITE => Ok(Self::Write(extent, durability)),
            // Nobody can promise that it is quick.
            command::WRITE_ZEROES if header.flags & flag::FAST_ZERO != 0 => {
                Err(Errno(libc::EOPNOTSUPP))
            }
            command::WRITE_ZEROES if header.flags & flag::NO_HOLE != 0 => {
                Ok(Self::Zeroes(extent, Room::Kept, durability))
            }
            command::WRITE_ZEROES => Ok(Self::Zeroes(extent, Room::MayBeFreed, durability)),
            command::TRIM if export.trim == Trim::Offered => Ok(Self::Discard(extent, durability)),
            command::CACHE => Ok(Self::Nothing),
            command::BLOCK_STATUS if !session.contexts.is_empty() => {
                let one = header.flags & flag::REQ_ONE != 0;
                let many = if one { HowMany::One } else { HowMany::Many };
                Ok(Self::Status(extent, many))
            }
            _ => Err(INVALID),
        }
    }
}

fn extent_of(header: &Header, export: &Export, past_end: Errno) -> Result<Extent, Errno> {
    let len = ByteLen::new(u64::from(header.len));
    let extent = Extent::new(header.offset, len).ok_or(past_end)?;
    let sector = u64::from(export.sector.get());
    let whole = |n: u64| n.is_multiple_of(sector);
    if extent.is_empty() || !whole(extent.offset().get()) || !whole(len.get()) {
        return Err(Errno(libc::EINVAL));
    }
    if extent.end().get() > export.size.get() {
        return Err(past_end);
    }
    Ok(extent)
}
