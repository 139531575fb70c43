//! The checksum of [MS-HRL]: the bitwise complement of the 32-bit sum of all bytes.

/// The checksum of the bytes of all `parts`. A structure's own checksum field is left out
/// by giving the parts before and after it.
///
/// ```
/// assert_eq!(hrl_format::ms::checksum(&[&[1, 2], &[3]]), !6);
/// ```
pub fn checksum(parts: &[&[u8]]) -> u32 {
    let mut sum = Sum::default();
    parts.iter().for_each(|part| sum.add(part));
    sum.finish()
}

/// The checksum of bytes that come in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum(u32);

impl Sum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        // 2^16 bytes of 255 stay below 2^24: each part's sum fits, and may be vectorised.
        for part in bytes.chunks(1 << 16) {
            let sum: u32 = part.iter().map(|byte| u32::from(*byte)).sum();
            self.0 = self.0.wrapping_add(sum);
        }
    }

    pub(super) const fn finish(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_sums_wrap() {
        let mut sum = Sum::default();
        let megabyte = vec![255; 1 << 20];
        (0..17).for_each(|_| sum.add(&megabyte));
        assert_eq!(sum.finish(), !((17 * 255_u64 * (1 << 20)) as u32));
    }
}
