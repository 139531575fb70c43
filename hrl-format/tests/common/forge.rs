//! What one without the key can do to a file: change any field and make every checksum
//! agree again, so that what looks behind the checksums is tested, too.

use hrl_format::layout::{
    FRAME_HEAD_SUMMED, FRAME_MAGIC, PAGE, PAGE_SUMMED, RawFrame, RawHeader, RawRecord, RawTrailer,
    pages,
};
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, IntoBytes};

/// Makes all checksums agree with what they cover; all else stays as it is.
pub fn mend(file: &mut [u8]) {
    let (whole, _) = file.as_chunks_mut::<PAGE>();
    let Some(last) = whole.len().checked_sub(1).filter(|&last| last > 0) else {
        return;
    };
    sum_page(&mut whole[0]);
    let sections = whole[last].as_slice();
    let trailer = RawTrailer::read_from_bytes(sections).unwrap();
    let first_section = (trailer.directory.position.get() / PAGE as u64).clamp(1, last as u64);
    let mut at = PAGE;
    while at < first_section as usize * PAGE {
        at += mend_frame(&mut file[at..]);
    }
    let (whole, _) = file.as_chunks_mut::<PAGE>();
    let own = RawHeader::read_from_bytes(&whole[0][..]).unwrap().log;
    let mut digest = Sha256::new();
    digest.update(whole[0]);
    for page in &mut whole[first_section as usize..last] {
        // Pages taken over from other logs are those logs' own.
        if page[PAGE - 32..PAGE - 16] == own {
            sum_page(page);
        }
        digest.update(*page);
    }
    let mut trailer = trailer;
    trailer.digest = digest.finalize().into();
    whole[last].copy_from_slice(trailer.as_bytes());
    sum_page(&mut whole[last]);
}

fn sum_page(page: &mut [u8; PAGE]) {
    let crc = crc32fast::hash(&page[..PAGE_SUMMED]);
    page[PAGE_SUMMED..].copy_from_slice(&crc.to_le_bytes());
}

/// Returns how long the frame is that `file` begins with.
fn mend_frame(file: &mut [u8]) -> usize {
    let Ok((mut raw, _)) = RawFrame::read_from_prefix(file) else {
        return PAGE;
    };
    if raw.magic != FRAME_MAGIC {
        return PAGE;
    }
    let head = size_of::<RawFrame>();
    let table = (raw.records.get() as usize).saturating_mul(size_of::<RawRecord>());
    let span = pages(
        head.saturating_add(table)
            .saturating_add(raw.stored.get() as usize)
            % (1 << 40),
    );
    let Some(data) = file.get(head.saturating_add(table)..span) else {
        return PAGE;
    };
    raw.data_crc.set(crc32fast::hash(data));
    file[..head].copy_from_slice(raw.as_bytes());
    raw.head_crc
        .set(crc32fast::hash(&file[FRAME_HEAD_SUMMED..head + table]));
    file[..head].copy_from_slice(raw.as_bytes());
    span
}

/// `file`, with the place in the chain that `other` has.
pub fn claim_to_be(file: &[u8], other: &[u8]) -> Vec<u8> {
    let mut forged = file.to_vec();
    let claimed = RawHeader::read_from_bytes(&other[..PAGE]).unwrap();
    let mut header = RawHeader::read_from_bytes(&file[..PAGE]).unwrap();
    header.stands_for = claimed.stands_for;
    header.stands_for_seal = claimed.stands_for_seal;
    header.last_epoch = claimed.last_epoch;
    forged[..PAGE].copy_from_slice(header.as_bytes());
    mend(&mut forged);
    forged
}
