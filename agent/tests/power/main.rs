//! Power cuts: a machine that replicates a volume through ublk loses its power at a random
//! moment under load, again and again. After each cut the machine of the next boot has
//! nothing but its disks. What must hold then:
//!
//! - what is compared is no more than what the activity log names and what the ledger of
//!   dirty blocks had on the disk;
//! - then the newest recovery point is what the disk holds, to the last byte;
//! - and everything that was durable before the cut is in it.
//!
//! The machine is QEMU (`scripts/vm`), killed. That takes with it all that its kernel had in
//! memory, files that were mapped and not yet written among it. Of what was written to a disk
//! and not flushed, a disk with a volatile cache loses everything, and one without nothing:
//! each disk of a run is one or the other, at random. (The first is nbdkit with its cache
//! filter, killed as well; the second a file, whose pages the host keeps.)
//!
//! This program runs in two roles: on the host it is whoever cuts the power; in the machine it
//! is what starts at boot. `scripts/vm-test` runs it, and says with `REPLICA_VM_RUN` where
//! `scripts/vm` is. `REPLICA_POWER_CUTS` says how many cuts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "the stories beside use the rest of the stage")]

mod host;
mod kept;
mod machine;
#[path = "../../../libreplica/tests/rig/runner.rs"]
mod runner;
#[path = "../live/stage/mod.rs"]
#[allow(unused_imports, reason = "as above")]
mod stage;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, rest @ ..] = &arguments[..]
        && role == machine::ROLE
    {
        machine::boot(rest);
        return ExitCode::SUCCESS;
    }
    if std::env::var_os(host::RUN).is_none() {
        println!("beside the test bench only: scripts/vm-test");
        return ExitCode::SUCCESS;
    }
    runner::run(&[(
        "what_a_power_cut_leaves_is_compared_and_nothing_is_lost",
        host::what_a_power_cut_leaves_is_compared_and_nothing_is_lost,
    )])
}
