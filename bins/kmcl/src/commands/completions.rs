//! `kmcl completions`: a completion script, made from the definitions of the command line.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::cli::{Cli, Completions};
use crate::exit::Result;
use crate::output::stdout_failure;

pub(crate) fn run(arguments: &Completions) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "kmcl", &mut script);
    io::stdout().write_all(&script).map_err(stdout_failure)
}
