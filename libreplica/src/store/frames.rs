//! Frames that were read a moment ago. A frame is read, checked, decrypted and decompressed as a
//! whole, while the volume's order may visit it piece by piece, in turn with those of other
//! logs; what was used last is kept, up to a limit of memory. Of a frame that was let go of, and
//! whose data lies in the file as it is, only what is needed is read the next time: it was
//! checked once, and after that a log is trusted as the base image is.
//!
//! Many pieces at once may lie in as many logs. They are read one after the other while that is as
//! fast as memory; when it turns out that a medium is waited for, several at a time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hrl_format::units::{FileOffset, FrameNumber};
use hrl_format::{FrameBuffer, Piece, SourceNumber};

use super::chain::Logs;
use super::durable::damaged;
use crate::error::{Error, ErrorKind, Result};

/// How many bytes of plain data are kept; with what they were unpacked from, twice that at most.
const KEPT: usize = 64 << 20;
/// Of how many frames it is known that they were checked: some 12 MiB.
const CHECKED: usize = 1 << 18;
/// How many frames are read at a time from a medium that is waited for, by how many threads.
const AT_ONCE: usize = 32;
const THREADS: usize = 16;
/// Memory takes less than this to give a piece.
const SLOW: Duration = Duration::from_micros(60);

const READ: &str = "read a log of the store";

/// A frame: of which log, and which of it.
type Key = (SourceNumber, FrameNumber);

/// The frames used last.
#[derive(Default)]
pub(super) struct Frames {
    held: HashMap<Key, Held>,
    /// Where the data of frames lies that were checked.
    checked: HashMap<Key, Plain>,
    bytes: usize,
    uses: u64,
}

/// Data that lies in a log's file as it is: from where on, and how many bytes.
#[derive(Clone, Copy, Debug)]
struct Plain {
    at: FileOffset,
    len: usize,
}

struct Held {
    buffer: FrameBuffer,
    used: u64,
}

/// A piece, and where its bytes are to go.
pub(super) struct Wanted<'a> {
    pub(super) piece: Piece,
    pub(super) into: &'a mut [u8],
}

impl Wanted<'_> {
    fn key(&self) -> Key {
        (self.piece.source, self.piece.entry.frame)
    }

    fn copy_from<L: Logs + ?Sized>(&mut self, logs: &L, frame: &FrameBuffer) -> Result<()> {
        let entry = &self.piece.entry;
        match frame.slice(entry.at, entry.extent.len()) {
            Ok(bytes) => {
                self.into.copy_from_slice(bytes);
                Ok(())
            }
            Err(e) => Err(logs.log(self.piece.source)?.error(READ, e)),
        }
    }

    /// Reads it from a frame that was checked before, from where its data lies.
    fn read<L: Logs + ?Sized>(&mut self, logs: &L, plain: Plain) -> Result<()> {
        let (source, start) = (self.piece.source, self.piece.entry.at.get() as usize);
        let end = start.checked_add(self.into.len());
        if end.is_none_or(|end| end > plain.len) {
            let why = "the index names more than a frame holds";
            return Err(damaged(READ, &logs.log(source)?.path, why));
        }
        let at = FileOffset::new(plain.at.get() + start as u64);
        logs.read_at(source, at, self.into)
    }
}

/// What is wanted of one frame that is not held.
struct Missing<'a> {
    key: Key,
    plain: Option<Plain>,
    wanted: Vec<Wanted<'a>>,
}

impl Missing<'_> {
    /// Reads what is wanted. The frame, if it had to be read whole.
    fn read<L: Logs + ?Sized>(mut self, logs: &L) -> Result<Option<(Key, FrameBuffer)>> {
        if let Some(plain) = self.plain {
            let mut wanted = self.wanted.iter_mut();
            wanted.try_for_each(|wanted| wanted.read(logs, plain))?;
            return Ok(None);
        }
        let buffer = load(logs, self.key, FrameBuffer::default())?;
        let mut wanted = self.wanted.iter_mut();
        wanted.try_for_each(|wanted| wanted.copy_from(logs, &buffer))?;
        Ok(Some((self.key, buffer)))
    }
}

/// Reads and checks a frame.
fn load<L: Logs + ?Sized>(logs: &L, key: Key, mut buffer: FrameBuffer) -> Result<FrameBuffer> {
    let log = logs.log(key.0)?;
    let read = log.log.read_frame(key.1, &mut buffer);
    read.map_err(|e| log.error(READ, e))?;
    Ok(buffer)
}

impl Frames {
    /// Fills in the bytes that one piece, of one of `logs`, points to.
    fn read<L: Logs + ?Sized>(&mut self, logs: &L, wanted: &mut Wanted<'_>) -> Result<()> {
        let key = wanted.key();
        self.uses += 1;
        if let Some(held) = self.held.get_mut(&key) {
            held.used = self.uses;
            return wanted.copy_from(logs, &held.buffer);
        }
        if let Some(&plain) = self.checked.get(&key) {
            return wanted.read(logs, plain);
        }
        let buffer = load(logs, key, self.spare())?;
        let copied = wanted.copy_from(logs, &buffer);
        self.keep(key, buffer);
        copied
    }

    /// Fills in the bytes that pieces, of some of `logs`, point to.
    pub(super) fn read_all<L: Logs + Sync + ?Sized>(
        &mut self,
        logs: &L,
        wanted: Vec<Wanted<'_>>,
    ) -> Result<()> {
        let mut wanted = wanted.into_iter();
        let (mut spent, mut missed) = (Duration::ZERO, 0);
        while missed < 4 || spent < SLOW * missed {
            let Some(mut next) = wanted.next() else {
                return Ok(());
            };
            match self.held.contains_key(&next.key()) {
                true => self.read(logs, &mut next)?,
                false => {
                    let started = Instant::now();
                    self.read(logs, &mut next)?;
                    spent += started.elapsed();
                    missed += 1;
                }
            }
        }
        self.read_at_once(logs, wanted)
    }

    /// Reads pieces from a medium that is waited for.
    fn read_at_once<'a, L: Logs + Sync + ?Sized>(
        &mut self,
        logs: &L,
        wanted: impl Iterator<Item = Wanted<'a>>,
    ) -> Result<()> {
        let mut missing: HashMap<Key, Missing<'a>> = HashMap::new();
        for mut wanted in wanted {
            let key = wanted.key();
            if self.held.contains_key(&key) {
                self.read(logs, &mut wanted)?;
                continue;
            }
            let plain = self.checked.get(&key).copied();
            let new = || Missing {
                key,
                plain,
                wanted: Vec::new(),
            };
            missing.entry(key).or_insert_with(new).wanted.push(wanted);
        }
        let mut missing: Vec<Missing<'_>> = missing.into_values().collect();
        missing.sort_by_key(|missing| missing.key);
        while !missing.is_empty() {
            let rest = missing.split_off(missing.len().min(AT_ONCE));
            for (key, buffer) in read_by_threads(logs, missing)? {
                drop(self.spare());
                self.keep(key, buffer);
            }
            missing = rest;
        }
        Ok(())
    }

    /// Remembers a frame that was just read.
    fn keep(&mut self, key: Key, buffer: FrameBuffer) {
        let len = buffer.data_len();
        if let Some(at) = buffer.plain_at() {
            if self.checked.len() >= CHECKED {
                self.checked.clear();
            }
            self.checked.insert(key, Plain { at, len });
        }
        let used = self.uses;
        self.bytes += len;
        if let Some(twice) = self.held.insert(key, Held { buffer, used }) {
            self.bytes -= twice.buffer.data_len();
        }
    }

    /// A buffer to read into: the one not used for longest if there are enough.
    fn spare(&mut self) -> FrameBuffer {
        let mut spare = None;
        while self.bytes >= KEPT {
            let oldest = self.held.iter().min_by_key(|(_, held)| held.used);
            let Some(key) = oldest.map(|(key, _)| *key) else {
                break;
            };
            if let Some(held) = self.held.remove(&key) {
                self.bytes -= held.buffer.data_len();
                spare = Some(held.buffer);
            }
        }
        spare.unwrap_or_default()
    }
}

/// Reads what is missing, several frames at a time; those that were read whole are given back.
fn read_by_threads<L: Logs + Sync + ?Sized>(
    logs: &L,
    missing: Vec<Missing<'_>>,
) -> Result<Vec<(Key, FrameBuffer)>> {
    let threads = missing.len().min(THREADS);
    let missing = Mutex::new(missing.into_iter());
    let work = || {
        let mut read = Vec::new();
        loop {
            // A panic elsewhere leaves the rest of them.
            let next = missing
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .next();
            let Some(next) = next else { return Ok(read) };
            read.extend(next.read(logs)?);
        }
    };
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = vec![work()];
        all.extend(threads.into_iter().map(|thread| {
            let panicked = |_| {
                Err(Error::new(ErrorKind::Invalid, READ).detail("a thread that read ended early"))
            };
            thread.join().unwrap_or_else(panicked)
        }));
        all
    });
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().collect())
}
