//! Frames: bounded bundles of records, each checked and, if encrypted, authenticated on
//! its own, so that one can be read, or moved, without the rest of its log.

mod buffer;
mod build;
mod codec;
mod table;

pub use buffer::{Entry, FrameBuffer, Origin, TableEntry};
pub(crate) use buffer::{Place, span_of};
pub(crate) use build::FrameBuilder;
pub use table::{MarkDetail, Shape, TagMark};
pub(crate) use table::{consistency_code, consistency_from};

use crate::header::{HeaderDigest, HeaderPage};
use crate::id::{KeyId, LogId};

/// What a frame must agree with to be a frame of this log.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub log: LogId,
    pub digest: HeaderDigest,
    pub key: Option<KeyId>,
    pub lz4: bool,
    pub moved: bool,
}

impl Home {
    pub(crate) fn of(page: &HeaderPage) -> Self {
        Self {
            log: page.header.log,
            digest: page.digest,
            key: page.header.key,
            lz4: page.features.lz4,
            moved: page.features.moved,
        }
    }
}
