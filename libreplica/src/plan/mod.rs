//! A recovery plan: which volumes are failed over in which order, what is run and asked before and
//! after, and how far a run of it has come. Pure: a definition is read, its steps are listed, and what
//! the journal says about them gives the next one. Whoever acts writes the journal, each entry
//! durably before he goes on; so a run that was killed anywhere knows what is done, and what was
//! begun and has to be looked at.
//!
//! ```text
//! definition   the plan, as its owner writes it, in TOML
//! check        what is wrong with it that its text alone shows
//! steps        what it comes to in a mode, in order
//! journal      what happened, a line each
//! progress     how far a run is: journal in, next step out
//! ```

mod check;
mod definition;
mod journal;
mod progress;
mod steps;

#[cfg(test)]
mod tests;

pub use definition::{
    Action, Doing, Group, Mode, Plan, PlanDigest, PlannedMachine, PlannedVolume, PointPolicy,
};
pub use journal::{Ending, Entry, Journal, Outcome};
pub use progress::{Next, Progress};
pub use steps::{Step, Work};
