//! The image at its newest epoch, whether that is a recovery point or not: what the
//! writer's own driver compares its source with, and makes its digest tree from, and what
//! has changed on the way there. Nobody restores from here.

use hrl_format::VolumeKey;
use hrl_format::id::PointId;
use hrl_format::units::{ByteOffset, Epoch, Extent, Timestamp};

use super::catalogue::Catalogue;
use super::layers::Layers;
use super::layout::VolumeFolder;
use super::lease::{Lease, Wanted};
use super::moment::Moment;
use super::point_reader::PointReader;
use super::reader::VolumeReader;
use super::sources::{OpenFiles, open_log};
use super::state::{MomentState, State};
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, Result};

/// The image at its newest epoch, open for reading.
pub struct TipReader(PointReader);

impl TipReader {
    /// Fills `buffer` with what the image holds from `offset` on.
    ///
    /// # Errors
    /// As [`PointReader::read_at`].
    pub fn read_at(&mut self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

impl VolumeWriter {
    /// Opens the image at its newest epoch.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) if a log that it needs is not what the
    /// catalogue says; what the system refuses.
    pub fn read_tip(&self) -> Result<TipReader> {
        let (lease, catalogue) = Lease::take(&self.folder, Wanted::View)?;
        let (logs, size) = (&catalogue.logs, catalogue.size);
        let layers = Layers::open(&self.folder, &catalogue, logs, size, self.key.as_ref())?;
        let here = MomentState {
            moment: Moment {
                epoch: catalogue.last_epoch().next(),
                after: None,
            },
            time: Timestamp::now(),
            size,
            point: None,
        };
        let here = State::Moment(here);
        Ok(TipReader(PointReader::new(lease, here, layers)))
    }

    /// What the epochs after `epoch` changed, in no order; `None` if their logs are not all
    /// there any more.
    ///
    /// # Errors
    /// As [`VolumeWriter::read_tip`], when a log is read.
    pub fn changed_since(&self, epoch: Epoch) -> Result<Option<Vec<Extent>>> {
        changed(&self.folder, self.catalogue(), self.key.as_ref(), epoch)
    }
}

/// What changed after a recovery point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedSince {
    /// The newest epoch that was looked at.
    pub newest: Epoch,
    /// Where, in no order.
    pub extents: Vec<Extent>,
}

impl VolumeReader {
    /// What the epochs after a recovery point changed. Needs no key.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the point is not there any more; as
    /// [`VolumeReader::catalogue`], and when a log cannot be read.
    pub fn changed_since(&self, point: PointId) -> Result<ChangedSince> {
        let (_lease, catalogue) = self.lease(Wanted::View)?;
        let listed = catalogue.points.iter().find(|listed| listed.id == point);
        let extents = match listed {
            Some(point) => changed(&self.folder, &catalogue, self.key.as_ref(), point.epoch)?,
            None => None,
        };
        match extents {
            Some(extents) => Ok(ChangedSince {
                newest: catalogue.last_epoch(),
                extents,
            }),
            None => Err(
                Error::new(ErrorKind::NotFound, "say what changed since a point")
                    .volume(catalogue.volume)
                    .detail(format!("there is no point {point}"))
                    .advice("`replica points` lists those that there are"),
            ),
        }
    }
}

fn changed(
    folder: &VolumeFolder,
    catalogue: &Catalogue,
    key: Option<&VolumeKey>,
    epoch: Epoch,
) -> Result<Option<Vec<Extent>>> {
    let newer = catalogue.logs.partition_point(|log| log.last <= epoch);
    let newer = &catalogue.logs[newer..];
    let follows = newer.first().is_none_or(|log| log.first == epoch.next());
    let base = catalogue.base.as_ref();
    if !follows || base.is_none_or(|base| base.epoch > epoch) {
        return Ok(None);
    }
    let mut changed = Vec::new();
    for entry in newer {
        let files = OpenFiles::default().into();
        let log = open_log(folder, entry, &files, key)?;
        for item in log.log.index() {
            let item = item.map_err(|source| Error::log("read the index of a log", source))?;
            changed.push(item.extent);
        }
    }
    Ok(Some(changed))
}
