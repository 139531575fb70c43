//! What the device does only for a thread that waits: zeroes and discards, by ioctl(2) and
//! fallocate(2). One thread a volume runs them, so that no lane stands still for one.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::capture::inline::interceptor::{Mailbox, Message};
use crate::capture::inline::request::{Durability, Room};
use crate::sys::blkdev;
use crate::units::Extent;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task {
    Zeroes(Extent, Room, Durability),
    Discard(Extent),
}

/// A task, and who is told when it is done.
#[derive(Debug)]
pub(super) struct Errand {
    pub task: Task,
    pub slot: u32,
    pub mailbox: Arc<Mailbox>,
}

/// Where lanes leave their errands.
#[derive(Clone, Debug)]
pub struct Errands(Sender<Errand>);

impl Errands {
    pub(super) fn new() -> (Self, Receiver<Errand>) {
        let (sender, receiver) = channel();
        (Self(sender), receiver)
    }

    /// Leaves one; says whether somebody is there to run it.
    pub(super) fn send(&self, errand: Errand) -> bool {
        self.0.send(errand).is_ok()
    }
}

/// Runs errands on `device` until nobody is left to send any.
pub(super) fn run(device: &File, errands: &Receiver<Errand>) {
    while let Ok(errand) = errands.recv() {
        let errno = match perform(device, errand.task) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        let slot = errand.slot;
        errand.mailbox.post(Message::Errand { slot, errno });
    }
}

fn perform(device: &File, task: Task) -> io::Result<()> {
    match task {
        Task::Discard(extent) => blkdev::discard(device, extent)?,
        Task::Zeroes(extent, room, durability) => {
            let freed = match room {
                Room::MayBeFreed => blkdev::free_zeroed(device, extent),
                Room::Kept => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            };
            match freed.map_err(|error| (error.raw_os_error(), error)) {
                Ok(()) => {}
                Err((Some(libc::EOPNOTSUPP), _)) => blkdev::write_zeroes(device, extent)?,
                Err((_, error)) => return Err(error),
            }
            if durability == Durability::Durable {
                device.sync_data()?;
            }
        }
    }
    Ok(())
}
