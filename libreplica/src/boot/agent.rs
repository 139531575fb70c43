//! The QEMU guest agent: runs a program in the guest, and tells how it ended.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::json_lines::JsonLines;

/// The agent answers at once, or is not there yet.
const LIMIT: Duration = Duration::from_secs(5);

/// How long a program may run.
const PROGRAM: Duration = Duration::from_secs(60);

/// Runs a program in the guest: whether it ended with 0.
///
/// # Errors
/// When the agent does not answer, or cannot start the program.
pub(super) fn run(socket: &Path, words: &[String], number: u32) -> io::Result<bool> {
    let mut lines = JsonLines::connect(socket)?;
    // The agent may have part of an earlier command; and we an earlier answer.
    lines.send(&json!({"execute": "guest-sync", "arguments": {"id": number}}))?;
    lines.receive(LIMIT, |value| {
        (value.get("return")?.as_u64()? == u64::from(number)).then_some(())
    })?;
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let start = json!({
        "execute": "guest-exec",
        "arguments": {"path": program, "arg": arguments},
    });
    let pid = ask(&mut lines, &start)?.get("pid").cloned();
    let pid = pid.ok_or(io::ErrorKind::InvalidData)?;
    let status = json!({"execute": "guest-exec-status", "arguments": {"pid": pid}});
    let end = std::time::Instant::now() + PROGRAM;
    while std::time::Instant::now() < end {
        let told = ask(&mut lines, &status)?;
        if told.get("exited") == Some(&Value::Bool(true)) {
            return Ok(told.get("exitcode").and_then(Value::as_i64) == Some(0));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn ask(lines: &mut JsonLines, command: &Value) -> io::Result<Value> {
    lines.send(command)?;
    lines.receive(LIMIT, |value| match value.get("error") {
        Some(error) => Some(Err(io::Error::other(error.to_string()))),
        None => value.get("return").cloned().map(Ok),
    })?
}
