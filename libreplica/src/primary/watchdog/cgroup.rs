//! Leaving the agent's control groups. A service manager kills a service by its group, a
//! group can be frozen as a whole, and one that is out of memory loses all its processes:
//! none of this may reach the watchdog while something is frozen.
//! Source: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst; cgroups(7).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The group of its own, below the top of each hierarchy.
const NAME: &str = "replica-watchdog";

/// A hierarchy, and where this process stands in it.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    /// Where it is mounted.
    top: PathBuf,
    /// This process's group, from the top.
    group: String,
}

/// Moves this process out, in every hierarchy where it is not at the top; why it could
/// not, a line for each.
pub fn leave() -> Vec<String> {
    hierarchies()
        .into_iter()
        .filter(|hierarchy| hierarchy.group != "/")
        .filter_map(|hierarchy| {
            let error = own_group(&hierarchy.top)
                .or_else(|_| enter(&hierarchy.top))
                .err()?;
            let (top, group) = (hierarchy.top.display(), hierarchy.group);
            Some(format!(
                "stays in the agent's group {group} of {top}: {error}"
            ))
        })
        .collect()
}

/// Removes the groups that [`leave`] made, if no other watchdog uses them.
pub fn clean_up() {
    for hierarchy in hierarchies() {
        if hierarchy.group == format!("/{NAME}") && enter(&hierarchy.top).is_ok() {
            let _ = fs::remove_dir(hierarchy.top.join(NAME));
        }
    }
}

fn own_group(top: &Path) -> io::Result<()> {
    let group = top.join(NAME);
    match fs::create_dir(&group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    enter(&group).inspect_err(|_| {
        // A version 1 cpuset takes nobody before it has processors.
        let _ = fs::remove_dir(&group);
    })
}

fn enter(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

fn hierarchies() -> Vec<Hierarchy> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    parse(&groups, &mounts)
}

/// Joins lines `ID:CONTROLLERS:GROUP` with the mounts of type cgroup and cgroup2.
fn parse(groups: &str, mounts: &str) -> Vec<Hierarchy> {
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, group) = (fields.next()?, fields.next()?);
            let top = mounts
                .lines()
                .find_map(|mount| mount_point_of(controllers, mount))?;
            Some(Hierarchy {
                top,
                group: group.to_owned(),
            })
        })
        .collect()
}

fn mount_point_of(controllers: &str, mount: &str) -> Option<PathBuf> {
    let (place, kind) = mount.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let is_this = match (kind.next()?, controllers) {
        ("cgroup2", "") => true,
        ("cgroup", "") => false,
        ("cgroup", _) => {
            let options: Vec<&str> = kind.nth(1)?.split(',').collect();
            controllers.split(',').all(|one| options.contains(&one))
        }
        _ => false,
    };
    is_this.then(|| place.split(' ').nth(4).map(PathBuf::from))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
             40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let groups = "4:cpu,cpuacct:/a:b\n1:name=systemd:/system.slice/x.service\n\
             7:freezer:/\n0::/system.slice/x.service\n";
        let found = parse(groups, mounts);
        let expect = |top: &str, group: &str| Hierarchy {
            top: PathBuf::from(top),
            group: group.to_owned(),
        };
        assert_eq!(
            found,
            [
                expect("/sys/fs/cgroup/cpu", "/a:b"),
                expect("/sys/fs/cgroup/systemd", "/system.slice/x.service"),
                expect("/sys/fs/cgroup/unified", "/system.slice/x.service"),
            ]
        );
    }
}
