//! Proof, at attach, that the programs see this disk: reads of our own are followed from
//! submission to completion. A driver that completes bios in a way the block layer does not
//! announce would show here, before anybody relies on it.

use std::time::{Duration, Instant};

use crate::capture::state::{State, Word};
use crate::device::{BlockDevice, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::reader::{ReadEngine, Reader, ReaderOptions};
use crate::units::{ByteLen, ByteOffset, Extent};

/// Looks at most. A program is not run where the kernel is within another, which happens at
/// times under load; that a device's ends are never seen is the same at every look.
const LOOKS: u32 = 4;
const READS: u64 = 8;
const LIMIT: Duration = Duration::from_secs(2);
const OPERATION: &str = "check that the disk's reads and writes are seen";

// The values of `Word::Probing`.
pub(super) const OFF: u64 = 0;
pub(super) const ALL: u64 = 1;
const ENDS: u64 = 2;

#[derive(Clone, Copy, Debug)]
struct Seen {
    submitted: u64,
    completed: u64,
    requests: u64,
}

fn seen(state: &State) -> Seen {
    Seen {
        completed: state.get(Word::ProbeCompleted),
        submitted: state.get(Word::ProbeSubmitted),
        requests: state.get(Word::ProbeRequests),
    }
}

/// Reads a little of `disk`, and checks that each read was seen to begin and to end. Turns
/// off the following of reads, which is on from the moment the programs are attached, only
/// if so: whoever adopts a tracker with it on knows that this is still to be done.
///
/// # Errors
/// [`ErrorKind::Kernel`] if not; [`ErrorKind::Io`] and [`ErrorKind::Vanished`] if the disk
/// could not be read.
pub(super) fn probe(disk: &BlockDevice, state: &State) -> Result<()> {
    let mut looks = 0;
    let seen = loop {
        looks += 1;
        let seen = look(disk, state)?;
        if seen.is_ok() || looks == LOOKS {
            break seen;
        }
        // What was missed counts no longer. Whoever's read ends only now spoils one more look.
        state.set(Word::ProbeSubmitted, 0);
        state.set(Word::ProbeCompleted, 0);
    };
    seen.map(|()| state.set(Word::Probing, OFF))
        .map_err(|what| {
            Error::new(ErrorKind::Kernel, OPERATION)
                .path(disk.path())
                .detail(what)
                .advice(super::NO_OTHER_WAY)
        })
}

/// One look: whether all was seen, or what was not.
fn look(disk: &BlockDevice, state: &State) -> Result<Result<(), String>> {
    state.set(Word::Probing, ALL);
    let before = seen(state);
    let read = read_a_little(disk);
    state.set(Word::Probing, ENDS);
    let began = Instant::now();
    let verdict = loop {
        let verdict = judge(before, seen(state), disk.queue());
        if verdict.is_ok() || began.elapsed() > LIMIT {
            break verdict;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    read.map(|()| verdict)
}

fn read_a_little(disk: &BlockDevice) -> Result<()> {
    let sector = u64::from(disk.logical_sector().get());
    let piece = disk.logical_sector().get().max(4096);
    let options = ReaderOptions {
        depth: 1,
        piece,
        engine: ReadEngine::Plain,
    };
    let mut reader = Reader::open(disk.node(), disk.logical_sector(), options)?;
    let step = disk.size().get() / READS / sector * sector;
    let places = (0..READS).map(|i| ByteOffset::new(i * step));
    let mut pieces = reader.pieces(places.filter_map(|at| Extent::new(at, ByteLen::new(sector))));
    while pieces.next()?.is_some() {}
    Ok(())
}

/// Whether what was counted proves that the programs see the disk. Others read, too.
fn judge(before: Seen, now: Seen, queue: Queue) -> Result<(), String> {
    let submitted = now.submitted - before.submitted;
    // Of others' reads, some were on their way before: all that were ever followed end.
    let pending = now.submitted.abs_diff(now.completed);
    if submitted < READS {
        return Err(format!("of {READS} reads, {submitted} were seen to begin"));
    }
    if pending != 0 {
        return Err(format!(
            "of {submitted} reads, {pending} were not seen to end"
        ));
    }
    if queue == Queue::Requests && now.requests == before.requests {
        return Err("no request was seen to end".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Seen = Seen {
        submitted: 7,
        completed: 5,
        requests: 5,
    };

    #[test]
    fn only_whole_sight_is_a_proof() {
        let now = |submitted, completed, requests| {
            let seen = Seen {
                submitted,
                completed,
                requests,
            };
            judge(NONE, seen, Queue::Requests).is_ok()
        };
        assert!(now(15, 15, 6), "two were on their way");
        assert!(now(40, 40, 9), "others read at the same time");
        assert!(!now(7, 7, 6), "submissions are not seen");
        assert!(!now(15, 14, 6), "a completion is not seen");
        assert!(!now(15, 15, 5), "requests are not seen");
        let seen = Seen {
            submitted: 15,
            completed: 15,
            requests: 5,
        };
        assert!(judge(NONE, seen, Queue::Bios).is_ok());
    }
}
