//! The `.hrl` change log: the one file everything in this project moves or rests in.
//!
//! A log is written once, from front to back, and sealed; from then on it is read at any
//! place. `docs/hrl-format.md` describes every byte of it.
//!
//! ```
//! use hrl_format::{Log, LogHeader, LogOptions, LogWriter, id::VolumeId, record::Record, units::*};
//! # fn main() -> hrl_format::Result<()> {
//! let header = LogHeader::new(VolumeId::random()?, VolumeSize::new(1 << 20), Epoch::new(1))?;
//! let mut writer = LogWriter::create(Vec::new(), header, &LogOptions::default(), None)?;
//! let extent = Extent::new(ByteOffset::new(4096), ByteLen::new(512)).unwrap();
//! writer.append(&Record::Write { extent, data: &[7; 512] }, Timestamp::now())?;
//! let (file, _seal) = writer.seal()?;
//!
//! let log = Log::open(file, None)?;
//! let entry = log.index().next().unwrap()?;
//! let mut frame = hrl_format::FrameBuffer::new();
//! log.read_frame(entry.frame, &mut frame)?;
//! assert_eq!(frame.slice(entry.at, entry.extent.len())?, [7; 512]);
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod check;
pub mod convert;
mod error;
mod extents;
mod frame;
mod gather;
mod header;
pub mod id;
mod key;
pub mod layout;
mod log;
mod merge;
mod mover;
pub mod ms;
mod overlay;
mod prefix;
pub mod record;
mod salvage;
mod scanner;
mod seal;
mod section;
mod source;
mod state;
pub mod units;
mod writer;

pub use check::{CheckReport, Proof, check};
pub use error::{Error, ErrorKind, Result};
pub use extents::{DataOffset, ExtentKind, IndexEntry};
pub use frame::{Entry, FrameBuffer, MarkDetail, Origin, Shape, TableEntry, TagMark};
pub use gather::{Batch, Gather};
pub use header::{ChainEnd, EpochRange, LogHeader, RecordOrder, SealDigest};
pub use key::VolumeKey;
pub use log::{IndexStream, Log};
pub use merge::{MergeWay, Merged, merge};
pub use overlay::{Layered, Overlay, Piece, SourceNumber};
pub use prefix::{Prefix, PrefixEntries};
pub use salvage::{Salvaged, salvage};
pub use scanner::{Ending, Scanner};
pub use seal::{Mark, Seal, SealProof};
pub use source::{ReadAt, Seekable};
pub use writer::{Compression, LogOptions, LogWriter};
