//! The services on the real control planes: a host's bus, a guest's, and a move of all of it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use kmcl::bus::{Doorbell, Signal};
use kmcl::{Guid, NtStatus, Save, SaveOptions};
use vmbus_guest::{GuestBus, GuestConfig, HostPort, OfferedChannel, PostStatus};
use vmbus_host::{Config, GuestPort, HostBus, SlotId};
use vmbus_memory::{GuestMemory, MappingBudget, PageAllocator};
use vmbus_wire::offer::{OfferFlags, PipeUserDefined};
use vsp_integration::wire::TimeBody;
use vsp_integration::{
    Clocks, Event, IntegrationConfig, IntegrationServices, Phase, Service, ShutdownAnswer,
    ShutdownKind, ShutdownRequest,
};
use zerocopy::FromBytes;

use common::{Events, Guest, Inline, Linux, NOW, SECOND, save, split};

const MEMORY: u64 = 4 << 20;
const REBOOT: ShutdownRequest = ShutdownRequest { kind: ShutdownKind::Reboot, force: false };

/// What lies between guest and host. Everything arrives at once.
#[derive(Default)]
struct Wires {
    guest: OnceLock<GuestBus>,
    host: Mutex<Option<(HostBus, Arc<HostEnd>)>>,
}

/// One host's end.
struct HostEnd {
    wires: Arc<Wires>,
    memory: GuestMemory,
    doorbells: Mutex<BTreeMap<u32, Arc<dyn Doorbell>>>,
}

struct GuestEnd(Arc<Wires>);
struct ToGuest(Arc<Wires>, u16);
struct ToHost(Arc<Wires>, u32);

impl Wires {
    /// From now on this host has the guest.
    fn plug(
        self: &Arc<Self>,
        memory: &GuestMemory,
        make: impl FnOnce(Arc<HostEnd>) -> HostBus,
    ) -> HostBus {
        let doorbells = Mutex::default();
        let end = Arc::new(HostEnd { wires: self.clone(), memory: memory.clone(), doorbells });
        let bus = make(end.clone());
        *self.host.lock().unwrap() = Some((bus.clone(), end));
        bus
    }
}

impl GuestPort for HostEnd {
    fn memory(&self) -> Option<GuestMemory> {
        Some(self.memory.clone())
    }

    fn vp_count(&self) -> u32 {
        1
    }

    fn post_message(&self, _: SlotId, message: &[u8]) -> vmbus_host::Posted {
        self.wires.guest.get().unwrap().host_message(message).unwrap();
        vmbus_host::Posted::Taken
    }

    fn event_flag(&self, _: u32, _: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        Ok(Arc::new(ToGuest(self.wires.clone(), flag)))
    }

    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        self.doorbells.lock().unwrap().insert(connection_id, doorbell);
        Ok(())
    }

    fn unlisten(&self, connection_id: u32) {
        self.doorbells.lock().unwrap().remove(&connection_id);
    }
}

impl HostPort for GuestEnd {
    fn post_message(&self, connection_id: u32, message: &[u8]) -> vmbus_guest::Posted {
        let host = self.0.host.lock().unwrap().as_ref().unwrap().0.clone();
        vmbus_guest::Posted::Answered(match host.post_message(connection_id, message) {
            Ok(()) => PostStatus::SUCCESS,
            Err(error) => PostStatus(error.hypercall_status()),
        })
    }

    fn retry_post_later(&self, _: u32) {}

    fn attach(
        &self,
        channel: &OfferedChannel,
        _: &Arc<dyn Doorbell>,
    ) -> Result<Arc<dyn Signal>, NtStatus> {
        Ok(Arc::new(ToHost(self.0.clone(), channel.connection_id)))
    }
}

impl Signal for ToGuest {
    fn signal(&self) {
        self.0.guest.get().unwrap().interrupt(self.1);
    }
}

impl Signal for ToHost {
    fn signal(&self) {
        let end = self.0.host.lock().unwrap().as_ref().unwrap().1.clone();
        let doorbell = end.doorbells.lock().unwrap().get(&self.1).cloned();
        if let Some(doorbell) = doorbell {
            doorbell.ring();
        }
    }
}

/// Both do all there is to do.
fn settle(driver: &Inline, guests: &mut [Guest]) {
    for _ in 0..16 {
        driver.process();
        for guest in &mut *guests {
            guest.turn();
        }
    }
}

#[test]
fn the_services_move_with_their_bus() {
    let memory = GuestMemory::memfd(MEMORY).unwrap();
    let pages = PageAllocator::new(&memory, 0, MEMORY).unwrap();
    let wires = Arc::new(Wires::default());
    let bus = wires.plug(&memory, |end| HostBus::new(end, Config::default()));
    let config = GuestConfig::new(Guid::from_u128(7));
    let guest_bus = GuestBus::new(config, pages, Arc::new(GuestEnd(wires.clone()))).unwrap();
    let _only_once = wires.guest.set(guest_bus.clone());

    let (driver, events) = (Arc::new(Inline::default()), Arc::new(Events::default()));
    let config = IntegrationConfig::default();
    let services = IntegrationServices::new(
        Arc::new(bus.clone()),
        driver.clone(),
        events.clone(),
        config.clone(),
    )
    .unwrap();
    services.offer().unwrap();
    guest_bus.connect().unwrap();

    // What a guest's drivers are bound by: the GUIDs of devices section 0, a pipe, of messages.
    let offers = guest_bus.offers();
    assert_eq!(offers.len(), Service::ALL.len());
    for (offer, service) in offers.iter().zip(Service::ALL) {
        assert_eq!(offer.interface_type, service.interface(), "{service}");
        assert_eq!(offer.interface_instance, service.instance(), "{service}");
        assert_eq!(offer.flags, OfferFlags::NAMED_PIPE_MODE, "{service}");
        let (pipe, _) = PipeUserDefined::read_from_prefix(&offer.user_defined).unwrap();
        assert_eq!(pipe, PipeUserDefined::message_pipe(), "{service}");
    }

    let guest_bus = Arc::new(guest_bus);
    let mut guests: Vec<Guest> = Service::ALL
        .into_iter()
        .map(|service| Guest::open(&guest_bus, service, Some(Linux::new(service))))
        .collect();
    settle(&driver, &mut guests);
    let phases = Service::ALL.map(|service| services.phase(service));
    assert!(phases.iter().all(|phase| matches!(phase, Phase::Agreed(_))), "{phases:?}");
    events.take();

    // All is asked, nothing is read.
    let mut clocks = Clocks { now: NOW, reference_time: SECOND };
    services.tick(clocks);
    services.request_shutdown(REBOOT, "moving").unwrap();
    let held = bus.hold();
    let frozen = services.freeze().unwrap();
    let streams = save(&frozen);
    let mut saved_bus = Vec::new();
    held.save(&SaveOptions::default()).unwrap().write_to(&mut saved_bus).unwrap();
    frozen.move_away();
    held.move_away();
    drop((services, driver));

    let bus = wires.plug(&memory, |end| {
        HostBus::restoring(end, MappingBudget::default(), &saved_bus).unwrap()
    });
    let driver = Arc::new(Inline::default());
    let mut restoring = IntegrationServices::restoring(
        Arc::new(bus.clone()),
        driver.clone(),
        events.clone(),
        config,
        streams[0].as_slice(),
    )
    .unwrap();
    restoring.enable().unwrap();
    for (index, stream) in (0..).zip(&streams[1..]) {
        restoring.restore_channel(index, stream.as_slice()).unwrap();
    }
    bus.finish_restore().unwrap();
    let services = restoring.start().unwrap();
    clocks.now.0 += 3600 * SECOND;
    for guest in &mut guests {
        guest.take_read();
    }
    // At once, and before the channels have their rings.
    services.tick(clocks);
    settle(&driver, &mut guests);
    assert_eq!(Service::ALL.map(|service| services.phase(service)), phases);
    let answer = ShutdownAnswer::Accepted;
    assert_eq!(events.take(), [Event::ShutdownEnded { request: REBOOT, answer }]);
    let times: Vec<(u64, u8)> = guests[Service::TimeSync.index()]
        .take_read()
        .iter()
        .map(|message| {
            let body = TimeBody::ref_from_bytes(split(message).1).unwrap();
            (body.parent_time.get(), body.flags)
        })
        .collect();
    let (before, after) = (NOW.0, clocks.now.0);
    assert_eq!(times, [(before, TimeBody::FLAG_SYNC), (after, TimeBody::FLAG_SYNC)]);
    assert_eq!(services.heartbeat().answered, 1);

    // The guest starts anew: everything is closed, and comes again.
    guests.clear();
    guest_bus.unload().unwrap();
    settle(&driver, &mut guests);
    assert_eq!(Service::ALL.map(|service| services.phase(service)), [Phase::Closed; 3]);
    guest_bus.connect().unwrap();
    guests = Service::ALL
        .into_iter()
        .map(|service| Guest::open(&guest_bus, service, Some(Linux::new(service))))
        .collect();
    settle(&driver, &mut guests);
    assert_eq!(Service::ALL.map(|service| services.phase(service)), phases);
}
