//! From plain data to stored data and back: LZ4 first, where it pays, then AES-256-GCM.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use crate::error::{Error, Result};

/// Below this a frame is not compressed: a page is the least it takes in the file anyway.
const LEAST: usize = 512;
/// The pieces that are compressed for a sample, and how long each is.
const SAMPLES: usize = 4;
const SAMPLE: usize = 4096;

/// LZ4 with its table and its output kept from frame to frame.
pub(crate) struct Compressor {
    table: CompressTable,
    out: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Self {
        Self {
            table: CompressTable::large(),
            out: Vec::new(),
        }
    }

    /// `plain` compressed; `None` if that saves less than an eighth. Long data is sampled
    /// first, for LZ4 is the slowest step by far, and most so on data that it shortens
    /// only a little.
    pub(crate) fn compress(&mut self, plain: &[u8]) -> Option<&mut [u8]> {
        if plain.len() < LEAST {
            return None;
        }
        if plain.len() >= 4 * SAMPLES * SAMPLE {
            let step = plain.len() / SAMPLES;
            let shortened: usize = (0..SAMPLES)
                .filter_map(|n| plain.get(n * step..n * step + SAMPLE))
                .map(|piece| self.run(piece).unwrap_or(SAMPLE).min(SAMPLE))
                .sum();
            // Half of what must be saved: a sample finds fewer matches than the whole.
            if shortened > SAMPLES * SAMPLE / 16 * 15 {
                return None;
            }
        }
        let len = self
            .run(plain)
            .filter(|&len| len <= plain.len() - plain.len() / 8)?;
        self.out.get_mut(..len)
    }

    fn run(&mut self, input: &[u8]) -> Option<usize> {
        let room = get_maximum_output_size(input.len());
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        compress_into_with_table(input, &mut self.out, &mut self.table).ok()
    }
}

/// Decompresses `stored` into all of `plain`.
pub(crate) fn decompress(stored: &[u8], plain: &mut [u8]) -> Result<()> {
    match decompress_into(stored, plain) {
        Ok(len) if len == plain.len() => Ok(()),
        Ok(_) => Err(Error::damaged(
            "compressed data is shorter than its frame says",
        )),
        Err(error) => Err(Error::damaged(format!("compressed data: {error}"))),
    }
}
