//! How the library's types stand in the catalogue's JSON: ids and digests as text, units as
//! numbers, times in RFC 3339. For `#[serde(with = "...")]`; the optional forms are `null`.

use std::fmt;
use std::marker::PhantomData;

use hrl_format::SealDigest;
use hrl_format::record::{Consistency, Root};
use hrl_format::units::{
    BlockSize, ByteLen, Epoch, GenerationNumber, SectorSize, Timestamp, VolumeSize,
};
use serde::de::{DeserializeSeed, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A type that stands as text.
pub(super) trait Text: Sized {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
    fn read(text: &str) -> Option<Self>;
}

/// A type that stands as a number.
pub(super) trait Number: Sized {
    fn number(&self) -> u64;
    fn from_number(number: u64) -> Option<Self>;
}

macro_rules! text {
    ($($name:ty),*) => {$(
        impl Text for $name {
            fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
            fn read(text: &str) -> Option<Self> {
                text.parse().ok()
            }
        }
    )*};
}

macro_rules! number {
    ($($name:ty),*) => {$(
        impl Number for $name {
            fn number(&self) -> u64 {
                self.get()
            }
            fn from_number(number: u64) -> Option<Self> {
                Some(Self::new(number))
            }
        }
    )*};
}

macro_rules! size32 {
    ($($name:ty),*) => {$(
        impl Number for $name {
            fn number(&self) -> u64 {
                u64::from(self.get())
            }
            fn from_number(number: u64) -> Option<Self> {
                Self::new(u32::try_from(number).ok()?)
            }
        }
    )*};
}

macro_rules! hex32 {
    ($($name:ty),*) => {$(
        impl Text for $name {
            fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
            fn read(text: &str) -> Option<Self> {
                parse_hex32(text).map(Self::from_bytes)
            }
        }
    )*};
}

text!(
    super::branch::BranchPurpose,
    hrl_format::id::BranchId,
    hrl_format::id::GenerationId,
    hrl_format::id::GroupId,
    hrl_format::id::HandoverId,
    hrl_format::id::KeyId,
    hrl_format::id::LogId,
    hrl_format::id::PointId,
    hrl_format::id::StoreId,
    hrl_format::id::VolumeId,
    super::moment::Moment,
    Consistency
);
number!(ByteLen, Epoch, GenerationNumber, VolumeSize);
size32!(BlockSize, SectorSize);
hex32!(Root, SealDigest);

pub(super) fn parse_hex32(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    Some(bytes)
}

/// Times to the nanosecond, in UTC.
impl Text for Timestamp {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_nanosecond(i128::from(self.as_nanos())) {
            Ok(time) => write!(f, "{time}"),
            Err(_) => Err(fmt::Error),
        }
    }

    fn read(text: &str) -> Option<Self> {
        let time: jiff::Timestamp = text.parse().ok()?;
        Some(Self::from_nanos(i64::try_from(time.as_nanosecond()).ok()?))
    }
}

struct Shown<'a, T>(&'a T);

impl<T: Text> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f)
    }
}

/// Reads a [`Text`] from where it lies in the input: a catalogue has tens of thousands.
struct Reading<T>(PhantomData<T>);

impl<T: Text> Visitor<'_> for Reading<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::read(text).ok_or_else(|| E::custom(format!("`{text}` is not what stands here")))
    }
}

impl<'de, T: Text> DeserializeSeed<'de> for Reading<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

/// The same, or `null`.
struct MaybeReading<T>(PhantomData<T>);

impl<'de, T: Text> Visitor<'de> for MaybeReading<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or null")
    }

    fn visit_none<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        Reading(PhantomData).deserialize(deserializer).map(Some)
    }
}

/// A [`Text`].
pub(super) mod text {
    use super::{Deserializer, PhantomData, Reading, Serializer, Shown, Text};

    pub(in super::super) fn serialize<T: Text, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Shown(value))
    }

    pub(in super::super) fn deserialize<'de, T: Text, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        deserializer.deserialize_str(Reading(PhantomData))
    }
}

/// A [`Text`] or `null`.
pub(super) mod maybe_text {
    use super::{Deserializer, MaybeReading, PhantomData, Serialize, Serializer, Shown, Text};

    pub(in super::super) fn serialize<T: Text, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = value.as_ref().map(|value| Shown(value).to_string());
        text.serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, T: Text, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_option(MaybeReading(PhantomData))
    }
}

/// A [`Number`].
pub(super) mod number {
    use serde::de::Error as _;

    use super::{Deserialize, Deserializer, Number, Serializer};

    pub(in super::super) fn serialize<T: Number, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.number())
    }

    pub(in super::super) fn deserialize<'de, T: Number, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let number = u64::deserialize(deserializer)?;
        T::from_number(number).ok_or_else(|| D::Error::custom(format!("{number} is out of range")))
    }
}
