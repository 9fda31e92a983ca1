//! A storage server for tests: as small as one can be, and as dishonest as a test wants it to be.
//! It serves one disk of 128 blocks from memory, at 0:0:0, over a loopback bus.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{Channel, ExternalDataFlags, Guid, IncomingPacket, NtStatus, ProcessPacket, Side};
use kmcl_worker::Worker;
use vsc_storage::wire::SCSI_INTERFACE;
use vsc_storage::wire::packet::{Operation, VstorPacket};
use vsc_storage::wire::protocol::{ChannelProperties, ProtocolVersionBody, SubChannelRequest};
use vsc_storage::wire::scsi::capacity::{Capacity10, Capacity16};
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::wire::scsi::inquiry::StandardInquiry;
use vsc_storage::wire::scsi::luns::{LunEntry, LunListHeader};
use vsc_storage::wire::scsi::sense::{AdditionalSense, SenseData, SenseKey};
use vsc_storage::wire::srb::{ScsiRequest, ScsiStatus, SrbStatus};
use vsc_storage::{ClientConfig, StorageClient};
use zerocopy::IntoBytes;

pub(crate) const INSTANCE: Guid = Guid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888);
pub(crate) const BLOCK: usize = 512;
pub(crate) const BLOCKS: usize = 128;
pub(crate) const DISK_BYTES: usize = BLOCK * BLOCKS;
pub(crate) const MAX_TRANSFER: u32 = 8192;

/// What the server does with a request, once it knows the honest answer.
pub(crate) enum Reply {
    Honest,
    /// Exactly these bytes instead.
    Bytes(Vec<u8>),
    /// Nothing, until [`Server::release`].
    Hold,
}

type Policy = Box<dyn Fn(&VstorPacket, &VstorPacket) -> Reply + Send + Sync>;

struct Core {
    bus: Arc<LoopbackBus>,
    worker: Weak<Worker>,
    myself: Weak<Core>,
    newest_version: u16,
    disk: Mutex<Vec<u8>>,
    policy: Mutex<Policy>,
    held: Mutex<Vec<(IncomingPacket, Vec<u8>)>>,
    channels: Mutex<Vec<Channel>>,
    log: Mutex<Vec<Operation>>,
    /// Subchannels are granted and never offered.
    forgetful: AtomicBool,
}

pub(crate) struct Server {
    core: Arc<Core>,
    worker: Arc<Worker>,
    pub(crate) bus: Arc<LoopbackBus>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with_version(0x0602)
    }

    pub(crate) fn with_version(newest_version: u16) -> Self {
        let bus = LoopbackBus::new(16 << 20).unwrap();
        let worker = Arc::new(Worker::spawn("test server").unwrap());
        let core = Arc::new_cyclic(|myself| Core {
            bus: Arc::clone(&bus),
            worker: Arc::downgrade(&worker),
            myself: myself.clone(),
            newest_version,
            disk: Mutex::new((0..DISK_BYTES).map(|at| (at / BLOCK) as u8).collect()),
            policy: Mutex::new(Box::new(|_, _| Reply::Honest)),
            held: Mutex::default(),
            channels: Mutex::default(),
            log: Mutex::default(),
            forgetful: AtomicBool::new(false),
        });
        core.offer(0);
        Self { core, worker, bus }
    }

    /// A client of this server, with short time-outs.
    pub(crate) fn client(&self, change: impl FnOnce(&mut ClientConfig)) -> StorageClient {
        StorageClient::connect(self.bus.clone(), config(change)).unwrap()
    }

    pub(crate) fn set_policy(
        &self,
        policy: impl Fn(&VstorPacket, &VstorPacket) -> Reply + Send + Sync + 'static,
    ) {
        *self.core.policy.lock().unwrap() = Box::new(policy);
    }

    /// Grants subchannels from now on, and does not offer them.
    pub(crate) fn forget_sub_channels(&self) {
        self.core.forgetful.store(true, Relaxed);
    }

    /// Waits until `count` requests are held.
    pub(crate) fn wait_held(&self, count: usize) {
        let started = Instant::now();
        while self.core.held.lock().unwrap().len() < count {
            assert!(started.elapsed() < Duration::from_secs(10), "{count} requests never came");
            std::thread::yield_now();
        }
    }

    /// Answers what was held, in the order that `order` makes of it.
    pub(crate) fn release(&self, order: impl FnOnce(&mut Vec<(IncomingPacket, Vec<u8>)>)) {
        let mut held = std::mem::take(&mut *self.core.held.lock().unwrap());
        order(&mut held);
        for (packet, answer) in held {
            packet.complete(&answer);
        }
    }

    /// Says something unasked.
    pub(crate) fn say(&self, operation: Operation) {
        let channel = self.core.channels.lock().unwrap()[0].clone();
        let packet = channel.packet_allocate().unwrap();
        let message = VstorPacket::notice(operation);
        packet.send(message.as_bytes(), None, kmcl::SendFlags::empty()).unwrap();
    }

    /// Withdraws everything and answers nothing, as a server does that dies.
    pub(crate) fn die(&self) {
        let channels: Vec<_> = self.core.channels.lock().unwrap().drain(..).collect();
        for channel in &channels {
            channel.begin_disable();
        }
        // From here on the channels let nothing out; what they wait for is that nothing is left.
        for channel in &channels {
            while channel.state().is_open() {
                std::thread::yield_now();
            }
        }
        self.core.held.lock().unwrap().drain(..).for_each(|(packet, _)| packet.fail());
    }

    pub(crate) fn disk(&self) -> Vec<u8> {
        self.core.disk.lock().unwrap().clone()
    }

    pub(crate) fn operations(&self) -> Vec<Operation> {
        self.core.log.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A request that arrives from now on must not be held: `disable` would wait for it for ever.
        self.set_policy(|_, _| Reply::Honest);
        self.core.held.lock().unwrap().drain(..).for_each(|(packet, _)| packet.complete(&[]));
        for channel in self.core.channels.lock().unwrap().drain(..) {
            channel.disable();
            self.worker.remove(&channel);
        }
    }
}

/// A configuration with short time-outs.
pub(crate) fn config(change: impl FnOnce(&mut ClientConfig)) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.connect_timeout = Duration::from_secs(10);
    config.request_timeout = Duration::from_secs(10);
    config.ring_pages = 8;
    change(&mut config);
    config
}

impl Core {
    fn offer(&self, subchannel: u16) {
        let (Some(worker), Some(myself)) = (self.worker.upgrade(), self.myself.upgrade()) else {
            return;
        };
        let channel = Channel::allocate(Side::Server, self.bus.clone());
        channel.init_set_maximum_packet_size(64).unwrap();
        channel.init_set_maximum_external_data(1 << 20, 1).unwrap();
        channel.init_set_maximum_completion_size(128).unwrap();
        channel.init_set_subchannel_index(subchannel).unwrap();
        channel.init_set_process_packet_callbacks(myself).unwrap();
        channel.server_init_set_target_interface_id(SCSI_INTERFACE, INSTANCE).unwrap();
        worker.add(&channel).unwrap();
        channel.enable().unwrap();
        channel.start();
        self.channels.lock().unwrap().push(channel);
    }

    /// The honest answer.
    fn answer(&self, request: &VstorPacket, packet: &IncomingPacket) -> VstorPacket {
        let ok = VstorPacket::answer(NtStatus::SUCCESS);
        match request.operation {
            Operation::QUERY_PROTOCOL_VERSION => {
                let asked = request.body::<ProtocolVersionBody>().version();
                let known = asked.0 <= self.newest_version;
                VstorPacket::answer(if known {
                    NtStatus::SUCCESS
                } else {
                    NtStatus::REVISION_MISMATCH
                })
            }
            Operation::QUERY_PROPERTIES => {
                let mut properties: ChannelProperties = ok.body();
                properties.flags = ChannelProperties::MULTI_CHANNEL.into();
                properties.max_sub_channel_count = 3.into();
                properties.max_transfer_bytes = MAX_TRANSFER.into();
                ok.with_body(&properties)
            }
            Operation::CREATE_SUB_CHANNELS => {
                if self.forgetful.load(Relaxed) {
                    return ok;
                }
                (1..=request.body::<SubChannelRequest>().count.get()).for_each(|i| self.offer(i));
                ok
            }
            Operation::EXECUTE_SRB => {
                let mut srb: ScsiRequest = request.body();
                self.execute(&mut srb, packet);
                ok.with_body(&srb)
            }
            _ => ok,
        }
    }

    fn execute(&self, srb: &mut ScsiRequest, packet: &IncomingPacket) {
        let refused = |code| SenseData::new(SenseKey::IllegalRequest, code).to_fixed();
        let address = srb.address();
        let command = Command::parse(srb.cdb().unwrap());
        if address.path != 0 || address.target != 0 || address.lun != 0 {
            return srb.finish(SrbStatus::INVALID_LUN, ScsiStatus::GOOD, 0);
        }
        let mut disk = self.disk.lock().unwrap();
        let data = match command {
            Ok(Command::Inquiry { page: None, .. }) => StandardInquiry::disk().as_bytes().to_vec(),
            Ok(Command::ReportLuns { .. }) => {
                [LunListHeader::new(1).as_bytes(), LunEntry::new(0).as_bytes()].concat()
            }
            Ok(Command::ReadCapacity10) => {
                Capacity10::new(BLOCKS as u64 - 1, BLOCK as u32).as_bytes().to_vec()
            }
            Ok(Command::ReadCapacity16 { .. }) => {
                Capacity16::new(BLOCKS as u64 - 1, BLOCK as u32, 0).as_bytes().to_vec()
            }
            Ok(Command::Read(read)) => match range(read.extent.lba, read.extent.blocks) {
                Some(range) => disk[range].to_vec(),
                None => {
                    let sense = refused(AdditionalSense::LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE);
                    return srb.finish_with_sense(SrbStatus::ERROR, 0, &sense);
                }
            },
            Ok(Command::Write(write)) => {
                let range = range(write.extent.lba, write.extent.blocks).unwrap();
                let data = packet.external_data(ExternalDataFlags::READ_ONLY).unwrap();
                let bytes = range.len() as u32;
                data.read_at(0, &mut disk[range]).unwrap();
                return srb.finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, bytes);
            }
            Ok(Command::TestUnitReady | Command::SynchronizeCache { .. }) => Vec::new(),
            _ => {
                let sense = refused(AdditionalSense::INVALID_COMMAND_OPERATION_CODE);
                return srb.finish_with_sense(SrbStatus::ERROR, 0, &sense);
            }
        };
        let length = data.len().min(srb.data_transfer_length.get() as usize);
        if length > 0 {
            let external = packet.external_data(ExternalDataFlags::empty()).unwrap();
            external.write_at(0, &data[..length]).unwrap();
        }
        srb.finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, length as u32);
    }
}

fn range(lba: u64, blocks: u32) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(lba).ok()?.checked_mul(BLOCK)?;
    let end = start + blocks as usize * BLOCK;
    (end <= DISK_BYTES).then_some(start..end)
}

impl ProcessPacket for Core {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let (request, form) = VstorPacket::parse(packet.payload()).unwrap();
        self.log.lock().unwrap().push(request.operation);
        let honest = self.answer(&request, &packet);
        match (self.policy.lock().unwrap())(&request, &honest) {
            Reply::Honest => packet.complete(honest.bytes(form)),
            Reply::Bytes(bytes) => packet.complete(&bytes),
            Reply::Hold => {
                self.held.lock().unwrap().push((packet, honest.bytes(form).to_vec()));
            }
        }
    }
}
