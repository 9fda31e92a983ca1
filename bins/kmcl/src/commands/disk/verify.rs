//! `kmcl disk verify`: a disk against a file, byte for byte.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{STEP, Span};
use crate::cli::Verify;
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::image::Image;
use crate::image::compare::{Checksum, first_difference};
use crate::output::{Output, Report, Table, bytes_per_second, rate};
use crate::progress::Length;
use crate::size::Size;

/// What was found equal.
#[derive(Serialize)]
struct Equal {
    bytes_verified: u64,
    crc32c: String,
    seconds: f64,
    bytes_per_second: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Report for Equal {
    fn table(&self) -> Table {
        Table::pairs()
            .pair("equal", Size(self.bytes_verified))
            .pair("CRC-32C", &self.crc32c)
            .pair("rate", rate(self.bytes_verified, self.elapsed))
    }
}

pub(crate) fn run(arguments: &Verify, output: &Output) -> Result<()> {
    let file = Image::open_any(&arguments.against)?;
    let mut connection = Connection::open(&arguments.disk.target, arguments.disk.depth)?;
    let disk = connection.disk(arguments.disk.lun)?;
    let length = arguments.length.unwrap_or(Size(file.bytes));
    if length.0 > file.bytes {
        return Err(Failure::usage(
            format_args!("{} has {} bytes, less than --length", file.path.display(), file.bytes),
            "choose a smaller --length",
        ));
    }
    let span = Span::new(&disk, arguments.offset, Some(length))?;
    let progress = output.progress("comparing", Length::Bytes(span.bytes()));
    let started = Instant::now();
    let mut checksum = Checksum::default();
    let mut expected = vec![0; STEP as usize];
    let step = STEP.min(connection.client.max_transfer_bytes());
    connection.client.read_extents(&disk, span.extents(&disk, step), |offset, data| {
        let (at, data) = span.part(offset, data);
        let expected = expected.get_mut(..data.len()).unwrap_or_default();
        file.read_at(at - span.start, expected)?;
        if let Some(index) = first_difference(expected, data) {
            let byte = |bytes: &[u8]| bytes.get(index).copied().unwrap_or_default();
            let (on_disk, in_file) = (byte(data), byte(expected));
            let at = at + index as u64;
            return Err(Failure::mismatch(
                at,
                format_args!(
                    "the disk differs from {} at byte {at} of the disk: {on_disk:#04x} instead of {in_file:#04x}",
                    file.path.display(),
                ),
            ));
        }
        checksum.add(data);
        progress.advance(data.len() as u64);
        Ok(())
    })?;
    drop(progress);
    let elapsed = started.elapsed();
    output.report(&Equal {
        bytes_verified: checksum.bytes(),
        crc32c: checksum.to_string(),
        seconds: elapsed.as_secs_f64(),
        bytes_per_second: bytes_per_second(checksum.bytes(), elapsed),
        elapsed,
    })
}
