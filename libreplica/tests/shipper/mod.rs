//! What a test does in the place of whoever ships: it takes the stream of a volume, and makes
//! of it what the volume should hold.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, and no test program uses all of it"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libreplica::capture::inline::{
    Budget, Change, Cut, Entry, InlineSpec, Limits, Moment, Read, Service,
};
use libreplica::device::BlockDevice;
use libreplica::id::VolumeId;
use libreplica::policy::Mode;
use libreplica::units::{BlockSize, ByteLen};

/// The volume of all these tests.
pub const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

/// Room for so many bytes.
pub fn limits(bytes: u64) -> Limits {
    Limits {
        bytes: ByteLen::new(bytes),
        extents: 1000,
        shared: Arc::new(Budget::new(ByteLen::new(bytes))),
    }
}

/// The volume on `disk`, with what is kept of it in `folder`, and room for `bytes`.
pub fn spec_of(disk: &Path, folder: &Path, bytes: u64) -> InlineSpec {
    InlineSpec {
        folder: folder.to_owned(),
        volume: VOLUME,
        disk: BlockDevice::open(disk).unwrap(),
        block: BlockSize::MIN,
        limits: limits(bytes),
    }
}

/// Begins data mode: the moment of what is dirty is read and thrown away.
pub fn climb(service: &Service) {
    let (_, moments) = Service::moment(&[service]).unwrap();
    assert!(matches!(moments[0], Moment::Blocks(_)));
    service.end_moment();
    service.moment_is_stored();
    service.acknowledge();
    assert_eq!(service.waiting().mode, Mode::Data);
}

/// The changes up to a cut; the store has them now.
pub fn take(service: &Service, cut: &Cut) -> Vec<Entry> {
    let Read::Changes(entries) = service.read(cut, ByteLen::new(u64::MAX)) else {
        panic!("they are lost");
    };
    service.stored(cut);
    entries
}

/// The whole stream; the store has it now.
pub fn take_all(service: &Service) -> Vec<Entry> {
    take(service, &service.end_now())
}

/// The entries up to a cut. It is refused until what discards have left within blocks, and
/// failed writes, has been read back.
pub fn next_cut(service: &Service) -> Vec<Entry> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Service::moment(&[service]) {
            Ok((_, moments)) => {
                let Moment::Stream(cut) = &moments[0] else {
                    panic!("not in data mode")
                };
                return take(service, cut);
            }
            Err(error) => {
                assert_eq!(error.kind(), libreplica::ErrorKind::State);
                assert!(Instant::now() < deadline, "{error}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Carries entries out on an image.
pub fn replay(image: &mut [u8], entries: &[Entry]) {
    for entry in entries {
        let range = entry.extent.offset().get() as usize..entry.extent.end().get() as usize;
        match &entry.change {
            Change::Write(data) => image[range].copy_from_slice(data),
            Change::Zeroes | Change::Discard => image[range].fill(0),
        }
    }
}
