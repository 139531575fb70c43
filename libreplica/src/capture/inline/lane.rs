//! A lane: the way of one queue thread of a front to the device. It has the thread's ring,
//! which serves the front's own operations too, so that a turn of the loop costs one system
//! call however much ends in it. Reads and flushes pass straight through; changes go by way
//! of the [`Interceptor`].

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::BytesMut;

use crate::capture::inline::activity::REGION;
use crate::capture::inline::backlog::Change;
use crate::capture::inline::errands::{Errand, Errands, Task};
use crate::capture::inline::interceptor::{
    Admitted, Interceptor, Mailbox, Message, Outcome, Owner,
};
use crate::capture::inline::request::{Cookie, Done, Durability, Errno, Lent, Request, Room};
use crate::capture::inline::unseen::UnseenWrite;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::memory::AlignedMemory;
use crate::sys::uring::{Ended, Handle, LentPart, Operation, Part, Token, Uring, shared};
use crate::units::{ByteLen, ByteOffset, Extent};

/// Tokens from here on are the lane's own.
const OURS: u64 = 1 << 63;
const SLEEP: u64 = u64::MAX;
/// Zeroes and discards are passed on in pieces of this many bytes at most, one after the
/// other: each is quick, and touches few regions of the activity log. So do reads and writes,
/// which are no longer than that.
const PIECE: u64 = REQUEST_MAX.get();
/// Bytes of the longest read or write.
pub const REQUEST_MAX: ByteLen = ByteLen::new(8 * REGION.get());
/// Data is copied for the backlog into arenas of this many bytes.
const ARENA: usize = 1 << 20;

/// What a turn of the lane brought.
#[derive(Debug)]
pub enum Event {
    /// An operation of the front's own has ended.
    Front(Ended),
    /// A request has ended.
    Done(Done),
    /// The volume is no longer served: no request is taken any more.
    Stop,
}

/// What is done on the device.
#[derive(Debug)]
enum Action {
    Read,
    Write(Durability),
    Zeroes(Room, Durability),
    Discard,
    Flush,
}

/// The memory of a request.
#[derive(Debug)]
enum Memory {
    /// It needs none.
    None,
    /// This, unless an operation has it, and which part of it is the request's.
    Ours(Option<AlignedMemory>, Range<usize>),
    /// All of what was lent to the ring; a write has leave for that.
    Lent(
        Lent,
        #[expect(dead_code, reason = "held until the request is over")] Option<UnseenWrite>,
    ),
}

#[derive(Debug)]
struct Slot {
    cookie: Cookie,
    action: Action,
    extent: Extent,
    /// Bytes of it that have ended.
    done: u64,
    memory: Memory,
    /// What was let in: all of a write, a piece of zeroes or a discard.
    admitted: Option<(Admitted, Extent)>,
}

impl Slot {
    /// What is to be let in next.
    fn next_piece(&self) -> Extent {
        let start = self.extent.offset().get() + self.done;
        let len = (self.extent.end().get() - start).min(PIECE);
        Extent::between(ByteOffset::new(start), ByteOffset::new(start + len))
    }

    /// A read into what is left of the memory, or a write of it.
    fn transfer(&mut self) -> Option<Operation> {
        let at = self.extent.offset().get() + self.done;
        let durability = match self.action {
            Action::Read => None,
            Action::Write(durability) => Some(durability),
            _ => return None,
        };
        match &mut self.memory {
            Memory::None => None,
            Memory::Ours(buffer, range) => {
                let range = range.start + self.done as usize..range.end;
                let buffer = buffer.take()?;
                let part = Part { buffer, range };
                Some(match durability {
                    None => Operation::Read { to: part, at },
                    Some(durability) => Operation::Write {
                        from: part,
                        at,
                        durability,
                    },
                })
            }
            Memory::Lent(lent, _) => {
                // No request is longer than [`REQUEST_MAX`].
                let part = LentPart {
                    lent: *lent,
                    start: self.done as u32,
                    len: (self.extent.len().get() - self.done) as u32,
                };
                Some(match durability {
                    None => Operation::ReadLent { to: part, at },
                    Some(durability) => Operation::WriteLent {
                        from: part,
                        at,
                        durability,
                    },
                })
            }
        }
    }

    /// How the device has it, now that it has: all that can be said of its data. It is copied
    /// to `arena` if it must be.
    fn record(
        &self,
        interceptor: &Interceptor,
        arena: &mut BytesMut,
        end: impl FnOnce(Outcome<'_>),
    ) {
        match (&self.action, &self.memory) {
            (Action::Zeroes(..), _) => end(Outcome::Done(Change::Zeroes)),
            (Action::Discard, _) => end(Outcome::Done(Change::Discard)),
            (_, Memory::Ours(Some(buffer), range)) => {
                let mut copy = || copy(arena, &buffer.as_slice()[range.clone()]);
                // Outside of the lock that `end` takes, if it can be.
                if interceptor.wants_data() {
                    end(Outcome::Done(Change::Write(copy())));
                } else {
                    end(Outcome::Uncopied(&mut copy));
                }
            }
            _ => end(Outcome::Unseen),
        }
    }
}

/// The way of one thread to the device.
#[derive(Debug)]
pub struct Lane {
    interceptor: Arc<Interceptor>,
    errands: Errands,
    number: usize,
    mailbox: Arc<Mailbox>,
    uring: Uring,
    device: Handle,
    wake: Handle,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    events: VecDeque<Event>,
    arena: BytesMut,
    /// Nothing is begun any more.
    ends: bool,
}

impl Lane {
    /// A lane for `depth` requests, and operations of the front, at a time; to be used by
    /// the calling thread alone.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] where io_uring is not allowed.
    pub fn open(interceptor: &Arc<Interceptor>, errands: &Errands, depth: u32) -> Result<Self> {
        let path = &interceptor.path;
        let mut uring = Uring::new(depth + 1).map_err(|source| {
            Error::new(ErrorKind::Kernel, "make an io_uring")
                .source(source)
                .advice("allow io_uring: sysctl kernel.io_uring_disabled=0")
        })?;
        let file: File = interceptor.device.try_clone().at("use the device", path)?;
        let device = uring.add(shared(file));
        let (number, mailbox) = interceptor.open_lane()?;
        let wake = uring.add(mailbox.wake_file());
        uring.start(Token(SLEEP), wake, Operation::Sleep);
        Ok(Self {
            interceptor: Arc::clone(interceptor),
            errands: errands.clone(),
            number,
            mailbox,
            uring,
            device,
            wake,
            slots: Vec::new(),
            free: Vec::new(),
            events: VecDeque::new(),
            arena: BytesMut::new(),
            ends: false,
        })
    }

    /// Lets operations of the front go to `file`.
    pub fn add(&mut self, file: Arc<OwnedFd>) -> Handle {
        self.uring.add(file)
    }

    /// Starts an operation of the front's own; its token must be below 2^63.
    pub fn start(&mut self, token: Token, file: Handle, operation: Operation) {
        debug_assert!(token.0 < OURS, "the upper half is the lane's");
        self.uring.start(token, file, operation);
    }

    /// How many requests have not ended.
    pub fn requests(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Makes room for memory that a driver lends the lane's ring; once. See
    /// [`Uring::make_room_for_lent`].
    ///
    /// # Errors
    /// As there.
    pub fn make_room_for_lent(&self, count: u16) -> std::io::Result<()> {
        self.uring.make_room_for_lent(count)
    }

    /// Leave for a [`Request::WriteLent`]; `None` while the data of changes is recorded.
    pub fn begin_unseen(&self) -> Option<UnseenWrite> {
        self.interceptor.begin_unseen()
    }

    /// Takes a request. It ends as an [`Event::Done`], at the latest when the lane stops.
    pub fn begin(&mut self, cookie: Cookie, request: Request) {
        let ours = |part: Part| Memory::Ours(Some(part.buffer), part.range);
        let (action, extent, memory) = match request {
            Request::Read { to, extent } => (Action::Read, extent, ours(to)),
            Request::Write {
                from,
                extent,
                durability,
            } => (Action::Write(durability), extent, ours(from)),
            Request::ReadLent { to, extent } => (Action::Read, extent, Memory::Lent(to, None)),
            Request::WriteLent {
                from,
                leave,
                extent,
                durability,
            } => {
                let memory = Memory::Lent(from, Some(leave));
                (Action::Write(durability), extent, memory)
            }
            Request::Zeroes {
                extent,
                room,
                durability,
            } => (Action::Zeroes(room, durability), extent, Memory::None),
            Request::Discard { extent } => (Action::Discard, extent, Memory::None),
            Request::Flush => (Action::Flush, Extent::default(), Memory::None),
        };
        let is_change = !matches!(action, Action::Read | Action::Flush);
        let slot = Slot {
            cookie,
            action,
            extent,
            done: 0,
            memory,
            admitted: None,
        };
        let refusal = self.refusal(&slot);
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.slots[at as usize] = Some(slot);
        match refusal {
            Some(errno) => self.over(at, Err(errno)),
            None if is_change => self.admit(at),
            None => self.pass_on(at),
        }
    }

    /// Why a request cannot be taken.
    fn refusal(&self, slot: &Slot) -> Option<Errno> {
        let geometry = self.interceptor.geometry;
        let sector = u64::from(geometry.sector.get());
        let (start, end) = (slot.extent.offset().get(), slot.extent.end().get());
        let aligned = start.is_multiple_of(sector) && end.is_multiple_of(sector);
        let data_fits = || {
            let len = slot.extent.len().get();
            let fits = match &slot.memory {
                Memory::None => false,
                Memory::Ours(_, Range { start, end }) => {
                    (*start as u64).is_multiple_of(sector)
                        && end.saturating_sub(*start) as u64 == len
                }
                // The kernel looks.
                Memory::Lent(..) => true,
            };
            fits && len <= REQUEST_MAX.get()
        };
        match slot.action {
            Action::Flush => None,
            _ if start == end || !aligned => Some(Errno(libc::EINVAL)),
            _ if end > geometry.size.get() => Some(Errno(libc::ENOSPC)),
            Action::Read | Action::Write(_) if !data_fits() => Some(Errno(libc::EINVAL)),
            _ => None,
        }
    }

    /// Asks for leave to begin a change, or the next piece of it.
    fn admit(&mut self, at: u32) {
        if self.ends {
            return self.over(at, Err(Errno::EIO));
        }
        let Some(Some(slot)) = self.slots.get(at as usize) else {
            return;
        };
        let owner = Owner {
            lane: self.number,
            slot: at,
        };
        if let Some(admitted) = self.interceptor.admit(owner, slot.next_piece()) {
            self.begin_change(at, admitted);
        }
    }

    fn begin_change(&mut self, at: u32, admitted: Admitted) {
        if let Some(Some(slot)) = self.slots.get_mut(at as usize) {
            let piece = slot.next_piece();
            let traffic = &self.interceptor.traffic;
            match slot.action {
                Action::Write(_) | Action::Zeroes(..) => traffic.begin_write(piece.len()),
                Action::Discard => {
                    let cut = self.interceptor.geometry.cut(piece);
                    traffic.begin_discard(cut.whole.len());
                    cut.edges().for_each(|edge| traffic.begin_write(edge.len()));
                }
                Action::Read | Action::Flush => {}
            }
            slot.admitted = Some((admitted, piece));
            self.pass_on(at);
        }
    }

    /// Gives the device what is left of a request, or of the piece of it that was let in.
    fn pass_on(&mut self, at: u32) {
        let Some(Some(slot)) = self.slots.get_mut(at as usize) else {
            return;
        };
        let piece = slot.admitted.map(|(_, piece)| piece);
        let operation = match (&slot.action, piece) {
            (Action::Flush, _) => Some(Operation::Flush),
            (Action::Read, _) | (Action::Write(_), Some(_)) => slot.transfer(),
            (&Action::Zeroes(room, durability), Some(piece)) => {
                return self.send(at, Task::Zeroes(piece, room, durability));
            }
            (Action::Discard, Some(piece)) => return self.send(at, Task::Discard(piece)),
            _ => None,
        };
        match operation {
            Some(operation) => {
                self.uring
                    .start(Token(OURS | u64::from(at)), self.device, operation)
            }
            None => self.over(at, Err(Errno::EIO)),
        }
    }

    fn send(&mut self, slot: u32, task: Task) {
        let mailbox = Arc::clone(&self.mailbox);
        let errand = Errand {
            task,
            slot,
            mailbox,
        };
        if !self.errands.send(errand) {
            self.over(slot, Err(Errno::EIO));
        }
    }

    /// Tells the kernel what was started, and waits until something has happened.
    ///
    /// # Errors
    /// When the ring fails; the lane is of no use then.
    pub fn turn(&mut self) -> Result<()> {
        self.advance(1)
    }

    /// As [`Self::turn`], but does not wait.
    ///
    /// # Errors
    /// As there.
    pub fn poll(&mut self) -> Result<()> {
        self.advance(0)
    }

    fn advance(&mut self, wanted: usize) -> Result<()> {
        self.read_mail();
        let least = if self.events.is_empty() { wanted } else { 0 };
        let path = &self.interceptor.path;
        self.uring.submit(least).at("serve the device", path)?;
        while let Some(ended) = self.uring.ended() {
            match ended.token.0 {
                SLEEP => {
                    self.uring.start(Token(SLEEP), self.wake, Operation::Sleep);
                }
                ours if ours >= OURS => self.device_ended((ours - OURS) as u32, ended),
                _ => self.events.push_back(Event::Front(ended)),
            }
        }
        self.read_mail();
        Ok(())
    }

    /// Ends all requests, those that have not begun as failed, and everything else in the ring but drivers' commands; what it
    /// brings is thrown away. The lane can then be dropped by another thread.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn finish(&mut self) -> Result<()> {
        self.end_requests()?;
        let path = &self.interceptor.path;
        self.uring.finish().at("serve the device", path)
    }

    fn end_requests(&mut self) -> Result<()> {
        // One that has not begun may wait for a lane of this very thread.
        self.ends = true;
        for slot in self.interceptor.withdraw(self.number) {
            self.over(slot, Err(Errno::EIO));
        }
        // A change that never ended would hold back those behind it for ever.
        while self.requests() > 0 {
            self.turn()?;
            self.events.clear();
        }
        Ok(())
    }

    /// The next thing that the last turn brought.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn read_mail(&mut self) {
        // What is begun here may end something that sends more.
        loop {
            let mail = self.mailbox.take();
            if mail.is_empty() {
                return;
            }
            for message in mail {
                match message {
                    Message::Begin { slot, admitted } => self.begin_change(slot, admitted),
                    Message::Errand { slot, errno: 0 } => self.changed(slot),
                    Message::Errand { slot, errno } => self.refused(slot, Errno(errno)),
                    Message::Stop => self.events.push_back(Event::Stop),
                }
            }
        }
    }

    /// The device has ended a read, a write or a flush.
    fn device_ended(&mut self, at: u32, ended: Ended) {
        let Some(Some(slot)) = self.slots.get_mut(at as usize) else {
            return;
        };
        if let (Memory::Ours(buffer, _), Some(part)) = (&mut slot.memory, ended.part) {
            *buffer = Some(part.buffer);
        }
        match (ended.result, &slot.action) {
            (Err(error), _) => self.refused(at, Errno::of_io(&error)),
            (Ok(_), Action::Flush) => self.over(at, Ok(())),
            // The device ends before the request does.
            (Ok(0), _) => self.over(at, Err(Errno::EIO)),
            (Ok(bytes), action) => {
                let is_read = matches!(action, Action::Read);
                slot.done += u64::from(bytes);
                if slot.done < slot.extent.len().get() {
                    self.pass_on(at);
                } else if is_read {
                    self.over(at, Ok(()));
                } else {
                    self.changed(at);
                }
            }
        }
    }

    /// The device has refused a request. It may have been the flush that goes with it: then
    /// others are in doubt too.
    fn refused(&mut self, at: u32, errno: Errno) {
        if let Some(Some(slot)) = self.slots.get(at as usize) {
            match slot.action {
                Action::Flush
                | Action::Write(Durability::Durable)
                | Action::Zeroes(_, Durability::Durable) => {
                    let error = std::io::Error::from_raw_os_error(errno.0);
                    self.interceptor.flush_failed(&error);
                }
                _ => {}
            }
        }
        self.over(at, Err(errno));
    }

    /// The device has what was let in of a change.
    fn changed(&mut self, at: u32) {
        let Some(Some(slot)) = self.slots.get_mut(at as usize) else {
            return;
        };
        let Some((admitted, piece)) = slot.admitted.take() else {
            return;
        };
        slot.done = piece.end().get() - slot.extent.offset().get();
        let is_over = slot.done == slot.extent.len().get();
        let (interceptor, arena) = (&self.interceptor, &mut self.arena);
        let traffic = &interceptor.traffic;
        if matches!(slot.action, Action::Discard) {
            // The parts of blocks were zeroed.
            let cut = interceptor.geometry.cut(piece);
            cut.edges().for_each(|edge| traffic.end_write(edge.len()));
        } else {
            traffic.end_write(piece.len());
        }
        let number = self.number;
        slot.record(interceptor, arena, |outcome| {
            interceptor.end(number, admitted, piece, outcome);
        });
        if is_over {
            self.over(at, Ok(()));
        } else {
            self.admit(at);
        }
    }

    /// A request is over.
    fn over(&mut self, at: u32, result: Result<(), Errno>) {
        let Some(slot) = self.slots.get_mut(at as usize).and_then(Option::take) else {
            return;
        };
        self.free.push(at);
        if let Some((admitted, piece)) = slot.admitted {
            let outcome = Outcome::Failed;
            self.interceptor.end(self.number, admitted, piece, outcome);
        }
        let part = match slot.memory {
            Memory::Ours(buffer, range) => buffer.map(|buffer| Part { buffer, range }),
            Memory::Lent(..) | Memory::None => None,
        };
        self.events.push_back(Event::Done(Done {
            cookie: slot.cookie,
            result,
            part,
        }));
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.end_requests().is_ok() {
            self.interceptor.close_lane(self.number);
        }
    }
}

/// A copy of `data` for the backlog. Small ones share an arena: one allocation for many.
fn copy(arena: &mut BytesMut, data: &[u8]) -> bytes::Bytes {
    if data.len() > ARENA / 8 {
        return bytes::Bytes::copy_from_slice(data);
    }
    if arena.capacity() < data.len() {
        *arena = BytesMut::with_capacity(ARENA);
    }
    arena.extend_from_slice(data);
    arena.split().freeze()
}
