//! Merging: neighbours in the chain become one log, within the stretches where no point lies. A
//! log is merged with the newer ones behind it once these are, together, as long as it is: so
//! each byte is written anew only as often as the length doubles, and few logs are left. Logs longer
//! than a limit are left alone; what is useless in them is removed one by one (`compact.rs`).
//!
//! Without the key of an encrypted volume frames move whole, and the merged log says which of
//! their records count.

use std::ops::Range;

use hrl_format::units::ByteLen;
use hrl_format::{Log, merge};

use super::catalogue::LogEntry;
use super::durable::damaged;
use super::fold::FoldStep;
use super::sources::{LogFile, blame, open_chain};
use super::writer::VolumeWriter;
use crate::error::Result;

/// Logs are merged so many at a time at most: each takes some 10 KiB of memory, and an open file.
const MOST_LOGS: usize = 256;

const MERGE: &str = "merge logs of the store";

impl VolumeWriter {
    /// Logs that are to be merged, the newest there are.
    pub(super) fn mergeable(&self) -> Option<Range<usize>> {
        let stretches = self.catalogue.stretches();
        let limit = self.log_bytes;
        stretches.into_iter().rev().find_map(|stretch| {
            let logs = &self.catalogue.logs[stretch.clone()];
            let range = tier(logs, limit)?;
            Some(stretch.start + range.start..stretch.start + range.end)
        })
    }

    pub(super) fn merge(&mut self, range: Range<usize>) -> Result<FoldStep> {
        let entries = self.catalogue.logs[range.clone()].to_vec();
        let stored = open_chain(&self.folder, &entries, self.key.as_ref())?;
        for log in &stored {
            self.prove(log)?;
        }
        let options = self.options.clone();
        let folder = self.folder.logs();
        let points = self.catalogue.points.clone();
        self.remake(range, |out| {
            let logs: Vec<&Log<LogFile>> = stored.iter().map(|stored| &stored.log).collect();
            let merged = merge(&logs, out, &options);
            let (out, merged) = merged.map_err(|e| blame(&stored, MERGE, e))?;
            match points
                .iter()
                .find(|point| merged.dropped.contains(&point.id))
            {
                Some(lost) => {
                    let why = format!("point {} lies elsewhere than the catalogue says", lost.id);
                    Err(damaged(MERGE, &folder, why))
                }
                None => Ok((out, merged.header, merged.seal)),
            }
        })?;
        Ok(FoldStep::Merged {
            logs: entries.len(),
            bytes: ByteLen::new(entries.iter().map(|log| log.bytes.get()).sum()),
        })
    }
}

/// The newest of `logs` that are to be merged: from a log on that is not longer than all behind
/// it together, and with them not longer than `limit`.
fn tier(logs: &[LogEntry], limit: ByteLen) -> Option<Range<usize>> {
    (2..=logs.len()).rev().find_map(|end| {
        let mut newer = logs[end - 1].bytes.get();
        let mut found = None;
        for start in (end.saturating_sub(MOST_LOGS)..end - 1).rev() {
            let len = logs[start].bytes.get();
            if newer + len > limit.get() {
                break;
            }
            if len <= newer {
                found = Some(start..end);
            }
            newer += len;
        }
        found
    })
}
