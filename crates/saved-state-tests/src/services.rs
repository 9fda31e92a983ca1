//! Integration services that are saved at every step of what they say to a guest.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use kmcl::bus::Bus;
use kmcl::{Channel, SaveOptions};
use saved_state::file::FileWriter;
use saved_state::integration::{
    INTEGRATION_SERVICE, IntegrationServiceRecord, KINDS, NegotiationStep,
};
use saved_state::{FormatVersion, StreamKind, StreamReader};
use vsp_integration::wire::{IcHeader, TimeBody};
use vsp_integration::{
    Clocks, Driver, Event, FileTime, IntegrationConfig, IntegrationServices, Observer, Phase,
    Service, ShutdownAnswer, ShutdownKind, ShutdownRequest, Version,
};

use crate::channel::parts;
use crate::guest::{HandBus, Rings, Standing, lock};
use crate::integration::answer_choosing;
use crate::storage::streams;

/// Pages of each ring, as Linux has them.
const PAGES: (u32, u32) = (4, 4);
const MEMORY_BYTES: u64 = 1 << 20;
const SECOND: u64 = 10_000_000;
const REBOOT: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::Reboot, force: true };

/// What a guest chooses of what it is offered.
pub const NEWEST: u8 = 0xff;
/// The first version of each.
pub const OLDEST: u8 = 0;

/// Runs channels when the test does.
#[derive(Default)]
struct Inline(Mutex<Vec<Channel>>);

impl Driver for Inline {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        channel.set_waker(Waker::noop().clone());
        lock(&self.0).push(channel.clone());
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        channel.clear_waker();
        let instance = channel.get_interface_instance();
        lock(&self.0).retain(|other| other.get_interface_instance() != instance);
    }
}

#[derive(Default)]
struct Events(Mutex<Vec<Event>>);

impl Observer for Events {
    fn happened(&self, event: Event) {
        lock(&self.0).push(event);
    }
}

/// The services, and a guest that says what the test has it say.
pub struct Server {
    bus: Arc<HandBus>,
    driver: Arc<Inline>,
    events: Arc<Events>,
    services: IntegrationServices,
    /// In the order of [`Service::ALL`].
    rings: [Option<Rings>; 3],
    clocks: Clocks,
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// Services that are offered. Nobody has opened them.
    #[must_use]
    pub fn new() -> Self {
        let (bus, driver) = (HandBus::new(MEMORY_BYTES), Arc::new(Inline::default()));
        let (events, config) = (Arc::new(Events::default()), IntegrationConfig::default());
        let services = IntegrationServices::new(
            Arc::clone(&bus) as Arc<dyn Bus>,
            Arc::clone(&driver) as _,
            Arc::clone(&events) as _,
            config,
        );
        let services = services.unwrap();
        services.offer().unwrap();
        let clocks =
            Clocks { now: FileTime(134_278_000_000_000_000), reference_time: 100 * SECOND };
        Self { bus, driver, events, services, rings: [const { None }; 3], clocks }
    }

    /// A guest has opened all three, and was offered versions.
    #[must_use]
    pub fn offered() -> Self {
        let mut server = Self::new();
        server.open();
        server
    }

    /// A guest has chosen, and nothing is asked.
    #[must_use]
    pub fn agreed(choice: u8) -> Self {
        let mut server = Self::offered();
        server.live(2, choice);
        server
    }

    fn open(&mut self) {
        for service in Service::ALL {
            let rings = self.bus.open_instance(service.instance(), PAGES, Standing::default());
            self.rings[service.index()] = Some(rings);
        }
        self.run();
    }

    fn run(&self) {
        for channel in lock(&self.driver.0).clone() {
            while channel.process(64).more {}
        }
    }

    /// What the guest finds in the rings, without the headers of pipes.
    fn read(&mut self) -> Vec<(Service, Vec<u8>)> {
        let mut read = Vec::new();
        for service in Service::ALL {
            let Some(rings) = &mut self.rings[service.index()] else { continue };
            // The pipe's header says how long the message is, which is padded in the ring.
            read.extend(rings.take().into_iter().map(|taken| {
                let [_, _, _, _, a, b, c, d, message @ ..] = &taken.payload[..] else {
                    panic!("no header of a pipe")
                };
                let len = u32::from_le_bytes([*a, *b, *c, *d]);
                (service, message[..len as usize].to_vec())
            }));
        }
        read
    }

    fn say(&mut self, service: Service, message: &[u8]) {
        let mut piped = 1_u32.to_le_bytes().to_vec();
        piped.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        piped.extend(message);
        self.rings[service.index()].as_mut().unwrap().say(&piped);
    }

    /// The guest answers all that it finds; the host does not look.
    pub fn answer(&mut self, choice: u8) -> Vec<(Service, Vec<u8>)> {
        let read = self.read();
        for (service, request) in &read {
            self.say(*service, &answer_choosing(request, choice));
        }
        read
    }

    /// The guest wants none of the versions that it is offered.
    pub fn refuse(&mut self) {
        for (service, request) in self.read() {
            let mut answer = answer_choosing(&request, NEWEST);
            let counts = size_of::<IcHeader>();
            answer[counts..counts + 4].fill(0);
            self.say(service, &answer);
        }
        self.run();
    }

    /// So many seconds pass, and the owner says so.
    pub fn pass(&mut self, seconds: u64) {
        self.clocks.now.0 += seconds * SECOND;
        self.clocks.reference_time += seconds * SECOND;
        self.services.tick(self.clocks);
        self.run();
    }

    /// Time passes second by second, and the guest answers; returns what it has read.
    fn live(&mut self, seconds: u64, choice: u8) -> Vec<(Service, Vec<u8>)> {
        let mut read = Vec::new();
        for _ in 0..seconds {
            self.pass(1);
            loop {
                let some = self.answer(choice);
                self.run();
                if some.is_empty() {
                    break;
                }
                read.extend(some);
            }
        }
        read
    }

    /// Everything is asked that can be, and lies in the rings.
    pub fn ask(&mut self) {
        self.pass(10);
        self.services.request_shutdown(REBOOT, "moving").unwrap();
        self.run();
    }

    /// Asks until the rings are full, and one more waits.
    pub fn fill(&mut self) {
        let is_full = |server: &Self, service| {
            server.services.channel(service).unwrap().outgoing_in_use().0 == 1
        };
        for _ in 0..10_000 {
            if is_full(self, Service::TimeSync) && is_full(self, Service::Shutdown) {
                return;
            }
            self.pass(5);
            self.services.resync();
            let _one_is_asked_for_already = self.services.request_shutdown(REBOOT, "again");
        }
        panic!("the rings are never full");
    }

    /// What is saved of the services, frozen for it; they are gone then.
    #[must_use]
    pub fn move_away(self) -> Vec<u8> {
        let frozen = self.services.freeze().unwrap();
        let options = SaveOptions::default();
        let mut file = Vec::new();
        let mut writer = FileWriter::new(FormatVersion::NEWEST, options.producer);
        for stream in frozen.streams(&options).unwrap() {
            writer.add(&stream.name, stream.index, stream.save);
        }
        writer.write_to(&mut file).unwrap();
        frozen.move_away();
        file
    }
}

/// What is said of each service.
fn records(state: &[u8]) -> Vec<IntegrationServiceRecord> {
    let (mut reader, mut input) = (StreamReader::new(StreamKind::DEVICE, KINDS), state);
    let mut records = Vec::new();
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        if chunk.kind() == INTEGRATION_SERVICE {
            records.push(chunk.decode().unwrap());
        }
    }
    records
}

/// The answer to what a guest was asked before the state was saved, which is in its own memory; `None` if
/// it was asked nothing.
fn answer_to_the_last(service: Service, record: &IntegrationServiceRecord) -> Option<Vec<u8>> {
    let version = |major: u16, minor: u16| [major.to_le_bytes(), minor.to_le_bytes()].concat();
    let wire = |both| {
        let both = Version::from_u32(both);
        version(both.major.get(), both.minor.get())
    };
    let is_offer = record.step == i32::from(NegotiationStep::Offered);
    let (kind, body) = match is_offer {
        true => {
            let newest = service.versions().last().unwrap();
            let chosen = version(newest.major.get(), newest.minor.get());
            (0, [&[1, 0, 1, 0, 0, 0, 0, 0][..], &version(3, 0), &chosen].concat())
        }
        // No service looks at more of an answer than this.
        false if record.unanswered => (service.message_type().0, vec![0; 64]),
        false => return None,
    };
    let mut answer = wire(record.framework_version);
    answer.extend(kind.to_le_bytes());
    answer.extend(wire(record.message_version));
    answer.extend(u16::try_from(body.len()).unwrap().to_le_bytes());
    answer.extend([0; 4]);
    answer.push(u8::try_from(record.transaction_id).unwrap());
    answer.push(IcHeader::FLAG_TRANSACTION | IcHeader::FLAG_RESPONSE);
    answer.extend([0; 2]);
    answer.extend(body);
    Some(answer)
}

/// Restores services in a process where nothing is left of those that saved them, and lets them go on. What
/// the guest was asked it has answered before, or answers afterwards.
pub fn assert_goes_on(file: &[u8]) {
    for answers_first in [false, true] {
        goes_on(file, answers_first);
    }
}

fn goes_on(file: &[u8], answers_first: bool) {
    let streams = streams(file);
    let [state, channels @ ..] = &streams[..] else { panic!("no streams") };
    let records = records(state);
    let (bus, driver) = (HandBus::new(MEMORY_BYTES), Arc::new(Inline::default()));
    let events = Arc::new(Events::default());
    let mut restoring = IntegrationServices::restoring(
        Arc::clone(&bus) as Arc<dyn Bus>,
        Arc::clone(&driver) as _,
        Arc::clone(&events) as _,
        IntegrationConfig::default(),
        &state[..],
    )
    .unwrap();
    restoring.enable().unwrap();
    let mut rings = [const { None }; 3];
    let (mut answers, mut queued) = (Vec::new(), 0);
    for (service, (record, channel)) in Service::ALL.into_iter().zip(records.iter().zip(channels)) {
        let parts = parts(channel).unwrap();
        if parts.record.open {
            let standing = Standing {
                read_index: parts.record.read_index,
                write_index: parts.record.write_index,
                resumed: true,
            };
            let opened = bus.open_instance(service.instance(), PAGES, standing);
            rings[service.index()] = Some(opened);
        }
        // What is queued the guest reads only now.
        queued = parts.outgoing.len(); // the last one's: time
        let answer = answer_to_the_last(service, record).filter(|_| parts.outgoing.is_empty());
        answers.extend(answer.map(|answer| (service, answer)));
        restoring.restore_channel(u32::try_from(service.index()).unwrap(), &channel[..]).unwrap();
    }
    let Server { clocks, .. } = Server::new();
    let clocks = Clocks { reference_time: clocks.reference_time * 1000, ..clocks };
    let services = restoring.start().unwrap();
    let mut server = Server { bus, driver, events, services, rings, clocks };
    let (asked, before) = (server.services.shutdown_asked(), server.services.heartbeat());
    if !answers_first {
        server.run();
    }
    for (service, answer) in answers {
        server.say(service, &answer);
    }
    server.run();
    if records.iter().all(|it| it.step == i32::from(NegotiationStep::Closed)) {
        server.open();
    }
    let read = server.live(70, NEWEST);

    let refused = records.iter().all(|it| it.step == i32::from(NegotiationStep::Refused));
    for (service, record) in Service::ALL.into_iter().zip(&records) {
        match server.services.phase(service) {
            Phase::Refused => assert!(refused, "{service}"),
            Phase::Agreed(versions) if record.step == i32::from(NegotiationStep::Agreed) => {
                let found = (versions.framework.to_u32(), versions.message.to_u32());
                assert_eq!(found, (record.framework_version, record.message_version), "{service}");
            }
            Phase::Agreed(versions) => {
                assert_eq!(Some(&versions.message), service.versions().last(), "{service}");
            }
            phase => panic!("{service}: {phase}"),
        }
    }
    let ended: Vec<_> = lock(&server.events.0)
        .iter()
        .filter(|event| matches!(event, Event::ShutdownEnded { .. }))
        .copied()
        .collect();
    let answer = ShutdownAnswer::Accepted;
    let expected: Vec<_> =
        asked.into_iter().map(|request| Event::ShutdownEnded { request, answer }).collect();
    assert_eq!(ended, expected);
    if !refused {
        let after = server.services.heartbeat();
        assert!(after.answered >= before.answered + 30, "{before:?}, then {after:?}");
        assert_eq!(after.missed, before.missed);
        // It is told to set its clock, once, besides what was queued.
        let times = read.iter().filter(|(service, _)| *service == Service::TimeSync);
        let is_new = match server.services.phase(Service::TimeSync) {
            Phase::Agreed(versions) => versions.message.to_u32() >= 4 << 16,
            _ => false,
        };
        let flags = size_of::<IcHeader>() + if is_new { 16 } else { 24 };
        let times = times.filter(|(_, message)| message[4] != 0);
        let sync = times.filter(|(_, message)| message[flags] == TimeBody::FLAG_SYNC).count();
        assert_eq!(sync, 1 + queued, "{} messages", read.len());
    }
    let Server { bus, services, rings, .. } = server;
    drop(rings);
    services.close();
    assert_eq!(bus.free_pages(), MEMORY_BYTES / 4096);
}
