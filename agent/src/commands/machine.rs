//! `replica machine`: the definition of the machine that a volume belongs to, kept with the volume
//! in its store, so that it is there when the source is not.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use libreplica::machine::{Disk, MachineDefinition, Networks, Source, domain_xml};
use libreplica::store::VolumeReader;
use libreplica::{Error, ErrorKind, IoContext};

use crate::cli::DaemonArgs;
use crate::commands::open_store::find_volume;
use crate::failure::Failure;
use crate::output;
use crate::text;

/// What there is to do with a machine's definition.
#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// Keep a definition with a volume, in place of the one that is there
    Set(SetArgs),
    /// Print the definition that is kept with a volume, as TOML
    Show(ShowArgs),
    /// Print it as a libvirt domain, for `virsh define`
    Xml(XmlArgs),
}

#[derive(Args, Debug)]
pub struct SetArgs {
    /// The volume's name or id
    pub volume: String,
    /// The definition: a TOML file, - for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
}

#[derive(Args, Debug)]
pub struct ShowArgs {
    /// The volume's name or id
    pub volume: String,
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct XmlArgs {
    /// The volume's name or id
    pub volume: String,
    /// What each disk is, in the definition's order: unix:PATH, the socket that `replica open` serves;
    /// or a file or device, as `replica restore` writes it [default: sockets in /run/replica,
    /// called as the volumes]
    #[arg(long, value_name = "unix:PATH|PATH")]
    pub disk: Vec<String>,
    /// Connect it to the networks of a drill, not to those of a failover
    #[arg(long)]
    pub test: bool,
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
}

pub fn run(daemon: &DaemonArgs, command: &MachineCommand) -> Result<ExitCode, Failure> {
    match command {
        MachineCommand::Set(args) => set(daemon, args),
        MachineCommand::Show(args) => show(daemon, args),
        MachineCommand::Xml(args) => xml(daemon, args),
    }
}

/// Reads a definition from a file, or from standard input.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn read_definition(file: &Path) -> Result<MachineDefinition, Failure> {
    const READ: &str = "read the machine's definition";
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    Ok(MachineDefinition::from_toml(&text.at(READ, file)?).map_err(|e| e.path(file))?)
}

fn set(daemon: &DaemonArgs, args: &SetArgs) -> Result<ExitCode, Failure> {
    let machine = read_definition(&args.file)?;
    let found = find_volume(daemon, &args.volume, args.store.as_deref())?;
    for name in machine
        .disks
        .iter()
        .filter_map(|disk| disk.volume.as_deref())
    {
        // Better said now than in the night in which it is needed.
        if let Err(error) = found.store.find(name) {
            eprintln!("replica: note: {error}");
        }
    }
    found.reader(None)?.set_machine(&machine)?;
    Ok(ExitCode::SUCCESS)
}

fn show(daemon: &DaemonArgs, args: &ShowArgs) -> Result<ExitCode, Failure> {
    let found = find_volume(daemon, &args.volume, args.store.as_deref())?;
    let machine = kept(&found.reader(None)?)?;
    if args.json {
        output::json(&machine)?;
    } else {
        print!("{}", machine.to_toml()?);
    }
    Ok(ExitCode::SUCCESS)
}

fn xml(daemon: &DaemonArgs, args: &XmlArgs) -> Result<ExitCode, Failure> {
    let found = find_volume(daemon, &args.volume, args.store.as_deref())?;
    let reader = found.reader(None)?;
    let machine = kept(&reader)?;
    let sources = if args.disk.is_empty() {
        let own = reader.catalogue()?.name;
        machine.disks.iter().map(|disk| usual(disk, &own)).collect()
    } else {
        let sources = args.disk.iter().map(|disk| source(disk));
        sources.collect::<Result<Vec<_>, Failure>>()?
    };
    let networks = match args.test {
        true => Networks::Test,
        false => Networks::Recovery,
    };
    print!("{}", domain_xml(&machine, &sources, networks)?);
    Ok(ExitCode::SUCCESS)
}

fn kept(reader: &VolumeReader) -> Result<MachineDefinition, Failure> {
    let none = || {
        Error::new(ErrorKind::NotFound, "find the machine's definition")
            .detail("none is kept with the volume")
            .advice("`replica machine set` keeps one; docs/drills.md says what is in it")
    };
    Ok(reader.machine()?.ok_or_else(none)?)
}

/// Where a volume is taken to be served.
fn usual(disk: &Disk, own: &str) -> Source {
    let name = disk.volume.as_deref().unwrap_or(own);
    Source::Nbd(Path::new("/run/replica").join(format!("{name}.nbd")))
}

fn source(text: &str) -> Result<Source, Failure> {
    if text.starts_with("unix:") {
        return Ok(Source::Nbd(text::unix_socket(text)?));
    }
    Ok(Source::File(std::path::absolute(text)?))
}
