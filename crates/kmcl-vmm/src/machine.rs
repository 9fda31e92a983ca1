//! A machine: memory, processors, a serial port, and a VMBus.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use hyperv_kvm::{Mode, Outcome, Partition, PartitionConfig, Vp};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vmbus_host::HostBus;
use vmbus_memory::GuestMemory;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::boot::{self, BootConfig};
use crate::error::Error;
use crate::event::{End, Events, Teller};
use crate::layout::{
    CMOS_DATA, KEYBOARD_COMMAND, KVM_IDENTITY_MAP, KVM_TSS, RESET, RESET_VALUE, SERIAL, SERIAL_GSI,
    SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_OFF,
};
use crate::memory::Ram;
use crate::serial::{Console, ConsoleOutput};

/// What KVM_RUN ends with where a signal came, and where the processor waits for its start.
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

/// Most processors of a machine.
pub const MAX_PROCESSORS: u32 = 16;

/// What a machine is made of.
pub struct MachineConfig {
    /// What it boots.
    pub boot: BootConfig,
    /// Memory, in bytes: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Processors: 1 to [`MAX_PROCESSORS`].
    pub processors: u32,
    /// Who provides Hyper-V's interfaces; `None`: whoever can.
    pub mode: Option<Mode>,
    /// What the VMBus is willing to do.
    pub bus: vmbus_host::Config,
    /// Where the guest's console goes.
    pub console: ConsoleOutput,
}

/// A machine that is ready to run. Offer devices on its [`Machine::bus`], then start it.
pub struct Machine {
    partition: Partition,
    console: Arc<Console>,
    ram: Ram,
    vcpus: Vec<(Vp, VcpuFd)>,
}

/// What the threads of a machine share.
struct Shared {
    console: Arc<Console>,
    stopping: AtomicBool,
    teller: Teller,
}

impl Machine {
    /// Makes a machine and loads what it boots.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(config: MachineConfig) -> Result<Self, Error> {
        let count = config.processors;
        if !(1..=MAX_PROCESSORS).contains(&count) {
            return Err(Error::Processors { count, most: MAX_PROCESSORS });
        }
        let kvm = Kvm::new().map_err(Error::NoKvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?);
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(KVM_TSS).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let ram = Ram::new(config.memory_bytes)?;
        ram.map_into(&vm)?;
        let (console, line) = Console::new(config.console)?;
        vm.register_irqfd(&line, SERIAL_GSI).map_err(Error::kvm("KVM_IRQFD"))?;

        let vcpu_fds = (0..count)
            .map(|index| vm.create_vcpu(index.into()).map_err(Error::kvm("KVM_CREATE_VCPU")));
        let vcpu_fds = vcpu_fds.collect::<Result<Vec<_>, _>>()?;
        let tsc_khz = match vcpu_fds.first() {
            Some(vcpu) => vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?,
            None => 0,
        };
        let partition = PartitionConfig {
            vps: count,
            mode: config.mode,
            tsc_khz,
            bus: config.bus,
            routes: Vec::new(),
        };
        let partition = Partition::new(Arc::clone(&vm), ram.shared.clone(), partition)?;
        let entry = boot::load(&ram, &config.boot, count)?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let cpuid = Partition::cpuid(&supported)?;
        let mut vcpus = Vec::new();
        for (index, vcpu) in (0..count).zip(vcpu_fds) {
            let own = cpuid_of(&cpuid, index, count)?;
            vcpu.set_cpuid2(&own).map_err(Error::kvm("KVM_SET_CPUID2"))?;
            let vp = partition.add_vp(index, &vcpu)?;
            boot::set_up_processor(&vcpu, index, entry)?;
            vcpus.push((vp, vcpu));
        }
        Ok(Self { partition, console: Arc::new(console), ram, vcpus })
    }

    /// The bus on which devices are offered.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        self.partition.bus()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.ram.shared
    }

    /// The partition: its descriptor is readable when [`Partition::messages_taken`] is to be called.
    #[must_use]
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// Who provides Hyper-V's interfaces.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.partition.mode()
    }

    /// Runs the machine, a thread for each processor, and gives what it will tell.
    ///
    /// # Errors
    /// [`Error::Thread`], [`Error::Event`].
    pub fn start(self) -> Result<(Running, Events), Error> {
        // The handler need do nothing: that a signal came is enough for a processor to leave KVM.
        let kicked = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(kick_signal(), kicked).map_err(Error::Event)?;
        let (teller, events) = Teller::new(self.vcpus.len());
        let shared =
            Arc::new(Shared { console: self.console, stopping: AtomicBool::new(false), teller });
        let mut threads = Vec::new();
        for (vp, vcpu) in self.vcpus {
            let shared = Arc::clone(&shared);
            let name = format!("vcpu{}", vp.index());
            let thread = std::thread::Builder::new().name(name);
            let thread = thread.spawn(move || run(&vp, vcpu, &shared));
            threads.push(thread.map_err(Error::Thread)?);
        }
        let (partition, ram) = (self.partition, self.ram);
        Ok((Running { shared, threads, partition, ram }, events))
    }
}

/// A machine that runs. Dropping it stops it.
pub struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    partition: Partition,
    /// Mapped into the guest for as long as it runs.
    ram: Ram,
}

impl Running {
    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.ram.shared
    }

    /// The partition: its descriptor is readable when [`Partition::messages_taken`] is to be called.
    #[must_use]
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// Types bytes to the guest's console; returns how many it took.
    #[must_use]
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.shared.console.type_in(bytes)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // A kick that comes between a thread's last look and its next run is lost: so again.
            while !thread.is_finished() {
                let _already_over = thread.kill(kick_signal());
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let _ended = thread.join();
        }
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Each processor's own leaves: its APIC id, and how many there are.
fn cpuid_of(all: &CpuId, index: u32, count: u32) -> Result<CpuId, Error> {
    let mut own = all.clone();
    for entry in own.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | index << 24;
                entry.edx |= u32::from(count > 1) << 28;
            }
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    Ok(own)
}

/// Runs a processor until the machine ends.
fn run(vp: &Vp, mut vcpu: VcpuFd, shared: &Shared) {
    while !shared.stopping.load(Ordering::SeqCst) {
        match step(vp, &mut vcpu, shared) {
            Ok(None) => {}
            Ok(Some(end)) => return shared.end(end),
            Err(error) => return shared.end(End::Failed(error)),
        }
    }
    shared.end(End::Stopped);
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

fn step(vp: &Vp, vcpu: &mut VcpuFd, shared: &Shared) -> Result<Option<End>, Error> {
    let then = match vcpu.run() {
        Ok(exit) => handle(vp, exit, shared),
        // Kicked, or not started yet.
        Err(error) if matches!(error.errno(), EINTR | EAGAIN) => Then::Nothing,
        Err(source) => return Err(Error::Kvm { call: "KVM_RUN", source }),
    };
    let outcome = match then {
        Then::Nothing => Outcome::Continue,
        Then::Hyperv => vp.hyperv_exit(vcpu)?,
        Then::HypercallPort(port) => vp.port_write(vcpu, port)?,
        Then::SystemEvent(event) => vp.system_event(vcpu, event)?,
        Then::End(end) => return Ok(Some(end)),
        Then::Failed(exit) => return Err(Error::Exit { vp: vp.index(), exit }),
    };
    Ok(match outcome {
        Outcome::Continue | Outcome::NotOurs => None,
        Outcome::Reset => Some(End::Reset),
        Outcome::Crash(report) => {
            shared.teller.crash(report);
            None
        }
    })
}

fn handle(vp: &Vp, exit: VcpuExit<'_>, shared: &Shared) -> Then {
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

impl Shared {
    fn end(&self, end: End) {
        self.stopping.store(true, Ordering::SeqCst);
        self.teller.end(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the guest writes to power off and to reset, as the tables tell it, and nothing else.
    #[test]
    fn ports_end_the_machine() {
        let (console, _line) = Console::new(Box::new(std::io::sink())).unwrap();
        let (teller, _events) = Teller::new(1);
        let (console, stopping) = (Arc::new(console), AtomicBool::new(false));
        let shared = Shared { console, stopping, teller };
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
