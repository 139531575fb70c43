//! A run of a plan: the next step is begun, done and noted, until there is none, one fails, or one waits
//! for somebody. Each note is durable before anything else is done.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};

use libreplica::Error;
use libreplica::machine::Accelerator;
use libreplica::plan::{Doing, Ending, Entry, Mode, Next, Outcome, Plan, Progress, Step, Work};
use libreplica::time::rfc3339;
use libreplica::units::Timestamp;

use super::journal_file::JournalFile;
use super::scripts::{self, Around};
use super::volumes::How;
use super::{machines, volumes};
use crate::cli::DaemonArgs;
use crate::failure::Failure;
use crate::output;

/// A plan that is being run.
pub struct Run<'a> {
    /// Who serves what is opened.
    pub daemon: &'a DaemonArgs,
    /// The plan.
    pub plan: &'a Plan,
    /// How far it is.
    pub progress: Progress<'a>,
    /// Where that stands.
    pub journal: JournalFile,
    /// How volumes are failed over.
    pub how: How,
    /// What runs the machines' code.
    pub accelerator: Accelerator,
    /// What was confirmed beforehand.
    pub confirmed: BTreeSet<String>,
}

/// Why a run goes no further.
pub enum Stop {
    /// It is over.
    Over,
    /// A manual step waits to be confirmed.
    Waits {
        /// What it is called.
        name: String,
        /// What there is to do.
        text: String,
    },
    /// A step failed.
    Failed {
        /// Its id.
        step: String,
        /// Its name, if it is a script: that can be taken as done.
        script: Option<String>,
        /// Why.
        failure: Failure,
    },
}

impl Run<'_> {
    /// Goes on as far as it can.
    ///
    /// # Errors
    /// If the journal cannot be written: then what was done last may not be noted, and is looked at
    /// by the next run.
    pub fn go(&mut self) -> Result<Stop, Failure> {
        loop {
            let stop = match self.progress.next(&self.confirmed) {
                Next::Nothing => Some(Stop::Over),
                Next::End => {
                    self.end(Ending::Completed)?;
                    None
                }
                Next::Confirmed { step, attempt } => {
                    let step = step.clone();
                    self.confirm(&step, attempt, "--confirm")?;
                    None
                }
                Next::Ask { step, attempt } => {
                    let step = step.clone();
                    self.ask(&step, attempt)?
                }
                Next::Do { step, attempt } => {
                    let step = step.clone();
                    self.step(&step, attempt)?
                }
            };
            if let Some(stop) = stop {
                return Ok(stop);
            }
        }
    }

    /// Discards what a test has left open, and ends it; how many drills that were.
    ///
    /// # Errors
    /// What the store or the daemon says; it can be done again.
    pub fn clean_up(&mut self) -> Result<usize, Failure> {
        let left: Vec<Step<'_>> = self.progress.left_open().into_iter().cloned().collect();
        for step in &left {
            if let Some(Stop::Failed { failure, .. }) = self.step(step, 2)? {
                return Err(failure);
            }
        }
        self.end(Ending::CleanedUp)?;
        Ok(left.len())
    }

    fn note(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.journal.append(entry)?;
        self.progress.take(entry)?;
        Ok(())
    }

    fn end(&mut self, ending: Ending) -> Result<(), Failure> {
        let time = now();
        self.note(&Entry::Ended { time, ending })
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), Failure> {
        let (step, time) = (step.id.clone(), now());
        self.note(&Entry::Begun { step, time })
    }

    fn done(&mut self, step: &Step<'_>, outcome: Outcome) -> Result<(), Failure> {
        eprintln!("{}: {}", step.id, told(&outcome));
        let (step, time) = (step.id.clone(), now());
        self.note(&Entry::Done {
            step,
            time,
            outcome,
        })
    }

    fn confirm(&mut self, step: &Step<'_>, attempt: u32, by: &str) -> Result<(), Failure> {
        if attempt == 1 {
            self.begin(step)?;
        }
        let by = by.to_owned();
        self.done(step, Outcome::Confirmed { by })
    }

    /// Asks whether a manual step is done.
    fn ask(&mut self, step: &Step<'_>, attempt: u32) -> Result<Option<Stop>, Failure> {
        let Work::Action(Doing::Confirm { text }) = step.work else {
            return Ok(None);
        };
        if attempt == 1 {
            self.begin(step)?;
        }
        if std::io::stdin().is_terminal() {
            eprint!("{}: {text}\nis that done? [y/N] ", step.id);
            std::io::stderr().flush()?;
            let mut line = String::new();
            std::io::stdin().read_line(&mut line)?;
            if matches!(line.trim(), "y" | "Y" | "yes") {
                self.confirm(step, 2, "terminal")?;
                return Ok(None);
            }
        }
        Ok(Some(Stop::Waits {
            name: step.name.to_owned(),
            text: text.clone(),
        }))
    }

    fn step(&mut self, step: &Step<'_>, attempt: u32) -> Result<Option<Stop>, Failure> {
        let failed = |failure| {
            let step_id = step.id.clone();
            let script = step.is_script().then(|| step.name.to_owned());
            Ok(Some(Stop::Failed {
                step: step_id,
                script,
                failure,
            }))
        };
        // What is begun was possible then: so what is found later is this run's own.
        if let (1, Work::FailOver(planned)) = (attempt, step.work)
            && let Err(failure) = volumes::ready(planned, self.how)
        {
            return failed(failure);
        }
        eprintln!("{}: begun", step.id);
        self.begin(step)?;
        match self.work(step, attempt) {
            Ok(outcome) => {
                self.done(step, outcome)?;
                Ok(None)
            }
            Err(failure) => {
                let (step, time, why) = (step.id.clone(), now(), failure.to_string());
                self.note(&Entry::Failed { step, time, why })?;
                failed(failure)
            }
        }
    }

    fn work(&self, step: &Step<'_>, attempt: u32) -> Result<Outcome, Failure> {
        let mode: Mode = self.progress.mode();
        match step.work {
            Work::Action(Doing::Run { words, limit }) => {
                let around = Around {
                    plan: &self.plan.name,
                    mode,
                    group: step.group,
                    name: step.name,
                    attempt,
                };
                Ok(scripts::run(words, *limit, &around)?)
            }
            Work::Action(Doing::Confirm { .. }) => Err(Failure::Usage(
                "a manual step is confirmed, not done".into(),
            )),
            Work::FailOver(planned) => volumes::fail_over(self.daemon, planned, self.how, attempt),
            Work::Boot(machine) => machines::boot(self.plan, machine, mode, self.accelerator),
            Work::CleanUp(planned) => volumes::discard(self.daemon, planned),
        }
    }
}

fn now() -> String {
    rfc3339(Timestamp::now())
}

/// What came of a step, for people.
fn told(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Ran { output } if output.is_empty() => "done".into(),
        Outcome::Ran { output } => format!("done; it said: {output}"),
        Outcome::Confirmed { by } => format!("confirmed ({by})"),
        Outcome::Opened { branch, uri } => format!("drill {branch} is served at {uri}"),
        Outcome::FailedOver {
            uri,
            point,
            as_of,
            loss_seconds,
            loss_bytes,
            ..
        } => format!(
            "failed over to point {point}, the state of {as_of}, served at {uri}; left out: {} in \
             {loss_seconds:.3} s",
            output::bytes(*loss_bytes)
        ),
        Outcome::Booted { life, seconds } => format!("alive after {seconds:.1} s ({life})"),
        Outcome::CleanedUp => "discarded".into(),
    }
}

/// Refuses names that mean nothing in a run.
///
/// # Errors
/// [`Failure::Usage`], saying why.
pub fn confirmations(
    progress: &Progress<'_>,
    names: &[String],
) -> Result<BTreeSet<String>, Failure> {
    for name in names {
        if let Some(why) = progress.refuses(name) {
            return Err(Failure::Usage(format!("--confirm {name}: {why}")));
        }
    }
    Ok(names.iter().cloned().collect())
}

/// Begins a journal.
///
/// # Errors
/// The system's.
pub fn begin_journal(path: &std::path::Path, opened: &Entry) -> Result<JournalFile, Error> {
    let mut journal = JournalFile::create(path)?;
    journal.append(opened)?;
    Ok(journal)
}
