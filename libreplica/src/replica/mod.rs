//! The other end of a replication: states of a volume opened for use, over NBD, from the store
//! alone. Read-only, or with a branch that takes what is written (`store/branch/`); the point
//! stays what it is, and replication goes on meanwhile.
//!
//! ```text
//! opened       a state, to be read, and written to if it has a branch
//! connection   one client: a thread that receives, some that read and write
//! status       what an opened state holds where, for block status
//! export       the socket and what is behind it
//! exports      what a daemon has open, also after its next start
//! drill        a point booted to see whether it lives
//! failover     a state put in use in place of the source
//! group        the volumes that were made points of in one moment
//! home         the way back, to the first side
//! adopted      which stores' volumes a daemon knows
//! reverse      what a volume was failed over to, protected while it is served
//! notes        what a daemon remembers, a file a thing
//! ```

mod adopted;
mod connection;
mod drill;
mod export;
mod exports;
mod failover;
mod group;
mod home;
mod notes;
mod opened;
mod reverse;
mod status;

pub use adopted::{Adopted, AdoptedStatus, AdoptedVolume};
pub use drill::{DrillSpec, Drilled, drill};
pub use export::PointExport;
pub use exports::{ExportSpec, ExportStatus, Exports, Written};
pub use failover::{AtRest, Choice, FailedOver, Failover, Shutdown, Situation};
pub use group::{GroupMember, group_of};
pub use home::{CameHome, Home, Pass};
pub use opened::{Opened, Wanted};
