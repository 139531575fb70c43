//! Live disaster recovery of Linux block devices: capture of changes, change logs,
//! resync by digests, a store of recovery points.
#![deny(unsafe_code)]

pub mod bitmap;
pub mod boot;
pub mod capture;
pub mod device;
pub mod digest;
pub mod error;
pub mod failover;
pub mod geometry;
pub mod key_file;
pub mod machine;
pub mod plan;
pub mod policy;
pub mod primary;
pub mod replica;
pub mod spool;
pub mod store;
pub mod sys;
pub mod time;

pub use error::{Error, ErrorKind, IoContext, Result};
pub use hrl_format::{id, record, units};
