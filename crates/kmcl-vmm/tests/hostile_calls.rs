//! What the code of a hostile guest would do, done without running it: registers, calls and memory, in an
//! order that a seed decides, against a virtual processor, a bus, controllers and disks that are the real
//! ones. A failing seed fails again.
//!
//! KVM is asked for a machine, which runs nothing; its processors' registers are served from user space.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
#![allow(clippy::indexing_slicing, reason = "as above")]

#[path = "hostile/conversation.rs"]
mod conversation;

use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use hyperv_kvm::hypercall::{self, CALL_PORT, HypercallStatus, SIGNAL_PORT};
use hyperv_kvm::{Mode, Outcome, Partition, PartitionConfig, Vp, msr};
use kmcl::{Channel, Guid};
use kvm_ioctls::{Kvm, VcpuFd};
use vmbus_host::limits::{MAX_GPADLS, MAX_INCOMPLETE_GPADLS, MAX_OUTGOING_MESSAGES};
use vmbus_memory::GuestMemory;
use vmbus_wire::message::{HostMessage, MessageType};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::{FeatureFlags, Version};
use vsp_storage::block::RamBackend;
use vsp_storage::{
    Completions, ControllerConfig, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};

const PAGE: u64 = 4096;
const MEMORY: u64 = 64 << 20;
const MESSAGE_PAGE: u64 = 0x20_1000;
const EVENT_PAGE: u64 = 0x20_2000;
const INPUT: u64 = 0x20_3000;
const RINGS: u64 = 0x21_0000;
const RING_PAGES: u64 = 16;
/// What the guest writes to, and has registers name, at random.
const ARENA: std::ops::Range<u64> = 0x40_0000..0x200_0000;
/// Pages that it never names, not even with a byte of a message changed: of numbers from this one on, those
/// whose last byte is at least [`UNNAMED`]. Nobody has any business there.
const FIRST_UNNAMED: u64 = 0x3000;
const UNNAMED: u64 = 0xe0;

type Outcomes<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Drives whatever it is given, when it is told to.
#[derive(Default)]
struct ByHand {
    channels: Mutex<Vec<Channel>>,
    completions: Mutex<Vec<Arc<Completions>>>,
}

impl ByHand {
    fn drive(&self) {
        let channels = self.channels.lock().unwrap().clone();
        for channel in channels {
            // What is left waits for the next time, as in a loop with others to drive.
            let _more = channel.process(64);
        }
        let completions = self.completions.lock().unwrap().clone();
        for one in completions {
            let _more = one.ready();
        }
    }
}

impl Driver for ByHand {
    fn add_channel(&self, channel: &Channel) -> Outcomes<()> {
        self.channels.lock().unwrap().push(channel.clone());
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        let bell = |channel: &Channel| channel.doorbell_fd().unwrap().as_raw_fd();
        self.channels.lock().unwrap().retain(|other| bell(other) != bell(channel));
    }

    fn add_completions(&self, completions: Arc<Completions>) -> Outcomes<()> {
        self.completions.lock().unwrap().push(completions);
        Ok(())
    }

    fn remove_completions(&self, completions: &Arc<Completions>) {
        self.completions.lock().unwrap().retain(|other| !Arc::ptr_eq(other, completions));
    }
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    fn address(&mut self) -> u64 {
        ARENA.start + self.below(ARENA.end - ARENA.start)
    }

    /// What may be an address, with an enable bit, or not.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next() | MEMORY, // some bit above memory: no page of ours
            1 | 2 => self.address() & !0xfff | 1,
            3 => self.address() & !0xfff,
            4 => self.below(256),
            5 => 1 << 40 | self.next() & !0xfff | 1,
            6 => u64::MAX,
            _ => (MESSAGE_PAGE + self.below(2) * PAGE) | 1,
        }
    }
}

/// A guest without code: a processor, the memory it would use, and what the host has for it.
struct Guest {
    vp: Vp,
    vcpu: VcpuFd,
    partition: Partition,
    memory: GuestMemory,
    driver: Arc<ByHand>,
    controllers: Vec<ScsiController>,
    conversation: Vec<[u8; 256]>,
    random: Random,
    /// Its next message.
    next: usize,
    /// How often a controller's channel was seen open.
    opened: u32,
}

impl Guest {
    /// `None`, said in one line, where there is no KVM for it.
    fn new(seed: u64) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("not run: /dev/kvm: {error}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let memory = GuestMemory::memfd(MEMORY).unwrap();
        let config = PartitionConfig {
            vps: 1,
            mode: Some(Mode::User),
            tsc_khz: 1_000_000,
            bus: vmbus_host::Config::default(),
            routes: Vec::new(),
        };
        let partition = match Partition::new(Arc::clone(&vm), memory.clone(), config) {
            Ok(partition) => partition,
            Err(error) => {
                println!("not run: {error}");
                return None;
            }
        };
        let vcpu = vm.create_vcpu(0).unwrap();
        let vp = partition.add_vp(0, &vcpu).unwrap();
        let driver = Arc::new(ByHand::default());
        let controllers = (1..=2).map(|number| controller(&partition, &driver, number)).collect();
        let pages = (0..RING_PAGES).map(|page| RINGS / PAGE + page);
        let conversation = conversation::messages(pages).unwrap();
        let random = Random(seed);
        let (next, opened) = (0, 0);
        Some(Self {
            vp,
            vcpu,
            partition,
            memory,
            driver,
            controllers,
            conversation,
            random,
            next,
            opened,
        })
    }

    /// Any of the things that it can do.
    fn act(&mut self) {
        match self.random.below(16) {
            0..3 => self.any_register(),
            3 => self.become_proper(),
            4..8 => self.converse(),
            8 => self.any_call(),
            9 => {
                let flag = if self.random.one_in(4) { self.random.next() } else { 0 };
                let connection = u64::from(conversation::FIRST_CONNECTION) + self.random.below(8);
                let input = flag << 32 | connection;
                let _status = self.call(0x1_005d, input);
            }
            10 => self.any_port(),
            11 | 12 => drop(self.take_message()),
            13 => {
                let (at, word) = (self.random.address(), self.random.next());
                self.memory.write(at, &word.to_le_bytes()).unwrap();
            }
            14 => self.harm_rings(),
            _ => self.driver.drive(),
        }
    }

    fn any_register(&mut self) {
        let known = [
            msr::GUEST_OS_ID,
            msr::HYPERCALL,
            msr::REFERENCE_TSC,
            msr::SCONTROL,
            msr::SIEFP,
            msr::SIMP,
            msr::EOM,
            msr::SINT0 + 2,
            msr::CRASH_CTL,
            msr::RESET,
        ];
        let any = *msr::RANGE.start() + u32::try_from(self.random.below(512)).unwrap();
        let choice = usize::try_from(self.random.below(20)).unwrap();
        let index = known.get(choice).copied().unwrap_or(any);
        let value = self.random.value();
        let before = self.vp.read_msr(index);
        match self.vp.write_msr(index, value) {
            // As a VMM does that goes on with the same machine.
            Some(Outcome::Reset) => self.partition.bus().guest_reset(),
            Some(_) => {}
            None if index == msr::TIME_REF_COUNT => {}
            None => assert_eq!(self.vp.read_msr(index), before, "{index:#x}: refused, and changed"),
        }
    }

    /// Sets everything up as guests do.
    fn become_proper(&mut self) {
        for (index, value) in [
            (msr::GUEST_OS_ID, 0x8100_0000_0006_0c00),
            (msr::SIMP, MESSAGE_PAGE | 1),
            (msr::SIEFP, EVENT_PAGE | 1),
            (msr::SINT0 + 2, 0x50),
            (msr::SCONTROL, 1),
        ] {
            assert!(self.vp.write_msr(index, value).is_some(), "{index:#x} is there");
        }
    }

    /// The next message of the conversation; one of four has a byte changed. Rings are empty, usually,
    /// when they are opened.
    fn converse(&mut self) {
        self.next = (self.next + 1) % self.conversation.len();
        let mut input = self.conversation[self.next];
        if !self.random.one_in(4) && u32::from(input[16]) == MessageType::OpenChannel.to_wire() {
            self.memory.fill(RINGS, RING_PAGES * PAGE, 0).unwrap();
        }
        if self.random.one_in(4) {
            let at = usize::try_from(self.random.below(256)).unwrap();
            input[at] = self.random.next().to_le_bytes()[3];
        }
        self.memory.write(INPUT, &input).unwrap();
        let _status = self.call(0x5c, INPUT);
        let open = self.partition.bus().usage().held;
        self.opened += u32::from(open != 0);
    }

    fn any_call(&mut self) {
        let mut input = [0; 256];
        for (at, most) in [(0, 8), (8, 2), (12, 256), (16, 32), (24, 16), (28, 256)] {
            let word = u32::try_from(self.random.below(most)).unwrap();
            input[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        self.memory.write(INPUT, &input).unwrap();
        let (control, at) = match self.random.below(4) {
            0 => (0x5c, INPUT),
            1 => (0x5c, self.random.value()),
            2 => (0x5d, self.random.value()),
            _ => (self.random.next(), self.random.value()),
        };
        let _status = self.call(control, at);
    }

    /// The ports that the page writes, with the registers of the moment.
    fn any_port(&mut self) {
        let mut registers = self.vcpu.get_regs().unwrap();
        registers.rcx = if self.random.one_in(2) { 0x5c } else { self.random.next() };
        registers.rdx = if self.random.one_in(2) { INPUT } else { self.random.value() };
        self.vcpu.set_regs(&registers).unwrap();
        for port in [CALL_PORT, SIGNAL_PORT] {
            assert!(self.vp.is_port(port));
            assert_eq!(self.vp.port_write(&self.vcpu, port).unwrap(), Outcome::Continue);
        }
    }

    /// Words of the control pages, and of what lies in the rings.
    fn harm_rings(&mut self) {
        let at = RINGS + self.random.below(RING_PAGES) * PAGE + self.random.below(24) * 8;
        let word = match self.random.below(4) {
            0 => 0x0001_000a_0002_0006, // what a packet begins with
            1 => self.random.next(),
            _ => self.random.below(0x1000) * 8,
        };
        self.memory.write(at, &word.to_le_bytes()).unwrap();
    }

    fn call(&mut self, control: u64, input: u64) -> HypercallStatus {
        hypercall::call(self.partition.bus(), &self.memory, control, input)
    }

    /// Empties its slot and says so; gives what was in it.
    fn take_message(&mut self) -> Option<Vec<u8>> {
        let at = MESSAGE_PAGE + 2 * 256;
        let mut slot = [0; 256];
        self.memory.read(at, &mut slot).unwrap();
        self.memory.write(at, &[0; 4]).unwrap();
        assert!(self.vp.write_msr(msr::EOM, 0).is_some());
        let len = usize::from(slot[4]).min(240);
        (slot[0] != 0).then(|| slot[16..16 + len].to_vec())
    }

    /// What must hold whatever was done.
    fn check(&self, seed: u64) {
        let bus = self.partition.bus();
        assert_eq!(bus.inspect(|host| host.violations()), Vec::<String>::new(), "seed {seed:#x}");
        let usage = bus.usage();
        let within = usage.messages <= MAX_OUTGOING_MESSAGES
            && usage.gpadls <= MAX_GPADLS
            && usage.incomplete_gpadls <= MAX_INCOMPLETE_GPADLS;
        assert!(within, "seed {seed:#x}: {usage:?}");
    }

    /// That nobody has written to a page that was never named.
    fn check_unnamed_pages(&self, seed: u64) {
        let mut content = [0; 4096];
        for page in (FIRST_UNNAMED..MEMORY / PAGE).filter(|page| page & 0xff >= UNNAMED) {
            self.memory.read(page * PAGE, &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == 0), "seed {seed:#x}: page {page:#x}");
        }
    }

    /// A proper guest boots where the hostile one was, and finds everything as it should be.
    fn a_proper_guest_follows(&mut self, seed: u64) {
        self.partition.bus().guest_reset();
        self.become_proper();
        for _ in 0..MAX_OUTGOING_MESSAGES {
            self.driver.drive();
            if self.take_message().is_none() {
                break;
            }
        }
        self.memory.fill(RINGS, RING_PAGES * PAGE, 0).unwrap();
        let mut told = Vec::new();
        // As far as the first channel's open.
        let opening: Vec<_> = self.conversation.iter().take(4).copied().collect();
        for message in opening {
            self.memory.write(INPUT, &message).unwrap();
            let status = self.call(0x5c, INPUT);
            assert_eq!(status, HypercallStatus::SUCCESS, "seed {seed:#x}: {:x?}", &message[..32]);
            for _ in 0..8 {
                self.driver.drive();
                told.extend(self.take_message());
            }
        }
        let negotiated = Some((Version::V5_3, FeatureFlags::empty()));
        let told: Vec<_> =
            told.iter().map(|bytes| HostMessage::parse(bytes, negotiated).unwrap()).collect();
        let kinds: Vec<_> = told.iter().map(HostMessage::message_type).collect();
        let expected = [
            MessageType::VersionResponse,
            MessageType::OfferChannel,
            MessageType::OfferChannel,
            MessageType::AllOffersDelivered,
            MessageType::GpadlCreated,
            MessageType::OpenChannelResult,
        ];
        assert_eq!(kinds, expected, "seed {seed:#x}: {told:?}");
        let Some(HostMessage::OpenChannelResult(opened)) = told.last() else { unreachable!() };
        assert_eq!(opened.nt_status(), NtStatus::SUCCESS, "seed {seed:#x}");
    }
}

fn controller(partition: &Partition, driver: &Arc<ByHand>, number: u128) -> ScsiController {
    let config = ControllerConfig::new(Guid::from_u128(0x6b6d_636c << 96 | number));
    let bus = Arc::new(partition.bus().clone());
    let controller = ScsiController::new(bus, Arc::clone(driver) as _, config).unwrap();
    let medium = Arc::new(RamBackend::new(1 << 20).unwrap());
    let disk = Disk::new(medium, &DiskOptions::new("victim")).unwrap();
    controller.attach(ScsiAddress { path: 0, target: 0, lun: 0 }, disk).unwrap();
    controller.offer().unwrap();
    controller
}

#[test]
fn whatever_a_guest_does_the_host_goes_on() {
    const SEEDS: u64 = 8;
    const ACTIONS: u32 = 10_000;
    let mut opened = 0;
    for number in 1..=SEEDS {
        let seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let Some(mut guest) = Guest::new(seed) else { return };
        guest.become_proper();
        for action in 0..ACTIONS {
            guest.act();
            if action % 256 == 0 {
                guest.check(seed);
            }
        }
        guest.check(seed);
        guest.check_unnamed_pages(seed);
        guest.a_proper_guest_follows(seed);
        guest.check(seed);
        opened += guest.opened;
        for controller in guest.controllers.drain(..) {
            controller.close();
        }
    }
    println!("channels were open {opened} times");
    assert!(opened > 1000, "channels were open {opened} times: the guests were no danger");
}
