//! A volume served over NBD for a test: a loop device, inline capture in data mode, the
//! server; all of it taken down when the test ends.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../shipper/mod.rs"]
mod shipper;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use libreplica::bitmap::Bitmap;
use libreplica::capture::inline::{Entry, Service};
use libreplica::capture::nbd::{Contexts, NbdOptions, NbdServer, Stretch, stretches};
use libreplica::geometry::Geometry;
use libreplica::units::Extent;

use crate::devices::Loop;
use shipper::{climb, replay, spec_of, take_all};

/// Contexts that are bitmaps by name.
pub struct Named {
    pub geometry: Geometry,
    pub sets: Vec<(String, Arc<Bitmap>)>,
}

impl Contexts for Named {
    fn list(&self) -> Vec<String> {
        self.sets.iter().map(|(name, _)| name.clone()).collect()
    }

    fn dirty(
        &self,
        name: &str,
        extent: Extent,
        visit: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> libreplica::Result<()> {
        let found = self.sets.iter().find(|(known, _)| known == name);
        let missing = || libreplica::Error::new(libreplica::ErrorKind::NotFound, "find a name");
        let (_, set) = found.ok_or_else(missing)?;
        stretches(set, &self.geometry, extent, visit);
        Ok(())
    }
}

/// The volume and its server.
pub struct Front {
    // In the order in which they must end.
    pub server: Option<NbdServer>,
    pub service: Option<Service>,
    pub disk: Loop,
    pub set: Arc<Bitmap>,
    pub folder: tempfile::TempDir,
}

impl Front {
    /// A volume of `size` bytes, and a context `since-test`.
    pub fn new(size: u64) -> Self {
        Self::over(Loop::new(size), |_| {})
    }

    pub fn over(disk: Loop, change: impl FnOnce(&mut NbdOptions)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec_of(&disk.path, folder.path(), 1 << 30);
        let (service, _) = Service::start(&spec).unwrap();
        climb(&service);
        let geometry = service.geometry();
        let set = Arc::new(Bitmap::new(geometry.blocks()));
        let sets = vec![("since-test".to_owned(), Arc::clone(&set))];
        let mut options = NbdOptions::new(folder.path().join("nbd.sock"));
        change(&mut options);
        let contexts = Arc::new(Named { geometry, sets });
        let server = NbdServer::start(service.entrance(), options, contexts).unwrap();
        Self {
            server: Some(server),
            service: Some(service),
            disk,
            set,
            folder,
        }
    }

    pub fn server(&self) -> &NbdServer {
        self.server.as_ref().unwrap()
    }

    pub fn service(&self) -> &Service {
        self.service.as_ref().unwrap()
    }

    pub fn uri(&self) -> String {
        self.server().uri()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// The backlog, emptied.
    pub fn entries(&self) -> Vec<Entry> {
        take_all(self.service())
    }

    /// The device holds what `entries` make of zeroes.
    pub fn assert_replays(&self, entries: &[Entry]) {
        let mut image = vec![0; std::fs::metadata(&self.disk.file).unwrap().len() as usize];
        self.assert_goes_on(&mut image, entries);
    }

    /// The device holds what `entries` make of `image`, which is made that.
    pub fn assert_goes_on(&self, image: &mut [u8], entries: &[Entry]) {
        let now = std::fs::read(&self.disk.file).unwrap();
        replay(image, entries);
        assert!(image == now, "the backlog does not replay to the device");
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.server = None;
        self.service = None;
    }
}
