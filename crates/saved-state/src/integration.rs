//! Records of a guest's integration services, written by `vsp-integration`: how far each has come to
//! terms with its guest, and what it has asked that was not answered.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`IntegrationServiceRecord`].
pub const INTEGRATION_SERVICE: RecordKind = RecordKind(336);
/// The kind of [`HeartbeatRecord`].
pub const HEARTBEAT: RecordKind = RecordKind(337);
/// The kind of [`ShutdownRequestRecord`].
pub const SHUTDOWN_REQUEST: RecordKind = RecordKind(338);

/// The kinds of the services' stream.
pub const KINDS: Kinds =
    &[IntegrationServiceRecord::KIND, HeartbeatRecord::KIND, ShutdownRequestRecord::KIND];

/// Which service it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum SavedService {
    /// Not said; never written.
    Unspecified = 0,
    /// Whether the guest is alive.
    Heartbeat = 1,
    /// Powers off, reboots, hibernates.
    Shutdown = 2,
    /// Tells the time.
    TimeSync = 3,
}

const SERVICES: [&str; 4] = ["unspecified", "heartbeat", "shutdown", "time_sync"];

/// How far a service and its guest have come to terms.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum NegotiationStep {
    /// Not said; never written.
    Unspecified = 0,
    /// The guest has not opened the channel.
    Closed = 1,
    /// Versions were offered, and none was chosen yet.
    Offered = 2,
    /// Versions are agreed on.
    Agreed = 3,
    /// The guest wants none of those that were offered.
    Refused = 4,
}

const STEPS: [&str; 5] = ["unspecified", "closed", "offered", "agreed", "refused"];

/// What a guest is asked to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum SavedShutdown {
    /// Not said; never written.
    Unspecified = 0,
    /// To power off.
    PowerOff = 1,
    /// To start anew.
    Reboot = 2,
    /// To write its memory to its disk, and power off.
    Hibernate = 3,
}

const SHUTDOWNS: [&str; 4] = ["unspecified", "power_off", "reboot", "hibernate"];

/// A service: what it and the guest agreed on. Each of the three once, in the order of their numbers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct IntegrationServiceRecord {
    /// Which one.
    #[prost(enumeration = "SavedService", tag = "1")]
    pub service: i32,
    /// How far it has come.
    #[prost(enumeration = "NegotiationStep", tag = "2")]
    pub step: i32,
    /// The framework version that was agreed on: major in the upper 16 bits, minor in the lower; 0
    /// before.
    #[prost(uint32, tag = "3")]
    pub framework_version: u32,
    /// The same of the service's own messages.
    #[prost(uint32, tag = "4")]
    pub message_version: u32,
    /// Number of the last request, as on the wire.
    #[prost(uint32, tag = "5")]
    pub transaction_id: u32,
    /// That request was not answered. Not said of an offer of versions, of which the step says it.
    #[prost(bool, tag = "6")]
    pub unanswered: bool,
}

impl Record for IntegrationServiceRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: INTEGRATION_SERVICE,
        name: "integration.service",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "service", Shape::Enum(&SERVICES)).required(),
            Field::new(2, "step", Shape::Enum(&STEPS)).required(),
            Field::new(3, "framework_version", Shape::Uint32),
            Field::new(4, "message_version", Shape::Uint32),
            Field::new(5, "transaction_id", Shape::Uint32),
            Field::new(6, "unanswered", Shape::Bool),
        ],
        check: record::check::<Self>,
    };
}

/// What is known of a guest's life. Once, after the services.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HeartbeatRecord {
    /// The number in the last heartbeat.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// Heartbeats that were sent.
    #[prost(uint64, tag = "2")]
    pub sent: u64,
    /// Those that were answered.
    #[prost(uint64, tag = "3")]
    pub answered: u64,
    /// Times when one was due and the one before had no answer.
    #[prost(uint64, tag = "4")]
    pub missed: u64,
    /// The same since the last answer.
    #[prost(uint64, tag = "5")]
    pub missed_in_a_row: u64,
    /// How the guest said its applications are, as on the wire.
    #[prost(uint32, tag = "6")]
    pub application_state: u32,
}

impl Record for HeartbeatRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: HEARTBEAT,
        name: "integration.heartbeat",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "sequence", Shape::Uint64),
            Field::new(2, "sent", Shape::Uint64),
            Field::new(3, "answered", Shape::Uint64),
            Field::new(4, "missed", Shape::Uint64),
            Field::new(5, "missed_in_a_row", Shape::Uint64),
            Field::new(6, "application_state", Shape::Uint32),
        ],
        check: record::check::<Self>,
    };
}

/// A shutdown that was asked for and not answered. Once, last, where there is one.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ShutdownRequestRecord {
    /// What the guest is to do.
    #[prost(enumeration = "SavedShutdown", tag = "1")]
    pub kind: i32,
    /// Applications that object are not heard.
    #[prost(bool, tag = "2")]
    pub forced: bool,
}

impl Record for ShutdownRequestRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: SHUTDOWN_REQUEST,
        name: "integration.shutdown",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "kind", Shape::Enum(&SHUTDOWNS)).required(),
            Field::new(2, "forced", Shape::Bool),
        ],
        check: record::check::<Self>,
    };
}
