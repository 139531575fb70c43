//! What the benches share: data that is neither too easy nor too hard to compress, and
//! random numbers that are the same in every run, so that two runs measure the same work.

pub mod inline;

/// Pseudo-random numbers from a fixed seed (xorshift64*).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Default for Numbers {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Iterator for Numbers {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        Some(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D))
    }
}

/// `len` bytes that do not compress.
pub fn noise(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Numbers::default()
        .take(len.div_ceil(8))
        .flat_map(u64::to_le_bytes)
        .collect();
    bytes.truncate(len);
    bytes
}

/// `len` bytes that compress to about a third, as text and tables do.
pub fn prose(len: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "block ",
        "volume ",
        "the ",
        "epoch ",
        "seal ",
        "and ",
        "log ",
        "point ",
        "a ",
        "write ",
        "of ",
        "region ",
        "digest ",
        "at ",
        "store ",
        "0123456789 ",
    ];
    let mut bytes = Vec::with_capacity(len + 16);
    for number in Numbers::default() {
        if bytes.len() >= len {
            break;
        }
        bytes.extend_from_slice(WORDS[(number >> 60) as usize].as_bytes());
    }
    bytes.truncate(len);
    bytes
}
