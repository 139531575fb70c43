//! A machine of a plan. In a test its recovery point is drilled: booted beside all else, and the
//! sign of life waited for. In earnest it is booted on what the daemon serves, and goes on when the
//! command ends; what belongs to it lies in a folder beside its volume's socket.

use libreplica::boot::Standing;
use libreplica::machine::{Accelerator, MachineDefinition, Source, Verdict};
use libreplica::plan::{Mode, Outcome, Plan, PlannedMachine, PlannedVolume};
use libreplica::replica::{DrillSpec, drill};
use libreplica::store::Store;
use libreplica::{Error, ErrorKind};

use super::volumes;
use crate::commands::open_store::{read_key, store_path};
use crate::failure::Failure;

const BOOT: &str = "boot a machine of the plan";

/// Boots a machine, and waits until it lives.
///
/// # Errors
/// [`ErrorKind::State`] if it does not; those of starting it.
pub fn boot(
    plan: &Plan,
    machine: &PlannedMachine,
    mode: Mode,
    accelerator: Accelerator,
) -> Result<Outcome, Failure> {
    let missing = || Error::new(ErrorKind::NotFound, BOOT).detail("the plan has no such volume");
    let planned = plan.volume(&machine.volume).ok_or_else(missing)?;
    let store = Store::open(&store_path(&planned.store)?)?;
    match mode {
        Mode::Test => test(planned, &store, accelerator),
        Mode::Planned | Mode::Unplanned => in_earnest(plan, planned, &store, accelerator),
    }
}

fn test(
    planned: &PlannedVolume,
    store: &Store,
    accelerator: Accelerator,
) -> Result<Outcome, Failure> {
    let drilled = drill(
        &DrillSpec {
            store,
            volume: store.find(&planned.volume)?,
            key: read_key(planned.key_file.as_deref())?.as_ref(),
            point: volumes::point(planned)?,
            machine: None,
            limit: None,
            accelerator,
        },
        &|| false,
    )?;
    let proof = drilled.proof;
    if proof.verdict.is_alive() {
        return Ok(Outcome::Booted {
            life: proof.waited_for,
            seconds: proof.seconds,
        });
    }
    let (verdict, seconds, sign) = (proof.verdict.as_str(), proof.seconds, proof.waited_for);
    let mut why = format!("{verdict} after {seconds:.1} s, {sign}");
    if !drilled.complaint.is_empty() {
        why.push_str(&format!("; QEMU said: {}", drilled.complaint));
    }
    Err(Error::new(ErrorKind::State, BOOT).detail(why).into())
}

fn in_earnest(
    plan: &Plan,
    planned: &PlannedVolume,
    store: &Store,
    accelerator: Accelerator,
) -> Result<Outcome, Failure> {
    let none = || Error::new(ErrorKind::NotFound, BOOT).detail("its definition is gone");
    let reader = store.volume(store.find(&planned.volume)?, None)?;
    let machine = reader.machine()?.ok_or_else(none)?;
    let disks = disks(plan, planned, store, &machine)?;
    let folder = planned.socket.with_added_extension("machine");
    let mut standing = Standing::start(&machine, &disks, accelerator, &folder)?;
    let sign = standing.sign().is_some();
    let observed = standing.wait_for_life();
    let seconds = observed.after.as_secs_f64();
    match observed.verdict {
        Verdict::Alive => Ok(Outcome::Booted {
            life: match sign {
                true => "it gave its sign of life".into(),
                false => "it runs; its sign of life cannot be seen from here".into(),
            },
            seconds,
        }),
        verdict => Err(Error::new(ErrorKind::State, BOOT)
            .path(&folder)
            .detail(format!("{} after {seconds:.1} s", verdict.as_str()))
            .advice(
                "look at its console, a socket in that folder; a machine that runs is not ended",
            )
            .into()),
    }
}

/// Where the machine's disks are served.
fn disks(
    plan: &Plan,
    own: &PlannedVolume,
    store: &Store,
    machine: &MachineDefinition,
) -> Result<Vec<Source>, Failure> {
    let mut disks = Vec::new();
    for disk in &machine.disks {
        let Some(name) = &disk.volume else {
            disks.push(Source::Nbd(own.socket.clone()));
            continue;
        };
        let id = store.find(name)?;
        let mut found = None;
        for (_, other) in plan.volumes() {
            if volumes::of(other)?.volume() == id {
                found = Some(Source::Nbd(other.socket.clone()));
            }
        }
        disks.push(found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, BOOT)
                .detail(format!("its disk `{name}` is no volume of the plan"))
        })?);
    }
    Ok(disks)
}
