//! A state of a volume that was opened: as it was, or with a branch for what is written to it.

use std::ops::ControlFlow;

use crate::capture::nbd::handshake::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::id::BranchId;
use crate::store::{Branch, BranchPurpose, PointPiece, PointSelector, SharedReader, VolumeReader};
use crate::units::{ByteOffset, Extent, Timestamp};

/// What is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A state, to be read only.
    Read(PointSelector),
    /// A state with a new branch, for this purpose.
    Write(PointSelector, BranchPurpose),
    /// A branch that is there.
    Branch(BranchId),
}

/// An opened state of a volume. Any number of threads may use it at once.
#[derive(Debug)]
pub struct Opened {
    volume: VolumeReader,
    geometry: Geometry,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Point(Box<SharedReader>),
    Branch(Box<Branch>),
}

impl Opened {
    /// Opens what is wanted of `volume`.
    ///
    /// # Errors
    /// Those of [`VolumeReader::open_shared`], [`VolumeReader::create_branch`] and
    /// [`VolumeReader::open_branch`].
    pub fn open(volume: &VolumeReader, wanted: Wanted) -> Result<Self> {
        let catalogue = volume.catalogue()?;
        let content = match wanted {
            Wanted::Read(selector) => {
                let state = volume.state(selector)?;
                Content::Point(volume.open_shared(state.id())?.into())
            }
            Wanted::Write(selector, purpose) => {
                let generation = catalogue.next_generation()?;
                Content::Branch(volume.create_branch(selector, purpose, generation)?.into())
            }
            Wanted::Branch(id) => Content::Branch(volume.open_branch(id)?.into()),
        };
        let size = match &content {
            Content::Point(reader) => reader.state().size(),
            Content::Branch(branch) => branch.info().size,
        };
        let geometry = Geometry {
            size,
            ..catalogue.geometry()
        };
        Ok(Self {
            volume: volume.clone(),
            geometry,
            content,
        })
    }

    /// The volume that it is a state of.
    pub const fn volume(&self) -> &VolumeReader {
        &self.volume
    }

    /// Its size and units.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether it can be written to.
    pub const fn access(&self) -> Access {
        match &self.content {
            Content::Point(_) => Access::ReadOnly,
            Content::Branch(_) => Access::ReadWrite,
        }
    }

    /// The branch, if it can be written to.
    pub fn branch(&self) -> Option<&Branch> {
        match &self.content {
            Content::Point(_) => None,
            Content::Branch(branch) => Some(branch),
        }
    }

    /// The branch, for who goes on with it by himself.
    pub fn into_branch(self) -> Option<Branch> {
        match self.content {
            Content::Point(_) => None,
            Content::Branch(branch) => Some(*branch),
        }
    }

    /// When the volume was as the state says.
    pub fn time(&self) -> Timestamp {
        match &self.content {
            Content::Point(reader) => reader.state().time(),
            Content::Branch(branch) => branch.info().time,
        }
    }

    /// What the state is called: a point's id, or a moment.
    pub fn name(&self) -> String {
        match &self.content {
            Content::Point(reader) => match reader.state() {
                crate::store::State::Point(point) => point.id.to_string(),
                crate::store::State::Moment(state) => state.moment.to_string(),
            },
            Content::Branch(branch) => match branch.info().moment {
                Some(moment) => moment.to_string(),
                None => branch.info().point.to_string(),
            },
        }
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// Those of [`SharedReader::read_at`] and [`Branch::read_at`].
    pub fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        match &self.content {
            Content::Point(reader) => reader.read_at(offset, buffer),
            Content::Branch(branch) => branch.read_at(offset, buffer),
        }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it is read-only; those of [`Branch::write`].
    pub fn write(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        self.writable()?.write(offset, data)
    }

    /// Makes `extent` read as zeroes.
    ///
    /// # Errors
    /// As [`Opened::write`].
    pub fn zeroes(&self, extent: Extent) -> Result<()> {
        self.writable()?.zeroes(extent)
    }

    /// Gives `extent` up: it reads as zeroes.
    ///
    /// # Errors
    /// As [`Opened::write`].
    pub fn discard(&self, extent: Extent) -> Result<()> {
        self.writable()?.discard_extent(extent)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// Those of [`Branch::flush`].
    pub fn flush(&self) -> Result<()> {
        self.branch().map_or(Ok(()), Branch::flush)
    }

    /// Tells `each` what it holds in `extent`, in order and without a gap, until it has enough.
    ///
    /// # Errors
    /// As [`Opened::read_at`].
    pub fn pieces_in(
        &self,
        extent: Extent,
        each: &mut dyn FnMut(PointPiece) -> ControlFlow<()>,
    ) -> Result<()> {
        match &self.content {
            Content::Point(reader) => reader.pieces_in(extent, each),
            Content::Branch(branch) => branch.pieces_in(extent, each),
        }
    }

    fn writable(&self) -> Result<&Branch> {
        self.branch().ok_or_else(|| {
            Error::new(ErrorKind::State, "write to an opened point").detail("it is read-only")
        })
    }
}
