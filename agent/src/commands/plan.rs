//! `replica plan`: recovery plans, looked at, run in a mode, gone on with, and tests of them cleaned up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use libreplica::machine::Accelerator;
use libreplica::plan::{Entry, Mode, Outcome, Progress};
use libreplica::replica::Shutdown;
use libreplica::time::rfc3339;
use libreplica::units::Timestamp;
use libreplica::{Error, ErrorKind};
use serde::Serialize;

use crate::cli::DaemonArgs;
use crate::commands::drill::AcceleratorArg;
use crate::commands::failover::host;
use crate::failure::{FAILED, Failure, WAITS};
use crate::output;
use crate::plan::checks::{self, Findings};
use crate::plan::journal_file::JournalFile;
use crate::plan::run::{Run, Stop, begin_journal, confirmations};
use crate::plan::volumes::How;
use crate::plan::{PlanFile, usual_journal};
use crate::quantity::DurationArg;

/// How long a source may take to come to rest before it is replaced without.
const SHUT_DOWN: Duration = Duration::from_secs(60);

/// What there is to do with a recovery plan.
#[derive(Debug, Subcommand)]
pub enum PlanCommand {
    /// Look whether all that a plan needs is there
    Check(CheckArgs),
    /// Run a plan, or go on with a run that stopped
    Run(RunArgs),
    /// Give a test up: discard the drills that it has opened
    Cleanup(CleanupArgs),
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The plan: a TOML file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("way").required(true))]
pub struct RunArgs {
    /// The plan: a TOML file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Open drills while replication goes on, and discard them at the end
    #[arg(long, group = "way")]
    pub test: bool,
    /// Have each source come to rest: nothing is lost
    #[arg(long, group = "way")]
    pub planned: bool,
    /// Put the volumes in use, whatever their sources do
    #[arg(long, group = "way")]
    pub unplanned: bool,
    /// Try first, for at most a minute each, to have the source come to rest and ship what is left
    #[arg(long, requires = "unplanned")]
    pub shutdown_source: bool,
    /// With --planned: how long a source may take to come to rest
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    pub limit: DurationArg,
    /// Where what happened is noted [default: FILE.journal]
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// A manual step that is done, or a script that failed and is not to be run again; may be
    /// repeated
    #[arg(long, value_name = "STEP")]
    pub confirm: Vec<String>,
    /// What runs the code of the plan's machines
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: AcceleratorArg,
    /// Print JSON at the end
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct CleanupArgs {
    /// The plan: a TOML file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where what happened was noted [default: FILE.journal]
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
}

/// How a run ended, for scripts.
#[derive(Serialize)]
struct RunOutput<'a> {
    plan: &'a str,
    mode: Mode,
    /// `completed`, `waiting` or `failed`.
    state: &'static str,
    /// The step that waits or failed: what to confirm, or its id.
    step: Option<&'a str>,
    /// What there is to do, or why it failed.
    why: Option<String>,
    journal: &'a Path,
    steps: Vec<StepOutput<'a>>,
}

#[derive(Serialize)]
struct StepOutput<'a> {
    step: &'a str,
    done: bool,
    #[serde(flatten)]
    outcome: Option<&'a Outcome>,
}

pub fn run(daemon: &DaemonArgs, command: &PlanCommand) -> Result<ExitCode, Failure> {
    match command {
        PlanCommand::Check(args) => check(args),
        PlanCommand::Run(args) => start(daemon, args),
        PlanCommand::Cleanup(args) => clean_up(daemon, args),
    }
}

fn check(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let PlanFile { plan, .. } = PlanFile::read(&args.file)?;
    let findings = checks::look(&plan);
    if is_wrong(&findings) {
        return Ok(ExitCode::from(FAILED));
    }
    let (groups, volumes) = (plan.groups.len(), plan.volumes().count());
    eprintln!(
        "{}: {groups} groups, {volumes} volumes: all that it needs is there",
        plan.name
    );
    Ok(ExitCode::SUCCESS)
}

/// Tells what was found, if anything was.
fn is_wrong(findings: &Findings) -> bool {
    for finding in findings.all() {
        eprintln!("replica: {finding}");
    }
    !findings.all().is_empty()
}

impl RunArgs {
    fn how(&self) -> How {
        How {
            mode: match (self.test, self.planned) {
                (true, _) => Mode::Test,
                (_, true) => Mode::Planned,
                _ => Mode::Unplanned,
            },
            limit: self.limit.0,
            shutdown: match self.shutdown_source {
                true => Shutdown::Try(SHUT_DOWN),
                false => Shutdown::Skip,
            },
        }
    }
}

/// A run that was found in its journal, or that begins.
enum Found<'a> {
    /// It is gone on with.
    On(Progress<'a>, JournalFile),
    /// It is over, and what it did is in effect.
    InEffect(Progress<'a>),
    /// There is none, but perhaps the journal of one that is over.
    New(Option<JournalFile>),
}

fn start(daemon: &DaemonArgs, args: &RunArgs) -> Result<ExitCode, Failure> {
    let file = PlanFile::read(&args.file)?;
    let path = journal_path(&args.file, args.journal.as_deref())?;
    let how = args.how();
    let (progress, journal, before) = match find(&file, &path, how.mode)? {
        Found::InEffect(progress) => {
            eprintln!("{}: all of it is done already", file.plan.name);
            return told(args, &file, &path, &progress, &Stop::Over);
        }
        Found::On(progress, journal) => (progress, Some(journal), None),
        Found::New(before) => (Progress::new(&file.plan, how.mode), None, before),
    };
    let confirmed = confirmations(&progress, &args.confirm)?;
    let ahead = checks::look_ahead(daemon, &progress, how)?;
    if is_wrong(&checks::look(&file.plan)) | is_wrong(&ahead) {
        eprintln!("replica: nothing was done");
        return Ok(ExitCode::from(FAILED));
    }
    let journal = match journal {
        Some(journal) => journal,
        None => {
            if let Some(before) = before {
                let aside = before.put_aside()?;
                eprintln!("the journal of the run before is {}", aside.display());
            }
            let now = rfc3339(Timestamp::now());
            let digest = file.digest.clone();
            let opened = Entry::opened(&file.plan.name, digest, how.mode, &host()?, now);
            begin_journal(&path, &opened)?
        }
    };
    let mut run = Run {
        daemon,
        plan: &file.plan,
        progress,
        journal,
        how,
        accelerator: args.accelerator.into(),
        confirmed,
    };
    let stop = run.go()?;
    told(args, &file, &path, &run.progress, &stop)
}

fn journal_path(plan: &Path, named: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = named.map_or_else(|| usual_journal(plan), Path::to_owned);
    Ok(std::path::absolute(path)?)
}

/// The run that the journal tells of, if it is one to go on with.
fn find<'a>(file: &'a PlanFile, path: &Path, mode: Mode) -> Result<Found<'a>, Failure> {
    let Some((journal, entries)) = JournalFile::open(path)? else {
        return Ok(Found::New(None));
    };
    let replayed = Progress::replay(&file.plan, &file.digest, &entries);
    if matches!(entries.last(), None | Some(Entry::Ended { .. })) {
        // Of the plan as it was, perhaps; that run is over, too.
        let same = replayed.ok().filter(|progress| progress.mode() == mode);
        if let Some(progress) = same
            && checks::is_in_effect(&file.plan, mode)?
        {
            return Ok(Found::InEffect(progress));
        }
        return Ok(Found::New(Some(journal)));
    }
    let progress = replayed.map_err(|error| error.path(path))?;
    if progress.mode() != mode {
        let theirs = progress.mode();
        let advice = match theirs {
            Mode::Test => "`replica plan cleanup` gives it up",
            _ => "go on with that, or name another --journal to begin a new one",
        };
        return Err(Error::new(ErrorKind::State, "run the plan")
            .path(path)
            .detail(format!("a run with --{theirs} is not over"))
            .advice(advice)
            .into());
    }
    Ok(Found::On(progress, journal))
}

fn clean_up(daemon: &DaemonArgs, args: &CleanupArgs) -> Result<ExitCode, Failure> {
    const CLEAN_UP: &str = "clean up the plan's test";
    let file = PlanFile::read(&args.file)?;
    let path = journal_path(&args.file, args.journal.as_deref())?;
    let none = |kind| Error::new(kind, CLEAN_UP).path(&path);
    let Some((journal, entries)) = JournalFile::open(&path)? else {
        return Err(none(ErrorKind::NotFound)
            .detail("there is no journal of a test")
            .into());
    };
    let progress = Progress::replay(&file.plan, &file.digest, &entries);
    let progress = progress.map_err(|error| error.path(&path))?;
    if progress.mode() != Mode::Test {
        return Err(none(ErrorKind::State)
            .detail("it is no test")
            .advice("what is failed over is committed, or brought home with `replica failback`")
            .into());
    }
    if progress.is_over() {
        eprintln!("nothing of the test is left");
        return Ok(ExitCode::SUCCESS);
    }
    let mut run = Run {
        daemon,
        plan: &file.plan,
        progress,
        journal,
        how: How {
            mode: Mode::Test,
            limit: SHUT_DOWN,
            shutdown: Shutdown::Skip,
        },
        accelerator: Accelerator::default(),
        confirmed: BTreeSet::new(),
    };
    let count = run.clean_up()?;
    eprintln!("the test is given up; {count} drills were looked for and discarded");
    Ok(ExitCode::SUCCESS)
}

/// Says why a run goes no further, and how it does.
fn told(
    args: &RunArgs,
    file: &PlanFile,
    journal: &Path,
    progress: &Progress<'_>,
    stop: &Stop,
) -> Result<ExitCode, Failure> {
    let (state, step, why, code) = match stop {
        Stop::Over => ("completed", None, None, ExitCode::SUCCESS),
        Stop::Waits { name, text } => {
            eprintln!("{name}: {text}");
            eprintln!("next: when that is done, the same command with `--confirm {name}`");
            let code = ExitCode::from(WAITS);
            ("waiting", Some(name.as_str()), Some(text.clone()), code)
        }
        Stop::Failed {
            step,
            script,
            failure,
        } => {
            eprintln!("replica: {step}: {failure}");
            eprintln!("next: mend that, and give the same command again: it goes on here");
            if let Some(script) = script {
                eprintln!("or add `--confirm {script}`, if it is not to be run again");
            }
            let why = Some(failure.to_string());
            ("failed", Some(step.as_str()), why, failure.exit_code())
        }
    };
    if args.json {
        let steps = progress.steps().map(|(step, outcome)| StepOutput {
            step: &step.id,
            done: outcome.is_some(),
            outcome,
        });
        output::json(&RunOutput {
            plan: &file.plan.name,
            mode: progress.mode(),
            state,
            step,
            why,
            journal,
            steps: steps.collect(),
        })?;
    }
    Ok(code)
}
