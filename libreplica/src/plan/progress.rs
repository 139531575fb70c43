//! How far a run of a plan has come: what its journal says, taken in entry by entry, and from that the
//! one step that is next. Steps are done in order, one at a time; one that was begun and has not
//! ended, or that failed, is next until it is done.

use std::collections::BTreeSet;

use super::definition::{Mode, Plan, PlanDigest};
use super::journal::{Entry, Outcome};
use super::steps::{Step, Work};
use crate::error::{Error, ErrorKind, Result};

const READ: &str = "read the plan's journal";

/// How a step is.
#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Nothing was done.
    Ahead,
    /// It was begun so many times, and the last time did not end.
    Begun(u32),
    /// It was begun so many times, and failed the last time.
    Failed(u32),
    /// It is done, and this came of it.
    Done(Box<Outcome>),
}

/// How far a run of a plan has come.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    mode: Mode,
    steps: Vec<Step<'a>>,
    states: Vec<State>,
    is_over: bool,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next<'p, 'a> {
    /// This step.
    Do {
        /// It.
        step: &'p Step<'a>,
        /// The how manieth time it is begun, from 1. From 2 on it may have happened already, in
        /// part or in full.
        attempt: u32,
    },
    /// Somebody is to be asked whether this manual step is done.
    Ask {
        /// It.
        step: &'p Step<'a>,
        /// As in [`Next::Do`].
        attempt: u32,
    },
    /// This step was confirmed, and is to be noted as done.
    Confirmed {
        /// It.
        step: &'p Step<'a>,
        /// As in [`Next::Do`].
        attempt: u32,
    },
    /// That the run is over is to be noted: every step is done.
    End,
    /// Nothing: it is over.
    Nothing,
}

impl<'a> Progress<'a> {
    /// Of a run of which nothing is done.
    pub fn new(plan: &'a Plan, mode: Mode) -> Self {
        let steps = plan.steps(mode);
        Self {
            mode,
            states: vec![State::Ahead; steps.len()],
            steps,
            is_over: false,
        }
    }

    /// Of the run that a journal tells of.
    ///
    /// # Errors
    /// [`ErrorKind::Foreign`] if it is of another plan; [`ErrorKind::Damaged`] if it tells what cannot
    /// have happened.
    pub fn replay(plan: &'a Plan, digest: &PlanDigest, entries: &[Entry]) -> Result<Self> {
        let Some(Entry::Opened {
            plan: name,
            digest: theirs,
            mode,
            ..
        }) = entries.first()
        else {
            return Err(damaged("it does not say of which plan it is"));
        };
        if theirs != digest {
            return Err(Error::new(ErrorKind::Foreign, READ)
                .detail(format!(
                    "it is of a run of the plan `{name}` as it was, with the digest {theirs}; this \
                     one has {digest}"
                ))
                .advice(
                    "put the plan back as it was to go on with that run, or name another \
                     --journal to begin a new one",
                ));
        }
        let mut progress = Self::new(plan, *mode);
        for entry in &entries[1..] {
            progress.take(entry)?;
        }
        Ok(progress)
    }

    /// Takes in what happened.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it cannot have happened.
    pub fn take(&mut self, entry: &Entry) -> Result<()> {
        if self.is_over {
            return Err(damaged("it goes on behind its end"));
        }
        match entry {
            Entry::Opened { .. } => return Err(damaged("it begins twice")),
            Entry::Ended { .. } => self.is_over = true,
            Entry::Begun { step, .. } => {
                let state = self.reached(step)?;
                *state = match state {
                    State::Done(_) => return Err(damaged(format!("{step} is done twice"))),
                    State::Ahead => State::Begun(1),
                    State::Begun(times) | State::Failed(times) => {
                        State::Begun(times.saturating_add(1))
                    }
                };
            }
            Entry::Done { step, outcome, .. } => match self.reached(step)? {
                State::Ahead => return Err(damaged(format!("{step} was never begun"))),
                State::Done(_) => return Err(damaged(format!("{step} is done twice"))),
                state => *state = State::Done(Box::new(outcome.clone())),
            },
            Entry::Failed { step, .. } => match self.reached(step)? {
                State::Begun(times) => {
                    let times = *times;
                    *self.reached(step)? = State::Failed(times);
                }
                _ => return Err(damaged(format!("{step} was not begun, and failed"))),
            },
        }
        Ok(())
    }

    /// The state of a step, to which the run must have come.
    fn reached(&mut self, id: &str) -> Result<&mut State> {
        let place = self.steps.iter().position(|step| step.id == id);
        let place = place.ok_or_else(|| damaged(format!("the plan has no step {id}")))?;
        let before = &self.states[..place];
        let is_done = |state: &State| matches!(state, State::Done(_));
        if !self.steps[place].is_cleanup() && !before.iter().all(is_done) {
            return Err(damaged(format!("{id} was begun before its turn")));
        }
        Ok(&mut self.states[place])
    }

    /// What the run is for.
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether its end is noted.
    pub const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether any step was begun.
    pub fn has_begun(&self) -> bool {
        self.states.iter().any(|state| *state != State::Ahead)
    }

    /// Its steps, each with what came of it, if it is done.
    pub fn steps(&self) -> impl Iterator<Item = (&Step<'a>, Option<&Outcome>)> {
        self.steps.iter().zip(&self.states).map(|(step, state)| {
            let outcome = match state {
                State::Done(outcome) => Some(&**outcome),
                _ => None,
            };
            (step, outcome)
        })
    }

    /// The steps of which nothing was done yet.
    pub fn ahead(&self) -> impl Iterator<Item = &Step<'a>> {
        let both = self.steps.iter().zip(&self.states);
        both.filter(|(_, state)| **state == State::Ahead)
            .map(|(step, _)| step)
    }

    /// What is next. `confirmed` are the names that somebody has confirmed: of manual steps, and of scripts
    /// that failed or were cut short and are not to be run again.
    pub fn next(&self, confirmed: &BTreeSet<String>) -> Next<'_, 'a> {
        if self.is_over {
            return Next::Nothing;
        }
        let both = self.steps.iter().zip(&self.states);
        let Some((step, state)) = both
            .into_iter()
            .find(|(_, state)| !matches!(state, State::Done(_)))
        else {
            return Next::End;
        };
        let is_confirmed = confirmed.contains(step.name);
        let attempt = match state {
            State::Begun(times) | State::Failed(times) => times.saturating_add(1),
            State::Ahead | State::Done(_) => 1,
        };
        if step.is_manual() {
            return match is_confirmed {
                true => Next::Confirmed { step, attempt },
                false => Next::Ask { step, attempt },
            };
        }
        match is_confirmed && step.is_script() && attempt > 1 {
            true => Next::Confirmed { step, attempt },
            false => Next::Do { step, attempt },
        }
    }

    /// Why a name that somebody confirms means nothing in this run; none if it does.
    pub fn refuses(&self, name: &str) -> Option<String> {
        let both = self.steps.iter().zip(&self.states);
        // A volume may be called as a step is.
        let mut named =
            both.filter(|(step, _)| step.name == name && (step.is_manual() || step.is_script()));
        match named.next() {
            None => Some(format!(
                "no manual step or script of this run is called `{name}`"
            )),
            Some((step, State::Ahead)) if step.is_script() => Some(format!(
                "the script `{name}` was not run yet: only one that failed can be taken as done"
            )),
            Some(_) => None,
        }
    }

    /// The steps that discard what a test has opened, and may have left open.
    pub fn left_open(&self) -> Vec<&Step<'a>> {
        let begun = |volume: &str| {
            let mut both = self.steps.iter().zip(&self.states);
            both.any(|(step, state)| {
                matches!(step.work, Work::FailOver(planned) if planned.volume == volume)
                    && *state != State::Ahead
            })
        };
        let both = self.steps.iter().zip(&self.states);
        let open = both.filter(|(step, state)| {
            matches!(step.work, Work::CleanUp(planned) if begun(&planned.volume))
                && !matches!(state, State::Done(_))
        });
        open.map(|(step, _)| step).collect()
    }
}

fn damaged(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, READ)
        .detail(why)
        .advice("look at it; another --journal begins a new run")
}
