//! The protocol's state as records, there and back. A saved state is not trusted: what this machine
//! cannot be is refused by field.

use saved_state::integration::{
    HeartbeatRecord, IntegrationServiceRecord, NegotiationStep, SavedService, SavedShutdown,
    ShutdownRequestRecord,
};

use super::heartbeat::{ApplicationState, Heartbeat, HeartbeatStatus};
use super::shutdown::{Shutdown, ShutdownKind, ShutdownRequest};
use super::time_sync::TimeSync;
use super::{Dialogue, Phase, Protocol, Versions};
use crate::wire::{Service, Version};

/// Why a record is not one of this device.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A number that cannot be.
    #[error("{field} is {found:#x}, possible are {least:#x} to {most:#x}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is there.
        found: u64,
        /// Least that may be.
        least: u64,
        /// Most that may be.
        most: u64,
    },
    /// Versions that were never offered.
    #[error("{service}: version {versions} is not known here")]
    Version {
        /// Which service.
        service: Service,
        /// What is there.
        versions: Versions,
    },
    /// It comes before what it is about, or twice.
    #[error("out of order")]
    Order,
}

/// All of the state.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) services: [IntegrationServiceRecord; 3],
    pub(crate) heartbeat: HeartbeatRecord,
    pub(crate) shutdown: Option<ShutdownRequestRecord>,
}

fn saved_service(service: Service) -> SavedService {
    match service {
        Service::Heartbeat => SavedService::Heartbeat,
        Service::Shutdown => SavedService::Shutdown,
        Service::TimeSync => SavedService::TimeSync,
    }
}

fn saved_kind(kind: ShutdownKind) -> SavedShutdown {
    match kind {
        ShutdownKind::PowerOff => SavedShutdown::PowerOff,
        ShutdownKind::Reboot => SavedShutdown::Reboot,
        ShutdownKind::Hibernate => SavedShutdown::Hibernate,
    }
}

impl Protocol {
    pub(crate) fn records(&self) -> Records {
        let Self { heartbeat, shutdown, time_sync: _ } = self;
        let HeartbeatStatus { versions: _, sent, answered, missed, missed_in_a_row, applications } =
            heartbeat.status;
        Records {
            services: Service::ALL.map(|service| self.dialogue(service).record()),
            heartbeat: HeartbeatRecord {
                sequence: heartbeat.sequence,
                sent,
                answered,
                missed,
                missed_in_a_row,
                application_state: applications.raw(),
            },
            shutdown: shutdown.asked.map(|ShutdownRequest { kind, force }| ShutdownRequestRecord {
                kind: saved_kind(kind).into(),
                forced: force,
            }),
        }
    }
}

impl Dialogue {
    fn record(&self) -> IntegrationServiceRecord {
        let Self { service, phase, is_open: _, transaction_id, is_unanswered } = *self;
        let (step, framework, message) = match phase {
            Phase::Closed => (NegotiationStep::Closed, 0, 0),
            Phase::Offered => (NegotiationStep::Offered, 0, 0),
            Phase::Refused => (NegotiationStep::Refused, 0, 0),
            Phase::Agreed(Versions { framework, message }) => {
                (NegotiationStep::Agreed, framework.to_u32(), message.to_u32())
            }
        };
        IntegrationServiceRecord {
            service: saved_service(service).into(),
            step: step.into(),
            framework_version: framework,
            message_version: message,
            transaction_id: transaction_id.into(),
            unanswered: is_unanswered,
        }
    }

    fn restored(record: &IntegrationServiceRecord, service: Service) -> Result<Self, StateError> {
        let IntegrationServiceRecord {
            service: _,
            step: _,
            framework_version,
            message_version,
            transaction_id,
            unanswered,
        } = *record;
        let versions = Versions {
            framework: Version::from_u32(framework_version),
            message: Version::from_u32(message_version),
        };
        let phase = match record.step() {
            NegotiationStep::Agreed if versions.is_offered_by(service) => Phase::Agreed(versions),
            NegotiationStep::Agreed => return Err(StateError::Version { service, versions }),
            NegotiationStep::Offered => Phase::Offered,
            NegotiationStep::Refused => Phase::Refused,
            // Nobody decodes the latter.
            NegotiationStep::Closed | NegotiationStep::Unspecified => Phase::Closed,
        };
        if !matches!(phase, Phase::Agreed(_)) {
            within("framework_version", framework_version.into(), 0, 0)?;
            within("message_version", message_version.into(), 0, 0)?;
            within("unanswered", unanswered.into(), 0, 0)?;
        }
        let transaction_id = within("transaction_id", transaction_id.into(), 0, u8::MAX.into())?;
        let transaction_id = u8::try_from(transaction_id).unwrap_or(u8::MAX); // just checked
        Ok(Self { service, phase, is_open: false, transaction_id, is_unanswered: unanswered })
    }
}

/// A protocol whose records come one after the other.
#[derive(Default)]
pub(crate) struct Restoring {
    dialogues: Vec<Dialogue>,
    heartbeat: Option<HeartbeatRecord>,
    shutdown: Option<ShutdownRequestRecord>,
}

impl Restoring {
    pub(crate) fn service(&mut self, record: &IntegrationServiceRecord) -> Result<(), StateError> {
        let &service = Service::ALL.get(self.dialogues.len()).ok_or(StateError::Order)?;
        if record.service() != saved_service(service) {
            return Err(StateError::Order);
        }
        self.dialogues.push(Dialogue::restored(record, service)?);
        Ok(())
    }

    pub(crate) fn heartbeat(&mut self, record: HeartbeatRecord) -> Result<(), StateError> {
        let is_due = self.dialogues.len() == Service::ALL.len() && self.heartbeat.is_none();
        self.heartbeat = Some(record);
        if is_due { Ok(()) } else { Err(StateError::Order) }
    }

    pub(crate) fn shutdown(&mut self, record: ShutdownRequestRecord) -> Result<(), StateError> {
        let is_due = self.heartbeat.is_some() && self.shutdown.is_none();
        self.shutdown = Some(record);
        if is_due { Ok(()) } else { Err(StateError::Order) }
    }

    /// The protocol, when all have come. Where it goes on it tells the guest the time at once.
    pub(crate) fn finish(self) -> Result<Protocol, StateError> {
        let Self { dialogues, heartbeat, shutdown: request } = self;
        let (&[alive, shutdown, time], Some(heartbeat)) = (dialogues.as_slice(), heartbeat) else {
            return Err(StateError::Order);
        };
        let HeartbeatRecord {
            sequence,
            sent,
            answered,
            missed,
            missed_in_a_row,
            application_state,
        } = heartbeat;
        let status = HeartbeatStatus {
            versions: None,
            sent,
            answered,
            missed,
            missed_in_a_row,
            applications: ApplicationState::from_raw(application_state),
        };
        // One without the other cannot be.
        let (asked, open) = (u64::from(request.is_some()), u64::from(shutdown.is_unanswered));
        within("unanswered", open, asked, asked)?;
        let asked = request.map(|request| restored_request(&request, &shutdown)).transpose()?;
        Ok(Protocol {
            heartbeat: Heartbeat::at(alive, sequence, status),
            shutdown: Shutdown::at(shutdown, asked),
            time_sync: TimeSync::at(time),
        })
    }
}

/// The request that a record tells of, if a guest of this version could be asked for it.
fn restored_request(
    record: &ShutdownRequestRecord,
    dialogue: &Dialogue,
) -> Result<ShutdownRequest, StateError> {
    let ShutdownRequestRecord { kind: _, forced: force } = *record;
    let kind = match record.kind() {
        SavedShutdown::PowerOff => Some(ShutdownKind::PowerOff),
        SavedShutdown::Reboot => Some(ShutdownKind::Reboot),
        SavedShutdown::Hibernate => Some(ShutdownKind::Hibernate),
        SavedShutdown::Unspecified => None,
    };
    let is_known = |kind: ShutdownKind| match dialogue.phase {
        Phase::Agreed(versions) => kind.is_known_in(versions.message),
        _ => false,
    };
    let most = [ShutdownKind::Hibernate, ShutdownKind::Reboot, ShutdownKind::PowerOff];
    let most = most.into_iter().find(|&kind| is_known(kind)).map_or(0, |it| saved_kind(it) as u64);
    let found = record.kind() as u64;
    let cannot = StateError::Value { field: "kind", found, least: 1, most };
    let kind = kind.filter(|&kind| is_known(kind)).ok_or(cannot)?;
    Ok(ShutdownRequest { kind, force })
}

/// The number in a field, if it is one that may be there.
fn within(field: &'static str, found: u64, least: u64, most: u64) -> Result<u64, StateError> {
    if (least..=most).contains(&found) {
        return Ok(found);
    }
    Err(StateError::Value { field, found, least, most })
}
