//! `--group`: what `failover`, `open`, `restore` and `drill` do to one volume, done to all that have a
//! point of the same moment. What is opened is served by a daemon, each at a socket named after
//! its volume.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use hrl_format::VolumeKey;
use hrl_format::id::BranchId;
use libreplica::IoContext;
use libreplica::replica::{Choice, FailedOver, Failover, GroupMember, Shutdown, group_of};
use libreplica::store::Store;

use crate::cli::{DaemonArgs, OpenArgs, RestoreArgs};
use crate::commands::failover::{FailoverArgs, choice, clean_up, host, tell};
use crate::commands::open_store::find_volume;
use crate::commands::{open, restore, serve_branch};
use crate::control::client::ask;
use crate::control::protocol::Request;
use crate::failure::Failure;

const LIMIT: Option<Duration> = Some(Duration::from_secs(30));
/// How long a source may take to come to rest before it is replaced without.
const SHUT_DOWN: Duration = Duration::from_secs(60);

/// A group, and what opens it.
pub struct Group {
    /// Where they lie.
    pub store: Store,
    key: Option<VolumeKey>,
    /// Its volumes, by name.
    pub members: Vec<GroupMember>,
}

impl Group {
    /// The group of a volume, at the point that `point` means.
    ///
    /// # Errors
    /// Those of finding the volume, and of [`group_of`].
    pub fn find(
        daemon: &DaemonArgs,
        volume: &str,
        store: Option<&str>,
        key_file: Option<&Path>,
        point: Choice,
    ) -> Result<Self, Failure> {
        let found = find_volume(daemon, volume, store)?;
        let key = found.key(key_file)?;
        let members = group_of(&found.store, found.id, key.as_ref(), point)?;
        Ok(Self {
            store: found.store,
            key,
            members,
        })
    }

    fn failover(&self, member: &GroupMember) -> Result<Failover, Failure> {
        let plain = self.store.volume(member.volume, None)?.catalogue()?;
        let key = self.key.clone().filter(|_| plain.key.is_some());
        Ok(Failover::new(
            self.store.clone(),
            member.volume,
            key,
            &host()?,
        ))
    }
}

/// The folder that is named in the place of one file.
fn folder(path: &Path) -> Result<&Path, Failure> {
    match path.is_dir() {
        true => Ok(path),
        false => Err(Failure::Usage(format!(
            "{}: with --group a folder is wanted, with a place for each volume in it",
            path.display()
        ))),
    }
}

/// `replica restore --group`: each to `NAME.img` in the folder.
pub fn restore(daemon: &DaemonArgs, args: &RestoreArgs) -> Result<ExitCode, Failure> {
    let (store, key_file) = (args.store.as_deref(), args.key_file.as_deref());
    let point = choice(&args.point)?;
    let group = Group::find(daemon, &args.volume, store, key_file, point)?;
    let folder = folder(&args.output)?;
    for member in &group.members {
        restore::run(
            daemon,
            &RestoreArgs {
                volume: member.volume.to_string(),
                group: false,
                point: member.point.to_string(),
                output: folder.join(format!("{}.img", member.name)),
                store: Some(group.store.path().display().to_string()),
                key_file: args.key_file.clone(),
                force: args.force,
                json: args.json,
            },
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `replica open --group`: each at `NAME.nbd` in the folder.
pub fn open(daemon: &DaemonArgs, args: &OpenArgs) -> Result<ExitCode, Failure> {
    let (store, key_file) = (args.store.as_deref(), args.key_file.as_deref());
    let point = choice(args.point.as_deref().unwrap_or("latest"))?;
    must_be_served(daemon)?;
    let group = Group::find(daemon, &args.volume, store, key_file, point)?;
    let folder = folder(&args.nbd)?;
    for member in &group.members {
        open::run(
            daemon,
            &OpenArgs {
                volume: member.volume.to_string(),
                group: false,
                point: Some(member.point.to_string()),
                branch: None,
                nbd: socket(folder, member),
                read_only: args.read_only,
                keep: args.keep,
                foreground: false,
                store: Some(group.store.path().display().to_string()),
                key_file: args.key_file.clone(),
            },
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn socket(folder: &Path, member: &GroupMember) -> PathBuf {
    folder.join(format!("{}.nbd", member.name))
}

/// One process in the foreground serves one volume; more need a daemon.
fn must_be_served(daemon: &DaemonArgs) -> Result<(), Failure> {
    ask(&daemon.socket, &Request::Status { volume: None }, LIMIT).map(drop)
}

/// `replica failover --group`.
pub fn failover(daemon: &DaemonArgs, args: &FailoverArgs) -> Result<ExitCode, Failure> {
    let point = choice(&args.point)?;
    let (store, key_file) = (args.at.store.as_deref(), args.at.key_file.as_deref());
    must_be_served(daemon)?;
    let group = Group::find(daemon, &args.volume, store, key_file, point)?;
    if args.cleanup {
        for member in &group.members {
            clean_up(daemon, &member.name, &group.failover(member)?)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let Some(place) = &args.serve.nbd else {
        return Err(Failure::Usage("--nbd is needed".into()));
    };
    let folder = folder(place)?;
    let existing = |path: &Path| std::fs::canonicalize(path).at("find the key file", path);
    let key_file = key_file.map(existing).transpose()?;
    let branches = branches(&group, args)?;
    for (member, (failover, branch)) in group.members.iter().zip(branches) {
        let socket = socket(folder, member);
        let plain = group.store.volume(member.volume, None)?.catalogue()?;
        let key_file = key_file.as_deref().filter(|_| plain.key.is_some());
        let uri = serve_branch::serve(daemon, &failover, branch, key_file, &socket)?;
        println!("{uri}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails all of them over. As planned, all come to rest before the first is taken over.
fn branches(group: &Group, args: &FailoverArgs) -> Result<Vec<(Failover, BranchId)>, Failure> {
    let mut done = Vec::new();
    let mut resting = Vec::new();
    for member in &group.members {
        let failover = group.failover(member)?;
        let point = Choice::State(libreplica::store::PointSelector::Id(member.point));
        if args.test {
            let branch = failover.test(point)?;
            done.push((failover, branch));
            continue;
        }
        let wanted = if args.planned { Choice::Latest } else { point };
        let shutdown = match args.shutdown_source {
            true => Shutdown::Try(SHUT_DOWN),
            false => Shutdown::Skip,
        };
        match failover.resume(wanted)? {
            Some(over) => done.push(over_to(member, failover, &over)),
            None if args.planned => {
                let rests = failover.rest(args.limit.0)?;
                resting.push((member, failover, rests));
            }
            None => {
                let over = failover.unplanned(point, shutdown)?;
                done.push(over_to(member, failover, &over));
            }
        }
    }
    for (member, failover, rests) in resting {
        let over = failover.planned_at_rest(rests)?;
        done.push(over_to(member, failover, &over));
    }
    let place = |failover: &Failover| {
        let mut members = group.members.iter();
        members.position(|member| member.volume == failover.volume())
    };
    done.sort_by_key(|(failover, _)| place(failover));
    Ok(done)
}

fn over_to(member: &GroupMember, failover: Failover, over: &FailedOver) -> (Failover, BranchId) {
    tell(&member.name, over);
    (failover, over.branch)
}
