//! `kmcl vm`: virtual machines.

mod console;
mod run;

use crate::cli::vm::Vm;
use crate::exit::Result;
use crate::output::Output;

pub(crate) fn run(command: &Vm, output: &Output) -> Result<()> {
    match command {
        Vm::Run(arguments) => run::run(arguments, output),
        _ => Err(crate::exit::Failure::usage("not there yet", "")),
    }
}
