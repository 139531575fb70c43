//! `replica run`: the daemon. It takes its volumes up again, answers on the control
//! socket, and ends cleanly on SIGTERM or SIGINT; tracking goes on in the kernel.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use hrl_format::units::ByteLen;
use libreplica::primary::{Primary, PrimaryOptions};
use libreplica::replica::{Adopted, Exports};
use libreplica::{Error, IoContext};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Deserializer, de};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{DaemonArgs, RunArgs};
use crate::commands::failover::host;
use crate::control::server::ControlServer;
use crate::failure::Failure;
use crate::quantity::{DurationArg, parse_bytes};
use crate::requests::Served;

/// The configuration file. Every key may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    /// Executables that run before and after an application-consistent point.
    hooks_dir: Option<PathBuf>,
    /// How long one hook may take.
    #[serde(deserialize_with = "duration")]
    hook_timeout: Option<DurationArg>,
    /// How long a freeze may last.
    #[serde(deserialize_with = "duration")]
    freeze_limit: Option<DurationArg>,
    /// How much data of a volume may wait in memory to be shipped, in inline capture.
    #[serde(deserialize_with = "size")]
    buffer: Option<ByteLen>,
    /// How much that may be of all volumes together.
    #[serde(deserialize_with = "size")]
    buffers: Option<ByteLen>,
    /// What to log: error, warn, info, debug, trace.
    log: Option<String>,
}

fn duration<'de, D: Deserializer<'de>>(value: D) -> Result<Option<DurationArg>, D::Error> {
    let text = String::deserialize(value)?;
    text.parse().map(Some).map_err(de::Error::custom)
}

fn size<'de, D: Deserializer<'de>>(value: D) -> Result<Option<ByteLen>, D::Error> {
    let text = String::deserialize(value)?;
    parse_bytes(&text).map(Some).map_err(de::Error::custom)
}

/// See `buffer` and `buffers` of [`Config`].
const BUFFER: ByteLen = ByteLen::new(256 << 20);
const BUFFERS: ByteLen = ByteLen::new(1 << 30);

const DEFAULT_CONFIG: &str = "/etc/replica/replica.toml";

/// How long the daemon waits at its end for points that are being made: less than the unit
/// gives it.
const FINISH_LIMIT: Duration = Duration::from_secs(60);

pub fn run(daemon: &DaemonArgs, args: &RunArgs) -> Result<ExitCode, Failure> {
    let config = load(args.config.as_deref())?;
    start_logging(config.log.as_deref());
    // Blocked before the first thread starts, so that every thread inherits it and the
    // signal waits for us below.
    let signals = hold_signals()?;

    let primary = Primary::start(options(daemon, &config)?)?;
    let server = Arc::new(ControlServer::bind(&std::path::absolute(&daemon.socket)?)?);
    let state = std::path::absolute(&daemon.state_dir)?;
    let exports = Exports::start(&state.join("open"))?;
    let adopted = Adopted::start(&state.join("adopted"))?;
    adopted.finish(&host()?);
    let served = Arc::new(Served {
        primary: Arc::clone(&primary),
        exports,
        adopted,
    });
    let (serving, at_socket) = (Arc::clone(&server), Arc::clone(&served));
    std::thread::Builder::new()
        .name("listener".into())
        .spawn(move || serving.serve(&at_socket))
        .at("start the control thread", &daemon.socket)?;
    tracing::info!(socket = %daemon.socket.display(), "answering commands");
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let signal = signals
        .wait()
        .at("wait for a signal", Path::new("the daemon"))?;
    tracing::info!(%signal, "ending; tracking goes on in the kernel");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    server.remove_socket();
    server.finish(FINISH_LIMIT);
    served.exports.stop();
    primary.stop();
    Ok(ExitCode::SUCCESS)
}

/// Blocks what ends a program, so that it can be waited for.
///
/// # Errors
/// What the system said.
pub fn hold_signals() -> Result<SigSet, Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    let blocked = signals.thread_block();
    blocked.at("block signals", Path::new("the process"))?;
    Ok(signals)
}

/// The hidden command behind the freeze watchdog.
pub fn watchdog() -> Result<ExitCode, Failure> {
    libreplica::primary::watchdog::run()?;
    Ok(ExitCode::SUCCESS)
}

fn load(path: Option<&Path>) -> Result<Config, Failure> {
    let (path, required) = match path {
        Some(path) => (path, true),
        None => (Path::new(DEFAULT_CONFIG), false),
    };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
            return Ok(Config::default());
        }
        Err(error) => return Err(Error::io("read the configuration", error).path(path).into()),
    };
    toml::from_str(&text).map_err(|error| misconfigured(path, &text, &error))
}

/// What is wrong with the configuration, where, and in which key.
fn misconfigured(path: &Path, text: &str, error: &toml::de::Error) -> Failure {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..start).unwrap_or_default();
    let number = before.matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default();
    let key = line.split_once('=').map_or("", |(key, _)| key.trim());
    let separator = if key.is_empty() { "" } else { ": " };
    Failure::Config(format!(
        "{}: line {}: {key}{separator}{}",
        path.display(),
        number + 1,
        error.message()
    ))
}

fn options(daemon: &DaemonArgs, config: &Config) -> Result<PrimaryOptions, Failure> {
    let socket = std::path::absolute(&daemon.socket)?;
    let run_dir = socket
        .parent()
        .unwrap_or(Path::new("/run/replica"))
        .to_owned();
    Ok(PrimaryOptions {
        state_dir: std::path::absolute(&daemon.state_dir)?,
        socket_dir: run_dir.clone(),
        run_dir,
        hooks_dir: config
            .hooks_dir
            .clone()
            .unwrap_or_else(|| "/etc/replica/hooks.d".into()),
        hook_limit: config
            .hook_timeout
            .map_or(Duration::from_secs(30), |time| time.0),
        freeze_limit: config
            .freeze_limit
            .map_or(Duration::from_secs(2), |time| time.0),
        buffer: config.buffer.unwrap_or(BUFFER),
        buffers: config.buffers.unwrap_or(BUFFERS),
    })
}

/// To journald when systemd started us, else to standard error.
pub fn start_logging(level: Option<&str>) {
    let filter = EnvFilter::try_from_env("REPLICA_LOG")
        .unwrap_or_else(|_| EnvFilter::new(level.unwrap_or("info")));
    if std::env::var_os("JOURNAL_STREAM").is_some()
        && let Ok(journald) = tracing_journald::layer()
    {
        tracing_subscriber::registry()
            .with(filter)
            .with(journald)
            .init();
        return;
    }
    let plain = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(filter)
        .with(plain)
        .init();
}
