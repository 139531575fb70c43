//! What happened in a run of a plan: one JSON object a line, in the order in which it happened. The last
//! line may be cut off, by whatever ended the run; then it did not happen. Any other that cannot be read
//! is damage, which is told and not guessed at.

use serde::{Deserialize, Serialize};

use super::definition::{Mode, PlanDigest};
use crate::error::{Error, ErrorKind, Result};

/// The version of these lines.
const VERSION: u32 = 1;

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Entry {
    /// The run began. The first line, and no other.
    Opened {
        /// That of these lines.
        version: u32,
        /// The plan's name.
        plan: String,
        /// That of its text.
        digest: PlanDigest,
        /// What it is run for.
        mode: Mode,
        /// By which machine.
        host: String,
        /// When (RFC 3339).
        time: String,
    },
    /// A step is about to be done.
    Begun {
        /// Its id.
        step: String,
        /// When.
        time: String,
    },
    /// A step is done.
    Done {
        /// Its id.
        step: String,
        /// When.
        time: String,
        /// What came of it.
        #[serde(flatten)]
        outcome: Outcome,
    },
    /// A step failed: the run stopped there.
    Failed {
        /// Its id.
        step: String,
        /// When.
        time: String,
        /// Why, with the end of what a script said.
        why: String,
    },
    /// The run is over.
    Ended {
        /// When.
        time: String,
        /// How.
        ending: Ending,
    },
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Every step is done.
    Completed,
    /// A test was given up, and its drills are discarded.
    CleanedUp,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// A program ended well.
    Ran {
        /// The end of what it said.
        output: String,
    },
    /// Somebody confirmed it: a manual step, or that a script is not to be run again.
    Confirmed {
        /// How: at a `terminal`, or by `--confirm`.
        by: String,
    },
    /// A drill is open.
    Opened {
        /// Its branch.
        branch: String,
        /// Where it is served.
        uri: String,
    },
    /// A volume is failed over.
    FailedOver {
        /// The branch that is in use.
        branch: String,
        /// Where it is served.
        uri: String,
        /// The point that it stands on.
        point: String,
        /// When the volume was so.
        as_of: String,
        /// What the store has behind it.
        loss_seconds: f64,
        /// See there.
        loss_bytes: u64,
        /// Why the source did not come to rest, if it was asked to.
        source_refused: Option<String>,
    },
    /// A machine runs.
    Booted {
        /// What its sign of life was, or that none is known.
        life: String,
        /// How long it took.
        seconds: f64,
    },
    /// The drill is discarded.
    CleanedUp,
}

impl Entry {
    /// The beginning of a run.
    pub fn opened(plan: &str, digest: PlanDigest, mode: Mode, host: &str, time: String) -> Self {
        Self::Opened {
            version: VERSION,
            plan: plan.to_owned(),
            digest,
            mode,
            host: host.to_owned(),
            time,
        }
    }

    /// As a line of the journal, its end included.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it cannot be written as JSON.
    pub fn line(&self) -> Result<String> {
        let line = serde_json::to_string(self);
        line.map(|line| line + "\n").map_err(|source| {
            Error::new(ErrorKind::Invalid, "write the plan's journal").source(source)
        })
    }
}

/// A journal, as far as it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Journal {
    /// What happened.
    pub entries: Vec<Entry>,
    /// How many bytes that are; what is behind them was cut off, and is to be removed before more
    /// is written.
    pub whole: usize,
}

impl Journal {
    /// Reads the lines of a journal.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], saying which line; [`ErrorKind::Unsupported`] if a newer version wrote it.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        const READ: &str = "read the plan's journal";
        let mut journal = Self {
            entries: Vec::new(),
            whole: 0,
        };
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').peekable();
        while let Some(line) = lines.next() {
            let entry = match serde_json::from_slice(line) {
                Ok(entry) if line.ends_with(b"\n") => entry,
                _ if lines.peek().is_none() => break,
                Ok(_) => break,
                Err(source) => {
                    let number = journal.entries.len() + 1;
                    return Err(Error::new(ErrorKind::Damaged, READ)
                        .detail(format!("line {number}"))
                        .source(source));
                }
            };
            if let Entry::Opened { version, .. } = &entry
                && *version != VERSION
            {
                return Err(Error::new(ErrorKind::Unsupported, READ)
                    .detail(format!("it is of version {version}"))
                    .advice("use the version of `replica` that wrote it"));
            }
            journal.entries.push(entry);
            journal.whole += line.len();
        }
        Ok(journal)
    }
}
