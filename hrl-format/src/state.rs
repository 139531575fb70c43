//! What a log's records come to, kept while they pass by: the final state of every extent,
//! the marks, and the volume's size. The writer seals it; a salvage rebuilds it.

use crate::extents::{DataOffset, ExtentMap};
use crate::frame::{FrameBuffer, MarkDetail, Shape, TableEntry, TagMark};
use crate::seal::Mark;
use crate::units::{FrameNumber, Sequence, Timestamp, VolumeSize};

/// Where a record stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub frame: FrameNumber,
    /// Which of the frame's records it is.
    pub record: u32,
    pub sequence: Sequence,
    pub time: Timestamp,
    /// Where its data is in the frame's.
    pub at: DataOffset,
}

/// The state after the records so far.
#[derive(Debug)]
pub(crate) struct LogState {
    pub extents: ExtentMap,
    pub marks: Vec<Mark>,
    pub volume_size: VolumeSize,
}

impl LogState {
    pub(crate) fn new(volume_size: VolumeSize) -> Self {
        Self {
            extents: ExtentMap::default(),
            marks: Vec::new(),
            volume_size,
        }
    }

    /// Takes in the records of a frame, which has `number` in its log.
    pub(crate) fn apply_frame(&mut self, frame: &FrameBuffer, number: FrameNumber) {
        for (record, entry) in (0..).zip(frame.table()) {
            let TableEntry {
                sequence,
                time,
                at,
                shape,
            } = entry;
            self.apply(
                shape,
                Standing {
                    frame: number,
                    record,
                    sequence,
                    time,
                    at,
                },
            );
        }
    }

    /// Takes in the next record.
    pub(crate) fn apply(&mut self, shape: Shape, standing: Standing) {
        let Standing {
            frame,
            record,
            sequence,
            time,
            at,
        } = standing;
        let mut mark = |detail| {
            self.marks.push(Mark {
                detail,
                frame,
                record,
                sequence,
                time,
            })
        };
        match shape {
            Shape::Tag { id, consistency } => {
                mark(MarkDetail::Tag(TagMark {
                    id,
                    consistency,
                    time,
                }));
            }
            Shape::Resize(size) => {
                mark(MarkDetail::Resize(size));
                self.extents.resize(self.volume_size, size, frame);
                self.volume_size = size;
            }
            Shape::Write(_) | Shape::Zeroes(_) | Shape::Discard(_) => {
                if let Some(entry) = shape.state(frame, at) {
                    self.extents.insert(entry);
                }
            }
        }
    }
}
