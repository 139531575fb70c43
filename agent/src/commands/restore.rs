//! `replica restore`: a point, or a moment between two, back to a file or a device, from the
//! store itself. Without `--store` the daemon is asked only where that store is. Which state a
//! time has come to mean is said before anything is written.

use std::path::Path;
use std::process::ExitCode;

use libreplica::primary::{PointSummary, StateDir, refuse_target};
use libreplica::store::{Overwrite, PointSelector, RestoreOptions, RestoreProof, State};
use libreplica::time::rfc3339;
use libreplica::{Error, ErrorKind};
use serde::Serialize;

use crate::cli::{DaemonArgs, RestoreArgs};
use crate::commands::group;
use crate::commands::open_store::{locate, protected_devices};
use crate::failure::Failure;
use crate::output::{self, Progress};
use crate::text::selector;

#[derive(Serialize)]
struct RestoreOutput {
    /// Null for a moment that is no point.
    point: Option<PointSummary>,
    /// Null unless a moment was asked for, or a time within or behind a window.
    moment: Option<String>,
    time: String,
    output: String,
    data_bytes: u64,
    proof: &'static str,
}

pub fn run(daemon: &DaemonArgs, args: &RestoreArgs) -> Result<ExitCode, Failure> {
    if args.group {
        return group::restore(daemon, args);
    }
    let output = std::path::absolute(&args.output)?;
    refuse_state(&output)?;
    refuse_target(&output, &protected_devices(daemon))?;
    let located = locate(
        daemon,
        &args.volume,
        args.store.as_deref(),
        args.key_file.as_deref(),
    )?;
    let selector = selector(&args.point).map_err(|error| Failure::Usage(error.to_string()))?;
    let state = located.reader.state(selector)?;
    if let PointSelector::AtOrBefore(time) = selector {
        eprintln!(
            "the last state known at {}: {state} of {}",
            rfc3339(time),
            rfc3339(state.time())
        );
    }
    let overwrite = if args.force {
        Overwrite::Replace
    } else {
        Overwrite::Refuse
    };
    let options = RestoreOptions::default().overwrite(overwrite);
    let mut progress = Progress::start("restoring");
    let restored = located
        .reader
        .restore(state.id(), &output, &options, &mut |at| {
            progress.update(at.done.get(), at.total.get());
        });
    progress.finish();
    let restored = restored?;
    let proof = match restored.proof {
        RestoreProof::Root => "root",
        RestoreProof::None => "none",
    };
    let (what, moment) = match &restored.state {
        State::Point(point) => (point.id.to_string(), None),
        State::Moment(state) => (state.moment.to_string(), Some(state.moment.to_string())),
    };
    let time = rfc3339(restored.state.time());
    if args.json {
        output::json(&RestoreOutput {
            point: restored.state.point().map(PointSummary::from),
            moment,
            time,
            output: output.display().to_string(),
            data_bytes: restored.data.get(),
            proof,
        })?;
    } else {
        let proved = match restored.proof {
            RestoreProof::Root => "; its digest is the one captured",
            RestoreProof::None if restored.state.point().is_none() => {
                "; between points there is no digest to prove it by"
            }
            RestoreProof::None => "; the point carries no digest to prove it by",
        };
        eprintln!("restored {what} of {time} to {}{proved}", output.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// A daemon's memory is no place for an image, and no file of it may be replaced by one.
fn refuse_state(output: &Path) -> Result<(), Failure> {
    match StateDir::around(output) {
        None => Ok(()),
        Some(state) => Err(Error::new(ErrorKind::Invalid, "restore a recovery point")
            .path(output)
            .detail(format!(
                "it lies within the state folder {}",
                state.display()
            ))
            .advice("name a file or device outside of it")
            .into()),
    }
}
