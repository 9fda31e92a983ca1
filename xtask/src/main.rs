//! Everything a developer or CI runs, as `cargo xtask COMMAND`.
//!
//! One file per command; `test` is a table of steps, one file per family of steps.

mod bench;
mod conformance;
mod docs;
mod fuzz;
mod guest;
mod install;
mod readme;
mod run;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::run::Failure;
use crate::workspace::Workspace;

/// The command line. The README's commands are parsed with it too, so that they stay true.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every check, in order, up to the first that fails
    Test {
        /// Run this step alone (may be given several times)
        #[arg(long, value_name = "STEP", value_parser = clap::builder::PossibleValuesParser::new(test::names()))]
        only: Vec<String>,
        /// Print the steps and stop
        #[arg(long)]
        list: bool,
        /// Without real guests, which need QEMU or KVM and Debian's packages
        #[arg(long)]
        no_guest: bool,
    },
    /// Run the benchmarks and print each ratio beside the one it must reach
    Bench {
        /// Run the benchmarks of this package alone (may be given several times)
        #[arg(long, short, value_name = "NAME")]
        package: Vec<String>,
        /// Write the figures as JSON, too
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
    },
    /// Run the fuzz targets, one after the other
    Fuzz {
        /// Run this target alone
        target: Option<String>,
        /// How long each one runs, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        time: u32,
        /// Add inputs that reach new code to the corpora under fuzz/corpus
        #[arg(long)]
        keep: bool,
    },
    /// Run real guests on the VMM, in an emulated machine where need be, and print what came of each scenario
    Guest(guest::Arguments),
    /// Run the C interface's conformance programs and print the rows passed for each function
    Conformance,
    /// Install the C interface: headers, libraries, pkg-config file
    Install {
        /// Where to
        #[arg(long, value_name = "FOLDER", default_value = "/usr/local")]
        prefix: PathBuf,
        /// Take the libraries of this folder, and build none
        #[arg(long, value_name = "FOLDER")]
        libraries: Option<PathBuf>,
    },
    /// Build the API documentation, the man page and the shell completions, all below target/
    Docs,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Test { list: true, .. } => {
            test::list();
            Ok(())
        }
        Command::Test { only, no_guest, .. } => {
            Workspace::load().and_then(|workspace| test::run(&workspace, &only, !no_guest))
        }
        Command::Bench { package, save } => Workspace::load()
            .and_then(|workspace| bench::run(&workspace, &package, save.as_deref())),
        Command::Fuzz { target, time, keep } => Workspace::load()
            .and_then(|workspace| fuzz::fuzz(&workspace, target.as_deref(), time, keep)),
        Command::Guest(arguments) => {
            Workspace::load().and_then(|workspace| guest::run(&workspace, &arguments))
        }
        Command::Conformance => {
            Workspace::load().and_then(|workspace| conformance::run_all(&workspace))
        }
        Command::Install { prefix, libraries } => Workspace::load()
            .and_then(|workspace| install::install(&workspace, &prefix, libraries.as_deref())),
        Command::Docs => Workspace::load().and_then(|workspace| docs::build(&workspace)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    eprintln!("xtask: {failure}");
    ExitCode::FAILURE
}
