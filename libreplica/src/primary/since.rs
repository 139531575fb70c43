//! What changed since each recovery point, for the users of a device that is served over NBD:
//! backup tools read it as QEMU's dirty bitmaps. It comes from the indexes of the logs after
//! the point, and from what is not shipped yet; no lock of the volume is needed, so that a
//! tool neither waits for a point that is being made nor holds one up. Nor does it hold the
//! volume's service: a store that hangs does so without those who are served.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use hrl_format::id::{PointId, VolumeId};
use hrl_format::units::{Epoch, Extent};

use crate::bitmap::Bitmap;
use crate::capture::inline::Service;
use crate::capture::nbd::{Contexts, Stretch, stretches};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Geometry, Run};
use crate::primary::volume::locked;
use crate::store::{Store, VolumeReader};

/// What names begin with; the point's id follows.
const SINCE: &str = "since-";

/// What changed since each recovery point of one volume.
pub struct Since {
    store: PathBuf,
    volume: VolumeId,
    geometry: Geometry,
    service: Weak<Service>,
    newest: Mutex<Option<Known>>,
}

/// What the logs after a point say, up to an epoch.
struct Known {
    point: PointId,
    epoch: Epoch,
    set: Bitmap,
}

impl Since {
    /// Of a volume in `store` whose users go through `service`.
    pub fn new(store: PathBuf, volume: VolumeId, service: &Arc<Service>) -> Self {
        Self {
            store,
            volume,
            geometry: service.geometry(),
            service: Arc::downgrade(service),
            newest: Mutex::new(None),
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
        if let Some(known) = &*newest
            && (known.point, known.epoch) == (point, last)
        {
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
        *newest = Some(Known {
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
            Some(service) => service.add_dirty(&set, run),
            None => set.set_run(run),
        }
        self.add_shipped(point, &set, run).inspect_err(|error| {
            tracing::warn!(volume = %self.volume, "what changed cannot be said: {error}");
        })?;
        stretches(&set, &self.geometry, extent, visit);
        Ok(())
    }
}
