//! Logs made from a fuzzer's input: changes to a small volume, cut into consecutive logs,
//! and what each byte of the volume is afterwards.

use arbitrary::Arbitrary;
use hrl_format::id::{PointId, VolumeId};
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, Timestamp, VolumeSize};
use hrl_format::{
    Compression, EpochRange, ExtentKind, FrameBuffer, Log, LogHeader, LogOptions, LogWriter,
    ReadAt, VolumeKey,
};

/// The volume at first.
pub const VOLUME: u64 = 96 << 10;

/// One change, or a cut between two logs.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Step {
    /// The range is filled with a byte.
    Write(u16, u16, u8),
    /// The range becomes zeroes.
    Zeroes(u16, u16),
    /// The range becomes undefined.
    Discard(u16, u16),
    /// A recovery point.
    Tag(u8),
    /// Another size.
    Resize(u16),
    /// The frame ends here.
    Flush,
    /// The log ends here, another follows.
    Cut,
}

/// How the logs are written.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// As they are.
    Plain,
    /// Compressed.
    Lz4,
    /// Encrypted.
    Encrypted,
}

impl Flavour {
    /// The key of an encrypted log.
    pub fn key(self) -> Option<VolumeKey> {
        (self == Self::Encrypted).then(key)
    }

    fn options(self) -> LogOptions {
        let compression = if self == Self::Lz4 {
            Compression::Lz4
        } else {
            Compression::None
        };
        LogOptions { compression }
    }
}

/// The key of everything encrypted here, seeds included.
pub fn key() -> VolumeKey {
    VolumeKey::from_bytes([0x42; 32])
}

/// What a byte of the volume is, as far as logs say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Byte {
    /// No record says.
    Untouched,
    /// This.
    Is(u8),
    /// Whatever suits the reader.
    Undefined,
}

/// Consecutive logs, and the volume after the last.
#[derive(Debug)]
pub struct Story {
    /// The sealed logs, oldest first.
    pub logs: Vec<Vec<u8>>,
    /// The volume's bytes.
    pub bytes: Vec<Byte>,
}

/// Writes the logs that `steps` tell.
pub fn tell(steps: &[Step], flavour: Flavour) -> Story {
    let mut story = Story {
        logs: Vec::new(),
        bytes: vec![Byte::Untouched; VOLUME as usize],
    };
    let header = LogHeader::new(
        VolumeId::from_bytes([7; 16]),
        VolumeSize::new(VOLUME),
        Epoch::new(1),
    );
    let mut header = header.expect("random bytes");
    for steps in steps.split(|step| matches!(step, Step::Cut)) {
        let key = flavour.key();
        header.volume_size = VolumeSize::new(story.bytes.len() as u64);
        let mut writer =
            LogWriter::create(Vec::new(), header.clone(), &flavour.options(), key.as_ref())
                .expect("a vector takes it");
        for (n, step) in steps.iter().enumerate() {
            story.append(&mut writer, *step, Timestamp::from_nanos(n as i64));
        }
        let last = writer.header().clone();
        let (file, seal) = writer.seal().expect("a vector takes it");
        let end = last.chain_end(seal.digest);
        let next = LogHeader::new(last.volume, last.volume_size, last.epochs.last.next());
        header = next.expect("random bytes");
        header.epochs = EpochRange::single(last.epochs.last.next());
        (header.previous, header.previous_seal) = (Some(end.log), end.seal);
        story.logs.push(file);
    }
    story
}

impl Story {
    fn append(&mut self, writer: &mut LogWriter<Vec<u8>>, step: Step, time: Timestamp) {
        let size = self.bytes.len() as u64;
        let extent = |at: u16, len: u16| {
            let at = u64::from(at) % size;
            let len = (1 + u64::from(len)).min(size - at);
            Extent::new(ByteOffset::new(at), ByteLen::new(len)).expect("within the volume")
        };
        let data;
        let record = match step {
            Step::Write(at, len, fill) => {
                let extent = extent(at, len);
                data = vec![fill; extent.len().get() as usize];
                self.fill(extent, Byte::Is(fill));
                Record::Write {
                    extent,
                    data: &data[..],
                }
            }
            Step::Zeroes(at, len) => {
                let extent = extent(at, len);
                self.fill(extent, Byte::Is(0));
                Record::Zeroes { extent }
            }
            Step::Discard(at, len) => {
                let extent = extent(at, len);
                self.fill(extent, Byte::Undefined);
                Record::Discard { extent }
            }
            Step::Tag(id) => Record::Tag(Tag {
                id: PointId::from_bytes([id; 16]),
                time,
                consistency: Consistency::Crash,
                label: "x".repeat(id.into()),
                group: None,
                root: None,
            }),
            Step::Resize(size) => {
                let size = 1 + u64::from(size);
                self.bytes.resize(size as usize, Byte::Undefined);
                Record::Resize {
                    size: VolumeSize::new(size),
                }
            }
            Step::Flush => return writer.flush().expect("a vector takes it"),
            Step::Cut => return,
        };
        writer.append(&record, time).expect("a sound record");
    }

    fn fill(&mut self, extent: Extent, byte: Byte) {
        self.bytes[extent.offset().get() as usize..extent.end().get() as usize].fill(byte);
    }
}

/// What a sealed log's index says of each byte.
pub fn bytes_of<R: ReadAt>(log: &Log<R>) -> Vec<Byte> {
    let mut bytes = vec![Byte::Untouched; log.seal().volume_size.get() as usize];
    let mut frame = FrameBuffer::new();
    for entry in log.index() {
        let entry = entry.expect("a sound index");
        let range = entry.extent.offset().get() as usize..entry.extent.end().get() as usize;
        match entry.kind {
            ExtentKind::Zeroes => bytes[range].fill(Byte::Is(0)),
            ExtentKind::Discard => bytes[range].fill(Byte::Undefined),
            ExtentKind::Write => {
                log.read_frame(entry.frame, &mut frame)
                    .expect("a sound frame");
                let data = frame
                    .slice(entry.at, entry.extent.len())
                    .expect("sound data");
                for (byte, found) in bytes[range].iter_mut().zip(data) {
                    *byte = Byte::Is(*found);
                }
            }
        }
    }
    bytes
}
