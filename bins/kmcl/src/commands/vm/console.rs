//! The guest's console on this terminal: what is typed goes to the guest, every key but one.

use std::io::{IsTerminal, Read};

use kmcl_vmm::VmHandle;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::exit::{Failure, Result};

/// Ends the VM when it is typed: Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;

/// A terminal that passes keys on as they are typed, until this is dropped.
pub(super) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Changes the terminal on standard input, if there is one.
    ///
    /// # Errors
    /// A [`Failure`] of kind system.
    pub(super) fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let failed = |error| Failure::system(format_args!("cannot set the terminal: {error}"), "");
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        // What the guest and this program print goes on as it was: lines end as they did.
        raw.output_modes = before.output_modes;
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _terminal_is_gone = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Types to the guest what comes on standard input, until it ends. For a thread of its own, which ends
/// with the process: a read cannot be called back.
pub(super) fn type_in(vm: &VmHandle) {
    let mut stdin = std::io::stdin().lock();
    let is_terminal = stdin.is_terminal();
    let mut buffer = [0; 256];
    while let Ok(read @ 1..) = stdin.read(&mut buffer) {
        let mut typed = buffer.get(..read).unwrap_or_default();
        if is_terminal && typed.contains(&ESCAPE) {
            vm.stop();
            return;
        }
        while !typed.is_empty() {
            let taken = vm.type_in(typed);
            typed = typed.get(taken..).unwrap_or_default();
            if taken == 0 {
                // The guest has not read what came before: its port has room for 64 bytes.
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}
