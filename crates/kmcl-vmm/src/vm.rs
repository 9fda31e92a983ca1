//! A VM: a machine with its devices, from its start to its end, through the resets of its guest.
//!
//! ```text
//!   Vm::start ──► run ─┬─► End                          VmHandle, on any thread:
//!                      │    ▲                             info, counters
//!                      └────┘ reset: a new machine        pause, resume, add_disk, remove_disk, …
//!                             with the same disks         save ──► ends the VM, or lets it go on
//! ```
//!
//! One lock is held for as long as a VM is changed; questions are answered without it.

mod counters;
mod crash;
mod error;
mod notices;
mod restore;
mod save;
pub(crate) mod saved;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use hyperv_kvm::Mode;
use vmbus_host::{Connection, HostBus};
use vmbus_memory::GuestMemory;
use vsp_integration::ShutdownKind;

use crate::boot::BootConfig;
use crate::config::{DiskConfig, OnReset, SynicMode, VmConfig};
use crate::control::{
    ControlError, Controlled, Counters, Crash, DiskAddress, Heartbeat, HeartbeatState, Info,
    Progress, RemoveDiskRequest, SaveRequest, Saved, ShutdownRequest, State,
};
use crate::devices::{Devices, Disks, Ticking};
use crate::event::{End, Events, MachineEvent};
use crate::machine::{Machine, MachineConfig, Running};
use crate::memory::MemoryProgress;
use crate::serial::ConsoleOutput;
use crate::workers::Workers;

use notices::Notices;

pub use error::VmError;
pub use restore::RestoreOptions;

/// What a VM has of its host.
pub struct VmHost {
    /// Where the guest's console goes.
    pub console: ConsoleOutput,
    /// Threads for the devices; without it, [`Workers::default_count`].
    pub workers: Option<u16>,
    /// Told what happens, on whatever thread it happens. It must not call the VM.
    pub observer: Observer,
}

/// See [`VmHost::observer`].
pub type Observer = Arc<dyn Fn(&Notice) + Send + Sync>;

/// What happens to a VM.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// It runs, with Hyper-V's interfaces provided like this.
    Running(Mode),
    /// Its guest has reset it, and it begins anew.
    Restarted,
    /// Its guest has crashed, and says why.
    Crashed(Crash),
    /// So many notices before this one were not given, because they came too fast.
    Untold(u64),
    /// Memory that was to be read while the guest runs cannot be read: the file is damaged, or gone. The
    /// guest waits for it for ever, so the process has to end now.
    MemoryLost(String),
}

/// How a VM has ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum VmEnd {
    /// The guest has powered it off.
    PowerOff,
    /// The guest has reset it, and that is its end.
    Reset,
    /// A processor has met a fault while it could handle none.
    TripleFault {
        /// Its index.
        vp: u32,
    },
    /// It was saved, to go on later.
    Saved,
    /// It was stopped from outside.
    Stopped,
    /// It cannot go on.
    Failed(VmError),
}

/// A VM that runs: see [`Vm::run`].
pub struct Vm {
    shared: Arc<Shared>,
    events: Events,
}

/// A VM, for whoever controls it. A clone is another handle to it.
#[derive(Clone)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

struct Shared {
    console: SharedConsole,
    notices: Notices,
    workers: Arc<Workers>,
    since: Instant,
    /// Held for as long as the VM is changed.
    core: Mutex<Core>,
    /// Held to look and to note, and for nothing that takes time. Taken last.
    status: Mutex<Status>,
}

/// What there is of a VM.
struct Core {
    config: VmConfig,
    disks: Disks,
    /// None once it has ended.
    live: Option<Live>,
}

/// What there is from a reset to the next one. Fields are dropped in this order: processors stand before
/// a device goes.
struct Live {
    running: Running,
    devices: Devices,
}

/// A guest, to look at.
struct Guest {
    bus: HostBus,
    memory: GuestMemory,
}

impl Guest {
    fn of(running: &Running) -> Self {
        Self { bus: running.partition().bus().clone(), memory: running.memory().clone() }
    }
}

/// What is told of a VM without holding it up.
struct Status {
    state: State,
    mode: SynicMode,
    /// As it is now, with disks that were added.
    config: VmConfig,
    /// None between two machines: whoever holds these holds the guest's memory, and a guest that is reset must
    /// not need it twice.
    guest: Option<Guest>,
    services: Weak<Ticking>,
    last_crash: Option<Crash>,
    counters: Counters,
    /// How far memory has come, while it is being saved.
    progress: Option<MemoryProgress>,
    /// Why it ends, once that was decided.
    end: Option<VmEnd>,
}

impl Vm {
    /// Opens the disks, makes the machine, loads the kernel, and has it run.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn start(config: VmConfig, host: VmHost) -> Result<Self, VmError> {
        let disks = Disks::open(&config.disks, config.controllers)?;
        let workers = Workers::start(host.workers.unwrap_or_else(Workers::default_count))?;
        let console = SharedConsole(Arc::new(Mutex::new(host.console)));
        let (live, events) = boot(&config, &disks, &workers, &console)?;
        let shared = Shared::new(config, disks, live, workers, console, host.observer);
        Ok(Self { shared: Arc::new(shared), events })
    }

    /// What controls it.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        VmHandle { shared: Arc::clone(&self.shared) }
    }

    /// Sees the VM through its guest's resets, to its end.
    pub fn run(mut self) -> VmEnd {
        let end = loop {
            match self.events.next() {
                Some(MachineEvent::Crash(report)) => self.shared.crashed(&report),
                Some(MachineEvent::Ended(end)) => match self.shared.ended(end) {
                    Ok(events) => self.events = events,
                    Err(end) => break end,
                },
                None => break VmEnd::Stopped,
            }
        };
        self.shared.finish();
        end
    }
}

/// Makes a machine with its devices, and starts it.
fn boot(
    config: &VmConfig,
    disks: &Disks,
    workers: &Arc<Workers>,
    console: &SharedConsole,
) -> Result<(Live, Events), VmError> {
    let machine = Machine::new(MachineConfig {
        boot: BootConfig {
            kernel: config.kernel.clone(),
            initrd: config.initrd.clone(),
            command_line: config.command_line.clone(),
        },
        memory_bytes: config.memory_bytes,
        huge_pages: config.huge_pages,
        processors: config.processors,
        mode: config.synic.map(Into::into),
        bus: vmbus_host::Config::default(),
        console: Box::new(console.clone()),
    })?;
    let (bus, partition) = (machine.bus().clone(), machine.partition().clone());
    let devices = Devices::offer(&bus, disks, config, workers, &partition)?;
    let (running, events) = machine.start()?;
    Ok((Live { running, devices }, events))
}

impl Shared {
    fn new(
        config: VmConfig,
        disks: Disks,
        live: Live,
        workers: Arc<Workers>,
        console: SharedConsole,
        observer: Observer,
    ) -> Self {
        let mode = live.running.partition().mode();
        let status = Status {
            state: State::Running,
            mode: mode.into(),
            config: config.clone(),
            guest: Some(Guest::of(&live.running)),
            services: Arc::downgrade(live.devices.services().ticking()),
            last_crash: None,
            counters: Counters::default(),
            progress: None,
            end: None,
        };
        let notices = Notices::new(observer);
        notices.tell(&Notice::Running(mode));
        let core = Mutex::new(Core { config, disks, live: Some(live) });
        let (since, status) = (Instant::now(), Mutex::new(status));
        let shared = Self { console, notices, workers, since, core, status };
        shared.note_disks(&shared.core());
        shared
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has reported a crash.
    fn crashed(&self, report: &hyperv_kvm::CrashReport) {
        let memory = self.status().guest.as_ref().map(|guest| guest.memory.clone());
        let crash = crash::told(report, memory.as_ref());
        {
            let mut status = self.status();
            if status.state == State::Running {
                status.state = State::Crashed;
            }
            status.last_crash = Some(crash.clone());
        }
        self.notices.tell_of_guest(&Notice::Crashed(crash));
    }

    /// The machine has ended: a new one, or the end of the VM.
    fn ended(&self, end: End) -> Result<Events, VmEnd> {
        let mut core = self.core();
        // Whoever has ended it on purpose has said why.
        let decided = self.status().end.take();
        let end = match (decided, end) {
            (Some(end), _) => end,
            (None, End::Reset) if core.config.on_reset == OnReset::Restart => {
                self.let_go(&mut core);
                return self.restart(&mut core).map_err(VmEnd::Failed);
            }
            (None, End::Reset) => VmEnd::Reset,
            (None, End::PowerOff) => VmEnd::PowerOff,
            (None, End::TripleFault { vp }) => VmEnd::TripleFault { vp },
            (None, End::Failed(error)) => VmEnd::Failed(error.into()),
            (None, End::Stopped) => VmEnd::Stopped,
        };
        self.let_go(&mut core);
        Err(end)
    }

    /// Nothing of the guest is left, its memory included.
    fn let_go(&self, core: &mut Core) {
        core.live = None;
        self.status().guest = None;
    }

    /// A new machine, with the disks that there are.
    fn restart(&self, core: &mut Core) -> Result<Events, VmError> {
        self.notices.tell_of_guest(&Notice::Restarted);
        let (live, events) = boot(&core.config, &core.disks, &self.workers, &self.console)?;
        {
            let mut status = self.status();
            status.state = State::Running;
            status.guest = Some(Guest::of(&live.running));
            status.services = Arc::downgrade(live.devices.services().ticking());
        }
        core.live = Some(live);
        Ok(events)
    }

    /// Nothing runs any more.
    fn finish(&self) {
        let mut core = self.core();
        self.let_go(&mut core);
        self.status().state = State::Ended;
    }

    /// Ends the VM, because of `end`. Its images are closed when this returns.
    fn end(&self, core: &mut Core, end: VmEnd) {
        self.status().end.get_or_insert(end);
        self.let_go(core);
        core.disks.clear();
        self.status().state = State::Ended;
    }

    /// Notes which disks there are.
    fn note_disks(&self, core: &Core) {
        self.status().config.disks = core.disks.iter().map(|disk| disk.config.clone()).collect();
    }
}

impl Core {
    fn live(&self) -> Result<&Live, VmError> {
        self.live.as_ref().ok_or(VmError::Ended)
    }
}

impl VmHandle {
    /// Stops the VM, as if its power had failed.
    pub fn stop(&self) {
        let mut core = self.shared.core();
        self.shared.end(&mut core, VmEnd::Stopped);
    }

    /// Types bytes to the guest's console; returns how many it took.
    #[must_use]
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let core = self.shared.core();
        core.live().map_or(bytes.len(), |live| live.running.type_in(bytes))
    }

    /// Asks the guest, and waits for its answer; others may change the VM meanwhile.
    fn ask_guest(&self, kind: ShutdownKind, request: ShutdownRequest) -> Result<(), VmError> {
        let services = Arc::clone(self.shared.core().live()?.devices.services().ticking());
        let force = request.force;
        services.shut_down(vsp_integration::ShutdownRequest { kind, force })
    }

    fn set_paused(&self, paused: bool) -> Result<(), VmError> {
        let core = self.shared.core();
        let Live { running, devices } = core.live()?;
        if paused {
            running.pause()?;
        } else {
            running.resume();
        }
        devices.services().set_standing(paused);
        self.shared.status().state = if paused { State::Paused } else { State::Running };
        Ok(())
    }
}

impl Controlled for VmHandle {
    fn info(&self) -> Result<Info, ControlError> {
        let status = self.shared.status();
        let version = status.guest.as_ref().and_then(|guest| {
            guest.bus.inspect(|host| match host.connection() {
                Connection::Connected(established) => Some(established.version),
                _ => None,
            })
        });
        Ok(Info {
            state: status.state,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.shared.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            mode: status.mode,
            config: status.config.clone(),
            vmbus_version: version.map(|version| version.to_string()),
            heartbeat: status.services.upgrade().map_or_else(no_heartbeat, |it| heartbeat(&it)),
            last_crash: status.last_crash.clone(),
            progress: status
                .progress
                .map(|it| Progress { done_bytes: it.done_bytes, total_bytes: it.total_bytes }),
        })
    }

    fn counters(&self) -> Result<Counters, ControlError> {
        // While the VM is changed, what was counted before.
        if let Ok(core) = self.shared.core.try_lock()
            && let Ok(live) = core.live()
        {
            let counters = counters::of(live, &core.disks);
            self.shared.status().counters = counters;
        }
        Ok(self.shared.status().counters.clone())
    }

    fn pause(&self) -> Result<(), ControlError> {
        Ok(self.set_paused(true)?)
    }

    fn resume(&self) -> Result<(), ControlError> {
        Ok(self.set_paused(false)?)
    }

    fn save(&self, request: SaveRequest) -> Result<Saved, ControlError> {
        Ok(self.shared.save(&request)?)
    }

    fn shutdown(&self, request: ShutdownRequest) -> Result<(), ControlError> {
        Ok(self.ask_guest(ShutdownKind::PowerOff, request)?)
    }

    fn reboot(&self, request: ShutdownRequest) -> Result<(), ControlError> {
        Ok(self.ask_guest(ShutdownKind::Reboot, request)?)
    }

    fn add_disk(&self, config: DiskConfig) -> Result<DiskAddress, ControlError> {
        let mut core = self.shared.core();
        let disk = core.disks.prepare(&config).map_err(VmError::from)?;
        core.live()?.devices.attach(&disk)?;
        let place = disk.place.clone();
        core.disks.add(disk);
        self.shared.note_disks(&core);
        Ok(DiskAddress { id: place.id, controller: place.controller, lun: place.lun })
    }

    fn remove_disk(&self, request: RemoveDiskRequest) -> Result<(), ControlError> {
        let mut core = self.shared.core();
        let place = core.disks.find(&request.id).map_err(VmError::from)?.place.clone();
        core.live()?.devices.detach(&place)?;
        core.disks.remove(&request.id);
        self.shared.note_disks(&core);
        Ok(())
    }
}

/// What the guest's heartbeat says of it.
fn heartbeat(services: &Ticking) -> Heartbeat {
    let status = services.heartbeat();
    let state = match status.versions {
        None => HeartbeatState::Absent,
        Some(_) if status.missed_in_a_row > 0 => HeartbeatState::Silent,
        Some(_) => HeartbeatState::Alive,
    };
    Heartbeat {
        state,
        version: status.versions.map(|versions| versions.message.to_string()),
        sent: status.sent,
        answered: status.answered,
        missed: status.missed_in_a_row,
    }
}

fn no_heartbeat() -> Heartbeat {
    let state = HeartbeatState::Absent;
    Heartbeat { state, version: None, sent: 0, answered: 0, missed: 0 }
}

/// One console, for one machine after another.
#[derive(Clone)]
struct SharedConsole(Arc<Mutex<ConsoleOutput>>);

impl Write for SharedConsole {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

impl From<SynicMode> for Mode {
    fn from(mode: SynicMode) -> Self {
        match mode {
            SynicMode::Kernel => Self::Kernel,
            SynicMode::User => Self::User,
        }
    }
}

impl From<Mode> for SynicMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Kernel => Self::Kernel,
            Mode::User => Self::User,
        }
    }
}
