//! The command line, as clap derives help, man pages and completions from it. It only
//! says what can be said; what is done stands in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hrl_format::record::Consistency;
use libreplica::primary::Capture;

use crate::commands::adopt::AdoptArgs;
use crate::commands::drill::DrillArgs;
use crate::commands::failover::{ChangePointArgs, CommitArgs, FailoverArgs};
use crate::commands::home::{FailbackArgs, ReprotectArgs};
use crate::commands::machine::MachineCommand;
use crate::commands::migrate::MigrateArgs;
use crate::commands::plan::PlanCommand;
use crate::log_command::LogCommand;
use crate::quantity::{BlockSizeArg, DurationArg};
use crate::text;

/// Live disaster recovery of Linux block devices
///
/// A disk in use is protected without unmounting it and without a kernel module. Its
/// changes become .hrl logs in a store; every recovery point comes back byte for byte.
#[derive(Debug, Parser)]
#[command(name = "replica", version, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 resync needed or differing, 4 a plan's step waits to be confirmed."
)]
pub struct Cli {
    #[command(flatten)]
    pub daemon: DaemonArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Which daemon a command speaks to.
#[derive(Args, Clone, Debug)]
pub struct DaemonArgs {
    /// The daemon's control socket [env: REPLICA_SOCKET]
    #[arg(long, global = true, value_name = "PATH")]
    #[arg(default_value_os_t = set("REPLICA_SOCKET", "/run/replica/replica.sock"))]
    pub socket: PathBuf,
    /// The folder where the daemon keeps its state [env: REPLICA_STATE_DIR]
    #[arg(long, global = true, value_name = "DIR")]
    #[arg(default_value_os_t = set("REPLICA_STATE_DIR", "/var/lib/replica"))]
    pub state_dir: PathBuf,
}

/// What the environment says, else `default`. Not clap's own way: to that, what the
/// environment sets has been given, and every usage error would ask for it.
fn set(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map_or_else(|| default.into(), PathBuf::from)
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground
    Run(RunArgs),
    /// Protect a block device, in use or not
    Protect(ProtectArgs),
    /// Stop protecting a volume; its store is kept
    Unprotect(UnprotectArgs),
    /// Stop shipping changes; tracking goes on
    Pause(VolumeArg),
    /// Ship changes again
    Resume(VolumeArg),
    /// Tell how the volumes are
    Status(StatusArgs),
    /// Make a recovery point now and print its id
    Point(PointArgs),
    /// List recovery points, and the windows between them of which any moment can be had
    Points(PointsArgs),
    /// Restore a recovery point, or a moment between two, to a file or a device
    Restore(RestoreArgs),
    /// Open a recovery point, or a moment between two, as an NBD export
    Open(OpenArgs),
    /// Close what is open, and discard what was written to it
    Close(CloseArgs),
    /// Compare source and image; exit 3 if they differ
    Verify(VerifyArgs),
    /// Find by checksums what differs, and ship it
    Resync(ResyncArgs),
    /// Have this machine's daemon know the volumes of a store, to recover them here
    Adopt(AdoptArgs),
    /// Put a recovery point in use in place of the source, in a drill or in earnest
    Failover(FailoverArgs),
    /// Put another recovery point in use than the one that was failed over to
    ChangePoint(ChangePointArgs),
    /// Make a failover final: the other recovery points are dropped
    Commit(CommitArgs),
    /// Protect a volume where it is used after a failover, towards its first side
    Reprotect(ReprotectArgs),
    /// Bring a volume home to its first side, or to a blank disk
    Failback(FailbackArgs),
    /// Boot a recovery point to see whether it lives; exit 1 if not
    Drill(DrillArgs),
    /// Move a device in use to another place, for good: nothing is lost
    Migrate(MigrateArgs),
    /// Run a recovery plan: groups of volumes in order, scripts, and steps by hand
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Look after the definition of the machine that a volume belongs to
    #[command(subcommand)]
    Machine(MachineCommand),
    /// Look after a store
    #[command(subcommand)]
    Store(StoreCommand),
    /// Look into, check, merge, salvage and convert .hrl logs
    #[command(subcommand)]
    Log(LogCommand),
    /// Print a shell's completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(Args, Debug)]
pub struct RunArgs {
    /// A configuration file (TOML); none is needed
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How writes are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CaptureArg {
    /// The best that this kernel and device offer: ebpf
    #[default]
    Auto,
    /// An eBPF program on the block layer's tracepoints
    Ebpf,
    /// An NBD server that the device's users go through: every write with its data, in order
    Nbd,
    /// The same as a block device of this machine, to be mounted (kernel 6.5, module ublk_drv)
    Ublk,
}

impl CaptureArg {
    /// What it means on this machine.
    pub const fn resolve(self) -> Capture {
        match self {
            Self::Auto | Self::Ebpf => Capture::Ebpf,
            Self::Nbd => Capture::Nbd,
            Self::Ublk => Capture::Ublk,
        }
    }
}

#[derive(Args, Debug)]
pub struct ProtectArgs {
    /// The block device: a whole disk, or what lies over one (/dev/sda, /dev/loop0, /dev/dm-3)
    pub device: PathBuf,
    /// The store: a folder or a file:// URL
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub to: String,
    /// What to call the volume [default: the device's base name]
    #[arg(long, value_parser = text::name)]
    pub name: Option<String>,
    /// How writes are captured
    #[arg(long, value_enum, default_value_t)]
    pub capture: CaptureArg,
    /// The interval between recovery points
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    pub every: DurationArg,
    /// Which recovery points to keep: all for so long (all:2h, or 2h), one per interval for so
    /// long (1h:24h), at most so many (#100)
    ///
    /// Tiers are separated by commas: `all:2h,1h:24h,1d:14d`. Intervals are those of the clock, UTC; of
    /// each the point that promises most is kept, of several the oldest. The newest point is
    /// always kept, and any that is being read.
    #[arg(long, default_value = "all:2h,1h:24h", value_name = "TIERS", value_parser = text::tiers)]
    pub retain: String,
    /// Bytes that one dirty bit covers, 4KiB to 1MiB [default: by the volume's size]
    #[arg(long, value_name = "SIZE")]
    pub block_size: Option<BlockSizeArg>,
    /// Encrypt with the key in this file: 32 raw bytes or 64 hexadecimal digits
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Make points together with the other volumes of this group
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// Leave out a partition (/dev/sda2) or a byte range (OFFSET+LENGTH), its whole blocks; may
    /// be repeated
    #[arg(long, value_name = "PARTITION|RANGE")]
    pub exclude: Vec<String>,
    /// Where changes wait when the store falls behind, in inline capture [default: the state
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub spool: Option<PathBuf>,
    /// Leave out other disks that belong to the same volume group, array or filesystem; and
    /// go on with the image of that name in the store, if it is this disk's (seeding)
    #[arg(long)]
    pub force: bool,
    /// Return only when the first copy is durable and its recovery point made
    #[arg(long)]
    pub wait: bool,
}

#[derive(Args, Debug)]
pub struct UnprotectArgs {
    /// The volume's name or id
    #[arg(required_unless_present = "stale")]
    pub volume: Option<String>,
    /// Remove what dead daemons with other state folders left in the kernel
    #[arg(long, conflicts_with = "volume")]
    pub stale: bool,
}

#[derive(Args, Debug)]
pub struct VolumeArg {
    /// The volume's name or id
    pub volume: String,
}

#[derive(Args, Debug)]
pub struct StatusArgs {
    /// The volume's name or id [default: all]
    pub volume: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print again every second until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// The least that a point must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsistencyArg {
    /// As after pulling the plug
    Crash,
    /// Filesystems frozen, or none mounted
    Filesystem,
    /// Applications asked by hooks, filesystems frozen
    Application,
}

impl From<ConsistencyArg> for Consistency {
    fn from(arg: ConsistencyArg) -> Self {
        match arg {
            ConsistencyArg::Crash => Self::Crash,
            ConsistencyArg::Filesystem => Self::Filesystem,
            ConsistencyArg::Application => Self::Application,
        }
    }
}

#[derive(Args, Debug)]
pub struct PointArgs {
    /// The volume's name or id
    pub volume: String,
    /// The least it must be [default: filesystem if something is mounted, else crash]
    #[arg(long, value_enum)]
    pub consistency: Option<ConsistencyArg>,
    /// What to call the point
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "TEXT",
        value_parser = text::label
    )]
    pub label: String,
    /// How long to wait for it
    #[arg(long, default_value = "5m", value_name = "DURATION")]
    pub timeout: DurationArg,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct PointsArgs {
    /// The volume's name or id [default with --store: all]
    #[arg(required_unless_present = "store")]
    pub volume: Option<String>,
    /// Read this store; no daemon is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// The volume key, to show labels of an encrypted volume
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// The volume's name or id
    pub volume: String,
    /// A point's id, `latest`, a time (RFC 3339), or EPOCH:SEQ
    ///
    /// A time within a window that `replica points` shows means the state after the last
    /// write that had completed by then, to the nanosecond; one behind it, up to the next
    /// point or window, the state at the window's end; any other time, the newest point at or
    /// before it. What a time came to mean is printed. EPOCH:SEQ is the state after exactly that record, numbered as
    /// `replica log dump` shows it; EPOCH:start the one before the epoch's first.
    #[arg(long, value_name = "ID|latest|RFC3339|EPOCH:SEQ")]
    pub point: String,
    /// All volumes that have a point of the same moment; --output is a folder then, with a file
    /// NAME.img for each
    #[arg(long)]
    pub group: bool,
    /// The file or device to write
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,
    /// Read this store; no daemon is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// The volume key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Overwrite an existing file or a device (never a mounted or protected one)
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct OpenArgs {
    /// The volume's name or id
    pub volume: String,
    /// A point's id, `latest`, a time (RFC 3339), or EPOCH:SEQ, as `restore` takes them
    #[arg(long, value_name = "ID|latest|RFC3339|EPOCH:SEQ", group = "what")]
    pub point: Option<String>,
    /// All volumes that have a point of the same moment; --nbd is a folder then, with a socket
    /// NAME.nbd for each, and a daemon is needed
    #[arg(long, conflicts_with_all = ["branch", "foreground"])]
    pub group: bool,
    /// Go on with what was written before, and kept
    #[arg(long, value_name = "ID", group = "what", conflicts_with = "read_only")]
    pub branch: Option<String>,
    /// Where to serve it: unix:PATH, a Unix socket for its owner alone
    #[arg(long, value_name = "unix:PATH", value_parser = text::unix_socket)]
    pub nbd: PathBuf,
    /// Refuse writes; else they go to a branch in the store, and the point stays what it is
    #[arg(long)]
    pub read_only: bool,
    /// Served in the foreground: keep what was written when it ends
    #[arg(long, conflicts_with = "read_only")]
    pub keep: bool,
    /// Serve it in the foreground until SIGINT or SIGTERM, also if a daemon runs
    #[arg(long)]
    pub foreground: bool,
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// The volume key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct CloseArgs {
    /// The id that `replica status` shows, the socket's path, or the volume if nothing else of it
    /// is open; with --store the id of a branch
    pub what: String,
    /// Keep what was written, to be opened again with `replica open --branch`
    #[arg(long, conflicts_with = "store")]
    pub keep: bool,
    /// Discard a branch of this store that nobody has open; no daemon is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
}

#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The volume's name or id
    pub volume: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct ResyncArgs {
    /// The volume's name or id
    pub volume: String,
    /// Return only when it has ended
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Check everything in a store; exit 1 and name the damaged points if anything is wrong
    Check(StoreCheckArgs),
}

#[derive(Args, Debug)]
pub struct StoreCheckArgs {
    /// The store: a folder or a file:// URL
    #[arg(value_parser = text::store)]
    pub store: String,
    /// The volume key, to check what is inside encrypted frames
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
