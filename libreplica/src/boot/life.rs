//! Waits until a guest gives its sign of life, ends, or its time is over. A connection that
//! QEMU's own network has taken says nothing of the guest: it counts once QEMU tells that
//! the guest has answered.

use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use super::agent;
use super::guest::Guest;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{Life, Verdict};

/// How often it is looked.
const STEP: Duration = Duration::from_millis(50);

/// How often a guest is asked anew that has not answered.
const AGAIN: Duration = Duration::from_secs(1);

/// How waiting ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// How.
    pub verdict: Verdict,
    /// How long the machine had run.
    pub after: Duration,
}

impl Guest {
    /// Waits for `life`, until `limit` after the start.
    ///
    /// # Errors
    /// [`ErrorKind::State`] as soon as `interrupted` says so; the system's.
    pub fn wait_for_life(
        &mut self,
        life: &Life,
        limit: Duration,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Observed> {
        let mut signs = Signs::default();
        loop {
            let after = self.started.elapsed();
            let observed = |verdict| Ok(Observed { verdict, after });
            // In this order: who says he is there, and ends, was there.
            let ended = self.ended()?;
            if self.shows(life, &mut signs) {
                return observed(Verdict::Alive);
            }
            if let Some(status) = ended {
                return observed(Verdict::Ended {
                    code: status.code(),
                });
            }
            if after >= limit {
                return observed(Verdict::Silent);
            }
            if interrupted() {
                let error = Error::new(ErrorKind::State, "wait for the machine");
                return Err(error.detail("it was told to end"));
            }
            std::thread::sleep(STEP);
        }
    }

    fn shows(&mut self, life: &Life, signs: &mut Signs) -> bool {
        match life {
            Life::Console(_) => self.console().has_found(),
            Life::Tcp(port) => signs.is_due() && signs.answers(self, *port),
            Life::Command(words) => {
                signs.is_due()
                    && agent::run(&self.agent_socket(), words, signs.number).unwrap_or(false)
            }
        }
    }
}

/// What was tried.
#[derive(Default)]
struct Signs {
    last: Option<Instant>,
    number: u32,
    /// Held open, for QEMU to tell what became of it.
    connection: Option<TcpStream>,
}

impl Signs {
    fn is_due(&mut self) -> bool {
        if self.last.is_some_and(|last| last.elapsed() < AGAIN) {
            return false;
        }
        self.last = Some(Instant::now());
        self.number += 1;
        true
    }

    /// Whether the guest has taken a connection at `port`.
    fn answers(&mut self, guest: &mut Guest, port: u16) -> bool {
        let Some(Ok(list)) = guest.qmp().map(super::qmp::Qmp::connections) else {
            return false;
        };
        let of_port = |state: &str| {
            let found = list
                .iter()
                .find(|one| one.guest_port == port && one.state == state);
            found.map(|one| one.host_port)
        };
        if self.connection.is_some() && of_port("ESTABLISHED").is_some() {
            return true;
        }
        // One that still waits for the guest is left to wait: it asks again by itself.
        if self.connection.is_none() || of_port("SYN_SENT").is_none() {
            let forward = of_port("HOST_FORWARD");
            let connect = |host| TcpStream::connect((Ipv4Addr::LOCALHOST, host)).ok();
            self.connection = forward.and_then(connect);
        }
        false
    }
}
