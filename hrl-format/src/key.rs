//! Keys. A volume has one key; each log derives its own from it and from its log id, so
//! that a (key, nonce) pair would have to repeat within one log to repeat at all, and
//! there every frame draws a fresh random nonce.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};
use crate::id::{KeyId, LogId};
use crate::layout::CIPHER_TAG;

/// A volume's key: 256 bits, wiped from memory when dropped, never printed.
#[derive(Clone)]
pub struct VolumeKey {
    bytes: Zeroizing<[u8; 32]>,
    name: KeyId,
}

impl VolumeKey {
    /// From its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let bytes = Zeroizing::new(bytes);
        let mut name = [0; 16];
        name.copy_from_slice(&expand(None, &bytes, "hrl 3 key id")[..16]);
        Self {
            bytes,
            name: KeyId::from_bytes(name),
        }
    }

    /// From what a key file holds: 32 raw bytes, or 64 hex digits and perhaps a line end.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is neither.
    pub fn from_file_bytes(bytes: &[u8]) -> Result<Self> {
        if let Ok(raw) = <[u8; 32]>::try_from(bytes) {
            return Ok(Self::from_bytes(raw));
        }
        let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let mut key = Zeroizing::new([0; 32]);
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|value| value as u8);
        let parsed = text.len() == 64
            && key
                .iter_mut()
                .zip(text.chunks_exact(2))
                .all(|(byte, pair)| {
                    let (high, low) = (digit(pair[0]), digit(pair[1]));
                    *byte = high.unwrap_or(0) << 4 | low.unwrap_or(0);
                    high.is_some() && low.is_some()
                });
        parsed
            .then(|| Self::from_bytes(*key))
            .ok_or_else(|| Error::invalid("not a key file: 32 raw bytes or 64 hex digits expected"))
    }

    /// A key for one purpose, by HKDF-SHA256 without salt.
    pub fn derive(&self, info: &str) -> [u8; 32] {
        expand(None, &self.bytes, info)
    }

    /// The key's name, which reveals nothing of it.
    pub const fn key_id(&self) -> KeyId {
        self.name
    }

    /// The cipher of a log's frames.
    pub(crate) fn frame_cipher(&self, log: LogId) -> Cipher {
        Cipher::new(&Zeroizing::new(expand(
            Some(log),
            &self.bytes,
            "hrl 3 log key",
        )))
    }

    /// The cipher of a log's seal.
    pub(crate) fn seal_cipher(&self, log: LogId) -> Cipher {
        Cipher::new(&Zeroizing::new(expand(
            Some(log),
            &self.bytes,
            "hrl 3 seal key",
        )))
    }
}

impl std::fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolumeKey({})", self.key_id())
    }
}

#[allow(
    clippy::expect_used,
    reason = "HKDF fails only past 255 digests of output"
)]
fn expand(log: Option<LogId>, key: &[u8; 32], info: &str) -> [u8; 32] {
    let salt = log.as_ref().map(|log| log.as_bytes().as_slice());
    let mut out = [0; 32];
    Hkdf::<Sha256>::new(salt, key)
        .expand(info.as_bytes(), &mut out)
        .expect("one digest of output");
    out
}

/// What was given as key, against what the log says it was encrypted with.
///
/// # Errors
/// [`ErrorKind::KeyWrong`], [`ErrorKind::KeyUnused`]. A missing key is no error yet: much
/// can be read without it.
pub(crate) fn match_key(log: Option<KeyId>, key: Option<&VolumeKey>) -> Result<()> {
    match (log, key.map(VolumeKey::key_id)) {
        (_, None) => Ok(()),
        (Some(log), Some(given)) if log == given => Ok(()),
        (Some(log), Some(given)) => Err(Error::new(
            ErrorKind::KeyWrong,
            format!("encrypted with key {log}, and the one given is {given}"),
        )),
        (None, Some(_)) => Err(Error::new(
            ErrorKind::KeyUnused,
            "a key was given, but the log is not encrypted",
        )),
    }
}

/// AES-256-GCM under one derived key.
pub(crate) struct Cipher(Aes256Gcm);

/// A frame's or a seal's nonce.
pub(crate) type Nonce = [u8; 12];
/// The cipher's proof.
pub(crate) type CipherTag = [u8; CIPHER_TAG];

impl Cipher {
    fn new(key: &[u8; 32]) -> Self {
        Self(Aes256Gcm::new(key.into()))
    }

    /// Encrypts `data` where it is, and returns the proof over it and `aad`.
    pub(crate) fn seal(&self, nonce: &Nonce, aad: &[u8], data: &mut [u8]) -> Result<CipherTag> {
        self.0
            .encrypt_inout_detached(nonce.into(), aad, data.into())
            .map(Into::into)
            .map_err(|_| Error::invalid("too much data for one encryption"))
    }

    /// Decrypts `stored` into `plain`, of the same length, if the proof holds.
    pub(crate) fn open(
        &self,
        nonce: &Nonce,
        aad: &[u8],
        (stored, plain): (&[u8], &mut [u8]),
        proof: &CipherTag,
    ) -> Result<()> {
        let forged = || Error::new(ErrorKind::Forged, "the cipher's proof does not hold");
        let buffer = InOutBuf::new(stored, plain).map_err(|_| forged())?;
        self.0
            .decrypt_inout_detached(nonce.into(), aad, buffer, proof.into())
            .map_err(|_| forged())
    }
}

/// A fresh nonce from the system's random source.
pub(crate) fn fresh_nonce() -> Result<Nonce> {
    let mut nonce = [0; 12];
    getrandom::fill(&mut nonce).map_err(crate::id::RandomError::from)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_raw_and_hex_are_the_same_key() {
        let raw = [0xa5; 32];
        let id = VolumeKey::from_file_bytes(&raw).unwrap().key_id();
        for hex in [
            "a5".repeat(32),
            "A5".repeat(32) + "\n",
            "a5".repeat(32) + "\r\n",
        ] {
            assert_eq!(
                VolumeKey::from_file_bytes(hex.as_bytes()).unwrap().key_id(),
                id
            );
        }
    }

    #[test]
    fn other_key_files_are_refused() {
        for bad in [
            vec![],
            vec![0; 31],
            vec![b'g'; 64],
            vec![b'a'; 63],
            vec![b'a'; 66],
        ] {
            let error = VolumeKey::from_file_bytes(&bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn debug_does_not_reveal_the_key() {
        let key = VolumeKey::from_bytes([0x5a; 32]);
        assert!(!format!("{key:?}").contains("5a5a5a5a"));
    }
}
