//! What was failed over to, served by a daemon: asked for until it is, and not twice. For commands that may
//! have been killed after any step, and are given again.

use std::path::Path;
use std::time::Duration;

use hrl_format::id::BranchId;
use libreplica::IoContext;
use libreplica::replica::Failover;

use crate::cli::DaemonArgs;
use crate::commands::failover::served;
use crate::control::client::ask;
use crate::control::protocol::{Answer, OpenRequest, Request};
use crate::failure::Failure;

const LIMIT: Option<Duration> = Some(Duration::from_secs(120));

/// Has the daemon serve a branch of a volume at `socket`, if it does not yet; its URI.
///
/// # Errors
/// What the daemon says; if the key file is not there.
pub fn serve(
    daemon: &DaemonArgs,
    failover: &Failover,
    branch: BranchId,
    key_file: Option<&Path>,
    socket: &Path,
) -> Result<String, Failure> {
    if let Some(export) = served(daemon, branch)? {
        if export.socket().is_some() {
            return Ok(export.uri);
        }
        // It tried, and could not; what was written stays.
        let (what, keep) = (branch.to_string(), true);
        ask(&daemon.socket, &Request::Close { what, keep }, LIMIT)?;
    }
    let existing = |path: &Path| std::fs::canonicalize(path).at("find the key file", path);
    let request = Request::Open(OpenRequest {
        volume: failover.volume().to_string(),
        store: Some(failover.store().path().to_owned()),
        key_file: key_file.map(existing).transpose()?,
        point: None,
        branch: Some(branch.to_string()),
        read_only: false,
        socket: socket.to_owned(),
    });
    match ask(&daemon.socket, &request, LIMIT)? {
        Answer::Export { export } => Ok(export.uri),
        _ => Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        }),
    }
}
