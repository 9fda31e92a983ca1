//! `kmcl disk`: one module per command.

mod bench;
mod info;
mod read;
mod verify;
mod write;

use vsc_storage::{DiskInfo, Extent};

use crate::cli::Disk;
use crate::exit::{Failure, Result};
use crate::output::Output;
use crate::size::Size;

pub(crate) fn run(command: Disk, output: &Output) -> Result<()> {
    match command {
        Disk::Info(arguments) => info::run(&arguments, output),
        Disk::Read(arguments) => read::run(&arguments, output),
        Disk::Write(arguments) => write::run(&arguments, output),
        Disk::Verify(arguments) => verify::run(&arguments, output),
        Disk::Bench(arguments) => bench::run(&arguments, output),
    }
}

/// Bytes of a disk that a command is about, not necessarily whole blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Span {
    start: u64,
    end: u64,
}

impl Span {
    /// `length` bytes of `disk` from `offset` on; without a length, all up to the end.
    fn new(disk: &DiskInfo, offset: Size, length: Option<Size>) -> Result<Self> {
        let disk_bytes = disk.bytes();
        let start = offset.0;
        let end = match length {
            Some(length) => start.checked_add(length.0),
            None => Some(disk_bytes.max(start)),
        };
        match end {
            Some(end) if end <= disk_bytes => Ok(Self { start, end }),
            _ => Err(Failure::usage(
                format_args!(
                    "{} from byte {start} on are not all on a disk of {disk_bytes} bytes",
                    length.map_or_else(
                        || "the bytes".to_owned(),
                        |length| format!("{} bytes", length.0)
                    ),
                ),
                "choose a smaller --offset or --length",
            )),
        }
    }

    fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The whole blocks that hold the span, in extents of at most `step` bytes.
    fn extents(&self, disk: &DiskInfo, step: u32) -> impl Iterator<Item = Extent> + use<> {
        let block = u64::from(disk.block_bytes);
        let step = step - step % disk.block_bytes;
        let start = self.start - self.start % block;
        let end = if self.bytes() == 0 { start } else { self.end.next_multiple_of(block) };
        Extent::cut(start, end - start, step.max(disk.block_bytes))
    }

    /// The part of `data`, the data of an extent at `offset`, that belongs to the span; and where on
    /// the disk that part begins.
    fn part<'a>(&self, offset: u64, data: &'a [u8]) -> (u64, &'a [u8]) {
        let at = |byte: u64| {
            usize::try_from(byte.saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len())
        };
        (offset.max(self.start), data.get(at(self.start)..at(self.end)).unwrap_or_default())
    }
}

/// Bytes of one request of a command that moves a lot of data.
const STEP: u32 = 256 << 10;
