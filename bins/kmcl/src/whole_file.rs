//! A file that appears whole or not at all.
//!
//! What is written goes into a file of another name in the same directory. Only once all of it is on
//! the medium is it renamed, which replaces what was there in one step; then the directory is brought
//! to the medium as well. Whatever fails before the renaming, a full disk, a short write, a kill at any
//! byte, leaves the file that was there as it was. A process that is killed leaves a file behind whose
//! name begins with a dot and ends with `.partial`, and that nobody reads.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::exit::{Failure, Result};

/// How the name of a file that is not whole yet ends.
const SUFFIX: &str = ".partial";

/// A file that is being written. Dropped before [`Self::commit`], it was never there.
#[derive(Debug)]
pub(crate) struct WholeFile {
    partial: NamedTempFile,
    path: PathBuf,
    directory: File,
}

impl WholeFile {
    /// Begins a file that will be `path`, for this user's eyes only.
    ///
    /// # Errors
    /// A [`Failure`] of kind usage where `path` is there and is no file; of kind system where its
    /// directory cannot be written.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file_name = path.file_name().filter(|_| !path.is_dir());
        let replaceable = std::fs::symlink_metadata(path).map_or(true, |found| found.is_file());
        let Some(file_name) = file_name.filter(|_| replaceable) else {
            return Err(Failure::usage(
                format_args!("{shown} is there and is not a file"),
                "name a file that can be made or replaced",
            ));
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(file_name);
        let begin = || {
            let directory = File::open(parent)?;
            let partial =
                tempfile::Builder::new().prefix(&prefix).suffix(SUFFIX).tempfile_in(parent)?;
            Ok(Self { partial, path: path.to_path_buf(), directory })
        };
        begin().map_err(|error: io::Error| {
            Failure::system(
                format_args!("cannot write {shown}: {error}"),
                "name a file in a directory that can be written",
            )
        })
    }

    /// Brings everything to the medium and gives the file its name. Returns its length in bytes.
    ///
    /// # Errors
    /// A [`Failure`] of kind system; then what was there before is there still, except where the very
    /// last step fails: the new file is there, and may be gone again after a loss of power.
    pub(crate) fn commit(self) -> Result<u64> {
        let Self { partial, path, directory } = self;
        let failed = |error| write_failure(&path, &error);
        partial.as_file().sync_all().map_err(failed)?;
        let bytes = partial.as_file().metadata().map_err(failed)?.len();
        partial.persist(&path).map_err(|error| failed(error.error))?;
        directory.sync_all().map_err(failed)?;
        Ok(bytes)
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.partial.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.partial.flush()
    }
}

/// What it means that the file cannot be written to its end.
pub(crate) fn write_failure(path: &Path, error: &io::Error) -> Failure {
    Failure::system(
        format_args!("cannot write {}: {error}", path.display()),
        "nothing was changed; make room, or name a file elsewhere",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::exit::Exit;

    const NEW: &[u8] = b"the new state, which is longer than the old one";

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Room for so many bytes, then none: a full disk.
    struct Room<W>(W, usize);

    impl<W: Write> Write for Room<W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            // A short write first, as a disk that fills up gives it.
            let written = self.0.write(&bytes[..bytes.len().min(self.1)])?;
            self.1 -= written;
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn a_disk_that_is_full_at_any_byte_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        for old in [None, Some(&b"old"[..])] {
            for room in 0..=NEW.len() {
                match old {
                    Some(old) => std::fs::write(&path, old).unwrap(),
                    None => drop(std::fs::remove_file(&path)),
                }
                let mut file = WholeFile::create(&path).unwrap();
                let written = Room(&mut file, room).write_all(NEW);
                assert_eq!(written.is_ok(), room == NEW.len(), "{room}");
                let before = std::fs::read(&path).ok();
                assert_eq!(before.as_deref(), old, "with room for {room}, before the end");
                if written.is_ok() {
                    assert_eq!(file.commit(), Ok(NEW.len() as u64));
                } else {
                    drop(file);
                }
                let expected = if room == NEW.len() { Some(NEW) } else { old };
                assert_eq!(std::fs::read(&path).ok().as_deref(), expected, "with room for {room}");
                let expected: &[&str] = if expected.is_some() { &["state"] } else { &[] };
                assert_eq!(names(dir.path()), expected, "something is left behind");
            }
        }
    }

    #[test]
    fn nobody_else_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        WholeFile::create(&path).unwrap().commit().unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("elsewhere", &link).unwrap();
        for (path, expected) in [
            (dir.path().to_path_buf(), Exit::Usage),
            (PathBuf::from("/dev/null"), Exit::Usage),
            (PathBuf::from("/"), Exit::Usage),
            (PathBuf::from(".."), Exit::Usage),
            (link, Exit::Usage),
            (dir.path().join("no/such/directory"), Exit::System),
            (PathBuf::from("/proc/state"), Exit::System),
        ] {
            assert_eq!(WholeFile::create(&path).unwrap_err().exit, expected, "{path:?}");
        }
        assert_eq!(names(dir.path()), ["link"]);
    }

    #[test]
    fn a_directory_that_takes_its_place_meanwhile_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let file = WholeFile::create(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(file.commit().unwrap_err().exit, Exit::System);
        assert_eq!(names(dir.path()), ["state"]);
    }
}
