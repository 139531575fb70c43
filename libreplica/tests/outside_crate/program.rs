//! A program of somebody else's, built by `outside_crate.rs` beside this folder: it makes a
//! store in the folder that it is given, ships one epoch, and reads the point back.

use std::path::Path;

use libreplica::geometry::Geometry;
use libreplica::id::PointId;
use libreplica::record::{Consistency, Record, Tag};
use libreplica::store::{PointSelector, Store, VolumeSpec};
use libreplica::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: outside FOLDER")?;
    let path = Path::new(&folder).join("store");
    let store = Store::create(&path)?;
    let geometry = Geometry {
        size: VolumeSize::new(1 << 20),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    };
    let id = store.create_volume(VolumeSpec::new("notes", geometry)?)?;
    let mut writer = store.volume_writer(id, None)?;

    let mut baseline = writer.begin_baseline()?;
    baseline.write(ByteOffset::new(0), &[1; 8192])?;
    baseline.finish()?;

    let mut log = writer.begin_epoch()?;
    let now = Timestamp::now();
    let extent = Extent::new(ByteOffset::new(4096), ByteLen::new(512)).ok_or("past the end")?;
    log.append(&Record::Write { extent, data: &[2; 512] }, now)?;
    let point = Tag {
        id: PointId::at(now)?,
        time: now,
        consistency: Consistency::Crash,
        label: "by hand".to_owned(),
        group: None,
        root: None,
    };
    log.append(&Record::Tag(point), now)?;
    writer.commit(log)?;
    drop(writer);

    let store = Store::open(&path)?;
    let volume = store.volume(store.find("notes")?, None)?;
    let latest = volume.point(PointSelector::Latest)?;
    let mut reader = volume.open_point(latest.id)?;
    let mut bytes = [0; 1024];
    reader.read_at(ByteOffset::new(4096), &mut bytes)?;
    let same = bytes[..512] == [2; 512] && bytes[512..] == [1; 512] && latest.label == "by hand";
    if !same {
        return Err("the point holds something else".into());
    }
    println!("what was written is what the point holds");
    Ok(())
}
