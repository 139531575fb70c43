//! Failover as a state machine: what may be asked of a volume in which state, and what is then
//! to be done, in which order. Pure: an event in, the next state and actions out. Whoever acts
//! (the drivers of rank 4, or a simulation) keeps the state in the store's catalogue, and makes
//! it durable at the action that says so; every action before that may be undone, every one
//! behind it done again. So whoever starts after a crash finds the old state or the new one,
//! and knows what is left to do ([`left_to_do`]).
//!
//! The table of all of it is docs/failover.md, which a test compares with this code.

mod machine;

pub use machine::{Action, Event, Refusal, State, Step, left_to_do, step};
