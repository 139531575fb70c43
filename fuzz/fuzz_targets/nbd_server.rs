//! What an NBD client sends, from its first byte on. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - however the bytes are cut, the talk is the same, and the requests with their data are;
//! - a request that is taken lies within the volume, in whole sectors.
//!
//! The first byte says how the rest is cut.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use libreplica::capture::nbd::handshake::{
    Access, Export, Negotiation, Progress, Session, Trim, Violation,
};
use libreplica::capture::nbd::inbox::{INBOX, Inbox, Step};
use libreplica::capture::nbd::requests::{Header, Task};
use libreplica::capture::nbd::{Allowance, Pool};
use libreplica::units::{SectorSize, VolumeSize};
use replica_fuzz::bounded;

const SIZE: u64 = 1 << 20;

/// Two names, of which nothing is known.
fn two() -> Vec<String> {
    vec!["since-a".to_owned(), "since-b".to_owned()]
}

fuzz_target!(|input: &[u8]| {
    let Some((&cut, input)) = input.split_first() else {
        return;
    };
    let export = Export {
        name: "volume".to_owned(),
        size: VolumeSize::new(SIZE),
        sector: SectorSize::B512,
        access: Access::ReadWrite,
        trim: Trim::Offered,
    };
    bounded(16 * input.len(), || {
        let whole = talk(&export, input, input.len());
        assert_eq!(whole, talk(&export, input, usize::from(cut) + 1));
        if let (Ok(Progress::Settled(session)), _, taken) = whole {
            let rest = &input[taken..];
            let whole = requests(rest, INBOX);
            assert_eq!(whole, requests(rest, usize::from(cut) * 16 + 1));
            whole
                .0
                .iter()
                .for_each(|(header, _)| check(header, &session, &export));
        }
    });
});

/// How a talk ends, what is said, how much of the input it takes.
fn talk(
    export: &Export,
    input: &[u8],
    cut: usize,
) -> (Result<Progress, Violation>, Vec<u8>, usize) {
    let mut said = Vec::new();
    let mut talk = Negotiation::new(export, &two, &mut said);
    let (mut start, mut end) = (0, 0);
    loop {
        match talk.advance(&input[start..end], &mut said) {
            Ok((taken, Progress::Answered)) => start += taken,
            Ok((0, Progress::Wants)) if end < input.len() => {
                end = input.len().min(end + cut);
            }
            Ok((taken, progress)) => return (Ok(progress), said, start + taken),
            Err(violation) => return (Err(violation), said, start),
        }
    }
}

type Found = Vec<(Header, Option<Vec<u8>>)>;

fn requests(mut input: &[u8], cut: usize) -> (Found, Option<Violation>) {
    let mut pool = Pool::new(&Arc::new(Allowance::new(0)));
    let mut inbox = Inbox::new(&[]).expect("there is memory");
    let mut found = Vec::new();
    loop {
        match inbox.next(&mut pool) {
            Ok(Step::Request(header, part)) => {
                let data = part.map(|part| {
                    let data = part.bytes()[..header.payload()].to_vec();
                    pool.give(part.buffer);
                    data
                });
                found.push((header, data));
            }
            Ok(Step::Full) => unreachable!("all buffers were given back"),
            Ok(Step::Wants) if input.is_empty() => return (found, None),
            Ok(Step::Wants) => {
                let mut to = inbox.receive().expect("nothing is received");
                let len = input.len().min(to.range.len()).min(cut);
                let (now, rest) = input.split_at(len);
                to.bytes_mut()[..len].copy_from_slice(now);
                input = rest;
                inbox.received(to, len);
            }
            Err(violation) => return (found, Some(violation)),
        }
    }
}

fn check(header: &Header, session: &Session, export: &Export) {
    if let Ok(
        Task::Read(extent)
        | Task::Write(extent, _)
        | Task::Zeroes(extent, ..)
        | Task::Discard(extent, _)
        | Task::Status(extent, _),
    ) = Task::of(header, session, export)
    {
        assert!(!extent.is_empty() && extent.end().get() <= SIZE);
        assert!(extent.offset().get() % 512 == 0 && extent.len().get() % 512 == 0);
    }
}
