//! `replica points`: the recovery points, and the windows between them of which any moment can
//! be had, read from the store itself. Without `--store` the daemon is asked only where that
//! store is.

use std::path::Path;
use std::process::ExitCode;

use hrl_format::id::VolumeId;
use libreplica::machine::Proof;
use libreplica::primary::{PointSummary, SpaceSummary};
use libreplica::store::{BranchEntry, Store, VolumeReader, Window};
use libreplica::time::rfc3339;
use libreplica::{Error, ErrorKind};
use serde::Serialize;

use crate::cli::{DaemonArgs, PointsArgs};
use crate::commands::open_store::{Located, locate, read_key, store_path};
use crate::failure::Failure;
use crate::output;

/// What can be restored of a volume.
#[derive(Serialize)]
struct Listing {
    points: Vec<PointLine>,
    windows: Vec<WindowSummary>,
    branches: Vec<BranchLine>,
    space: SpaceSummary,
}

/// What was written to a state that was opened, and is kept.
#[derive(Serialize)]
struct BranchLine {
    id: String,
    purpose: String,
    state: String,
    time: String,
    created: String,
    bytes: u64,
    in_use: bool,
}

impl From<&BranchEntry> for BranchLine {
    fn from(entry: &BranchEntry) -> Self {
        let info = &entry.info;
        let moment = info.moment.map(|moment| moment.to_string());
        Self {
            id: info.id.to_string(),
            purpose: info.purpose.to_string(),
            state: moment.unwrap_or_else(|| info.point.to_string()),
            time: rfc3339(info.time),
            created: rfc3339(info.created),
            bytes: entry.bytes.get(),
            in_use: entry.in_use,
        }
    }
}

/// A point, and what the last drill has shown of it.
#[derive(Serialize)]
struct PointLine {
    #[serde(flatten)]
    point: PointSummary,
    proven: Option<Proof>,
}

/// A stretch of time of which every moment can be restored.
#[derive(Serialize)]
struct WindowSummary {
    from: String,
    to: String,
    from_moment: String,
    to_moment: String,
}

impl From<&Window> for WindowSummary {
    fn from(window: &Window) -> Self {
        Self {
            from: rfc3339(window.from.time),
            to: rfc3339(window.to.time),
            from_moment: window.from.moment.to_string(),
            to_moment: window.to.moment.to_string(),
        }
    }
}

#[derive(Serialize)]
struct VolumePoints {
    id: String,
    name: String,
    #[serde(flatten)]
    listing: Listing,
}

#[derive(Serialize)]
struct VolumesOutput {
    volumes: Vec<VolumePoints>,
}

pub fn run(daemon: &DaemonArgs, args: &PointsArgs) -> Result<ExitCode, Failure> {
    match (&args.volume, &args.store) {
        (None, Some(store)) => all(&store_path(store)?, args),
        (None, None) => Err(Failure::Usage("name a volume, or a --store".into())),
        (Some(volume), store) => {
            let located = locate(daemon, volume, store.as_deref(), args.key_file.as_deref())?;
            one(&located, args)
        }
    }
}

fn one(located: &Located, args: &PointsArgs) -> Result<ExitCode, Failure> {
    let listing = listing(&located.reader)?;
    if args.json {
        output::json(&listing)?;
    } else {
        print(&listing)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn all(path: &Path, args: &PointsArgs) -> Result<ExitCode, Failure> {
    let store = Store::open(path)?;
    let mut volumes = Vec::new();
    let mut damaged = None;
    for entry in store.volumes()? {
        match entry.catalogue {
            Ok(catalogue) => {
                let key = read_key(args.key_file.as_deref())?.filter(|_| catalogue.key.is_some());
                let reader = store.volume(entry.id, key)?;
                volumes.push(VolumePoints {
                    id: entry.id.to_string(),
                    name: catalogue.name,
                    listing: listing(&reader)?,
                });
            }
            Err(error) => damaged = Some(unreadable(entry.id, &error)),
        }
    }
    if args.json {
        output::json(&VolumesOutput { volumes })?;
    } else {
        for volume in &volumes {
            println!("{}  {}", volume.name, volume.id);
            print(&volume.listing)?;
        }
        if volumes.is_empty() {
            eprintln!("no volume is in this store");
        }
    }
    damaged.map_or(Ok(ExitCode::SUCCESS), |error| Err(error.into()))
}

fn unreadable(id: VolumeId, source: &Error) -> Error {
    eprintln!("replica: {source}");
    Error::new(ErrorKind::Damaged, "list the volumes")
        .volume(id)
        .detail("its catalogue cannot be read")
        .advice("`replica store check` says what is damaged")
}

fn listing(reader: &VolumeReader) -> Result<Listing, Error> {
    let hidden = reader.catalogue()?.key.is_some() && !reader.has_key();
    let mut points = Vec::new();
    for point in reader.points()? {
        // A proof that cannot be read proves nothing; the points are listed all the same.
        let proven = reader.proof(point.id).unwrap_or_else(|error| {
            eprintln!("replica: {error}");
            None
        });
        let mut point = PointSummary::from(&point);
        if hidden {
            // Whether a point has a root is as secret as the root.
            point.proof = None;
        }
        points.push(PointLine { point, proven });
    }
    Ok(Listing {
        points,
        windows: reader.windows()?.iter().map(WindowSummary::from).collect(),
        branches: reader.branches()?.iter().map(BranchLine::from).collect(),
        space: SpaceSummary::from(&reader.space()?),
    })
}

fn print(listing: &Listing) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if listing.points.is_empty() {
        return writeln!(out, "  no recovery point yet");
    }
    for PointLine { point, proven } in &listing.points {
        writeln!(
            out,
            "  {}  {:<30}  {:<11}  epoch {:<6} {:>10}  {:<12}  {}",
            point.id,
            point.time,
            point.consistency,
            point.epoch,
            output::bytes(point.bytes),
            proven
                .as_ref()
                .map_or_else(|| "not drilled".to_owned(), told),
            point.label
        )?;
    }
    for WindowSummary {
        from,
        to,
        from_moment,
        to_moment,
    } in &listing.windows
    {
        writeln!(
            out,
            "  any moment from {from} to {to} ({from_moment} to {to_moment})"
        )?;
    }
    for branch in &listing.branches {
        writeln!(
            out,
            "  branch {}  {:<8}  on {} of {}, {}{}",
            branch.id,
            branch.purpose,
            branch.state,
            branch.time,
            output::bytes(branch.bytes),
            if branch.in_use { ", in use" } else { "" }
        )?;
    }
    writeln!(out, "  {}", output::space(&listing.space))?;
    Ok(())
}

/// What a drill has shown, in a word and a number.
fn told(proof: &Proof) -> String {
    format!("{} {:.0} s", proof.verdict.as_str(), proof.seconds)
}
