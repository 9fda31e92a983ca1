//! A machine: memory, processors, a serial port, and a VMBus.
//!
//! | module | what it has |
//! |---|---|
//! | `processor` | the thread of a processor, exit by exit |
//! | `gate` | how processors are brought to a stand |
//! | `save`, `restore` | a machine as a stream, and back |
//! | `counters` | what is counted |

mod counters;
mod gate;
mod processor;
mod restore;
mod save;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use hyperv_kvm::restore::MsrNumbers;
use hyperv_kvm::{Clocks, Mode, Partition, PartitionConfig, Vp};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmbus_host::HostBus;
use vmbus_memory::GuestMemory;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::boot::{self, BootConfig};
use crate::error::Error;
use crate::event::{End, Events, Teller};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::Ram;
use crate::serial::{Console, ConsoleOutput};

use counters::{KvmCounters, UserExits};
use gate::{DoNotStand, Gate, STAND_WITHIN};
use processor::Processor;

pub use counters::MachineCounters;
pub use restore::{MachineStateError, RestoreConfig, RestoringMachine};
pub use save::MachineSave;

/// Most processors of a machine.
pub const MAX_PROCESSORS: u32 = 16;

/// What a machine is made of.
pub struct MachineConfig {
    /// What it boots.
    pub boot: BootConfig,
    /// Memory, in bytes: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Whether the memory is made of huge pages: [`Ram::with_huge_pages`].
    pub huge_pages: bool,
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
    numbers: MsrNumbers,
    vcpus: Vec<(Vp, VcpuFd)>,
}

/// What KVM gives a machine, whether it is new or was saved.
struct Hardware {
    kvm: Kvm,
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    numbers: MsrNumbers,
}

/// What the threads of a machine share.
struct Shared {
    console: Arc<Console>,
    gate: Gate,
    exits: UserExits,
    teller: Teller,
}

impl Hardware {
    /// A VM with its interrupt controllers, `ram` mapped into it, and vCPUs as they are made.
    fn new(count: u32, ram: &Ram) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::NoKvm)?;
        let numbers = MsrNumbers::new(&kvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?);
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(KVM_TSS).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        ram.map_into(&vm)?;
        let vcpus = (0..count)
            .map(|index| vm.create_vcpu(index.into()).map_err(Error::kvm("KVM_CREATE_VCPU")));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(Self { kvm, vm, vcpus, numbers })
    }
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
        let ram = match config.huge_pages {
            true => Ram::with_huge_pages(config.memory_bytes)?,
            false => Ram::new(config.memory_bytes)?,
        };
        let Hardware { kvm, vm, vcpus: vcpu_fds, numbers } = Hardware::new(count, &ram)?;
        let console = Console::new(Console::line(&vm)?, config.console);
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
        Ok(Self { partition, console: Arc::new(console), ram, numbers, vcpus })
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
        take_kicks()?;
        let Self { partition, console, ram, numbers, vcpus } = self;
        let (teller, events) = Teller::new(vcpus.len());
        let shared = Arc::new(Shared::new(console, vcpus.len(), teller));
        let counters = vcpus.iter().map(|(_, vcpu)| KvmCounters::of(vcpu)).collect();
        let processors = vcpus.into_iter();
        let processors: Vec<_> =
            processors.map(|(vp, vcpu)| Arc::new(Mutex::new(Processor { vp, vcpu }))).collect();
        let (threads, stood) = (Vec::new(), Mutex::new(None));
        let mut running =
            Running { shared, threads, processors, counters, partition, numbers, stood, ram };
        for (index, processor) in running.processors.iter().enumerate() {
            let (shared, processor) = (Arc::clone(&running.shared), Arc::clone(processor));
            let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
            let thread = thread.spawn(move || processor::run(index, &processor, &shared));
            running.threads.push(thread.map_err(Error::Thread)?);
        }
        Ok((running, events))
    }
}

/// A machine that runs, or stands until it is resumed. Dropping it stops it.
pub struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    processors: Vec<Arc<Mutex<Processor>>>,
    counters: Vec<KvmCounters>,
    partition: Partition,
    numbers: MsrNumbers,
    /// Where the guest's clocks stood when it came to a stand.
    stood: Mutex<Option<Clocks>>,
    /// Mapped into the guest for as long as it runs.
    ram: Ram,
}

impl Running {
    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.ram.shared
    }

    /// The guest's memory, to be saved.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
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

    /// Brings the processors to a stand, each between two instructions, and returns when all stand. For a
    /// guest that is resumed its clocks have gone on; for one that is saved and restored they have not. A
    /// machine that stands already goes on standing.
    ///
    /// # Errors
    /// [`Error::Ended`]; [`Error::DoesNotStand`] where a processor does not come out of an exit for half a
    /// minute: all of them run again; [`Error::HyperV`] where KVM does not tell where clocks stand: likewise.
    pub fn pause(&self) -> Result<(), Error> {
        let mut stood = self.stood.lock().unwrap_or_else(PoisonError::into_inner);
        let count = u32::try_from(self.threads.len()).unwrap_or(u32::MAX); // at most 16
        let all_stand = self.shared.gate.stand(Instant::now() + STAND_WITHIN, |index| {
            if let Some(thread) = self.threads.get(index) {
                let _already_over = thread.kill(kick_signal());
            }
        });
        all_stand.map_err(|why| match why {
            DoNotStand::Stopped => Error::Ended,
            DoNotStand::TooLong { standing } => Error::DoesNotStand { standing, count },
        })?;
        if stood.is_none()
            && let Some(first) = self.processors.first()
        {
            let clocks = self.partition.clocks(&processor::lock(first).vcpu);
            *stood = Some(clocks.inspect_err(|_| self.shared.gate.open())?);
        }
        Ok(())
    }

    /// Where the guest's clocks stood when it came to a stand.
    fn clocks(&self) -> Option<Clocks> {
        *self.stood.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a machine that stands go on. One that runs, or has ended, is left as it is.
    pub fn resume(&self) {
        *self.stood.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.gate.open();
    }

    /// Whether all processors stand.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.shared.gate.is_standing()
    }

    /// What has been counted since the start. Processors run on meanwhile.
    #[must_use]
    pub fn counters(&self) -> MachineCounters {
        MachineCounters {
            user_exits: self.shared.exits.values(),
            interrupts: self.partition.interrupts(),
            processors: self.counters.iter().map(KvmCounters::values).collect(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.gate.stop();
        for thread in self.threads.drain(..) {
            // A kick that comes between a thread's last look and its next run is lost: so again.
            while !thread.is_finished() {
                let _already_over = thread.kill(kick_signal());
                std::thread::sleep(gate::KICK_EVERY);
            }
            let _ended = thread.join();
        }
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Has kicks do nothing, once for this process: that a signal came is enough for a processor to leave KVM.
fn take_kicks() -> Result<(), Error> {
    static KICKED: OnceLock<()> = OnceLock::new();
    if KICKED.get().is_none() {
        signal_hook::flag::register(kick_signal(), Arc::default()).map_err(Error::Event)?;
        let _another_was_first = KICKED.set(());
    }
    Ok(())
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

impl Shared {
    fn new(console: Arc<Console>, processors: usize, teller: Teller) -> Self {
        Self { console, gate: Gate::new(processors), exits: UserExits::default(), teller }
    }

    fn end(&self, end: End) {
        self.gate.stop();
        self.teller.end(end);
    }
}

#[cfg(test)]
mod tests;
