//! The mounts of one freeze, frozen in order and thawed in reverse. The watchdog runs this
//! code, or the agent itself where there is no watchdog: whoever makes the FIFREEZE calls
//! knows for certain which of them took effect, and thaws those and no other.
//!
//! Between the first freeze and the last thaw nothing here allocates, logs, or writes but
//! single bytes to the status row: a file in memory that says of each mount how far it is,
//! for whoever must go on if this process dies.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::primary::quiesce::marker::STATUS_ROW;
use crate::sys::freeze;

/// In the status row: not frozen by us.
pub const AT_REST: u8 = b'-';
/// In the status row: the call was made and has not come back.
pub const CALLED: u8 = b'?';
/// In the status row: frozen by us.
pub const FROZEN: u8 = b'F';

/// Why a freeze did not come about, or did not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The limit passed before the last call came back; all is thawed.
    Late,
    /// Somebody else had frozen it (`EBUSY`), and still has; ours are thawed.
    Foreign,
    /// A call failed.
    System(Errno),
    /// Somebody else thawed it while it was frozen.
    ThawedByOther,
    /// The watchdog thawed it: limit and grace had passed.
    Expired,
}

/// Which mount of the set, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its place in the set.
    pub member: u32,
    /// Why.
    pub cause: Cause,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Rest,
    Frozen,
}

struct Member {
    number: u32,
    mount: OwnedFd,
    state: State,
}

/// Mounts to be frozen together. Thawed when dropped.
pub struct FreezeSet {
    members: Vec<Member>,
    status: File,
}

impl FreezeSet {
    /// An empty set that keeps its status in `status`.
    pub const fn new(status: File) -> Self {
        Self {
            members: Vec::new(),
            status,
        }
    }

    /// Adds a mount behind those there are; the first is frozen first.
    pub fn push(&mut self, mount: OwnedFd) {
        self.members.push(Member {
            number: self.members.len() as u32,
            mount,
            state: State::Rest,
        });
    }

    /// The mounts, in order.
    pub fn mounts(&self) -> impl Iterator<Item = &OwnedFd> {
        self.members.iter().map(|member| &member.mount)
    }

    /// Freezes all, or none. A type that cannot freeze is left as it is.
    ///
    /// # Errors
    /// The first that failed or came back when `limit` had passed since `start`; what was
    /// frozen before it is thawed again.
    pub fn freeze(&mut self, start: Instant, limit: Duration) -> Result<(), Failure> {
        let mut outcome = Ok(());
        for member in &mut self.members {
            if let Err(cause) = member.freeze(&self.status, start, limit) {
                outcome = Err(member.failure(cause));
                break;
            }
        }
        if outcome.is_err() {
            // The first failure is the one to tell.
            let _ = self.thaw();
        }
        outcome
    }

    /// Thaws what this set froze, in reverse; all of it, whatever fails.
    ///
    /// # Errors
    /// The first failure. What could not be thawed is tried again on drop.
    pub fn thaw(&mut self) -> Result<(), Failure> {
        let mut outcome = Ok(());
        for member in self.members.iter_mut().rev() {
            if let Err(cause) = member.thaw(&self.status) {
                outcome = outcome.and(Err(member.failure(cause)));
            }
        }
        outcome
    }

    /// Takes over from a process that died: what its status row says it froze, or was
    /// freezing, is now this set's to thaw.
    pub fn take_over(&mut self) {
        for member in &mut self.members {
            let mut status = [CALLED];
            // Unreadable: better a thaw too many than a filesystem that hangs for good.
            let _ = self.status.read_exact_at(&mut status, member.place());
            if status[0] != AT_REST {
                member.state = State::Frozen;
            }
        }
    }

    /// Whether any is frozen by this set.
    pub fn is_frozen(&self) -> bool {
        self.members
            .iter()
            .any(|member| member.state == State::Frozen)
    }
}

impl Member {
    fn freeze(&mut self, status: &File, start: Instant, limit: Duration) -> Result<(), Cause> {
        self.note(status, CALLED);
        let result = freeze::freeze(&self.mount);
        if result.is_ok() {
            self.state = State::Frozen;
        }
        self.note(status, if result.is_ok() { FROZEN } else { AT_REST });
        match result {
            Ok(()) if start.elapsed() > limit => Err(Cause::Late),
            Ok(()) => Ok(()),
            Err(errno) if freeze::cannot_freeze(errno) => Ok(()),
            Err(Errno::EBUSY) => Err(Cause::Foreign),
            Err(errno) => Err(Cause::System(errno)),
        }
    }

    fn thaw(&mut self, status: &File) -> Result<(), Cause> {
        if self.state != State::Frozen {
            return Ok(());
        }
        let result = match freeze::thaw(&self.mount) {
            Ok(()) => Ok(()),
            Err(Errno::EINVAL) => Err(Cause::ThawedByOther),
            Err(errno) => return Err(Cause::System(errno)),
        };
        self.state = State::Rest;
        self.note(status, AT_REST);
        result
    }

    /// A status that cannot be written costs only a thaw after a second death.
    fn note(&self, status: &File, byte: u8) {
        let _ = status.write_all_at(&[byte], self.place());
    }

    fn place(&self) -> u64 {
        STATUS_ROW + u64::from(self.number)
    }

    const fn failure(&self, cause: Cause) -> Failure {
        Failure {
            member: self.number,
            cause,
        }
    }
}

impl Drop for FreezeSet {
    fn drop(&mut self) {
        let _ = self.thaw();
    }
}
