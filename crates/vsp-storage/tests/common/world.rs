//! A guest, a disk whose time the test decides, and servers that move.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use kmcl::{ChannelState, NtStatus, Packet, PacketCompletion, Save, SaveOptions, SendFlags};
use vmbus_wire::ranges::GpaRange;
use vsp_storage::block::{Backend, Fate, TestBackend, TestMedium, TestTime};
use vsp_storage::{
    ControllerConfig, Disk, DiskOptions, FrozenController, RestoringController, SavedStream,
    ScsiAddress, ScsiController,
};
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest};

use super::{Guest, INSTANCE, LUN0, PATIENCE, WorkerDriver, until};

/// Bytes of a disk.
pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// Bytes of the guest's buffer for one request.
pub(crate) const BUFFER_BYTES: u64 = 16 << 10;

/// A server: a controller and what drives it.
pub(crate) struct Server {
    pub(crate) controller: ScsiController,
    pub(crate) driver: Arc<WorkerDriver>,
    pub(crate) backend: Arc<TestBackend>,
}

impl Server {
    /// A new one with a disk on `medium`, offered.
    pub(crate) fn new(bus: &Arc<LoopbackBus>, medium: &TestMedium, sub_channels: u16) -> Self {
        let driver = WorkerDriver::new();
        let config = config(sub_channels);
        let bus = Arc::clone(bus) as Arc<dyn Bus>;
        let controller = ScsiController::new(bus, driver.clone(), config).unwrap();
        let backend = medium.backend().unwrap();
        controller.attach(LUN0, disk(backend.clone())).unwrap();
        controller.offer().unwrap();
        Self { controller, driver, backend }
    }

    /// One that goes on where `streams` say.
    pub(crate) fn restore(
        bus: &Arc<LoopbackBus>,
        medium: &TestMedium,
        streams: &[Vec<u8>],
    ) -> Self {
        let driver = WorkerDriver::new();
        let mut restoring = restoring(bus, &driver, streams[0].as_slice());
        let backend = medium.backend().unwrap();
        restoring.attach(LUN0, disk(backend.clone())).unwrap();
        restoring.enable().unwrap();
        assert_eq!(restoring.channels() as usize, streams.len() - 1);
        for (index, stream) in (0..).zip(&streams[1..]) {
            restoring.restore_channel(index, stream.as_slice()).unwrap();
        }
        let controller = restoring.start().unwrap();
        Self { controller, driver, backend }
    }
}

pub(crate) fn config(sub_channels: u16) -> ControllerConfig {
    ControllerConfig { max_sub_channels: sub_channels, ..ControllerConfig::new(INSTANCE) }
}

pub(crate) fn disk(backend: Arc<dyn Backend>) -> Arc<Disk> {
    Disk::new(backend, &DiskOptions::new("moving")).unwrap()
}

pub(crate) fn restoring(
    bus: &Arc<LoopbackBus>,
    driver: &Arc<WorkerDriver>,
    state: impl Read,
) -> RestoringController {
    let bus = Arc::clone(bus) as Arc<dyn Bus>;
    ScsiController::restoring(bus, driver.clone(), config(0), state).unwrap()
}

/// The bytes of `streams`.
pub(crate) fn write(streams: Vec<SavedStream>) -> Vec<Vec<u8>> {
    let write = |mut stream: SavedStream| {
        let mut bytes = Vec::new();
        stream.save.write_to(&mut bytes).unwrap();
        bytes
    };
    streams.into_iter().map(write).collect()
}

/// The streams of a frozen controller, once nothing is running.
pub(crate) fn save(frozen: &FrozenController) -> Vec<Vec<u8>> {
    assert!(frozen.wait(Some(PATIENCE)), "{frozen:?}");
    write(frozen.streams(&SaveOptions::default()).unwrap())
}

/// What came back for each request, by its number.
#[derive(Default)]
pub(crate) struct Answers(Mutex<Vec<(usize, NtStatus, Vec<u8>)>>);

impl PacketCompletion for Answers {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        self.0.lock().unwrap().push((packet.pointer(), status, payload.to_vec()));
    }
}

/// A guest with a medium behind its server.
pub(crate) struct World {
    // The guest goes before its server: it closes its channels.
    pub(crate) guests: Vec<Guest>,
    pub(crate) answers: Arc<Answers>,
    pub(crate) server: Option<Server>,
    pub(crate) medium: TestMedium,
    pub(crate) bus: Arc<LoopbackBus>,
    asked: usize,
    time: TestTime,
}

impl World {
    /// With a guest that is ready, and a disk full of 0xff.
    pub(crate) fn new() -> Self {
        Self::with(TestTime::Simulated)
    }

    /// The same, with a disk whose time is that of the system.
    pub(crate) fn with(time: TestTime) -> Self {
        let bus = LoopbackBus::new(16 << 20).unwrap();
        let medium = TestMedium::new(DISK_BYTES, time).unwrap();
        medium.contents().fill(0, DISK_BYTES, 0xff).unwrap();
        let server = Server::new(&bus, &medium, 4);
        let guest = Guest::ready(&bus, ProtocolVersion::WIN10);
        let answers = Arc::default();
        Self { guests: vec![guest], answers, server: Some(server), medium, bus, asked: 0, time }
    }

    pub(crate) fn controller(&self) -> &ScsiController {
        &self.server.as_ref().unwrap().controller
    }

    /// Sends a command with a buffer of its own on channel `channel`. The buffer has `data`. Returns the
    /// request's number.
    pub(crate) fn ask_on(
        &mut self,
        channel: usize,
        command: Command,
        direction: DataDirection,
        bytes: u32,
        data: &[u8],
    ) -> usize {
        let cdb = command.encode().unwrap();
        let srb = ScsiRequest::new(LUN0, &cdb, direction, bytes);
        let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        self.send(channel, &packet, bytes, data)
    }

    /// Sends a packet with a buffer of its own.
    pub(crate) fn send(
        &mut self,
        channel: usize,
        packet: &VstorPacket,
        bytes: u32,
        data: &[u8],
    ) -> usize {
        let number = self.asked;
        self.asked += 1;
        let guest = &self.guests[channel];
        let at = self.buffer(number);
        guest.pages.slice().unwrap().write_at(usize::try_from(at).unwrap(), data).unwrap();
        let pfns = guest.pfns();
        let first = usize::try_from(at / 4096).unwrap();
        let pages = &pfns[first..first + bytes.div_ceil(4096) as usize];
        let range = [GpaRange { byte_count: bytes, byte_offset: 0, pfns: pages }];
        let mut free = guest.channel.packet_allocate().unwrap();
        free.set_pointer(number);
        free.set_completion_routine(self.answers.clone());
        let external = (bytes > 0).then_some(&range[..]);
        let flags = SendFlags::WAIT_FOR_COMPLETION;
        free.send(packet.bytes(guest.form), external, flags).unwrap();
        number
    }

    pub(crate) fn ask(
        &mut self,
        command: Command,
        direction: DataDirection,
        bytes: u32,
        data: &[u8],
    ) -> usize {
        self.ask_on(0, command, direction, bytes, data)
    }

    /// A write of `blocks` sectors full of `stamp`.
    pub(crate) fn write(&mut self, block: u64, blocks: u32, stamp: u8) -> usize {
        let bytes = blocks * 512;
        let data = vec![stamp; bytes as usize];
        self.ask(Command::write(block, blocks, false), DataDirection::Out, bytes, &data)
    }

    pub(crate) fn flush(&mut self) -> usize {
        self.ask(Command::synchronize_cache(), DataDirection::None, 0, &[])
    }

    /// Where in the guest's pages the buffer of a request is.
    pub(crate) fn buffer(&self, number: usize) -> u64 {
        number as u64 % 32 * BUFFER_BYTES
    }

    /// What the buffer of a request has now.
    pub(crate) fn buffer_bytes(&self, number: usize, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        let at = usize::try_from(self.buffer(number)).unwrap();
        self.guests[0].pages.slice().unwrap().read_at(at, &mut data).unwrap();
        data
    }

    /// Lets the guest's end do its work.
    pub(crate) fn process(&self) {
        // The guest's doorbells are those of the first server: a bus between processes makes them ring
        // at the next one, a loop in one process does not.
        if let Some(server) = &self.server {
            server.driver.process();
        }
        for guest in &self.guests {
            guest.channel.process(256);
        }
    }

    /// The answers so far, by request: each must have come once.
    pub(crate) fn answered(&self) -> Vec<(usize, ScsiRequest)> {
        self.process();
        let answers = self.answers.0.lock().unwrap();
        let mut answered: Vec<(usize, ScsiRequest)> = answers
            .iter()
            .map(|(number, status, payload)| {
                assert_eq!(*status, NtStatus::SUCCESS, "request {number}");
                let (answer, _) = VstorPacket::parse(payload).unwrap();
                (*number, answer.body())
            })
            .collect();
        answered.sort_by_key(|(number, _)| *number);
        for pair in answered.windows(2) {
            assert_ne!(pair[0].0, pair[1].0, "answered twice");
        }
        answered
    }

    /// What came back so far, as it came: numbers and payloads.
    pub(crate) fn raw_answers(&self) -> Vec<(usize, Vec<u8>)> {
        self.process();
        let answers = self.answers.0.lock().unwrap();
        answers.iter().map(|(number, _, payload)| (*number, payload.clone())).collect()
    }

    /// Waits until the back end holds so many requests: those that have not started, and that run.
    pub(crate) fn until_held(&self, waiting: usize, running: usize) {
        until("requests never came to the back end", || {
            self.process();
            self.medium.in_flight() == (waiting, running)
        });
    }

    /// Waits until all requests are answered; time goes on meanwhile.
    pub(crate) fn finish(&self) -> Vec<(usize, ScsiRequest)> {
        let start = std::time::Instant::now();
        loop {
            self.medium.release();
            if self.time == TestTime::Simulated {
                self.medium.advance(Duration::from_millis(1));
            }
            let answered = self.answered().len();
            if answered == self.asked {
                break;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{answered} of {} requests are answered; {:?} with the medium, {:?} with the controller; {:?}",
                self.asked,
                self.medium.in_flight(),
                self.controller().in_flight(),
                self.guests.iter().map(|guest| guest.channel.state()).collect::<Vec<_>>(),
            );
            std::thread::sleep(Duration::from_micros(100));
        }
        self.answered()
    }

    /// Moves the server: saves, ends the old one, and restores a new one. Returns the streams.
    pub(crate) fn go_elsewhere(&mut self, frozen: FrozenController) -> Vec<Vec<u8>> {
        let streams = save(&frozen);
        frozen.move_away();
        drop(self.server.take());
        self.server = Some(Server::restore(&self.bus, &self.medium, &streams));
        streams
    }

    /// Opens subchannels, so many.
    pub(crate) fn open_sub_channels(&mut self, count: u16) {
        use vstor_wire::protocol::SubChannelRequest;
        use zerocopy::little_endian::U16;
        let create = VstorPacket::request(Operation::CREATE_SUB_CHANNELS)
            .with_body(&SubChannelRequest { count: U16::new(count) });
        assert_eq!(self.guests[0].call(&create).status(), NtStatus::SUCCESS);
        for index in 1..=count {
            self.guests.push(Guest::open(&self.bus, index));
        }
    }

    /// A byte of the disk.
    pub(crate) fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.medium.contents().read(at, &mut byte).unwrap();
        byte[0]
    }

    /// All of the disk.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        self.medium.contents().read(0, &mut bytes).unwrap();
        bytes
    }

    /// Whether the server's primary channel is open and at work.
    pub(crate) fn is_active(&self) -> bool {
        self.controller().channel().is_some_and(|it| it.state() == ChannelState::Active)
    }

    pub(crate) fn address() -> ScsiAddress {
        LUN0
    }
}

impl Drop for World {
    /// Lets everything end, also when a test has failed in the middle.
    fn drop(&mut self) {
        self.medium.set_fate(Fate::after(Duration::ZERO));
        self.medium.set_slots(usize::MAX);
        self.medium.release();
        self.medium.advance(Duration::from_secs(3600));
    }
}
