//! Recovery plans, carried out: what `libreplica::plan` says is next, done here, with a line in the journal
//! before and after. `commands/plan.rs` is what an operator types.
//!
//! ```text
//! checks        what is looked at before anything is done
//! run           the loop: next step, do it, note it
//! volumes       a volume failed over, or a drill of it, and served by the daemon
//! machines      a machine booted on them
//! scripts       a program, with its environment and its limit
//! journal_file  the journal on disk
//! ```

pub mod checks;
pub mod journal_file;
mod machines;
pub mod run;
mod scripts;
pub mod volumes;

use std::path::{Path, PathBuf};

use libreplica::IoContext;
use libreplica::plan::{Plan, PlanDigest};

/// A plan, read from its file.
pub struct PlanFile {
    /// It.
    pub plan: Plan,
    /// By what its journal knows it.
    pub digest: PlanDigest,
}

impl PlanFile {
    /// Reads and checks a plan.
    ///
    /// # Errors
    /// When it cannot be read, or makes no sense.
    pub fn read(path: &Path) -> libreplica::Result<Self> {
        let text = std::fs::read_to_string(path).at("read the recovery plan", path)?;
        Ok(Self {
            plan: Plan::from_toml(&text).map_err(|error| error.path(path))?,
            digest: PlanDigest::of(&text),
        })
    }
}

/// Where the journal of a plan lies, unless somebody says another place.
pub fn usual_journal(plan: &Path) -> PathBuf {
    plan.with_added_extension("journal")
}
