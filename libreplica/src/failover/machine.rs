//! The states, the events, and the one function from both to the next state.

use std::fmt;

/// What a volume is, seen from where it is recovered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// The source is in use; its changes arrive, or will again.
    #[default]
    Replicating,
    /// As before, and a drill is open on a recovery point.
    TestFailover,
    /// The source is asked to come to rest before it is replaced: nothing is lost, or nothing
    /// is done.
    Resting,
    /// The source is asked to come to rest, and is replaced whether it does or not.
    ShuttingDown,
    /// A recovery point is in use in place of the source. Another can still be chosen.
    FailedOver,
    /// That choice is final: the other points are gone.
    Committed,
    /// The volume is protected where it is used now, towards the first side.
    Reversing,
    /// As before, and whoever uses it is asked to come to rest, so that the first side takes over.
    Returning,
}

/// What happens to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    /// `failover --test`.
    Test,
    /// `failover --cleanup`.
    Cleanup,
    /// `failover --planned`.
    Planned,
    /// `failover --unplanned`.
    Unplanned,
    /// `failover --unplanned --shutdown-source`.
    UnplannedAfterShutdown,
    /// The source is at rest, and all that it holds has arrived.
    SourceRests,
    /// The source refuses, fails, or does not answer in time.
    SourceDoesNot,
    /// `change-point`.
    ChangePoint,
    /// `commit`.
    Commit,
    /// `reprotect`.
    Reprotect,
    /// `failback`.
    Failback,
}

/// What is to be done. In the order of a step's list; one that fails ends the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Open the point with a private log for what is written.
    OpenDrill,
    /// Throw the drill's private log away.
    DiscardDrill,
    /// Ask whoever writes to the volume to come to rest, with a limit in time.
    AskForRest,
    /// Take the question back: whoever was asked goes on.
    TakeBack,
    /// Take the volume's lock, which whoever wrote to it must have let go.
    TakeLock,
    /// **Durable**: a new generation, and the new state. From here on the old primary is fenced.
    Promote,
    /// **Durable**: a new generation on another point, and the new state.
    PromoteAgain,
    /// Throw away what was written on the point chosen before.
    DiscardBranch,
    /// Open the chosen point with a private log, which is kept.
    OpenBranch,
    /// **Durable**: the other points leave the list, and what lies behind the chosen one.
    DropOtherPoints,
    /// **Durable**: what was written since becomes the volume's history, and the new state.
    AdoptBranch,
    /// Bring the first side's disk to the newest point: compare, and write what differs.
    BringBack,
    /// Compare the disk with the point.
    Prove,
}

impl Action {
    /// Whether the state changes durably with it.
    pub const fn is_durable(self) -> bool {
        matches!(
            self,
            Self::Promote | Self::PromoteAgain | Self::DropOtherPoints | Self::AdoptBranch
        )
    }
}

/// Where an event leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The state afterwards.
    pub next: State,
    /// How to get there.
    pub actions: &'static [Action],
}

/// Why an event does not fit a state, and what would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    /// Why.
    pub why: &'static str,
    /// What to do next.
    pub advice: &'static str,
}

impl State {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::Replicating,
        Self::TestFailover,
        Self::Resting,
        Self::ShuttingDown,
        Self::FailedOver,
        Self::Committed,
        Self::Reversing,
        Self::Returning,
    ];

    /// As it stands in JSON and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Replicating => "replicating",
            Self::TestFailover => "test_failover",
            Self::Resting => "resting",
            Self::ShuttingDown => "shutting_down",
            Self::FailedOver => "failed_over",
            Self::Committed => "committed",
            Self::Reversing => "reversing",
            Self::Returning => "returning",
        }
    }

    /// Whether it outlives whoever brought it about: the others end with the command that
    /// waits in them, and the volume is what it was before.
    pub const fn is_lasting(self) -> bool {
        !matches!(self, Self::Resting | Self::ShuttingDown | Self::Returning)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Event {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Test,
        Self::Cleanup,
        Self::Planned,
        Self::Unplanned,
        Self::UnplannedAfterShutdown,
        Self::SourceRests,
        Self::SourceDoesNot,
        Self::ChangePoint,
        Self::Commit,
        Self::Reprotect,
        Self::Failback,
    ];

    /// As people know it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Test => "failover --test",
            Self::Cleanup => "failover --cleanup",
            Self::Planned => "failover --planned",
            Self::Unplanned => "failover --unplanned",
            Self::UnplannedAfterShutdown => "failover --unplanned --shutdown-source",
            Self::SourceRests => "the source rests",
            Self::SourceDoesNot => "the source does not",
            Self::ChangePoint => "change-point",
            Self::Commit => "commit",
            Self::Reprotect => "reprotect",
            Self::Failback => "failback",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

const fn to(next: State, actions: &'static [Action]) -> Result<Step, Refusal> {
    Ok(Step { next, actions })
}

const fn no(why: &'static str, advice: &'static str) -> Result<Step, Refusal> {
    Err(Refusal { why, advice })
}

/// A drill that was left open is in nobody's way.
const TAKE_OVER: &[Action] = &[
    Action::TakeLock,
    Action::Promote,
    Action::DiscardDrill,
    Action::OpenBranch,
];
const CLEAN_UP: &str = "end it first: `replica failover VOLUME --cleanup`";
const WAIT: &str = "another command waits for the source to come to rest; wait for it to end";

/// What `event` means in `state`.
///
/// # Errors
/// If it means nothing there: why, and what to do instead.
pub const fn step(state: State, event: Event) -> Result<Step, Refusal> {
    match state {
        State::Replicating => in_replication(event),
        State::TestFailover => in_a_drill(event),
        State::Resting | State::ShuttingDown | State::Returning => while_asked(state, event),
        State::FailedOver => failed_over(event),
        State::Committed => committed(event),
        State::Reversing => reversing(event),
    }
}

const fn in_replication(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Test => to(State::TestFailover, &[Action::OpenDrill]),
        Event::Planned => to(State::Resting, &[Action::AskForRest]),
        Event::UnplannedAfterShutdown => to(State::ShuttingDown, &[Action::AskForRest]),
        Event::Unplanned => to(State::FailedOver, TAKE_OVER),
        Event::Cleanup => no(
            "no drill is open",
            "`replica failover VOLUME --test` opens one",
        ),
        _ => not_failed_over(event),
    }
}

const fn in_a_drill(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Cleanup => to(State::Replicating, &[Action::DiscardDrill]),
        Event::Test => no("a drill is open", CLEAN_UP),
        Event::Planned => no("a drill is open", CLEAN_UP),
        // In earnest nobody shall have to tidy up first.
        Event::Unplanned => to(State::FailedOver, TAKE_OVER),
        Event::UnplannedAfterShutdown => to(State::ShuttingDown, &[Action::AskForRest]),
        _ => not_failed_over(event),
    }
}

const fn not_failed_over(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::SourceRests | Event::SourceDoesNot => no("nobody asked the source", "nothing"),
        _ => no(
            "the volume is not failed over",
            "`replica failover VOLUME --planned` or `--unplanned` comes first",
        ),
    }
}

const fn while_asked(state: State, event: Event) -> Result<Step, Refusal> {
    match (state, event) {
        (State::Returning, Event::SourceRests) => to(
            State::Replicating,
            &[
                Action::BringBack,
                Action::Prove,
                Action::TakeLock,
                Action::Promote,
            ],
        ),
        (State::Returning, Event::SourceDoesNot) => to(State::Reversing, &[Action::TakeBack]),
        (State::Resting, Event::SourceDoesNot) => to(State::Replicating, &[Action::TakeBack]),
        (_, Event::SourceRests | Event::SourceDoesNot) => to(State::FailedOver, TAKE_OVER),
        _ => no("the source is being asked to come to rest", WAIT),
    }
}

const fn failed_over(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::ChangePoint => to(
            State::FailedOver,
            &[
                Action::TakeLock,
                Action::PromoteAgain,
                Action::DiscardBranch,
                Action::OpenBranch,
            ],
        ),
        Event::Commit => to(
            State::Committed,
            &[Action::TakeLock, Action::DropOtherPoints],
        ),
        Event::Reprotect => no(
            "the failover is not committed",
            "choose the point for good: `replica commit VOLUME`",
        ),
        Event::Failback => no(
            "the failover is not committed, nor protected towards the first side",
            "`replica commit VOLUME`, then `replica reprotect VOLUME`",
        ),
        _ => in_use_here(event),
    }
}

const fn committed(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Reprotect => to(State::Reversing, &[Action::TakeLock, Action::AdoptBranch]),
        Event::ChangePoint => no(
            "the failover is committed: the other points are gone",
            "restore from another copy of the store, if there is one",
        ),
        Event::Commit => no("the failover is committed", "nothing is left to commit"),
        Event::Failback => no(
            "it is not protected towards the first side",
            "`replica reprotect VOLUME` comes first",
        ),
        _ => in_use_here(event),
    }
}

const fn reversing(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Failback => to(State::Returning, &[Action::AskForRest]),
        Event::Test | Event::Cleanup | Event::Planned | Event::Unplanned => no(
            "the volume is used here, and protected towards the first side",
            "`replica failback VOLUME`, on that side, brings it home",
        ),
        Event::Reprotect => no(
            "it is protected towards the first side",
            "nothing is left to do",
        ),
        Event::ChangePoint | Event::Commit => no(
            "the failover is committed, and the volume protected again",
            "nothing is left to choose",
        ),
        _ => in_use_here(event),
    }
}

const fn in_use_here(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::SourceRests | Event::SourceDoesNot => no("nobody asked the source", "nothing"),
        _ => no(
            "the volume is failed over, and in use here",
            "`replica status` shows where; `replica change-point` chooses another point before \
             `replica commit`",
        ),
    }
}

/// What a crash may have left undone in a lasting state: the actions behind the durable one that
/// led there. Each may be done again.
pub const fn left_to_do(state: State) -> &'static [Action] {
    match state {
        State::FailedOver => &[
            Action::DiscardDrill,
            Action::DiscardBranch,
            Action::OpenBranch,
        ],
        State::Replicating | State::TestFailover => &[Action::TakeBack],
        State::Committed | State::Reversing => &[Action::OpenBranch],
        State::Resting | State::ShuttingDown | State::Returning => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_one_durable_action_if_it_leads_from_one_lasting_state_to_another() {
        for state in State::ALL {
            for event in Event::ALL {
                let Ok(step) = step(state, event) else {
                    continue;
                };
                let durable = step.actions.iter().filter(|action| action.is_durable());
                let drills = [State::Replicating, State::TestFailover];
                let of_drills = drills.contains(&state) && drills.contains(&step.next);
                let goes_back = step.actions == [Action::TakeBack];
                let lasts = step.next.is_lasting() && !of_drills && !goes_back;
                assert_eq!(durable.count(), usize::from(lasts), "{state}, {event}");
            }
        }
    }

    #[test]
    fn nothing_is_promoted_without_the_lock() {
        for state in State::ALL {
            for event in Event::ALL {
                let Ok(step) = step(state, event) else {
                    continue;
                };
                let place = |wanted: Action| step.actions.iter().position(|a| *a == wanted);
                let durable = step.actions.iter().position(|action| action.is_durable());
                if let Some(durable) = durable {
                    assert!(
                        place(Action::TakeLock).unwrap() < durable,
                        "{state}, {event}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_thrown_away_is_thrown_away_behind_the_durable_action() {
        for state in State::ALL {
            for event in Event::ALL {
                let Ok(step) = step(state, event) else {
                    continue;
                };
                let durable = step.actions.iter().position(|action| action.is_durable());
                let thrown = step.actions.iter().position(|action| {
                    matches!(action, Action::DiscardBranch | Action::DiscardDrill)
                });
                if let (Some(durable), Some(thrown)) = (durable, thrown) {
                    assert!(durable < thrown, "{state}, {event}");
                    let again = left_to_do(step.next);
                    assert!(again.contains(&step.actions[thrown]), "{state}, {event}");
                }
            }
        }
    }

    #[test]
    fn from_everywhere_the_round_can_be_completed() {
        let path = [
            (Event::Unplanned, State::FailedOver),
            (Event::ChangePoint, State::FailedOver),
            (Event::Commit, State::Committed),
            (Event::Reprotect, State::Reversing),
            (Event::Failback, State::Returning),
            (Event::SourceDoesNot, State::Reversing),
            (Event::Failback, State::Returning),
            (Event::SourceRests, State::Replicating),
        ];
        let mut state = State::Replicating;
        for (event, next) in path {
            state = step(state, event).unwrap().next;
            assert_eq!(state, next);
        }
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for state in State::ALL {
            for event in Event::ALL {
                if let Err(refusal) = step(state, event) {
                    assert!(!refusal.why.is_empty() && !refusal.advice.is_empty());
                }
            }
        }
    }
}
