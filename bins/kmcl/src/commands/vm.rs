//! `kmcl vm`: virtual machines.

mod console;
mod control;
mod restore;
mod run;

use crate::cli::vm::Vm;
use crate::exit::Result;
use crate::output::Output;

pub(crate) fn run(command: &Vm, output: &Output) -> Result<()> {
    match command {
        Vm::Run(arguments) => run::run(arguments, output),
        Vm::Restore(arguments) => restore::run(arguments, output),
        Vm::Save(arguments) => control::save(arguments, output),
        Vm::Shutdown(arguments) => control::shutdown(arguments),
        Vm::Reboot(arguments) => control::reboot(arguments),
        Vm::Pause(vm) => control::pause(vm),
        Vm::Resume(vm) => control::resume(vm),
        Vm::Info(vm) => control::info(vm, output),
        Vm::Counters(vm) => control::counters(vm, output),
        Vm::AddDisk(arguments) => control::add_disk(arguments, output),
        Vm::RemoveDisk(arguments) => control::remove_disk(arguments),
        Vm::Ctl(arguments) => control::ctl(arguments, output),
    }
}
