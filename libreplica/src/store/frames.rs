//! Frames that were read a moment ago. A frame is read, checked, decrypted and decompressed as a
//! whole, while the volume's order may visit it piece by piece, in turn with those of other
//! logs; what was used last is kept, up to a limit of memory.

use std::collections::HashMap;

use hrl_format::units::FrameNumber;
use hrl_format::{FrameBuffer, Piece, SourceNumber};

use super::chain::Logs;
use crate::error::{Error, ErrorKind, Result};

/// How many bytes of plain data are kept; with what they were unpacked from, twice that at most.
const KEPT: usize = 64 << 20;

/// The frames used last.
#[derive(Default)]
pub(super) struct Frames {
    held: HashMap<(SourceNumber, FrameNumber), Held>,
    bytes: usize,
    uses: u64,
}

struct Held {
    buffer: FrameBuffer,
    used: u64,
}

impl Frames {
    /// The bytes that `piece`, of one of `logs`, points to.
    pub(super) fn bytes_of<L: Logs + ?Sized>(&mut self, logs: &L, piece: &Piece) -> Result<&[u8]> {
        const READ: &str = "read a log of the store";
        let key = (piece.source, piece.entry.frame);
        self.uses += 1;
        if !self.held.contains_key(&key) {
            let mut buffer = self.spare();
            let log = logs.log(piece.source)?;
            log.log
                .read_frame(piece.entry.frame, &mut buffer)
                .map_err(|e| log.error(READ, e))?;
            self.bytes += buffer.data_len();
            self.held.insert(key, Held { buffer, used: 0 });
        }
        let held = self.held.get_mut(&key).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, READ).detail("the frame just read is gone")
        })?;
        held.used = self.uses;
        let slice = held.buffer.slice(piece.entry.at, piece.entry.extent.len());
        slice.map_err(|e| match logs.log(piece.source) {
            Ok(log) => log.error(READ, e),
            Err(error) => error,
        })
    }

    /// A buffer to read into: the one not used for longest if there are enough.
    fn spare(&mut self) -> FrameBuffer {
        let mut spare = None;
        while self.bytes >= KEPT {
            let oldest = self.held.iter().min_by_key(|(_, held)| held.used);
            let Some(key) = oldest.map(|(key, _)| *key) else {
                break;
            };
            if let Some(held) = self.held.remove(&key) {
                self.bytes -= held.buffer.data_len();
                spare = Some(held.buffer);
            }
        }
        spare.unwrap_or_default()
    }
}
