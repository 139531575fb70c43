//! One client of an opened state. One thread receives requests, and hands them to a few that
//! read, write and answer, started as they are needed: so many requests of one client go on
//! side by side. Whatever a client sends is bounded: requests under way, the memory of their
//! data, and the replies, for who does not take his is not received from.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use super::opened::Opened;
use super::status;
use crate::capture::inline::{Durability, Errno};
use crate::capture::nbd::handshake::{Export, Replies, Session};
use crate::capture::nbd::inbox::{Inbox, Step};
use crate::capture::nbd::replies::{self, Place};
use crate::capture::nbd::requests::{Header, Tag, Task};
use crate::capture::nbd::wire::command;
use crate::capture::nbd::{Allowance, Pool};
use crate::error::{Error, IoContext, Result};
use crate::sys::uring::Part;

/// Requests of one client that are under way or wait.
const REQUESTS_MAX: usize = 64;
/// Threads that do them.
const THREADS_MAX: usize = 4;

/// A client and what it has asked for.
pub(super) struct Line<'a> {
    opened: &'a Opened,
    export: &'a Export,
    session: Session,
    stream: &'a UnixStream,
    pool: Mutex<Pool>,
    desk: Mutex<Desk>,
    /// There is something to do, or nothing more will come.
    work: Condvar,
    /// Something was done, and its memory given back.
    room: Condvar,
    /// Held while a reply is sent.
    sending: Mutex<()>,
}

#[derive(Default)]
struct Desk {
    jobs: VecDeque<Job>,
    /// Jobs that were begun and not answered.
    under_way: usize,
    threads: usize,
    idle: usize,
    /// How many jobs were ever done.
    done: u64,
    ended: bool,
}

struct Job {
    tag: Tag,
    task: Task,
    part: Option<Part>,
}

/// Whether the client is still there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    There,
    Gone,
}

// Nothing that panics is done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Line<'a> {
    pub(super) fn new(
        opened: &'a Opened,
        export: &'a Export,
        session: Session,
        stream: &'a UnixStream,
        allowance: &Arc<Allowance>,
    ) -> Self {
        Self {
            opened,
            export,
            session,
            stream,
            pool: Mutex::new(Pool::new(allowance)),
            desk: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            sending: Mutex::new(()),
        }
    }

    /// Serves the client until it ends; `first` was read already.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn run(&self, first: &[u8]) -> Result<()> {
        let mut inbox = Inbox::new(first).at("serve an NBD client", "")?;
        std::thread::scope(|scope| {
            self.receive(scope, &mut inbox);
            lock(&self.desk).ended = true;
            self.work.notify_all();
        });
        Ok(())
    }

    /// Receives until the client ends.
    fn receive<'s>(&'s self, scope: &'s Scope<'s, '_>, inbox: &mut Inbox) {
        loop {
            let done = lock(&self.desk).done;
            let step = inbox.next(&mut lock(&self.pool));
            let client = match step {
                Ok(Step::Request(header, part)) => self.take(scope, &header, part),
                Ok(Step::Wants) => self.hear(inbox),
                Ok(Step::Full) => {
                    self.wait_behind(done);
                    Client::There
                }
                Err(violation) => {
                    tracing::debug!(%violation, "an NBD client is sent away");
                    Client::Gone
                }
            };
            if client == Client::Gone {
                return;
            }
        }
    }

    fn hear(&self, inbox: &mut Inbox) -> Client {
        let Some(mut part) = inbox.receive() else {
            return Client::Gone;
        };
        let mut stream = self.stream;
        loop {
            match stream.read(part.bytes_mut()) {
                Ok(0) => return Client::Gone,
                Ok(count) => {
                    inbox.received(part, count);
                    return Client::There;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Client::Gone,
            }
        }
    }

    /// Waits until more than `done` jobs are, if any are under way.
    fn wait_behind(&self, done: u64) {
        let mut desk = lock(&self.desk);
        while desk.done == done && desk.under_way + desk.jobs.len() > 0 {
            desk = self.room.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take<'s>(&'s self, scope: &'s Scope<'s, '_>, header: &Header, part: Option<Part>) -> Client {
        let tag = header.tag;
        match Task::of(header, &self.session, self.export) {
            Ok(Task::Disconnect) => Client::Gone,
            Ok(Task::Nothing) => self.answer(&[&replies::simple(tag, Ok(()))]),
            Ok(task) => {
                self.hand_over(scope, Job { tag, task, part });
                Client::There
            }
            Err(errno) => {
                self.give_back(part);
                match header.command {
                    command::READ | command::BLOCK_STATUS => self.answer_error(tag, errno),
                    command::DISC => Client::Gone,
                    _ => self.answer(&[&replies::simple(tag, Err(errno))]),
                }
            }
        }
    }

    fn hand_over<'s>(&'s self, scope: &'s Scope<'s, '_>, job: Job) {
        let mut desk = lock(&self.desk);
        while desk.under_way + desk.jobs.len() >= REQUESTS_MAX {
            desk = self.room.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
        desk.jobs.push_back(job);
        if desk.idle >= desk.jobs.len() || desk.threads >= THREADS_MAX {
            drop(desk);
            self.work.notify_one();
            return;
        }
        desk.threads += 1;
        let alone = desk.threads == 1;
        drop(desk);
        let builder = std::thread::Builder::new().name("nbd-work".into());
        if let Err(error) = builder.spawn_scoped(scope, || self.work()) {
            lock(&self.desk).threads -= 1;
            if alone {
                // Nobody would ever do it.
                tracing::warn!(%error, "no thread for an NBD client");
                let _ = self.stream.shutdown(Shutdown::Both);
            }
        }
    }

    /// Does jobs until no more come.
    fn work(&self) {
        let mut desk = lock(&self.desk);
        loop {
            let Some(job) = desk.jobs.pop_front() else {
                if desk.ended {
                    return;
                }
                desk.idle += 1;
                desk = self.work.wait(desk).unwrap_or_else(PoisonError::into_inner);
                desk.idle -= 1;
                continue;
            };
            desk.under_way += 1;
            drop(desk);
            self.perform(job);
            desk = lock(&self.desk);
            desk.under_way -= 1;
            desk.done += 1;
            self.room.notify_one();
        }
    }

    fn perform(&self, mut job: Job) {
        let tag = job.tag;
        let client = match (job.task, &mut job.part) {
            (Task::Read(extent), Some(part)) => {
                match self.opened.read_at(extent.offset(), part.bytes_mut()) {
                    Ok(()) => self.answer_read(tag, extent.offset(), part.bytes()),
                    Err(error) => self.answer_error(tag, number_of(&error)),
                }
            }
            (Task::Status(extent, many), _) => match status::stretches(self.opened, extent, many) {
                Ok(stretches) => self.answer_status(tag, &stretches),
                Err(error) => self.answer_error(tag, number_of(&error)),
            },
            (task, part) => {
                let done = self.change(task, part.as_ref());
                let done = done.map_err(|error| number_of(&error));
                self.answer(&[&replies::simple(tag, done)])
            }
        };
        self.give_back(job.part);
        if client == Client::Gone {
            // Whoever waits to receive or to send learns it.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    fn change(&self, task: Task, part: Option<&Part>) -> Result<()> {
        let durability = match (task, part) {
            (Task::Write(extent, durability), Some(part)) => {
                self.opened.write(extent.offset(), part.bytes())?;
                durability
            }
            (Task::Zeroes(extent, _, durability), _) => {
                self.opened.zeroes(extent)?;
                durability
            }
            (Task::Discard(extent, durability), _) => {
                self.opened.discard(extent)?;
                durability
            }
            (Task::Flush, _) => Durability::Durable,
            _ => Durability::Cached,
        };
        match durability {
            Durability::Durable => self.opened.flush(),
            Durability::Cached => Ok(()),
        }
    }

    fn give_back(&self, part: Option<Part>) {
        if let Some(part) = part {
            lock(&self.pool).give(part.buffer);
        }
    }

    fn answer_read(&self, tag: Tag, offset: crate::units::ByteOffset, data: &[u8]) -> Client {
        match self.session.replies {
            Replies::Simple => self.answer(&[&replies::simple(tag, Ok(())), data]),
            Replies::Structured => {
                // No request is longer than 32 bits can say.
                let header = replies::data(tag, offset, data.len() as u32);
                self.answer(&[&header, data])
            }
        }
    }

    fn answer_error(&self, tag: Tag, errno: Errno) -> Client {
        match self.session.replies {
            Replies::Simple => self.answer(&[&replies::simple(tag, Err(errno))]),
            Replies::Structured => self.answer(&[&replies::error(tag, errno)]),
        }
    }

    fn answer_status(&self, tag: Tag, stretches: &[(u32, u32)]) -> Client {
        let mut bytes = Vec::new();
        let contexts = self.session.contexts.len() as u32;
        for number in 0..contexts {
            let place = match number + 1 == contexts {
                true => Place::Last,
                false => Place::Before,
            };
            replies::status(&mut bytes, tag, number, place, stretches);
        }
        self.answer(&[&bytes])
    }

    /// Sends a reply, whole.
    fn answer(&self, pieces: &[&[u8]]) -> Client {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        let mut stream = self.stream;
        let _sending = lock(&self.sending);
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match stream.write_vectored(rest) {
                Ok(0) => return Client::Gone,
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Client::Gone,
            }
        }
        Client::There
    }
}

/// What the client is told of an error, which the log has whole.
fn number_of(error: &Error) -> Errno {
    tracing::warn!(%error, "a request of an NBD client failed");
    Errno::of(error)
}
