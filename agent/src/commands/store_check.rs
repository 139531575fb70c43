//! `replica store check`: reads everything a store holds, volume by volume, and names the
//! points that are damaged. Needs no daemon, and stops nobody from writing meanwhile.

use std::process::ExitCode;

use libreplica::store::{CheckReport, PointState, Store};
use libreplica::time::rfc3339;
use serde::Serialize;

use crate::cli::StoreCheckArgs;
use crate::commands::open_store::{read_key, store_path};
use crate::failure::{FAILED, Failure};
use crate::output::{self, Progress};

#[derive(Serialize)]
struct Output {
    sound: bool,
    volumes: Vec<VolumeOutput>,
}

#[derive(Serialize)]
struct VolumeOutput {
    id: String,
    name: Option<String>,
    sound: bool,
    logs: usize,
    log_bytes: u64,
    points: Vec<PointOutput>,
    faults: Vec<FaultOutput>,
}

#[derive(Serialize)]
struct PointOutput {
    id: String,
    time: String,
    state: &'static str,
    cause: Option<String>,
}

#[derive(Serialize)]
struct FaultOutput {
    path: Option<String>,
    message: String,
}

pub fn run(args: &StoreCheckArgs) -> Result<ExitCode, Failure> {
    let path = store_path(&args.store)?;
    let store = Store::open(&path)?;
    let key = read_key(args.key_file.as_deref())?;
    let mut volumes = Vec::new();
    for entry in store.volumes()? {
        let checked = entry.catalogue.and_then(|catalogue| {
            let key = key.clone().filter(|_| catalogue.key.is_some());
            let mut progress = Progress::start("checking");
            let report = store
                .volume(entry.id, key)?
                .check(&mut |step| progress.update(step.done.get(), step.total.get()));
            progress.finish();
            report
        });
        volumes.push(match checked {
            Ok(report) => VolumeOutput::from(&report),
            Err(error) => VolumeOutput::unreadable(entry.id.to_string(), error.to_string()),
        });
    }
    let output = Output {
        sound: volumes.iter().all(|volume| volume.sound),
        volumes,
    };
    if args.json {
        output::json(&output)?;
    } else {
        output.print()?;
    }
    Ok(if output.sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    })
}

impl VolumeOutput {
    fn unreadable(id: String, message: String) -> Self {
        Self {
            id,
            name: None,
            sound: false,
            logs: 0,
            log_bytes: 0,
            points: Vec::new(),
            faults: vec![FaultOutput {
                path: None,
                message,
            }],
        }
    }
}

impl From<&CheckReport> for VolumeOutput {
    fn from(report: &CheckReport) -> Self {
        let points = report.points.iter().map(|point| {
            let (state, cause) = match &point.state {
                PointState::Proved => ("proved", None),
                PointState::Readable => ("readable", None),
                PointState::Unread => ("unread", None),
                PointState::Damaged(cause) => ("damaged", Some(cause.clone())),
            };
            PointOutput {
                id: point.id.to_string(),
                time: rfc3339(point.time),
                state,
                cause,
            }
        });
        let faults = report.faults.iter().map(|fault| FaultOutput {
            path: Some(fault.path.display().to_string()),
            message: fault.message.clone(),
        });
        Self {
            id: report.volume.to_string(),
            name: Some(report.name.clone()),
            sound: report.is_sound(),
            logs: report.logs,
            log_bytes: report.log_bytes.get(),
            points: points.collect(),
            faults: faults.collect(),
        }
    }
}

impl Output {
    fn print(&self) -> std::io::Result<()> {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        for volume in &self.volumes {
            let name = volume.name.as_deref().unwrap_or("(name unknown)");
            let proved = volume.points.iter().filter(|point| point.state == "proved");
            let verdict = if volume.sound { "sound" } else { "DAMAGED" };
            writeln!(
                out,
                "{name}  {}  {verdict}: {} logs, {}, {} of {} points proved by their root",
                volume.id,
                volume.logs,
                output::bytes(volume.log_bytes),
                proved.count(),
                volume.points.len(),
            )?;
            for point in &volume.points {
                if let Some(cause) = &point.cause {
                    writeln!(
                        out,
                        "  damaged point {} of {}: {cause}",
                        point.id, point.time
                    )?;
                }
            }
            for fault in &volume.faults {
                match &fault.path {
                    Some(path) => writeln!(out, "  {path}: {}", fault.message)?,
                    None => writeln!(out, "  {}", fault.message)?,
                }
            }
        }
        if self.volumes.is_empty() {
            writeln!(out, "no volume is in this store")?;
        }
        Ok(())
    }
}
