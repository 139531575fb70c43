//! A protected volume as several threads see it: its settings, its status, and its
//! [`Member`], the part that does the work, behind a lock. The volume's own thread holds
//! that lock while it copies, resyncs or makes a point; a command that needs it waits, or
//! says why it cannot.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use hrl_format::id::VolumeId;
use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping, VolumeConfig};
use crate::primary::inline::Inline;
use crate::primary::member::Member;
use crate::primary::pace::Pace;
use crate::primary::status::{LastError, VolumeState, VolumeStatus};

/// How often a command that waits for the member looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// One protected volume.
pub struct Volume {
    id: VolumeId,
    config: Mutex<VolumeConfig>,
    status: Mutex<VolumeStatus>,
    member: Mutex<Member>,
    /// What serves the device's users, for who cannot wait for the member.
    inline: Mutex<Option<Arc<Inline>>>,
    stop: AtomicBool,
    tried: AtomicBool,
    pace: Mutex<Pace>,
    /// Who waits for the member.
    waiting: AtomicU32,
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
            inline: Mutex::new(member.inline().cloned()),
            member: Mutex::new(member),
            stop: AtomicBool::new(false),
            tried: AtomicBool::new(false),
            pace: Mutex::new(Pace::new()),
            waiting: AtomicU32::new(0),
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
        let mut config = locked(&self.config);
        change(&mut config)?;
        if let Some(inline) = &*locked(&self.inline)
            && config.phase != Phase::Replicating
        {
            inline.follows(&config.phase);
        }
        Ok(())
    }

    /// The store was looked at: what changed since the points is known, if its phase says so.
    pub fn store_is_known(&self) {
        let config = locked(&self.config);
        if let Some(inline) = &*locked(&self.inline) {
            inline.follows(&config.phase);
        }
    }

    /// Whether its thread has looked at it once.
    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Acquire)
    }

    /// Its thread has looked at it.
    pub fn set_tried(&self) {
        self.tried.store(true, Ordering::Release);
    }

    /// Asks or changes its pace.
    pub fn pace<T>(&self, what: impl FnOnce(&mut Pace) -> T) -> T {
        what(&mut locked(&self.pace))
    }

    /// What serves the device's users, if they go through us and it has begun.
    pub fn inline(&self) -> Option<Arc<Inline>> {
        locked(&self.inline).clone()
    }

    /// What serves the device's users has begun, or ended.
    pub fn set_inline(&self, inline: Option<Arc<Inline>>) {
        *locked(&self.inline) = inline;
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

    /// Shows that it ships, with what there is to say of its points.
    pub fn show_that_it_ships(&self) {
        let remark = self.pace(|pace| pace.remark());
        self.publish(|status| {
            if status.state != VolumeState::Paused {
                status.state = VolumeState::Replicating;
                status.state_cause = remark;
            }
        });
    }

    /// Shows that it does not ship, and why.
    pub fn show_degraded(&self, cause: &Error) {
        self.pace(|pace| pace.breaks(cause.kind()));
        self.publish(|status| {
            if status.state != VolumeState::Paused {
                status.state = match cause.kind() {
                    ErrorKind::Fenced => VolumeState::FailedOver,
                    _ => VolumeState::Degraded,
                };
                status.state_cause = Some(cause.to_string());
            }
        });
    }

    /// Waits for the member, at most until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when another operation still holds it then.
    pub fn member_until(&self, deadline: Instant) -> Result<MutexGuard<'_, Member>> {
        let _waits = Waits::new(&self.waiting);
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

    /// The member, if nobody holds it now. After a panic of whoever held it nobody knows
    /// how far that was: both sides are dropped, to be brought up anew.
    pub fn try_member(&self) -> Option<MutexGuard<'_, Member>> {
        match self.member.try_lock() {
            Ok(member) => Some(member),
            Err(TryLockError::Poisoned(poisoned)) => {
                self.member.clear_poison();
                let mut member = poisoned.into_inner();
                member.drop_sides();
                self.pace(|pace| pace.breaks(ErrorKind::State));
                Some(member)
            }
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Between two steps of long work: lets whoever waits for the member have it.
    pub fn give_way(&self) {
        let until = Instant::now() + 20 * LOOK_AGAIN;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(LOOK_AGAIN / 5);
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

    /// Its thread shall not end after all.
    pub fn take_stop_back(&self) {
        self.stop.store(false, Ordering::Release);
    }

    /// Wakes the volume's thread.
    pub fn wake(&self) {
        *locked(&self.woken) = true;
        self.wake.notify_all();
    }

    /// Whether somebody has woken the volume's thread; it is asleep again then.
    pub fn is_woken(&self) -> bool {
        std::mem::take(&mut *locked(&self.woken))
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

/// One who waits for the member.
struct Waits<'a>(&'a AtomicU32);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicU32) -> Self {
        waiting.fetch_add(1, Ordering::AcqRel);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A volume of a device that is not there.
    pub fn volume() -> Volume {
        let config = VolumeConfig {
            id: VolumeId::random().unwrap(),
            name: "v".to_owned(),
            device: "/dev/none".into(),
            size_bytes: 1 << 20,
            block_bytes: 4096,
            store: "/none".into(),
            every: Duration::from_secs(3600),
            retain: "24h".to_owned(),
            key_file: None,
            group: None,
            exclude: Vec::new(),
            left_out: Vec::new(),
            spool: None,
            capture: crate::primary::config::Capture::Ebpf,
            phase: Phase::Replicating,
            shipping: Shipping::On,
            generation: None,
            coming_home: None,
            rest: crate::primary::config::Rest::InUse,
            revision: 0,
        };
        let (member, status) = (Member::new(&config), VolumeStatus::unknown(config.id));
        Volume::new(config, member, status)
    }

    #[test]
    fn who_waits_has_the_member_between_two_steps_of_long_work() {
        let volume = volume();
        let work_ends = Instant::now() + Duration::from_secs(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while Instant::now() < work_ends {
                    let held = volume.member_until(work_ends).unwrap();
                    std::thread::sleep(Duration::from_millis(50));
                    drop(held);
                    volume.give_way();
                }
            });
            for _ in 0..5 {
                let soon = Instant::now() + Duration::from_millis(300);
                drop(volume.member_until(soon).unwrap());
            }
            assert!(Instant::now() < work_ends);
        });
    }
}
