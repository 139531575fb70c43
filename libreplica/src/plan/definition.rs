//! A plan as its owner writes it down, once, and reads it in the night in which it is needed. What
//! is not known is refused, so that a slip of the pen is found on the day on which it is made.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::policy::parse_duration;

/// How long a script may take that does not say.
const SCRIPT_LIMIT: Duration = Duration::from_secs(5 * 60);

/// A recovery plan.
///
/// ```
/// use libreplica::plan::{Mode, Plan};
/// let plan = Plan::from_toml(r#"
///     name = "shop"
///     [[group]]
///     name = "databases"
///     [[group.volume]]
///     volume = "db1"
///     store = "/backup/store"
///     nbd = "unix:/run/replica/db1.nbd"
///     [[group.after]]
///     name = "dns"
///     confirm = "db.example.org leads to the recovery site"
/// "#)?;
/// let steps = plan.steps(Mode::Unplanned);
/// let ids: Vec<&str> = steps.iter().map(|step| step.id.as_str()).collect();
/// assert_eq!(ids, ["databases/volume/db1", "databases/after/dns"]);
/// assert!(Plan::from_toml("name = 'shop'\ngruop = []").is_err());
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What people call it.
    pub name: String,
    /// What belongs together, in the order in which it is recovered.
    #[serde(default, rename = "group")]
    pub groups: Vec<Group>,
}

/// What is recovered together.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// What it is called.
    pub name: String,
    /// What is done before its volumes are failed over.
    #[serde(default)]
    pub before: Vec<Action>,
    /// Its volumes, in order.
    #[serde(default, rename = "volume")]
    pub volumes: Vec<PlannedVolume>,
    /// The machines that are booted on them, when all are failed over.
    #[serde(default, rename = "machine")]
    pub machines: Vec<PlannedMachine>,
    /// What is done at the end.
    #[serde(default)]
    pub after: Vec<Action>,
}

/// A volume of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedVolume {
    /// Its name or id.
    pub volume: String,
    /// Its store: an absolute path, or a `file://` URL.
    pub store: String,
    /// The file with its key.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// Which state is put in use; a planned failover takes the last one.
    #[serde(default)]
    pub point: PointPolicy,
    /// The socket where it is served.
    #[serde(rename = "nbd", deserialize_with = "unix_socket")]
    pub socket: PathBuf,
}

/// Which state of a volume is put in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointPolicy {
    /// The newest that the store knows.
    #[default]
    Latest,
    /// The newest recovery point.
    LatestProcessed,
    /// The newest recovery point that applications were asked for.
    LatestApplication,
}

/// A machine of a plan: its definition is kept with a volume.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedMachine {
    /// The volume, one of the plan's, as it is called there.
    pub volume: String,
    /// When; empty: always.
    #[serde(default)]
    pub modes: Vec<Mode>,
}

/// Something that is done besides.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "WrittenAction")]
pub struct Action {
    /// What it is called; no other of the plan is called so.
    pub name: String,
    /// What is done.
    pub doing: Doing,
    /// When; empty: always.
    pub modes: Vec<Mode>,
}

/// What is done besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doing {
    /// A program is run, until it ends well.
    Run {
        /// It, by its absolute path, and its arguments; no shell is between.
        words: Vec<String>,
        /// How long it may take.
        limit: Duration,
    },
    /// Somebody does something, and confirms it.
    Confirm {
        /// What.
        text: String,
    },
}

/// As an action stands in the file: one of `run` and `confirm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenAction {
    name: String,
    run: Option<Vec<String>>,
    timeout: Option<String>,
    confirm: Option<String>,
    #[serde(default)]
    modes: Vec<Mode>,
}

impl TryFrom<WrittenAction> for Action {
    type Error = String;

    fn try_from(written: WrittenAction) -> Result<Self, String> {
        let name = written.name;
        let doing = match (written.run, written.confirm, written.timeout) {
            (Some(words), None, limit) => Doing::Run {
                words,
                limit: limit.map_or(Ok(SCRIPT_LIMIT), |text| {
                    parse_duration(&text).ok_or_else(|| {
                        format!("`{name}`: `{text}` is no duration; write 90s, 5m or 1h")
                    })
                })?,
            },
            (None, Some(text), None) => Doing::Confirm { text },
            (None, Some(_), Some(_)) => {
                return Err(format!("`{name}`: who confirms has all the time he needs"));
            }
            _ => return Err(format!("`{name}`: either `run` or `confirm` is expected")),
        };
        let modes = written.modes;
        Ok(Self { name, doing, modes })
    }
}

fn unix_socket<'de, D: serde::Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(from)?;
    let path = text.strip_prefix("unix:").map(PathBuf::from);
    path.filter(|path| path.is_absolute()).ok_or_else(|| {
        let why = format!("`{text}` is not of the form unix:/PATH");
        serde::de::Error::custom(why)
    })
}

/// What a plan is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Drills are opened, and discarded at the end.
    Test,
    /// Sources come to rest: nothing is lost.
    Planned,
    /// Sources are replaced, whatever they do.
    Unplanned,
}

impl Mode {
    /// As it stands in JSON, and in the environment of scripts.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Test => "test",
            Self::Planned => "planned",
            Self::Unplanned => "unplanned",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// By what a journal knows its plan: SHA-256 of its text, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PlanDigest(String);

impl PlanDigest {
    /// That of a plan's text.
    pub fn of(text: &str) -> Self {
        let digest = Sha256::digest(text.as_bytes());
        Self(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl fmt::Display for PlanDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Plan {
    /// Reads and checks a plan.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], saying what is wrong where.
    pub fn from_toml(text: &str) -> Result<Self> {
        const READ: &str = "read the recovery plan";
        let plan: Self = toml::from_str(text)
            .map_err(|source| Error::new(ErrorKind::Invalid, READ).source(source))?;
        let wrong = plan.wrong();
        if wrong.is_empty() {
            return Ok(plan);
        }
        Err(Error::new(ErrorKind::Invalid, READ).detail(wrong.join("; ")))
    }

    /// All its volumes, in order.
    pub fn volumes(&self) -> impl DoubleEndedIterator<Item = (&Group, &PlannedVolume)> {
        let groups = self.groups.iter();
        groups.flat_map(|group| group.volumes.iter().map(move |volume| (group, volume)))
    }

    /// The volume that the plan calls so.
    pub fn volume(&self, name: &str) -> Option<&PlannedVolume> {
        let mut volumes = self.volumes().map(|(_, volume)| volume);
        volumes.find(|volume| volume.volume == name)
    }

    /// The programs that it runs, in order.
    pub fn programs(&self) -> impl Iterator<Item = (&Action, &Path)> {
        let actions = self.groups.iter();
        let actions = actions.flat_map(|group| group.before.iter().chain(&group.after));
        actions.filter_map(|action| match &action.doing {
            Doing::Run { words, .. } => Some((action, Path::new(words.first()?))),
            Doing::Confirm { .. } => None,
        })
    }
}
