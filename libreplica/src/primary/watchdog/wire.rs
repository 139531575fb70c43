//! What agent and watchdog say to each other: packets of fixed length over a socket pair,
//! built and read without allocating. Both ends are the same binary, so there is no
//! version, and the machine's own byte order would do; little-endian all the same.

use std::time::Duration;

use nix::errno::Errno;

use crate::primary::quiesce::{Cause, Failure};

/// Bytes of a request and of a reply.
pub const PACKET: usize = 24;

/// Agent to watchdog; each is answered by one reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The descriptors with it are mounts: write out what is dirty there, and keep nothing.
    Sync,
    /// Forget what was loaded. The descriptor with it is the status file.
    Begin,
    /// The descriptors with it are mounts, to be frozen behind those loaded before.
    Mounts,
    /// Freeze all that was loaded.
    Freeze {
        /// The time that all calls together may take.
        limit: Duration,
        /// How much longer than `limit` it may stay frozen.
        grace: Duration,
    },
    /// Thaw, and close all that was loaded.
    Thaw,
}

impl Request {
    /// As it is sent.
    pub fn encode(self) -> [u8; PACKET] {
        let (tag, limit, grace) = match self {
            Self::Begin => (1, Duration::ZERO, Duration::ZERO),
            Self::Mounts => (2, Duration::ZERO, Duration::ZERO),
            Self::Freeze { limit, grace } => (3, limit, grace),
            Self::Thaw => (4, Duration::ZERO, Duration::ZERO),
            Self::Sync => (5, Duration::ZERO, Duration::ZERO),
        };
        let mut packet = [0; PACKET];
        packet[0] = tag;
        packet[8..16].copy_from_slice(&nanos(limit).to_le_bytes());
        packet[16..].copy_from_slice(&nanos(grace).to_le_bytes());
        packet
    }

    /// As it was sent; `None` if it makes no sense.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; PACKET] = packet.try_into().ok()?;
        let (_, times) = packet.split_at(8);
        let (limit, grace) = times.split_first_chunk::<8>()?;
        Some(match packet[0] {
            1 => Self::Begin,
            2 => Self::Mounts,
            3 => Self::Freeze {
                limit: Duration::from_nanos(u64::from_le_bytes(*limit)),
                grace: Duration::from_nanos(u64::from_le_bytes(grace.try_into().ok()?)),
            },
            4 => Self::Thaw,
            5 => Self::Sync,
            _ => return None,
        })
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Watchdog to agent: it is done, or what failed.
pub type Reply = Result<(), Failure>;

/// As it is sent.
pub fn encode_reply(reply: Reply) -> [u8; PACKET] {
    let mut packet = [0; PACKET];
    if let Err(Failure { member, cause }) = reply {
        let (code, errno) = match cause {
            Cause::Late => (1, 0),
            Cause::Foreign => (2, 0),
            Cause::System(errno) => (3, errno as i32),
            Cause::ThawedByOther => (4, 0),
            Cause::Expired => (5, 0),
        };
        packet[0] = code;
        packet[8..12].copy_from_slice(&member.to_le_bytes());
        packet[12..16].copy_from_slice(&errno.to_le_bytes());
    }
    packet
}

/// As it was sent; `None` if it makes no sense.
pub fn decode_reply(packet: &[u8]) -> Option<Reply> {
    let packet: &[u8; PACKET] = packet.try_into().ok()?;
    let (_, behind) = packet.split_at(8);
    let (member, behind) = behind.split_first_chunk::<4>()?;
    let errno = i32::from_le_bytes(*behind.first_chunk::<4>()?);
    let cause = match packet[0] {
        0 => return Some(Ok(())),
        1 => Cause::Late,
        2 => Cause::Foreign,
        3 => Cause::System(Errno::from_raw(errno)),
        4 => Cause::ThawedByOther,
        5 => Cause::Expired,
        _ => return None,
    };
    Some(Err(Failure {
        member: u32::from_le_bytes(*member),
        cause,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_round_trip() {
        let freeze = Request::Freeze {
            limit: Duration::from_millis(2000),
            grace: Duration::from_nanos(1),
        };
        let others = [
            Request::Sync,
            Request::Begin,
            Request::Mounts,
            Request::Thaw,
        ];
        for request in others.into_iter().chain([freeze]) {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&[]), None);
        assert_eq!(Request::decode(&[9; PACKET]), None);
    }

    #[test]
    fn replies_round_trip() {
        for cause in [
            Cause::Late,
            Cause::Foreign,
            Cause::System(Errno::EIO),
            Cause::ThawedByOther,
            Cause::Expired,
        ] {
            let reply = Err(Failure {
                member: 70_000,
                cause,
            });
            assert_eq!(decode_reply(&encode_reply(reply)), Some(reply));
        }
        assert_eq!(decode_reply(&encode_reply(Ok(()))), Some(Ok(())));
        assert_eq!(decode_reply(&[6; PACKET]), None);
    }
}
