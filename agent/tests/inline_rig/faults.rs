//! A disk that refuses writes, behind the real agent.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::mapping::{Mapping, broken, linear, unwritable};
use super::served::{Direct, Served};
use super::stage::{Daemon, LoopDevice, MIB, Place, assert_restores, restore, until};

const SIZE: u64 = 8 * MIB;
/// Bytes of each kind of fault are filled with a number of their own.
const BEFORE: u8 = 1;
const IN_HOLE: u8 = 2;
const REFUSED: u8 = 3;
const AFTER: u8 = 4;

#[track_caller]
fn assert_refused(written: io::Result<()>) {
    let error = written.expect_err("the disk cannot have taken it");
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
}

/// Errors go to who wrote; nothing that failed is in any state that can be restored; what the
/// disk holds there is read back, so that the next point is what it has.
pub fn what_a_disk_refuses_reaches_the_writer_and_no_log(capture: &str) {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", SIZE);
    let good = [linear(0, SIZE, disk.path(), 0)];
    // In the midst of a write that dm cuts in three.
    let (hole, rest) = (MIB + 4096, MIB + 8192);
    let with_hole = [
        linear(0, hole, disk.path(), 0),
        broken(hole, 4096),
        linear(rest, SIZE - rest, disk.path(), rest),
    ];
    let mapping = Mapping::new("faulty", &good);
    let daemon = Daemon::start(&place);
    let served = Served::protect(&daemon, mapping.path(), &store, capture);
    let device = Direct::open(served.path());
    device.write(BEFORE, MIB, 16384).unwrap();

    mapping.becomes(&with_hole);
    assert_refused(device.write(IN_HOLE, MIB, 16384));
    // Beside it all is well, and stays so; a point cannot be, for nobody knows what it has.
    device.write(AFTER, 2 * MIB, 4096).unwrap();
    let status = daemon.until("it is told", "v", |status| {
        status["counters"]["writes_refused"] == 1
    });
    let message = status["last_error"]["message"].as_str().unwrap();
    assert!(message.contains("refused 1 changes"), "{message}");
    assert!(daemon.log_text().contains("refused 1 changes"));
    daemon
        .replica(&["point", "v"])
        .fails(1, &["could not be read back yet"]);
    mapping.becomes(&good);
    let read_back = next_point(&daemon);

    mapping.becomes(&[unwritable(SIZE, disk.path())]);
    assert_refused(device.write(REFUSED, 4 * MIB, 8192));
    let of = format!("of={}", served.path().display());
    let dd = ["if=/dev/zero", &of, "bs=64k", "count=1", "seek=80"];
    let mut command = Command::new("dd");
    let errors = command.args(dd).arg("conv=fsync").output().unwrap();
    assert!(!errors.status.success());
    let errors = String::from_utf8_lossy(&errors.stderr).into_owned();
    assert!(errors.contains("Input/output error"), "{errors}");
    // Everybody who has it open is told once.
    assert_refused(device.sync());
    let unwritten = next_point(&daemon);
    mapping.becomes(&good);
    device.write(AFTER, 4 * MIB + 4096, 4096).unwrap();
    device.sync().unwrap();
    drop(device);
    let last = daemon.point("v", &[]);
    let status = daemon.status("v");
    assert_eq!(status["state"], "replicating", "{status}");
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
    drop(served);
    daemon.unprotect("v");
    drop(daemon);
    assert_restores(&place, &store, "v", &last, mapping.path());

    let content = |point: &str| fs::read(restore(&place, &store, "v", point)).unwrap();
    let image = content(&read_back);
    let hole = hole as usize;
    assert!(image[hole..hole + 4096].iter().all(|byte| *byte == BEFORE));
    let image = content(&unwritten);
    assert!(
        image[4 << 20..(4 << 20) + 8192]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_in_no_log(&store);
}

/// The next point, once what failed has been read back.
fn next_point(daemon: &Daemon) -> String {
    until("a point is made", Duration::from_secs(60), || {
        let reply = daemon.replica(&["point", "v"]);
        (reply.code == 0).then(|| reply.ok().to_owned())
    })
}

/// What was refused whole is in no record of the store.
fn assert_in_no_log(store: &Path) {
    let volume = fs::read_dir(store.join("volumes")).unwrap().next().unwrap();
    let logs = fs::read_dir(volume.unwrap().path().join("logs")).unwrap();
    for log in logs {
        let path = log.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let refused = bytes
            .windows(512)
            .any(|part| part.iter().all(|b| *b == REFUSED));
        assert!(!refused, "{}", path.display());
    }
}
