//! Saving the host, and going on: in the same host, or in another one.
//!
//! What is saved is what another process would read: the streams of the bus, of the storage controller
//! and of every channel, and what the other devices keep. The guest, its memory, its disk, and messages
//! on their way are where they are.

use std::sync::Arc;

use kmcl::{Channel, ChannelState, Frozen, Restored, Save, SaveOptions};
use saved_state::input::ChunkInput;
use vmbus_host::{HeldBus, HostBus};
use vmbus_memory::MappingBudget;
use vsp_storage::block::TestBackend;
use vsp_storage::{FrozenController, RestoringController, ScsiController};

use crate::gadget::device::DeviceState;
use crate::host::{self, Devices, Host};
use crate::rng::Rng;
use crate::storage;
use crate::tasks::Tasks;
use crate::wires::{HostEnd, Wires};
use crate::world::World;

/// What keeps a host as it is, to be saved. Let go of in this order.
pub(crate) struct Hold {
    storage: Option<FrozenController>,
    gadget: Option<Frozen>,
    churn: Option<Frozen>,
    bus: HeldBus,
}

/// A host in bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SavedWorld {
    bus: Vec<u8>,
    /// The controller, then its channels.
    storage: Vec<Vec<u8>>,
    gadget: Option<Vec<u8>>,
    gadget_state: DeviceState,
    churn: Option<Vec<u8>>,
    offered: [bool; 3],
    withdrawals_left: u32,
    withdrawal_due: u64,
}

impl World {
    /// Freezes the host: from now on only what is under way in its devices comes to its end.
    pub fn freeze(&mut self) {
        self.log.line(format_args!("freeze"));
        let host = self.host.as_ref().expect("there is a host");
        let bus = host.bus.hold();
        let freeze = |channel: &Channel| {
            let is_there = channel.state() != ChannelState::Disabled;
            is_there.then(|| channel.freeze().expect("not frozen yet"))
        };
        let storage = host.offered[0].then(|| host.controller.freeze().expect("not frozen yet"));
        let gadget = freeze(host.gadget.channel());
        let churn = freeze(host.churn.channel());
        self.hold = Some(Hold { storage, gadget, churn, bus });
    }

    /// Whether nothing is under way in the devices of a frozen host: it can be saved.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let Some(Hold { storage, gadget, churn, .. }) = &self.hold else { return false };
        storage.as_ref().is_none_or(|frozen| frozen.running() == 0)
            && [gadget, churn].into_iter().flatten().all(|frozen| frozen.running() == 0)
    }

    /// Saves a host that was frozen and has settled, through buffers of `buffer` bytes at first.
    #[must_use]
    pub fn save(&mut self, buffer: usize) -> SavedWorld {
        let (hold, host) =
            (self.hold.as_ref().expect("frozen"), self.host.as_ref().expect("there"));
        let options = SaveOptions::default();
        let channel = |frozen: &Option<Frozen>| {
            let save = frozen.as_ref()?.save().expect("the channel has settled");
            Some(write(save, buffer))
        };
        let storage = hold.storage.iter().flat_map(|frozen| {
            let streams = frozen.streams(&options).expect("the controller has settled");
            streams.into_iter().map(|stream| write(stream.save, buffer)).collect::<Vec<_>>()
        });
        SavedWorld {
            bus: write(hold.bus.save(&options).expect("in the newest format"), buffer),
            storage: storage.collect(),
            gadget: channel(&hold.gadget),
            gadget_state: host.gadget.state(),
            churn: channel(&hold.churn),
            offered: host.offered,
            withdrawals_left: host.withdrawals_left,
            withdrawal_due: host.withdrawal_due,
        }
    }

    /// Lets a frozen host go on as if nothing had happened.
    pub fn thaw(&mut self) {
        self.log.line(format_args!("thaw"));
        self.hold = None;
        self.look();
    }

    /// Ends a host that was frozen and has settled, as the end of its process would: nobody is told.
    /// Signals on their way are lost; what it has begun on its disk is not.
    pub fn kill_host(&mut self) {
        self.log.line(format_args!("the host is gone"));
        let Hold { storage, gadget, churn, bus } = self.hold.take().expect("frozen");
        self.wires.cut_host();
        storage.into_iter().for_each(FrozenController::move_away);
        [gadget, churn].into_iter().flatten().for_each(Frozen::move_away);
        bus.move_away();
        let host = self.host.take().expect("there was a host");
        host.abandon();
        self.ghosts.push(host.backend);
    }

    /// Has another host go on with the state of one that is gone.
    ///
    /// # Errors
    /// What stands in the way, in words.
    pub fn restore(&mut self, saved: &SavedWorld) -> Result<(), String> {
        assert!(self.host.is_none(), "two hosts of one guest");
        self.log.line(format_args!("restore"));
        let restored = self.come_back(saved, true)?;
        self.log.set_frozen(false);
        self.host = Some(restored.start(saved));
        self.look();
        Ok(())
    }

    /// Has another host try to go on with a state that is damaged, beside the one that is frozen.
    ///
    /// # Errors
    /// What stands in the way, in words: as it should.
    pub fn try_restore(&mut self, damaged: &SavedWorld) -> Result<(), String> {
        assert!(self.hold.is_some(), "two hosts of one guest");
        self.log.line(format_args!("restore of a damaged state"));
        self.come_back(damaged, false).map(Comeback::give_up)
    }

    /// Another host with this state, which is not at work yet. It is the guest's from its first word on,
    /// or its words go nowhere.
    fn come_back(&mut self, saved: &SavedWorld, is_the_host: bool) -> Result<Comeback, String> {
        let mut comeback = Comeback::new(self, saved)?;
        let mut rng = self.rng.fork();
        let end = is_the_host.then_some(&*self.wires);
        match comeback.restore(saved, end, &mut rng) {
            Ok(()) => Ok(comeback),
            Err(error) => {
                comeback.give_up();
                Err(error)
            }
        }
    }
}

/// A host on its way back.
struct Comeback {
    end: Arc<HostEnd>,
    bus: HostBus,
    tasks: Arc<Tasks>,
    backend: Arc<TestBackend>,
    controller: Controller,
    devices: Devices,
}

/// A storage controller that was saved, or one that was not offered yet.
enum Controller {
    Restoring(RestoringController),
    New(ScsiController),
}

impl Comeback {
    fn new(world: &mut World, saved: &SavedWorld) -> Result<Self, String> {
        let end = world.wires.new_host_end();
        let port = Arc::clone(&end) as _;
        let bus = HostBus::restoring(port, MappingBudget::default(), &saved.bus);
        let bus = bus.map_err(in_words("bus"))?;
        let tasks = Tasks::new(world.rng.fork());
        let (backend, disk) = host::new_disk(&world.medium);
        let config = host::controller_config(&world.plan);
        let (for_controller, driver) = (Arc::new(bus.clone()), Arc::clone(&tasks) as _);
        let controller = match saved.storage.first() {
            Some(state) => {
                let state = &state[..];
                let restoring = ScsiController::restoring(for_controller, driver, config, state);
                let mut restoring = restoring.map_err(in_words("controller"))?;
                restoring.attach(storage::ADDRESS, disk).map_err(in_words("disk"))?;
                Controller::Restoring(restoring)
            }
            None => {
                let controller = ScsiController::new(for_controller, driver, config);
                let controller = controller.map_err(in_words("controller"))?;
                controller.attach(storage::ADDRESS, disk).map_err(in_words("disk"))?;
                Controller::New(controller)
            }
        };
        let devices = Devices::new(&world.plan, &world.log, &bus, &tasks, &mut world.rng);
        Ok(Self { end, bus, tasks, backend, controller, devices })
    }

    /// The devices of one channel, as far as they were offered, and the states of these.
    fn channels<'a>(
        &'a self,
        saved: &'a SavedWorld,
    ) -> impl Iterator<Item = (&'a Channel, &'a [u8])> {
        let gadget = (self.devices.gadget.channel(), &saved.gadget);
        let churn = (self.devices.churn.channel(), &saved.churn);
        [gadget, churn]
            .into_iter()
            .filter_map(|(channel, state)| Some((channel, state.as_deref()?)))
    }

    fn restore(
        &mut self,
        saved: &SavedWorld,
        wires: Option<&Wires>,
        rng: &mut Rng,
    ) -> Result<(), String> {
        if let Controller::Restoring(restoring) = &self.controller {
            restoring.enable().map_err(in_words("controller"))?;
        }
        for (channel, _) in self.channels(saved) {
            channel.enable().map_err(in_words("offer"))?;
        }
        self.devices.gadget.set_state(&saved.gadget_state);
        // Before the rings come, or after: both are allowed. But a channel that has its rings sends what
        // was queued: where another host may have to go on, everything comes first.
        let is_early = rng.once_in(2) || wires.is_none();
        if is_early {
            self.restore_channels(saved, rng)?;
        }
        if let Some(wires) = wires {
            wires.take_over(&self.end);
        }
        self.bus.finish_restore().map_err(in_words("bus"))?;
        // The rings come by an event. Devices are at work only when it was handled.
        self.tasks.run_all();
        if !is_early {
            self.restore_channels(saved, rng)?;
        }
        Ok(())
    }

    fn restore_channels(&mut self, saved: &SavedWorld, rng: &mut Rng) -> Result<(), String> {
        self.devices.gadget.set_restoring(true);
        for (channel, state) in self.channels(saved) {
            if rng.once_in(2) {
                channel.restore_from(state).map_err(in_words("channel"))?;
            } else {
                let mut input = ChunkInput::new(state);
                let mut restore = channel.restore().map_err(in_words("channel"))?;
                let mut fed = Restored::More;
                while let Some(chunk) = input.next().map_err(in_words("channel"))? {
                    fed = restore.feed(chunk).map_err(in_words("channel"))?;
                }
                if fed != Restored::Complete {
                    return Err(String::from("channel: the state has no end"));
                }
            }
        }
        if let Controller::Restoring(restoring) = &mut self.controller {
            for (index, state) in (0..).zip(saved.storage.iter().skip(1)) {
                let restored = restoring.restore_channel(index, &state[..]);
                restored.map_err(in_words("storage channel"))?;
            }
        }
        self.devices.gadget.set_restoring(false);
        Ok(())
    }

    fn start(self, saved: &SavedWorld) -> Host {
        self.channels(saved).for_each(|(channel, _)| channel.start());
        let Self { bus, tasks, backend, controller, devices, .. } = self;
        let controller = match controller {
            Controller::New(controller) => controller,
            Controller::Restoring(restoring) => restoring.start().expect("all is restored"),
        };
        let mut host =
            Host { offered: saved.offered, ..Host::of(bus, tasks, backend, controller, devices) };
        host.withdrawals_left = saved.withdrawals_left;
        host.withdrawal_due = saved.withdrawal_due;
        host
    }

    fn give_up(self) {
        self.devices.abandon();
    }
}

/// Makes an error words that say where it comes from.
fn in_words<E: std::fmt::Display>(whose: &str) -> impl Fn(E) -> String {
    move |error| format!("{whose}: {error}")
}

/// All that a save gives, through a buffer that grows from `first` bytes to what is needed.
fn write(mut save: impl Save, first: usize) -> Vec<u8> {
    let (mut state, mut buffer) = (Vec::new(), vec![0; first]);
    loop {
        let step = save.step(&mut buffer).expect("nothing stands in the way of a save");
        state.extend_from_slice(&buffer[..step.written]);
        if step.done {
            return state;
        }
        assert!(step.needed > 0, "a save neither goes on nor says what it needs");
        if step.written == 0 {
            assert!(step.needed > buffer.len(), "a buffer of the size asked for is not used");
            buffer.resize(step.needed, 0);
        }
    }
}

impl SavedWorld {
    fn streams(&self) -> impl Iterator<Item = &Vec<u8>> {
        let channels = [&self.gadget, &self.churn].into_iter().flatten();
        [&self.bus].into_iter().chain(&self.storage).chain(channels)
    }

    fn streams_mut(&mut self) -> impl Iterator<Item = &mut Vec<u8>> {
        let channels = [&mut self.gadget, &mut self.churn].into_iter().flatten();
        [&mut self.bus].into_iter().chain(&mut self.storage).chain(channels)
    }

    /// Chunks of all streams.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.streams().map(|stream| chunk_ends(stream).len()).sum()
    }

    /// Bytes of all streams.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.streams().map(Vec::len).sum()
    }

    /// The same state with `damage` done to chunk `chunk`, counted over all streams.
    #[must_use]
    pub fn damaged(&self, chunk: usize, damage: Damage, rng: &mut Rng) -> Self {
        let mut damaged = self.clone();
        let mut left = chunk;
        for stream in damaged.streams_mut() {
            let ends = chunk_ends(stream);
            if left >= ends.len() {
                left -= ends.len();
                continue;
            }
            let begin = left.checked_sub(1).map_or(0, |before| ends[before]);
            let end = ends[left];
            match damage {
                // What is behind the last chunk is another stream's, for whoever reads this one.
                Damage::Doubled if end == stream.len() => stream.truncate(begin),
                Damage::Bit => stream[begin + rng.index(end - begin)] ^= 1 << rng.below(8),
                Damage::CutOff => stream.truncate(begin + rng.index(end - begin)),
                Damage::Dropped => drop(stream.drain(begin..end)),
                Damage::Doubled => {
                    let twice = stream[begin..end].to_vec();
                    stream.splice(end..end, twice);
                }
            }
            break;
        }
        damaged
    }
}

/// What can happen to a chunk of a saved state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Damage {
    /// One of its bits is another.
    Bit,
    /// The stream ends in it.
    CutOff,
    /// It is not there.
    Dropped,
    /// It is there twice; the last one of its stream is not there instead.
    Doubled,
}

impl Damage {
    /// Every kind, for tables.
    pub const ALL: [Self; 4] = [Self::Bit, Self::CutOff, Self::Dropped, Self::Doubled];

    /// One of them.
    #[must_use]
    pub fn any(rng: &mut Rng) -> Self {
        Self::ALL[rng.index(Self::ALL.len())]
    }
}

/// Where each chunk of a stream ends.
fn chunk_ends(stream: &[u8]) -> Vec<usize> {
    let mut input = ChunkInput::new(stream);
    let (mut ends, mut at) = (Vec::new(), 0);
    while let Some(chunk) = input.next().expect("a stream that was just written") {
        at += chunk.len();
        ends.push(at);
    }
    ends
}
