//! What can be asked of a VM, and what it answers: the bodies of `docs/api.yaml`.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET vm.info` | | [`Info`] |
//! | `GET vm.counters` | | [`Counters`] |
//! | `PUT vm.pause` | | |
//! | `PUT vm.resume` | | |
//! | `PUT vm.save` | [`SaveRequest`] | [`Saved`] |
//! | `PUT vm.shutdown` | [`ShutdownRequest`], or none | |
//! | `PUT vm.reboot` | [`ShutdownRequest`], or none | |
//! | `PUT vm.add-disk` | [`DiskConfig`] | [`DiskAddress`] |
//! | `PUT vm.remove-disk` | [`RemoveDiskRequest`] | |
//!
//! A request refuses fields that it does not know; an answer may grow fields, so whoever reads one must
//! pass over those.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::config::{DiskConfig, SynicMode, VmConfig};

/// A VM that can be controlled.
///
/// [`Controlled::info`] and [`Controlled::counters`] are called on one thread, one at a time; all others,
/// the changes, on another, one at a time and in the order in which they came. So a long change, a save,
/// holds back changes but no questions: those must not wait for it. A call whose asker has gone away goes
/// on; its answer is dropped. A panic in a call is answered with [`ErrorKind::Failed`].
pub trait Controlled: Send + Sync {
    /// How the VM is. Also answered while a change is under way.
    ///
    /// # Errors
    /// [`ControlError`].
    fn info(&self) -> Result<Info, ControlError>;

    /// What has been counted since the VM's start. Also answered while a change is under way.
    ///
    /// # Errors
    /// [`ControlError`].
    fn counters(&self) -> Result<Counters, ControlError>;

    /// Stops the processors; returns when they stand. A VM that is paused stays so: no error.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where there is nothing to pause.
    fn pause(&self) -> Result<(), ControlError>;

    /// Lets a paused VM go on. A VM that runs goes on doing so: no error.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where there is nothing to resume.
    fn resume(&self) -> Result<(), ControlError>;

    /// Saves the VM; returns when all of it is on the medium, or with the VM as it was before.
    ///
    /// # Errors
    /// [`ErrorKind::State`], [`ErrorKind::Invalid`] for a destination that is not an empty or new
    /// directory, [`ErrorKind::Failed`].
    fn save(&self, request: SaveRequest) -> Result<Saved, ControlError>;

    /// Asks the guest to power off; returns when it has said that it will.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the guest does not listen for such requests, [`ErrorKind::Timeout`] where
    /// it does not answer, [`ErrorKind::Failed`] where it refuses.
    fn shutdown(&self, request: ShutdownRequest) -> Result<(), ControlError>;

    /// Asks the guest to restart; returns when it has said that it will.
    ///
    /// # Errors
    /// As for [`Controlled::shutdown`].
    fn reboot(&self, request: ShutdownRequest) -> Result<(), ControlError>;

    /// Gives the guest a disk, and returns where it is.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], [`ErrorKind::State`] where its name or address is taken or there is no room,
    /// [`ErrorKind::Failed`] where the image cannot be opened.
    fn add_disk(&self, disk: DiskConfig) -> Result<DiskAddress, ControlError>;

    /// Takes a disk away from the guest, which is told at once. Its image is closed when the last request on it
    /// has ended.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    fn remove_disk(&self, request: RemoveDiskRequest) -> Result<(), ControlError>;
}

/// How a VM is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Info {
    /// What it does.
    pub state: State,
    /// The version of the program that runs it.
    pub version: String,
    /// The process that runs it.
    pub pid: u32,
    /// Since the program began to run it, in milliseconds; pauses count.
    pub uptime_ms: u64,
    /// Who provides Hyper-V's interfaces to this guest.
    pub mode: SynicMode,
    /// What it is made of now: disks that were added or removed are, or are not, in it.
    pub config: VmConfig,
    /// The version of the VMBus that the guest has chosen, such as `5.3`; none before it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmbus_version: Option<String>,
    /// Whether the guest answers.
    pub heartbeat: Heartbeat,
    /// The last crash that the guest has reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_crash: Option<Crash>,
    /// How far memory has come, while it is being saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// How far something has come.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Progress {
    /// Bytes of memory that are done.
    pub done_bytes: u64,
    /// Bytes of memory in all.
    pub total_bytes: u64,
}

/// What a VM does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs.
    Running,
    /// It was paused.
    Paused,
    /// It is being saved.
    Saving,
    /// Its guest has reported a crash, and runs on, perhaps to write a dump.
    Crashed,
    /// It has ended: powered off, saved, or failed.
    Ended,
}

/// Whether a guest answers, by the heartbeat service.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Heartbeat {
    /// In short.
    pub state: HeartbeatState,
    /// The version of the service that the guest has chosen, such as `3.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Beats sent.
    pub sent: u64,
    /// Beats answered.
    pub answered: u64,
    /// Beats in a row, up to now, without an answer.
    pub missed: u64,
}

/// See [`Heartbeat`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeartbeatState {
    /// The guest has not taken up the service.
    Absent,
    /// It answers.
    Alive,
    /// It did, or should, and does not.
    Silent,
}

/// A crash that a guest has reported through the crash MSRs.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Crash {
    /// What the guest left in the five of them. Their meaning is the guest's.
    pub parameters: [Hex; 5],
    /// The text that it pointed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// 64 bits, `"0x…"` in JSON, whose numbers many readers cut to 53.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
        digits
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom(format_args!("{text:?} is not 0x and hex digits")))
    }
}

/// What has been counted, in groups: `exits` (of the processors, by reason), `vp0`, `disk/<name>`,
/// `channel/<id>` and the like, each of named numbers. Groups and names may come and go between versions;
/// a count never falls while the VM runs; numbers of what there is at the moment do.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Counters(pub BTreeMap<String, BTreeMap<String, u64>>);

/// What is to be saved, and where.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// The directory that the saved VM becomes: new, or empty. An absolute path, unless whoever asks knows
    /// the directory that the VM's program runs in.
    pub destination: PathBuf,
    /// Whether memory is compressed.
    #[serde(default)]
    pub compression: Compression,
    /// Whether the VM runs on once it is saved. Otherwise it ends, and tells its guest nothing.
    #[serde(default)]
    pub keep_running: bool,
}

/// Whether memory is compressed. Pages of zeros take no room either way.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As it is: it can be mapped, and a restored VM runs before it is read.
    #[default]
    None,
    /// By zstd.
    Zstd,
}

/// What was saved, and how long it took.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Saved {
    /// From the request until processors and devices stood, in microseconds.
    pub freeze_us: u64,
    /// From then until the state of processors, bus and devices was saved, in microseconds; memory apart.
    pub saved_us: u64,
    /// How long memory took, in microseconds.
    pub memory_us: u64,
    /// Bytes of the state, memory apart.
    pub state_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes written for it.
    pub memory_written_bytes: u64,
    /// Requests of the guest that were in flight.
    pub in_flight: u64,
}

/// How a guest is to power off or restart.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// Whether programs in the guest may hold it up no longer than it takes to end them.
    #[serde(default)]
    pub force: bool,
}

/// Where a disk is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DiskAddress {
    /// Its name: the one asked for, or the one that it was given.
    pub id: String,
    /// The controller that it is behind, from 0.
    pub controller: u8,
    /// Its LUN.
    pub lun: u8,
}

/// Which disk is to go.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveDiskRequest {
    /// Its name.
    pub id: String,
}

/// Why a request was refused, or failed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// What kind of reason.
    pub kind: ErrorKind,
    /// One line for a person, with the numbers and names.
    pub message: String,
}

impl ControlError {
    /// An error.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// [`ErrorKind::Invalid`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::State`].
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::State, message)
    }

    /// [`ErrorKind::Timeout`].
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Timeout, message)
    }

    /// [`ErrorKind::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }
}

/// Kinds of reasons; each has an HTTP status of its own.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// 400: not HTTP, not JSON, or not what this request takes.
    Invalid,
    /// 403: whoever connected is neither this process's user nor root.
    Forbidden,
    /// 404: there is no such request, or nothing of that name.
    NotFound,
    /// 405: the request is made by another method.
    Method,
    /// 408: the request was not there in full in time.
    Slow,
    /// 409: the VM cannot do that as it is now.
    State,
    /// 411: a body without a length.
    Length,
    /// 413: the body is too long.
    TooLarge,
    /// 431: the request line and header are too long, or of too many fields.
    HeadTooLarge,
    /// 500: it was tried and did not succeed.
    Failed,
    /// 501: this VM or its host cannot do that at all.
    Unsupported,
    /// 503: too many connections, or the program is ending.
    Busy,
    /// 504: the guest did not answer in time.
    Timeout,
    /// 505: neither HTTP/1.1 nor HTTP/1.0.
    HttpVersion,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Invalid,
        Self::Forbidden,
        Self::NotFound,
        Self::Method,
        Self::Slow,
        Self::State,
        Self::Length,
        Self::TooLarge,
        Self::HeadTooLarge,
        Self::Failed,
        Self::Unsupported,
        Self::Busy,
        Self::Timeout,
        Self::HttpVersion,
    ];

    /// Its HTTP status, and what HTTP calls that.
    #[must_use]
    pub fn status(self) -> (u16, &'static str) {
        match self {
            Self::Invalid => (400, "Bad Request"),
            Self::Forbidden => (403, "Forbidden"),
            Self::NotFound => (404, "Not Found"),
            Self::Method => (405, "Method Not Allowed"),
            Self::Slow => (408, "Request Timeout"),
            Self::State => (409, "Conflict"),
            Self::Length => (411, "Length Required"),
            Self::TooLarge => (413, "Content Too Large"),
            Self::HeadTooLarge => (431, "Request Header Fields Too Large"),
            Self::Failed => (500, "Internal Server Error"),
            Self::Unsupported => (501, "Not Implemented"),
            Self::Busy => (503, "Service Unavailable"),
            Self::Timeout => (504, "Gateway Timeout"),
            Self::HttpVersion => (505, "HTTP Version Not Supported"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_64_bits_are_read_as_they_are_written() {
        for value in [0, 1, u64::MAX] {
            let text = serde_json::to_string(&Hex(value)).unwrap();
            assert_eq!(serde_json::from_str::<Hex>(&text).unwrap(), Hex(value), "{text}");
        }
        for bad in [r#""""#, r#""0x""#, r#""12""#, r#""0x+1""#, r#""0x10000000000000000""#, "5"] {
            assert!(serde_json::from_str::<Hex>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_may_be_left_out_has_its_default() {
        let request: SaveRequest = serde_json::from_str(r#"{"destination":"/x"}"#).unwrap();
        let expected = SaveRequest {
            destination: "/x".into(),
            compression: Compression::None,
            keep_running: false,
        };
        assert_eq!(request, expected);
        assert!(!serde_json::from_str::<ShutdownRequest>("{}").unwrap().force);
        for bad in ["{}", r#"{"destination":"/x","keep_runing":true}"#] {
            assert!(serde_json::from_str::<SaveRequest>(bad).is_err(), "{bad}");
        }
    }

    /// A client tells reasons apart by the status alone, too.
    #[test]
    fn each_kind_has_a_status_of_its_own() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in ErrorKind::ALL {
            assert!(seen.insert(kind.status().0), "{kind:?}");
        }
    }
}
