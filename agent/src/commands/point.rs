//! `replica point`: makes a recovery point now. Its id alone goes to standard output, so
//! that a script can keep it.

use std::process::ExitCode;
use std::time::Duration;

use hrl_format::record::Consistency;

use crate::cli::{DaemonArgs, PointArgs};
use crate::control::client::ask;
use crate::control::protocol::{Answer, PointRequest, Request};
use crate::failure::Failure;
use crate::output;

/// The daemon keeps the limit; the client waits a little longer for its word.
const GRACE: Duration = Duration::from_secs(2);

pub fn run(daemon: &DaemonArgs, args: PointArgs) -> Result<ExitCode, Failure> {
    let limit = args.timeout.0;
    let request = Request::Point(PointRequest {
        volume: args.volume,
        consistency: args
            .consistency
            .map(|least| Consistency::from(least).as_str().to_owned()),
        label: args.label,
        timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    });
    let answer = ask(&daemon.socket, &request, Some(limit + GRACE))?;
    let Answer::Point { point } = answer else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    if args.json {
        output::json(&point)?;
    } else {
        println!("{}", point.id);
    }
    Ok(ExitCode::SUCCESS)
}
