//! What the writer does first: make durable what the catalogue says, and remove what it does not
//! name. Whoever opens the volume next may act on what it lists (an agent forgets the
//! changes that are in the store), so a catalogue that a killed writer had renamed but not
//! synced must not vanish later.

use super::catalogue::Catalogue;
use super::durable;
use super::lease;
use super::machine;
use super::writer::VolumeWriter;
use crate::error::Result;

/// Puts right what a killed writer left.
pub(super) fn clean(writer: &mut VolumeWriter) -> Result<()> {
    let folder = writer.folder.clone();
    for path in folder.folders() {
        durable::create_folder(&path)?;
    }
    durable::sync_folder(folder.path())?;
    for name in durable::names_in(&folder.incoming())? {
        durable::remove(&folder.incoming().join(name))?;
    }
    for name in durable::names_in(folder.path())? {
        if name.starts_with("catalogue.") && name.ends_with(".new") {
            durable::remove(&folder.path().join(name))?;
        }
    }
    if writer.catalogue.base.is_none() || writer.catalogue.key.is_some() {
        // An interrupted first copy; an encrypted volume never has an image.
        durable::remove(&folder.base())?;
    }
    remove_strange_logs(writer)?;
    renew_leases(writer)?;
    machine::remove_proofs(&folder, |id| writer.catalogue.point(id).is_some())?;
    writer.delete_retired()
}

/// Logs of an interrupted ingest, fold or first copy.
fn remove_strange_logs(writer: &VolumeWriter) -> Result<()> {
    let catalogue: &Catalogue = &writer.catalogue;
    let retired = catalogue.retired.iter().map(|retired| &retired.entry);
    let known: Vec<String> = catalogue
        .logs
        .iter()
        .chain(retired)
        .map(|log| log.name().to_string())
        .collect();
    for name in durable::names_in(&writer.folder.logs())? {
        if !known.contains(&name) {
            durable::remove(&writer.folder.logs().join(name))?;
        }
    }
    Ok(())
}

/// A lease file for the view and for each point, and none for points that were dropped.
fn renew_leases(writer: &VolumeWriter) -> Result<()> {
    let (folder, catalogue) = (&writer.folder, &writer.catalogue);
    lease::prepare(&folder.view_lease(catalogue.view))?;
    for point in &catalogue.points {
        lease::prepare(&folder.point_lease(point.id))?;
    }
    for name in durable::names_in(&folder.leases())? {
        let Ok(id) = name.parse() else { continue };
        if catalogue.point(id).is_none() {
            // A reader that holds it found the point gone, and lets go by itself.
            durable::remove(&folder.point_lease(id))?;
        }
    }
    Ok(())
}
