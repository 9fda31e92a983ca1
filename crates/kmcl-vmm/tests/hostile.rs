//! A hostile guest on a machine of ours: assembled code that runs, where KVM can run it. Whatever it does,
//! its machine can be stopped, thrown away, and followed by another one in the same process.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

#[path = "hostile/conversation.rs"]
mod conversation;
#[path = "hostile/guest.rs"]
mod guest;

use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyperv_kvm::Partition;
use kmcl::Guid;
use kmcl_vmm::{BootConfig, End, Error, Machine, MachineConfig, MachineEvent, Mode, Workers};
use kmcl_worker::Source;
use vsp_storage::block::RamBackend;
use vsp_storage::{ControllerConfig, Disk, DiskOptions, ScsiAddress, ScsiController};

/// How much each guest does before it resets.
const ACTIONS: u32 = 1 << 16;
/// How long hostile guests follow each other.
const FOR: Duration = Duration::from_secs(5);
/// How long one may take: it can lock itself up, but not us.
const AT_MOST: Duration = Duration::from_secs(20);

/// What the guest prints.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut all = self.0.lock().unwrap();
        assert!(all.len() < 1 << 20, "a MiB of output");
        all.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Messages(Partition);

impl Source for Messages {
    fn ready(&self) -> bool {
        self.0.messages_taken();
        false
    }
}

fn code(seed: u64) -> Vec<u8> {
    let messages = conversation::messages(guest::ring_pages()).unwrap();
    let first_connection = conversation::FIRST_CONNECTION;
    let plan = guest::Plan { seed, actions: ACTIONS, messages: &messages, first_connection };
    guest::assemble(&plan).unwrap()
}

fn machine(seed: u64, mode: Mode, printed: &Printed) -> Result<Machine, Error> {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("hostile");
    std::fs::write(&kernel, guest::elf(&code(seed))).unwrap();
    Machine::new(MachineConfig {
        boot: BootConfig { kernel, initrd: None, command_line: String::new() },
        memory_bytes: 64 << 20,
        huge_pages: false,
        processors: 1,
        mode: Some(mode),
        bus: vmbus_host::Config::default(),
        console: Box::new(printed.clone()),
    })
}

/// Two controllers with a disk each: channels for the guest to misuse.
fn controllers(machine: &Machine, workers: &Arc<Workers>) -> Vec<ScsiController> {
    let bus = Arc::new(machine.bus().clone());
    let controller = |number: u128| {
        let config = ControllerConfig::new(Guid::from_u128(0x6b6d_636c << 96 | number));
        let driver = Arc::clone(workers) as _;
        let controller = ScsiController::new(Arc::clone(&bus) as _, driver, config).unwrap();
        let medium = Arc::new(RamBackend::new(1 << 20).unwrap());
        let disk = Disk::new(medium, &DiskOptions::new("victim"));
        controller.attach(ScsiAddress { path: 0, target: 0, lun: 0 }, disk.unwrap()).unwrap();
        controller.offer().unwrap();
        controller
    };
    (1..=2).map(controller).collect()
}

/// How a hostile guest has ended; `None`: it was stopped, being busy with itself.
fn run(machine: Machine) -> Option<End> {
    let workers = Workers::start(1).unwrap();
    let controllers = controllers(&machine, &workers);
    let (running, mut events) = machine.start().unwrap();
    let partition = running.partition().clone();
    let messages = workers.add_source(partition.clone(), Arc::new(Messages(partition))).unwrap();
    let (ended, end) = channel();
    let listener = std::thread::spawn(move || {
        while let Some(event) = events.next() {
            if let MachineEvent::Ended(end) = event {
                ended.send(end).unwrap();
            }
        }
    });
    let end = match end.recv_timeout(AT_MOST) {
        Ok(end) => Some(end),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => panic!("it ended without a word"),
    };
    let violations = running.partition().bus().inspect(|host| host.violations());
    assert_eq!(violations, Vec::<String>::new());
    drop(running);
    listener.join().unwrap();
    for controller in controllers {
        controller.close();
    }
    workers.remove_source(messages);
    end
}

fn hostile_guests(mode: Mode) {
    let begun = Instant::now();
    let mut ends: std::collections::BTreeMap<String, u32> = Default::default();
    let mut seed = 0x5eed_0000_0000_0001_u64;
    let mut dots = 0;
    while begun.elapsed() < FOR {
        let printed = Printed::default();
        let machine = match machine(seed, mode, &printed) {
            Ok(machine) => machine,
            Err(error @ (Error::NoKvm(_) | Error::HyperV(_))) => {
                return println!("not run in mode {mode}: {error}");
            }
            Err(error) => panic!("{error}"),
        };
        let end = run(machine);
        if let Some(End::Failed(Error::Exit { exit, .. })) = &end
            && exit.contains("InternalError")
            && printed.0.lock().unwrap().is_empty()
        {
            return println!("not run in mode {mode}: this KVM cannot run its code: {exit}");
        }
        // Code that it has overwritten itself may be what KVM cannot run: its own end, not ours.
        *ends.entry(format!("{end:?}")).or_default() += 1;
        dots += printed.0.lock().unwrap().iter().filter(|byte| **byte == b'.').count();
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f) | 1;
    }
    println!("mode {mode}: {ends:?}, about {} actions", dots << 12);
    assert!(dots > 0, "none of them has come far enough to say so");
}

#[test]
fn guests_that_mean_harm_harm_themselves_alone_user() {
    hostile_guests(Mode::User);
}

#[test]
fn guests_that_mean_harm_harm_themselves_alone_kernel() {
    hostile_guests(Mode::Kernel);
}

/// The code is what it is meant to be: it fits where it is loaded, and the same seed gives the same code.
#[test]
fn the_guest_fits() {
    assert_eq!(code(5), code(5));
    assert_ne!(code(5), code(7));
    assert!(code(5).len() < 0x4_0000, "{} bytes reach its stack", code(5).len());
}
