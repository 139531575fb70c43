//! The NBD protocol without sockets: whatever bytes come, and however they are cut, nothing
//! panics, nothing is taken twice, and what is served lies within the volume.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;

use libreplica::capture::inline::{Durability, Errno, REQUEST_MAX, Room};
use libreplica::capture::nbd::handshake::{
    Access, Export, Negotiation, Progress, Replies, Session, Trim, Violation,
};
use libreplica::capture::nbd::inbox::{INBOX, Inbox, Step};
use libreplica::capture::nbd::requests::{HEADER, Header, Tag, Task};
use libreplica::capture::nbd::{Allowance, Context, HowMany, Pool};
use libreplica::units::{ByteLen, ByteOffset, Extent, SectorSize, VolumeSize};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn export() -> Export {
    Export {
        name: "volume".to_owned(),
        size: VolumeSize::new(SIZE),
        sector: SectorSize::B512,
        access: Access::ReadWrite,
        trim: Trim::Offered,
    }
}

/// All that a talk says, and how it ends, when `input` comes in pieces of these lengths.
fn talk(input: &[u8], pieces: &[usize]) -> (Vec<u8>, Result<Progress, Violation>, usize) {
    let export = export();
    let mut said = Vec::new();
    let mut talk = Negotiation::new(&export, &Vec::new, &mut said);
    let (mut start, mut end) = (0, 0);
    let mut pieces = pieces.iter().cycle();
    loop {
        match talk.advance(&input[start..end], &mut said) {
            Ok((taken, Progress::Answered)) => {
                assert!(taken > 0 && start + taken <= end);
                start += taken;
            }
            Ok((0, Progress::Wants)) if end < input.len() => {
                end = input.len().min(end + pieces.next().unwrap().max(&1));
            }
            Ok((taken, progress)) => {
                assert!(start + taken <= end);
                return (said, Ok(progress), start + taken);
            }
            Err(violation) => return (said, Err(violation), start),
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn request(flags: u16, command: u16, tag: u64, offset: u64, len: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&tag.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn a_usual_talk_is_answered_to_the_byte() {
    let mut input = 3_u32.to_be_bytes().to_vec();
    input.extend(option(8, &[]));
    input.extend(option(99, b"?"));
    // GO: no name, one property: block sizes.
    input.extend(option(7, &[0, 0, 0, 0, 0, 1, 0, 3]));
    input.extend(b"the first request");
    let (said, progress, taken) = talk(&input, &[1000]);
    let settled = Session {
        replies: Replies::Structured,
        contexts: Vec::new(),
    };
    assert_eq!(progress, Ok(Progress::Settled(settled)));
    assert_eq!(&input[taken..], b"the first request");
    let mut expected = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let mut reply = |option: u32, kind: u32, data: &[u8]| {
        expected.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
        expected.extend(option.to_be_bytes());
        expected.extend(kind.to_be_bytes());
        expected.extend((data.len() as u32).to_be_bytes());
        expected.extend(data);
    };
    reply(8, 1, &[]);
    reply(99, (1 << 31) + 1, b"not served here");
    reply(7, 3, &[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 1, 0b1110_1101]);
    reply(7, 3, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    reply(7, 1, &[]);
    assert_eq!(said, expected);
}

#[test]
fn an_old_client_gets_zeroes_or_none() {
    for (flags, zeroes) in [(1_u32, 124), (3, 0), (0, 124)] {
        let mut input = flags.to_be_bytes().to_vec();
        input.extend(option(1, b"volume"));
        let (said, progress, _) = talk(&input, &[1000]);
        assert_eq!(progress, Ok(Progress::Settled(Session::default())));
        assert_eq!(said.len(), 18 + 10 + zeroes);
        assert_eq!(said[18..26], SIZE.to_be_bytes());
        assert_eq!(said[26..28], [1, 0b0110_1101]);
    }
}

#[test]
fn who_breaks_the_talk_is_sent_away() {
    let hello = 3_u32.to_be_bytes();
    let end = |behind: &[u8]| talk(&[&hello[..], behind].concat(), &[7]).1;
    assert_eq!(talk(&[0, 0, 0, 4], &[4]).1, Err(Violation::Flags));
    assert_eq!(
        end(b"IHAVEOPS\0\0\0\x07\0\0\0\0"),
        Err(Violation::OptionMagic)
    );
    assert_eq!(
        end(b"IHAVEOPT\0\0\0\x07\0\x01\0\x01"),
        Err(Violation::OptionLength)
    );
    assert_eq!(end(&option(1, b"another")), Err(Violation::Export));
    let many: Vec<u8> = (0..2000).flat_map(|_| option(3, &[])).collect();
    assert_eq!(end(&many), Err(Violation::Options));
    assert_eq!(end(&option(2, &[])), Ok(Progress::Over));
    assert_eq!(end(b"IHAVE"), Ok(Progress::Wants));
}

#[test]
fn contexts_are_for_structured_replies_only() {
    let query = [
        &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..],
        b"base:allocation",
    ]
    .concat();
    let go = option(7, &[0; 6]);
    let with = |first: Vec<u8>| {
        let hello = 3_u32.to_be_bytes().to_vec();
        let input = [hello, first, option(10, &query), go.clone()].concat();
        match talk(&input, &[5]) {
            (_, Ok(Progress::Settled(session)), _) => session.contexts,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(with(option(8, &[])), [Context::Allocation]);
    assert_eq!(with(Vec::new()), []);
    // Chosen, and then another choice of none.
    let none = option(10, &[0; 8]);
    let hello = 3_u32.to_be_bytes().to_vec();
    let input = [hello, option(8, &[]), option(10, &query), none, go.clone()].concat();
    let (_, progress, _) = talk(&input, &[1000]);
    let Ok(Progress::Settled(session)) = progress else {
        panic!("{progress:?}")
    };
    assert_eq!(session.contexts, []);
}

fn parse(bytes: [u8; HEADER]) -> Header {
    Header::parse(&bytes).unwrap()
}

#[test]
fn requests_are_what_they_say_or_refused() {
    let export = export();
    let session = Session {
        replies: Replies::Structured,
        contexts: vec![Context::Allocation],
    };
    let extent = |offset, len| Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap();
    let task = |flags, command, offset, len| {
        Task::of(
            &parse(request(flags, command, 1, offset, len)),
            &session,
            &export,
        )
    };
    let (cached, durable) = (Durability::Cached, Durability::Durable);
    let whole = SIZE as u32;
    assert_eq!(task(0, 0, 0, whole), Ok(Task::Read(extent(0, SIZE))));
    assert_eq!(task(5, 0, 512, 512), Ok(Task::Read(extent(512, 512))));
    assert_eq!(
        task(0, 1, 512, 512),
        Ok(Task::Write(extent(512, 512), cached))
    );
    assert_eq!(task(1, 1, 0, 512), Ok(Task::Write(extent(0, 512), durable)));
    assert_eq!(task(0, 2, 0, 0), Ok(Task::Disconnect));
    assert_eq!(task(1, 3, 0, 0), Ok(Task::Flush));
    assert_eq!(
        task(1, 4, 0, 512),
        Ok(Task::Discard(extent(0, 512), durable))
    );
    assert_eq!(task(0, 5, 0, 512), Ok(Task::Nothing));
    let (freed, kept) = (Room::MayBeFreed, Room::Kept);
    assert_eq!(
        task(0, 6, 0, 512),
        Ok(Task::Zeroes(extent(0, 512), freed, cached))
    );
    assert_eq!(
        task(3, 6, 0, 512),
        Ok(Task::Zeroes(extent(0, 512), kept, durable))
    );
    assert_eq!(
        task(0, 7, 0, whole),
        Ok(Task::Status(extent(0, SIZE), HowMany::Many))
    );
    assert_eq!(
        task(8, 7, 0, 512),
        Ok(Task::Status(extent(0, 512), HowMany::One))
    );
    let refused = |errno| Err(Errno(errno));
    assert_eq!(task(16, 6, 0, 512), refused(libc::EOPNOTSUPP));
    // Past the end, without a length, unaligned, with flags of others, unknown.
    assert_eq!(task(0, 0, 512, whole), refused(libc::EINVAL));
    assert_eq!(task(0, 1, u64::MAX - 511, 512), refused(libc::ENOSPC));
    assert_eq!(task(0, 6, SIZE, 512), refused(libc::ENOSPC));
    assert_eq!(task(0, 4, SIZE, 512), refused(libc::EINVAL));
    assert_eq!(task(0, 1, 0, 0), refused(libc::EINVAL));
    assert_eq!(task(0, 0, 1, 512), refused(libc::EINVAL));
    assert_eq!(task(0, 0, 0, 100), refused(libc::EINVAL));
    assert_eq!(task(2, 1, 0, 512), refused(libc::EINVAL));
    assert_eq!(task(0, 8, 0, 512), refused(libc::EINVAL));
    assert_eq!(task(0, 0xffff, 0, 512), refused(libc::EINVAL));
    // What was not settled on.
    let plain = Session::default();
    let status = parse(request(0, 7, 1, 0, 512));
    assert_eq!(Task::of(&status, &plain, &export), refused(libc::EINVAL));
    let one_piece = parse(request(4, 0, 1, 0, 512));
    assert_eq!(Task::of(&one_piece, &plain, &export), refused(libc::EINVAL));
    // A write that is too long has data that nobody would wait for.
    let long = request(0, 1, 1, 0, REQUEST_MAX.get() as u32 + 1);
    assert_eq!(Header::parse(&long), Err(Violation::WriteLength));
    assert_eq!(Header::parse(&[0; HEADER]), Err(Violation::RequestMagic));
}

/// Bytes that look like options, mostly.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(vec![0, 0, 0, 0, 0, 0]),
        Just([&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5][..], b"base:"].concat()),
        Just([&[0, 0, 0, 6][..], b"volume", &[0, 0, 0, 0]].concat()),
    ];
    let one = prop_oneof![
        9 => (0..13_u32, data).prop_map(|(number, data)| option(number, &data)),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    (0..5_u32, prop::collection::vec(one, 0..12))
        .prop_map(|(flags, options)| [flags.to_be_bytes().to_vec(), options.concat()].concat())
}

#[test]
fn a_write_that_nearly_fills_the_inbox_is_received_whole() {
    for len in INBOX - 60..INBOX + 60 {
        let mut input = request(0, 1, 7, 0, len as u32).to_vec();
        input.resize(HEADER + len, 9);
        input.extend(request(0, 2, 0, 0, 0));
        let (found, violation) = requests(&input, &[INBOX]);
        assert_eq!((found.len(), violation), (2, None), "{len}");
        assert_eq!(found[0].1.as_ref().unwrap(), &vec![9; len]);
    }
}

/// Requests with their data.
type Found = Vec<(Header, Option<Vec<u8>>)>;

/// What an inbox makes of `input` when it comes in pieces of these lengths.
fn requests(input: &[u8], pieces: &[usize]) -> (Found, Option<Violation>) {
    let allowance = Arc::new(Allowance::new(1 << 20));
    let mut pool = Pool::new(&allowance);
    let first = input.len().min(pieces[0]);
    let mut inbox = Inbox::new(&input[..first]).unwrap();
    let mut rest = &input[first..];
    let mut pieces = pieces.iter().cycle().skip(1);
    let mut found = Vec::new();
    loop {
        match inbox.next(&mut pool) {
            Ok(Step::Request(header, part)) => {
                let data = part.map(|part| {
                    let len = header.payload().min(part.bytes().len());
                    let data = part.bytes()[..len].to_vec();
                    pool.give(part.buffer);
                    data
                });
                found.push((header, data));
            }
            Ok(Step::Full) => panic!("all buffers were given back"),
            Ok(Step::Wants) if rest.is_empty() => return (found, None),
            Ok(Step::Wants) => {
                let mut to = inbox.receive().unwrap();
                let len = rest.len().min(to.range.len()).min(*pieces.next().unwrap());
                assert!(!to.range.is_empty());
                to.bytes_mut()[..len].copy_from_slice(&rest[..len]);
                rest = &rest[len..];
                inbox.received(to, len);
            }
            Err(violation) => return (found, Some(violation)),
        }
    }
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let around = INBOX as u32 - 100..INBOX as u32 + 100;
    let len = prop_oneof![Just(512), Just(4096), 0..100_000_u32, around];
    let one = prop_oneof![
        20 => (0..16_u16, 0..9_u16, any::<u64>(), 0..2 * SIZE, len).prop_map(
            |(flags, command, tag, offset, len)| {
                let header = request(flags, command, tag, offset, len);
                let payload = if command == 1 { len as usize } else { 0 };
                let data: Vec<u8> = (0..payload).map(|n| (tag as usize + n) as u8).collect();
                [&header[..], &data].concat()
            }
        ),
        1 => prop::collection::vec(any::<u8>(), 1..40),
    ];
    prop::collection::vec(one, 0..20).prop_map(|all| all.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_talk_is_the_same_however_it_is_cut(
        input in options(),
        pieces in prop::collection::vec(1..50_usize, 1..8),
    ) {
        let whole = talk(&input, &[input.len().max(1)]);
        prop_assert_eq!(&talk(&input, &pieces), &whole);
        // What is said is bounded by what is asked.
        prop_assert!(whole.0.len() < 200 + 20 * input.len());
    }

    #[test]
    fn requests_are_the_same_however_they_are_cut(
        input in stream(),
        pieces in prop::collection::vec(prop_oneof![1..60_000_usize, Just(INBOX)], 1..8),
    ) {
        let whole = requests(&input, &[200_000]);
        prop_assert_eq!(&requests(&input, &pieces), &whole);
        for (header, data) in &whole.0 {
            let Tag(tag) = header.tag;
            if let (1, Some(data)) = (header.command, data) {
                prop_assert_eq!(data.len(), header.len as usize);
                prop_assert!(data.iter().enumerate().all(|(n, byte)| *byte == (tag as usize + n) as u8));
            }
        }
    }

    #[test]
    fn what_is_served_lies_within_the_volume(
        flags in 0..32_u16,
        command in 0..9_u16,
        offset in prop_oneof![any::<u64>(), (0..SIZE / 256).prop_map(|n| n * 256)],
        len in prop_oneof![any::<u32>(), (0..5000_u32).prop_map(|n| n * 256)],
    ) {
        let Ok(header) = Header::parse(&request(flags, command, 0, offset, len)) else {
            return Ok(());
        };
        let session = Session { replies: Replies::Structured, contexts: vec![Context::Allocation] };
        if let Ok(
            Task::Read(extent) | Task::Write(extent, _) | Task::Zeroes(extent, ..)
            | Task::Discard(extent, _) | Task::Status(extent, _),
        ) = Task::of(&header, &session, &export()) {
            prop_assert!(extent.end().get() <= SIZE && !extent.is_empty());
            prop_assert_eq!((extent.offset().get(), extent.len().get()), (offset, u64::from(len)));
            prop_assert!(offset % 512 == 0 && len % 512 == 0);
        }
    }
}
