//! What the device does only for a thread that waits: zeroes and discards, by ioctl(2) and
//! fallocate(2). One thread a volume runs them, so that no lane stands still for one.
//!
//! Whoever discards does not care what is read there afterwards, but the image has zeroes, and
//! only whole blocks are known as discarded: so of a discard the parts of blocks are zeroed, and
//! nothing has to be read back to know what they hold.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::capture::inline::interceptor::{Mailbox, Message};
use crate::capture::inline::request::{Durability, Room};
use crate::geometry::Geometry;
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
pub(super) fn run(device: &File, geometry: &Geometry, errands: &Receiver<Errand>) {
    while let Ok(errand) = errands.recv() {
        let errno = match perform(device, geometry, errand.task) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        let slot = errand.slot;
        errand.mailbox.post(Message::Errand { slot, errno });
    }
}

fn perform(device: &File, geometry: &Geometry, task: Task) -> io::Result<()> {
    match task {
        Task::Discard(extent) => {
            let cut = geometry.cut(extent);
            if !cut.whole.is_empty() {
                blkdev::discard(device, cut.whole)?;
            }
            cut.edges()
                .try_for_each(|edge| zero(device, edge, Room::MayBeFreed))?;
        }
        Task::Zeroes(extent, room, durability) => {
            zero(device, extent, room)?;
            if durability == Durability::Durable {
                device.sync_data()?;
            }
        }
    }
    Ok(())
}

fn zero(device: &File, extent: Extent, room: Room) -> io::Result<()> {
    let freed = match room {
        Room::MayBeFreed => blkdev::free_zeroed(device, extent),
        Room::Kept => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    };
    match freed {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            blkdev::write_zeroes(device, extent)
        }
        done => done,
    }
}
