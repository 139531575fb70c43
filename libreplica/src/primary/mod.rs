//! The driver of a protected machine: it joins capture to the store. Threads, sockets of
//! the watchdog and clocks are here; what they drive lies in the ranks below.
//!
//! ```text
//! engine      all volumes; what the control socket asks for
//! lifecycle   a volume's thread: what to do next, and what to do about failures
//! protect     a device becomes a volume
//! member      the working part: source (device, tracker) and sink (image, digest tree)
//! copy        reads everything: baseline and resync
//! pace        when the next point is due
//! group       who makes a point together
//! point       an epoch of what changed, and a recovery point of its end
//! still       the moment without writes that a point needs
//! inline      the device's users go through us: capture and the front that serves them
//! instant     the moment of a point then
//! stream      how the stream of their changes gets into the store
//! spooler     where it waits when the store is behind
//! verify      compares source and image
//! handover    another side is to take the volume over
//! ```

mod config;
mod copy;
mod draft;
mod engine;
mod environment;
mod exclusions;
mod fingerprint;
mod group;
mod handover;
mod homecoming;
pub mod hooks;
mod inline;
mod instant;
mod keeping;
mod lifecycle;
mod member;
mod owner;
mod pace;
mod point;
mod protect;
pub mod quiesce;
mod show;
mod since;
mod sink;
mod source;
mod spec;
mod spooler;
mod state_dir;
mod status;
mod still;
mod stream;
mod tail;
mod target;
mod throttle;
mod tracking;
mod verify;
mod volume;
pub mod watchdog;

pub use config::{Capture, ExcludedRange, OwnGeneration, Phase, Rest, Shipping, VolumeConfig};
pub use engine::{Primary, Protected};
pub use spec::{Exclusion, PointOptions, PrimaryOptions, ProtectSpec, Siblings};
pub use state_dir::StateDir;
pub use status::{
    DifferingRange, LastError, ModeChanged, PointSummary, ResyncProgress, ResyncSummary, Settled,
    SpaceHolder, SpaceSummary, StatusCounters, UblkSummary, VerifySummary, VolumeState,
    VolumeStatus, WaitingLogs,
};
pub use target::refuse_target;
