//! The steps of the demonstration: each moves data through VMBus and checks it against a second
//! witness, the image file.

use std::time::{Duration, Instant};

use serde::Serialize;
use vsc_storage::{DiskInfo, Extent, StorageClient};

use super::plan::{Area, Passes, RANDOM_PASS, SEQUENTIAL_PASS};
use crate::exit::{Failure, Result};
use crate::image::compare::{Checksum, first_difference};
use crate::image::{Image, pattern};
use crate::interrupt::Interrupt;
use crate::output::{Output, bytes_per_second, rate};
use crate::progress::{Length, Progress};
use crate::size::Size;

/// Bytes of a sequential request, if the server allows as many.
const STEP: u32 = 256 << 10;

/// A step that was made.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Step {
    name: &'static str,
    bytes: u64,
    seconds: f64,
    bytes_per_second: u64,
}

/// What was proven.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Proof {
    /// Bytes read through VMBus.
    pub(super) bytes_read: u64,
    /// Bytes written through VMBus.
    pub(super) bytes_written: u64,
    /// Bytes found to be what they must be, through VMBus or in the file.
    pub(super) bytes_verified: u64,
    /// Bytes unmapped through VMBus.
    pub(super) bytes_unmapped: u64,
    /// Checksum of the whole disk, as read through VMBus.
    pub(super) crc32c: String,
    pub(super) steps: Vec<Step>,
}

/// What the steps work with.
pub(super) struct Bench<'a> {
    pub(super) client: &'a mut StorageClient,
    pub(super) disk: &'a DiskInfo,
    /// The image as it was, for comparison.
    pub(super) original: &'a Image,
    /// The image that is served.
    pub(super) served: &'a Image,
    pub(super) area: Area,
    pub(super) output: &'a Output,
    pub(super) interrupt: &'a Interrupt,
    pub(super) proof: Proof,
}

impl Bench<'_> {
    fn step_bytes(&self) -> u32 {
        STEP.min(self.client.max_transfer_bytes())
    }

    /// Runs `step` over `bytes` bytes, with a progress bar, and notes how long it took.
    fn timed(
        &mut self,
        name: &'static str,
        bytes: u64,
        step: impl FnOnce(&mut Self, &Progress) -> Result<()>,
    ) -> Result<()> {
        let progress = self.output.progress(name, Length::Bytes(bytes));
        let started = Instant::now();
        step(self, &progress)?;
        drop(progress);
        self.note(name, bytes, started.elapsed())
    }

    fn note(&mut self, name: &'static str, bytes: u64, elapsed: Duration) -> Result<()> {
        let per_second = rate(bytes, elapsed);
        self.output
            .step(format_args!("{name:<44} {:>10} {per_second:>14}", Size(bytes).to_string()))?;
        self.proof.steps.push(Step {
            name,
            bytes,
            seconds: elapsed.as_secs_f64(),
            bytes_per_second: bytes_per_second(bytes, elapsed),
        });
        Ok(())
    }

    /// Reads the whole disk through VMBus and compares it with the image.
    pub(super) fn read_whole_disk(&mut self) -> Result<()> {
        let bytes = self.disk.bytes();
        self.timed("read through VMBus, equal to the image", bytes, |bench, progress| {
            let extents = Extent::cut(0, bytes, bench.step_bytes());
            let (mut through_vmbus, mut direct) = (Checksum::default(), Checksum::default());
            let mut expected = Vec::new();
            let read = bench.client.read_extents(bench.disk, extents, |offset, data| {
                expected.resize(data.len(), 0);
                bench.original.read_at(offset, &mut expected)?;
                through_vmbus.add(data);
                direct.add(&expected);
                progress.advance(data.len() as u64);
                bench.interrupt.check()?;
                equal("the disk read through VMBus", offset, &expected, data)
            })?;
            if through_vmbus != direct {
                return Err(Failure::mismatch(
                    0,
                    format_args!(
                        "checksums differ: {through_vmbus} through VMBus, {direct} in the image"
                    ),
                ));
            }
            bench.proof.crc32c = through_vmbus.to_string();
            bench.proof.bytes_read += read;
            bench.proof.bytes_verified += read;
            Ok(())
        })
    }

    /// Overwrites the area with the pattern: all of it in order, then a part of it at random.
    pub(super) fn write_pattern(&mut self) -> Result<Passes> {
        let bytes = self.area.bytes();
        self.timed("written in order, flushed", bytes, |bench, progress| {
            let extents: Vec<_> = bench.area.extents(bench.step_bytes()).collect();
            bench.write_pass(SEQUENTIAL_PASS, extents, progress)
        })?;
        let units = self.area.random_units();
        let passes = Passes::new(&units);
        let bytes = units.iter().map(|unit| u64::from(unit.bytes)).sum();
        self.timed("written in 4 KiB at random places, flushed", bytes, |bench, progress| {
            bench.write_pass(RANDOM_PASS, units, progress)
        })?;
        Ok(passes)
    }

    fn write_pass(&mut self, pass: u64, extents: Vec<Extent>, progress: &Progress) -> Result<()> {
        let written = self.client.write_extents(self.disk, extents, |offset, data| {
            pattern::fill(offset, pass, data);
            progress.advance(data.len() as u64);
            self.interrupt.check()
        })?;
        self.client.flush(self.disk)?;
        self.proof.bytes_written += written;
        Ok(())
    }

    /// Reads the area through VMBus, then in the file, and expects the pattern both times.
    pub(super) fn verify_pattern(&mut self, passes: &Passes) -> Result<()> {
        let bytes = self.area.bytes();
        let wrong = |difference: pattern::Difference, where_: &str| {
            let what = format!("{where_} is not what was written: {difference}");
            Failure::mismatch(difference.offset, what)
        };
        self.timed("read again through VMBus, as written", bytes, |bench, progress| {
            let extents: Vec<_> = bench.area.extents(bench.step_bytes()).collect();
            let read = bench.client.read_extents(bench.disk, extents, |offset, data| {
                progress.advance(data.len() as u64);
                bench.interrupt.check()?;
                passes.check(offset, data).map_err(|error| wrong(error, "the disk"))
            })?;
            bench.proof.bytes_read += read;
            bench.proof.bytes_verified += read;
            Ok(())
        })?;
        self.timed("read in the file itself, as written", bytes, |bench, progress| {
            bench.served.forget_cached();
            let mut data = Vec::new();
            for extent in bench.area.extents(STEP) {
                data.resize(extent.bytes as usize, 0);
                bench.served.read_at(extent.offset, &mut data)?;
                progress.advance(data.len() as u64);
                bench.interrupt.check()?;
                passes
                    .check(extent.offset, &data)
                    .map_err(|error| wrong(error, "the image file"))?;
            }
            bench.proof.bytes_verified += bench.area.bytes();
            Ok(())
        })
    }

    /// Unmaps the first piece of the area and expects zeros, through VMBus and in the file. A disk
    /// that has no UNMAP, or does not promise zeros, is left alone.
    pub(super) fn unmap(&mut self) -> Result<()> {
        let Some(limits) = self.disk.unmap.filter(|limits| limits.reads_zero) else {
            return self.output.step("UNMAP is not offered by this disk: not tested");
        };
        let granularity = u64::from(limits.granularity_blocks) * u64::from(self.disk.block_bytes);
        let (start, bytes) = self.area.first_piece();
        let bytes = bytes - bytes % granularity;
        if bytes == 0 || start % granularity != 0 {
            return self.output.step("the disk is too small for its UNMAP granularity: not tested");
        }
        self.timed("unmapped, reads zeros", bytes, |bench, progress| {
            bench.client.unmap(bench.disk, start, bytes)?;
            bench.client.flush(bench.disk)?;
            bench.served.forget_cached();
            let extents = Extent::cut(start, bytes, bench.step_bytes());
            let (mut zeros, mut direct) = (Vec::new(), Vec::new());
            let read = bench.client.read_extents(bench.disk, extents, |offset, data| {
                zeros.resize(data.len(), 0);
                direct.resize(data.len(), 1);
                bench.served.read_at(offset, &mut direct)?;
                progress.advance(data.len() as u64);
                bench.interrupt.check()?;
                equal("the unmapped disk", offset, &zeros, data)?;
                equal("the image file after UNMAP", offset, &zeros, &direct)
            })?;
            bench.proof.bytes_unmapped += read;
            bench.proof.bytes_read += read;
            bench.proof.bytes_verified += 2 * read;
            Ok(())
        })
    }

    /// Writes the original content back over the area.
    pub(super) fn write_back(&mut self) -> Result<()> {
        let bytes = self.area.bytes();
        self.timed("original content written back, flushed", bytes, |bench, progress| {
            let extents: Vec<_> = bench.area.extents(bench.step_bytes()).collect();
            let written = bench.client.write_extents(bench.disk, extents, |offset, data| {
                progress.advance(data.len() as u64);
                bench.interrupt.check()?;
                bench.original.read_at(offset, data)
            })?;
            bench.client.flush(bench.disk)?;
            bench.proof.bytes_written += written;
            Ok(())
        })
    }
}

/// Compares the whole of two image files. Needs no server: it is the last word.
pub(super) fn compare_files(
    original: &Image,
    served: &Image,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<u64> {
    served.forget_cached();
    if original.bytes != served.bytes {
        let at = original.bytes.min(served.bytes);
        let what = format!("the image file has {} bytes now, had {}", served.bytes, original.bytes);
        return Err(Failure::mismatch(at, what));
    }
    let (mut expected, mut data) = (Vec::new(), Vec::new());
    for extent in Extent::cut(0, original.bytes, STEP) {
        expected.resize(extent.bytes as usize, 0);
        data.resize(extent.bytes as usize, 0);
        original.read_at(extent.offset, &mut expected)?;
        served.read_at(extent.offset, &mut data)?;
        progress.advance(data.len() as u64);
        interrupt.check()?;
        equal("the image file in the end", extent.offset, &expected, &data)?;
    }
    Ok(original.bytes)
}

fn equal(what: &str, offset: u64, expected: &[u8], data: &[u8]) -> Result<()> {
    let Some(index) = first_difference(expected, data) else { return Ok(()) };
    let byte = |bytes: &[u8]| bytes.get(index).copied().unwrap_or_default();
    let (found, wanted) = (byte(data), byte(expected));
    let at = offset + index as u64;
    let what = format!("{what} differs at byte {at}: {found:#04x} instead of {wanted:#04x}");
    Err(Failure::mismatch(at, what))
}
