//! A file of guest memory that is read, part by part, in any order.
//!
//! The file comes from outside. Its size is held against the index when it is opened; each part is
//! checked, all of it, before any of it becomes memory. A frame that would grow beyond a part is refused
//! at the part's end: there is no room for more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zstd::bulk::Decompressor;

use super::index::{Form, MAX_FRAME_BYTES, MemoryIndex, PART_BYTES};
use super::{part, sparse};
use crate::error::Error;

/// What is wrong with a file of guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryFileError {
    /// It is not as long as it was.
    #[error("{found} bytes, and had {expected} when it was saved")]
    Size {
        /// Its bytes.
        found: u64,
        /// Its bytes as it was saved.
        expected: u64,
    },
    /// It is no file.
    #[error("not a file")]
    Kind,
    /// A part's bytes are not those that were saved.
    #[error(
        "the 2 MiB at offset {offset:#x} of memory have checksum {found:08x}, and had {expected:08x} \
         when they were saved"
    )]
    Checksum {
        /// Where in the memory.
        offset: u64,
        /// Their CRC-32C.
        found: u32,
        /// What it was.
        expected: u32,
    },
    /// A frame cannot be decompressed, or to more than a part.
    #[error("the frame at byte {at}, of the 2 MiB at offset {offset:#x} of memory: {why}")]
    Frame {
        /// Where in the file.
        at: u64,
        /// Where in the memory.
        offset: u64,
        /// What the decompressor said.
        why: String,
    },
    /// A frame has less than a part.
    #[error(
        "the frame at byte {at}, of the 2 MiB at offset {offset:#x} of memory, has {found} bytes"
    )]
    Short {
        /// Where in the file.
        at: u64,
        /// Where in the memory.
        offset: u64,
        /// Bytes that it has.
        found: u64,
    },
}

/// A file of guest memory that is what its index says, as far as that can be told without reading it.
#[derive(Debug)]
pub(super) struct MemoryFile {
    file: File,
    path: PathBuf,
    pub(super) index: MemoryIndex,
}

impl MemoryFile {
    pub(super) fn open(path: &Path, index: &MemoryIndex) -> Result<Arc<Self>, Error> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        let wrong = |why| Err(Error::MemoryFile { path: path.to_owned(), why });
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return wrong(MemoryFileError::Kind);
        }
        let (found, expected) = (metadata.len(), index.file_bytes());
        if found != expected {
            return wrong(MemoryFileError::Size { found, expected });
        }
        Ok(Arc::new(Self { file, path: path.to_owned(), index: index.clone() }))
    }

    /// What reads parts: as many as one likes, each on a thread of its own.
    pub(super) fn reader(self: &Arc<Self>) -> Result<PartReader, Error> {
        let failed = |source| Error::File { path: self.path.clone(), source };
        let (decompressor, frame) = match self.index.form {
            Form::Plain => (None, Vec::new()),
            Form::Zstd => {
                let decompressor = Decompressor::new().map_err(failed)?;
                (Some(decompressor), vec![0; MAX_FRAME_BYTES as usize])
            }
        };
        Ok(PartReader { file: Arc::clone(self), decompressor, frame, content: part::buffer() })
    }
}

/// Reads parts.
pub(super) struct PartReader {
    file: Arc<MemoryFile>,
    decompressor: Option<Decompressor<'static>>,
    frame: Vec<u8>,
    content: Vec<u8>,
}

impl PartReader {
    pub(super) fn index(&self) -> &MemoryIndex {
        &self.file.index
    }

    /// The content of part `number`, checked; `None` if it is all zeros, or there is no such part.
    pub(super) fn read(&mut self, number: usize) -> Result<Option<&[u8]>, Error> {
        let part = self.file.index.parts.get(number).copied().unwrap_or_default();
        if part.length == 0 {
            return Ok(None);
        }
        let wrong = |why| Error::MemoryFile { path: self.file.path.clone(), why };
        let failed = |source| Error::File { path: self.file.path.clone(), source };
        let offset = number as u64 * PART_BYTES;
        if let Some(decompressor) = &mut self.decompressor {
            let frame = self.frame.get_mut(..part.length as usize).unwrap_or_default();
            self.file.file.read_exact_at(frame, part.at).map_err(failed)?;
            let found = decompressor.decompress_to_buffer(frame, &mut *self.content);
            let found = found.map_err(|why: io::Error| {
                wrong(MemoryFileError::Frame { at: part.at, offset, why: why.to_string() })
            })?;
            if found != self.content.len() {
                let found = found as u64;
                return Err(wrong(MemoryFileError::Short { at: part.at, offset, found }));
            }
        } else {
            sparse::read(&self.file.file, offset, &mut self.content).map_err(failed)?;
        }
        let (found, expected) = (crc32c::crc32c(&self.content), part.checksum);
        if found != expected {
            return Err(wrong(MemoryFileError::Checksum { offset, found, expected }));
        }
        Ok(Some(&self.content))
    }
}
