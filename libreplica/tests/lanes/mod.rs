//! Inline capture of a real loop device through its lanes, for the tests that write to one.
#![allow(dead_code, reason = "no test program uses all of it")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libreplica::capture::inline::{
    Budget, Change, Cookie, Cut, Done, Durability, Entry, Errno, Event, InlineSpec, Lane, Limits,
    Moment, Read, Request, Service,
};
use libreplica::device::BlockDevice;
use libreplica::id::VolumeId;
use libreplica::policy::Mode;
use libreplica::sys::memory::AlignedMemory;
use libreplica::sys::uring::Part;
use libreplica::units::{BlockSize, ByteLen};

use crate::devices::{Loop, extent};

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// Room for so many bytes.
pub fn limits(bytes: u64) -> Limits {
    Limits {
        bytes: ByteLen::new(bytes),
        extents: 1000,
        shared: Arc::new(Budget::new(ByteLen::new(bytes))),
    }
}

/// The volume on `disk`, with what is kept of it in `folder`.
pub fn spec(disk: &Loop, folder: &Path, bytes: u64) -> InlineSpec {
    InlineSpec {
        folder: folder.to_owned(),
        volume: VolumeId::from_bytes([7; 16]),
        disk: BlockDevice::open(&disk.path).unwrap(),
        block: BlockSize::MIN,
        limits: limits(bytes),
    }
}

/// Memory with this in it.
pub fn part(fill: &[u8]) -> Part {
    let mut memory = AlignedMemory::new(fill.len()).unwrap();
    memory.as_mut_slice()[..fill.len()].copy_from_slice(fill);
    Part::first(memory, fill.len())
}

/// Serves a lane until `wanted` requests have ended.
pub fn finish(lane: &mut Lane, wanted: usize) -> Vec<Done> {
    let mut done = Vec::new();
    while done.len() < wanted {
        lane.turn().unwrap();
        while let Some(event) = lane.event() {
            match event {
                Event::Done(one) => done.push(one),
                other => panic!("{other:?}"),
            }
        }
    }
    done
}

/// Carries one request out.
pub fn one(lane: &mut Lane, request: Request) -> Done {
    lane.begin(Cookie(1), request);
    finish(lane, 1).pop().unwrap()
}

/// Writes `data`.
pub fn write(lane: &mut Lane, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let request = Request::Write {
        from: part(data),
        extent: extent(offset, data.len() as u64),
        durability: Durability::Cached,
    };
    one(lane, request).result
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

/// What the disk holds.
pub fn content(disk: &Loop) -> Vec<u8> {
    std::fs::read(&disk.file).unwrap()
}
