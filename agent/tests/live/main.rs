//! The agent on real block devices: the binary is run as an operator runs it, on loop and
//! zram devices that the tests make, and what comes back from the store is compared with
//! what was there. As root. One program for all stories, so that it is linked once; each
//! file is one story.
//!
//! The numbers that cost time come from the environment: see CONTRIBUTING.md.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bad_device;
mod bad_store;
mod behind;
mod contract;
mod control;
mod daemons;
mod disk_layout;
mod drills;
mod encryption;
mod failover;
mod filesystems;
mod freeze;
mod groups;
mod homeward;
mod inline;
mod killed_steps;
mod kills;
mod lacking;
mod log_files;
mod migrations;
mod open;
mod overwrite;
mod pace;
mod phases;
mod plans;
#[path = "../../../libreplica/tests/rig/reboot.rs"]
mod reboot;
mod recall;
mod resyncs;
mod root_disk;
mod seeding;
mod service;
mod several;
mod stage;
mod taken_over;
mod there_and_back;
mod tiers;
mod writes;
