//! `replica points`: the recovery points, read from the store itself. Without `--store`
//! the daemon is asked only where that store is.

use std::path::Path;
use std::process::ExitCode;

use hrl_format::id::VolumeId;
use libreplica::primary::PointSummary;
use libreplica::store::{Store, VolumeReader};
use libreplica::{Error, ErrorKind};
use serde::Serialize;

use crate::cli::{DaemonArgs, PointsArgs};
use crate::commands::open_store::{Located, locate, read_key, store_path};
use crate::failure::Failure;
use crate::output;

#[derive(Serialize)]
struct PointsOutput {
    points: Vec<PointSummary>,
}

#[derive(Serialize)]
struct VolumePoints {
    id: String,
    name: String,
    points: Vec<PointSummary>,
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
    let points = summaries(&located.reader)?;
    if args.json {
        output::json(&PointsOutput { points })?;
    } else {
        print_points(&points)?;
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
                let points = summaries(&reader)?;
                volumes.push(VolumePoints {
                    id: entry.id.to_string(),
                    name: catalogue.name,
                    points,
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
            print_points(&volume.points)?;
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

fn summaries(reader: &VolumeReader) -> Result<Vec<PointSummary>, Error> {
    Ok(reader.points()?.iter().map(PointSummary::from).collect())
}

fn print_points(points: &[PointSummary]) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if points.is_empty() {
        return writeln!(out, "  no recovery point yet");
    }
    for point in points {
        writeln!(
            out,
            "  {}  {:<30}  {:<11}  epoch {:<6} {:>10}  {}",
            point.id,
            point.time,
            point.consistency,
            point.epoch,
            output::bytes(point.bytes),
            point.label
        )?;
    }
    Ok(())
}
