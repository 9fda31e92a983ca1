//! The program `kmcl`: arguments, then a configuration, then `run`, then an exit code.

mod cli;
mod commands;
mod connection;
mod control;
mod exit;
mod histogram;
mod image;
mod interrupt;
mod output;
mod progress;
mod saver;
mod server;
mod size;
mod storage_failure;
mod whole_file;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::Cli;
use crate::exit::{Exit, Failure};
use crate::output::Output;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &arguments).into(),
    };
    log_to_stderr(cli.global.verbose);
    let output = Output::new(cli.global.json);
    match commands::run(cli.command, &output) {
        Ok(()) => Exit::Ok,
        Err(failure) => output.fail(&failure),
    }
    .into()
}

/// Answers a command line that is no command: with the help it asks for, or with one line.
fn refuse(error: &clap::Error, arguments: &[OsString]) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell when the reader of the help has gone.
            let _ = error.print();
            Exit::Ok
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            Exit::Usage
        }
        _ => {
            // The line was not understood, so what it says about JSON is looked for by hand.
            let json = arguments.iter().take_while(|a| *a != "--").any(|a| a == "--json");
            let rendered = error.render().to_string();
            let what = ["\n\nUsage:", "\n\nFor more information"]
                .iter()
                .fold(rendered.as_str(), |what, end| what.split(end).next().unwrap_or(what));
            let what = what.strip_prefix("error: ").unwrap_or(what);
            let advice = "see kmcl --help, or --help after the command";
            Output::new(json).fail(&Failure::usage(what.trim(), advice))
        }
    }
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .finish();
    // Fails only where a subscriber stands already, and this is the first line that runs.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
