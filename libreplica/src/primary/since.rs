//! What changed since each recovery point, for the users of a device that is served over NBD:
//! backup tools read it as QEMU's dirty bitmaps. It comes from the indexes of the logs after
//! the point, and from what is not shipped yet; no lock of the volume is needed, so that a
//! tool neither waits for a point that is being made nor holds one up. Nor does it hold the
//! volume's service: a store that hangs does so without those who are served. While a resync is
//! owed, what changed is not known, and all of it is told as changed.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use hrl_format::id::{PointId, VolumeId};
use hrl_format::units::{Epoch, Extent};

use crate::bitmap::Bitmap;
use crate::capture::inline::Service;
use crate::capture::nbd::{Contexts, Stretch, stretches};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Geometry, Run};
use crate::primary::config::Phase;
use crate::primary::volume::locked;
use crate::store::{Store, VolumeReader};

/// What names begin with; the point's id follows.
const SINCE: &str = "since-";

/// Points of which it is remembered what the logs behind them say.
const REMEMBERED: usize = 4;

/// Whether all that changed since the points is in the store, or known to be missing there.
#[derive(Debug, Default)]
pub struct Knowledge(AtomicBool);

impl Knowledge {
    /// It is in this phase of the volume, or is not. At first it is not, for the store may have
    /// been put back to an older state.
    pub fn follows(&self, phase: &Phase) {
        self.0
            .store(*phase == Phase::Replicating, Ordering::Release);
    }

    fn is_whole(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What changed since each recovery point of one volume.
pub struct Since {
    store: PathBuf,
    volume: VolumeId,
    geometry: Geometry,
    service: Weak<Service>,
    knowledge: Arc<Knowledge>,
    newest: Mutex<VecDeque<Known>>,
}

/// What the logs after a point say, up to an epoch.
struct Known {
    point: PointId,
    epoch: Epoch,
    set: Bitmap,
}

impl Since {
    /// Of a volume in `store` whose users go through `service`.
    pub fn new(
        store: PathBuf,
        volume: VolumeId,
        service: &Arc<Service>,
        knowledge: &Arc<Knowledge>,
    ) -> Self {
        Self {
            knowledge: Arc::clone(knowledge),
            store,
            volume,
            geometry: service.geometry(),
            service: Arc::downgrade(service),
            newest: Mutex::default(),
        }
    }

    /// Which extents changed, and when, is readable without the key.
    fn reader(&self) -> Result<VolumeReader> {
        Store::open(&self.store)?.volume(self.volume, None)
    }

    /// Adds what the logs after `point` changed in `run`.
    fn add_shipped(&self, point: PointId, set: &Bitmap, run: Run) -> Result<()> {
        let reader = self.reader()?;
        let last = reader.catalogue()?.last_epoch();
        let mut newest = locked(&self.newest);
        let mut all = newest.iter();
        if let Some(known) = all.find(|known| (known.point, known.epoch) == (point, last)) {
            set.merge_run_from(&known.set, run);
            return Ok(());
        }
        let changed = reader.changed_since(point)?;
        let known = Bitmap::new(self.geometry.blocks());
        for extent in changed.extents {
            if let Some(run) = self.geometry.run_of(extent) {
                known.set_run(run);
            }
        }
        set.merge_run_from(&known, run);
        newest.retain(|known| known.point != point);
        newest.truncate(REMEMBERED - 1);
        newest.push_front(Known {
            point,
            epoch: changed.newest,
            set: known,
        });
        Ok(())
    }
}

impl Contexts for Since {
    fn list(&self) -> Vec<String> {
        let points = self.reader().and_then(|reader| reader.points());
        let points = points.unwrap_or_else(|error| {
            tracing::warn!(volume = %self.volume, "its points cannot be named to clients: {error}");
            Vec::new()
        });
        let named = points.iter().map(|point| format!("{SINCE}{}", point.id));
        named.collect()
    }

    fn dirty(
        &self,
        name: &str,
        extent: Extent,
        visit: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> Result<()> {
        let point = name.strip_prefix(SINCE).and_then(|id| id.parse().ok());
        let Some(point) = point else {
            return Err(
                Error::new(ErrorKind::NotFound, "say what changed since a point")
                    .volume(self.volume)
                    .detail(format!("`{name}` names no point")),
            );
        };
        let Some(run) = self.geometry.run_of(extent) else {
            return Ok(());
        };
        let set = Bitmap::new(self.geometry.blocks());
        // First what is not shipped: what is shipped meanwhile is met a second time, not missed.
        match self.service.upgrade() {
            Some(service) if self.knowledge.is_whole() => service.add_dirty(&set, run),
            _ => set.set_run(run),
        }
        self.add_shipped(point, &set, run).inspect_err(|error| {
            tracing::warn!(volume = %self.volume, "what changed cannot be said: {error}");
        })?;
        stretches(&set, &self.geometry, extent, visit);
        Ok(())
    }
}
