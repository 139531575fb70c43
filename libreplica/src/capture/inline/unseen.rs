//! Writes that go from their user's memory to the device without a copy of ours: nobody here
//! sees their data. They are allowed while no data is recorded. Before it is recorded again
//! those that are under way must have ended, for the stream would lack them: whoever takes a
//! moment asks for sight, which allows no more of them, and waits for the last one.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How many are under way, and whether there may be more.
#[derive(Debug)]
pub(super) struct Unseen {
    allowed: AtomicBool,
    under_way: AtomicUsize,
    /// Of whoever waits; taken by those who end only while somebody does.
    waiting: Mutex<()>,
    ended: Condvar,
}

/// Leave for one write to go unseen, until this is dropped.
#[derive(Debug)]
pub struct UnseenWrite(Arc<Unseen>);

impl Unseen {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            allowed: AtomicBool::new(true),
            under_way: AtomicUsize::new(0),
            waiting: Mutex::new(()),
            ended: Condvar::new(),
        })
    }

    /// Leave for one write; `None` while data is wanted.
    pub fn begin(self: &Arc<Self>) -> Option<UnseenWrite> {
        // Counted first: whoever forbids them then either sees this one, or is seen by it.
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let write = UnseenWrite(Arc::clone(self));
        self.allowed.load(Ordering::SeqCst).then_some(write)
    }

    /// Whether none is under way, and there may be none.
    pub fn is_over(&self) -> bool {
        !self.allowed.load(Ordering::SeqCst) && self.under_way.load(Ordering::SeqCst) == 0
    }

    /// There may be unseen writes.
    pub fn allow(&self) {
        self.allowed.store(true, Ordering::SeqCst);
    }

    /// There may be none from now on.
    pub fn forbid(&self) {
        self.allowed.store(false, Ordering::SeqCst);
    }

    /// Waits, after [`Self::forbid`], until none is under way; at most for `limit`.
    pub fn wait_for_end(&self, limit: Duration) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let some = |_: &mut ()| self.under_way.load(Ordering::SeqCst) > 0;
        drop(self.ended.wait_timeout_while(waiting, limit, some));
    }
}

impl Drop for UnseenWrite {
    fn drop(&mut self) {
        let unseen = &self.0;
        let left = unseen.under_way.fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && !unseen.allowed.load(Ordering::SeqCst) {
            // Not between another's look and its sleep.
            drop(unseen.waiting.lock());
            unseen.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_under_way_are_waited_for_and_none_begins_meanwhile() {
        let unseen = Unseen::new();
        let (one, other) = (unseen.begin().unwrap(), unseen.begin().unwrap());
        unseen.forbid();
        assert!(unseen.begin().is_none());
        drop(other);
        unseen.wait_for_end(Duration::from_millis(5));
        assert!(!unseen.is_over());
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(one);
        });
        unseen.wait_for_end(Duration::from_secs(60));
        assert!(unseen.is_over());
        ends.join().unwrap();
        assert!(unseen.begin().is_none());
        unseen.allow();
        assert!(unseen.begin().is_some());
    }

    #[test]
    fn whoever_forbids_them_sees_every_one_that_began() {
        let unseen = Unseen::new();
        let seen = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        while let Some(write) = unseen.begin() {
                            assert!(!seen.load(Ordering::SeqCst), "it began after all had ended");
                            drop(write);
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(20));
            unseen.forbid();
            unseen.wait_for_end(Duration::from_secs(60));
            assert!(unseen.is_over());
            seen.store(true, Ordering::SeqCst);
            writers
                .into_iter()
                .for_each(|writer| writer.join().unwrap());
        });
    }
}
