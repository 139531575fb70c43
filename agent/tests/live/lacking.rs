//! What the machine lacks: mounted where it can be, else named, with where it should be. The
//! daemon runs in a mount namespace of its own, or with fewer rights.

use std::fs;

use crate::stage::{Daemon, LoopDevice, MIB, Place, Reply, Volume, assert_restores};

/// Runs `mounts` in a mount namespace of its own, then the rest of the arguments.
fn with_mounts(mounts: &str) -> [String; 6] {
    let script = format!("set -e; {mounts}; exec \"$@\"");
    ["unshare", "--mount", "sh", "-c", &script, "sh"].map(str::to_owned)
}

/// What `protect` says of a daemon that was started so.
fn protect_within(within: &[&str]) -> Reply {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start_within(&place, within);
    let reply = daemon.try_protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    });
    let left = fs::read_dir(store.join("volumes")).unwrap().count();
    assert_eq!(left, 0, "{reply:?}");
    reply
}

#[test]
fn bpffs_is_mounted_where_it_is_missing_and_tracefs_is_not_needed() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    // bpffs over bpffs, gone with the namespace; the folders below it stay.
    let mounts = "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done; \
                  for at in /sys/kernel/tracing /sys/kernel/debug; do \
                  while mountpoint -q $at; do umount --recursive $at; done; done";
    let within = with_mounts(mounts);
    let mut daemon = Daemon::start_within(&place, &within.each_ref().map(String::as_str));
    let id = daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    let root = format!("/proc/{}/root", daemon.pid());
    let pins = format!("{root}/sys/fs/bpf/replica/{id}");
    assert!(fs::metadata(&pins).is_ok(), "{pins}");
    assert!(fs::metadata(format!("/sys/fs/bpf/replica/{id}")).is_err());
    assert!(fs::metadata(format!("{root}/sys/kernel/tracing/events")).is_err());
    fs::write(disk.path(), b"seen without tracefs").unwrap();
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    daemon.assert_no_resync("v");
}

#[test]
fn a_kernel_without_btf() {
    let within = with_mounts("mount -t tmpfs none /sys/kernel/btf");
    protect_within(&within.each_ref().map(String::as_str)).fails(
        1,
        &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF", "eBPF"],
    );
}

#[test]
fn a_bpffs_that_cannot_be_written() {
    let within = with_mounts("mount -t bpf -o ro none /sys/fs/bpf");
    protect_within(&within.each_ref().map(String::as_str))
        .fails(1, &["/sys/fs/bpf/replica", "Read-only file system", "pins"]);
}

#[test]
fn a_place_of_bpffs_that_is_something_else() {
    // A read-only sysfs, as in a container without the right to mount.
    let mounts = "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done";
    let within = with_mounts(mounts);
    let drop = ["setpriv", "--bounding-set=-sys_admin"];
    let words = within.iter().map(String::as_str).chain(drop);
    protect_within(&words.collect::<Vec<_>>())
        .fails(1, &["/sys/fs/bpf", "bpffs", "mount -t bpf bpf /sys/fs/bpf"]);
}

#[test]
fn without_the_right_to_load_programs() {
    let drop = ["setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon"];
    protect_within(&drop).fails(1, &["CAP_BPF", "CAP_PERFMON"]);
}
