//! A bus whose two ends are in one process: real rings in shared memory, no control messages, no
//! hypervisor. A device and its driver run against each other as they would across a VM's border.
//!
//! Every offer is seen by every client of the same bus. Signals ring the other endpoint's doorbell. A
//! server that moves away leaves its offer and its rings behind, for who makes the same offer again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vmbus_memory::{GuestMemory, MappingBudget, MemoryError, PageAllocator, PageRun, RingPages};
use vmbus_wire::status::NtStatus;

use crate::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, GpadlPages, Offer, OpenRequest,
    OpenRings, Residency, ServerLink, Signal, Target,
};
use crate::channel::lock;

/// Most offers, bindings and GPADLs of one bus, each.
const BOUND: usize = 4096;

/// See the module.
pub struct LoopbackBus {
    world: Arc<World>,
}

struct World {
    memory: GuestMemory,
    pages: PageAllocator,
    mappings: MappingBudget,
    residency: Mutex<Option<Arc<dyn Residency>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_id: u32,
    offers: BTreeMap<u32, OfferEntry>,
    clients: BTreeMap<u32, ClientEntry>,
    gpadls: BTreeMap<u32, GpadlEntry>,
}

struct OfferEntry {
    offer: Offer,
    server: Endpoint,
    /// Rings the server's doorbell, whichever server that is.
    bell: Arc<ServerBell>,
    /// The client that is bound to it.
    client: Option<u32>,
    /// The server has rings, or is being asked to take them.
    open: bool,
    /// The client has closed and its server has not let go yet: a client that opens again waits.
    closing: bool,
    /// The server has moved away; whoever makes the same offer goes on with it.
    moved: bool,
    /// The open that the server was asked for, while the channel is open.
    request: Option<OpenRequest>,
    /// The pages of the rings, while the server may use them.
    ring: Option<Arc<PageRun>>,
}

struct ClientEntry {
    target: Target,
    client: Endpoint,
    offer: Option<u32>,
    /// An open that waits for the server to have let go of the former rings.
    waiting: Option<OpenRequest>,
    /// The pages of the rings, while the client may use them.
    ring: Option<Arc<PageRun>>,
    /// The client's ends, until the server has accepted the open.
    rings: Option<OpenRings>,
}

struct GpadlEntry {
    offer: u32,
    pages: GpadlPages,
    in_use: bool,
    torn_down: bool,
}

/// Events to post once the lock is released: posting wakes foreign code.
type Post = Vec<(EventSink, BusEvent)>;

impl LoopbackBus {
    /// A bus with `bytes` of memory, a multiple of 4096.
    ///
    /// # Errors
    /// [`MemoryError`] where the system has no such memory.
    pub fn new(bytes: u64) -> Result<Arc<Self>, MemoryError> {
        let memory = GuestMemory::memfd(bytes)?;
        let pages = PageAllocator::new(&memory, 0, bytes)?;
        Ok(Arc::new(Self {
            world: Arc::new(World {
                memory,
                pages,
                mappings: MappingBudget::default(),
                residency: Mutex::new(None),
                state: Mutex::default(),
            }),
        }))
    }

    /// The memory that both ends share.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.world.memory
    }

    /// Pages that nobody has at present.
    #[must_use]
    pub fn free_pages(&self) -> u64 {
        self.world.pages.free_pages()
    }

    /// Makes external data something that may have to be brought in first, for channels opened from
    /// now on.
    pub fn set_residency(&self, residency: Arc<dyn Residency>) {
        *lock(&self.world.residency) = Some(residency);
    }
}

impl Bus for LoopbackBus {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        let world = &self.world;
        let (id, post) = {
            let mut state = lock(&world.state);
            if state.offers.len() >= BOUND {
                return Err(NtStatus::INSUFFICIENT_RESOURCES);
            }
            if let Some((&id, entry)) =
                state.offers.iter_mut().find(|(_, entry)| entry.is_same(&offer))
            {
                if !entry.moved {
                    return Err(NtStatus::INVALID_PARAMETER);
                }
                entry.bell.lead_to(&endpoint.doorbell);
                (entry.moved, entry.offer, entry.server) = (false, offer, endpoint);
                drop(state);
                return Ok(world.go_on(id));
            }
            let id = state.next_id();
            state.offers.insert(
                id,
                OfferEntry {
                    offer,
                    bell: Arc::new(ServerBell(RwLock::new(Arc::clone(&endpoint.doorbell)))),
                    server: endpoint,
                    client: None,
                    open: false,
                    closing: false,
                    moved: false,
                    request: None,
                    ring: None,
                },
            );
            (id, state.bind_waiting())
        };
        send(post);
        Ok(Box::new(LoopbackServer::new(world, id)))
    }

    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        let world = &self.world;
        let (id, post) = {
            let mut state = lock(&world.state);
            if state.clients.len() >= BOUND {
                return Err(NtStatus::INSUFFICIENT_RESOURCES);
            }
            let id = state.next_id();
            state.clients.insert(
                id,
                ClientEntry {
                    target,
                    client: endpoint,
                    offer: None,
                    waiting: None,
                    ring: None,
                    rings: None,
                },
            );
            (id, state.bind_waiting())
        };
        send(post);
        Ok(Box::new(LoopbackClient { world: Arc::clone(world), id }))
    }
}

impl OfferEntry {
    fn is_same(&self, other: &Offer) -> bool {
        self.offer.interface_type == other.interface_type
            && self.offer.interface_instance == other.interface_instance
            && self.offer.subchannel_index == other.subchannel_index
    }

    fn suits(&self, target: &Target) -> bool {
        self.client.is_none()
            && self.offer.interface_type == target.interface_type
            && target.interface_instance.is_none_or(|it| it == self.offer.interface_instance)
            && self.offer.subchannel_index == target.subchannel_index
    }
}

impl State {
    fn next_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    /// Gives each waiting client the first offer that suits it.
    fn bind_waiting(&mut self) -> Post {
        let mut post = Post::new();
        for (&id, client) in &mut self.clients {
            if client.offer.is_some() {
                continue;
            }
            let Some((&offer_id, entry)) =
                self.offers.iter_mut().find(|(_, entry)| entry.suits(&client.target))
            else {
                continue;
            };
            entry.client = Some(id);
            client.offer = Some(offer_id);
            let interface_instance = entry.offer.interface_instance;
            let event = BusEvent::Offered { interface_instance, mmio: None };
            post.push((client.client.events.clone(), event));
        }
        post
    }

    /// The client's part of a channel is over: its server hears of it, and waits for nothing.
    fn close(&mut self, client: u32) -> Post {
        let mut post = Post::new();
        let Some(entry) = self.clients.get_mut(&client) else { return post };
        entry.waiting = None;
        let Some(offer) = entry.offer.and_then(|offer| self.offers.get_mut(&offer)) else {
            return post;
        };
        if offer.open && !offer.closing {
            offer.closing = true;
            post.push((offer.server.events.clone(), BusEvent::PeerClosed));
        }
        post
    }
}

struct LoopbackServer {
    world: Arc<World>,
    id: u32,
    moved: AtomicBool,
}

impl LoopbackServer {
    fn new(world: &Arc<World>, id: u32) -> Self {
        Self { world: Arc::clone(world), id, moved: AtomicBool::new(false) }
    }
}

impl ServerLink for LoopbackServer {
    fn open_result(&self, status: NtStatus) {
        let answer = {
            let mut state = lock(&self.world.state);
            let Some(offer) = state.offers.get_mut(&self.id) else { return };
            if !status.is_success() {
                offer.open = false;
                offer.ring = None;
                offer.request = None;
            }
            let Some(client) = offer.client.and_then(|id| state.clients.get_mut(&id)) else {
                return;
            };
            let rings = client.rings.take();
            let result = match (status.is_success(), rings) {
                (true, Some(rings)) => Ok(rings),
                (true, None) => return,
                (false, _) => {
                    client.ring = None;
                    Err(status)
                }
            };
            (client.client.events.clone(), BusEvent::OpenCompleted(result))
        };
        send(vec![answer]);
    }

    fn closed(&self) {
        let mut post = Post::new();
        let reopen = {
            let mut state = lock(&self.world.state);
            let State { offers, clients, .. } = &mut *state;
            let Some(offer) = offers.get_mut(&self.id) else { return };
            offer.open = false;
            offer.closing = false;
            offer.ring = None;
            offer.request = None;
            let client = offer.client.and_then(|id| Some((id, clients.get_mut(&id)?)));
            match client {
                Some((id, client)) => client.waiting.take().map(|request| (id, request)),
                None => {
                    // The client has gone meanwhile; the next one may have the offer.
                    offer.client = None;
                    post = state.bind_waiting();
                    None
                }
            }
        };
        send(post);
        if let Some((client, request)) = reopen {
            self.world.open(client, request);
        }
    }

    fn revoke(&self) {
        let mut post = Post::new();
        {
            let mut state = lock(&self.world.state);
            let Some(offer) = state.offers.remove(&self.id) else { return };
            state.gpadls.retain(|_, gpadl| gpadl.offer != self.id);
            let client = offer.client.and_then(|id| state.clients.get_mut(&id));
            if let Some(client) = client {
                client.offer = None;
                post.push((client.client.events.clone(), BusEvent::Rescinded));
            }
        }
        send(post);
    }

    fn moved_away(&self) {
        self.moved.store(true, Ordering::Relaxed);
        let mut state = lock(&self.world.state);
        if let Some(offer) = state.offers.get_mut(&self.id) {
            offer.moved = true;
        }
        // Nobody has them mapped any more; whoever goes on with the channel maps them anew.
        for gpadl in state.gpadls.values_mut().filter(|gpadl| gpadl.offer == self.id) {
            gpadl.in_use = false;
        }
    }

    fn gpadl(&self, gpadl: u32) -> Result<GpadlPages, NtStatus> {
        let state = lock(&self.world.state);
        let entry = state.gpadls.get(&gpadl).filter(|entry| entry.offer == self.id);
        entry.map(|entry| entry.pages.clone()).ok_or(NtStatus::INVALID_PARAMETER_3)
    }

    fn set_gpadl_in_use(&self, gpadl: u32, in_use: bool) {
        let mut post = Post::new();
        {
            let mut state = lock(&self.world.state);
            let entry = state.gpadls.get_mut(&gpadl).filter(|entry| entry.offer == self.id);
            let Some(entry) = entry else { return };
            entry.in_use = in_use;
            if !in_use && entry.torn_down {
                state.gpadls.remove(&gpadl);
                let client = state.offers.get(&self.id).and_then(|offer| offer.client);
                if let Some(client) = client.and_then(|id| state.clients.get(&id)) {
                    post.push((client.client.events.clone(), BusEvent::GpadlTornDown { gpadl }));
                }
            }
        }
        send(post);
    }
}

impl Drop for LoopbackServer {
    fn drop(&mut self) {
        if !self.moved.load(Ordering::Relaxed) {
            self.revoke();
        }
    }
}

struct LoopbackClient {
    world: Arc<World>,
    id: u32,
}

impl ClientLink for LoopbackClient {
    fn open(&self, request: OpenRequest) {
        self.world.open(self.id, request);
    }

    fn close(&self) {
        let post = {
            let mut state = lock(&self.world.state);
            if let Some(client) = state.clients.get_mut(&self.id) {
                client.ring = None;
                client.rings = None;
            }
            state.close(self.id)
        };
        send(post);
    }

    fn create_gpadl(&self, pages: GpadlPages) -> Result<u32, NtStatus> {
        let (gpadl, answer) = {
            let mut state = lock(&self.world.state);
            let client = state.clients.get(&self.id).ok_or(NtStatus::INVALID_DEVICE_STATE)?;
            let offer = client.offer.ok_or(NtStatus::INVALID_DEVICE_STATE)?;
            let events = client.client.events.clone();
            if state.gpadls.len() >= BOUND {
                return Err(NtStatus::INSUFFICIENT_RESOURCES);
            }
            let gpadl = state.next_id();
            let entry = GpadlEntry { offer, pages, in_use: false, torn_down: false };
            state.gpadls.insert(gpadl, entry);
            (gpadl, (events, BusEvent::GpadlCreated { gpadl, status: NtStatus::SUCCESS }))
        };
        send(vec![answer]);
        Ok(gpadl)
    }

    fn teardown_gpadl(&self, gpadl: u32) {
        let mut post = Post::new();
        {
            let mut state = lock(&self.world.state);
            let events = state.clients.get(&self.id).map(|client| client.client.events.clone());
            let in_use = state.gpadls.get_mut(&gpadl).is_some_and(|entry| {
                entry.torn_down = true;
                entry.in_use
            });
            if !in_use {
                state.gpadls.remove(&gpadl);
                post.extend(events.map(|events| (events, BusEvent::GpadlTornDown { gpadl })));
            }
        }
        send(post);
    }

    fn set_interrupt_latency(&self, _latency_100ns: u16) -> Result<u16, NtStatus> {
        Err(NtStatus::NOT_SUPPORTED) // offers here have no monitor
    }

    fn allocate_pages(&self, pages: u32) -> Result<PageRun, NtStatus> {
        self.world.pages.allocate(pages).map_err(|_| NtStatus::INSUFFICIENT_RESOURCES)
    }
}

impl Drop for LoopbackClient {
    fn drop(&mut self) {
        let post = {
            let mut state = lock(&self.world.state);
            let mut post = state.close(self.id);
            let offer = state.clients.remove(&self.id).and_then(|client| client.offer);
            if let Some(offer) = offer.and_then(|id| state.offers.get_mut(&id))
                && !offer.closing
            {
                offer.client = None;
            }
            post.extend(state.bind_waiting());
            post
        };
        send(post);
    }
}

impl World {
    /// Makes the rings and asks the server, or waits until it has let go of the former ones.
    fn open(&self, client_id: u32, request: OpenRequest) {
        let rings = {
            let mut state = lock(&self.state);
            let State { offers, clients, .. } = &mut *state;
            let Some(client) = clients.get_mut(&client_id) else { return };
            let offer = client.offer.and_then(|id| offers.get_mut(&id));
            match offer {
                Some(offer) if offer.open => {
                    client.waiting = Some(request);
                    return;
                }
                Some(offer) => {
                    self.make_rings(&request, offer, client).map(|(ring, server, own)| {
                        offer.open = true;
                        offer.request = Some(request);
                        offer.ring = Some(Arc::clone(&ring));
                        client.ring = Some(ring);
                        client.rings = Some(own);
                        (offer.server.events.clone(), BusEvent::Opened(server))
                    })
                }
                None => Err(NtStatus::DEVICE_REMOVED),
            }
            .unwrap_or_else(|status| {
                (client.client.events.clone(), BusEvent::OpenCompleted(Err(status)))
            })
        };
        send(vec![rings]);
    }

    /// An offer that was made again after its server had moved away: goes on with what was there.
    fn go_on(self: &Arc<Self>, id: u32) -> Box<LoopbackServer> {
        let server = Box::new(LoopbackServer::new(self, id));
        let mut state = lock(&self.state);
        let State { offers, clients, .. } = &mut *state;
        let Some(offer) = offers.get(&id).filter(|offer| offer.open) else { return server };
        if offer.closing {
            // The former server has nothing of it any more, and the new one never had.
            drop(state);
            server.closed();
            return server;
        }
        let client = offer.client.and_then(|id| clients.get(&id));
        let (Some(client), Some(request), Some(ring)) = (client, &offer.request, &offer.ring)
        else {
            return server;
        };
        // An open that the former server had not accepted is still to be answered.
        let resumed = client.rings.is_none();
        match self.server_rings(request, ring, client) {
            Ok(rings) => {
                let events = offer.server.events.clone();
                let opened = BusEvent::Opened(OpenRings { resumed, ..rings });
                drop(state);
                send(vec![(events, opened)]);
            }
            Err(status) => {
                tracing::error!(%status, "the rings of a channel cannot be mapped again")
            }
        }
        server
    }

    fn make_rings(
        &self,
        request: &OpenRequest,
        offer: &OfferEntry,
        client: &ClientEntry,
    ) -> Result<(Arc<PageRun>, OpenRings, OpenRings), NtStatus> {
        let no_memory = NtStatus::INSUFFICIENT_RESOURCES;
        let pages = request.outgoing_pages.checked_add(request.incoming_pages).ok_or(no_memory)?;
        let run = Arc::new(self.pages.allocate(pages).map_err(|_| no_memory)?);
        let (to_server, to_client) = split(request, &run)?;
        for ring in [&to_server, &to_client] {
            let control = ring.first().copied().ok_or(NtStatus::INVALID_PARAMETER)?;
            let page = u64::from(vmbus_wire::PAGE_SIZE_U32);
            self.memory.fill(control * page, page, 0).map_err(|_| no_memory)?;
            let ring = RingPages::map(&self.memory, ring, &self.mappings);
            vmbus_ring::initialize(&ring.map_err(|_| no_memory)?);
        }
        let server = self.server_rings(request, &run, client)?;
        let bell = Arc::clone(&offer.bell) as Arc<dyn Signal>;
        let own = self.ends(request, &to_client, &to_server, bell)?;
        Ok((run, server, own))
    }

    /// The server's ends of rings that are there.
    fn server_rings(
        &self,
        request: &OpenRequest,
        run: &PageRun,
        client: &ClientEntry,
    ) -> Result<OpenRings, NtStatus> {
        let (to_server, to_client) = split(request, run)?;
        let bell = Arc::new(RingBell(Arc::clone(&client.client.doorbell)));
        self.ends(request, &to_server, &to_client, bell)
    }

    fn ends(
        &self,
        request: &OpenRequest,
        incoming: &[u64],
        outgoing: &[u64],
        signal: Arc<dyn Signal>,
    ) -> Result<OpenRings, NtStatus> {
        let map = |pfns| {
            RingPages::map(&self.memory, pfns, &self.mappings)
                .map_err(|_| NtStatus::INSUFFICIENT_RESOURCES)
        };
        Ok(OpenRings {
            incoming: map(incoming)?,
            outgoing: map(outgoing)?,
            memory: self.memory.clone(),
            signal,
            residency: lock(&self.residency).clone(),
            user_data: request.user_data,
            resumed: false,
        })
    }
}

/// The pages of the ring to the server, and of that to the client.
fn split(request: &OpenRequest, run: &PageRun) -> Result<(Vec<u64>, Vec<u64>), NtStatus> {
    let mut to_server: Vec<u64> = run.pfns().collect();
    if to_server.len() < request.outgoing_pages as usize {
        return Err(NtStatus::INVALID_PARAMETER);
    }
    let to_client = to_server.split_off(request.outgoing_pages as usize);
    Ok((to_server, to_client))
}

/// A signal that is heard at once: it rings the other endpoint's doorbell.
struct RingBell(Arc<dyn Doorbell>);

impl Signal for RingBell {
    fn signal(&self) {
        self.0.ring();
    }
}

/// The same for a server, which may have moved away since.
struct ServerBell(RwLock<Arc<dyn Doorbell>>);

impl ServerBell {
    fn lead_to(&self, doorbell: &Arc<dyn Doorbell>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(doorbell);
    }
}

impl Signal for ServerBell {
    fn signal(&self) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).ring();
    }
}

fn send(post: Post) {
    for (events, event) in post {
        events.post(event);
    }
}
