//! One client in the transmission phase: one thread, one lane, one turn of the loop for
//! whatever came of the socket and of the device meanwhile. Requests are begun in the order
//! in which they came, and answered in that in which they end.
//!
//! The thread ends only when every change that it has begun has ended on the device, however
//! the client goes. A client that sends faster than the device writes, or does not take its
//! replies, is not received from until it is past. Block status is asked of the clerk, and
//! answered when he knows.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::capture::inline::{Cookie, Done, Durability, Errno, Event, Lane, Request};
use crate::capture::nbd::clerk::{Answer, Clerk, Desk, Query};
use crate::capture::nbd::contexts::Context;
use crate::capture::nbd::handshake::{Export, Replies, Session};
use crate::capture::nbd::inbox::{Inbox, Step};
use crate::capture::nbd::memory::{Allowance, HEADROOM, Pool};
use crate::capture::nbd::outbox::Outbox;
use crate::capture::nbd::replies::{self, Place};
use crate::capture::nbd::requests::{Header, Tag, Task};
use crate::error::{IoContext, Result};
use crate::sys::uring::{Ended, Handle, Operation, Part, Token};
use crate::units::Extent;

/// Operations that the ring takes at a time.
const DEPTH: u32 = 255;
/// Requests that are under way at a time; the rest is for the socket.
const REQUESTS_MAX: usize = 250;
/// Requests for block status that wait at a time: their answers are long.
const ASKED_MAX: usize = 16;
/// No request is begun while so many bytes of replies wait.
const UNSENT_MAX: usize = 1 << 20;
/// Data that is read is copied behind its header up to this length, and else sent as it is.
const GATHER_MAX: usize = 16 << 10;

const RECEIVE: Token = Token(1);
const SEND: Token = Token(2);
const ANSWERED: Token = Token(3);

/// What connections of one server share.
pub(super) struct Common {
    pub export: Export,
    pub clerk: Clerk,
    pub allowance: Arc<Allowance>,
}

/// Why no request is taken any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// All is answered first, but what the clerk does not know yet: he may never.
    Orderly,
    /// Nobody is there to be answered.
    Gone,
    /// The volume is no longer served: what can be answered at once is.
    Stopped,
}

/// A request that is under way.
#[derive(Clone, Copy, Debug)]
struct Pending {
    tag: Tag,
    task: Task,
}

pub(super) struct Connection<'a> {
    common: &'a Common,
    session: Session,
    contexts: Arc<[Context]>,
    stream: &'a UnixStream,
    lane: Lane,
    socket: Handle,
    inbox: Inbox,
    outbox: Outbox,
    pool: Pool,
    pending: Vec<Pending>,
    free: Vec<u32>,
    /// Where the clerk puts his answers, once he was asked.
    desk: Option<(Arc<Desk>, Handle)>,
    asked: usize,
    receiving: bool,
    wants: bool,
    end: Option<End>,
    scratch: Vec<u8>,
}

/// How deep a connection's lane is.
pub(super) const fn depth() -> u32 {
    DEPTH
}

impl<'a> Connection<'a> {
    /// Serves `stream`, from which `first` was read already.
    ///
    /// # Errors
    /// If there is no memory, or no descriptor.
    pub fn new(
        common: &'a Common,
        session: Session,
        stream: &'a UnixStream,
        first: &[u8],
        mut lane: Lane,
    ) -> Result<Self> {
        let serve = "serve an NBD client";
        let socket = stream.try_clone().at(serve, "")?;
        let socket = lane.add(Arc::new(socket.into()));
        Ok(Self {
            common,
            contexts: session.contexts.as_slice().into(),
            session,
            stream,
            lane,
            socket,
            inbox: Inbox::new(first).at(serve, "")?,
            outbox: Outbox::default(),
            pool: Pool::new(&common.allowance),
            pending: Vec::new(),
            free: Vec::new(),
            desk: None,
            asked: 0,
            receiving: false,
            wants: false,
            end: None,
            scratch: Vec::new(),
        })
    }

    /// Runs until the client ends, or the volume's service.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn run(&mut self) -> Result<()> {
        loop {
            self.take_requests();
            self.receive();
            self.send();
            if self.is_over() {
                return Ok(());
            }
            self.lane.turn()?;
            while let Some(event) = self.lane.event() {
                match event {
                    Event::Done(done) => self.done(done),
                    Event::Front(ended) if ended.token == RECEIVE => self.received(ended),
                    Event::Front(ended) if ended.token == ANSWERED => self.answered(),
                    Event::Front(ended) => self.sent(ended),
                    Event::Stop => self.finish(End::Stopped),
                }
            }
        }
    }

    fn is_over(&mut self) -> bool {
        let Some(end) = self.end else { return false };
        if self.lane.requests() > 0 {
            return false;
        }
        if end != End::Orderly && !self.outbox.is_empty() {
            // Whoever does not take his replies does not hold the service up.
            self.outbox.give_up(&mut self.pool);
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        self.outbox.is_empty() && !self.receiving
    }

    /// Takes no request any more.
    fn finish(&mut self, end: End) {
        // Once it is cut short it stays so: the end of the receive that is ended here would
        // else make it wait for a client that takes no replies.
        let cut_short = matches!(self.end, Some(End::Stopped | End::Gone));
        if !cut_short || end == End::Gone {
            self.end = Some(end);
        }
        // Ends the receive that is under way.
        let how = if end == End::Gone {
            Shutdown::Both
        } else {
            Shutdown::Read
        };
        let _ = self.stream.shutdown(how);
    }

    fn receive(&mut self) {
        if self.wants
            && self.end.is_none()
            && let Some(to) = self.inbox.receive()
        {
            self.wants = false;
            self.receiving = true;
            let operation = Operation::Receive { to };
            self.lane.start(RECEIVE, self.socket, operation);
        }
    }

    fn received(&mut self, ended: Ended) {
        self.receiving = false;
        let bytes = ended.result.unwrap_or(0);
        if let Some(part) = ended.part {
            self.inbox.received(part, bytes as usize);
        }
        if bytes == 0 {
            // Its end, in the middle of a request or not.
            self.finish(End::Orderly);
        }
    }

    fn send(&mut self) {
        if let Some(from) = self.outbox.next() {
            self.lane.start(SEND, self.socket, Operation::Send { from });
        }
    }

    fn sent(&mut self, ended: Ended) {
        let Some(part) = ended.part else { return };
        let whole = ended
            .result
            .is_ok_and(|bytes| bytes as usize == part.range.len());
        self.outbox.sent(part, &mut self.pool);
        if !whole {
            self.finish(End::Gone);
            self.outbox.give_up(&mut self.pool);
        }
    }

    /// Begins what has come, as far as there is room.
    fn take_requests(&mut self) {
        while self.end.is_none()
            && !self.receiving
            && self.lane.requests() < REQUESTS_MAX
            && self.asked < ASKED_MAX
            && self.outbox.waiting() < UNSENT_MAX
        {
            match self.inbox.next(&mut self.pool) {
                Ok(Step::Request(header, part)) => self.take(&header, part),
                Ok(Step::Wants) => {
                    self.wants = true;
                    return;
                }
                Ok(Step::Full) => return,
                Err(violation) => {
                    tracing::debug!(%violation, "an NBD client is sent away");
                    self.finish(End::Orderly);
                }
            }
        }
    }

    fn take(&mut self, header: &Header, part: Option<Part>) {
        let tag = header.tag;
        let task = Task::of(header, &self.session, &self.common.export);
        let request = match (task, part) {
            (Ok(task @ Task::Read(extent)), Some(to)) => (task, Request::Read { to, extent }),
            (Ok(task @ Task::Write(extent, durability)), Some(from)) => {
                let request = Request::Write {
                    from,
                    extent,
                    durability,
                };
                (task, request)
            }
            (Ok(task @ Task::Zeroes(extent, room, durability)), _) => {
                let request = Request::Zeroes {
                    extent,
                    room,
                    durability,
                };
                (task, request)
            }
            (Ok(task @ Task::Discard(extent, _)), _) => (task, Request::Discard { extent }),
            (Ok(task @ Task::Flush), _) => (task, Request::Flush),
            (Ok(Task::Disconnect), _) => return self.finish(End::Orderly),
            (Ok(Task::Status(extent, many)), _) => {
                let contexts = Arc::clone(&self.contexts);
                return self.ask(Query {
                    tag,
                    contexts,
                    extent,
                    many,
                });
            }
            (Ok(Task::Nothing), _) => return self.answer(&replies::simple(tag, Ok(()))),
            (Ok(Task::Read(_) | Task::Write(..)), None) => {
                return self.refuse(header, Errno(libc::EINVAL));
            }
            (Err(errno), part) => {
                if let Some(part) = part {
                    self.pool.give(part.buffer);
                }
                return self.refuse(header, errno);
            }
        };
        self.begin(tag, request);
    }

    fn begin(&mut self, tag: Tag, (task, request): (Task, Request)) {
        let pending = Pending { tag, task };
        let at = match self.free.pop() {
            Some(at) => {
                self.pending[at as usize] = pending;
                at
            }
            None => {
                self.pending.push(pending);
                (self.pending.len() - 1) as u32
            }
        };
        self.lane.begin(Cookie(u64::from(at)), request);
    }

    /// A request has ended on the device.
    fn done(&mut self, done: Done) {
        let at = done.cookie.0 as usize;
        let Some(Pending { tag, task }) = self.pending.get(at).copied() else {
            return;
        };
        if let (Task::Discard(_, Durability::Durable), Ok(())) = (task, done.result) {
            // A discard has no durability of its own.
            self.pending[at].task = Task::Flush;
            return self.lane.begin(done.cookie, Request::Flush);
        }
        self.free.push(at as u32);
        match (task, done.part) {
            (Task::Read(extent), Some(part)) => self.read(tag, extent, done.result, part),
            (_, part) => {
                if let Some(part) = part {
                    self.pool.give(part.buffer);
                }
                self.answer(&replies::simple(tag, done.result));
            }
        }
    }

    /// Answers a read.
    fn read(
        &mut self,
        tag: Tag,
        extent: Extent,
        result: std::result::Result<(), Errno>,
        mut part: Part,
    ) {
        let structured = self.session.replies == Replies::Structured;
        let (simple, piece);
        let header: &[u8] = match result {
            Err(errno) => {
                self.pool.give(part.buffer);
                return self.answer_error(tag, errno);
            }
            Ok(()) if structured => {
                piece = replies::data(tag, extent.offset(), part.range.len() as u32);
                &piece
            }
            Ok(()) => {
                simple = replies::simple(tag, Ok(()));
                &simple
            }
        };
        if part.range.len() <= GATHER_MAX {
            let put = self.outbox.put(&[header, part.bytes()]);
            self.pool.give(part.buffer);
            return self.check(put);
        }
        let start = HEADROOM - header.len();
        part.buffer.as_mut_slice()[start..HEADROOM].copy_from_slice(header);
        part.range.start = start;
        self.outbox.put_whole(part);
    }

    /// Answers that a request was not even begun.
    fn refuse(&mut self, header: &Header, errno: Errno) {
        use crate::capture::nbd::wire::command;
        match header.command {
            command::READ | command::BLOCK_STATUS => self.answer_error(header.tag, errno),
            command::DISC => self.finish(End::Orderly),
            _ => self.answer(&replies::simple(header.tag, Err(errno))),
        }
    }

    fn answer_error(&mut self, tag: Tag, errno: Errno) {
        match self.session.replies {
            Replies::Simple => self.answer(&replies::simple(tag, Err(errno))),
            Replies::Structured => self.answer(&replies::error(tag, errno)),
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        let put = self.outbox.put(&[bytes]);
        self.check(put);
    }

    /// Without memory for a reply there is no use in the client.
    fn check(&mut self, put: std::io::Result<()>) {
        if let Err(error) = put {
            tracing::warn!(%error, "an NBD client cannot be answered");
            self.finish(End::Gone);
        }
    }

    /// Answers a request for block status, or has the clerk find what to say.
    fn ask(&mut self, query: Query) {
        if let Some(answer) = query.at_once() {
            return self.tell_status(&answer);
        }
        let tag = query.tag;
        match self.desk() {
            Ok(desk) if self.common.clerk.ask(query, &desk) => self.asked += 1,
            Ok(_) => self.answer_error(tag, Errno::EIO),
            Err(error) => self.answer_error(tag, Errno::of_io(&error)),
        }
    }

    fn desk(&mut self) -> std::io::Result<Arc<Desk>> {
        if let Some((desk, _)) = &self.desk {
            return Ok(Arc::clone(desk));
        }
        let desk = Arc::new(Desk::new()?);
        let wake = self.lane.add(desk.wake_file());
        self.lane.start(ANSWERED, wake, Operation::Sleep);
        self.desk = Some((Arc::clone(&desk), wake));
        Ok(desk)
    }

    /// The clerk has put something on the desk.
    fn answered(&mut self) {
        let Some((desk, wake)) = &self.desk else {
            return;
        };
        let answers = desk.take();
        self.lane.start(ANSWERED, *wake, Operation::Sleep);
        self.asked -= answers.len();
        for answer in &answers {
            self.tell_status(answer);
        }
    }

    /// Answers what the contexts say about a range.
    fn tell_status(&mut self, answer: &Answer) {
        let tag = answer.tag;
        let found = match &answer.found {
            Ok(found) => found,
            Err(errno) => return self.answer_error(tag, *errno),
        };
        let last = found.len().saturating_sub(1);
        for (number, stretches) in found.iter().enumerate() {
            let place = if number == last {
                Place::Last
            } else {
                Place::Before
            };
            self.scratch.clear();
            let list = stretches.list();
            replies::status(&mut self.scratch, tag, number as u32, place, list);
            let put = self.outbox.put(&[&self.scratch]);
            self.check(put);
        }
    }
}
