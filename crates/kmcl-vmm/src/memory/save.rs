//! Memory into a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use zstd::bulk::Compressor;

use super::index::{Form, MAX_FRAME_BYTES, MemoryIndex, PART_BYTES, Part};
use super::lanes::{self, Lane};
use super::{MemoryProgress, Ram, part, sparse};
use crate::error::Error;

/// How memory is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Compression {
    /// As it is, at its own offsets: the file is sparse, and can be loaded in any order.
    None,
    /// With Zstandard, each part by itself: it can be loaded in any order too.
    Zstd {
        /// How hard it tries: 1 to 19, [`ZSTD_LEVEL`] where nothing speaks for another one.
        level: i32,
    },
}

/// The level of compression that is as fast as most disks.
pub const ZSTD_LEVEL: i32 = 1;

/// Writes all of `ram` that is not zeros into a new file, which only its owner may read.
///
/// Memory must stand still: no processor runs, no device writes. Where it is still being loaded from
/// another file, this waits for that first. The file has reached the system when this returns, not the
/// medium: who must be sure of that calls [`File::sync_all`] once the guest runs again.
///
/// Uses 5 MiB for each of at most 8 threads, whatever the size of the memory, and 16 bytes for each of its
/// parts.
///
/// # Errors
/// The file is there already, or cannot be written; it is removed then. The memory is not all there.
pub fn save_memory(
    ram: &Ram,
    to: &Path,
    compression: Compression,
    progress: &mut dyn FnMut(MemoryProgress),
) -> Result<MemoryIndex, Error> {
    ram.wait_until_loaded()?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let file = file.map_err(|source| Error::File { path: to.to_owned(), source })?;
    save_into(ram, &file, to, compression, progress)
}

/// Writes memory into `file`, which is new and at `path`.
pub(super) fn save_into(
    ram: &Ram,
    file: &File,
    path: &Path,
    compression: Compression,
    progress: &mut dyn FnMut(MemoryProgress),
) -> Result<MemoryIndex, Error> {
    write(ram, file, compression, progress).map_err(|error| {
        let _nobody_needs_it = std::fs::remove_file(path);
        match error {
            Failed::Memory(error) => Error::Memory(format!("cannot be read: {error}")),
            Failed::File(source) => Error::File { path: path.to_owned(), source },
        }
    })
}

/// What has failed.
#[derive(Debug)]
enum Failed {
    Memory(io::Error),
    File(io::Error),
}

fn write(
    ram: &Ram,
    file: &File,
    compression: Compression,
    progress: &mut dyn FnMut(MemoryProgress),
) -> Result<MemoryIndex, Failed> {
    let form = match compression {
        Compression::None => Form::Plain,
        Compression::Zstd { .. } => Form::Zstd,
    };
    let memory = &*ram.file;
    let mut index = MemoryIndex::zeros(form, ram.placed());
    let (total_bytes, parts) = (index.memory_bytes(), index.parts.len() as u64);
    if form == Form::Plain {
        file.set_len(total_bytes).map_err(Failed::File)?;
    }
    let mut lanes = (0..lanes::count())
        .map(|_| SaveLane::new(memory, file, compression))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Failed::File)?;
    let mut next = 0;
    let mut written_bytes = 0;
    loop {
        let mut busy = 0;
        for lane in &mut lanes {
            let Some(number) = part_with_data(memory, next, parts).map_err(Failed::Memory)? else {
                break;
            };
            (lane.number, lane.outcome) = (number, None);
            next = number + 1;
            busy += 1;
        }
        let busy = lanes.get_mut(..busy).unwrap_or_default();
        lanes::run(busy);
        // In the order of the parts, so that the same memory gives the same file.
        for lane in &mut *busy {
            let part = lane.outcome.take().unwrap_or(Ok(Part::default()))?;
            if form == Form::Zstd {
                file.write_all_at(lane.frame(part), written_bytes).map_err(Failed::File)?;
            }
            written_bytes += u64::from(part.length);
            let slot = usize::try_from(lane.number).ok().and_then(|at| index.parts.get_mut(at));
            if let Some(slot) = slot {
                *slot = part;
            }
        }
        let done_bytes = if busy.is_empty() { total_bytes } else { next * PART_BYTES };
        progress(MemoryProgress { done_bytes, total_bytes, written_bytes });
        if busy.is_empty() {
            break;
        }
    }
    index.place_parts();
    Ok(index)
}

/// The first part from number `next` on that is not known to be zeros: what was never touched, in a
/// memfd, is a hole.
fn part_with_data(memory: &File, next: u64, parts: u64) -> io::Result<Option<u64>> {
    let data = sparse::next_data(memory, next * PART_BYTES)?;
    Ok(data.map(|at| at / PART_BYTES).filter(|number| *number < parts))
}

struct SaveLane<'a> {
    memory: &'a File,
    /// Written to by the lanes in the plain form only.
    file: &'a File,
    compressor: Option<Compressor<'static>>,
    content: Vec<u8>,
    frame: Vec<u8>,
    number: u64,
    outcome: Option<Result<Part, Failed>>,
}

impl<'a> SaveLane<'a> {
    fn new(memory: &'a File, file: &'a File, compression: Compression) -> io::Result<Self> {
        let (compressor, frame) = match compression {
            Compression::None => (None, Vec::new()),
            Compression::Zstd { level } => {
                (Some(Compressor::new(level)?), vec![0; MAX_FRAME_BYTES as usize])
            }
        };
        let content = part::buffer();
        Ok(Self { memory, file, compressor, content, frame, number: 0, outcome: None })
    }

    fn frame(&self, part: Part) -> &[u8] {
        self.frame.get(..part.length as usize).unwrap_or_default()
    }

    fn part(&mut self) -> Result<Part, Failed> {
        let at = self.number * PART_BYTES;
        sparse::read(self.memory, at, &mut self.content).map_err(Failed::Memory)?;
        let mut length = 0;
        for run in part::runs(&self.content) {
            length += run.len();
            if self.compressor.is_some() {
                break;
            }
            let bytes = self.content.get(run.clone()).unwrap_or_default();
            self.file.write_all_at(bytes, at + run.start as u64).map_err(Failed::File)?;
        }
        if length == 0 {
            return Ok(Part::default());
        }
        let checksum = crc32c::crc32c(&self.content);
        if let Some(compressor) = &mut self.compressor {
            let frame = compressor.compress_to_buffer(&self.content, &mut *self.frame);
            length = frame.map_err(Failed::File)?;
        }
        let length = u32::try_from(length).unwrap_or(u32::MAX); // at most MAX_FRAME_BYTES
        Ok(Part { at: 0, length, checksum })
    }
}

impl Lane for SaveLane<'_> {
    fn work(&mut self) {
        self.outcome = Some(self.part());
    }

    fn is_done(&self) -> bool {
        self.outcome.is_some()
    }
}
