//! [MS-HRL] files, read and checked. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - whatever a check finds sound, the reader reads to its end;
//! - whatever the reader reads to its end, a check finds sound.
#![no_main]

use std::io::Cursor;

use hrl_format::ms::{self, Reader};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::{bounded, file, resum};

fuzz_target!(|input: &[u8]| {
    let file = file(input, resum::ms_hrl);
    bounded(file.len(), || {
        let read = read(&file);
        let check = ms::check(Cursor::new(&file));
        let sound = check.as_ref().is_ok_and(ms::CheckReport::is_sound);
        assert_eq!(read.is_ok(), sound, "{read:?} {check:?}");
    });
});

fn read(file: &[u8]) -> Result<(), ms::Error> {
    let mut reader = Reader::open(Cursor::new(file))?;
    let mut buffer = [0; 1000];
    while let Some(write) = reader.next_write()? {
        let mut data = reader.data(&write)?;
        while data.read(&mut buffer)? > 0 {}
    }
    Ok(())
}
