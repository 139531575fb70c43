//! What holds points beyond the processes that read them: branches, which stand on a point
//! until they are discarded, also while nobody has them open. Each has a folder in
//! `branches/`, in it `branch.json`, whose field `point` names the point. Whoever makes one
//! holds that point's lease until the file is durable; so a writer that has the lease
//! exclusively, and then looks here, misses none.
//!
//! A folder without the file is a branch that was cut short in the making or in the removing,
//! and holds nothing. A file that says nothing may hold any point: then none is dropped.

use std::path::{Path, PathBuf};

use hrl_format::id::PointId;

use super::durable::{self, damaged, read_small};
use super::layout::VolumeFolder;
use crate::error::Result;

const LOOK: &str = "look what stands on recovery points";

/// A point that stays until what stands on it is discarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// The point at or before the state that is needed.
    pub(super) point: PointId,
    /// The branch's folder.
    pub(super) by: PathBuf,
}

/// The points that branches stand on.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) with the path of a `branch.json` that names no
/// point; the system's. Whoever gets one must take every point for held.
pub(super) fn durable_leases(folder: &VolumeFolder) -> Result<Vec<Held>> {
    let branches = folder.branches();
    if !branches.exists() {
        return Ok(Vec::new());
    }
    let mut held = Vec::new();
    for name in durable::names_in(&branches)? {
        let by = branches.join(name);
        if by.is_dir()
            && let Some(point) = point_of(&by.join("branch.json"))?
        {
            held.push(Held { point, by });
        }
    }
    Ok(held)
}

fn point_of(path: &Path) -> Result<Option<PointId>> {
    let Some(bytes) = read_small(path)? else {
        return Ok(None);
    };
    let json: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    let point = json.as_ref().and_then(|json| json.get("point")?.as_str());
    match point.and_then(|point| point.parse().ok()) {
        Some(point) => Ok(Some(point)),
        None => Err(damaged(
            LOOK,
            path,
            "it does not say which point it stands on; until it does, none is dropped",
        )
        .advice("put the file back, or remove the branch's folder if it is not needed")),
    }
}
