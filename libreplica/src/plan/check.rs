//! What is wrong with a plan that its text alone shows: names that mean two things, or nothing. All of
//! it is told at once.

use std::collections::BTreeSet;
use std::path::Path;

use super::definition::{Action, Doing, Plan};

/// The longest name, in bytes.
const LONGEST: usize = 64;

impl Plan {
    /// What is wrong, in words; nothing if all is well.
    pub(super) fn wrong(&self) -> Vec<String> {
        let mut wrong = Wrong::default();
        wrong.name("the plan", &self.name);
        if self.groups.is_empty() {
            wrong.say("it has no group".into());
        }
        let mut groups = Names::of("group");
        let mut actions = Names::of("script or manual step");
        for group in &self.groups {
            wrong.name("a group", &group.name);
            groups.add(&group.name, &mut wrong);
            for action in group.before.iter().chain(&group.after) {
                wrong.name("a script or manual step", &action.name);
                actions.add(&action.name, &mut wrong);
                wrong.action(action);
            }
        }
        self.volumes_wrong(&mut wrong);
        self.machines_wrong(&mut wrong);
        wrong.0
    }

    fn volumes_wrong(&self, wrong: &mut Wrong) {
        let mut volumes = Names::of("volume");
        let mut sockets = Names::of("socket");
        for (_, planned) in self.volumes() {
            volumes.add(&planned.volume, wrong);
            sockets.add(&planned.socket.to_string_lossy(), wrong);
            if !planned.store.contains("://") && !Path::new(&planned.store).is_absolute() {
                wrong.path("the store of", &planned.volume, &planned.store);
            }
            if let Some(key) = planned.key_file.as_ref().filter(|key| !key.is_absolute()) {
                wrong.path("the key file of", &planned.volume, &key.to_string_lossy());
            }
        }
    }

    /// A machine needs its volume failed over before it.
    fn machines_wrong(&self, wrong: &mut Wrong) {
        let mut machines = Names::of("machine");
        let mut there = BTreeSet::new();
        for group in &self.groups {
            there.extend(group.volumes.iter().map(|planned| planned.volume.as_str()));
            for machine in &group.machines {
                machines.add(&machine.volume, wrong);
                if !there.contains(machine.volume.as_str()) {
                    wrong.say(format!(
                        "the machine of `{}`: neither `{}` nor a group before it has that volume",
                        machine.volume, group.name
                    ));
                }
            }
        }
    }
}

/// What was found.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn say(&mut self, what: String) {
        self.0.push(what);
    }

    /// Names are typed at a terminal, and stand in the environment.
    fn name(&mut self, whose: &str, name: &str) {
        let plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > LONGEST || !name.chars().all(plain) {
            self.say(format!(
                "{whose} cannot be called `{}`: up to {LONGEST} letters, digits, `-`, `_` and `.`",
                name.escape_debug()
            ));
        }
    }

    fn path(&mut self, what: &str, whose: &str, path: &str) {
        self.say(format!("{what} `{whose}`: `{path}` is no absolute path"));
    }

    fn action(&mut self, action: &Action) {
        let name = &action.name;
        match &action.doing {
            Doing::Run { words, .. } => match words.first() {
                Some(program) if Path::new(program).is_absolute() => {}
                Some(program) => self.path("the program of", name, program),
                None => self.say(format!("`{name}` runs nothing")),
            },
            Doing::Confirm { text } if text.trim().is_empty() => {
                self.say(format!("`{name}` does not say what is to be confirmed"));
            }
            Doing::Confirm { .. } => {}
        }
    }
}

/// Names of one kind, each of which means one thing.
struct Names {
    kind: &'static str,
    seen: BTreeSet<String>,
}

impl Names {
    fn of(kind: &'static str) -> Self {
        let seen = BTreeSet::new();
        Self { kind, seen }
    }

    fn add(&mut self, name: &str, wrong: &mut Wrong) {
        if !self.seen.insert(name.to_owned()) {
            wrong.say(format!("the {} `{name}` is there twice", self.kind));
        }
    }
}
