//! A storage controller that is saved at every step of its device's protocol, and with requests in flight.

use std::error::Error;
use std::io::Read as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kmcl::bus::Bus;
use kmcl::{Channel, Guid, SaveOptions};
use saved_state::channel::Fence;
use saved_state::file::{FileReader, FileWriter};
use saved_state::{FormatVersion, StreamKind};
use vmbus_wire::packet::PacketKind;
use vsp_storage::block::{TestMedium, TestTime};
use vsp_storage::{
    Completions, ControllerConfig, ControllerRestoreError, Disk, DiskOptions, Driver,
    RestoringController, ScsiAddress, ScsiController,
};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::protocol::{ProtocolVersion, ProtocolVersionBody};
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

use crate::channel::parts;
use crate::guest::{HandBus, Rings, Standing, lock};

const INSTANCE: Guid = Guid::from_u128(0x6b6d_636c_5ad5_4000_8000_0000_0000_0002);
/// Pages of each ring.
const PAGES: (u32, u32) = (33, 33);
const MEMORY_BYTES: u64 = 4 << 20;
/// The last page of guest memory; requests have the ones before it.
const LAST_PFN: u64 = MEMORY_BYTES / 4096 - 1;
const DISK_BYTES: u64 = 1 << 20;
const PACKETS: u32 = 4096;

/// Where the disks are.
pub const DISKS: [ScsiAddress; 2] = [ScsiAddress::new(0, 0, 0), ScsiAddress::new(0, 0, 1)];

/// Drives nothing by itself: the test does.
#[derive(Default)]
struct Hand(Mutex<Vec<Arc<Completions>>>);

impl Driver for Hand {
    fn add_channel(&self, _: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    fn remove_channel(&self, _: &Channel) {}

    fn add_completions(&self, one: Arc<Completions>) -> Result<(), Box<dyn Error + Send + Sync>> {
        lock(&self.0).push(one);
        Ok(())
    }

    fn remove_completions(&self, one: &Arc<Completions>) {
        lock(&self.0).retain(|other| !Arc::ptr_eq(one, other));
    }
}

impl Hand {
    fn settle(&self) {
        let completions = lock(&self.0).clone();
        for one in completions {
            while one.ready() {}
        }
    }
}

/// A medium that is the same each time: its header is a part of what a disk is known by.
fn medium() -> TestMedium {
    let medium = TestMedium::new(DISK_BYTES, TestTime::Simulated).unwrap();
    medium.contents().fill(0, DISK_BYTES, 0xe5).unwrap();
    medium
}

fn disk(medium: &TestMedium) -> Arc<Disk> {
    Disk::new(medium.backend().unwrap(), &DiskOptions::new("golden")).unwrap()
}

/// A controller whose guest has come so far.
pub struct Server {
    bus: Arc<HandBus>,
    driver: Arc<Hand>,
    controller: ScsiController,
    medium: TestMedium,
    rings: Rings,
}

impl Server {
    /// A controller with disks, and a guest that has opened its channel.
    #[must_use]
    pub fn new() -> Self {
        let bus = HandBus::new(MEMORY_BYTES);
        let driver = Arc::new(Hand::default());
        let config = ControllerConfig::new(INSTANCE);
        let controller =
            ScsiController::new(Arc::clone(&bus) as Arc<dyn Bus>, Arc::clone(&driver) as _, config)
                .unwrap();
        let medium = medium();
        for address in DISKS {
            controller.attach(address, disk(&medium)).unwrap();
        }
        controller.offer().unwrap();
        let rings = bus.open(PAGES, Standing::default());
        let server = Self { bus, driver, controller, medium, rings };
        server.run();
        server
    }

    fn run(&self) {
        let channel = self.controller.channel().unwrap();
        while channel.process(PACKETS).more {}
        self.driver.settle();
    }

    /// The guest says `packet`, and waits for the answer.
    fn call(&mut self, packet: &VstorPacket) {
        self.rings.request(1, &[], packet.bytes(PacketForm::Full));
        self.run();
        assert_eq!(self.rings.take().len(), 1, "{:?}", packet.operation);
    }

    /// The guest goes through the first `steps` steps of the initialisation.
    #[must_use]
    pub fn after(steps: usize) -> Self {
        let mut server = Self::new();
        let version = ProtocolVersionBody::new(ProtocolVersion::WIN10);
        let query = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION).with_body(&version);
        let all = [
            VstorPacket::request(Operation::BEGIN_INITIALIZATION),
            query,
            VstorPacket::request(Operation::QUERY_PROPERTIES),
            VstorPacket::request(Operation::END_INITIALIZATION),
        ];
        all.iter().take(steps).for_each(|step| server.call(step));
        server
    }

    /// The guest writes `count` times a page to each disk in turn. `at_once` of them run, the others wait.
    pub fn write(&mut self, count: u8, at_once: usize) {
        self.medium.set_slots(at_once);
        for number in 0..count {
            // Behind what a disk is known by.
            let block = DISK_BYTES / 512 / 2 + u64::from(number) * 8;
            let cdb = Command::write(block, 8, false).encode().unwrap();
            let address = DISKS[usize::from(number) % DISKS.len()];
            let srb = ScsiRequest::new(address, &cdb, DataDirection::Out, 4096);
            let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
            let external = [1 << 32, 4096, LAST_PFN - u64::from(number)];
            self.rings.request(u64::from(number), &external, packet.bytes(PacketForm::Full));
        }
        self.run();
    }

    /// Lets so much time go by for the disks.
    pub fn advance(&self, by: Duration) {
        self.medium.advance(by);
        self.run();
    }

    /// What is saved of the controller, frozen for it; it is gone then.
    #[must_use]
    pub fn move_away(self) -> Vec<u8> {
        let frozen = self.controller.freeze().unwrap();
        while frozen.running() != 0 {
            self.driver.settle();
        }
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

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

/// Begins to restore the state of a controller apart from its channels.
///
/// # Errors
/// What the controller says.
pub fn restoring(state: &[u8]) -> Result<RestoringController, ControllerRestoreError> {
    restoring_on(&HandBus::new(1 << 20), &Arc::new(Hand::default()), state)
}

fn restoring_on(
    bus: &Arc<HandBus>,
    driver: &Arc<Hand>,
    state: &[u8],
) -> Result<RestoringController, ControllerRestoreError> {
    let config = ControllerConfig::new(INSTANCE);
    let (bus, driver) = (Arc::clone(bus) as Arc<dyn Bus>, Arc::clone(driver) as _);
    ScsiController::restoring(bus, driver, config, state)
}

/// The streams of a file, but for its first and its last.
pub(crate) fn streams(file: &[u8]) -> Vec<Vec<u8>> {
    let mut reader = FileReader::new(file).unwrap();
    let mut streams = Vec::new();
    while let Some(mut stream) = reader.next_stream().unwrap() {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        streams.push(bytes);
    }
    reader.finish().unwrap();
    streams
}

/// Restores a controller in a process where nothing is left of the one that saved it, but its disks; lets it
/// go on, and sees to it that each request ends once, and well.
pub fn assert_goes_on(file: &[u8]) {
    let streams = streams(file);
    let [controller, channel] = &streams[..] else { panic!("{} streams", streams.len()) };
    let parts = parts(channel).unwrap();

    let (bus, driver, medium) = (HandBus::new(MEMORY_BYTES), Arc::new(Hand::default()), medium());
    let mut restoring = restoring_on(&bus, &driver, controller).unwrap();
    let addresses: Vec<_> = restoring.disks().iter().map(|disk| disk.address).collect();
    for address in addresses {
        restoring.attach(address, disk(&medium)).unwrap();
    }
    restoring.enable().unwrap();
    let standing = Standing {
        read_index: parts.record.read_index,
        write_index: parts.record.write_index,
        resumed: true,
    };
    let rings = bus.open(PAGES, standing);
    restoring.channel(0).unwrap().process(PACKETS);
    restoring.restore_channel(0, &channel[..]).unwrap();
    let controller = restoring.start().unwrap();
    let mut server = Server { bus, driver, controller, medium, rings };

    let mut ended = Vec::new();
    for _ in 0..100 {
        server.run();
        server.medium.release();
        server.advance(Duration::from_secs(1));
        for taken in server.rings.take() {
            assert_eq!(taken.kind, PacketKind::Completion);
            let (answer, _) = VstorPacket::parse(&taken.payload).unwrap();
            assert_eq!(answer.body::<ScsiRequest>().srb_status, SrbStatus::SUCCESS);
            ended.push(taken.transaction_id);
        }
    }
    ended.sort_unstable();
    let mut expected: Vec<_> = parts.incoming.iter().map(|packet| packet.transaction_id).collect();
    expected.sort_unstable();
    assert_eq!(ended, expected);
    let finished = parts.incoming.iter().filter(|it| matches!(it.fence, Fence::Finished { .. }));
    let replayed = parts.incoming.len() - finished.count();
    let written = server.medium.history().len();
    assert!(written >= replayed, "{written} of {replayed} requests reached the medium");
    let Server { bus, controller, rings, .. } = server;
    drop(rings);
    controller.close();
    assert_eq!(bus.free_pages(), MEMORY_BYTES / 4096);
}

/// A whole file of a server between processes: transport, bus, controller, channels. Each stream is one that
/// its owner takes; that the disks and the guest are not there is all that keeps it from going on.
pub fn assert_is_a_server(file: &[u8]) {
    let entries = saved_state::file::check(file, saved_state::inspect::ALL_KINDS).unwrap();
    let mut reader = FileReader::new(file).unwrap();
    let mut channels = 0;
    while let Some(mut stream) = reader.next_stream().unwrap() {
        let entry = stream.entry().clone();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        match entry.stream {
            StreamKind::TRANSPORT => assert!(vmbus_unix::check_saved_transport(&bytes).unwrap()),
            StreamKind::BUS => crate::bus::assert_goes_on(&bytes),
            StreamKind::DEVICE => {
                let config = ControllerConfig::new(entry.interface_instance);
                let bus = HandBus::new(1 << 20) as Arc<dyn Bus>;
                let driver = Arc::new(Hand::default());
                let restoring = ScsiController::restoring(bus, driver, config, &bytes[..]).unwrap();
                assert!(restoring.enable().is_err(), "its disks are not there");
                assert_eq!(restoring.channels() as usize, entries.len() - 3);
            }
            _ => {
                let parts = parts(&bytes).unwrap();
                assert_eq!(parts.incoming.len() + parts.outgoing.len(), entry.items as usize);
                assert!(parts.record.open);
                channels += 1;
            }
        }
    }
    reader.finish().unwrap();
    assert_eq!(channels, entries.len() - 3);
}
