//! Landlock: which rights a path gives.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, PathFdError, RestrictSelfAttr, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};

use super::{Error, Files, Paths};

/// The newest version of landlock's interface whose rights are all thought of here; of an older kernel's,
/// as many as it has.
const KNOWN: ABI = ABI::V9;

/// Devices that a machine opens, where they are there. Their rights include ioctls, of which seccomp lets
/// few through.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/userfaultfd"];

/// What a panic reads to say where it was, where it is there; and the program's own file.
const MAPS: &str = "/proc/self/maps";

/// What may be done with what is in a directory to read.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// What may be done with what is in a directory to write. Nothing is ever executed, and neither devices
/// nor links are made.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeDir | RemoveFile | RemoveDir | Refer
        | IoctlDev
});

/// What may be done in a directory with sockets. Who makes or removes one locks the directory, and for that
/// it is opened as if to be read.
const SOCKETS: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{MakeSock | RemoveFile | ReadDir | ResolveUnix});

/// What may be done with a device.
const DEVICE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});

/// Restricts this process to `paths`.
pub(super) fn restrict(paths: &Paths) -> Result<Files, Error> {
    if !is_there() {
        return Ok(Files::Unsupported);
    }
    let mut rules = ruleset().map_err(landlock)?;
    for device in DEVICES.iter().map(Path::new).filter(|path| path.exists()) {
        rules = allow(rules, device, DEVICE)?;
    }
    let program = std::env::current_exe().ok();
    for path in program.iter().map(PathBuf::as_path).chain([Path::new(MAPS)]) {
        if path.exists() {
            rules = allow(rules, path, READ)?;
        }
    }
    for path in &paths.read {
        rules = allow(rules, path, READ)?;
    }
    for path in &paths.write {
        rules = allow(rules, path, WRITE)?;
    }
    for path in &paths.sockets {
        rules = allow(rules, directory_of(path), SOCKETS)?;
    }
    let count = threads();
    if count > 1 {
        let strictly = rules.set_compatibility(CompatLevel::HardRequirement);
        rules = strictly.all_threads(true).map_err(|_too_old| Error::Threads { count })?;
    }
    let status = rules.restrict_self().map_err(landlock)?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => {
            Ok(Files::Restricted { abi: effective_abi as u32 })
        }
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Ok(Files::Unsupported),
    }
}

/// Whether this kernel has landlock: it could be asked for the first thing that there was.
fn is_there() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::ReadFile)
        .and_then(Ruleset::create)
        .is_ok()
}

/// Everything is handled, which is to say forbidden, before rules allow a part of it.
fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()
}

fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Error> {
    let at = |source| Error::Path { path: path.to_owned(), source };
    let opened = PathFd::new(path).map_err(|error| match error {
        PathFdError::OpenCall { source, .. } => at(source),
        other => at(io::Error::other(other)),
    })?;
    // Of a file there are no rights that only directories have.
    let is_dir = std::fs::metadata(path).map_err(at)?.is_dir();
    let access = if is_dir { access } else { access & AccessFs::from_file(KNOWN) };
    rules.add_rule(PathBeneath::new(opened, access)).map_err(landlock)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

fn landlock(error: RulesetError) -> Error {
    Error::Landlock(error.to_string())
}

/// How many threads this process has; where that cannot be told, one too many.
fn threads() -> usize {
    const TASKS: &str = "/proc/self/task";
    std::fs::read_dir(TASKS).map_or(2, Iterator::count)
}
