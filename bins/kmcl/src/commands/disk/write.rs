//! `kmcl disk write`: from a file or standard input to a disk.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use vsc_storage::{DiskInfo, Extent};

use super::STEP;
use crate::cli::Write;
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::image::compare::Checksum;
use crate::output::{Output, Report, Table, bytes_per_second, rate};
use crate::progress::Length;
use crate::size::Size;

/// What was written.
#[derive(Serialize)]
struct Done {
    bytes_written: u64,
    crc32c: String,
    seconds: f64,
    bytes_per_second: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Report for Done {
    fn table(&self) -> Table {
        Table::pairs()
            .pair("written and flushed", Size(self.bytes_written))
            .pair("CRC-32C", &self.crc32c)
            .pair("rate", rate(self.bytes_written, self.elapsed))
    }
}

/// The data to write, cut into extents of the disk as it comes in: the length of standard input is
/// known only at its end.
struct Source<'a> {
    input: Box<dyn Read>,
    name: &'a Path,
    /// The data of the extent last cut off.
    data: Vec<u8>,
    /// What the input ends with, if it ends inside a block.
    tail: Vec<u8>,
    /// Where on the disk the next extent begins.
    at: u64,
    disk_bytes: u64,
    block_bytes: u32,
    /// Why there is no next extent, although the input has not ended.
    failure: Option<Failure>,
    checksum: Checksum,
}

impl<'a> Source<'a> {
    fn open(arguments: &'a Write, disk: &DiskInfo) -> Result<Self> {
        let name = arguments.input.as_path();
        let input: Box<dyn Read> = if name.as_os_str() == "-" {
            Box::new(io::stdin())
        } else {
            Box::new(File::open(name).map_err(|error| read_failure(name, error))?)
        };
        let input: Box<dyn Read> = match arguments.length {
            Some(Size(length)) => Box::new(input.take(length)),
            None => input,
        };
        Ok(Self {
            input,
            name,
            data: Vec::new(),
            tail: Vec::new(),
            at: arguments.offset.0,
            disk_bytes: disk.bytes(),
            block_bytes: disk.block_bytes,
            failure: None,
            checksum: Checksum::default(),
        })
    }

    /// Reads the data of the next extent, of at most `step` bytes. `None` at the end of the input, or
    /// where something fails.
    fn next(&mut self, step: u32) -> Option<Extent> {
        match self.read_extent(step) {
            Ok(extent) => extent,
            Err(failure) => {
                self.failure = Some(failure);
                None
            }
        }
    }

    fn read_extent(&mut self, step: u32) -> Result<Option<Extent>> {
        self.data.clear();
        if !self.tail.is_empty() {
            return Ok(None); // the input has ended
        }
        let read = (&mut self.input).take(step.into()).read_to_end(&mut self.data);
        read.map_err(|error| read_failure(self.name, error))?;
        let blocks = self.data.len() - self.data.len() % self.block_bytes as usize;
        self.tail = self.data.split_off(blocks);
        let end = self.at + (blocks + self.tail.len()) as u64;
        if end > self.disk_bytes {
            return Err(too_long(self.disk_bytes));
        }
        let bytes = u32::try_from(blocks).unwrap_or(step);
        let extent = Extent { offset: self.at, bytes };
        self.at += u64::from(bytes);
        self.checksum.add(&self.data);
        Ok((bytes > 0).then_some(extent))
    }
}

fn too_long(disk_bytes: u64) -> Failure {
    Failure::usage(
        format_args!("the input goes beyond the end of the disk at byte {disk_bytes}"),
        "choose a smaller --offset, or less with --length",
    )
}

fn read_failure(path: &Path, error: io::Error) -> Failure {
    Failure::system(
        format_args!("cannot read {}: {error}", path.display()),
        "name a file that can be read with --input",
    )
}

/// Refuses an input that is known to be too long before any of it is written.
fn check_length(arguments: &Write, disk: &DiskInfo) -> Result<Option<u64>> {
    let of_file = std::fs::metadata(&arguments.input).ok().filter(std::fs::Metadata::is_file);
    let length = match (of_file, arguments.length) {
        (Some(file), Some(Size(length))) => Some(file.len().min(length)),
        (Some(file), None) => Some(file.len()),
        (None, length) => length.map(|Size(length)| length),
    };
    let end = arguments.offset.0.checked_add(length.unwrap_or(0));
    if end.is_none_or(|end| end > disk.bytes()) {
        return Err(too_long(disk.bytes()));
    }
    Ok(length)
}

pub(crate) fn run(arguments: &Write, output: &Output) -> Result<()> {
    let mut connection = Connection::open(&arguments.disk.target, arguments.disk.depth)?;
    let disk = connection.disk(arguments.disk.lun)?;
    let length = check_length(arguments, &disk)?;
    let client = &mut connection.client;
    let step = STEP.min(client.max_transfer_bytes()).max(disk.block_bytes);
    let step = step - step % disk.block_bytes;
    let source = RefCell::new(Source::open(arguments, &disk)?);
    let progress = output.progress("writing", length.map_or(Length::UnknownBytes, Length::Bytes));
    let started = Instant::now();
    let extents = std::iter::from_fn(|| source.borrow_mut().next(step));
    client.write_extents(&disk, extents, |_, data| {
        data.copy_from_slice(&source.borrow().data);
        progress.advance(data.len() as u64);
        Ok::<(), Failure>(())
    })?;
    let mut source = source.into_inner();
    if let Some(failure) = source.failure {
        return Err(failure);
    }
    if !source.tail.is_empty() {
        // The rest of the block keeps what it holds.
        let mut block = vec![0; disk.block_bytes as usize];
        client.read(&disk, source.at, &mut block)?;
        for (to, from) in block.iter_mut().zip(&source.tail) {
            *to = *from;
        }
        client.write(&disk, source.at, &block)?;
        source.checksum.add(&source.tail);
    }
    client.flush(&disk)?;
    drop(progress);
    let elapsed = started.elapsed();
    output.report(&Done {
        bytes_written: source.checksum.bytes(),
        crc32c: source.checksum.to_string(),
        seconds: elapsed.as_secs_f64(),
        bytes_per_second: bytes_per_second(source.checksum.bytes(), elapsed),
        elapsed,
    })
}
