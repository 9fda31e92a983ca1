//! A VM that only takes notes.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use kmcl_vmm::config::{DiskConfig, SynicMode};
use kmcl_vmm::control::{
    ControlError, Controlled, Counters, Crash, DiskAddress, Heartbeat, HeartbeatState, Hex, Info,
    Progress, RemoveDiskRequest, SaveRequest, Saved, ShutdownRequest, State,
};

#[derive(Default)]
struct Noted {
    notes: Vec<String>,
    error: Option<ControlError>,
    saves_held: bool,
    saving: bool,
    panics: bool,
}

pub(crate) struct NotedVm {
    noted: Mutex<Noted>,
    changed: Arc<Condvar>,
}

/// While this is there, no save ends.
pub(crate) struct Gate(Arc<NotedVm>);

impl NotedVm {
    pub(crate) fn new() -> Self {
        Self { noted: Mutex::default(), changed: Arc::default() }
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap()
    }

    fn note(&self, what: impl Into<String>) -> Result<(), ControlError> {
        let mut noted = self.noted();
        noted.notes.push(what.into());
        self.changed.notify_all();
        noted.error.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        self.noted().notes.clone()
    }

    pub(crate) fn wait_for(&self, seen: impl Fn(&[String]) -> bool) {
        let noted = self.noted();
        drop(self.changed.wait_while(noted, |noted| !seen(&noted.notes)).unwrap());
    }

    pub(crate) fn fail_with(&self, error: Option<ControlError>) {
        self.noted().error = error;
    }

    pub(crate) fn panic_on_pause(&self) {
        self.noted().panics = true;
    }

    pub(crate) fn hold_saves(self: &Arc<Self>) -> Gate {
        self.noted().saves_held = true;
        Gate(Arc::clone(self))
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.noted().saves_held = false;
        self.0.changed.notify_all();
    }
}

impl Controlled for NotedVm {
    fn info(&self) -> Result<Info, ControlError> {
        self.note("info")?;
        let config = r#"{
            "kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "memory_bytes": 536870912,
            "processors": 2, "synic": "user", "sockets": "/run/vm",
            "disks": [{"id": "root", "path": "/srv/root.img", "lun": 0}]
        }"#;
        let crash =
            Crash { parameters: [0, 1, 2, 3, u64::MAX].map(Hex), message: Some("!".into()) };
        Ok(Info {
            state: if self.noted().saving { State::Saving } else { State::Running },
            version: "0.1.0".into(),
            pid: std::process::id(),
            uptime_ms: 1234,
            mode: SynicMode::Kernel,
            config: serde_json::from_str(config).unwrap(),
            vmbus_version: Some("5.3".into()),
            heartbeat: Heartbeat {
                state: HeartbeatState::Alive,
                version: Some("3.0".into()),
                sent: 3,
                answered: 3,
                missed: 0,
            },
            last_crash: Some(crash),
            progress: Some(Progress { done_bytes: 1 << 20, total_bytes: 64 << 20 }),
        })
    }

    fn counters(&self) -> Result<Counters, ControlError> {
        self.note("counters")?;
        let exits = BTreeMap::from([("hlt".into(), 7), ("io".into(), u64::MAX)]);
        Ok(Counters(BTreeMap::from([("exits".into(), exits)])))
    }

    fn pause(&self) -> Result<(), ControlError> {
        assert!(!self.noted().panics, "a defect");
        self.note("pause")
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.note("resume")
    }

    fn save(&self, request: SaveRequest) -> Result<Saved, ControlError> {
        self.noted().saving = true;
        self.note(format!("{request:?}"))?;
        let noted = self.changed.wait_while(self.noted(), |noted| noted.saves_held).unwrap();
        drop(noted);
        self.noted().saving = false;
        self.note("saved")?;
        Ok(Saved { memory_bytes: 1 << 30, ..Saved::default() })
    }

    fn shutdown(&self, request: ShutdownRequest) -> Result<(), ControlError> {
        self.note(format!("shutdown force={}", request.force))
    }

    fn reboot(&self, request: ShutdownRequest) -> Result<(), ControlError> {
        self.note(format!("reboot force={}", request.force))
    }

    fn add_disk(&self, disk: DiskConfig) -> Result<DiskAddress, ControlError> {
        self.note(format!("{disk:?}"))?;
        let id = disk.id.unwrap_or_else(|| "disk0".into());
        Ok(DiskAddress { id, controller: disk.controller, lun: 3 })
    }

    fn remove_disk(&self, request: RemoveDiskRequest) -> Result<(), ControlError> {
        self.note(format!("remove {}", request.id))
    }
}
