//! What is looked at before a plan is run, and may be at any time: that its programs, stores, keys, points and
//! machines are there, and, before a run, that every volume can be failed over now. All that is wrong
//! is told at once; nothing is changed.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use hrl_format::id::VolumeId;
use libreplica::plan::{Mode, Plan, PlannedMachine, PlannedVolume, Progress, Work};
use libreplica::store::Store;
use libreplica::{Error, ErrorKind, IoContext};

use super::volumes::{self, How};
use crate::cli::DaemonArgs;
use crate::commands::open_store::{read_key, store_path};
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::Failure;

const LIMIT: Option<Duration> = Some(Duration::from_secs(30));

/// What was found, each in a line that says of what it is.
#[derive(Default)]
pub struct Findings(Vec<String>);

impl Findings {
    /// Them.
    pub fn all(&self) -> &[String] {
        &self.0
    }

    fn note<T>(&mut self, of: &str, outcome: Result<T, Failure>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(failure) => {
                self.0.push(format!("{of}: {failure}"));
                None
            }
        }
    }

    fn say(&mut self, of: &str, what: &str) {
        self.0.push(format!("{of}: {what}"));
    }
}

/// Looks at all that a plan needs, whatever it is run for.
pub fn look(plan: &Plan) -> Findings {
    let mut findings = Findings::default();
    for (action, program) in plan.programs() {
        findings.note(&format!("script {}", action.name), runnable(program));
    }
    let mut ids: Vec<(VolumeId, &str)> = Vec::new();
    for (_, planned) in plan.volumes() {
        let of = format!("volume {}", planned.volume);
        let Some(id) = findings.note(&of, usable(planned)) else {
            continue;
        };
        match ids.iter().find(|(other, _)| *other == id) {
            Some((_, name)) => findings.say(&of, &format!("it is the volume `{name}` again")),
            None => ids.push((id, &planned.volume)),
        }
        let folder = planned.socket.parent().filter(|folder| !folder.is_dir());
        if let Some(folder) = folder {
            findings.say(&of, &format!("{} is no folder", folder.display()));
        }
    }
    for machine in plan.groups.iter().flat_map(|group| &group.machines) {
        let of = format!("machine {}", machine.volume);
        findings.note(&of, bootable(plan, machine, &ids));
    }
    findings
}

/// Looks whether what is ahead of a run can be done now.
///
/// # Errors
/// If no daemon runs, which is to serve what is opened.
pub fn look_ahead(
    daemon: &DaemonArgs,
    progress: &Progress<'_>,
    how: How,
) -> Result<Findings, Failure> {
    let request = Request::Status { volume: None };
    let Answer::Status { open, .. } = ask(&daemon.socket, &request, LIMIT)? else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    let mut findings = Findings::default();
    for step in progress.ahead() {
        let Work::FailOver(planned) = step.work else {
            continue;
        };
        let of = format!("volume {}", planned.volume);
        findings.note(&of, volumes::ready(planned, how));
        let there = |export: &&libreplica::replica::ExportStatus| {
            export.socket().as_ref() == Some(&planned.socket)
        };
        if let Some(export) = open.iter().find(there) {
            let (socket, id) = (planned.socket.display(), &export.id);
            findings.say(
                &of,
                &format!("{id} of {} is served at {socket}", export.name),
            );
        }
    }
    Ok(findings)
}

/// A program is run as root, so nobody else may change it.
fn runnable(program: &Path) -> Result<(), Failure> {
    const LOOK: &str = "look at a script";
    let meta = std::fs::metadata(program).at(LOOK, program)?;
    let wrong = |why: &str, advice: &str| {
        let error = Error::new(ErrorKind::Invalid, LOOK).path(program);
        Err(error.detail(why).advice(advice).into())
    };
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return wrong("it is not executable", "chmod +x");
    }
    let us = nix::unistd::geteuid().as_raw();
    if ![0, us].contains(&meta.uid()) || meta.permissions().mode() & 0o022 != 0 {
        return wrong(
            "others than root could change it",
            "chown root:root and chmod go-w",
        );
    }
    Ok(())
}

/// Whether a volume is there, can be read, and has what is asked for.
fn usable(planned: &PlannedVolume) -> Result<VolumeId, Failure> {
    const LOOK: &str = "look at a volume";
    let store = Store::open(&store_path(&planned.store)?)?;
    let id = store.find(&planned.volume)?;
    let key = read_key(planned.key_file.as_deref())?;
    let is_given = key.is_some();
    let reader = store.volume(id, key)?;
    if reader.catalogue()?.key.is_some() && !is_given {
        return Err(Error::new(ErrorKind::Key, LOOK)
            .detail("it is encrypted, and the plan has no key_file")
            .into());
    }
    if reader.points()?.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, LOOK)
            .detail("it has no recovery point yet")
            .into());
    }
    volumes::point(planned)?;
    Ok(id)
}

/// Whether a machine's definition is kept with its volume, and its disks are the plan's.
fn bootable(
    plan: &Plan,
    machine: &PlannedMachine,
    ids: &[(VolumeId, &str)],
) -> Result<(), Failure> {
    const LOOK: &str = "look at a machine";
    let Some(planned) = plan.volume(&machine.volume) else {
        return Ok(());
    };
    let store = Store::open(&store_path(&planned.store)?)?;
    let reader = store.volume(store.find(&planned.volume)?, None)?;
    let none = || {
        Error::new(ErrorKind::NotFound, LOOK)
            .detail("no definition of the machine is kept with the volume")
            .advice("write one, see docs/drills.md, and give it to `replica machine set`")
    };
    let definition = reader.machine()?.ok_or_else(none)?;
    if definition.life.is_none() {
        return Err(Error::new(ErrorKind::Invalid, LOOK)
            .detail("its definition does not say by what one knows that it lives")
            .advice("add for instance life = { console = \"login:\" }")
            .into());
    }
    for name in definition
        .disks
        .iter()
        .filter_map(|disk| disk.volume.as_ref())
    {
        let id = store.find(name)?;
        if !ids.iter().any(|(other, _)| *other == id) {
            return Err(Error::new(ErrorKind::Invalid, LOOK)
                .detail(format!("its disk `{name}` is no volume of the plan"))
                .into());
        }
    }
    Ok(())
}

/// Whether every volume of the plan is in use in place of its source.
///
/// # Errors
/// When a store cannot be read.
pub fn is_in_effect(plan: &Plan, mode: Mode) -> Result<bool, Failure> {
    if mode == Mode::Test {
        return Ok(false);
    }
    for (_, planned) in plan.volumes() {
        if !volumes::is_failed_over(planned)? {
            return Ok(false);
        }
    }
    Ok(true)
}
