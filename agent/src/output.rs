//! What commands print: JSON in one line's worth of code, byte counts that people can
//! read, and a progress bar where someone is looking.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};
use libreplica::primary::SpaceSummary;
use serde::Serialize;

/// Prints `value` as JSON and a line's end.
///
/// # Errors
/// When standard output is gone.
pub fn json<T: Serialize>(value: &T) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")
}

/// `1536` as `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// What a volume takes in its store, and who keeps some of it, in a line.
pub fn space(space: &SpaceSummary) -> String {
    let mut line = format!(
        "{} in the base, {} in logs, at most {} so",
        bytes(space.base_bytes),
        bytes(space.log_bytes),
        bytes(space.bound_bytes),
    );
    for (count, what) in [
        (space.waiting_bytes, "waits to be compacted"),
        (space.retired_bytes, "waits for readers"),
    ] {
        if count > 0 {
            line.push_str(&format!("; {} {what}", bytes(count)));
        }
    }
    for holder in &space.held {
        match &holder.point {
            Some(point) => line.push_str(&format!("; point {point} is held by {}", holder.by)),
            None => line.push_str(&format!("; held by {}", holder.by)),
        }
    }
    line
}

/// A progress bar on standard error, if that is a terminal; nothing if not.
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar for something called `what`.
    pub fn start(what: &'static str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::new(0);
        let template =
            "{prefix} [{bar:32}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Self { bar: Some(bar) }
    }

    /// Whether anybody sees it.
    pub fn is_shown(&self) -> bool {
        self.bar.is_some()
    }

    /// `done` of `total` bytes.
    pub fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
