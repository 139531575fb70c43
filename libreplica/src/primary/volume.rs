//! A protected volume as several threads see it: its settings, its status, and its
//! [`Member`], the part that does the work, behind a lock. The volume's own thread holds
//! that lock while it copies, resyncs or makes a point; a command that needs it waits, or
//! says why it cannot.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use hrl_format::id::VolumeId;
use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Shipping, VolumeConfig};
use crate::primary::member::Member;
use crate::primary::status::{LastError, VolumeState, VolumeStatus};

/// How often a command that waits for the member looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// One protected volume.
pub struct Volume {
    id: VolumeId,
    config: Mutex<VolumeConfig>,
    status: Mutex<VolumeStatus>,
    member: Mutex<Member>,
    stop: AtomicBool,
    tried: AtomicBool,
    point_made: Mutex<Option<Instant>>,
    /// A first copy or a resync is not over before a point was made.
    owes_point: AtomicBool,
    /// What failed in a row, of what the volume does by itself.
    failures: AtomicU32,
    woken: Mutex<bool>,
    wake: Condvar,
}

/// Takes a lock; a thread that panicked while it held it leaves the value as it was, and
/// every value here is valid at each step.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    /// A volume with these settings; nothing is opened yet.
    pub fn new(config: VolumeConfig, member: Member, status: VolumeStatus) -> Self {
        Self {
            id: config.id,
            config: Mutex::new(config),
            status: Mutex::new(status),
            member: Mutex::new(member),
            stop: AtomicBool::new(false),
            tried: AtomicBool::new(false),
            point_made: Mutex::new(None),
            owes_point: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            woken: Mutex::new(false),
            wake: Condvar::new(),
        }
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// A copy of its settings.
    pub fn config(&self) -> VolumeConfig {
        locked(&self.config).clone()
    }

    /// Changes its settings.
    ///
    /// # Errors
    /// What `change` returned.
    pub fn update_config(
        &self,
        change: impl FnOnce(&mut VolumeConfig) -> Result<()>,
    ) -> Result<()> {
        change(&mut locked(&self.config))
    }

    /// Whether its thread has looked at it once.
    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Acquire)
    }

    /// Its thread has looked at it.
    pub fn set_tried(&self) {
        self.tried.store(true, Ordering::Release);
    }

    /// When the newest point was made in this run of the daemon.
    pub fn last_point_made(&self) -> Option<Instant> {
        *locked(&self.point_made)
    }

    /// A point was made.
    pub fn set_point_made(&self, when: Instant) {
        *locked(&self.point_made) = Some(when);
        self.owes_point.store(false, Ordering::Release);
        self.set_going_well();
    }

    /// A point is due at once, whatever was made before.
    pub fn make_point_due(&self) {
        *locked(&self.point_made) = None;
    }

    /// A first copy or a resync is under way, or just over: its end shall be a point.
    pub fn owe_point(&self) {
        self.owes_point.store(true, Ordering::Release);
        self.make_point_due();
    }

    /// Whether that point is still to be made.
    pub fn owes_point(&self) -> bool {
        self.owes_point.load(Ordering::Acquire)
    }

    /// Counts a failure; returns how many there were in a row before it.
    pub fn count_failure(&self) -> u32 {
        self.failures.fetch_add(1, Ordering::AcqRel)
    }

    /// How many failures there were in a row.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Acquire)
    }

    /// What it did last went well.
    pub fn set_going_well(&self) {
        self.failures.store(0, Ordering::Release);
    }

    /// Its status as last published.
    pub fn status(&self) -> VolumeStatus {
        locked(&self.status).clone()
    }

    /// Changes its published status.
    pub fn publish(&self, change: impl FnOnce(&mut VolumeStatus)) {
        change(&mut locked(&self.status));
    }

    /// Publishes `error` as the newest.
    pub fn publish_error(&self, error: &Error) {
        tracing::warn!(volume = %self.id, kind = error.kind().as_str(), "{error}");
        let last = LastError::new(error, Timestamp::now());
        self.publish(|status| status.last_error = Some(last));
    }

    /// Waits for the member, at most until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when another operation still holds it then.
    pub fn member_until(&self, deadline: Instant) -> Result<MutexGuard<'_, Member>> {
        loop {
            if let Some(member) = self.try_member() {
                return Ok(member);
            }
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::TimedOut, "wait for the volume")
                    .volume(self.id)
                    .detail("another operation on it has not ended")
                    .advice("see `replica status`, and try again"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The member, if nobody holds it now.
    pub fn try_member(&self) -> Option<MutexGuard<'_, Member>> {
        match self.member.try_lock() {
            Ok(member) => Some(member),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether the volume's thread shall end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Asks the volume's thread to end, soon.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Wakes the volume's thread.
    pub fn wake(&self) {
        *locked(&self.woken) = true;
        self.wake.notify_all();
    }

    /// Sleeps until woken, or for `time`.
    pub fn sleep(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut woken = locked(&self.woken);
        while !*woken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            woken = self
                .wake
                .wait_timeout(woken, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *woken = false;
    }

    /// Between two slices of a long job: waits while the operator has paused the volume.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the volume's thread shall end.
    pub fn pass_or_stop(&self) -> Result<()> {
        loop {
            if self.is_stopping() {
                return Err(Error::new(ErrorKind::State, "copy the volume")
                    .volume(self.id)
                    .detail("stopped on request"));
            }
            if locked(&self.config).shipping == Shipping::On {
                return Ok(());
            }
            self.publish(|status| {
                status.state = VolumeState::Paused;
                status.state_cause = Some("paused by the operator".into());
            });
            self.sleep(Duration::from_secs(1));
        }
    }
}
