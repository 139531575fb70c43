//! The thread that watches over those who serve a device. When one of them fails, all end,
//! and the device is taken over anew, as after the death of the process: one way back for
//! everything. When that is of no use the device is stopped, and its users get errors; they
//! never wait for nobody.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::capture::ublk::crew::{Crew, Report};
use crate::capture::ublk::host::{Host, block_node};
use crate::capture::ublk::queue::Ending;
use crate::capture::ublk::spec::{State, UblkStatus};
use crate::capture::ublk::transfers::{Supply, Tally};
use crate::error::Result;
use crate::sys::ublk::{Device, DeviceState, Remains};

/// So many times in [`FAILURES_WITHIN`] the device is taken over after a failure, and then no
/// more.
const FAILURES_MAX: usize = 5;
const FAILURES_WITHIN: Duration = Duration::from_secs(60);

/// Why a device cannot be taken over.
pub(super) const CUT_SHORT: &str = "a process died in the midst of taking the device over";

/// What the watcher is told.
#[derive(Debug)]
pub(super) enum Message {
    Ended(Report),
    Leave,
    Fail,
}

impl From<Report> for Message {
    fn from(report: Report) -> Self {
        Self::Ended(report)
    }
}

/// What the watcher and the device's owner share.
#[derive(Debug)]
pub(super) struct Shared {
    pub host: Arc<Host>,
    pub tally: Arc<Tally>,
    status: Mutex<UblkStatus>,
    /// What ends now does so because we want it.
    leaving: AtomicBool,
}

impl Shared {
    pub fn new(host: Arc<Host>, status: UblkStatus, tally: Arc<Tally>) -> Self {
        Self {
            host,
            tally,
            status: Mutex::new(status),
            leaving: AtomicBool::new(false),
        }
    }

    pub fn status(&self) -> MutexGuard<'_, UblkStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(&self, state: State) {
        self.status().state = state;
    }

    /// From now on, what ends does so because we want it.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}

/// Serves a new device and shows it.
pub(super) fn begin(
    host: &Arc<Host>,
    supply: &Supply,
    device: &Device,
    messages: &Sender<Message>,
) -> Result<Crew> {
    let number = device.number;
    let begun = Crew::call(host, supply, device, messages).and_then(|crew| {
        crew.serve(host.open_queues(number)?)?;
        host.launch(device).inspect_err(|_| {
            // With its crew: the kernel waits for what that has in hand.
            let _ = host.stop(number);
        })?;
        Ok(crew)
    });
    begun.inspect_err(|_| {
        let _ = host.delete(number);
    })
}

/// Serves a device that has lost its server; `None` if that is not possible any more.
pub(super) fn take_over(
    host: &Arc<Host>,
    supply: &Supply,
    device: &Device,
    patience: Duration,
    messages: &Sender<Message>,
) -> Result<Option<Crew>> {
    let number = device.number;
    let crew = Crew::call(host, supply, device, messages)?;
    match host.inspect(device, patience)? {
        Remains::Served => host.begin_recovery(number, patience)?,
        // It was begun.
        Remains::Bare => {}
        Remains::Broken => return Ok(None),
    }
    crew.serve(host.open_queues(number)?)?;
    host.end_recovery(number)?;
    Ok(Some(crew))
}

/// The thread that watches over the crew.
pub(super) struct Watcher {
    pub shared: Arc<Shared>,
    pub supply: Supply,
    pub device: Device,
    pub patience: Duration,
    pub messages: Sender<Message>,
    /// When threads failed, lately.
    pub failures: Vec<Instant>,
}

impl Watcher {
    /// Runs until the service ends.
    pub fn run(mut self, crew: Crew, received: &Receiver<Message>) {
        let mut crew = crew;
        // Never without a sender: it is one itself.
        while let Ok(message) = received.recv() {
            let report = match message {
                Message::Fail => {
                    crew.fail_one();
                    continue;
                }
                Message::Leave => None,
                Message::Ended(Report(report)) => Some(report),
            };
            // Whatever it is: all end, or none.
            crew.dismiss();
            let next = self.next(report, received);
            match next {
                Some(next) => crew = next,
                None => return,
            }
        }
    }

    /// What comes after the crew has ended: another one, or nothing.
    fn next(
        &mut self,
        report: Option<Result<Ending, String>>,
        received: &Receiver<Message>,
    ) -> Option<Crew> {
        let mut first = report;
        // The others' reports: a failure among them is the reason.
        while let Ok(message) = received.try_recv() {
            if let Message::Ended(Report(report @ Err(_))) = message {
                first = Some(report);
            }
        }
        match first {
            _ if self.shared.is_leaving() => self.end(State::Waiting, None),
            None | Some(Ok(Ending::Left)) => self.end(State::Waiting, None),
            Some(Ok(Ending::Aborted)) => {
                let now = self.shared.host.look(self.device.number);
                if now.is_none_or(|device| device.state == DeviceState::Dead) {
                    let trouble = "somebody else has stopped the device";
                    return self.end(State::Stopped, Some(trouble.into()));
                }
                self.recover("the kernel has taken the device from us")
            }
            Some(Err(trouble)) => self.recover(&trouble),
        }
    }

    fn end(&self, state: State, trouble: Option<String>) -> Option<Crew> {
        let mut status = self.shared.status();
        status.state = state;
        if let Some(trouble) = trouble {
            tracing::error!("{}: {trouble}", block_node(self.device.number).display());
            status.trouble = Some(trouble);
        }
        None
    }

    fn recover(&mut self, trouble: &str) -> Option<Crew> {
        let node = block_node(self.device.number);
        tracing::error!("{}: {trouble}: taking it over anew", node.display());
        {
            let mut status = self.shared.status();
            status.failures += 1;
            status.state = State::TakingOver;
            status.trouble = Some(trouble.to_owned());
        }
        let now = Instant::now();
        self.failures
            .retain(|then| now.duration_since(*then) < FAILURES_WITHIN);
        self.failures.push(now);
        if self.failures.len() > FAILURES_MAX {
            return self.give_up(format!("failed too often: {trouble}"));
        }
        let (host, device) = (&self.shared.host, &self.device);
        let taken = take_over(host, &self.supply, device, self.patience, &self.messages);
        match taken {
            Ok(Some(crew)) => {
                self.shared.enter(State::Serving);
                Some(crew)
            }
            Ok(None) => self.give_up(format!("{trouble}; {CUT_SHORT}")),
            Err(_) if self.shared.is_leaving() => self.end(State::Waiting, None),
            Err(error) => self.give_up(format!("{trouble}; {error}")),
        }
    }

    fn give_up(&self, trouble: String) -> Option<Crew> {
        let trouble = match self.shared.host.stop(self.device.number) {
            Ok(()) => trouble,
            Err(error) => format!("{trouble}; {error}"),
        };
        self.end(State::Stopped, Some(trouble))
    }
}
