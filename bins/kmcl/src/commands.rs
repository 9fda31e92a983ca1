//! One module per command: each takes its arguments, does its work, and reports.

mod completions;
mod demo;
mod disk;
mod inspect;
mod man;
mod restore;
mod save;
mod serve;
mod vm;

use crate::cli::Command;
use crate::exit::Result;
use crate::output::Output;

/// Runs a command.
///
/// # Errors
/// The [`Failure`](crate::exit::Failure) that decides the exit code.
pub(crate) fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments, output),
        Command::Demo(arguments) => demo::run(&arguments, output),
        Command::Disk(command) => disk::run(command, output),
        Command::Inspect(arguments) => inspect::run(&arguments, output),
        Command::Serve(arguments) => serve::run(&arguments, output),
        Command::Vm(command) => vm::run(&command, output),
        Command::Save(arguments) => save::run(&arguments, output),
        Command::Restore(arguments) => restore::run(&arguments, output),
    }
}
