//! Numbers of the protocol, all big-endian on the wire, and how bytes are taken from what a
//! client sent: never more than are there.

/// The first eight bytes that a server sends ("Newstyle negotiation").
pub const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Before every option, and behind the greeting.
pub const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Before every reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before every request ("Request message").
pub const REQUEST: u32 = 0x2560_9513;
/// Before every simple reply ("Simple reply message").
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Before every piece of a structured reply ("Structured replies").
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Bytes of the longest string ("Strings").
pub const STRING_MAX: u32 = 4096;

/// Flags of the two sides before options ("Handshake flags", "Client flags").
pub mod hello {
    /// Options may be refused one by one.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No zeroes behind the reply to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// What the export can do ("Transmission flags").
pub mod export {
    /// There are flags.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be changed.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// A change can be made durable before its reply.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// A read may ask for one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// What one connection has flushed is so for all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Options ("Option types").
pub mod option {
    /// Choose an export; no errors can be told.
    pub const EXPORT_NAME: u32 = 1;
    /// End.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Reads are answered in pieces with a header each.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List the meta contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose meta contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options ("Option reply types").
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A property of an export.
    pub const INFO: u32 = 3;
    /// A meta context.
    pub const META_CONTEXT: u32 = 4;
    /// Not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Properties of an export (`NBD_INFO_`, at `NBD_OPT_GO`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// What it is, for people.
    pub const DESCRIPTION: u16 = 2;
    /// Least, best and greatest length of a request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Requests ("Request types").
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make durable what was answered.
    pub const FLUSH: u16 = 3;
    /// Give a range up.
    pub const TRIM: u16 = 4;
    /// Prefetch; a hint.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What the meta contexts say about a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests ("Command flags").
pub mod flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Zeroes stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// A read's reply is one piece.
    pub const DF: u16 = 1 << 2;
    /// One stretch for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes only if they are quicker than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of pieces ("Structured reply types").
pub mod piece {
    /// The flag of a reply's last piece.
    pub const DONE: u16 = 1;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// A context's number and stretches.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// The first `N` bytes of `from`, which is shortened by them; `None` if there are fewer.
pub fn take<'a, const N: usize>(from: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (first, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(first)
}

/// The first two bytes as a number.
pub fn take_u16(from: &mut &[u8]) -> Option<u16> {
    take(from).map(|bytes| u16::from_be_bytes(*bytes))
}

/// The first four bytes as a number.
pub fn take_u32(from: &mut &[u8]) -> Option<u32> {
    take(from).map(|bytes| u32::from_be_bytes(*bytes))
}

/// A length of four bytes and so many bytes.
pub fn take_string<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = take_u32(from)?;
    let (string, rest) = from.split_at_checked(len as usize)?;
    *from = rest;
    (len <= STRING_MAX).then_some(string)
}
