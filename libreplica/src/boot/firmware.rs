//! Where distributions put the two images that UEFI takes. The variables are copied for each
//! start: a guest writes there, and what it writes belongs to that start alone.

use std::path::Path;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::machine::UefiFiles;

/// The program, and the variables as they are on a new board.
const PLACES: [(&str, &str); 4] = [
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
        "/usr/share/edk2/x64/OVMF_VARS.4m.fd",
    ),
];

/// The images, the variables of which are copied into `folder`.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there are none on this host; the system's.
pub(super) fn uefi_files(folder: &Path) -> Result<UefiFiles> {
    const FIND: &str = "find the UEFI firmware";
    let places = PLACES.map(|(code, variables)| (Path::new(code), Path::new(variables)));
    let found = places
        .iter()
        .find(|(code, variables)| code.exists() && variables.exists());
    let (code, variables) = found.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, FIND)
            .path(PLACES[0].0)
            .advice("install the package ovmf (edk2-ovmf on Fedora)")
    })?;
    let own = folder.join("variables");
    std::fs::copy(variables, &own).at(FIND, variables)?;
    Ok(UefiFiles {
        code: code.to_path_buf(),
        variables: own,
    })
}
