//! The agent, run as an operator runs it: `replica run` in the background with a state
//! folder and a socket of its own, the other commands beside it.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::place::{Place, until};

const BINARY: &str = env!("CARGO_BIN_EXE_replica");
/// No command of a test takes this long unless it hangs.
const HUNG_AFTER: &str = "180";

/// What a command answered.
#[derive(Debug)]
pub struct Reply {
    /// The exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    command: String,
}

impl Reply {
    /// It must have succeeded; gives what it printed, without the last line's end.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(
            self.code, 0,
            "{}: {}{}",
            self.command, self.stdout, self.stderr
        );
        self.stdout.trim_end()
    }

    /// It must have succeeded, and printed JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(self.ok()).unwrap_or_else(|error| panic!("{}: {error}", self.stdout))
    }

    /// It must have failed with `code`, and said every one of `words`.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &[&str]) {
        let said = format!("{}: {}{}", self.command, self.stdout, self.stderr);
        assert_eq!(self.code, code, "{said}");
        for word in words {
            assert!(
                self.stderr.contains(word),
                "says nothing of `{word}`: {said}"
            );
        }
        assert!(!self.stderr.contains("panicked"), "{said}");
    }
}

/// Runs `replica` with `args`, without a daemon of its own.
#[track_caller]
pub fn replica(args: &[&str]) -> Reply {
    answer(&mut command(), args)
}

fn command() -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", HUNG_AFTER, BINARY]);
    command
}

#[track_caller]
fn answer(command: &mut Command, args: &[&str]) -> Reply {
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let reply = Reply {
        code: output.status.code().unwrap_or(-1),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        command: format!("replica {}", args.join(" ")),
    };
    assert!(
        ![124, 137].contains(&reply.code),
        "hangs: {}",
        reply.command
    );
    reply
}

/// A volume as `protect` is asked for it.
#[derive(Debug)]
pub struct Volume<'a> {
    /// The device.
    pub device: &'a Path,
    /// The store's folder.
    pub store: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// More options.
    pub options: &'a [&'a str],
}

/// A running daemon; ended, with the pins of all that it protected, when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    state: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    /// What it is started by: a program that ends in running the rest of its arguments.
    within: Vec<String>,
    ids: Vec<String>,
}

impl Daemon {
    /// Starts one with state folder, socket and log in `place`, and the configuration
    /// `agent.toml` if a test has put one there; waits until it answers.
    pub fn start(place: &Place) -> Self {
        Self::start_with(
            &place.folder("state"),
            &place.at("agent.sock"),
            &place.at("agent.log"),
        )
    }

    /// Starts one with these paths; waits until it answers.
    pub fn start_with(state: &Path, socket: &Path, log: &Path) -> Self {
        let mut daemon = Self {
            child: None,
            state: state.to_owned(),
            socket: socket.to_owned(),
            log: log.to_owned(),
            within: Vec::new(),
            ids: Vec::new(),
        };
        daemon.start_again();
        daemon
    }

    /// Starts one as [`Self::start`] does, by a program that ends in running the rest of its
    /// arguments: `env`, `setpriv`, a shell in a mount namespace of its own.
    pub fn start_within(place: &Place, program: &[&str]) -> Self {
        let mut daemon = Self {
            child: None,
            state: place.folder("state"),
            socket: place.at("agent.sock"),
            log: place.at("agent.log"),
            within: program.iter().map(|&word| word.to_owned()).collect(),
            ids: Vec::new(),
        };
        daemon.start_again();
        daemon
    }

    /// Starts it after [`Self::kill`] or [`Self::terminate`].
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let mut words = self.within.iter().map(String::as_str).chain([BINARY]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("run");
        let config = self.log.with_extension("toml");
        if config.exists() {
            command.arg("--config").arg(config);
        }
        let child = command
            .env("REPLICA_STATE_DIR", &self.state)
            .env("REPLICA_SOCKET", &self.socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        until("the daemon answers", Duration::from_secs(30), || {
            if let Some(status) = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().unwrap())
            {
                panic!("the daemon ended with {status}: {}", self.log_text());
            }
            let reply = self.replica(&["status", "--json"]);
            (reply.code == 0).then_some(())
        });
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.as_ref().unwrap().id().cast_signed())
    }

    /// Its state folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// All that it has logged.
    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it with SIGKILL, without warning.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            status.signal(),
            Some(9),
            "it ended by itself: {}",
            self.log_text()
        );
    }

    /// It was killed by somebody else: waits for its end.
    pub fn died(&mut self) {
        self.child.take().unwrap().wait().unwrap();
    }

    /// Asks it to end with SIGTERM; gives its exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let mut child = self.child.take().unwrap();
        until("it ends on SIGTERM", Duration::from_secs(30), || {
            child.try_wait().unwrap()
        })
    }

    /// Runs `replica` with `args` against this daemon.
    #[track_caller]
    pub fn replica(&self, args: &[&str]) -> Reply {
        let mut command = command();
        command
            .env("REPLICA_STATE_DIR", &self.state)
            .env("REPLICA_SOCKET", &self.socket);
        answer(&mut command, args)
    }

    /// A command of `replica` against this daemon, for who has more to do with it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(args)
            .env("REPLICA_STATE_DIR", &self.state)
            .env("REPLICA_SOCKET", &self.socket)
            .stdin(Stdio::null());
        command
    }

    /// Asks for the protection of `volume`, whatever comes of it.
    #[track_caller]
    pub fn try_protect(&mut self, volume: &Volume<'_>) -> Reply {
        let mut args = vec!["protect", volume.device.to_str().unwrap()];
        args.extend([
            "--to",
            volume.store.to_str().unwrap(),
            "--name",
            volume.name,
        ]);
        args.extend(volume.options);
        let reply = self.replica(&args);
        if reply.code == 0 {
            let id = self.status(volume.name)["id"].as_str().unwrap().to_owned();
            self.ids.push(id);
        }
        reply
    }

    /// Protects `volume` and waits for its baseline; gives its id.
    #[track_caller]
    pub fn protect(&mut self, volume: &Volume<'_>) -> String {
        let options: Vec<&str> = volume.options.iter().copied().chain(["--wait"]).collect();
        self.try_protect(&Volume {
            options: &options,
            ..*volume
        })
        .ok();
        self.ids.last().unwrap().clone()
    }

    /// The status of one volume.
    #[track_caller]
    pub fn status(&self, volume: &str) -> Value {
        let all = self.replica(&["status", volume, "--json"]).json();
        assert_eq!(all["volumes"].as_array().unwrap().len(), 1, "{all}");
        all["volumes"][0].clone()
    }

    /// Waits until the status of `volume` is as `wanted` has it; gives it.
    #[track_caller]
    pub fn until(&self, what: &str, volume: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let limit = Duration::from_secs(60);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until(what, limit, || {
                last = self.status(volume);
                wanted(&last).then(|| last.clone())
            })
        }));
        found.unwrap_or_else(|_| panic!("{what}: {last}\n{}", self.log_text()))
    }

    /// Makes a point of `volume`; gives its id.
    #[track_caller]
    pub fn point(&self, volume: &str, options: &[&str]) -> String {
        let mut args = vec!["point", volume];
        args.extend(options);
        let reply = self.replica(&args);
        let id = reply.ok().to_owned();
        assert!(
            !id.is_empty() && !id.contains(char::is_whitespace),
            "an id alone: `{id}`"
        );
        id
    }

    /// Ends the protection of `volume`.
    #[track_caller]
    pub fn unprotect(&self, volume: &str) {
        self.replica(&["unprotect", volume]).ok();
    }

    /// Nothing was lost and nothing had to be compared: no resync, no widening.
    #[track_caller]
    pub fn assert_no_resync(&self, volume: &str) {
        let status = self.status(volume);
        assert_eq!(
            status["counters"]["resyncs"],
            0,
            "{status}\n{}",
            self.log_text()
        );
        assert!(status["last_resync"].is_null(), "{status}");
        assert_eq!(status["counters"]["widened"], 0, "{status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log_text();
            let start = log.len().saturating_sub(4000);
            eprintln!(
                "the daemon's log ends:\n{}",
                log.get(start..).unwrap_or(&log)
            );
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let Ok(pins) = fs::read_dir("/sys/fs/bpf/replica") else {
            return;
        };
        for pin in pins.flatten() {
            let name = pin.file_name().to_string_lossy().into_owned();
            if self.ids.iter().any(|id| name.starts_with(id.as_str())) {
                let _ = fs::remove_dir_all(pin.path());
            }
        }
    }
}
