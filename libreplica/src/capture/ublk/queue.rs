//! One queue of the device: its thread waits in one system call for whatever comes next, a
//! request of a user or the end of what the disk does, and has one lane to the disk.
//!
//! The data of requests is copied at once, by reads and writes of /dev/ublkcN: through the
//! ring the kernel would hand each copy to another thread, for the file knows no other way
//! (it has no `FMODE_NOWAIT`). What need not be copied is not: see `transfers.rs`. A request
//! that is refused so is begun again, and copied.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::capture::inline::{Cookie, Done, Errno, Event, Lane, Request, Room};
use crate::capture::ublk::buffers::Buffers;
use crate::capture::ublk::transfers::{Supply, Way};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::ublk::{
    Action, Features, IoRequest, Pages, QueueNumber, Requests, Tag, commit, data_offset, fetch,
    serve_without_reclaim,
};
use crate::sys::uring::{Ended, Handle, Operation, Part, Token, Wake, shared};

const OPERATION: &str = "serve a queue of the device";
/// The token of the sleep from which an order wakes the thread. Tags are below.
const ORDER: Token = Token(1 << 32);

/// What the threads of a device are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Order {
    Serve,
    /// End what was begun, and leave; what users have asked for besides will come again.
    Leave,
    /// Fail, as an error in this program would.
    Fail,
}

/// The order that holds, for all threads of a device.
#[derive(Debug, Default)]
pub(super) struct Orders(AtomicU8);

impl Orders {
    pub fn give(&self, order: Order) {
        self.0.store(order as u8, Ordering::Release);
    }

    fn current(&self) -> Order {
        match self.0.load(Ordering::Acquire) {
            0 => Order::Serve,
            1 => Order::Leave,
            _ => Order::Fail,
        }
    }
}

/// Why a thread has ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It was ordered to, or the volume is no longer served.
    Left,
    /// The kernel takes no more: the device is being stopped, or another of its queues failed.
    Aborted,
}

/// What a thread is posted to.
pub(super) struct Post {
    pub queue: QueueNumber,
    pub depth: u16,
    pub orders: Arc<Orders>,
    pub wake: Wake,
    /// What the device was granted.
    pub granted: Features,
    pub supply: Supply,
}

/// A request that was begun.
#[derive(Clone, Copy, Debug)]
struct InHand {
    request: IoRequest,
    way: Way,
}

/// A queue that is being served.
pub(super) struct Queue {
    post: Post,
    /// /dev/ublkcN.
    file: Arc<File>,
    lane: Lane,
    /// Which way data goes that nobody needs to see.
    way: Way,
    requests: Requests,
    buffers: Buffers,
    handle: Handle,
    waking: Handle,
    /// The request in hand, for each tag.
    in_hand: Vec<Option<InHand>>,
    count: usize,
    ending: Option<Ending>,
}

/// A lane for the calling thread, which will serve a queue, and which way data can go there.
pub(super) fn open_lane(post: &Post) -> Result<(Lane, Way)> {
    if let Err(error) = serve_without_reclaim() {
        tracing::warn!("a queue's thread is not known to serve a block device: {error}");
    }
    let Supply {
        entrance, copying, ..
    } = &post.supply;
    // Each tag has one operation at a time; and there is the sleep.
    let lane = entrance.lane(u32::from(post.depth) + 1)?;
    if !copying.is_spared_by(post.granted) {
        return Ok((lane, Way::Copied));
    }
    Ok(match lane.make_room_for_lent(post.depth) {
        Ok(()) => (lane, Way::Lent),
        // The driver then lends nothing.
        Err(error) => {
            tracing::warn!("all data is copied, for the kernel cannot do without: {error}");
            (lane, Way::Copied)
        }
    })
}

impl Queue {
    /// Takes the queue: from now on its requests come to the calling thread. Quick, for a
    /// process that dies in the midst of it leaves a device that cannot be taken over.
    pub fn take(mut lane: Lane, way: Way, file: Arc<File>, post: Post) -> Result<Self> {
        let path = || format!("/dev/ublkc*, queue {}", post.queue.0);
        let copy = file.try_clone().at(OPERATION, path())?;
        let handle = lane.add(shared(copy));
        let waking = lane.add(post.wake.file());
        lane.start(ORDER, waking, Operation::Sleep);
        let (number, depth) = (post.queue, post.depth);
        for tag in (0..depth).map(Tag) {
            lane.start(Token(u64::from(tag.0)), handle, fetch(number, tag));
        }
        // One that is refused is so at once.
        lane.poll()?;
        // None has come yet: no user is let in before all queues are served.
        let requests = Requests::map(&file, number, depth).at(OPERATION, path())?;
        let mut queue = Self {
            post,
            file,
            lane,
            way,
            requests,
            buffers: Buffers::default(),
            handle,
            waking,
            in_hand: vec![None; usize::from(depth)],
            count: 0,
            ending: None,
        };
        queue.take_events()?;
        Ok(queue)
    }

    /// Serves until there is a reason to end; what was begun has ended then.
    pub fn serve(&mut self) -> Result<Ending> {
        loop {
            if let Some(ending) = self.ending
                && self.count == 0
            {
                // What was committed last.
                self.lane.poll()?;
                return Ok(ending);
            }
            self.lane.turn()?;
            self.take_events()?;
        }
    }

    /// Ends what was begun, whatever made the thread stop serving.
    pub fn finish(&mut self) -> Result<()> {
        self.lane.finish()
    }

    fn take_events(&mut self) -> Result<()> {
        while let Some(event) = self.lane.event() {
            match event {
                Event::Front(ended) if ended.token == ORDER => self.obey(),
                Event::Front(ended) => self.arrived(&ended)?,
                Event::Done(done) => self.done(done),
                Event::Stop => self.ending = Some(Ending::Left),
            }
        }
        Ok(())
    }

    fn obey(&mut self) {
        match self.post.orders.current() {
            Order::Serve => {}
            Order::Leave => self.ending = Some(Ending::Left),
            #[allow(clippy::panic, reason = "that is what was ordered")]
            Order::Fail => panic!("ordered to fail"),
        }
        self.lane.start(ORDER, self.waking, Operation::Sleep);
    }

    fn commit(&mut self, tag: Tag, result: Result<u32, Errno>) {
        let result = result.map_err(|errno| errno.0);
        let operation = commit(self.post.queue, tag, result);
        let token = Token(u64::from(tag.0));
        self.lane.start(token, self.handle, operation);
    }

    /// A fetch has ended: with a request, or because there will be none.
    fn arrived(&mut self, ended: &Ended) -> Result<()> {
        let tag = Tag(ended.token.0 as u16);
        match &ended.result {
            Ok(_) if self.ending.is_some() => {}
            Ok(_) => {
                if let Some(request) = self.requests.get(tag) {
                    self.begin(tag, request);
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.ending.get_or_insert(Ending::Aborted);
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                let source = std::io::Error::from_raw_os_error(errno);
                let what = format!("queue {}, request {}", self.post.queue.0, tag.0);
                return Err(Error::new(ErrorKind::Io, OPERATION)
                    .detail(what)
                    .source(source));
            }
        }
        Ok(())
    }

    fn begin(&mut self, tag: Tag, request: IoRequest) {
        let without = match (self.way, request.pages) {
            (Way::Lent, Pages::Lent) => self.without_a_copy(tag, request),
            _ => None,
        };
        match without {
            Some(passed_on) => self.pass_on(tag, request, Way::Lent, passed_on),
            None => self.begin_with_a_copy(tag, request),
        }
    }

    fn begin_with_a_copy(&mut self, tag: Tag, request: IoRequest) {
        match self.translate(tag, request) {
            Ok(passed_on) => self.pass_on(tag, request, Way::Copied, passed_on),
            Err(errno) => self.commit(tag, Err(errno)),
        }
    }

    fn pass_on(&mut self, tag: Tag, request: IoRequest, way: Way, passed_on: Request) {
        if let Some(slot) = self.in_hand.get_mut(usize::from(tag.0)) {
            *slot = Some(InHand { request, way });
            self.count += 1;
            self.lane.begin(Cookie(u64::from(tag.0)), passed_on);
        }
    }

    /// The request as the lane takes it whose data nobody needs to see; `None` if somebody does.
    fn without_a_copy(&self, tag: Tag, request: IoRequest) -> Option<Request> {
        let extent = request.extent;
        match request.action {
            Action::Read => Some(Request::ReadLent {
                to: tag.lent(),
                extent,
            }),
            Action::Write(durability) => Some(Request::WriteLent {
                from: tag.lent(),
                leave: self.lane.begin_unseen()?,
                extent,
                durability,
            }),
            _ => None,
        }
    }

    /// The request as the lane takes it, with its data.
    fn translate(&mut self, tag: Tag, request: IoRequest) -> Result<Request, Errno> {
        let extent = request.extent;
        Ok(match request.action {
            Action::Read => Request::Read {
                to: self.buffer(request)?,
                extent,
            },
            Action::Write(durability) => {
                let mut from = self.buffer(request)?;
                if let Err(errno) = self.copy_in(tag, from.bytes_mut()) {
                    self.buffers.give(from.buffer);
                    return Err(errno);
                }
                Request::Write {
                    from,
                    extent,
                    durability,
                }
            }
            Action::Flush => Request::Flush,
            Action::Discard => Request::Discard { extent },
            Action::Zeroes { keep, durability } => Request::Zeroes {
                extent,
                room: if keep { Room::Kept } else { Room::MayBeFreed },
                durability,
            },
            Action::Unknown(_) => return Err(Errno(libc::EOPNOTSUPP)),
        })
    }

    fn buffer(&mut self, request: IoRequest) -> Result<Part, Errno> {
        let len = request.extent.len().get();
        // The driver was told that there are none longer.
        if len > crate::capture::ublk::profile::LONGEST.get() {
            return Err(Errno(libc::EINVAL));
        }
        let taken = self.buffers.take(len as usize);
        taken.map_err(|error| Errno::of_io(&error))
    }

    fn copy_in(&self, tag: Tag, to: &mut [u8]) -> Result<(), Errno> {
        let offset = data_offset(self.post.queue, tag);
        let read = self.file.read_exact_at(to, offset);
        read.map_err(|error| Errno::of_io(&error))
    }

    fn copy_out(&self, tag: Tag, from: &[u8]) -> Result<(), Errno> {
        let offset = data_offset(self.post.queue, tag);
        let written = self.file.write_all_at(from, offset);
        written.map_err(|error| Errno::of_io(&error))
    }

    /// What was asked of the disk has ended.
    fn done(&mut self, done: Done) {
        let tag = Tag(done.cookie.0 as u16);
        let slot = self.in_hand.get_mut(usize::from(tag.0));
        let Some(InHand { request, way }) = slot.and_then(Option::take) else {
            return;
        };
        self.count -= 1;
        if let Err(errno) = done.result
            && way.may_be_to_blame(errno)
        {
            self.post.supply.tally.add_refused();
            return self.begin_with_a_copy(tag, request);
        }
        let bytes = request.extent.len().get() as u32;
        let result = match (done.result, request.action, &done.part) {
            (Err(errno), ..) => Err(errno),
            (Ok(()), Action::Read, Some(part)) => self.copy_out(tag, part.bytes()).map(|()| bytes),
            (Ok(()), Action::Read, None) if way == Way::Lent => {
                self.post.supply.tally.add_read();
                Ok(bytes)
            }
            (Ok(()), Action::Read, None) => Err(Errno::EIO),
            (Ok(()), Action::Write(_), _) => {
                if way == Way::Lent {
                    self.post.supply.tally.add_write();
                }
                Ok(bytes)
            }
            (Ok(()), ..) => Ok(0),
        };
        if let Some(part) = done.part {
            self.buffers.give(part.buffer);
        }
        self.commit(tag, result);
    }
}
