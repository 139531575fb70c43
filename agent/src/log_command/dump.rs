//! `replica log dump`: every record of a log in its order, as text or as one JSON document
//! that is printed while it is read, so that a log of any length is dumped in little memory.

use std::io::{BufWriter, StdoutLock, Write};
use std::process::ExitCode;

use hrl_format::ms;
use hrl_format::record::Record;
use hrl_format::units::{Extent, Timestamp};
use hrl_format::{Ending, Scanner, Shape, TableEntry, VolumeKey};
use libreplica::time::rfc3339;
use serde::Serialize;
use serde_json::{Value, json};

use super::ReadArgs;
use super::input::{Format, Input, key};
use crate::failure::Failure;

/// Prints a log's records.
///
/// # Errors
/// If the log cannot be read to its end; what comes before has been printed then.
pub fn run(args: &ReadArgs) -> Result<ExitCode, Failure> {
    let input = Input::open(&args.file)?;
    let key = key(args.key_file.as_deref())?;
    let mut printer = Printer::new(args, &input)?;
    let read = match input.format() {
        Format::Native => native(&input, key.as_ref(), &mut printer),
        Format::MsHrl => published(&input, &mut printer),
    };
    match read {
        Ok(()) => printer.end(End::Sealed)?,
        Err(Failure::Output(_)) => {}
        Err(_) => printer.end(End::Torn)?,
    }
    read.map(|()| ExitCode::SUCCESS)
}

/// A record as it is printed.
#[derive(Serialize)]
struct Line {
    sequence: u64,
    time: String,
    kind: &'static str,
    #[serde(flatten)]
    what: Value,
    #[serde(skip)]
    text: String,
}

fn line(sequence: u64, time: Timestamp, kind: &'static str, what: Value, text: String) -> Line {
    let time = rfc3339(time);
    Line {
        sequence,
        time,
        kind,
        what,
        text,
    }
}

fn range(extent: Extent) -> Value {
    json!({ "offset": extent.offset().get(), "length": extent.len().get() })
}

/// Prints lines as they come, and the end.
struct Printer {
    out: BufWriter<StdoutLock<'static>>,
    style: Style,
    printed: u64,
}

/// Whether the log was finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Sealed,
    Torn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Text,
    Json,
}

impl Printer {
    fn new(args: &ReadArgs, input: &Input) -> Result<Self, Failure> {
        let mut out = BufWriter::new(std::io::stdout().lock());
        let style = if args.json { Style::Json } else { Style::Text };
        if style == Style::Json {
            let file = Value::from(input.path().display().to_string());
            let format = input.format().as_str();
            write!(
                out,
                "{{\"file\":{file},\"format\":\"{format}\",\"records\":["
            )?;
        }
        Ok(Self {
            out,
            style,
            printed: 0,
        })
    }

    fn print(&mut self, line: &Line) -> Result<(), Failure> {
        match self.style {
            Style::Text => {
                let Line {
                    sequence,
                    time,
                    kind,
                    text,
                    ..
                } = line;
                writeln!(self.out, "{sequence:>8}  {time:<30}  {kind:<7}  {text}")?;
            }
            Style::Json => {
                let comma = if self.printed == 0 { "\n" } else { ",\n" };
                self.out.write_all(comma.as_bytes())?;
                serde_json::to_writer(&mut self.out, line)?;
            }
        }
        self.printed += 1;
        Ok(())
    }

    /// Ends the dump.
    fn end(&mut self, end: End) -> Result<(), Failure> {
        if self.style == Style::Json {
            let sealed = end == End::Sealed;
            writeln!(self.out, "\n],\"sealed\":{sealed}}}")?;
        }
        self.out.flush()?;
        Ok(())
    }
}

fn native(input: &Input, key: Option<&VolumeKey>, printer: &mut Printer) -> Result<(), Failure> {
    let failed = |error| input.native_error("read the log", error);
    let mut scanner = Scanner::new(input.stream()?, key).map_err(failed)?;
    if scanner.header().key.is_some() && key.is_none() {
        // Which extents, and when, can be read without the key.
        while let Some(frame) = scanner.next_frame().map_err(failed)? {
            for TableEntry {
                sequence,
                time,
                shape,
                ..
            } in frame.table()
            {
                printer.print(&shape_line(sequence.get(), time, &shape))?;
            }
        }
    } else {
        while let Some(entry) = scanner.next_record().map_err(failed)? {
            printer.print(&record_line(
                entry.sequence.get(),
                entry.time,
                &entry.record,
            ))?;
        }
    }
    match scanner.ending() {
        Some(Ending::Torn { cause, .. }) => Err(failed(cause.clone()).into()),
        _ => Ok(()),
    }
}

fn shape_line(sequence: u64, time: Timestamp, shape: &Shape) -> Line {
    match shape {
        Shape::Write(extent) => line(sequence, time, "write", range(*extent), extent.to_string()),
        Shape::Zeroes(extent) => line(sequence, time, "zeroes", range(*extent), extent.to_string()),
        Shape::Discard(extent) => line(
            sequence,
            time,
            "discard",
            range(*extent),
            extent.to_string(),
        ),
        Shape::Tag { id, consistency } => {
            let what = json!({ "id": id.to_string(), "consistency": consistency.as_str() });
            line(sequence, time, "tag", what, format!("{id} {consistency}"))
        }
        Shape::Resize(size) => line(
            sequence,
            time,
            "resize",
            json!({ "size": size.get() }),
            format!("to {size}"),
        ),
    }
}

fn record_line(sequence: u64, time: Timestamp, record: &Record<&[u8]>) -> Line {
    let shape = match record {
        Record::Write { extent, .. } => Shape::Write(*extent),
        Record::Zeroes { extent } => Shape::Zeroes(*extent),
        Record::Discard { extent } => Shape::Discard(*extent),
        Record::Resize { size } => Shape::Resize(*size),
        Record::Tag(tag) => {
            let what = json!({
                "id": tag.id.to_string(),
                "consistency": tag.consistency.as_str(),
                "label": tag.label,
                "group": tag.group.map(|group| group.to_string()),
                "root": tag.root.map(|root| root.to_string()),
            });
            let mut text = format!("{} {}", tag.id, tag.consistency);
            if !tag.label.is_empty() {
                text += &format!(" {:?}", tag.label);
            }
            if let Some(group) = tag.group {
                text += &format!(" group {group}");
            }
            return line(sequence, time, "tag", what, text);
        }
    };
    shape_line(sequence, time, &shape)
}

fn published(input: &Input, printer: &mut Printer) -> Result<(), Failure> {
    let failed = |error| input.ms_error("read the log", error);
    let mut reader = ms::Reader::open(input.file()).map_err(failed)?;
    let mut sequence = 0;
    while let Some(write) = reader.next_write().map_err(failed)? {
        let entry = write.entry();
        let mut what = range(entry.extent);
        what["data_checksum"] = entry.data_checksum.into();
        let time = entry.time.to_timestamp();
        printer.print(&line(
            sequence,
            time,
            "write",
            what,
            entry.extent.to_string(),
        ))?;
        sequence += 1;
    }
    Ok(())
}
