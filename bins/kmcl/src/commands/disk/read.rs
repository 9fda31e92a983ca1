//! `kmcl disk read`: from a disk into a file or to standard output.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::{STEP, Span};
use crate::cli::Read;
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::image::compare::Checksum;
use crate::output::{Output, Report, Table, bytes_per_second, rate, stdout_failure};
use crate::progress::Length;
use crate::size::Size;

/// What was read.
#[derive(Serialize)]
struct Done {
    bytes_read: u64,
    crc32c: String,
    seconds: f64,
    bytes_per_second: u64,
    #[serde(skip)]
    elapsed: std::time::Duration,
}

impl Report for Done {
    fn table(&self) -> Table {
        Table::pairs()
            .pair("read", Size(self.bytes_read))
            .pair("CRC-32C", &self.crc32c)
            .pair("rate", rate(self.bytes_read, self.elapsed))
    }
}

/// Where the data goes.
enum Sink<'a> {
    Stdout(io::StdoutLock<'static>),
    File(File, &'a Path),
}

impl<'a> Sink<'a> {
    /// Whether `output` stands for standard output.
    fn is_stdout(output: &Path) -> bool {
        output.as_os_str() == "-"
    }

    fn open(path: &'a Path) -> Result<Self> {
        if Self::is_stdout(path) {
            return Ok(Self::Stdout(io::stdout().lock()));
        }
        let file = File::create(path).map_err(|error| file_failure(path, error))?;
        Ok(Self::File(file, path))
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        match self {
            Self::Stdout(stdout) => stdout.write_all(data).map_err(stdout_failure),
            Self::File(file, path) => {
                file.write_all(data).map_err(|error| file_failure(path, error))
            }
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Self::Stdout(mut stdout) => stdout.flush().map_err(stdout_failure),
            Self::File(file, path) => file.sync_all().map_err(|error| file_failure(path, error)),
        }
    }
}

fn file_failure(path: &Path, error: io::Error) -> Failure {
    Failure::system(
        format_args!("cannot write {}: {error}", path.display()),
        "name a file that can be written, with space for the data",
    )
}

pub(crate) fn run(arguments: &Read, output: &Output) -> Result<()> {
    let to_stdout = Sink::is_stdout(&arguments.output);
    if to_stdout && (output.is_json() || io::stdout().is_terminal()) {
        return Err(Failure::usage(
            "the data would mix with the report, or with your terminal",
            "name a file with --output, or redirect standard output",
        ));
    }
    let mut connection = Connection::open(&arguments.disk.target, arguments.disk.depth)?;
    let disk = connection.disk(arguments.disk.lun)?;
    let span = Span::new(&disk, arguments.offset, arguments.length)?;
    let mut sink = Sink::open(&arguments.output)?;
    let progress = output.progress("reading", Length::Bytes(span.bytes()));
    let started = Instant::now();
    let mut checksum = Checksum::default();
    let step = STEP.min(connection.client.max_transfer_bytes());
    connection.client.read_extents(&disk, span.extents(&disk, step), |offset, data| {
        let (_, data) = span.part(offset, data);
        sink.write(data)?;
        checksum.add(data);
        progress.advance(data.len() as u64);
        Ok::<(), Failure>(())
    })?;
    sink.finish()?;
    drop(progress);
    if to_stdout {
        return Ok(()); // standard output holds the data, and nothing else
    }
    let elapsed = started.elapsed();
    output.report(&Done {
        bytes_read: checksum.bytes(),
        crc32c: checksum.to_string(),
        seconds: elapsed.as_secs_f64(),
        bytes_per_second: bytes_per_second(checksum.bytes(), elapsed),
        elapsed,
    })
}
