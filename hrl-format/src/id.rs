//! Identities: 128 random bits each, in types of their own, so that a log is never
//! looked up by a volume's id. Printed as 32 lower-case hex digits, without
//! separators, so that an id is one word everywhere: in a path, a shell, a URL.

use std::fmt;
use std::str::FromStr;

use crate::units::{GenerationNumber, Timestamp};

/// The text was not 32 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id: 32 hexadecimal digits expected")]
pub struct ParseIdError {
    text: String,
}

/// The system gave no random bytes.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no random bytes from the system: {0}")]
pub struct RandomError(#[from] getrandom::Error);

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    Some(bytes)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id that stands for "none": all zero bits.
            pub const NIL: Self = Self([0; 16]);

            /// From its 16 bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Its 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// Whether it is [`Self::NIL`].
            pub const fn is_nil(&self) -> bool {
                matches!(self.0, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            }

            /// A new one, from the system's random source.
            ///
            /// # Errors
            /// When the system gives no random bytes.
            pub fn random() -> Result<Self, RandomError> {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_hex(text).map(Self).ok_or_else(|| ParseIdError { text: text.to_owned() })
            }
        }
    };
}

id!(
    /// A log. A log that is copied, merged or salvaged gets a new one.
    LogId
);
id!(
    /// A protected volume; its image in every store bears the same id.
    VolumeId
);
id!(
    /// A recovery point. The first 48 bits are its time in milliseconds since the Unix
    /// epoch, so that ids sort by time.
    PointId
);
id!(
    /// A consistency group's common point: the same in each volume's tag.
    GroupId
);
id!(
    /// A generation: who may write to the image. See [`Generation`].
    GenerationId
);
id!(
    /// A store: the folder that holds the images, logs and points of many volumes.
    StoreId
);
id!(
    /// A question to whoever writes to a volume, by who is to take it over.
    HandoverId
);
id!(
    /// A branch: logs on top of a recovery point, beside those of the volume.
    BranchId
);
id!(
    /// A volume key, named without revealing it.
    KeyId
);

impl PointId {
    /// A new id for a point made at `time`.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn at(time: Timestamp) -> Result<Self, RandomError> {
        let mut id = Self::random()?;
        let millis = u64::try_from(time.as_nanos() / 1_000_000).unwrap_or(0);
        id.0[..6].copy_from_slice(&millis.to_be_bytes()[2..]);
        Ok(id)
    }
}

/// Who may write: a counter that rises at each promotion, and the random id that tells
/// two promotions with the same counter apart (a fork).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation {
    /// How many promotions there were.
    pub number: GenerationNumber,
    /// Which promotion it was.
    pub id: GenerationId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let id = VolumeId::random().unwrap();
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        for bad in [
            "",
            "12",
            &"g".repeat(32),
            &"0".repeat(33),
            &"\u{e9}".repeat(16),
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn point_ids_sort_by_time() {
        let at = |s: i64| PointId::at(Timestamp::from_nanos(s * 1_000_000_000)).unwrap();
        assert!(at(1_000) < at(1_001));
    }
}
