//! Another side is to take the volume over, and asks this one, by way of the store: to let it
//! go, or to come to rest first, so that nothing is lost. At rest means that nobody can write to
//! the device any more, that all of it is in the store as a recovery point, and that it was
//! compared with that point after nobody could. The image's lock is let go then, and the volume's
//! thread keeps still for as long as the question stands. If nothing comes of it, the device is
//! given back and shipping goes on; if the volume was promoted, the store says so, and the device
//! stays as it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::id::HandoverId;

use crate::device::Layers;
use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Rest, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::spec::PointOptions;
use crate::primary::volume::Volume;
use crate::primary::{group, lifecycle, source, verify};
use crate::store::{Answer, Ask, Handover, Store};
use crate::sys::blkdev::{self, Access};

const REST: &str = "bring the volume to rest";
const SHUT_DOWN: &str = "shut down what uses it and unmount it, then try again";
/// How long another operation on the volume may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether somebody asks: a store may be far away.
const LOOK: Duration = Duration::from_secs(1);

/// What a volume's thread remembers of what it was asked.
#[derive(Debug, Default)]
pub struct Questions {
    seen: Option<Seen>,
    looked: Option<Instant>,
}

/// A question that was seen.
#[derive(Debug)]
struct Seen {
    id: HandoverId,
    until: Instant,
    standing: Standing,
}

impl Seen {
    fn stands(&self) -> bool {
        self.standing == Standing::LetGo && Instant::now() < self.until
    }
}

/// What was made of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// The volume is let go until it has run out.
    LetGo,
    /// Refused, or it has run out.
    Over,
}

/// What the volume's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// To go on.
    GoOn,
    /// To keep still.
    KeepStill,
}

/// Looks for a question and answers it.
///
/// # Errors
/// [`ErrorKind::Fenced`] if the volume was promoted; what fails while it comes to rest or goes on.
pub fn attend(
    volume: &Arc<Volume>,
    environment: &Environment,
    asked: &mut Questions,
) -> Result<Attention> {
    if asked.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
        let keeps_still = asked.seen.as_ref().is_some_and(Seen::stands);
        return Ok(if keeps_still {
            Attention::KeepStill
        } else {
            Attention::GoOn
        });
    }
    asked.looked = Some(Instant::now());
    let seen = &mut asked.seen;
    let config = volume.config();
    // A store that is not there asks nothing; that it is not, shipping will say.
    let store = Store::open(&config.store);
    let question = store
        .as_ref()
        .map_or(Ok(None), |store| store.handover(config.id))
        .unwrap_or_else(|error| {
            volume.publish_error(&error);
            None
        });
    match (question, seen.as_mut(), &store) {
        (Some(asked), Some(seen), _) if seen.id == asked.id => {
            if seen.stands() {
                return Ok(Attention::KeepStill);
            }
            seen.standing = Standing::Over;
        }
        (Some(asked), _, Ok(store)) => {
            // It is the primary of now that is asked.
            config.refuse_fenced()?;
            let until = Instant::now() + asked.limit();
            let standing = answer(volume, environment, store, &asked, until)?;
            *seen = Some(Seen {
                id: asked.id,
                until,
                standing,
            });
            if standing == Standing::LetGo {
                return Ok(Attention::KeepStill);
            }
        }
        _ => *seen = None,
    }
    go_on(volume, environment)?;
    Ok(Attention::GoOn)
}

fn answer(
    volume: &Arc<Volume>,
    environment: &Environment,
    store: &Store,
    asked: &Handover,
    until: Instant,
) -> Result<Standing> {
    tracing::warn!(volume = %volume.id(), host = asked.host, ask = ?asked.ask, "another side is to take over");
    let (answer, standing) = match asked.ask {
        Ask::LetGo => {
            let_go(volume)?;
            (Answer::LetsGo, Standing::LetGo)
        }
        Ask::Rest => match come_to_rest(volume, environment, until) {
            Ok(answer) => (answer, Standing::LetGo),
            Err(error) => {
                volume.publish_error(&error);
                give_back(volume, environment)?;
                let why = error.to_string();
                (Answer::Refuses { why }, Standing::Over)
            }
        },
    };
    if standing == Standing::LetGo {
        let detail = format!(
            "`{}` is to take the volume over, and asked for it",
            asked.host
        );
        volume.show_degraded(
            &Error::new(ErrorKind::Busy, "ship changes")
                .volume(volume.id())
                .detail(detail),
        );
    }
    store.answer_handover(volume.id(), asked.id, answer)?;
    Ok(standing)
}

/// The image's lock is free afterwards.
fn let_go(volume: &Volume) -> Result<()> {
    let mut member = volume.member_until(Instant::now() + PATIENCE)?;
    member.drop_sides();
    Ok(())
}

fn come_to_rest(volume: &Arc<Volume>, environment: &Environment, until: Instant) -> Result<Answer> {
    refuse_used(volume)?;
    lifecycle::change_config(volume, environment, |config| config.rest = Rest::AtRest)?;
    close(volume)?;
    // Whoever came in between has it open; what he wrote shall not wait in memory.
    refuse_mounted(volume)?;
    let options = PointOptions {
        minimum: None,
        label: "at rest".to_owned(),
    };
    let mut point = group::point_alone(volume, environment, &options, until)?;
    if !digest_is_known(volume, environment)? {
        // Writes that did not cover their blocks were shipped. Now that all is, it can be read.
        point = group::point_alone(volume, environment, &options, until)?;
    }
    let compared = verify::verify(volume, environment)?;
    let differing = compared.bytes_differing + compared.bytes_in_motion;
    let refuse = |why: String| {
        Err(Error::new(ErrorKind::State, REST)
            .volume(volume.id())
            .detail(why))
    };
    if differing > 0 {
        return refuse(format!(
            "{differing} bytes of the device are not what its last point has: somebody writes to it"
        ));
    }
    // What was opened for writing before it was closed may be written to still.
    let (dirty, root) = {
        let mut member = volume.member_until(Instant::now() + PATIENCE)?;
        member.bring_up(volume, environment)?;
        let (source, sink) = member.live()?;
        (source.dirty_bytes(), sink.tree.root())
    };
    if dirty > 0 {
        return refuse(format!("{dirty} bytes were written after its last point"));
    }
    refuse_mounted(volume)?;
    if Instant::now() >= until {
        return refuse("it took longer than the other side waits".to_owned());
    }
    let id = point.id.parse().map_err(|source| {
        Error::new(ErrorKind::Invalid, REST)
            .volume(volume.id())
            .source(source)
    })?;
    let_go(volume)?;
    Ok(Answer::Rests { point: id, root })
}

/// Whether the last point has a digest; if not, the next has.
fn digest_is_known(volume: &Volume, environment: &Environment) -> Result<bool> {
    let mut member = volume.member_until(Instant::now() + PATIENCE)?;
    member.bring_up(volume, environment)?;
    let (_, sink) = member.live()?;
    let is_known = sink.tree.root().is_some();
    if !is_known {
        sink.make_tree_current()?;
    }
    Ok(is_known)
}

/// A device in use is not taken away from its users: they have data that it does not have yet.
///
/// # Errors
/// [`ErrorKind::Busy`] if it has any.
pub fn refuse_used(volume: &Volume) -> Result<()> {
    let used = |who: String| {
        Err(Error::new(ErrorKind::Busy, REST)
            .volume(volume.id())
            .detail(who)
            .advice(SHUT_DOWN))
    };
    match volume.inline() {
        None if volume.config().capture.is_inline() => Err(Error::new(ErrorKind::State, REST)
            .volume(volume.id())
            .detail("the device is not served yet")
            .advice("`replica status` says why; try again")),
        Some(inline) => {
            inline.is_free()?;
            match inline.clients() {
                0 => Ok(()),
                clients => used(format!("{clients} clients are connected")),
            }
        }
        None => refuse_mounted(volume),
    }
}

/// The same of what nobody's connection tells of: a filesystem on the device itself.
///
/// # Errors
/// [`ErrorKind::Busy`] if one is mounted for writing; what the system says.
pub fn refuse_mounted(volume: &Volume) -> Result<()> {
    if volume.config().capture.is_inline() {
        return Ok(());
    }
    let device = source::open(&volume.config())?;
    let layers = Layers::above(&[&device])?;
    let Some(fs) = layers.filesystems().iter().find(|fs| !fs.is_read_only()) else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Busy, REST)
        .volume(volume.id())
        .detail(format!("{} is mounted", fs.mount_point().display()))
        .advice(SHUT_DOWN))
}

/// Nobody can open the device for writing from now on.
fn close(volume: &Volume) -> Result<()> {
    match volume.inline() {
        Some(inline) => inline.close_front(),
        None => {
            set_access(&volume.config(), Access::ReadOnly)?;
            // What was written past every filesystem waits in the page cache.
            let device = source::open(&volume.config())?;
            let synced = std::fs::File::open(device.node()).and_then(|node| node.sync_all());
            synced.map_err(|error| Error::io(REST, error).path(device.node()))
        }
    }
}

/// A device that is given up is one like any other.
///
/// # Errors
/// What the system says of a device that is there.
pub fn unprotected(config: &VolumeConfig) -> Result<()> {
    match make_writable(config) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Vanished) => Ok(()),
        done => done,
    }
}

/// Makes the device of a volume read-only that is used elsewhere, for good: it is given up with that.
///
/// # Errors
/// [`ErrorKind::State`] if it was not promoted elsewhere; what the system says.
pub fn retire(volume: &Volume, environment: &Environment) -> Result<()> {
    let config = volume.config();
    if config.refuse_fenced().is_ok() {
        return Err(Error::new(ErrorKind::State, "give the device up")
            .volume(volume.id())
            .detail("the volume was not promoted elsewhere"));
    }
    match set_access(&config, Access::ReadOnly) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Vanished) => {
            return Err(error);
        }
        _ => {}
    }
    lifecycle::change_config(volume, environment, |config| config.rest = Rest::Replaced)
}

/// Takes back what coming to rest made of the device, unless it is replaced for good.
///
/// # Errors
/// What the system says.
pub fn make_writable(config: &VolumeConfig) -> Result<()> {
    if config.rest != Rest::AtRest || config.capture.is_inline() {
        return Ok(());
    }
    set_access(config, Access::ReadWrite)
}

fn set_access(config: &VolumeConfig, access: Access) -> Result<()> {
    let device = source::open(config)?;
    let node = std::fs::File::open(device.node()).and_then(|node| blkdev::set_access(node, access));
    node.map_err(|error| Error::io(REST, error).path(device.node()))
}

/// If nothing came of a question: the device is given back. Not if it was promoted.
fn go_on(volume: &Volume, environment: &Environment) -> Result<()> {
    if volume.config().rest == Rest::InUse {
        return Ok(());
    }
    // A store that cannot be asked may name another primary by now: then it stays at rest.
    let config = volume.config();
    if let Some(own) = config.generation {
        Store::open(&config.store)?.check_generation(config.id, own.into())?;
    }
    give_back(volume, environment)
}

fn give_back(volume: &Volume, environment: &Environment) -> Result<()> {
    if volume.config().rest == Rest::InUse {
        return Ok(());
    }
    if volume.config().capture.is_inline() {
        // It is served anew when the volume is taken up.
        let mut member = volume.member_until(Instant::now() + PATIENCE)?;
        member.drop_sides();
        member.stop_serving(volume)?;
    } else {
        set_access(&volume.config(), Access::ReadWrite)?;
    }
    lifecycle::change_config(volume, environment, |config| config.rest = Rest::InUse)
}
