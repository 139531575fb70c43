//! The operator's commands: each asks the daemon, or reads a store by itself.

pub mod adopt;
pub mod drill;
pub mod failover;
pub mod group;
pub mod home;
pub mod machine;
pub mod migrate;
pub mod open;
pub mod open_store;
pub mod plan;
pub mod point;
pub mod points;
pub mod protect;
pub mod restore;
pub mod serve_branch;
pub mod status;
pub mod store_check;
pub mod volume;
