//! `replica store check`: reads everything a store holds, volume by volume, and names the
//! points that are damaged. Needs no daemon, and stops nobody from writing meanwhile.

use std::process::ExitCode;

use hrl_format::VolumeKey;
use libreplica::store::{CheckReport, PointState, Store, VolumeEntry};
use libreplica::time::rfc3339;
use libreplica::{Error, ErrorKind};
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
    /// Why what is inside encrypted frames was not looked at.
    not_inside: Option<&'static str>,
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
    let entries = store.volumes()?;
    if let Some(key) = &key {
        refuse_unused(key, &entries)?;
    }
    let mut volumes = Vec::new();
    for entry in entries {
        let checked = entry.catalogue.and_then(|catalogue| {
            let fits = |key: &VolumeKey| catalogue.key == Some(key.key_id());
            let fitting = key.clone().filter(fits);
            let not_inside = match (&catalogue.key, &key, &fitting) {
                (None, _, _) | (_, _, Some(_)) => None,
                (Some(_), None, None) => Some("no --key-file was given"),
                (Some(_), Some(_), None) => Some("it has another key"),
            };
            let mut progress = Progress::start("checking");
            let report = store
                .volume(entry.id, fitting)?
                .check(&mut |step| progress.update(step.done.get(), step.total.get()));
            progress.finish();
            Ok((report?, not_inside))
        });
        volumes.push(match checked {
            Ok((report, not_inside)) => VolumeOutput::new(&report, not_inside),
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

/// A key that no volume has would check nothing more than none at all.
fn refuse_unused(key: &VolumeKey, entries: &[VolumeEntry]) -> Result<(), Failure> {
    let used = entries.iter().any(|entry| match &entry.catalogue {
        Ok(catalogue) => catalogue.key == Some(key.key_id()),
        // Whose it is cannot be told.
        Err(_) => true,
    });
    if used {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Key, "check the store")
        .detail("no volume in it is encrypted with this key")
        .advice("give the key of one, or none")
        .into())
}

impl VolumeOutput {
    fn unreadable(id: String, message: String) -> Self {
        Self {
            id,
            name: None,
            sound: false,
            logs: 0,
            log_bytes: 0,
            not_inside: None,
            points: Vec::new(),
            faults: vec![FaultOutput {
                path: None,
                message,
            }],
        }
    }

    fn new(report: &CheckReport, not_inside: Option<&'static str>) -> Self {
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
            not_inside,
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
            if let Some(why) = volume.not_inside {
                writeln!(out, "  not checked inside: {why}")?;
            }
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
