//! Which frames of several logs still count for something, and where they go when only
//! those are kept. A bit a frame, so that it is known before the first one moves.

use super::overlay;
use crate::error::{Error, Result};
use crate::frame::MarkDetail;
use crate::log::Log;
use crate::seal::Mark;
use crate::source::ReadAt;
use crate::units::FrameNumber;

/// A frame of one of several logs.
pub(crate) type FrameOf = (usize, FrameNumber);

/// The resizes of all logs and the points that stay, each with the frame it is in.
pub(crate) fn kept_marks<'a, R: ReadAt>(
    logs: &'a [&Log<R>],
    points: &'a [Mark],
) -> impl Iterator<Item = Result<(FrameOf, Mark)>> + 'a {
    let resizes = logs.iter().enumerate().flat_map(|(source, log)| {
        log.marks()
            .filter(|mark| {
                !matches!(
                    mark,
                    Ok(Mark {
                        detail: MarkDetail::Tag(_),
                        ..
                    })
                )
            })
            .map(move |mark| mark.map(|mark| ((source, mark.frame), mark)))
    });
    let last = logs.len().saturating_sub(1);
    resizes.chain(
        points
            .iter()
            .map(move |mark| Ok(((last, mark.frame), *mark))),
    )
}

/// Which frames of the sources count for something, and their numbers in the result.
pub(crate) struct Live {
    sources: Vec<Bits>,
}

struct Bits {
    words: Vec<u64>,
    // How many live frames there are before each word, in all logs.
    before: Vec<u64>,
}

impl Live {
    pub(crate) fn of<R: ReadAt>(logs: &[&Log<R>], points: &[Mark]) -> Result<Self> {
        let bits = |log: &&Log<R>| {
            let words = vec![0; log.seal().frames.div_ceil(64) as usize];
            Bits {
                words,
                before: Vec::new(),
            }
        };
        let mut live = Self {
            sources: logs.iter().map(bits).collect(),
        };
        for piece in overlay(logs) {
            let piece = piece?;
            live.mark((piece.source.get(), piece.entry.frame));
        }
        for kept in kept_marks(logs, points) {
            live.mark(kept?.0);
        }
        let mut count = 0;
        for source in &mut live.sources {
            for word in &source.words {
                source.before.push(count);
                count += u64::from(word.count_ones());
            }
        }
        Ok(live)
    }

    fn mark(&mut self, (source, frame): FrameOf) {
        let word = self
            .sources
            .get_mut(source)
            .and_then(|bits| bits.words.get_mut(frame.get() as usize / 64));
        if let Some(word) = word {
            *word |= 1 << (frame.get() % 64);
        }
    }

    pub(crate) fn frames_of(&self, source: usize) -> impl Iterator<Item = FrameNumber> + '_ {
        let words = self.sources.get(source).map_or(&[][..], |bits| &bits.words);
        words.iter().zip(0u32..).flat_map(|(&word, n)| {
            (0..64)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| FrameNumber::new(n * 64 + bit))
        })
    }

    /// The number that a live frame has in the result.
    pub(crate) fn number(&self, (source, frame): FrameOf) -> Result<FrameNumber> {
        let at = frame.get() as usize / 64;
        let below = (1u64 << (frame.get() % 64)) - 1;
        self.sources
            .get(source)
            .and_then(|bits| Some((bits.words.get(at)?, bits.before.get(at)?)))
            .and_then(|(word, before)| {
                u32::try_from(before + u64::from((word & below).count_ones())).ok()
            })
            .map(FrameNumber::new)
            .ok_or_else(|| Error::damaged("the seal lists a frame that is not there"))
    }
}
