//! Capture of a device in use: which blocks changed, without touching the device's users.
//!
//! BPF programs on the block layer's tracepoints mark changed blocks in a bitmap that is
//! pinned in a BPF file system, so that marking goes on while this process is restarted,
//! upgraded or killed. A [`Tracker`] owns one volume's pins. The caller works in rounds:
//!
//! ```no_run
//! # use libreplica::capture::{AttachSpec, Tracker};
//! # fn work(spec: &AttachSpec) -> libreplica::Result<()> {
//! let mut tracker = Tracker::attach(spec)?;
//! loop {
//!     let report = tracker.swap()?;
//!     for run in tracker.round().runs() {
//!         // read these blocks from the device, append them to the epoch's log
//!     }
//!     tracker.finish_round();
//!     if report.blocks == 0 {
//!         break;
//!     }
//! }
//! tracker.acknowledge()?; // once the target has the epoch; `reclaim` if it will not get it
//! # Ok(()) }
//! ```
//!
//! Nothing that was marked is forgotten before [`Tracker::acknowledge`]: what a round has
//! drained stays in a third bitmap beside the two that are swapped, in pinned memory too.

mod balance;
mod counters;
mod flights;
pub mod inline;
mod instance;
#[cfg(feature = "ebpf")]
mod load;
pub mod nbd;
mod pins;
mod probe;
mod proof;
mod spec;
mod state;
mod tracker;
pub mod ublk;

pub use counters::{Counters, InFlight, WidenCause};
pub use instance::Observer;
pub use pins::{PinInfo, PinStage, Tracked, list_pins, remove_pins};
pub use proof::{Proof, ProofGap, WriteCounts};
pub use spec::{AttachSpec, FolderId};
pub use tracker::{RoundReport, Tracker};

/// What an operator can do where tracking is impossible.
const NO_OTHER_WAY: &str = "here it cannot be tracked by eBPF; --capture ublk and nbd can, if its users go through the agent";
