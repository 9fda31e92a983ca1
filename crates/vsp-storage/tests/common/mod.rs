//! A host with a controller, and a guest that says whatever a test likes.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod world;

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kmcl::bus::Bus;
use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelState, Guid, IncomingPacket, NtStatus, ProcessPacket, SendFlags, Side, Timeout,
};
use kmcl_worker::{Source, SourceId, Worker};
use rustix::event::{EventfdFlags, eventfd};
use vmbus_memory::PageRun;
use vmbus_wire::ranges::GpaRange;
use vsp_storage::block::{Backend, IoDone, IoError, IoRequest, RamBackend};
use vsp_storage::{
    Completions, ControllerConfig, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::protocol::{ProtocolVersion, ProtocolVersionBody};
use vstor_wire::scsi::cdb::Command;
use vstor_wire::scsi::sense::SenseData;
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

pub(crate) const INSTANCE: Guid = Guid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
pub(crate) const LUN0: ScsiAddress = ScsiAddress::new(0, 0, 0);

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `done`, or fails with `what`.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A worker thread as a controller's driver.
pub(crate) struct WorkerDriver {
    pub(crate) worker: Worker,
    sources: Mutex<Vec<(Arc<Completions>, SourceId)>>,
    channels: Mutex<Vec<Channel>>,
}

struct DiskIo(Arc<Completions>);

impl Source for DiskIo {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

impl WorkerDriver {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            worker: Worker::spawn("host").unwrap(),
            sources: Mutex::default(),
            channels: Mutex::default(),
        })
    }

    /// Looks at every channel, whether its doorbell rang or not.
    pub(crate) fn process(&self) {
        let channels = self.channels.lock().unwrap().clone();
        for channel in channels {
            channel.process(256);
        }
    }

    /// Nobody waits for completions any more.
    pub(crate) fn stop_listening(&self) {
        for (_, id) in self.sources.lock().unwrap().drain(..) {
            self.worker.remove_source(id);
        }
    }

    pub(crate) fn sources(&self) -> usize {
        self.sources.lock().unwrap().len()
    }
}

impl Driver for WorkerDriver {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.worker.add(channel)?;
        self.channels.lock().unwrap().push(channel.clone());
        Ok(())
    }

    fn remove_channel(&self, channel: &Channel) {
        self.channels.lock().unwrap().clear(); // nobody is left who would ring
        self.worker.remove(channel);
    }

    fn add_completions(&self, one: Arc<Completions>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let id = self.worker.add_source(Arc::clone(&one), Arc::new(DiskIo(Arc::clone(&one))))?;
        self.sources.lock().unwrap().push((one, id));
        Ok(())
    }

    fn remove_completions(&self, one: &Arc<Completions>) {
        let found = {
            let mut sources = self.sources.lock().unwrap();
            let at = sources.iter().position(|(other, _)| Arc::ptr_eq(other, one));
            at.map(|at| sources.swap_remove(at))
        };
        if let Some((_, id)) = found {
            self.worker.remove_source(id);
        }
    }
}

/// A host with one controller, offered.
pub(crate) struct Host {
    pub(crate) bus: Arc<LoopbackBus>,
    pub(crate) driver: Arc<WorkerDriver>,
    pub(crate) controller: Option<ScsiController>,
}

impl Host {
    pub(crate) fn new(max_sub_channels: u16) -> Self {
        let bus = LoopbackBus::new(16 << 20).unwrap();
        let driver = WorkerDriver::new();
        let config = ControllerConfig { max_sub_channels, ..ControllerConfig::new(INSTANCE) };
        let controller =
            ScsiController::new(Arc::clone(&bus) as Arc<dyn Bus>, driver.clone(), config).unwrap();
        Self { bus, driver, controller: Some(controller) }
    }

    /// A host with one disk at 0:0:0.
    pub(crate) fn with_disk(max_sub_channels: u16, backend: Arc<dyn Backend>) -> Self {
        let host = Self::new(max_sub_channels);
        host.controller().attach(LUN0, disk(backend, "one")).unwrap();
        host.controller().offer().unwrap();
        host
    }

    pub(crate) fn controller(&self) -> &ScsiController {
        self.controller.as_ref().unwrap()
    }

    /// The primary channel on the host's side.
    pub(crate) fn channel(&self) -> Channel {
        self.controller().channel().unwrap()
    }
}

pub(crate) fn disk(backend: Arc<dyn Backend>, serial: &str) -> Arc<Disk> {
    Disk::new(backend, &DiskOptions::new(serial)).unwrap()
}

pub(crate) fn ram(bytes: u64) -> Arc<RamBackend> {
    Arc::new(RamBackend::new(bytes).unwrap())
}

/// The guest's end of one channel.
pub(crate) struct Guest {
    pub(crate) channel: Channel,
    pub(crate) pages: PageRun,
    pub(crate) form: PacketForm,
    pub(crate) notices: Arc<Notices>,
}

/// Counts what the host says by itself.
#[derive(Default)]
pub(crate) struct Notices(AtomicUsize);

impl Notices {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl ProcessPacket for Notices {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        let (operation, _) = VstorPacket::peek(packet.payload()).unwrap();
        assert_eq!(operation, Operation::ENUMERATE_BUS);
        self.0.fetch_add(1, Ordering::SeqCst);
        packet.complete(&[]);
    }
}

/// Bytes of a guest's own buffer.
pub(crate) const GUEST_BYTES: u32 = 1 << 20;

impl Guest {
    /// Opens channel `index` of the controller; nothing is said yet.
    pub(crate) fn open(bus: &Arc<LoopbackBus>, index: u16) -> Self {
        let channel = Channel::allocate(Side::Client, Arc::clone(bus) as Arc<dyn Bus>);
        channel
            .client_init_set_target_pnp(vstor_wire::SCSI_INTERFACE, Some(INSTANCE), None)
            .unwrap();
        channel.init_set_subchannel_index(index).unwrap();
        channel.init_set_maximum_packet_size(256).unwrap();
        channel.init_set_maximum_external_data(4 << 20, 1024).unwrap();
        channel.client_init_set_ring_buffer_page_count(16, 16).unwrap();
        let notices = Arc::new(Notices::default());
        channel.init_set_process_packet_callbacks(notices.clone()).unwrap();
        channel.enable().unwrap();
        until("the channel never opened", || {
            channel.process(64);
            channel.state() == ChannelState::Active
        });
        let pages = channel.allocate_pages(GUEST_BYTES / 4096).unwrap();
        Self { channel, pages, form: PacketForm::Full, notices }
    }

    /// Opens the primary channel and initialises it for `version`.
    pub(crate) fn ready(bus: &Arc<LoopbackBus>, version: ProtocolVersion) -> Self {
        let mut guest = Self::open(bus, 0);
        guest.form = version.packet_form();
        guest.initialise(version);
        guest
    }

    pub(crate) fn initialise(&self, version: ProtocolVersion) {
        let query = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
        for step in [
            VstorPacket::request(Operation::BEGIN_INITIALIZATION),
            query.with_body(&ProtocolVersionBody::new(version)),
            VstorPacket::request(Operation::QUERY_PROPERTIES),
            VstorPacket::request(Operation::END_INITIALIZATION),
        ] {
            assert_eq!(self.call(&step).status(), NtStatus::SUCCESS, "{:?}", step.operation);
        }
    }

    /// Sends any bytes, and gives the bytes that come back.
    pub(crate) fn call_bytes(&self, bytes: &[u8], external: Option<&[GpaRange<'_>]>) -> Vec<u8> {
        let mut answer = vec![0; 256];
        let flags = SendFlags::WAIT_FOR_COMPLETION;
        let len = self
            .channel
            .send_synchronous_request(
                bytes,
                external,
                flags,
                Some(&mut answer),
                Timeout::After(PATIENCE),
            )
            .unwrap();
        answer.truncate(len);
        answer
    }

    /// Sends a packet in the guest's form; the answer must be in the same.
    pub(crate) fn call(&self, packet: &VstorPacket) -> VstorPacket {
        self.call_with(packet, None)
    }

    pub(crate) fn call_with(
        &self,
        packet: &VstorPacket,
        external: Option<&[GpaRange<'_>]>,
    ) -> VstorPacket {
        let bytes = self.call_bytes(packet.bytes(self.form), external);
        let (answer, form) = VstorPacket::parse(&bytes).unwrap();
        assert_eq!(form, self.form);
        assert_eq!(answer.operation, Operation::COMPLETE_IO);
        answer
    }

    /// Guest pages from byte `offset` of the buffer on, as page numbers.
    pub(crate) fn pfns(&self) -> Vec<u64> {
        self.pages.pfns().collect()
    }

    /// Executes an SRB with `bytes` bytes from the start of the buffer.
    pub(crate) fn execute(&self, srb: ScsiRequest, bytes: u32) -> ScsiRequest {
        let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        let pfns = self.pfns();
        let pages = bytes.div_ceil(4096) as usize;
        let range = [GpaRange { byte_count: bytes, byte_offset: 0, pfns: &pfns[..pages] }];
        let answer = self.call_with(&packet, (bytes > 0).then_some(&range[..]));
        assert_eq!(answer.status(), NtStatus::SUCCESS);
        answer.body()
    }

    /// Performs a command with data from or to the start of the buffer.
    pub(crate) fn command(
        &self,
        lun: ScsiAddress,
        command: Command,
        direction: DataDirection,
        bytes: u32,
    ) -> ScsiRequest {
        let cdb = command.encode().unwrap();
        self.execute(ScsiRequest::new(lun, &cdb, direction, bytes), bytes)
    }

    /// Whether `lun` can be read, which shows that everything still works.
    pub(crate) fn can_read(&self, lun: ScsiAddress) -> bool {
        let answer = self.command(lun, Command::read(0, 1), DataDirection::In, 512);
        answer.srb_status == SrbStatus::SUCCESS && answer.data_transfer_length.get() == 512
    }

    /// Sends an SRB and does not wait; the answer is thrown away.
    pub(crate) fn send(&self, packet: &VstorPacket, bytes: u32) {
        let pfns = self.pfns();
        let pages = bytes.div_ceil(4096) as usize;
        let range = [GpaRange { byte_count: bytes, byte_offset: 0, pfns: &pfns[..pages] }];
        let external = (bytes > 0).then_some(&range[..]);
        let flags = SendFlags::WAIT_FOR_COMPLETION;
        let free = self.channel.packet_allocate().unwrap();
        free.send(packet.bytes(self.form), external, flags).unwrap();
    }

    pub(crate) fn send_command(
        &self,
        lun: ScsiAddress,
        command: Command,
        direction: DataDirection,
        bytes: u32,
    ) {
        let cdb = command.encode().unwrap();
        let srb = ScsiRequest::new(lun, &cdb, direction, bytes);
        self.send(&VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb), bytes);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.channel.disable();
    }
}

/// The sense data of an answer.
pub(crate) fn sense(answer: &ScsiRequest) -> Option<SenseData> {
    answer.sense().map(|bytes| SenseData::parse_fixed(bytes).unwrap())
}

/// A back end that finishes nothing before it is told to.
pub(crate) struct Gate {
    event: OwnedFd,
    waiting: Mutex<Vec<IoRequest>>,
    open: AtomicBool,
    bytes: u64,
    pub(crate) result: Mutex<Result<(), IoError>>,
}

impl Gate {
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap(),
            waiting: Mutex::default(),
            open: AtomicBool::new(false),
            bytes,
            result: Mutex::new(Ok(())),
        })
    }

    /// How many requests wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.lock().unwrap().len()
    }

    /// Finishes everything that waits, and from now on everything that comes.
    pub(crate) fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Backend for Gate {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, _: &mut Vec<IoDone>) {
        self.waiting.lock().unwrap().append(requests);
        if self.open.load(Ordering::SeqCst) {
            self.open();
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        if self.open.load(Ordering::SeqCst) {
            let result = *self.result.lock().unwrap();
            let all = self.waiting.lock().unwrap().drain(..).collect::<Vec<_>>();
            done.extend(all.into_iter().map(|request| IoDone::finished(request, result)));
        }
    }
}
