//! A saved VM: a directory that only its owner may read.
//!
//! ```text
//! config.json   what the VM is made of, and which version of this program has saved it
//! state         processors, memory's index, bus, devices: docs/saved-state.md
//! memory        guest memory: plain, each page at its own offset, or compressed
//! ```
//!
//! It is made under another name and appears whole or not at all.

use std::cell::Cell;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{BufReader, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use saved_state::StreamKind;
use saved_state::file::{FileError, FileReader, check};
use saved_state::inspect::ALL_KINDS;
use serde::{Deserialize, Serialize};

use super::error::VmError;
use crate::config::VmConfig;

/// The version of [`SavedConfig`]. A newer one is refused.
pub(crate) const FORMAT: u32 = 1;

/// Largest `config.json`, in bytes: a hundred times what the most disks take.
const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// `config.json`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct SavedConfig {
    /// The version of this file.
    pub(crate) format: u32,
    /// The program that has saved the VM.
    pub(crate) producer: String,
    /// What the VM is made of; disks with their places.
    pub(crate) config: VmConfig,
}

/// The name and version of this program, for people who look at a saved state.
pub(crate) const PRODUCER: &str = concat!("kmcl ", env!("CARGO_PKG_VERSION"));

/// A directory that is being made. Removed with all that is in it, unless it is kept.
pub(crate) struct NewFolder {
    partial: PathBuf,
    destination: PathBuf,
    kept: Cell<bool>,
}

impl NewFolder {
    /// Begins a directory that will be at `destination`, where there is nothing, or an empty directory.
    pub(crate) fn create(destination: &Path) -> Result<Self, VmError> {
        let destination = std::path::absolute(destination).map_err(VmError::file(destination))?;
        match fs::read_dir(&destination).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.kind() != std::io::ErrorKind::NotADirectory => {
                return Err(VmError::File { path: destination, source: error });
            }
            _ => return Err(VmError::Taken { path: destination }),
        }
        let mut name = destination.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = destination.with_file_name(name);
        DirBuilder::new().mode(0o700).create(&partial).map_err(|error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                VmError::Forbidden { path: destination.clone() }
            }
            _ => VmError::File { path: partial.clone(), source: error },
        })?;
        Ok(Self { partial, destination, kept: Cell::new(false) })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Makes a file in it that only its owner may read.
    pub(crate) fn file(&self, name: &str) -> Result<File, VmError> {
        let path = self.path(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(VmError::file(path))
    }

    /// Writes what the VM is made of, has all of it reach the medium, and gives it its name.
    pub(crate) fn keep(&self, config: &VmConfig) -> Result<(), VmError> {
        let saved =
            SavedConfig { format: FORMAT, producer: PRODUCER.to_owned(), config: config.clone() };
        let text = serde_json::to_string_pretty(&saved)
            .map_err(|error| VmError::Unsavable(error.to_string()))?;
        let mut file = self.file("config.json")?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n"));
        written.map_err(VmError::file(self.path("config.json")))?;
        for name in ["config.json", "state", "memory"] {
            let path = self.path(name);
            let synced = File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(VmError::file(path))?;
        }
        sync(&self.partial)?;
        // Replaces an empty directory, and nothing else.
        fs::rename(&self.partial, &self.destination).map_err(VmError::file(&self.destination))?;
        self.kept.set(true);
        self.destination.parent().map_or(Ok(()), sync)
    }
}

fn sync(folder: &Path) -> Result<(), VmError> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(VmError::file(folder))
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.kept.get() {
            let _as_far_as_possible = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Reads what a saved VM is made of.
pub(crate) fn read_config(folder: &Path) -> Result<SavedConfig, VmError> {
    let path = folder.join("config.json");
    let file = File::open(&path).map_err(VmError::file(&path))?;
    let mut text = String::new();
    file.take(MAX_CONFIG_BYTES).read_to_string(&mut text).map_err(VmError::file(&path))?;
    let wrong = |why: String| VmError::Unrestorable { path: path.clone(), why };
    // Its version first: what a newer one has beside it is not to be understood here.
    #[derive(Deserialize)]
    struct Version {
        format: u32,
        #[serde(default)]
        producer: String,
    }
    let version: Version = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if version.format > FORMAT {
        return Err(wrong(format!(
            "it has format {}, made by {}; this program reads up to {FORMAT}",
            version.format, version.producer
        )));
    }
    serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
}

/// The file `state`, read stream by stream.
pub(crate) struct State<R> {
    path: PathBuf,
    file: FileReader<R>,
}

impl State<BufReader<File>> {
    /// Opens the state of a saved VM, and checks all of it.
    pub(crate) fn open(folder: &Path) -> Result<Self, VmError> {
        let path = folder.join("state");
        let mut file = BufReader::new(File::open(&path).map_err(VmError::file(&path))?);
        let damaged = |error| damaged(&path, error);
        check(&mut file, ALL_KINDS).map_err(damaged)?;
        file.rewind().map_err(VmError::file(&path))?;
        let file = FileReader::new(file).map_err(damaged)?;
        Ok(Self { path, file })
    }
}

impl<R: Read> State<R> {
    /// All bytes of the next stream, which must be of this kind.
    pub(crate) fn bytes(&mut self, kind: StreamKind) -> Result<Vec<u8>, VmError> {
        let Self { path, file } = self;
        let stream = file.next_stream().map_err(|error| damaged(path, error))?;
        let Some(mut stream) = stream.filter(|stream| stream.entry().stream == kind) else {
            let why = format!("it has no state of a {kind} where one is due");
            return Err(VmError::Unrestorable { path: path.clone(), why });
        };
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().map_err(|error| damaged(path, error))? {
            bytes.extend_from_slice(chunk);
        }
        Ok(bytes)
    }

    /// Nothing more is there.
    pub(crate) fn end(&mut self) -> Result<(), VmError> {
        let Self { path, file } = self;
        match file.next_stream().map_err(|error| damaged(path, error))? {
            Some(stream) => {
                let why = format!("it has the state of something else: {}", stream.entry());
                Err(VmError::Unrestorable { path: path.clone(), why })
            }
            None => Ok(()),
        }
    }

    /// What is in it cannot be.
    pub(crate) fn wrong(&self, why: impl std::fmt::Display) -> VmError {
        VmError::Unrestorable { path: self.path.clone(), why: why.to_string() }
    }
}

fn damaged(path: &Path, error: FileError) -> VmError {
    match error {
        FileError::Source(source) => VmError::File { path: path.to_owned(), source },
        error => VmError::Unrestorable { path: path.to_owned(), why: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        serde_json::from_str(r#"{"kernel":"/k","memory_bytes":67108864,"processors":1}"#).unwrap()
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let here = |name: &str| home.path().join(name);
        drop(NewFolder::create(&here("a")).unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "given up");

        for destination in ["b", "empty"] {
            fs::create_dir_all(here("empty")).unwrap();
            let folder = NewFolder::create(&here(destination)).unwrap();
            folder.file("state").unwrap();
            assert!(folder.file("state").is_err(), "twice");
            assert!(!here(destination).join("state").exists(), "not before all is there");
            folder.file("memory").unwrap();
            folder.keep(&config()).unwrap();
            assert_eq!(read_config(&here(destination)).unwrap().config, config());
        }
        fs::write(here("file"), "x").unwrap();
        for taken in ["b", "file"] {
            let error = NewFolder::create(&here(taken)).err().unwrap();
            assert!(matches!(error, VmError::Taken { .. }), "{taken}: {error}");
        }
        let nowhere = NewFolder::create(&here("no/where")).err().unwrap();
        assert!(nowhere.to_string().contains("no/where"), "{nowhere}");
    }

    #[test]
    fn configurations_of_others_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let newer = r#"{"format":2,"producer":"kmcl 9","config":{"anything":1}}"#;
        let unknown = r#"{"format":1,"producer":"x","config":{"kernel":"/k","memory_bytes":1,"processors":1,"colour":"red"}}"#;
        for (text, expected) in [
            (newer, "format 2, made by kmcl 9; this program reads up to 1"),
            (unknown, "unknown field `colour`"),
            ("{}", "missing field `format`"),
            ("\0", "config.json cannot be restored"),
        ] {
            fs::write(home.path().join("config.json"), text).unwrap();
            let error = read_config(home.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(State::open(home.path()).err().unwrap().to_string().contains("state"));
    }
}
