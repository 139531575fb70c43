//! Replies of the transmission phase ("Simple reply message", "Structured replies"). A read
//! is answered in one piece, which needs no further one behind it; what is no read is
//! answered simply, which the protocol allows also where structured replies were settled on,
//! and is shorter.

use crate::capture::inline::Errno;
use crate::capture::nbd::requests::Tag;
use crate::capture::nbd::wire::{self, piece};
use crate::units::ByteOffset;

/// Bytes of a simple reply without data.
pub const SIMPLE: usize = 16;
/// Bytes of a piece's header.
const PIECE: usize = 20;
/// Bytes before the data of a structured reply to a read.
pub const DATA: usize = PIECE + 8;
/// Bytes of an error as a piece.
pub const ERROR: usize = PIECE + 6;

/// The number that stands for `errno` on the wire ("Error values"); 0 is none.
pub const fn number_of(result: Result<(), Errno>) -> u32 {
    let Err(Errno(errno)) = result else { return 0 };
    let known = match errno {
        libc::EPERM | libc::EROFS | libc::EACCES => libc::EPERM,
        libc::ENOMEM | libc::EAGAIN => libc::ENOMEM,
        libc::EINVAL => libc::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => libc::ENOSPC,
        libc::EOVERFLOW => libc::EOVERFLOW,
        libc::EOPNOTSUPP => libc::EOPNOTSUPP,
        libc::ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EIO,
    };
    known as u32
}

/// A simple reply; the data of a read follows if there was no error.
pub fn simple(tag: Tag, result: Result<(), Errno>) -> [u8; SIMPLE] {
    let mut bytes = [0; SIMPLE];
    bytes[..4].copy_from_slice(&wire::SIMPLE_REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&number_of(result).to_be_bytes());
    bytes[8..].copy_from_slice(&tag.0.to_be_bytes());
    bytes
}

/// Whether more pieces of the same reply follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Some do.
    Before,
    /// None does.
    Last,
}

fn header(tag: Tag, kind: u16, place: Place, len: u32) -> [u8; PIECE] {
    let flags = match place {
        Place::Before => 0,
        Place::Last => piece::DONE,
    };
    let mut bytes = [0; PIECE];
    bytes[..4].copy_from_slice(&wire::STRUCTURED_REPLY.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&tag.0.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// What stands before the `len` bytes of data that answer a read.
pub fn data(tag: Tag, offset: ByteOffset, len: u32) -> [u8; DATA] {
    let mut bytes = [0; DATA];
    bytes[..PIECE].copy_from_slice(&header(tag, piece::OFFSET_DATA, Place::Last, 8 + len));
    bytes[PIECE..].copy_from_slice(&offset.get().to_be_bytes());
    bytes
}

/// An error, as the answer to what must be answered in pieces.
pub fn error(tag: Tag, errno: Errno) -> [u8; ERROR] {
    let mut bytes = [0; ERROR];
    bytes[..PIECE].copy_from_slice(&header(tag, piece::ERROR, Place::Last, 6));
    bytes[PIECE..PIECE + 4].copy_from_slice(&number_of(Err(errno)).to_be_bytes());
    bytes
}

/// How long [`status`] is for so many stretches.
pub const fn status_len(stretches: usize) -> usize {
    PIECE + 4 + 8 * stretches
}

/// What a context says, each stretch a length and a state; to `output`.
pub fn status(
    output: &mut Vec<u8>,
    tag: Tag,
    context: u32,
    place: Place,
    stretches: &[(u32, u32)],
) {
    let len = status_len(stretches.len()) - PIECE;
    output.extend(header(tag, piece::BLOCK_STATUS, place, len as u32));
    output.extend(context.to_be_bytes());
    for (len, state) in stretches {
        output.extend(len.to_be_bytes());
        output.extend(state.to_be_bytes());
    }
}
