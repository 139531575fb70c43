//! The talk before a client is served ("Fixed newstyle negotiation"): greeting, flags,
//! options and their replies. Bytes in, bytes out; an option is looked at when all of it has
//! come, and none may be longer than [`OPTION_MAX`].

use crate::capture::inline::REQUEST_MAX;
use crate::capture::nbd::contexts::{ALLOCATION, Context, DIRTY_BITMAP};
use crate::capture::nbd::wire::{self, answer, export, hello, info, option};
use crate::units::{SectorSize, VolumeSize};

/// Bytes of an option's header: magic, number, length.
const OPTION_HEADER: usize = 16;
/// Bytes that may follow it.
pub const OPTION_MAX: u32 = 64 << 10;
/// Meta contexts that one client may choose.
const CONTEXTS_MAX: usize = 16;
/// Namespaces of meta contexts.
const BASE: &[u8] = b"base:";
const QEMU: &[u8] = b"qemu:";
/// The length of requests that is told to be best.
const PREFERRED: u32 = 4096;

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name, besides the empty one, which always names it.
    pub name: String,
    /// Its size.
    pub size: VolumeSize,
    /// What requests must be multiples of.
    pub sector: SectorSize,
    /// Whether it can be changed.
    pub access: Access,
    /// Whether ranges can be given up.
    pub trim: Trim,
}

/// Whether what is served can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It can.
    ReadWrite,
    /// It cannot: changes are refused with `EPERM`.
    ReadOnly,
}

/// Whether ranges of a device can be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trim {
    /// They can.
    Offered,
    /// They cannot.
    Absent,
}

/// What a client has settled on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// How reads are answered.
    pub replies: Replies,
    /// What block status tells; the number of each is its place.
    pub contexts: Vec<Context>,
}

/// How reads are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replies {
    /// A header, then the data.
    #[default]
    Simple,
    /// Pieces with a header each.
    Structured,
}

/// Why a connection is ended at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Flags that were not offered.
    #[error("the client sets flags that were not offered")]
    Flags,
    /// No option where one must be.
    #[error("an option does not begin with its magic")]
    OptionMagic,
    /// An option that is too long.
    #[error("an option is too long")]
    OptionLength,
    /// Too many options.
    #[error("too many options")]
    Options,
    /// By an option that knows no errors.
    #[error("an export is wanted that is not there")]
    Export,
    /// No request where one must be.
    #[error("a request does not begin with its magic")]
    RequestMagic,
    /// A request for which there is no memory at all.
    #[error("there is no memory for a request")]
    Memory,
    /// A write that is too long.
    #[error("a write is too long")]
    WriteLength,
}

/// How far the talk has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// What was taken has been answered; more may be there.
    Answered,
    /// More bytes are needed.
    Wants,
    /// The client is served from the next byte on.
    Settled(Session),
    /// The client ends.
    Over,
}

enum Stage {
    Flags,
    Options,
}

/// Options of one client, at most: more than any has a use for.
const OPTIONS_MAX: u32 = 1000;

/// The talk with one client.
pub struct Negotiation<'a> {
    export: &'a Export,
    names: &'a dyn Fn() -> Vec<String>,
    stage: Stage,
    options: u32,
    with_zeroes: bool,
    session: Session,
}

impl<'a> Negotiation<'a> {
    /// Begins: what to send goes to `output`. `names` is asked for what changes are known
    /// since if the client wants to know.
    pub fn new(
        export: &'a Export,
        names: &'a dyn Fn() -> Vec<String>,
        output: &mut Vec<u8>,
    ) -> Self {
        output.extend(wire::GREETING.to_be_bytes());
        output.extend(wire::OPTION.to_be_bytes());
        output.extend((hello::FIXED_NEWSTYLE | hello::NO_ZEROES).to_be_bytes());
        Self {
            export,
            names,
            stage: Stage::Flags,
            options: 0,
            with_zeroes: true,
            session: Session::default(),
        }
    }

    /// Looks at what has come, `input`: says how many bytes of it are dealt with, and how far
    /// it is. What to send goes to `output`, also before an end.
    ///
    /// # Errors
    /// If the client breaks the protocol: the connection is to be ended.
    pub fn advance(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<(usize, Progress), Violation> {
        let mut rest = input;
        match self.stage {
            Stage::Flags => {
                let Some(flags) = wire::take_u32(&mut rest) else {
                    return Ok((0, Progress::Wants));
                };
                let known = u32::from(hello::FIXED_NEWSTYLE | hello::NO_ZEROES);
                if flags & !known != 0 {
                    return Err(Violation::Flags);
                }
                self.with_zeroes = flags & u32::from(hello::NO_ZEROES) == 0;
                self.stage = Stage::Options;
                Ok((4, Progress::Answered))
            }
            Stage::Options => {
                let Some(header) = wire::take::<OPTION_HEADER>(&mut rest) else {
                    return Ok((0, Progress::Wants));
                };
                let (number, len) = parse_header(header)?;
                let Some(data) = rest.get(..len as usize) else {
                    return Ok((0, Progress::Wants));
                };
                self.options += 1;
                if self.options > OPTIONS_MAX {
                    return Err(Violation::Options);
                }
                let progress = self.option(number, data, output)?;
                Ok((OPTION_HEADER + data.len(), progress))
            }
        }
    }

    fn option(
        &mut self,
        number: u32,
        data: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Progress, Violation> {
        let mut replies = Answers { number, output };
        match number {
            option::EXPORT_NAME => {
                if !self.names_export(data) {
                    return Err(Violation::Export);
                }
                self.old_go(output);
                return Ok(Progress::Settled(std::mem::take(&mut self.session)));
            }
            option::ABORT => {
                replies.send(answer::ACK, &[]);
                return Ok(Progress::Over);
            }
            option::LIST if data.is_empty() => {
                let name = self.export.name.as_bytes();
                let len = (name.len() as u32).to_be_bytes();
                replies.send(answer::SERVER, &[&len, name]);
                replies.send(answer::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.session.replies = Replies::Structured;
                replies.send(answer::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                replies.refuse(answer::ERR_INVALID, "this option has no data");
            }
            option::INFO | option::GO => {
                if self.describe(data, &mut replies) && number == option::GO {
                    return Ok(Progress::Settled(std::mem::take(&mut self.session)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_contexts(data, &mut replies);
            }
            _ => replies.refuse(answer::ERR_UNSUP, "not served here"),
        }
        Ok(Progress::Answered)
    }

    fn names_export(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes()
    }

    fn flags(&self) -> u16 {
        let mut flags = export::HAS_FLAGS | export::SEND_FLUSH | export::CAN_MULTI_CONN;
        flags |= match (self.export.access, self.export.trim) {
            (Access::ReadOnly, _) => export::READ_ONLY,
            (Access::ReadWrite, Trim::Absent) => export::SEND_FUA | export::SEND_WRITE_ZEROES,
            (Access::ReadWrite, Trim::Offered) => {
                export::SEND_FUA | export::SEND_WRITE_ZEROES | export::SEND_TRIM
            }
        };
        if self.session.replies == Replies::Structured {
            flags |= export::SEND_DF;
        }
        flags
    }

    /// The reply to `EXPORT_NAME`, which has no header.
    fn old_go(&self, output: &mut Vec<u8>) {
        output.extend(self.export.size.get().to_be_bytes());
        output.extend(self.flags().to_be_bytes());
        if self.with_zeroes {
            output.extend([0; 124]);
        }
    }

    /// Answers `INFO` or `GO`; says whether the export is the one.
    fn describe(&self, mut data: &[u8], replies: &mut Answers<'_>) -> bool {
        let Some((name, wanted)) = parse_info(&mut data) else {
            replies.refuse(answer::ERR_INVALID, "lengths do not fit");
            return false;
        };
        if !self.names_export(name) {
            replies.refuse(answer::ERR_UNKNOWN, "no such export");
            return false;
        }
        let size = self.export.size.get().to_be_bytes();
        replies.info(info::EXPORT, &[&size, &self.flags().to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            replies.info(info::NAME, &[self.export.name.as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) {
            replies.info(info::DESCRIPTION, &[b"protected by replica"]);
        }
        // Told without being asked: who ignores it gets errors, and nothing worse.
        let least = self.export.sector.get();
        let greatest = u32::try_from(REQUEST_MAX.get()).unwrap_or(u32::MAX);
        let sizes = [least, PREFERRED.max(least), greatest].map(u32::to_be_bytes);
        replies.info(info::BLOCK_SIZE, &[sizes.as_flattened()]);
        replies.send(answer::ACK, &[]);
        true
    }

    fn meta_contexts(&mut self, mut data: &[u8], replies: &mut Answers<'_>) {
        let sets = replies.number == option::SET_META_CONTEXT;
        if sets {
            // Whatever comes of it, what was chosen before is not.
            self.session.contexts.clear();
        }
        if self.session.replies == Replies::Simple {
            return replies.refuse(answer::ERR_INVALID, "ask for structured replies first");
        }
        let Some((name, queries)) = parse_queries(&mut data) else {
            return replies.refuse(answer::ERR_INVALID, "lengths do not fit");
        };
        if !self.names_export(name) {
            return replies.refuse(answer::ERR_UNKNOWN, "no such export");
        }
        // Most clients want to know of allocation only, which nobody need be asked for.
        let of_changes = |query: &&[u8]| query.starts_with(QEMU);
        let names = if queries.iter().any(of_changes) || (!sets && queries.is_empty()) {
            (self.names)()
        } else {
            Vec::new()
        };
        let mut found = Context::all(names);
        if sets {
            found.retain(|context| {
                queries
                    .iter()
                    .any(|query| *query == context.name().as_bytes())
            });
            if found.len() > CONTEXTS_MAX {
                return replies.refuse(answer::ERR_TOO_BIG, "too many meta contexts");
            }
        } else if !queries.is_empty() {
            found.retain(|context| queries.iter().any(|query| lists(query, context)));
        }
        for (number, context) in found.iter().enumerate() {
            let number = if sets { number as u32 } else { 0 };
            let name = context.name();
            replies.send(
                answer::META_CONTEXT,
                &[&number.to_be_bytes(), name.as_bytes()],
            );
        }
        replies.send(answer::ACK, &[]);
        if sets {
            self.session.contexts = found;
        }
    }
}

/// Whether a query of `LIST_META_CONTEXT` means a context: a name, or where names begin.
fn lists(query: &[u8], context: &Context) -> bool {
    let (namespace, prefix) = match context {
        Context::Allocation => (BASE, ALLOCATION),
        Context::Dirty(_) => (QEMU, DIRTY_BITMAP),
    };
    query == namespace || query == prefix.as_bytes() || query == context.name().as_bytes()
}

/// An option's number and length.
fn parse_header(mut header: &[u8]) -> Result<(u32, u32), Violation> {
    let magic = wire::take(&mut header).map(|bytes| u64::from_be_bytes(*bytes));
    if magic != Some(wire::OPTION) {
        return Err(Violation::OptionMagic);
    }
    let number = wire::take_u32(&mut header).unwrap_or(0);
    let len = wire::take_u32(&mut header).unwrap_or(0);
    if len > OPTION_MAX {
        return Err(Violation::OptionLength);
    }
    Ok((number, len))
}

/// The export's name and the properties that are asked for; `None` unless all fits.
fn parse_info<'a>(data: &mut &'a [u8]) -> Option<(&'a [u8], Vec<u16>)> {
    let name = wire::take_string(data)?;
    let count = wire::take_u16(data)?;
    if data.len() != 2 * usize::from(count) {
        return None;
    }
    let wanted = std::iter::from_fn(|| wire::take_u16(data)).collect();
    Some((name, wanted))
}

/// The export's name and the queries; `None` unless all fits.
fn parse_queries<'a>(data: &mut &'a [u8]) -> Option<(&'a [u8], Vec<&'a [u8]>)> {
    let name = wire::take_string(data)?;
    let count = wire::take_u32(data)?;
    // Each takes four bytes at least: no more are looked for than can be there.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(wire::take_string(data)?);
    }
    data.is_empty().then_some((name, queries))
}

/// Replies to one option.
struct Answers<'a> {
    number: u32,
    output: &'a mut Vec<u8>,
}

impl Answers<'_> {
    fn send(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.output.extend(wire::OPTION_REPLY.to_be_bytes());
        self.output.extend(self.number.to_be_bytes());
        self.output.extend(kind.to_be_bytes());
        self.output.extend((len as u32).to_be_bytes());
        parts.iter().for_each(|part| self.output.extend(*part));
    }

    fn refuse(&mut self, kind: u32, why: &str) {
        self.send(kind, &[why.as_bytes()]);
    }

    fn info(&mut self, kind: u16, parts: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        let mut all: Vec<&[u8]> = vec![&kind];
        all.extend(parts);
        self.send(answer::INFO, &all);
    }
}
