//! A saved VM goes on.
//!
//! The order, which [`RestoringMachine`](crate::RestoringMachine) enforces for what is the machine's: memory,
//! clocks, SynICs, processors, channels; then everything runs. Nothing of the guest has run before all of it is
//! there.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use saved_state::StreamKind;

use super::error::VmError;
use super::saved::{State, read_config};
use super::{Live, Notice, Shared, SharedConsole, Vm, VmHost};
use crate::config::{OnReset, SynicMode, VmConfig};
use crate::devices::{Disks, RestoringDevices};
use crate::error::Error;
use crate::machine::{Machine, RestoreConfig};
use crate::memory::{Load, MemoryIndex, MemoryProgress, Ram};
use crate::workers::Workers;

/// Which saved VM goes on, and what is different from when it was saved.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// The directory that it was saved to.
    pub from: PathBuf,
    /// Images that are elsewhere now, by the names of their disks.
    pub disks: Vec<(String, PathBuf)>,
    /// Where its sockets are now, if not where they were.
    pub sockets: Option<PathBuf>,
    /// Who provides Hyper-V's interfaces, if not who did.
    pub synic: Option<SynicMode>,
    /// What a reset of the guest does, if not what it did.
    pub on_reset: Option<OnReset>,
    /// Whether the guest goes on before its memory is read.
    pub lazy: bool,
}

impl RestoreOptions {
    /// What the VM will be made of, as far as the directory says so: for whoever wants to see beforehand
    /// what it will open.
    ///
    /// # Errors
    /// [`VmError::File`], [`VmError::Unrestorable`].
    pub fn config(&self) -> Result<VmConfig, VmError> {
        let mut config = read_config(&self.from)?.config;
        self.apply(&mut config);
        Ok(config)
    }

    /// The configuration, with what is different: each thing that cannot be is a line.
    fn apply(&self, config: &mut VmConfig) -> Vec<String> {
        let mut wrong = Vec::new();
        for (id, path) in &self.disks {
            let named = |disk: &&mut crate::config::DiskConfig| disk.id.as_ref() == Some(id);
            match config.disks.iter_mut().find(named) {
                Some(disk) => disk.path.clone_from(path),
                None => wrong.push(format!("disk {id}: the saved VM has none of this name")),
            }
        }
        config.sockets = self.sockets.clone().or(config.sockets.take());
        config.synic = self.synic.or(config.synic);
        config.on_reset = self.on_reset.unwrap_or(config.on_reset);
        wrong
    }
}

impl Vm {
    /// Has a saved VM go on. `progress` is told how far its memory has come.
    ///
    /// # Errors
    /// [`VmError`]: what is wrong with the saved VM, or in which way this host is not what it needs. The
    /// saved VM is as good as it was, and none of it has run.
    pub fn restore(
        options: &RestoreOptions,
        host: VmHost,
        progress: &mut dyn FnMut(MemoryProgress),
    ) -> Result<Self, VmError> {
        let mut config = read_config(&options.from)?.config;
        let had_sockets = config.sockets.is_some();
        let mut differences = options.apply(&mut config);
        let mut state = State::open(&options.from)?;
        let machine = state.bytes(StreamKind::MACHINE)?;
        let index = state.bytes(StreamKind::MEMORY)?;
        let index = MemoryIndex::read(&index[..]).map_err(|error| state.wrong(error))?;
        let bus = state.bytes(StreamKind::BUS)?;

        // What is missing or different is told together, before anything takes long.
        let disks = Disks::open_all(&config.disks, config.controllers, &mut differences)?;
        let (said, saved) = (config.memory_bytes, index.memory_bytes());
        if said != saved {
            differences
                .push(format!("config.json says {said} bytes of memory, {saved} were saved"));
        }
        if !differences.is_empty() {
            return Err(VmError::Differences(differences));
        }
        let load = if options.lazy { lazily(&host) } else { Load::Eager };
        let memory = options.from.join("memory");
        let ram = Ram::restore(&memory, &index, load, config.huge_pages, progress)?;

        let workers = Workers::start(host.workers.unwrap_or_else(Workers::default_count))?;
        let console = SharedConsole(Arc::new(Mutex::new(host.console)));
        let mode = config.synic.map(Into::into);
        let restore = RestoreConfig { ram, mode, console: Box::new(console.clone()) };
        let restoring =
            Machine::restoring(restore, &machine[..], &bus).map_err(|error| match error {
                Error::Differences(lines) => VmError::Differences(lines),
                error => error.into(),
            })?;
        let sockets = (had_sockets, config.sockets.as_deref());
        let devices =
            RestoringDevices::new(restoring.bus(), &disks, sockets, &workers, &mut state)?;
        state.end()?;
        let machine = restoring.finish()?;
        let devices = devices.start(machine.partition())?;
        let (running, events) = machine.start()?;
        let live = Live { running, devices };
        let shared = Shared::new(config, disks, live, workers, console, host.observer);
        Ok(Self { shared: Arc::new(shared), events })
    }
}

/// Memory that is found to be damaged only when the guest needs it is told to the observer.
fn lazily(host: &VmHost) -> Load {
    let observer = Arc::clone(&host.observer);
    Load::Lazy { failed: Box::new(move |error| observer(&Notice::MemoryLost(error.to_string()))) }
}
