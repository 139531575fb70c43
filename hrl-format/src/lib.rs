//! The `.hrl` change log: the one file everything in this project moves or rests in.
#![forbid(unsafe_code)]

pub mod id;
pub mod ms;
pub mod record;
pub mod units;
