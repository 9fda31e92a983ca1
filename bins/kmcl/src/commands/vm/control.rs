//! The commands that control a VM which runs in another process.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kmcl_vmm::control::client::{Client, Error};
use kmcl_vmm::control::{
    Compression, Counters, DiskAddress, ErrorKind, HeartbeatState, Info, RemoveDiskRequest,
    SaveRequest, Saved, ShutdownRequest, State,
};
use serde::Serialize;

use crate::cli::vm::{AddDisk, Controlled, Ctl, RemoveDisk, Save, Shutdown};
use crate::exit::{Exit, Failure, Result};
use crate::output::{Output, Report, Table};
use crate::progress::Length;
use crate::size::Size;

fn connect(vm: &Controlled) -> Result<Client> {
    Client::connect(&vm.control).map_err(failure)
}

fn failure(error: Error) -> Failure {
    match &error {
        Error::Connect { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Failure::peer(error, "give the --control of a VM that runs")
            }
            _ => Failure::peer(error, "a VM is controlled by the user who runs it, or by root"),
        },
        Error::Refused(refused) => {
            let exit = match refused.kind {
                ErrorKind::Invalid | ErrorKind::NotFound => Exit::Usage,
                ErrorKind::Failed | ErrorKind::Unsupported => Exit::System,
                _ => Exit::Peer,
            };
            Failure::new(exit, error, "")
        }
        Error::NoSuchRequest(_) => Failure::usage(error, "docs/api.yaml has them all"),
        _ => Failure::peer(error, ""),
    }
}

pub(super) fn pause(vm: &Controlled) -> Result<()> {
    connect(vm)?.pause().map_err(failure)
}

pub(super) fn resume(vm: &Controlled) -> Result<()> {
    connect(vm)?.resume().map_err(failure)
}

pub(super) fn shutdown(arguments: &Shutdown) -> Result<()> {
    let request = ShutdownRequest { force: arguments.force };
    connect(&arguments.vm)?.shutdown(&request).map_err(failure)
}

pub(super) fn reboot(arguments: &Shutdown) -> Result<()> {
    let request = ShutdownRequest { force: arguments.force };
    connect(&arguments.vm)?.reboot(&request).map_err(failure)
}

pub(super) fn info(vm: &Controlled, output: &Output) -> Result<()> {
    let info = connect(vm)?.info().map_err(failure)?;
    output.report(&InfoReport(info))
}

#[derive(Serialize)]
#[serde(transparent)]
struct InfoReport(Info);

impl Report for InfoReport {
    fn table(&self) -> Table {
        let info = &self.0;
        let state = match info.state {
            State::Running => "running",
            State::Paused => "paused",
            State::Saving => "being saved",
            State::Crashed => "its guest has crashed",
            State::Ended => "ended",
        };
        let heart = match info.heartbeat.state {
            HeartbeatState::Absent => "none: the guest has no such service",
            HeartbeatState::Alive => "the guest answers",
            HeartbeatState::Silent => "the guest does not answer",
        };
        let uptime = Duration::from_millis(info.uptime_ms).as_secs_f64();
        let table = Table::pairs()
            .pair("state", state)
            .pair("process", info.pid)
            .pair("up for", format_args!("{uptime:.1} s"))
            .pair("memory", Size(info.config.memory_bytes))
            .pair("processors", info.config.processors)
            .pair("VMBus", info.vmbus_version.as_deref().unwrap_or("not connected"))
            .pair("heartbeat", heart);
        let table = info.config.disks.iter().fold(table, |table, disk| {
            let id = disk.id.as_deref().unwrap_or("disk");
            let (controller, lun) = (disk.controller, disk.lun.unwrap_or(0));
            let mode = if disk.read_only { ", read-only" } else { "" };
            let place = format!("{} at {controller}.{lun}{mode}", disk.path.display());
            table.pair(&format!("disk {id}"), place)
        });
        match &info.last_crash {
            Some(crash) => {
                let numbers: Vec<_> = crash.parameters.iter().map(ToString::to_string).collect();
                table.pair("last crash", numbers.join(" "))
            }
            None => table,
        }
    }
}

pub(super) fn counters(vm: &Controlled, output: &Output) -> Result<()> {
    let counters = connect(vm)?.counters().map_err(failure)?;
    output.report(&CountersReport(counters))
}

#[derive(Serialize)]
#[serde(transparent)]
struct CountersReport(Counters);

impl Report for CountersReport {
    fn table(&self) -> Table {
        let groups = self.0.0.iter();
        let all = groups.flat_map(|(group, names)| names.iter().map(move |it| (group, it)));
        all.fold(Table::pairs(), |table, (group, (name, value))| {
            table.pair(&format!("{group} {name}"), value)
        })
    }
}

pub(super) fn save(arguments: &Save, output: &Output) -> Result<()> {
    let mut vm = connect(&arguments.vm)?;
    let compression = if arguments.zstd { Compression::Zstd } else { Compression::None };
    let destination = absolute(&arguments.to)?;
    let keep_running = arguments.keep_running;
    let request = SaveRequest { destination, compression, keep_running };
    let saved = with_progress(&arguments.vm, output, || vm.save(&request))?;
    let bar = output.progress("closing", Length::Unknown);
    if !keep_running {
        // Its images and its sockets are free once it has ended.
        vm.wait_for_end().map_err(failure)?;
    }
    drop(bar);
    output.report(&SavedReport { directory: &arguments.to, went_on: keep_running, saved })
}

/// How often a VM is asked how far it has come.
const GLANCE: Duration = Duration::from_millis(250);

/// Makes the request, and meanwhile shows how far the VM has come, by asking it on another connection.
fn with_progress(
    vm: &Controlled,
    output: &Output,
    save: impl FnOnce() -> Result<Saved, Error>,
) -> Result<Saved> {
    let (done, watching) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let Ok(mut asked) = Client::connect(&vm.control) else { return };
            let mut bar = None;
            let mut shown = 0;
            while watching.recv_timeout(GLANCE) == Err(RecvTimeoutError::Timeout) {
                let Ok(info) = asked.info() else { return };
                let Some(progress) = info.progress else { continue };
                let length = Length::Bytes(progress.total_bytes);
                let bar = bar.get_or_insert_with(|| output.progress("saving memory", length));
                bar.advance(progress.done_bytes.saturating_sub(shown));
                shown = progress.done_bytes;
            }
        });
        let saved = save();
        drop(done);
        saved.map_err(failure)
    })
}

#[derive(Serialize)]
struct SavedReport<'a> {
    directory: &'a Path,
    /// The VM is still there.
    went_on: bool,
    #[serde(flatten)]
    saved: Saved,
}

impl Report for SavedReport<'_> {
    fn table(&self) -> Table {
        let ms = |micros| format!("{:.1} ms", Duration::from_micros(micros).as_secs_f64() * 1e3);
        let Saved { freeze_us, saved_us, memory_us, .. } = self.saved;
        let memory = format!(
            "{}, {} of them written",
            Size(self.saved.memory_bytes),
            Size(self.saved.memory_written_bytes)
        );
        Table::pairs()
            .pair("saved to", self.directory.display())
            .pair("requests in flight", self.saved.in_flight)
            .pair("until everything stood", ms(freeze_us))
            .pair(
                "state, without memory",
                format_args!("{} in {}", Size(self.saved.state_bytes), ms(saved_us)),
            )
            .pair("memory", format_args!("{memory} in {}", ms(memory_us)))
            .pair("the VM", if self.went_on { "goes on" } else { "has ended" })
    }
}

pub(super) fn add_disk(arguments: &AddDisk, output: &Output) -> Result<()> {
    let mut disk = arguments.disk.clone();
    disk.path = absolute(&disk.path)?;
    let address = connect(&arguments.vm)?.add_disk(&disk).map_err(failure)?;
    output.report(&AddressReport(address))
}

#[derive(Serialize)]
#[serde(transparent)]
struct AddressReport(DiskAddress);

impl Report for AddressReport {
    fn table(&self) -> Table {
        let DiskAddress { id, controller, lun } = &self.0;
        Table::pairs().pair("disk", id).pair("controller", controller).pair("LUN", lun)
    }
}

pub(super) fn remove_disk(arguments: &RemoveDisk) -> Result<()> {
    let request = RemoveDiskRequest { id: arguments.id.clone() };
    connect(&arguments.vm)?.remove_disk(&request).map_err(failure)
}

pub(super) fn ctl(arguments: &Ctl, output: &Output) -> Result<()> {
    let body = arguments.body.as_deref().unwrap_or_default();
    let answer = connect(&arguments.vm)?.request(&arguments.request, body.as_bytes());
    let answer = answer.map_err(failure)?;
    if answer.is_empty() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&answer);
    output.step(text.trim_end())
}

/// The path as the VM's process understands it, too.
fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).map_err(|error| {
        Failure::system(format_args!("cannot tell where {} is: {error}", path.display()), "")
    })
}
