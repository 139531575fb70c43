//! What a plan comes to in a mode: its steps, in order. A step's id is what the journal knows it by.

use super::definition::{Action, Doing, Group, Mode, Plan, PlannedMachine, PlannedVolume};

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// What the journal calls it: `GROUP/KIND/NAME`.
    pub id: String,
    /// Its group's name.
    pub group: &'a str,
    /// Its own name: an action's, or a volume's.
    pub name: &'a str,
    /// What is done.
    pub work: Work<'a>,
}

/// What is done in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work<'a> {
    /// What is besides the volumes.
    Action(&'a Doing),
    /// A volume is failed over, or opened as a drill, and served.
    FailOver(&'a PlannedVolume),
    /// A machine is booted.
    Boot(&'a PlannedMachine),
    /// The drill of a volume is discarded.
    CleanUp(&'a PlannedVolume),
}

impl Step<'_> {
    /// Whether somebody has to confirm it.
    pub const fn is_manual(&self) -> bool {
        matches!(self.work, Work::Action(Doing::Confirm { .. }))
    }

    /// Whether it is a program.
    pub const fn is_script(&self) -> bool {
        matches!(self.work, Work::Action(Doing::Run { .. }))
    }

    /// Whether it discards a drill. That may be done at any time.
    pub const fn is_cleanup(&self) -> bool {
        matches!(self.work, Work::CleanUp(_))
    }
}

impl Plan {
    /// Its steps in a mode: group by group what is before, the volumes, the machines, what is after. At
    /// the end of a test the drills are discarded, the last one first.
    pub fn steps(&self, mode: Mode) -> Vec<Step<'_>> {
        let mut steps = Vec::new();
        for group in &self.groups {
            actions(group, "before", &group.before, mode, &mut steps);
            for volume in &group.volumes {
                let work = Work::FailOver(volume);
                steps.push(step(group, "volume", &volume.volume, work));
            }
            let machines = group.machines.iter();
            for machine in machines.filter(|machine| is_meant(&machine.modes, mode)) {
                let work = Work::Boot(machine);
                steps.push(step(group, "machine", &machine.volume, work));
            }
            actions(group, "after", &group.after, mode, &mut steps);
        }
        if mode == Mode::Test {
            for (group, volume) in self.volumes().rev() {
                let work = Work::CleanUp(volume);
                steps.push(step(group, "cleanup", &volume.volume, work));
            }
        }
        steps
    }
}

fn actions<'a>(
    group: &'a Group,
    kind: &str,
    actions: &'a [Action],
    mode: Mode,
    steps: &mut Vec<Step<'a>>,
) {
    let meant = |action: &&Action| is_meant(&action.modes, mode);
    for action in actions.iter().filter(meant) {
        steps.push(step(group, kind, &action.name, Work::Action(&action.doing)));
    }
}

/// Whether what names these modes is done in that one.
fn is_meant(modes: &[Mode], mode: Mode) -> bool {
    modes.is_empty() || modes.contains(&mode)
}

fn step<'a>(group: &'a Group, kind: &str, name: &'a str, work: Work<'a>) -> Step<'a> {
    Step {
        id: format!("{}/{kind}/{name}", group.name),
        group: &group.name,
        name,
        work,
    }
}
