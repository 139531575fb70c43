//! Capture of a device whose users reach it through us: every write passes by, with its
//! data, in order. One engine behind two fronts (NBD, ublk).
//!
//! ```text
//! lane          a queue thread's way to the device
//! interceptor   lets changes in, marks them, records them: one lock, no input or output
//!   gate          which change may begin, and which waits for what
//!   ledger        dirty blocks, in a file that outlives the process
//!   backlog       changes with their data, until they are in the store
//!   gap           what changed while there was no room for that
//!   traffic       what was written, by us and by whoever else
//!   unseen        writes whose data goes past us, while none is recorded
//!   activity      regions being written, durable before the first write to them
//!   copying       blocks of one moment that are read while writes go on
//! usher         the thread that clears what changes wait for
//! copier        the thread that copies what is about to be overwritten
//! read_back     the thread that reads what nobody knows
//!   unknown       where that is
//! errands       the thread that zeroes and discards
//! stream        what the shipper sees of all that
//! ```
//!
//! No read and no change of the device ever waits for the target, nor for the shipper.

mod activity;
mod activity_file;
mod backlog;
mod copier;
mod copying;
mod errands;
mod gap;
mod gate;
mod interceptor;
mod lane;
mod ledger;
mod read_back;
mod request;
mod service;
mod stream;
mod traffic;
mod unknown;
mod unseen;
mod usher;

pub use backlog::{Batch, Budget, Change, Entry, FallCause, Limits, Read};
pub use errands::Errands;
pub use interceptor::{InlineCounters, Interceptor, ModeChange};
pub use lane::{Event, Lane, REQUEST_MAX};
pub use request::{Cookie, Done, Durability, Errno, Lent, Request, Room};
pub use service::{Claim, Entrance, InlineSpec, Kept, Resumed, Service};
pub use stream::{Blocks, Cut, Moment, Waiting};
pub use unseen::UnseenWrite;
