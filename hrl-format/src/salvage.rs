//! Salvage: the whole frames of a log that was never sealed, or lost its end, moved into
//! a new one, and sealed there. The torn log is left as it is: writing on in it could
//! bring one nonce twice under one key.

use std::io::{Read, Write};

use crate::error::{Error, Result};
use crate::header::{ChainEnd, Features, LogHeader};
use crate::id::LogId;
use crate::key::VolumeKey;
use crate::mover::Mover;
use crate::scanner::{Ending, Scanner};
use crate::seal::Seal;
use crate::state::LogState;
use crate::units::{FileOffset, Timestamp};

/// What a salvage brought, and what was lost.
#[derive(Clone, Debug)]
pub struct Salvaged {
    /// The new log.
    pub header: LogHeader,
    /// Its seal; proved only if the key was given.
    pub seal: Seal,
    /// Where in the torn log that begins which was left behind.
    pub cut: FileOffset,
    /// What is wrong there.
    pub cause: Error,
}

/// Moves the whole frames of the torn log `source` into a new log in `out`. With the key of
/// an encrypted log each frame is opened, too, and the seal proved; without, it says what
/// the checksums say.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] if the log is sealed and sound: there is nothing to
/// salvage, and `out` holds no log. Else as [`Scanner::new`], and
/// [`crate::ErrorKind::Io`].
pub fn salvage<R: Read, W: Write>(
    source: R,
    out: W,
    key: Option<&VolumeKey>,
) -> Result<(W, Salvaged)> {
    let mut scanner = Scanner::new(source, key)?;
    let torn = scanner.header().clone();
    let end = ChainEnd {
        log: torn.log,
        seal: None,
    };
    let header = LogHeader {
        log: LogId::random()?,
        stands_for: Some(torn.stands_for.unwrap_or(end)),
        created: Timestamp::now(),
        ..torn
    };
    let features = Features {
        moved: true,
        ..scanner.features()
    };
    let mut mover = Mover::new(out, &header, features)?;
    let mut state = LogState::new(header.volume_size);
    while let Some(frame) = scanner.next_frame()? {
        let number = mover.put(frame)?;
        state.apply_frame(frame, number);
    }
    let (cut, cause) = match scanner.ending() {
        Some(Ending::Torn { at, cause }) => (*at, cause.clone()),
        _ => {
            return Err(Error::invalid(
                "the log is sealed: there is nothing to salvage",
            ));
        }
    };
    // Who has the key vouches for the frames; else the torn header tells where they are from.
    let key = key.filter(|_| header.key.is_some());
    let provenance = key.is_none().then(|| Ok(scanner.header_page()));
    let (index, marks) = (
        state.extents.iter().map(Ok),
        state.marks.iter().copied().map(Ok),
    );
    let (out, seal) = mover.seal(state.volume_size, key, index, marks, provenance.into_iter())?;
    Ok((
        out,
        Salvaged {
            header,
            seal,
            cut,
            cause,
        },
    ))
}
