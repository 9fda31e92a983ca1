//! Boots a kernel with a disk behind a VMBus storage controller:
//! `boot KERNEL INITRD COMMAND_LINE [DISK [PROCESSORS [kernel|user]]]`.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use hyperv_kvm::Partition;
use kmcl::{Channel, Guid};
use kmcl_vmm::{BootConfig, End, Machine, MachineConfig, MachineEvent, Mode};
use kmcl_worker::{Source, Worker};
use vsp_storage::block::{CacheMode, Engine, FileOptions, open_file};
use vsp_storage::{
    Completions, ControllerConfig, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const CONTROLLER: Guid = Guid::from_u128(0x6b6d_636c_0000_4000_8000_0000_0000_0001);

/// One thread for everything that is not a processor.
struct Everything(Worker);

struct DiskIo(Arc<Completions>);
impl Source for DiskIo {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

struct Messages(Partition);
impl Source for Messages {
    fn ready(&self) -> bool {
        self.0.messages_taken();
        false
    }
}

impl Driver for Everything {
    fn add_channel(&self, channel: &Channel) -> Result<()> {
        Ok(self.0.add(channel)?)
    }
    fn remove_channel(&self, channel: &Channel) {
        self.0.remove(channel);
    }
    fn add_completions(&self, one: Arc<Completions>) -> Result<()> {
        self.0.add_source(Arc::clone(&one), Arc::new(DiskIo(one)))?;
        Ok(())
    }
    fn remove_completions(&self, _: &Arc<Completions>) {}
}

fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next();
    let Some(kernel) = next().map(PathBuf::from) else {
        println!("boot KERNEL INITRD COMMAND_LINE [DISK [PROCESSORS [kernel|user]]]");
        return Ok(());
    };
    let initrd = PathBuf::from(next().ok_or("no initrd")?);
    let command_line = next().ok_or("no command line")?;
    let disk = next();
    let processors = next().map_or(Ok(1), |count| count.parse())?;
    let mode = match next().as_deref() {
        Some("kernel") => Some(Mode::Kernel),
        Some("user") => Some(Mode::User),
        _ => None,
    };
    let machine = Machine::new(MachineConfig {
        boot: BootConfig { kernel, initrd: Some(initrd), command_line },
        memory_bytes: 512 << 20,
        huge_pages: false,
        processors,
        mode,
        bus: vmbus_host::Config::default(),
        console: Box::new(std::io::stdout()),
    })?;
    eprintln!("mode {}", machine.mode());
    let driver = Arc::new(Everything(Worker::spawn("devices")?));
    let bus = Arc::new(machine.bus().clone());
    let config = ControllerConfig::new(CONTROLLER);
    let controller = ScsiController::new(bus, Arc::clone(&driver) as _, config)?;
    if let Some(path) = &disk {
        let options = FileOptions {
            read_only: false,
            cache: CacheMode::Buffered,
            engine: Engine::Threads(2),
            sector_bytes: 512,
        };
        let back_end = open_file(path.as_ref(), &options)?;
        let disk = Disk::new(back_end, &DiskOptions::new("disk0"))?;
        controller.attach(ScsiAddress { path: 0, target: 0, lun: 0 }, disk)?;
    }
    controller.offer()?;
    let (running, mut events) = machine.start()?;
    let partition = running.partition().clone();
    driver.0.add_source(partition.clone(), Arc::new(Messages(partition)))?;
    let end = loop {
        match events.next() {
            Some(MachineEvent::Ended(end)) => break end,
            Some(event) => eprintln!("{event:?}"),
            None => break End::Stopped,
        }
    };
    eprintln!("END {end:?}");
    drop(running);
    Ok(())
}
