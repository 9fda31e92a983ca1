//! A virtual processor: what to do when its vCPU leaves the kernel for Hyper-V's sake.

use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmbus_host::HostBus;

use crate::error::Error;
use crate::hypercall::{self, CALL_PORT, HypercallStatus, SIGNAL_PORT};
use crate::kvm::{self, HypervExit};
use crate::msr;
use crate::partition::Port;
use crate::registers::{self, Constants, Written};

/// What a guest says of its crash: five numbers, of which the last two may name a text in its memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CrashReport {
    /// The registers P0 to P4.
    pub parameters: [u64; 5],
    /// P3 is the address and P4 the length of a text.
    pub has_message: bool,
}

/// What an exit asks of the VMM beside going on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Outcome {
    /// Go on.
    Continue,
    /// Not Hyper-V's: it is for the VMM.
    NotOurs,
    /// The guest wants the machine reset.
    Reset,
    /// The guest has crashed. It may run on, to write a dump.
    Crash(CrashReport),
}

/// A virtual processor. The thread that runs the vCPU asks it, exit by exit:
///
/// | exit | call |
/// |---|---|
/// | `Hyperv` | [`Vp::hyperv_exit`] |
/// | `X86Rdmsr`, `X86Wrmsr` | [`Vp::read_msr`], [`Vp::write_msr`] |
/// | `IoOut` to a port for which [`Vp::is_port`] holds | [`Vp::port_write`] |
/// | `SystemEvent` | [`Vp::system_event`] |
#[derive(Debug)]
pub struct Vp {
    index: u32,
    port: Arc<Port>,
    bus: HostBus,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Vp {
    pub(crate) fn new(index: u32, port: Arc<Port>, bus: HostBus) -> Self {
        Self { index, port, bus }
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// A `KVM_EXIT_HYPERV`.
    ///
    /// # Errors
    /// [`Error::UnexpectedExit`] of a KVM that tells of something that was never asked for.
    pub fn hyperv_exit(&self, vcpu: &mut VcpuFd) -> Result<Outcome, Error> {
        match kvm::hyperv_exit(vcpu) {
            HypervExit::Synic { scontrol, siefp, simp } => {
                if let Some(synic) = self.port.synic(self.index) {
                    synic.mirror(scontrol, siefp, simp, &self.port.memory);
                }
                self.bus.messages_drained();
            }
            HypervExit::Hypercall { control, input } => {
                let status = hypercall::call(&self.bus, &self.port.memory, control, input);
                kvm::set_hypercall_result(vcpu, status.0.into());
            }
            HypervExit::Other(_) => {
                let mode = self.port.mode;
                return Err(Error::UnexpectedExit { exit: "KVM_EXIT_HYPERV", mode });
            }
        }
        Ok(Outcome::Continue)
    }

    /// What the guest reads from an MSR; `None`: it has none of this number, and gets a fault.
    #[must_use]
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        let port = &self.port;
        let constants = Constants {
            vp_index: self.index,
            tsc_khz: port.tsc_khz,
            reference_time: port.reference_time(),
        };
        registers::read(&port.globals(), port.synic(self.index)?, constants, index)
    }

    /// The guest writes an MSR; `None`: it may not, and gets a fault.
    #[must_use]
    pub fn write_msr(&self, index: u32, value: u64) -> Option<Outcome> {
        let port = &self.port;
        let synic = port.synic(self.index)?;
        // A statement of its own, so that the lock is let go of before the bus is called.
        let written = registers::write(&mut port.globals(), synic, &port.memory, index, value);
        Some(match written {
            Written::Done => Outcome::Continue,
            Written::Synic => {
                self.bus.messages_drained();
                Outcome::Continue
            }
            Written::Reset => Outcome::Reset,
            Written::Crash(report) => Outcome::Crash(report),
            Written::Fault => return None,
        })
    }

    /// Whether the hypercall page writes this port. A guest that was saved in [`Mode::User`] may be in the
    /// middle of that page's code also where KVM has written its own.
    ///
    /// [`Mode::User`]: crate::Mode::User
    #[must_use]
    pub fn is_port(&self, port: u16) -> bool {
        matches!(port, CALL_PORT | SIGNAL_PORT)
    }

    /// The guest has written a port of the hypercall page.
    ///
    /// # Errors
    /// [`Error::Kvm`] where the registers cannot be reached.
    pub fn port_write(&self, vcpu: &VcpuFd, port: u16) -> Result<Outcome, Error> {
        let mut registers = vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
        let special = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        let call =
            |control, input| hypercall::call(&self.bus, &self.port.memory, control, input).0.into();
        if special.ss.dpl != 0 {
            registers.rax = HypercallStatus::ACCESS_DENIED.0.into();
        } else if port == SIGNAL_PORT {
            // Its status comes back by r8: see the page.
            registers.r8 = call(registers.rcx, registers.rdx);
        } else {
            registers.rax = call(registers.rcx, registers.rdx);
        }
        vcpu.set_regs(&registers).map_err(Error::kvm("KVM_SET_REGS"))?;
        Ok(Outcome::Continue)
    }

    /// KVM tells of the machine's end or the guest's crash.
    ///
    /// # Errors
    /// [`Error::Kvm`] where the crash registers cannot be read.
    pub fn system_event(&self, vcpu: &VcpuFd, event: u32) -> Result<Outcome, Error> {
        Ok(match event {
            KVM_SYSTEM_EVENT_RESET => Outcome::Reset,
            KVM_SYSTEM_EVENT_CRASH => {
                let entry = |index| kvm_msr_entry { index, ..Default::default() };
                let entries: Vec<_> = (msr::CRASH_P0..=msr::CRASH_CTL).map(entry).collect();
                let mut msrs =
                    Msrs::from_entries(&entries).map_err(|_| Error::TooMany { what: "MSRs" })?;
                vcpu.get_msrs(&mut msrs).map_err(Error::kvm("KVM_GET_MSRS"))?;
                let mut values = msrs.as_slice().iter().map(|entry| entry.data);
                let parameters = std::array::from_fn(|_| values.next().unwrap_or(0));
                let control = values.next().unwrap_or(0);
                let has_message = control & msr::crash::MESSAGE != 0;
                Outcome::Crash(CrashReport { parameters, has_message })
            }
            _ => Outcome::NotOurs,
        })
    }
}
