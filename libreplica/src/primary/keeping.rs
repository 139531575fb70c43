//! What a volume's thread does for the points that are in the store already: it drops those
//! that the policy does not keep any more, and folds and merges what only they needed. In the
//! background: the lock on the volume is let go of after each step, and a [`Throttle`] says when
//! the next may come. What fails here keeps nothing from being shipped, and is tried again
//! with the next point, a minute later at the latest.
//!
//! A store that ran full is another matter: then all that can be given back is, at once, before
//! anything is shipped again.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::primary::lifecycle::PATIENCE;
use crate::primary::member::Member;
use crate::primary::status::VolumeState;
use crate::primary::throttle::Throttle;
use crate::primary::volume::Volume;
use crate::store::FoldStep;

/// Points expire also while none are made.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// So long small steps follow each other before there is a pause.
const AT_ONCE: Duration = Duration::from_millis(100);

/// What a volume's thread remembers of the image's points between two things it does.
#[derive(Debug, Default)]
pub struct Keeping {
    /// How many had been made when expired ones were last dropped, and when that was.
    looked: Option<(u64, Instant)>,
    folding: Folding,
    throttle: Throttle,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Folding {
    #[default]
    Done,
    UnderWay,
}

impl Keeping {
    /// Applies the policy to the image's points after each that was made, by whomever, and folds
    /// what only dropped ones needed: a step at least, more for as long as `go_on` says and
    /// the throttle lets it. Returns how long there is nothing to do.
    pub fn keep_points(&mut self, volume: &Volume, go_on: &dyn Fn() -> bool) -> Duration {
        let (points, now) = (volume.pace(|pace| pace.points()), Instant::now());
        let is_due = self.looked.is_none_or(|(known, when)| {
            known != points || now.saturating_duration_since(when) >= LOOK_AGAIN
        });
        if is_due {
            self.apply_policy(volume);
        }
        if self.folding == Folding::UnderWay && self.throttle.left(now).is_zero() {
            self.fold(volume, go_on);
        }
        match self.folding {
            Folding::Done => Duration::MAX,
            Folding::UnderWay => self.throttle.left(Instant::now()),
        }
    }

    /// Gives back all that the policy does not keep.
    pub fn make_room(&mut self, volume: &Volume) {
        self.apply_policy(volume);
        while self.folding == Folding::UnderWay && !volume.is_stopping() {
            self.fold_step(volume);
            volume.give_way();
        }
    }

    fn apply_policy(&mut self, volume: &Volume) {
        self.looked = Some((volume.pace(|pace| pace.points()), Instant::now()));
        let dropped = at_the_store(volume, |member| {
            member.retain()?;
            Ok(member.log_bytes())
        });
        if let Ok(logs) = &dropped {
            self.folding = Folding::UnderWay;
            self.throttle.begin(*logs);
        }
        note(volume, dropped.map(drop));
    }

    fn fold(&mut self, volume: &Volume, go_on: &dyn Fn() -> bool) {
        let began = Instant::now();
        while self.folding == Folding::UnderWay {
            self.fold_step(volume);
            volume.give_way();
            if began.elapsed() >= AT_ONCE || !go_on() {
                break;
            }
        }
        let logs = volume.try_member().map(|member| member.log_bytes());
        let now = Instant::now();
        self.throttle
            .worked(now, now - began, logs.unwrap_or_default());
    }

    fn fold_step(&mut self, volume: &Volume) {
        match at_the_store(volume, Member::fold_step) {
            Ok(FoldStep::Nothing) => {
                self.folding = Folding::Done;
                self.throttle.end();
            }
            Ok(_) => {}
            failed => {
                self.folding = Folding::Done;
                note(volume, failed.map(drop));
            }
        }
    }
}

/// A store that failed in the middle of a change is opened anew.
fn at_the_store<T>(volume: &Volume, work: impl FnOnce(&mut Member) -> Result<T>) -> Result<T> {
    let mut member = volume.member_until(Instant::now() + PATIENCE)?;
    work(&mut member).inspect_err(|_| member.drop_sides())
}

fn note(volume: &Volume, done: Result<()>) {
    let failed = done.err();
    if let Some(error) = &failed {
        volume.publish_error(error);
    }
    volume.pace(|pace| pace.note_retention(failed.map(|error| error.to_string())));
    if volume.status().state == VolumeState::Replicating {
        volume.show_that_it_ships();
    }
}
