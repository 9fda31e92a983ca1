//! The thread of a processor: in KVM and out again, exit by exit.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hyperv_kvm::{Outcome, Vp};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Shared;
use super::counters::UserExit;
use crate::error::Error;
use crate::event::End;
use crate::layout::{
    CMOS_DATA, KEYBOARD_COMMAND, RESET, RESET_VALUE, SERIAL, SLEEP_CONTROL, SLEEP_STATUS,
    SLEEP_TYPE_OFF,
};

/// What KVM_RUN ends with where a signal came, and where the processor waits for its start.
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

/// Exits that one takes at most to come to an end: an instruction that moves a page byte by byte.
const MAX_COMPLETIONS: u32 = 8192;

/// A processor. Its thread holds it while it runs; whoever saves it, while it stands.
pub(super) struct Processor {
    pub(super) vp: Vp,
    pub(super) vcpu: VcpuFd,
}

pub(super) fn lock(processor: &Mutex<Processor>) -> MutexGuard<'_, Processor> {
    processor.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a processor until the machine ends.
pub(super) fn run(index: usize, processor: &Mutex<Processor>, shared: &Shared) {
    while shared.gate.pass(index) {
        let mut own = lock(processor);
        match run_while_open(&mut own, shared) {
            Ok(None) => {}
            Ok(Some(end)) => return shared.end(end),
            Err(error) => return shared.end(End::Failed(error)),
        }
    }
    shared.end(End::Stopped);
}

fn run_while_open(
    Processor { vp, vcpu }: &mut Processor,
    shared: &Shared,
) -> Result<Option<End>, Error> {
    while shared.gate.is_open() {
        if let Stepped::Ended(end) = step(vp, vcpu, shared)? {
            return Ok(Some(end));
        }
    }
    if shared.gate.is_to_stand() { complete(vp, vcpu, shared) } else { Ok(None) }
}

/// What has been handled of an exit is only done when KVM is entered again: the register that a port was
/// read into has its value then, and the instruction is behind the processor.
fn complete(vp: &Vp, vcpu: &mut VcpuFd, shared: &Shared) -> Result<Option<End>, Error> {
    vcpu.set_kvm_immediate_exit(1);
    let mut completed = Ok(None);
    for round in 0.. {
        match step(vp, vcpu, shared) {
            Ok(Stepped::Interrupted) => break,
            Ok(Stepped::Exit) if round < MAX_COMPLETIONS => {}
            Ok(Stepped::Exit) => {
                let exit = format!("more than {MAX_COMPLETIONS} exits for one instruction");
                completed = Err(Error::Exit { vp: vp.index(), exit });
                break;
            }
            Ok(Stepped::Ended(end)) => {
                completed = Ok(Some(end));
                break;
            }
            Err(error) => {
                completed = Err(error);
                break;
            }
        }
    }
    vcpu.set_kvm_immediate_exit(0);
    completed
}

/// What has come of entering KVM once.
enum Stepped {
    /// An exit, which was handled.
    Exit,
    /// A signal, or no start yet: nothing is left undone.
    Interrupted,
    /// The machine's end.
    Ended(End),
}

/// What an exit leaves to do once its borrow of the vCPU is over.
enum Then {
    Nothing,
    Hyperv,
    HypercallPort(u16),
    SystemEvent(u32),
    End(End),
    Failed(String),
}

fn step(vp: &Vp, vcpu: &mut VcpuFd, shared: &Shared) -> Result<Stepped, Error> {
    let then = match vcpu.run() {
        Ok(exit) => handle(vp, exit, shared),
        Err(error) if matches!(error.errno(), EINTR | EAGAIN) => {
            shared.exits.count(UserExit::Signal);
            return Ok(Stepped::Interrupted);
        }
        Err(source) => return Err(Error::Kvm { call: "KVM_RUN", source }),
    };
    let outcome = match then {
        Then::Nothing => Outcome::Continue,
        Then::Hyperv => vp.hyperv_exit(vcpu)?,
        Then::HypercallPort(port) => vp.port_write(vcpu, port)?,
        Then::SystemEvent(event) => vp.system_event(vcpu, event)?,
        Then::End(end) => return Ok(Stepped::Ended(end)),
        Then::Failed(exit) => return Err(Error::Exit { vp: vp.index(), exit }),
    };
    Ok(match outcome {
        Outcome::Continue | Outcome::NotOurs => Stepped::Exit,
        Outcome::Reset => Stepped::Ended(End::Reset),
        Outcome::Crash(report) => {
            shared.teller.crash(report);
            Stepped::Exit
        }
    })
}

fn handle(vp: &Vp, exit: VcpuExit<'_>, shared: &Shared) -> Then {
    shared.exits.count(reason(vp, &exit));
    match exit {
        VcpuExit::IoOut(port, _) if vp.is_port(port) => return Then::HypercallPort(port),
        VcpuExit::IoOut(port, data) => return write_port(port, data, shared),
        VcpuExit::IoIn(port, data) => read_port(port, data, shared),
        VcpuExit::X86Rdmsr(exit) => match vp.read_msr(exit.index) {
            Some(value) => *exit.data = value,
            None => *exit.error = 1,
        },
        VcpuExit::X86Wrmsr(exit) => match vp.write_msr(exit.index, exit.data) {
            Some(Outcome::Reset) => return Then::End(End::Reset),
            Some(Outcome::Crash(report)) => shared.teller.crash(report),
            Some(Outcome::Continue | Outcome::NotOurs) => {}
            None => *exit.error = 1,
        },
        VcpuExit::Hyperv => return Then::Hyperv,
        VcpuExit::SystemEvent(event, _) => return Then::SystemEvent(event),
        VcpuExit::Shutdown => return Then::End(End::TripleFault { vp: vp.index() }),
        // Nobody is there: reads give what an empty bus gives.
        VcpuExit::MmioRead(_, data) => data.fill(0xff),
        VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {}
        other => return Then::Failed(format!("{other:?}")),
    }
    Then::Nothing
}

fn reason(vp: &Vp, exit: &VcpuExit<'_>) -> UserExit {
    match exit {
        VcpuExit::IoOut(port, _) if vp.is_port(*port) => UserExit::HypercallPort,
        VcpuExit::IoOut(..) => UserExit::PortWrite,
        VcpuExit::IoIn(..) => UserExit::PortRead,
        VcpuExit::X86Rdmsr(_) => UserExit::MsrRead,
        VcpuExit::X86Wrmsr(_) => UserExit::MsrWrite,
        VcpuExit::Hyperv => UserExit::Hyperv,
        VcpuExit::SystemEvent(..) => UserExit::SystemEvent,
        VcpuExit::Shutdown => UserExit::Shutdown,
        VcpuExit::MmioRead(..) => UserExit::MmioRead,
        VcpuExit::MmioWrite(..) => UserExit::MmioWrite,
        _ => UserExit::Other,
    }
}

fn read_port(port: u16, data: &mut [u8], shared: &Shared) {
    let value = match port {
        SERIAL..=0x3ff => shared.console.read(u8::try_from(port - SERIAL).unwrap_or(0)),
        // A kernel that looks for a clock in spite of the tables must not wait for its update to end.
        SLEEP_STATUS | KEYBOARD_COMMAND | CMOS_DATA => 0,
        _ => 0xff,
    };
    data.fill(value);
}

fn write_port(port: u16, data: &[u8], shared: &Shared) -> Then {
    const SLEEP_ENABLE: u8 = 1 << 5;
    const KEYBOARD_RESET: u8 = 0xfe;
    let Some(&value) = data.first() else { return Then::Nothing };
    match port {
        SERIAL..=0x3ff => {
            shared.console.write(u8::try_from(port - SERIAL).unwrap_or(0), value);
        }
        SLEEP_CONTROL if value == SLEEP_ENABLE | SLEEP_TYPE_OFF << 2 => {
            return Then::End(End::PowerOff);
        }
        RESET if value == RESET_VALUE => return Then::End(End::Reset),
        KEYBOARD_COMMAND if value == KEYBOARD_RESET => return Then::End(End::Reset),
        _ => {}
    }
    Then::Nothing
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::event::Teller;
    use crate::serial::Console;

    /// What the guest writes to power off and to reset, as the tables tell it, and nothing else.
    #[test]
    fn ports_end_the_machine() {
        let line = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let console = Arc::new(Console::new(line, Box::new(std::io::sink())));
        let (teller, _events) = Teller::new(1);
        let shared = Shared::new(console, 1, teller);
        for (port, value, expected) in [
            (SLEEP_CONTROL, 0x34, "PowerOff"),
            (SLEEP_CONTROL, 0x14, ""),
            (RESET, 1, "Reset"),
            (RESET, 0, ""),
            (KEYBOARD_COMMAND, 0xfe, "Reset"),
            (KEYBOARD_COMMAND, 0x60, ""),
            (0x80, 1, ""),
        ] {
            let then = match write_port(port, &[value], &shared) {
                Then::End(end) => format!("{end:?}"),
                _ => String::new(),
            };
            assert_eq!(then, expected, "{value:#x} to port {port:#x}");
        }
        assert!(matches!(write_port(RESET, &[], &shared), Then::Nothing));
        let mut nobody = [0; 4];
        read_port(0x1234, &mut nobody, &shared);
        assert_eq!(nobody, [0xff; 4]);
    }
}
