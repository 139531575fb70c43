//! A file system with little room, for the tests of what happens when there is none: it is
//! mounted in a folder of its own, and taken away when the test ends.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::{Loop, run};

/// A small file system; it is taken away when the test ends.
pub struct Small {
    folder: tempfile::TempDir,
    _disk: Option<Loop>,
}

impl Small {
    pub fn tmpfs(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().to_str().unwrap();
        let size = format!("size={bytes}");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", at]);
        let _disk = None;
        Self { folder, _disk }
    }

    pub fn ext4(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = Loop::new(bytes);
        let device = disk.path.to_str().unwrap();
        run("mkfs.ext4", &["-q", device]);
        run("mount", &[device, folder.path().to_str().unwrap()]);
        let _disk = Some(disk);
        Self { folder, _disk }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all the room that is left.
    pub fn fill(&self) {
        let mut file = File::create(self.path().join("ballast")).unwrap();
        for piece in [64 << 10, 4096, 512] {
            while file
                .write_all(&vec![7; piece])
                .and_then(|()| file.sync_all())
                .is_ok()
            {}
        }
    }

    /// Gives that room back.
    pub fn empty(&self) {
        std::fs::remove_file(self.path().join("ballast")).unwrap();
        // ext4 gives it when the removal is durable.
        run("sync", &["-f", self.path().to_str().unwrap()]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        run("umount", &["--lazy", self.path().to_str().unwrap()]);
    }
}
