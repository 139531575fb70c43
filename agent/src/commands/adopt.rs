//! `replica adopt`: has the daemon know the volumes of a store, so that the commands of recovery
//! need a name only.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use libreplica::IoContext;

use crate::cli::DaemonArgs;
use crate::commands::open_store::store_path;
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::Failure;
use crate::text;

const LIMIT: Option<Duration> = Some(Duration::from_secs(60));

#[derive(Args, Debug)]
pub struct AdoptArgs {
    /// The store: a folder or a file:// URL
    #[arg(value_parser = text::store)]
    pub store: String,
    /// The volume's name or id [default: all that the store has]
    pub volume: Option<String>,
    /// The volume key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

pub fn run(daemon: &DaemonArgs, args: AdoptArgs) -> Result<ExitCode, Failure> {
    let existing = |path: &Path| std::fs::canonicalize(path).at("find the key file", path);
    let request = Request::Adopt {
        store: store_path(&args.store)?,
        volume: args.volume,
        key_file: args.key_file.as_deref().map(existing).transpose()?,
    };
    let Answer::Adopted { volumes } = ask(&daemon.socket, &request, LIMIT)? else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    for volume in volumes {
        println!("{}  {}", volume.volume, volume.name);
    }
    Ok(ExitCode::SUCCESS)
}
