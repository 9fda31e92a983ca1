//! A virtual processor: what to do when its vCPU leaves the kernel for Hyper-V's sake.

use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmbus_host::HostBus;

use crate::error::Error;
use crate::hypercall::{self, CALL_PORT, HypercallStatus, PAGE_CODE, SIGNAL_PORT};
use crate::kvm::{self, HypervExit};
use crate::msr::{self, PageRegister};
use crate::partition::Port;
use crate::probe::Mode;

/// Frequency of KVM's local APIC timer, in Hz.
const APIC_HZ: u64 = 1_000_000_000;

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
        if let Some(value) = port.synic(self.index)?.read(index) {
            return Some(value);
        }
        let globals = port.globals();
        Some(match index {
            msr::GUEST_OS_ID => globals.guest_os_id,
            msr::HYPERCALL => globals.hypercall,
            msr::VP_INDEX => self.index.into(),
            msr::TIME_REF_COUNT => port.reference_time(),
            msr::REFERENCE_TSC => globals.reference_tsc,
            msr::TSC_FREQUENCY => u64::from(port.tsc_khz) * 1000,
            msr::APIC_FREQUENCY => APIC_HZ,
            msr::TSC_INVARIANT_CONTROL => globals.tsc_invariant,
            msr::RESET | msr::VP_ASSIST_PAGE => 0,
            msr::CRASH_CTL => msr::crash::NOTIFY | msr::crash::MESSAGE,
            msr::CRASH_P0..=msr::CRASH_P4 => {
                globals.crash.get((index - msr::CRASH_P0) as usize).copied()?
            }
            _ => return None,
        })
    }

    /// The guest writes an MSR; `None`: it may not, and gets a fault.
    #[must_use]
    pub fn write_msr(&self, index: u32, value: u64) -> Option<Outcome> {
        let port = &self.port;
        let mut globals = port.globals();
        match index {
            msr::GUEST_OS_ID => {
                globals.guest_os_id = value;
                if value == 0 {
                    globals.hypercall &= !1; // the page goes with the identity
                }
            }
            // Ignored while nobody has said who it is for.
            msr::HYPERCALL if globals.guest_os_id == 0 => {}
            msr::HYPERCALL if PageRegister(globals.hypercall).is_locked() => {}
            msr::HYPERCALL => {
                globals.hypercall = value;
                if let Some(page) = PageRegister(value).page() {
                    port.memory.write(page, &PAGE_CODE).ok()?;
                }
            }
            msr::REFERENCE_TSC => globals.reference_tsc = value,
            msr::TSC_INVARIANT_CONTROL => globals.tsc_invariant = value,
            msr::VP_ASSIST_PAGE => {}
            msr::RESET if value & 1 != 0 => return Some(Outcome::Reset),
            msr::RESET => {}
            msr::CRASH_P0..=msr::CRASH_P4 => {
                *globals.crash.get_mut((index - msr::CRASH_P0) as usize)? = value;
            }
            msr::CRASH_CTL if value & msr::crash::NOTIFY != 0 => {
                let has_message = value & msr::crash::MESSAGE != 0;
                let report = CrashReport { parameters: globals.crash, has_message };
                return Some(Outcome::Crash(report));
            }
            msr::CRASH_CTL => {}
            _ => {
                drop(globals);
                if !port.synic(self.index)?.write(index, value, &port.memory) {
                    return None;
                }
                // A slot has become empty, or the SynIC has come to life: what waits may go.
                self.bus.messages_drained();
            }
        }
        Some(Outcome::Continue)
    }

    /// Whether the hypercall page writes this port.
    #[must_use]
    pub fn is_port(&self, port: u16) -> bool {
        self.port.mode == Mode::User && matches!(port, CALL_PORT | SIGNAL_PORT)
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
