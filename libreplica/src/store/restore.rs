//! Restoring: a point streamed into a file or onto a device. One thread reads ahead, decrypts and
//! decompresses; the other computes the root of the digest tree from the very bytes that it
//! writes. If the point says what its root must be, and it is not that, the restore failed.

use std::path::Path;
use std::sync::mpsc;
use std::thread;

use hrl_format::units::{ByteLen, ByteOffset, Extent};

use super::output::{Image, Overwrite, Progress, Target, refuse_store};
use super::point_reader::{PART, Part, PointReader};
use super::reader::VolumeReader;
use super::state::{State, StateId};
use crate::digest::{LeafFunction, RootBuilder};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;

/// How many parts of at most 4 MiB the reading thread may be ahead.
const AHEAD: usize = 4;

const RESTORE: &str = "restore a recovery point";

/// How a point is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// What to do with a file or device that is there already.
    pub overwrite: Overwrite,
}

impl RestoreOptions {
    /// With this for a file or device that is there already.
    #[must_use]
    pub const fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// What.
    pub state: State,
    /// How much of it was data, in bytes; the rest is zeroes.
    pub data: ByteLen,
    /// How much of the file or device was written or zeroed, in bytes: all of it, unless it was
    /// only [brought up to date](Overwrite::Update).
    pub written: ByteLen,
    /// Whether it was proved to be what was captured.
    pub proof: RestoreProof,
}

/// How far a restored volume is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreProof {
    /// The root of the digest tree, computed from all of it, is the point's.
    Root,
    /// It is no point, or one that carries no root. The checksums of the logs held; those of a raw base do not exist.
    None,
}

impl VolumeReader {
    /// Restores a point, or a moment between two, to `output`: a file, which becomes sparse, or a block device, of which as
    /// much is written as the volume is large. `progress` is called some times a second.
    ///
    /// # Errors
    /// Those of [`VolumeReader::open`]. [`ErrorKind::Exists`] if the output is there and may not be
    /// replaced; [`ErrorKind::Busy`] if it is in use; [`ErrorKind::Invalid`] if it is too small, has
    /// larger sectors, or lies within a store, whichever that is; [`ErrorKind::Full`]. [`ErrorKind::Damaged`] if the point's root, or a checksum
    /// on the way, is not what it must be. A file appears only if all went well.
    pub fn restore(
        &self,
        state: impl Into<StateId>,
        output: &Path,
        options: &RestoreOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Restored> {
        refuse_store(output)?;
        let mut reader = self.open(state)?;
        let geometry = Geometry {
            size: reader.state().size(),
            ..self.catalogue()?.geometry()
        };
        let image = Image {
            size: geometry.size,
            sector: geometry.sector,
        };
        let target = Target::open(output, image, options.overwrite)?;
        let leaves = LeafFunction::for_volume(self.key.as_ref());
        let mut sink = Sink {
            target: &target,
            root: reader
                .state()
                .root()
                .map(|_| RootBuilder::new(geometry, leaves)),
            at: ByteOffset::ZERO,
            data: 0,
            total: ByteLen::new(geometry.size.get()),
            progress,
        };
        let copied = copy(&mut reader, &mut sink);
        let (data, root) = (ByteLen::new(sink.data), sink.root);
        let checked = copied.and_then(|()| root.map(RootBuilder::finish).transpose());
        let root = match checked {
            Ok(root) => root,
            Err(error) => {
                target.abandon();
                return Err(error);
            }
        };
        let state = reader.state().clone();
        if root != state.root() {
            return Err(Error::new(ErrorKind::Damaged, RESTORE)
                .path(target.path())
                .detail(format!(
                    "{state} is not what was captured: its root differs"
                ))
                .advice("the damaged copy was left there; `replica store check` finds the cause"));
        }
        let written = target.written();
        target.finish()?;
        Ok(Restored {
            written,
            proof: root.map_or(RestoreProof::None, |_| RestoreProof::Root),
            state,
            data,
        })
    }
}

/// A part on its way from one thread to the other.
enum Owned {
    Data(Vec<u8>),
    Zeroes(ByteLen),
}

/// Takes the parts in the volume's order.
struct Sink<'a> {
    target: &'a Target,
    root: Option<RootBuilder>,
    at: ByteOffset,
    data: u64,
    total: ByteLen,
    progress: &'a mut dyn FnMut(Progress),
}

impl Sink<'_> {
    fn take(&mut self, part: &Owned) -> Result<()> {
        let len = match part {
            Owned::Data(data) => {
                self.target.write(self.at, data)?;
                if let Some(root) = &mut self.root {
                    root.data(data)?;
                }
                self.data += data.len() as u64;
                ByteLen::new(data.len() as u64)
            }
            Owned::Zeroes(len) => {
                let extent = Extent::new(self.at, *len).unwrap_or_default();
                self.target.zeroes(extent)?;
                if let Some(root) = &mut self.root {
                    root.zeroes(*len)?;
                }
                *len
            }
        };
        self.at = ByteOffset::new(self.at.get() + len.get());
        (self.progress)(Progress {
            done: ByteLen::new(self.at.get()),
            total: self.total,
        });
        Ok(())
    }
}

/// Streams the point into `sink`, reading in a thread of its own.
fn copy(reader: &mut PointReader, sink: &mut Sink<'_>) -> Result<()> {
    let (parts, incoming) = mpsc::sync_channel(AHEAD);
    let (used, spare) = mpsc::channel::<Vec<u8>>();
    thread::scope(|scope| {
        let reading = scope.spawn(move || {
            reader.stream(|part| {
                let part = match part {
                    Part::Data(buffer) => {
                        let next = spare
                            .try_recv()
                            .unwrap_or_else(|_| Vec::with_capacity(PART));
                        Owned::Data(std::mem::replace(buffer, next))
                    }
                    Part::Zeroes(len) => Owned::Zeroes(len),
                };
                // It hangs up only with an error of its own to report.
                parts
                    .send(part)
                    .map_err(|_| Error::new(ErrorKind::Io, RESTORE))
            })
        });
        let written = incoming.iter().try_for_each(|part| {
            sink.take(&part)?;
            if let Owned::Data(buffer) = part {
                // The reader may have ended; then nobody needs it.
                let _ = used.send(buffer);
            }
            Ok(())
        });
        drop(incoming);
        let read = reading
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(read)
    })
}
