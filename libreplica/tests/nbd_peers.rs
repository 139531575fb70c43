//! The NBD front on real loop devices, with programs that others wrote: what they write is
//! on the device, and in the backlog in an order that replays to the same bytes; what they
//! read and are told is true.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod front;

use devices::{MIB, run};
use front::Front;
use libreplica::capture::inline::Change;

fn qemu_io(front: &Front, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", "raw", "-t", "none"];
    commands
        .iter()
        .for_each(|command| arguments.extend(["-c", command]));
    let uri = front.uri();
    arguments.push(&uri);
    let said = run("qemu-io", &arguments);
    assert!(!said.to_lowercase().contains("fail"), "{said}");
    said
}

#[test]
fn qemu_io_does_every_kind_of_request() {
    let front = Front::new(16 * MIB);
    qemu_io(
        &front,
        &[
            "write -P 1 4k 8k",
            "write -f -P 2 512 512",
            "write -P 3 1M 4M",
            "write -z 1M 64k",
            "write -z -f 2M 64k",
            "write -z -u 3M 64k",
            "discard 4M 512k",
            "aio_write -P 4 8M 64k",
            "aio_write -P 5 8256k 64k",
            "aio_write -P 6 8M 512",
            "aio_flush",
            "flush",
            "read -P 1 4k 8k",
            "read -P 2 512 512",
            "read -P 0 1M 64k",
            "read -P 0 2M 64k",
            "read -P 0 3M 64k",
            "read -P 3 1088k 960k",
            "read -P 6 8M 512",
            "read -P 5 8256k 64k",
        ],
    );
    let entries = front.entries();
    let kind = |wanted: fn(&Change) -> bool| entries.iter().filter(|e| wanted(&e.change)).count();
    assert_eq!(kind(|change| matches!(change, Change::Zeroes)), 3);
    assert_eq!(kind(|change| matches!(change, Change::Discard)), 1);
    assert!(kind(|change| matches!(change, Change::Write(_))) >= 6);
    front.assert_replays(&entries);
}
