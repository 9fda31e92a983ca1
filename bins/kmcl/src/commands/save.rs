//! `kmcl save`: a running server is frozen, saved to a file, and ends or goes on.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::Save;
use crate::exit::Result;
use crate::output::{Output, Report, Table};
use crate::saver::Saver;
use crate::size::Size;

/// What was saved.
#[derive(Serialize)]
struct Done<'a> {
    file: &'a Path,
    bytes: u64,
    in_flight: u32,
    /// The server is still there.
    went_on: bool,
    freeze_to_settled_us: u64,
    freeze_to_saved_us: u64,
    /// From the request until the file was on the medium.
    file_us: u64,
}

impl Report for Done<'_> {
    fn table(&self) -> Table {
        let ms = |micros| format!("{:.1} ms", Duration::from_micros(micros).as_secs_f64() * 1e3);
        Table::pairs()
            .pair("saved", format_args!("{} in {}", Size(self.bytes), self.file.display()))
            .pair("requests in flight", self.in_flight)
            .pair("freeze to settled", ms(self.freeze_to_settled_us))
            .pair("freeze to saved", ms(self.freeze_to_saved_us))
            .pair("file on the medium", ms(self.file_us))
            .pair("the server", if self.went_on { "goes on" } else { "has ended" })
    }
}

pub(crate) fn run(arguments: &Save, output: &Output) -> Result<()> {
    let started = Instant::now();
    let settle = Duration::from_secs(arguments.settle);
    let saver = Saver::new(&arguments.socket, arguments.buffer, settle);
    let (saved, server) = saver.save_to(&arguments.to, arguments.go_on)?;
    let file_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    if let Some(server) = server {
        server.end()?;
    }
    output.report(&Done {
        file: &arguments.to,
        bytes: saved.bytes,
        in_flight: saved.in_flight,
        went_on: arguments.go_on,
        freeze_to_settled_us: saved.settled_us,
        freeze_to_saved_us: saved.saved_us,
        file_us,
    })
}
