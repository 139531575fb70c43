//! Loads the BPF object, attaches its programs and pins everything. The object is compiled
//! from `bpf/track.bpf.c` and committed; the places of the kernel's fields are filled in
//! here, from the BTF of the running kernel.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{Map, MapData};
use aya::programs::BtfTracePoint;
use aya::programs::links::FdLink;
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};

use crate::capture::pins::{self, MAPS, PROGRAMS};
use crate::capture::probe;
use crate::capture::spec::AttachSpec;
use crate::capture::state::{Identity, PARTS, State, WORDS, Word};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::bpf;
use crate::sys::memory::SharedWords;

static OBJECT: &[u8] = aya::include_bytes_aligned!("bpf/track.bpf.o");

const LOAD: &str = "load the tracking programs";
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Loads, attaches and pins a tracker for `spec`, under its folder's final name.
///
/// # Errors
/// [`ErrorKind::Kernel`] with what the kernel lacks; [`ErrorKind::Invalid`] for a disk
/// without a byte, or too large for one map.
pub(super) fn load(spec: &AttachSpec) -> Result<()> {
    let identity = Identity::of(spec);
    let words = identity.layout().words() as u64 * PARTS as u64;
    let entries = u32::try_from(words).ok().filter(|&entries| entries > 0);
    let entries = entries.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, LOAD)
            .path(spec.disk.path())
            .detail(format!(
                "{} bytes in blocks of {}",
                spec.disk.size(),
                spec.block.get()
            ))
    })?;
    if !Path::new(BTF).exists() {
        return Err(Error::new(ErrorKind::Kernel, LOAD)
            .path(BTF)
            .detail("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)")
            .advice(super::NO_OTHER_WAY));
    }
    let btf = Btf::from_sys_fs().map_err(refused)?;
    let mut loaded = EbpfLoader::new()
        .btf(Some(&btf))
        // More would overflow the log's buffer, and fail for that reason alone.
        .verifier_log_level(VerifierLogLevel::STATS)
        .map_max_entries("bits", entries)
        .map_max_entries("flights", spec.in_flight.max(1))
        .load(OBJECT)
        .map_err(refused)?;
    let state = SharedWords::map(map(&loaded, "state")?.fd().as_fd(), WORDS);
    let state = State::new(state.at(LOAD, spec.disk.path())?);
    state.set_identity(&identity);
    state.set(Word::Probing, probe::ALL);

    let folder = spec.pin_folder();
    let unfinished = pins::unfinished(&spec.pins, spec.volume, spec.folder);
    fs::create_dir(&unfinished).at("pin the tracking programs", &unfinished)?;
    pin_all(&mut loaded, &btf, &unfinished)?;
    fs::rename(&unfinished, &folder).at("pin the tracking programs", &folder)
}

fn map<'a>(loaded: &'a Ebpf, name: &str) -> Result<&'a MapData> {
    match loaded.map(name) {
        Some(Map::Array(data) | Map::HashMap(data)) => Ok(data),
        _ => Err(Error::new(ErrorKind::Damaged, LOAD).detail(format!("it has no map `{name}`"))),
    }
}

/// Attaches the programs in their order and pins them with their links, then the maps.
fn pin_all(loaded: &mut Ebpf, btf: &Btf, folder: &Path) -> Result<()> {
    const PIN: &str = "pin the tracking programs";
    for name in MAPS {
        let path = pins::map_pin(folder, name);
        bpf::pin(map(loaded, name)?.fd().as_fd(), &path).at(PIN, &path)?;
    }
    for (name, tracepoint) in PROGRAMS {
        let program = loaded.program_mut(name).ok_or_else(|| {
            Error::new(ErrorKind::Damaged, LOAD).detail(format!("it has no program `{name}`"))
        })?;
        let program: &mut BtfTracePoint = program.try_into().map_err(refused)?;
        program.load(tracepoint, btf).map_err(refused)?;
        let link = program.attach().map_err(refused)?;
        let link = program.take_link(link).map_err(refused)?;
        let path = pins::program_pin(folder, name);
        bpf::pin(program.fd().map_err(refused)?.as_fd(), &path).at(PIN, &path)?;
        FdLink::from(link)
            .pin(pins::link_pin(folder, name))
            .map_err(refused)?;
    }
    Ok(())
}

/// What the loader's error means: in most cases, what the kernel or this process lacks.
fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let lacking = if has(&["unknown func", "invalid func"]) {
        "the kernel has no bpf_loop (it came with 5.17)"
    } else if has(&["Operation not permitted", "os error 1)"]) {
        "this process lacks CAP_BPF and CAP_PERFMON, or lockdown forbids BPF"
    } else if has(&["Function not implemented"]) {
        "the kernel has no BPF"
    } else if has(&["btf_trace_block", "relocat", "no BTF", "BTF error"]) {
        "the kernel's BTF lacks a tracepoint or a field that is needed"
    } else {
        "the kernel refused the programs"
    };
    Error::new(ErrorKind::Kernel, LOAD)
        .detail(lacking)
        .source(error)
        .advice(super::NO_OTHER_WAY)
}
