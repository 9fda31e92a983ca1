//! The controller: what ties channels, LUNs and requests together.

mod completions;
mod frozen;
mod handshake;
mod lane;
mod luns;
mod requests;
mod reset;
mod restore;
mod resume;
mod save;

use std::error::Error as StdError;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelState, Guid, IncomingPacket, NtStatus, Side};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vstor_wire::packet::{MAX_PACKET_BYTES, PacketForm, VstorPacket};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::srb::ScsiAddress;

use self::frozen::Bell;
use self::handshake::{Effect, Handshake};
use self::lane::Lane;
use self::luns::Luns;
use self::reset::{PendingReset, ResetScope};
use crate::disk::{Disk, MAX_TRANSFER_BYTES};
use crate::driver::Driver;
use crate::scsi::bus::LunError;

pub use self::completions::Completions;
pub use self::frozen::{FrozenController, PausedController};
pub use self::requests::REQUESTS_PER_CHANNEL;
pub use self::restore::{
    AttachError, ControllerRestoreError, EnableError, RestoreChannelError, RestoringController,
    SavedDisk, StartError,
};
pub use self::save::{ControllerSave, SavedStream, StreamSave, StreamSaveError};

/// Most subchannels a controller may have.
pub const MAX_SUB_CHANNELS: u16 = 64;

/// Most ranges of guest memory a request's data may come in. Guests send one.
const MAX_DATA_RANGES: u32 = 32;

/// How a controller shows itself.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Instance of the offer: tells the controllers of a guest apart. A guest knows it again by it.
    pub instance: Guid,
    /// Most subchannels a guest may ask for, up to [`MAX_SUB_CHANNELS`]: channels beside the primary
    /// one, each with rings of its own, so that several processors and threads can work at a time.
    pub max_sub_channels: u16,
    /// What log lines call it.
    pub name: String,
}

impl ControllerConfig {
    /// A controller without subchannels.
    #[must_use]
    pub fn new(instance: Guid) -> Self {
        Self { instance, max_sub_channels: 0, name: String::from("scsi") }
    }
}

/// Why a call on a controller was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControllerError {
    /// The address or the disk is not free.
    #[error(transparent)]
    Lun(#[from] LunError),
    /// The library or the bus refuses.
    #[error("the storage channel cannot be offered: {0}")]
    Channel(#[from] kmcl::Error),
    /// The driver refuses.
    #[error("the storage controller cannot be driven: {0}")]
    Driver(#[source] Box<dyn StdError + Send + Sync>),
    /// The controller is being closed.
    #[error("the storage controller is closed")]
    Closed,
    /// Subchannels of the guest's former initialisation have requests to finish.
    #[error("subchannels of the former initialisation are still closing")]
    SubChannelsClosing,
    /// It is frozen or paused, to be saved.
    #[error("the storage controller is being saved")]
    Held,
    /// Back ends still work on requests of the frozen controller: STATUS_DEVICE_BUSY. See
    /// [`FrozenController::wait`].
    #[error("{requests} disk requests are still running")]
    Running {
        /// How many.
        requests: u32,
    },
    /// The state cannot be said in the version of the format that was asked for.
    #[error(transparent)]
    Format(#[from] saved_state::WriteError),
    /// The system has no descriptor left.
    #[error("the disk's completions cannot be waited for: {0}")]
    Descriptor(#[source] std::io::Error),
}

/// A SCSI controller that guests find over a bus; see the [crate].
///
/// Dropping it withdraws it, as [`ScsiController::close`] does.
pub struct ScsiController {
    core: Arc<Core>,
}

/// What the controller, its channels and its disks share.
struct Core {
    myself: Weak<Self>,
    bus: Arc<dyn Bus>,
    driver: Arc<dyn Driver>,
    config: ControllerConfig,
    luns: Luns,
    handshake: Mutex<Handshake>,
    /// Mirrors whether SRBs are welcome, and in which form: a `FORM_*` constant.
    form: AtomicU8,
    lanes: RwLock<Lanes>,
    /// It is frozen or paused to be saved: what it is made of does not change.
    is_held: AtomicBool,
    /// Rung when a channel of a frozen controller has settled.
    bell: Mutex<Option<Arc<Bell>>>,
}

/// The channels.
#[derive(Default)]
struct Lanes {
    /// The primary channel, then subchannels by index.
    present: Vec<(Channel, Arc<Lane>)>,
    /// Subchannels of the past, until they are Disabled: their requests still finish.
    retired: Vec<(Channel, Arc<Lane>)>,
    next_id: u32,
}

impl Lanes {
    fn iter(&self) -> impl Iterator<Item = &(Channel, Arc<Lane>)> {
        self.present.iter().chain(&self.retired)
    }
}

const FORM_NONE: u8 = 0;
const FORM_COMPACT: u8 = 1;
const FORM_FULL: u8 = 2;

/// A lock whose holder panicked guards data that is still whole: every change to it is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ScsiController {
    /// A controller for the guest behind `bus`, not offered yet: attach disks first. `driver` runs
    /// it.
    ///
    /// # Errors
    /// [`ControllerError::Channel`], [`ControllerError::Driver`].
    pub fn new(
        bus: Arc<dyn Bus>,
        driver: Arc<dyn Driver>,
        config: ControllerConfig,
    ) -> Result<Self, ControllerError> {
        let core = Core::new(bus, driver, config);
        core.add_lane(0)?;
        Ok(Self { core })
    }

    /// Offers the controller to the guest.
    ///
    /// # Errors
    /// [`ControllerError::Channel`], also if it is offered already.
    pub fn offer(&self) -> Result<(), ControllerError> {
        self.core.offer_lane(0)
    }

    /// Puts `disk` at `address`. A guest that runs is told.
    ///
    /// # Errors
    /// [`ControllerError::Lun`] for an address out of reach or taken, or a disk that is attached
    /// elsewhere; [`ControllerError::Driver`], [`ControllerError::Descriptor`].
    pub fn attach(&self, address: ScsiAddress, disk: Arc<Disk>) -> Result<(), ControllerError> {
        self.core.attach(address, disk)
    }

    /// Takes the disk at `address` away. A guest that runs is told. Requests under way finish: the
    /// disk is unused when no other handle to it is left.
    ///
    /// # Errors
    /// [`LunError::Empty`].
    pub fn detach(&self, address: ScsiAddress) -> Result<Arc<Disk>, LunError> {
        self.core.detach(address)
    }

    /// The primary channel, to look at.
    #[must_use]
    pub fn channel(&self) -> Option<Channel> {
        self.core.channel(0)
    }

    /// Requests in flight on all channels: those that were never given to a back end, and those that
    /// were.
    #[must_use]
    pub fn in_flight(&self) -> (usize, usize) {
        let lanes = self.core.read_lanes();
        lanes
            .iter()
            .map(|(_, lane)| lane.requests().count())
            .fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
    }

    /// Withdraws the controller from the guest, and returns when every request has finished and
    /// nothing of it is left. Not to be called in a callback of its own.
    pub fn close(self) {
        drop(self);
    }
}

impl fmt::Debug for ScsiController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gathered, submitted) = self.in_flight();
        f.debug_struct("ScsiController")
            .field("name", &self.core.config.name)
            .field("in_flight", &(gathered + submitted))
            .finish_non_exhaustive()
    }
}

impl Drop for ScsiController {
    fn drop(&mut self) {
        self.core.close();
    }
}

impl Core {
    /// A controller without channels.
    fn new(bus: Arc<dyn Bus>, driver: Arc<dyn Driver>, config: ControllerConfig) -> Arc<Self> {
        let max_sub_channels = config.max_sub_channels.min(MAX_SUB_CHANNELS);
        Arc::new_cyclic(|myself| Self {
            myself: myself.clone(),
            bus,
            driver,
            config: ControllerConfig { max_sub_channels, ..config },
            luns: Luns::default(),
            handshake: Mutex::new(Handshake::new(max_sub_channels)),
            form: AtomicU8::new(FORM_NONE),
            lanes: RwLock::default(),
            is_held: AtomicBool::new(false),
            bell: Mutex::new(None),
        })
    }

    fn is_held(&self) -> bool {
        self.is_held.load(Ordering::Acquire)
    }

    /// SRBs are welcome from now on, in this version's form, or not.
    fn set_form(&self, version: Option<ProtocolVersion>) {
        let form = match version.map(ProtocolVersion::packet_form) {
            Some(PacketForm::Full) => FORM_FULL,
            Some(PacketForm::Compact) => FORM_COMPACT,
            None => FORM_NONE,
        };
        self.form.store(form, Ordering::Release);
    }

    /// In which form SRBs are welcome, if they are.
    fn ready_form(&self) -> Option<PacketForm> {
        match self.form.load(Ordering::Acquire) {
            FORM_FULL => Some(PacketForm::Full),
            FORM_COMPACT => Some(PacketForm::Compact),
            _ => None,
        }
    }

    fn read_lanes(&self) -> RwLockReadGuard<'_, Lanes> {
        self.lanes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lanes(&self) -> RwLockWriteGuard<'_, Lanes> {
        self.lanes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present channel of this index: 0 is the primary one.
    fn channel(&self, index: u16) -> Option<Channel> {
        self.read_lanes().present.get(usize::from(index)).map(|(channel, _)| channel.clone())
    }

    fn lane_by_id(&self, id: u32) -> Option<(Channel, Arc<Lane>)> {
        let lanes = self.read_lanes();
        let found = lanes.iter().find(|(_, lane)| lane.id == id);
        found.map(|(channel, lane)| (channel.clone(), Arc::clone(lane)))
    }

    // ---- Channels ---------------------------------------------------------------------------------

    /// Makes the channel of lane `index`, the next one.
    fn add_lane(&self, index: u16) -> Result<(), ControllerError> {
        let channel = Channel::allocate(Side::Server, Arc::clone(&self.bus));
        let id = {
            let mut lanes = self.write_lanes();
            lanes.next_id = lanes.next_id.wrapping_add(1);
            lanes.next_id
        };
        let lane = Lane::new(id, index, self.myself.upgrade().ok_or(ControllerError::Closed)?);
        let ControllerConfig { instance, name, .. } = &self.config;
        // A constant.
        let packet_bytes = u32::try_from(MAX_PACKET_BYTES).unwrap_or(u32::MAX);
        channel.init_set_friendly_name(&format!("{name}/{index}"))?;
        channel.init_set_maximum_packet_size(packet_bytes)?;
        channel.init_set_maximum_completion_size(packet_bytes)?;
        channel.init_set_maximum_packet_count(REQUESTS_PER_CHANNEL)?;
        channel.init_set_maximum_external_data(MAX_TRANSFER_BYTES, MAX_DATA_RANGES)?;
        channel.init_set_subchannel_index(index)?;
        channel.init_set_process_packet_callbacks(Arc::clone(&lane) as _)?;
        channel.init_set_state_change_callbacks(Arc::clone(&lane) as _)?;
        channel.server_init_set_save_restore_packet_callbacks(Arc::clone(&lane) as _)?;
        channel.server_init_set_target_interface_id(vstor_wire::SCSI_INTERFACE, *instance)?;
        // Giving requests to the kernel may sleep for a moment.
        channel.set_incoming_processing_at_passive(true);
        self.driver.add_channel(&channel).map_err(ControllerError::Driver)?;
        self.write_lanes().present.push((channel, lane));
        Ok(())
    }

    fn offer_lane(&self, index: u16) -> Result<(), ControllerError> {
        if let Some(channel) = self.channel(index) {
            channel.enable()?;
            channel.start();
        }
        Ok(())
    }

    /// A packet of the initialisation.
    fn initialise(&self, request: &VstorPacket) -> VstorPacket {
        let (answer, effect) = lock(&self.handshake).on(request);
        match effect {
            Effect::None => {}
            Effect::StartOver => {
                self.set_form(None);
                self.retire_sub_channels();
            }
            Effect::Ready(version) => {
                self.luns.table().forget_changes();
                self.set_form(Some(version));
            }
            Effect::OfferSubChannels(count) => {
                if let Err(error) = self.offer_sub_channels(count) {
                    tracing::warn!(%error, count, "no subchannels");
                    self.retire_sub_channels();
                    lock(&self.handshake).take_sub_channels_back();
                    return VstorPacket::answer(NtStatus::INSUFFICIENT_RESOURCES);
                }
            }
        }
        answer
    }

    fn offer_sub_channels(&self, count: u16) -> Result<(), ControllerError> {
        self.sweep();
        if !self.read_lanes().retired.is_empty() {
            // Offers of the past with the same indices still stand, for the moment.
            return Err(ControllerError::SubChannelsClosing);
        }
        for index in 1..=count {
            self.add_lane(index)?;
            self.offer_lane(index)?;
        }
        Ok(())
    }

    /// The primary channel was opened or closed: nothing is agreed any more.
    fn start_over(&self) {
        self.set_form(None);
        lock(&self.handshake).reset();
        self.retire_sub_channels();
    }

    /// Withdraws the subchannels. Their requests finish; then they are Disabled, and [`Self::sweep`]
    /// drops them.
    fn retire_sub_channels(&self) {
        let subs: Vec<Channel> = {
            let mut lanes = self.write_lanes();
            let primary = 1.min(lanes.present.len());
            let subs = lanes.present.split_off(primary);
            let channels = subs.iter().map(|(channel, _)| channel.clone()).collect();
            lanes.retired.extend(subs);
            channels
        };
        for channel in &subs {
            channel.begin_disable();
        }
        self.sweep();
    }

    /// Drops subchannels that have ended.
    fn sweep(&self) {
        let ended: Vec<_> = {
            let mut lanes = self.write_lanes();
            let all = std::mem::take(&mut lanes.retired);
            let (ended, rest) = all.into_iter().partition(|(channel, _)| is_disabled(channel));
            lanes.retired = rest;
            ended
        };
        for (channel, _) in ended {
            self.driver.remove_channel(&channel);
            channel.cleanup();
        }
    }

    /// See [`ScsiController::close`].
    fn close(&self) {
        // The primary channel first: it could still be making subchannels.
        if let Some(primary) = self.channel(0) {
            self.driver.remove_channel(&primary);
        }
        let channels: Vec<Channel> =
            self.read_lanes().iter().map(|(channel, _)| channel.clone()).collect();
        let completions = self.luns.take_completions();
        // From here on this thread drives what is left: the driver's may have ended already.
        for channel in &channels {
            self.driver.remove_channel(channel);
            channel.begin_disable();
        }
        for one in &completions {
            self.driver.remove_completions(one);
        }
        while !channels.iter().all(is_disabled) {
            for channel in &channels {
                channel.process(REQUESTS_PER_CHANNEL);
            }
            for one in &completions {
                one.ready();
            }
            if !channels.iter().all(is_disabled) {
                wait_for(&completions);
            }
        }
        // Lanes hold the controller, and it holds them.
        drop(std::mem::take(&mut *self.write_lanes()));
        for channel in channels {
            channel.cleanup();
        }
        self.luns.clear();
    }

    // ---- Resets -----------------------------------------------------------------------------------

    /// A reset: answered when everything that it concerns has ended.
    fn reset(&self, packet: IncomingPacket, request: &VstorPacket, form: PacketForm) {
        if self.ready_form().is_none() {
            let answer = VstorPacket::answer(NtStatus::INVALID_DEVICE_STATE);
            return packet.complete(answer.bytes(form));
        }
        let reset = Arc::new(PendingReset::new(packet, form));
        let scope = ResetScope::of(request);
        for (_, lane) in self.read_lanes().iter() {
            let mut requests = lane.requests();
            requests.hold_reset(&reset, scope);
            if lane.is_resuming.load(Ordering::Relaxed) {
                requests.abort(scope);
            }
        }
        reset.release();
    }
}

fn is_disabled(channel: &Channel) -> bool {
    channel.state() == ChannelState::Disabled
}

/// Waits until a back end has finished something, but not for long: other things may be waited for.
fn wait_for(completions: &[Arc<Completions>]) {
    let mut fds: Vec<PollFd<'_>> =
        completions.iter().map(|one| PollFd::new(&**one, PollFlags::IN)).collect();
    let limit = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    // An interruption is as good as a time-out.
    let _ = poll(&mut fds, Some(&limit));
}
