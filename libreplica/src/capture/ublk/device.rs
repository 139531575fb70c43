//! A volume's block device, from its start to its end.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::capture::inline::Entrance;
use crate::capture::ublk::host::{self, Host, block_node};
use crate::capture::ublk::profile;
use crate::capture::ublk::spec::{How, Started, State, UblkSpec, UblkStatus};
use crate::capture::ublk::transfers::{Supply, Tally};
use crate::capture::ublk::watch::{CUT_SHORT, Message, Shared, Watcher, begin, take_over};
use crate::error::{IoContext, Result};
use crate::sys::ublk::DeviceNumber;

/// A block device that is served by this process. Dropped, it is detached.
#[derive(Debug)]
pub struct UblkDevice {
    shared: Arc<Shared>,
    number: DeviceNumber,
    node: PathBuf,
    started: Started,
    watch: Mutex<Option<Watch>>,
}

#[derive(Debug)]
struct Watch {
    messages: Sender<Message>,
    thread: JoinHandle<()>,
}

impl UblkDevice {
    /// Serves the volume behind `entrance` as a block device: the one that an earlier process
    /// has left, or a new one. Returns when users can open it.
    ///
    /// A device cannot be taken over if a process died in the midst of doing so: between the
    /// first and the last of the requests that it fetches there, for less than a millisecond.
    /// (The driver of kernel 6.12 would bring the kernel down: `ublk_queue_reinit`.) Then the
    /// device is stopped, its users get errors, and there is a new one; the status says so.
    ///
    /// # Errors
    /// [`Kernel`](crate::ErrorKind::Kernel) where the kernel has no ublk, or lacks what is
    /// needed; [`Busy`](crate::ErrorKind::Busy) if another process serves the volume;
    /// [`Resized`](crate::ErrorKind::Resized) if the device that was left has another size;
    /// [`State`](crate::ErrorKind::State) if it cannot be taken over; what the kernel says.
    pub fn start(entrance: Entrance, spec: &UblkSpec) -> Result<Self> {
        let host = Arc::new(Host::open()?);
        let parameters = profile::of(entrance.disk(), entrance.geometry());
        let mark = host::mark_of(spec.volume);
        let supply = Supply {
            entrance,
            copying: spec.copying,
            tally: Arc::new(Tally::default()),
        };
        let (messages, received) = channel();
        let mut trouble = None;
        let mut left = None;
        if let Some(device) = host.find(mark) {
            host.check(device.number, parameters)?;
            let taken = take_over(&host, &supply, &device, spec.patience, &messages)?;
            left = taken.map(|crew| (device, crew, Started::TakenOver));
            if left.is_none() {
                let node = block_node(device.number);
                let what = format!("{} is stopped: {CUT_SHORT}", node.display());
                tracing::error!("{what}");
                trouble = Some(what);
                host.stop(device.number)?;
                host.delete(device.number)?;
            }
        }
        let (device, crew, started) = match left {
            Some(left) => left,
            None => {
                let device = host.add(&spec.to_add(mark, host.offered), parameters)?;
                let crew = begin(&host, &supply, &device, &messages)?;
                (device, crew, Started::Added)
            }
        };
        let number = device.number;
        let node = block_node(number);
        let status = UblkStatus {
            number,
            queues: device.queues,
            depth: device.depth,
            offered: host.offered,
            granted: device.features,
            uncopied: supply.tally.now(),
            state: State::Serving,
            failures: 0,
            trouble,
        };
        let tally = Arc::clone(&supply.tally);
        let shared = Arc::new(Shared::new(host, status, tally));
        let watcher = Watcher {
            shared: Arc::clone(&shared),
            supply,
            device,
            patience: spec.patience,
            messages: messages.clone(),
            failures: Vec::new(),
        };
        let builder = std::thread::Builder::new().name(format!("ublk{number}"));
        let thread = builder.spawn(move || watcher.run(crew, &received));
        let thread = thread.at("start a thread", &node)?;
        Ok(Self {
            shared,
            number,
            node,
            started,
            watch: Mutex::new(Some(Watch { messages, thread })),
        })
    }

    /// What users open or mount: /dev/ublkbN.
    pub fn path(&self) -> &Path {
        &self.node
    }

    /// Whether it is new, or users were waiting.
    pub const fn started(&self) -> Started {
        self.started
    }

    /// What is to be known of it now.
    pub fn status(&self) -> UblkStatus {
        UblkStatus {
            uncopied: self.shared.tally.now(),
            ..self.shared.status().clone()
        }
    }

    /// Ends the service; a second time it does nothing, but removes what was detached. Waits
    /// until every change that was begun has ended.
    ///
    /// # Errors
    /// [`TimedOut`](crate::ErrorKind::TimedOut) if the kernel did not stop the device in time,
    /// for instance as the disk behind it does not answer; what the kernel says.
    pub fn stop(&self, how: How) -> Result<()> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.leave();
        let host = &self.shared.host;
        // The threads serve on meanwhile: the kernel waits for what they have in hand.
        let stopped = match how {
            How::Detach => Ok(()),
            How::Remove => host.stop(self.number),
        };
        if let Some(Watch { messages, thread }) = watch.take() {
            let _ = messages.send(Message::Leave);
            let _ = thread.join();
        }
        if how == How::Detach {
            return Ok(());
        }
        stopped?;
        host.delete(self.number)?;
        self.shared.enter(State::Removed);
        Ok(())
    }

    /// Makes one of the threads fail, as an error in this program would: for drills.
    pub fn fail_a_thread(&self) {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watch) = &*watch {
            let _ = watch.messages.send(Message::Fail);
        }
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        let _ = self.stop(How::Detach);
    }
}
