//! Leaves: the digest of one block, and the two functions that make it.

use std::fmt;

use hrl_format::VolumeKey;
use hrl_format::units::ByteLen;
use twox_hash::XxHash3_128;
use zeroize::Zeroizing;

use crate::geometry::BlockNumber;

/// The digest of one block: 128 bits. Two blocks of the same number on two sides with
/// equal leaves are taken as equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Leaf([u8; 16]);

impl Leaf {
    /// How many bytes a leaf has.
    pub const LEN: usize = 16;

    /// From its bytes. All zeroes is how the tree stores "unknown": a digest that came
    /// out so (one in 2^128) is taken as one that differs from it in one bit.
    pub(super) const fn from_digest(mut bytes: [u8; 16]) -> Self {
        if u128::from_le_bytes(bytes) == 0 {
            bytes[0] = 1;
        }
        Self(bytes)
    }

    /// As stored in the tree: all zeroes is an unknown leaf.
    pub(super) fn from_stored(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(Self(bytes))
    }

    /// Its 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leaf({:032x})", u128::from_be_bytes(self.0))
    }
}

/// How blocks become leaves. Both sides of a comparison must use the same.
///
/// ```
/// use libreplica::digest::LeafFunction;
/// use libreplica::geometry::BlockNumber;
/// let plain = LeafFunction::plain();
/// let zero = plain.leaf(BlockNumber::new(0), &[0; 4096]);
/// assert_eq!(zero, plain.leaf(BlockNumber::new(7), &[0; 4096]));
/// ```
#[derive(Clone)]
pub struct LeafFunction(Kind);

#[derive(Clone)]
enum Kind {
    Plain,
    Keyed(Zeroizing<[u8; 32]>),
}

impl LeafFunction {
    /// The one of a volume: keyed if the volume is encrypted, with a key derived from its own.
    pub fn for_volume(key: Option<&VolumeKey>) -> Self {
        match key {
            Some(key) => Self(Kind::Keyed(Zeroizing::new(key.derive("replica leaf key")))),
            None => Self::plain(),
        }
    }

    /// Whether leaves say nothing to those who have not the key.
    pub const fn is_keyed(&self) -> bool {
        matches!(self.0, Kind::Keyed(_))
    }

    /// XXH3-128 of the content.
    pub const fn plain() -> Self {
        Self(Kind::Plain)
    }

    /// Keyed BLAKE3, cut to 128 bits, of block number, a byte 1 and content; of block
    /// number, a byte 0 and length if the content is zeroes alone, so that zeroes never
    /// need to be read or hashed. `key` is derived from the volume's key for this alone.
    pub fn keyed(key: &[u8; 32]) -> Self {
        Self(Kind::Keyed(Zeroizing::new(*key)))
    }

    /// The leaf of block `number` with content `data`: all of the block, which is short
    /// only at the end of the volume.
    pub fn leaf(&self, number: BlockNumber, data: &[u8]) -> Leaf {
        match &self.0 {
            Kind::Plain => Leaf::from_digest(XxHash3_128::oneshot(data).to_le_bytes()),
            Kind::Keyed(_) if is_zero(data) => {
                self.zero_leaf(number, ByteLen::new(data.len() as u64))
            }
            Kind::Keyed(key) => {
                let mut hasher = blake3::Hasher::new_keyed(key);
                hasher.update(&number.get().to_le_bytes()).update(&[1]);
                cut(hasher.update(data))
            }
        }
    }

    /// The leaf of block `number` if it holds `len` zeroes.
    pub fn zero_leaf(&self, number: BlockNumber, len: ByteLen) -> Leaf {
        match &self.0 {
            Kind::Plain => {
                let zeroes = vec![0; len.get() as usize];
                Leaf::from_digest(XxHash3_128::oneshot(&zeroes).to_le_bytes())
            }
            Kind::Keyed(key) => {
                let mut hasher = blake3::Hasher::new_keyed(key);
                hasher.update(&number.get().to_le_bytes()).update(&[0]);
                cut(hasher.update(&len.get().to_le_bytes()))
            }
        }
    }

    /// Whether all zero blocks of one length have the same leaf.
    pub(super) const fn zero_leaf_is_constant(&self) -> bool {
        matches!(self.0, Kind::Plain)
    }

    /// Names the function, and the key without revealing it: zeroes for the plain one.
    pub(super) fn id(&self) -> [u8; 16] {
        match &self.0 {
            Kind::Plain => [0; 16],
            Kind::Keyed(key) => {
                *cut(blake3::Hasher::new_keyed(key).update(b"id of the leaf key")).as_bytes()
            }
        }
    }
}

impl fmt::Debug for LeafFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Plain => "LeafFunction(XXH3-128)",
            Kind::Keyed(_) => "LeafFunction(keyed BLAKE3)",
        })
    }
}

/// The first 128 bits.
fn cut(hasher: &blake3::Hasher) -> Leaf {
    let mut bytes = [0; Leaf::LEN];
    hasher.finalize_xof().fill(&mut bytes);
    Leaf::from_digest(bytes)
}

/// Whether all bytes are zero; most blocks say no at their first 64 bytes.
fn is_zero(data: &[u8]) -> bool {
    let (lines, rest) = data.as_chunks::<64>();
    let any_bit = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte);
    any_bit(rest) == 0 && lines.iter().all(|line| any_bit(line) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: BlockNumber = BlockNumber::new(3);

    #[test]
    fn plain_is_xxh3_128() {
        // Published test value of XXH3-128 with seed 0 over no input.
        let leaf = LeafFunction::plain().leaf(N, &[]);
        assert_eq!(
            u128::from_le_bytes(*leaf.as_bytes()),
            0x99aa_06d3_0147_98d8_6001_c324_468d_497f
        );
    }

    #[test]
    fn zeroes_need_no_reading() {
        for function in [LeafFunction::plain(), LeafFunction::keyed(&[7; 32])] {
            for len in [1, 512, 4096, 5000] {
                assert_eq!(
                    function.leaf(N, &vec![0; len]),
                    function.zero_leaf(N, ByteLen::new(len as u64)),
                    "{function:?} {len}"
                );
            }
        }
    }

    #[test]
    fn keyed_leaves_hide_equality_and_depend_on_the_key() {
        let (a, b) = (LeafFunction::keyed(&[7; 32]), LeafFunction::keyed(&[8; 32]));
        let other = BlockNumber::new(4);
        for data in [[0; 4096], [1; 4096]] {
            assert_ne!(a.leaf(N, &data), a.leaf(other, &data));
            assert_ne!(a.leaf(N, &data), b.leaf(N, &data));
        }
        assert_ne!(a.id(), b.id());
        assert_ne!(a.id(), LeafFunction::plain().id());
    }

    #[test]
    fn a_byte_anywhere_is_not_zero() {
        for at in [0, 63, 64, 4095, 4096, 4099] {
            let mut data = vec![0; 4100];
            assert!(is_zero(&data));
            data[at] = 0x80;
            assert!(!is_zero(&data), "{at}");
        }
    }

    #[test]
    fn no_digest_reads_as_unknown() {
        assert!(Leaf::from_stored(*Leaf::from_digest([0; 16]).as_bytes()).is_some());
        assert_eq!(Leaf::from_stored([0; 16]), None);
    }
}
