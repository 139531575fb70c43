//! Opened points with clients that break the protocol, vanish, or do not listen: each loses its
//! connection, and nobody else notices; what can only be read is not changed; and the export ends
//! when it is told to, with every change that was answered. Needs neither a device nor root.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use libreplica::ErrorKind;
use libreplica::geometry::Geometry;
use libreplica::id::PointId;
use libreplica::record::{Consistency, Record, Tag};
use libreplica::replica::{Opened, PointExport, Wanted};
use libreplica::store::{BranchPurpose, PointSelector, Store, VolumeReader, VolumeSpec};
use libreplica::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};

const SIZE: u64 = 16 << 20;

/// A volume whose one point is all sevens.
struct Rig {
    folder: tempfile::TempDir,
    volume: VolumeReader,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(&folder.path().join("store")).unwrap();
        let geometry = Geometry {
            size: VolumeSize::new(SIZE),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let spec = VolumeSpec::new("v", geometry).unwrap();
        let id = store.create_volume(spec).unwrap();
        let mut writer = store.volume_writer(id, None).unwrap();
        let mut baseline = writer.begin_baseline().unwrap();
        baseline
            .write(ByteOffset::ZERO, &vec![7; SIZE as usize])
            .unwrap();
        baseline.finish().unwrap();
        let mut epoch = writer.begin_epoch().unwrap();
        let time = Timestamp::now();
        let extent = Extent::new(ByteOffset::ZERO, ByteLen::new(512)).unwrap();
        let first = Record::Write {
            extent,
            data: &[7; 512][..],
        };
        epoch.append(&first, time).unwrap();
        let tag = Tag {
            id: PointId::at(time).unwrap(),
            time,
            consistency: Consistency::Crash,
            label: String::new(),
            group: None,
            root: None,
        };
        epoch.append(&Record::Tag(tag), time).unwrap();
        writer.commit(epoch).unwrap();
        let volume = store.volume(id, None).unwrap();
        Self { folder, volume }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn serve(&self, wanted: Wanted) -> PointExport {
        let opened = Opened::open(&self.volume, wanted).unwrap();
        PointExport::start(opened, &self.socket()).unwrap()
    }

    fn writable(&self) -> PointExport {
        self.serve(Wanted::Write(PointSelector::Latest, BranchPurpose::Test))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        let limit = Some(Duration::from_secs(20));
        stream.set_read_timeout(limit).unwrap();
        stream.set_write_timeout(limit).unwrap();
        stream
    }

    /// A client that is served, with simple replies.
    fn served(&self) -> UnixStream {
        let mut stream = self.connect();
        let _: [u8; 18] = take(&mut stream);
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let _: [u8; 10] = take(&mut stream);
        stream
    }

    /// A client beside the others reads and writes.
    fn assert_serves(&self, byte: u8) {
        let mut stream = self.served();
        write(&mut stream, 1, SIZE - 4096, &[byte; 4096]);
        assert_eq!(reply(&mut stream), (0, 1));
        stream.write_all(&request(0, 2, SIZE - 8192, 8192)).unwrap();
        assert_eq!(reply(&mut stream), (0, 2));
        let data: [u8; 8192] = take(&mut stream);
        assert!(data[..4096].iter().all(|&byte| byte == 7));
        assert!(data[4096..].iter().all(|&other| other == byte));
        stream.write_all(&request(2, 0, 0, 0)).unwrap();
        assert!(is_ended(&mut stream));
    }
}

fn take<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn request(command: u8, tag: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, command]);
    bytes.extend(tag.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn write(stream: &mut UnixStream, tag: u64, offset: u64, data: &[u8]) {
    let header = request(1, tag, offset, data.len() as u32);
    stream.write_all(&[&header, data].concat()).unwrap();
}

/// The error and the tag of the next reply.
fn reply(stream: &mut UnixStream) -> (u32, u64) {
    let bytes: [u8; 16] = take(stream);
    assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
    let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
    (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
}

/// Whether the server has ended the connection, all of its replies read.
fn is_ended(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn random_bytes_end_their_connection_only() {
    let rig = Rig::new();
    let export = rig.writable();
    let mut state = 7_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    };
    for n in 0..40 {
        let mut noise: Vec<u8> = (0..2000).map(|_| random()).collect();
        let mut stream = if n % 2 == 0 {
            rig.connect()
        } else {
            noise
                .splice(..0, request(random() % 9, 1, 0, 4096))
                .for_each(drop);
            rig.served()
        };
        // It may end before all is sent.
        let _ = stream.write_all(&noise);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert!(is_ended(&mut stream));
    }
    rig.assert_serves(9);
    wait_for("they are gone", || export.clients() == 0);
}

#[test]
fn errors_are_answered_and_the_stream_goes_on() {
    let rig = Rig::new();
    let _export = rig.writable();
    let mut stream = rig.served();
    let refusals = [
        (request(1, 1, SIZE, 512), 512, 28),
        (request(1, 2, 100, 512), 512, 22),
        (request(0, 3, SIZE, 512), 0, 22),
        (request(4, 4, u64::MAX, 512), 0, 22),
        (request(77, 5, 0, 512), 0, 22),
        (request(0, 6, 0, u32::MAX), 0, 22),
    ];
    for (n, (header, payload, error)) in refusals.into_iter().enumerate() {
        stream.write_all(&header).unwrap();
        stream.write_all(&vec![1; payload]).unwrap();
        assert_eq!(reply(&mut stream), (error, n as u64 + 1));
    }
    rig.assert_serves(8);
}

#[test]
fn what_is_read_only_is_not_changed() {
    let rig = Rig::new();
    let export = rig.serve(Wanted::Read(PointSelector::Latest));
    let mut stream = rig.served();
    write(&mut stream, 1, 0, &[1; 512]);
    assert_eq!(reply(&mut stream), (1, 1));
    for (command, tag) in [(4, 2), (6, 3)] {
        stream.write_all(&request(command, tag, 0, 512)).unwrap();
        assert_eq!(reply(&mut stream), (1, tag));
    }
    stream.write_all(&request(3, 4, 0, 0)).unwrap();
    assert_eq!(reply(&mut stream), (0, 4));
    stream.write_all(&request(0, 5, 0, 512)).unwrap();
    assert_eq!(reply(&mut stream), (0, 5));
    assert_eq!(take::<512>(&mut stream), [7; 512]);
    let opened = export.stop().unwrap();
    let refused = opened.write(ByteOffset::ZERO, &[1]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::State);
}

#[test]
fn a_client_that_does_not_listen_holds_nobody_up() {
    let rig = Rig::new();
    let export = rig.writable();
    let limit = Some(Duration::from_millis(500));
    for asked in [request(0, 1, 0, 8 << 20), request(5, 1, 0, 512)] {
        let mut deaf = rig.served();
        deaf.set_write_timeout(limit).unwrap();
        let many = (0..1_000_000).map_while(|_| deaf.write_all(&asked).ok());
        assert!(many.count() < 1_000_000, "replies are gathered without end");
        rig.assert_serves(3);
        std::mem::forget(deaf);
    }
    let began = Instant::now();
    export
        .stop()
        .unwrap()
        .into_branch()
        .unwrap()
        .discard()
        .unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(!rig.socket().exists());
    assert!(rig.volume.branches().unwrap().is_empty());
}

#[test]
fn stopping_answers_what_was_received_and_keeps_it() {
    let rig = Rig::new();
    let export = rig.writable();
    let mode = std::fs::metadata(rig.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut stream = rig.served();
    for n in 1..40 {
        write(&mut stream, n, n * 4096, &[n as u8; 4096]);
    }
    let stopping = std::thread::spawn(move || export.stop().unwrap());
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    let branch = stopping.join().unwrap().into_branch().unwrap();
    let id = branch.info().id;
    branch.flush().unwrap();
    drop(branch);
    let branch = rig.volume.open_branch(id).unwrap();
    let answered = answers.chunks(16).map(|reply| u64::from(reply[15]));
    for n in answered {
        let mut bytes = [0; 4096];
        branch
            .read_at(ByteOffset::new(n * 4096), &mut bytes)
            .unwrap();
        assert!(bytes.iter().all(|&byte| u64::from(byte) == n), "{n}");
    }
}

#[test]
fn requests_of_one_client_and_of_many_go_on_side_by_side() {
    let rig = Rig::new();
    let export = rig.writable();
    std::thread::scope(|scope| {
        for client in 0..4_u64 {
            let rig = &rig;
            scope.spawn(move || {
                let mut stream = rig.served();
                let mine = client * (SIZE / 4);
                for round in 0..20_u64 {
                    for n in 0..32 {
                        let byte = (client * 50 + round) as u8;
                        write(&mut stream, n, mine + n * 8192, &[byte; 8192]);
                    }
                    (0..32).for_each(|_| assert_eq!(reply(&mut stream).0, 0));
                    // One that has flushed has done so for all.
                    stream.write_all(&request(3, 99, 0, 0)).unwrap();
                    assert_eq!(reply(&mut stream), (0, 99));
                    stream.write_all(&request(0, 100, mine, 32 * 8192)).unwrap();
                    assert_eq!(reply(&mut stream), (0, 100));
                    let mut data = vec![0; 32 * 8192];
                    stream.read_exact(&mut data).unwrap();
                    assert!(data.iter().all(|&byte| byte == (client * 50 + round) as u8));
                }
            });
        }
    });
    let branch = export.stop().unwrap().into_branch().unwrap();
    branch.discard().unwrap();
}
