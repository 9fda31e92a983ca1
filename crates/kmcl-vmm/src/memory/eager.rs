//! Memory that is read from its file all at once.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::index::PART_BYTES;
use super::lanes::{self, Lane};
use super::source::{MemoryFile, PartReader};
use super::{MemoryProgress, Placed, Ram, failed, part};
use crate::error::Error;

/// Reads all of `file` into `ram`, which is all zeros.
pub(super) fn load(
    ram: &Ram,
    huge_pages: bool,
    file: &Arc<MemoryFile>,
    progress: &mut dyn FnMut(MemoryProgress),
) -> Result<(), Error> {
    let lanes = (0..lanes::count()).map(|_| LoadLane::new(ram, huge_pages, file));
    let mut lanes = lanes.collect::<Result<Vec<_>, Error>>()?;
    let with_content = file.index.parts.iter().enumerate().filter(|(_, part)| part.length != 0);
    let mut numbers = with_content.map(|(number, _)| number);
    let total_bytes = file.index.memory_bytes();
    let mut written_bytes = 0;
    loop {
        let mut busy = 0;
        let mut done_bytes = total_bytes;
        for (lane, number) in lanes.iter_mut().zip(&mut numbers) {
            (lane.number, lane.outcome) = (number, None);
            done_bytes = (number as u64 + 1) * PART_BYTES;
            busy += 1;
        }
        let busy = lanes.get_mut(..busy).unwrap_or_default();
        lanes::run(busy);
        for lane in &mut *busy {
            written_bytes += lane.outcome.take().unwrap_or(Ok(0))?;
        }
        if busy.is_empty() {
            progress(MemoryProgress { done_bytes: total_bytes, total_bytes, written_bytes });
            return Ok(());
        }
        progress(MemoryProgress { done_bytes, total_bytes, written_bytes });
    }
}

struct LoadLane<'a> {
    ram: &'a Ram,
    huge_pages: bool,
    reader: PartReader,
    number: usize,
    /// Bytes that have become memory.
    outcome: Option<Result<u64, Error>>,
}

impl<'a> LoadLane<'a> {
    fn new(ram: &'a Ram, huge_pages: bool, file: &Arc<MemoryFile>) -> Result<Self, Error> {
        Ok(Self { ram, huge_pages, reader: file.reader()?, number: 0, outcome: None })
    }

    fn part(&mut self) -> Result<u64, Error> {
        let offset = self.number as u64 * PART_BYTES;
        let gpa = Placed::gpa_of(&self.reader.index().regions, offset).unwrap_or(u64::MAX);
        let Some(content) = self.reader.read(self.number)? else { return Ok(0) };
        let mut written = 0;
        for run in part::runs(content) {
            let bytes = content.get(run.clone()).unwrap_or_default();
            let start = run.start as u64;
            if self.huge_pages {
                // Files of huge pages cannot be written to.
                self.ram.shared.write(gpa.saturating_add(start), bytes).map_err(failed)?;
            } else {
                // Twice as fast as through the mapping, where each new page is a fault, and is cleared.
                self.ram.file.write_all_at(bytes, offset + start).map_err(failed)?;
            }
            written += bytes.len() as u64;
        }
        Ok(written)
    }
}

impl Lane for LoadLane<'_> {
    fn work(&mut self) {
        self.outcome = Some(self.part());
    }

    fn is_done(&self) -> bool {
        self.outcome.is_some()
    }
}
