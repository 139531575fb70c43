//! `replica log stat`: what a log is, and what it holds, in figures.

use std::process::ExitCode;

use hrl_format::id::LogId;
use hrl_format::units::ByteLen;
use hrl_format::{Ending, ExtentKind, Log, LogHeader, MarkDetail, Scanner, Shape, VolumeKey, ms};
use libreplica::Result;
use libreplica::time::rfc3339;
use serde::Serialize;

use super::ReadArgs;
use super::input::{Format, Input, key};
use crate::failure::Failure;
use crate::output;

/// What a native log is and holds, as JSON has it.
#[derive(Serialize)]
struct NativeStat {
    file: String,
    format: &'static str,
    log: String,
    previous: Option<String>,
    volume: String,
    generation: u64,
    generation_id: String,
    first_epoch: u64,
    last_epoch: u64,
    /// `as-read`, or `as-completed` if every record is a moment.
    order: &'static str,
    block_size: u32,
    sector_size: u32,
    volume_size: u64,
    created: String,
    key: Option<String>,
    file_bytes: u64,
    /// Bytes of the frames in the file, and of the data in them before compression.
    frame_bytes: u64,
    data_bytes: u64,
    frames: u64,
    records: Records,
    /// Null unless the log is sealed.
    seal: Option<SealStat>,
    /// Why it is not.
    torn: Option<String>,
}

#[derive(Default, Serialize)]
struct Records {
    write: u64,
    zeroes: u64,
    discard: u64,
    tag: u64,
    resize: u64,
}

/// What the seal says, and the state that the log leaves behind.
#[derive(Serialize)]
struct SealStat {
    digest: String,
    sealed: String,
    index_entries: u64,
    write_bytes: u64,
    zeroes_bytes: u64,
    discard_bytes: u64,
    final_size: u64,
    points: Vec<String>,
}

/// What an [MS-HRL] log is and holds, as JSON has it.
#[derive(Serialize)]
struct MsStat {
    file: String,
    format: &'static str,
    version: u32,
    log: String,
    previous: Option<String>,
    data_write: String,
    created: String,
    modified: String,
    file_bytes: u64,
    end_of_log: u64,
    error_code: i32,
    entries: u64,
    data_bytes: u64,
    largest_end: u64,
}

/// Prints what a log is and holds.
///
/// # Errors
/// If it cannot be read. A torn log is no error: what is whole is counted.
pub fn run(args: &ReadArgs) -> Result<ExitCode, Failure> {
    let input = Input::open(&args.file)?;
    let key = key(args.key_file.as_deref())?;
    match input.format() {
        Format::Native => {
            let stat = native(&input, key.as_ref())?;
            if args.json {
                output::json(&stat)?
            } else {
                stat.print()
            }
        }
        Format::MsHrl => {
            let stat = published(&input)?;
            if args.json {
                output::json(&stat)?
            } else {
                stat.print()
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn native(input: &Input, key: Option<&VolumeKey>) -> Result<NativeStat> {
    let failed = |error| input.native_error("read the log", error);
    let mut scanner = Scanner::new(input.stream()?, key).map_err(failed)?;
    let mut stat = NativeStat::new(input, scanner.header())?;
    while let Some(frame) = scanner.next_frame().map_err(failed)? {
        stat.frames += 1;
        stat.frame_bytes += frame.span() as u64;
        stat.data_bytes += frame.data_len() as u64;
        frame
            .table()
            .for_each(|entry| stat.records.count(&entry.shape));
    }
    match scanner.ending() {
        Some(Ending::Torn { cause, .. }) => stat.torn = Some(cause.to_string()),
        _ => stat.seal = Some(seal(input, key).map_err(failed)?),
    }
    Ok(stat)
}

fn seal(input: &Input, key: Option<&VolumeKey>) -> hrl_format::Result<SealStat> {
    let log = Log::open(input.file(), key)?;
    let mut stat = SealStat {
        digest: log.seal().digest.to_string(),
        sealed: rfc3339(log.seal().sealed),
        index_entries: log.seal().index_len,
        write_bytes: 0,
        zeroes_bytes: 0,
        discard_bytes: 0,
        final_size: log.seal().volume_size.get(),
        points: Vec::new(),
    };
    for entry in log.index() {
        let entry = entry?;
        let sum = match entry.kind {
            ExtentKind::Write => &mut stat.write_bytes,
            ExtentKind::Zeroes => &mut stat.zeroes_bytes,
            ExtentKind::Discard => &mut stat.discard_bytes,
        };
        *sum += entry.extent.len().get();
    }
    for mark in log.marks() {
        if let MarkDetail::Tag(tag) = mark?.detail {
            stat.points.push(tag.id.to_string());
        }
    }
    Ok(stat)
}

impl Records {
    const fn count(&mut self, shape: &Shape) {
        let kind = match shape {
            Shape::Write(_) => &mut self.write,
            Shape::Zeroes(_) => &mut self.zeroes,
            Shape::Discard(_) => &mut self.discard,
            Shape::Tag { .. } => &mut self.tag,
            Shape::Resize(_) => &mut self.resize,
        };
        *kind += 1;
    }
}

impl NativeStat {
    fn new(input: &Input, header: &LogHeader) -> Result<Self> {
        Ok(Self {
            file: input.path().display().to_string(),
            format: input.format().as_str(),
            log: header.log.to_string(),
            previous: header.previous.map(|log| log.to_string()),
            volume: header.volume.to_string(),
            generation: header.generation.number.get(),
            generation_id: header.generation.id.to_string(),
            first_epoch: header.epochs.first.get(),
            last_epoch: header.epochs.last.get(),
            order: header.order.as_str(),
            block_size: header.block.get(),
            sector_size: header.sector.get(),
            volume_size: header.volume_size.get(),
            created: rfc3339(header.created),
            key: header.key.map(|key| key.to_string()),
            file_bytes: input.len()?,
            frame_bytes: 0,
            data_bytes: 0,
            frames: 0,
            records: Records::default(),
            seal: None,
            torn: None,
        })
    }

    fn print(&self) {
        let epochs = match (self.first_epoch, self.last_epoch) {
            (first, last) if first == last => format!("{first}"),
            (first, last) => format!("{first} to {last}"),
        };
        println!("log         {} (hrl version 3)", self.log);
        println!("previous    {}", self.previous.as_deref().unwrap_or("none"));
        println!("volume      {}, {} bytes", self.volume, self.volume_size);
        println!("epochs      {epochs}, generation {}", self.generation);
        println!(
            "units       blocks of {}, sectors of {}",
            self.block_size, self.sector_size
        );
        println!("order       {}", self.order);
        println!("created     {}", self.created);
        println!(
            "encryption  {}",
            self.key
                .as_deref()
                .map_or("none".into(), |key| format!("key {key}"))
        );
        let (file, frames) = (
            output::bytes(self.file_bytes),
            output::bytes(self.frame_bytes),
        );
        println!(
            "size        {file}: {} frames of {frames} for {} of data",
            self.frames,
            output::bytes(self.data_bytes)
        );
        let Records {
            write,
            zeroes,
            discard,
            tag,
            resize,
        } = self.records;
        println!(
            "records     {write} write, {zeroes} zeroes, {discard} discard, {tag} tag, {resize} resize"
        );
        if let Some(seal) = &self.seal {
            println!("sealed      {}, {}", seal.sealed, seal.digest);
            let [write, zeroes, discard] =
                [seal.write_bytes, seal.zeroes_bytes, seal.discard_bytes].map(output::bytes);
            println!(
                "leaves      {write} written, {zeroes} of zeroes, {discard} undefined, in {} extents",
                seal.index_entries
            );
            seal.points
                .iter()
                .for_each(|point| println!("point       {point}"));
        }
        if let Some(torn) = &self.torn {
            println!("not sealed  {torn}");
        }
    }
}

fn published(input: &Input) -> Result<MsStat> {
    let failed = |error| input.ms_error("read the log", error);
    let mut reader = ms::Reader::open(input.file()).map_err(failed)?;
    let header = reader.header().clone();
    let (mut entries, mut data, mut largest) = (0, ByteLen::ZERO, 0);
    while let Some(write) = reader.next_write().map_err(failed)? {
        let extent = write.entry().extent;
        entries += 1;
        data = ByteLen::new(data.get() + extent.len().get());
        largest = extent.end().get().max(largest);
    }
    let id = |bytes| LogId::from_bytes(bytes);
    Ok(MsStat {
        file: input.path().display().to_string(),
        format: input.format().as_str(),
        version: match header.version {
            ms::FormatVersion::V1 => 1,
            ms::FormatVersion::V2 => 2,
        },
        log: id(header.id).to_string(),
        previous: Some(id(header.previous))
            .filter(|id| !id.is_nil())
            .map(|id| id.to_string()),
        data_write: id(header.data_write).to_string(),
        created: rfc3339(header.created.to_timestamp()),
        modified: rfc3339(header.modified.to_timestamp()),
        file_bytes: input.len()?,
        end_of_log: header.end_of_log.get(),
        error_code: header.error_code,
        entries,
        data_bytes: data.get(),
        largest_end: largest,
    })
}

impl MsStat {
    fn print(&self) {
        println!("log         {} (ms-hrl version {})", self.log, self.version);
        println!("previous    {}", self.previous.as_deref().unwrap_or("none"));
        println!("created     {}", self.created);
        println!("size        {}", output::bytes(self.file_bytes));
        let data = output::bytes(self.data_bytes);
        println!(
            "writes      {}, {data}, up to byte {}",
            self.entries, self.largest_end
        );
    }
}
