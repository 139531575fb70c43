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

use std::path::Path;
use std::process::Command;

use devices::{Loop, MIB, Random, run};
use front::Front;
use libreplica::capture::inline::Change;
use libreplica::geometry::{BlockNumber, Run};

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

/// Bytes that differ from place to place, in a file of its own.
fn noise(path: &Path, len: u64) -> Vec<u8> {
    let mut random = Random(len + 1);
    let words = (0..len / 8).flat_map(|_| random.next().to_le_bytes());
    let bytes: Vec<u8> = words.collect();
    std::fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn nbdcopy_copies_in_and_out_over_many_connections() {
    let front = Front::new(64 * MIB);
    let (uri, folder) = (front.uri(), front.folder.path());
    let (input, output) = (folder.join("in"), folder.join("out"));
    let bytes = noise(&input, 64 * MIB);
    let many = ["--connections=4", "--requests=32", "--threads=2"];
    run(
        "nbdcopy",
        &[&many[..], &["--flush", input.to_str().unwrap(), &uri]].concat(),
    );
    assert!(bytes == std::fs::read(&front.disk.file).unwrap());
    let small = ["--request-size=65536", &uri, output.to_str().unwrap()];
    run("nbdcopy", &[&many[..], &small].concat());
    assert!(bytes == std::fs::read(&output).unwrap());
    front.assert_replays(&front.entries());
    // Zeroes over all, then what QEMU's tools make of it.
    std::fs::write(&input, vec![0; 64 << 20]).unwrap();
    let sparse = ["convert", "-n", "-f", "raw", "-O", "raw"];
    run(
        "qemu-img",
        &[&sparse[..], &[input.to_str().unwrap(), &uri]].concat(),
    );
    let compare = [
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        input.to_str().unwrap(),
        &uri,
    ];
    run("qemu-img", &compare);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let front = Front::new(32 * MIB);
    let uri = format!("--uri={}", front.uri());
    let state = front.folder.path().to_str().unwrap();
    let common = [
        "--name=t",
        "--ioengine=nbd",
        &uri,
        "--size=32M",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--iodepth=32",
    ];
    let mixed = [
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=0",
        "--blockalign=512",
    ];
    for how in [&["--rw=randwrite", "--bs=4k", "--fsync=64"][..], &mixed] {
        let output = Command::new("fio")
            .args(common)
            .args(how)
            .current_dir(state)
            .output();
        let output = output.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    front.assert_replays(&front.entries());
}

fn run_of(start: u64, end: u64) -> Run {
    let (start, end) = (BlockNumber::new(start), BlockNumber::new(end));
    Run { start, end }
}

#[test]
fn nbdinfo_shows_the_export_and_what_changed() {
    let front = Front::new(16 * MIB);
    front.set.set_run(run_of(0, 1));
    front.set.set_run(run_of(16, 48));
    front.set.set_run(run_of(4095, 4096));
    let uri = front.uri();
    let all = run("nbdinfo", &["--json", &uri]);
    for property in [
        "\"export-size\": 16777216",
        "\"is_read_only\": false",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_fast_zero\": false",
        "\"can_multi_conn\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"base:allocation\"",
        "\"qemu:dirty-bitmap:since-test\"",
    ] {
        assert!(all.contains(property), "{property} in {all}");
    }
    let map = |context: &str| {
        let map = run("nbdinfo", &[&format!("--map={context}"), &uri]);
        let numbers = |line: &str| {
            let mut words = line.split_whitespace().map(str::to_owned);
            let mut next = || words.next().unwrap().parse::<u64>().unwrap();
            (next(), next(), next())
        };
        map.lines().map(numbers).collect::<Vec<_>>()
    };
    assert_eq!(map("base:allocation"), [(0, 16 * MIB, 0)]);
    let dirty = [
        (0, 4096, 1),
        (4096, 15 * 4096, 0),
        (16 * 4096, 32 * 4096, 1),
        (48 * 4096, 4047 * 4096, 0),
        (4095 * 4096, 4096, 1),
    ];
    assert_eq!(map("qemu:dirty-bitmap:since-test"), dirty);
    // More stretches than one reply has room for.
    (0..4096)
        .step_by(2)
        .for_each(|n| front.set.set_run(run_of(n, n + 1)));
    front.set.clear_run(run_of(16, 4096));
    (16..4096)
        .step_by(2)
        .for_each(|n| front.set.set_run(run_of(n, n + 1)));
    let found = map("qemu:dirty-bitmap:since-test");
    assert_eq!(found.len(), 4096);
    assert!(
        found
            .iter()
            .all(|&(at, len, state)| len == 4096 && state == 1 - at / 4096 % 2)
    );
    let qemu = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:since-test",
        front.socket().display()
    );
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &qemu]);
    // QEMU shows what is dirty as what is not data.
    assert_eq!(map.matches("\"data\": false").count(), 2048);
    let listed = run("nbdinfo", &["--list", &uri]);
    assert!(listed.contains("export=\"\""), "{listed}");
}

#[test]
fn a_device_of_long_sectors_says_so() {
    let disk = Loop::with(16 * MIB, &["--sector-size", "4096"]);
    let front = Front::over(disk, |options| options.export = "the volume".to_owned());
    let all = run("nbdinfo", &["--json", &front.uri()]);
    assert!(all.contains("\"block_size_minimum\": 4096"), "{all}");
    // QEMU reads what it must to write less.
    qemu_io(
        &front,
        &["write -P 7 512 1k", "read -P 7 512 1k", "read -P 0 0 512"],
    );
    front.assert_replays(&front.entries());
    let named = front.uri().replace(":///", ":///the%20volume");
    assert!(run("nbdinfo", &["--size", &named]).contains("16777216"));
    let other = front.uri().replace(":///", ":///other");
    assert!(
        !Command::new("nbdinfo")
            .arg(other)
            .output()
            .unwrap()
            .status
            .success()
    );
}
