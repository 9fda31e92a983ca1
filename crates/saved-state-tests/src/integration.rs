//! Integration services: any saved state of theirs, and a guest that says anything.

use std::error::Error;
use std::sync::Arc;

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use kmcl::{Channel, Guid};
use saved_state::integration::{
    HeartbeatRecord, IntegrationServiceRecord, KINDS, NegotiationStep, SavedService, SavedShutdown,
    ShutdownRequestRecord,
};
use saved_state::text::Producer;
use saved_state::{
    FormatVersion, HeaderFlags, Step, StreamInfo, StreamKind, StreamWriter, WriteError,
};
use vsp_integration::protocol::{Outcome, Protocol};
use vsp_integration::wire::{IcHeader, MAX_MESSAGE_BYTES};
use vsp_integration::{
    Clocks, Driver, Event, FileTime, IntegrationConfig, IntegrationServices, STATE_INTERFACE,
    Service, ShutdownKind, ShutdownRequest,
};

/// Drives nothing: nobody opens anything.
struct Nobody;

impl Driver for Nobody {
    fn add_channel(&self, _: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    fn remove_channel(&self, _: &Channel) {}
}

std::thread_local! {
    static BUS: Arc<dyn Bus> = LoopbackBus::new(1 << 20).unwrap();
}

/// The services' state apart from their channels: services that can be offered, or an error. The bus is
/// left to the next one.
pub fn state(data: &[u8]) {
    let (bus, config) = (BUS.with(Arc::clone), IntegrationConfig::default());
    match IntegrationServices::restoring(bus, Arc::new(Nobody), Arc::new(()), config, data) {
        Ok(restoring) => {
            restoring.enable().unwrap();
            assert_eq!(restoring.channels(), 3);
            assert!(restoring.start().is_err(), "no channel was restored");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A stream of the services, to begin a corpus with.
#[must_use]
pub fn a_state(step: NegotiationStep, shutdown: Option<SavedShutdown>) -> Vec<u8> {
    let info = StreamInfo {
        stream: StreamKind::DEVICE,
        flags: HeaderFlags::default(),
        interface_type: STATE_INTERFACE,
        interface_instance: Guid::ZERO,
        producer: Producer::new("corpus").unwrap(),
        chunks: 0,
        bytes: 0,
        items: 0,
    };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let (mut out, mut room) = (Vec::new(), vec![0; 4096]);
    let mut keep = |step: Result<Step, WriteError>, room: &[u8]| {
        let Step::Written { bytes } = step.unwrap() else { panic!("no room") };
        out.extend_from_slice(&room[..bytes]);
    };
    let header = writer.header(&mut room);
    keep(header, &room);
    for service in [SavedService::Heartbeat, SavedService::Shutdown, SavedService::TimeSync] {
        let version = if step == NegotiationStep::Agreed { 3 << 16 } else { 0 };
        let record = IntegrationServiceRecord {
            service: service.into(),
            step: step.into(),
            framework_version: version,
            message_version: version,
            transaction_id: 7,
            unanswered: shutdown.is_some() && service == SavedService::Shutdown,
        };
        let written = writer.record(&record, &mut room);
        keep(written, &room);
    }
    let heartbeat = HeartbeatRecord { sequence: 6, sent: 6, answered: 5, ..Default::default() };
    let written = writer.record(&heartbeat, &mut room);
    keep(written, &room);
    if let Some(kind) = shutdown {
        let record = ShutdownRequestRecord { kind: kind.into(), forced: true };
        let written = writer.record(&record, &mut room);
        keep(written, &room);
    }
    let end = writer.end(&mut room);
    keep(end, &room);
    out
}

// ---- A guest ------------------------------------------------------------------------------------------

/// What is left of the bytes that say what happens.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// A script in which a guest opens all three, chooses the newest versions, and answers for a while.
#[must_use]
pub fn a_script() -> Vec<u8> {
    let mut script = Vec::new();
    for service in 0..3 {
        script.extend([service, 0, service, 3, 1, 0xff, 0]);
    }
    script.extend([1, 6, 5, 1, 3, 0, 0, 0]); // a shutdown, accepted
    for _ in 0..4 {
        for service in 0..3 {
            script.extend([service, 4, 60, service, 3, 1, 0xff, 0]);
        }
    }
    script.extend([1, 2, 30]);
    script.extend([0xff; 30]);
    script.extend([1, 1]);
    script
}

/// Steps of one run.
const MAX_STEPS: usize = 4096;

/// Two bytes begin each step: which service, and what happens to it.
///
/// Whatever a guest says, and whenever: no panic; a message is a request, on an open channel, that fits a
/// guest's buffers; each shutdown ends once.
pub fn guest(data: &[u8]) {
    let mut script = Script(data);
    let mut protocol = Protocol::default();
    let mut open = [false; 3];
    let mut last: [Vec<u8>; 3] = Default::default();
    let (mut asked, mut ended, mut reference_time) = (0, 0, 0_u64);
    for _ in 0..MAX_STEPS {
        let (Some(service), Some(deed)) = (script.byte(), script.byte()) else { break };
        let service = Service::ALL[usize::from(service) % 3];
        let at = service.index();
        let outcome = match deed % 8 {
            0 => {
                open[at] = true;
                protocol.opened(service)
            }
            1 => {
                open[at] = false;
                protocol.closed(service)
            }
            2 => {
                let len = usize::from(script.byte().unwrap_or(0));
                protocol.received(service, script.bytes(len)).unwrap_or_default()
            }
            3 => protocol.received(service, &answer(&last[at], &mut script)).unwrap_or_default(),
            4 | 5 => {
                // A tenth of a second each; one that is large goes back.
                let tenths = u64::from(script.byte().unwrap_or(0));
                reference_time = match tenths {
                    0xff => reference_time / 2,
                    _ => reference_time + tenths * 1_000_000,
                };
                let clocks = Clocks { now: FileTime(!reference_time), reference_time };
                protocol.tick(service, clocks, deed % 8 == 4)
            }
            6 => {
                let byte = script.byte().unwrap_or(0);
                let kinds = [ShutdownKind::PowerOff, ShutdownKind::Reboot, ShutdownKind::Hibernate];
                let kind = kinds[usize::from(byte >> 1) % 3];
                let request = ShutdownRequest { kind, force: byte & 1 != 0 };
                let outcome = protocol.request_shutdown(request, "reason", byte < 0x80);
                asked += usize::from(outcome.is_ok());
                outcome.unwrap_or_default()
            }
            _ => {
                protocol.resync();
                continue;
            }
        };
        // Only a shutdown may be asked for on behalf of another one.
        let at = if deed % 8 == 6 { Service::Shutdown.index() } else { at };
        let Outcome { message, event } = outcome;
        if let Some(message) = message {
            assert!(open[at], "{service} is closed");
            assert!(message.len() <= MAX_MESSAGE_BYTES);
            assert_eq!(message[17], IcHeader::FLAG_TRANSACTION | IcHeader::FLAG_REQUEST);
            let size = u16::from_le_bytes([message[10], message[11]]);
            assert_eq!(usize::from(size), message.len() - size_of::<IcHeader>());
            last[at] = message;
        }
        if let Some(Event::ShutdownEnded { .. }) = event {
            ended += 1;
        }
        assert_eq!(asked - ended, usize::from(protocol.shutdown_asked().is_some()));
    }
}

/// The answer to `request` of a guest that chooses the versions at these places of the lists that it is
/// offered, or the last ones.
pub(crate) fn answer_choosing(request: &[u8], choice: u8) -> Vec<u8> {
    answer(request, &mut Script(&[1, choice]))
}

/// An answer to `request` as Linux gives it, with as many bytes changed as the script wants.
fn answer(request: &[u8], script: &mut Script<'_>) -> Vec<u8> {
    let mut answer = request.to_vec();
    let (Some(edits), false) = (script.byte(), request.is_empty()) else { return answer };
    answer[17] = IcHeader::FLAG_TRANSACTION | IcHeader::FLAG_RESPONSE;
    if request[4..6] == [0, 0] {
        // One of each: which, the script says.
        let choice = usize::from(script.byte().unwrap_or(0));
        let versions: Vec<[u8; 4]> = answer[28..].as_chunks().0.to_vec();
        let (frameworks, messages) = versions.split_at(usize::from(answer[20]).min(versions.len()));
        let pick = |from: &[[u8; 4]], which: usize| {
            from.get(which.min(from.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        let (framework, message) = (pick(frameworks, choice >> 4), pick(messages, choice & 15));
        answer[20..24].copy_from_slice(&[1, 0, 1, 0]);
        answer[28..32].copy_from_slice(&framework);
        answer[32..36].copy_from_slice(&message);
        answer[10..12].copy_from_slice(&16_u16.to_le_bytes());
    }
    for _ in 1..edits.min(8) {
        let (Some(at), Some(value)) = (script.byte(), script.byte()) else { break };
        let at = usize::from(at) % answer.len();
        answer[at] = value;
    }
    answer
}
