//! The published `.hrl` format, [MS-HRL] revision 6.0: the change log that Hyper-V
//! Replica writes. Version 2 is read, written and checked; version 1 is read and
//! checked.
//!
//! ```text
//! header 4096 | metadata block, empty | data ... | metadata block | data ... | metadata block
//!                                       ^ described by ----^                             ^ EOL
//! ```
//!
//! A metadata block stands behind the data that it describes, and points back to the
//! block before it by a relative distance. So a log is read from its end (named in the
//! header when the log is closed) back to its first block, and from there forward.
//! All integers are little-endian, all structures packed.
//!
//! Its checksum is a sum: it finds any flipped bit, but no bytes exchanged. Convert a log
//! into the native format to have it guarded.

mod check;
mod error;
mod header;
mod metadata;
mod reader;
mod sum;
mod time;
mod writer;

pub use check::{CheckReport, check};
pub use error::{Damage, Error, Finding};
pub use header::{FormatVersion, Header, is_ms_hrl};
pub use metadata::Entry;
pub use reader::{Data, LocatedEntry, Reader};
pub use sum::checksum;
pub use time::MsTime;
pub use writer::{Writer, WriterOptions};

/// Bytes of the file header, and of a metadata block unless its log says otherwise.
pub const HEADER_LEN: u64 = 4096;
