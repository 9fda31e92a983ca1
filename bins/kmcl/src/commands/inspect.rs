//! `kmcl inspect`: explains a saved state, also a damaged one.

mod text;
mod walk;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use self::walk::State;
use crate::cli::Inspect;
use crate::exit::{Exit, Failure, Result};
use crate::output::Output;
use crate::size::Size;

/// Most bytes of a saved state that are looked at: it is read into memory.
const MAX_BYTES: u64 = 4 << 30;

/// What is in the file, for programs.
#[derive(Serialize)]
struct Explained<'a> {
    file: &'a Path,
    /// Whether every checksum and every field is right, and nothing is missing.
    whole: bool,
    #[serde(flatten)]
    state: &'a State,
}

/// That the file is as it was written, for programs.
#[derive(Serialize)]
struct Whole<'a> {
    file: &'a Path,
    whole: bool,
    streams: usize,
    chunks: u64,
    bytes: u64,
}

pub(crate) fn run(arguments: &Inspect, output: &Output) -> Result<()> {
    let path = arguments.file.as_path();
    let bytes = read(path)?;
    let state = State::read(&bytes);
    let whole = state.damage.is_empty();
    if state.is_foreign() {
        let why = state.damage.first().map(|damage| damage.what.as_str()).unwrap_or("it is empty");
        return Err(Failure::new(
            Exit::Mismatch,
            format_args!("{}: {why}", path.display()),
            "name a file that kmcl save has written",
        ));
    }
    if !arguments.verify {
        output.document(&Explained { file: path, whole, state: &state }, |rules| {
            text::of(&state, &path.display().to_string(), arguments.all, rules)
        })?;
    }
    if let Some(first) = state.damage.first() {
        let more = match state.damage.len() - 1 {
            0 => String::new(),
            1 => ", and 1 more place".to_owned(),
            more => format!(", and {more} more places"),
        };
        return Err(Failure::new(
            Exit::Mismatch,
            format_args!(
                "{} is damaged at byte {}, in stream {}: {}{more}",
                path.display(),
                first.offset,
                first.stream,
                first.what
            ),
            "restore an earlier state",
        ));
    }
    if arguments.verify {
        let (streams, chunks) = (state.streams.len(), state.chunks());
        let report = Whole { file: path, whole, streams, chunks, bytes: state.bytes };
        let line = format!(
            "{} is whole: {streams} streams, {chunks} chunks, {}, every checksum and field checked",
            path.display(),
            Size(state.bytes),
        );
        output.announce(&report, &line)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let cannot = |error: std::io::Error| {
        Failure::system(format_args!("cannot read {}: {error}", path.display()), "check the path")
    };
    let file = File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Failure::usage(
            format_args!("{} is larger than {}", path.display(), Size(MAX_BYTES)),
            "no saved state of this program is",
        ));
    }
    Ok(bytes)
}
