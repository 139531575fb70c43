//! The store: a local folder that keeps, for each volume, a base image, the chain of sealed
//! logs over it, and a catalogue of recovery points (docs/store.md). Ingest is one sequential
//! write. A point is read through the sorted indexes of the logs up to it, newest first, over the
//! base. Retention drops points, folds the logs that no point needs into the base, and
//! gives their room back. The base of an encrypted volume is itself a chain of sealed logs;
//! there, folding merges logs and writes them anew without what is no longer needed.
//!
//! Everything is crash-safe by order alone: data before the pointer to it. The catalogue is
//! the only pointer; a file that it does not name is the trace of something interrupted.

mod base;
mod baseline;
mod branch;
mod catalogue;
mod catalogue_file;
mod chain;
mod check;
mod check_points;
mod commit;
mod compact;
mod durable;
mod epoch;
mod fence;
mod fold;
mod folder;
mod frames;
mod gather;
mod handover;
mod held;
mod ingest;
mod json;
mod layers;
mod layout;
mod lease;
mod levels;
mod lock;
mod machine;
mod merge;
mod moment;
mod output;
mod point_reader;
mod reader;
mod readers;
mod recover;
mod recovery;
mod remake;
mod restore;
mod retain;
mod reverse;
mod sources;
mod space;
mod state;
#[cfg(test)]
mod tests;
mod tip;
mod windows;
mod writer;

pub use baseline::Baseline;
pub use branch::{Branch, BranchEntry, BranchInfo, BranchLog, BranchPurpose, ParsePurposeError};
pub use catalogue::{Base, Catalogue, CatalogueGeneration, LogEntry, LogLink, Point};
pub use check::{CheckReport, Fault, PointCheck, PointState};
pub use compact::Waiting;
pub use epoch::EpochLog;
pub use fold::FoldStep;
pub use folder::{Store, VolumeEntry, VolumeSpec, check_name};
pub use handover::{Answer, Ask, Asking, Handover};
pub use moment::{InOrder, LogOrder, Moment, ParseMomentError, Window, WindowEnd};
pub use output::{Overwrite, Progress};
pub use point_reader::{PieceKind, PointPiece, PointReader};
pub use reader::{PointSelector, VolumeReader};
pub use readers::SharedReader;
pub use recovery::{How, Loss, Promotion, Recovery};
pub use restore::{RestoreOptions, RestoreProof, Restored};
pub use retain::Retained;
pub use reverse::Reversal;
pub use space::{Holder, Space};
pub use state::{MomentState, State, StateId};
pub use tip::{ChangedSince, TipReader};
pub use writer::{Committed, VolumeWriter};
