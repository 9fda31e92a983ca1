//! Requests for socket connections, which the host refuses, sooner or later: the control plane's only
//! requests whose answer a device takes its time for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::bus::{Bus as _, BusEvent, ClientLink, Endpoint, EventSink, Recorder, Target};
use kmcl::{Guid, NtStatus};
use vmbus_guest::{ConnectionState, GuestBus};
use vmbus_host::{HvsockConnect, HvsockHandler};

use crate::churn::Silent;
use crate::log::Log;
use crate::rng::Rng;

const SERVICE: Guid = Guid::from_u128(0x736f_636b_6574_7300_0000_0000_0000_0001);

/// Requests under way at a time.
const MAX_WAITING: usize = 3;

/// The host's end: keeps requests for a while, and refuses them.
pub(crate) struct SocketHost(Mutex<HostInner>);

struct HostInner {
    rng: Rng,
    now: u64,
    asked: Vec<(HvsockConnect, u64)>,
}

impl SocketHost {
    pub(crate) fn new(rng: Rng) -> Arc<Self> {
        Arc::new(Self(Mutex::new(HostInner { rng, now: 0, asked: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, HostInner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next request is answered.
    pub(crate) fn next_at(&self, now: u64) -> Option<u64> {
        let mut inner = self.lock();
        inner.now = now;
        inner.asked.iter().map(|(_, due)| *due).min()
    }

    /// Refuses one request.
    pub(crate) fn refuse(&self) {
        let mut inner = self.lock();
        let now = inner.now;
        let Some(at) = inner.asked.iter().position(|(_, due)| *due <= now) else { return };
        let (connect, _) = inner.asked.remove(at);
        drop(inner);
        connect.refuse(NtStatus::CONNECTION_REFUSED);
    }

    /// Lets go of all requests, which refuses them.
    pub(crate) fn abandon(&self) {
        let asked = std::mem::take(&mut self.lock().asked);
        drop(asked); // calls the bus: not under the lock
    }
}

impl HvsockHandler for SocketHost {
    fn connect(&self, request: HvsockConnect) {
        let inner = &mut *self.lock();
        let due = inner.now + inner.rng.delay() * 3;
        inner.asked.push((request, due));
    }
}

/// The guest's end.
pub(crate) struct SocketUser {
    log: Arc<Log>,
    bus: GuestBus,
    left: u32,
    asked: u32,
    waiting: BTreeMap<u32, (Box<dyn ClientLink>, Recorder)>,
}

impl SocketUser {
    pub(crate) fn new(bus: &GuestBus, log: &Arc<Log>, requests: u32) -> Self {
        let (log, bus) = (Arc::clone(log), bus.clone());
        Self { log, bus, left: requests, asked: 0, waiting: BTreeMap::new() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.waiting.is_empty()
    }

    /// Whether there is something to do.
    pub(crate) fn wants_turn(&self) -> bool {
        self.left > 0 && self.waiting.len() < MAX_WAITING
    }

    /// Takes in what the bus has said.
    pub(crate) fn listen(&mut self) {
        let log = &self.log;
        self.waiting.retain(|number, (_, recorder)| {
            let events = recorder.take();
            for event in &events {
                match event {
                    BusEvent::ConnectFailed(NtStatus::CONNECTION_REFUSED) => {
                        log.line(format_args!("socket {number} refused"));
                    }
                    _ => log.violation(format_args!("socket {number} is not refused")),
                }
            }
            if events.len() > 1 {
                log.violation(format_args!("socket {number} answered {} times", events.len()));
            }
            events.is_empty()
        });
    }

    /// Asks for a connection.
    pub(crate) fn turn(&mut self) {
        self.left -= 1;
        let ConnectionState::Connected { version, .. } = self.bus.state() else { return };
        if !version.has_hvsock_connect_result() {
            return; // nobody would hear of a refusal
        }
        self.asked += 1;
        let endpoint_id = Guid::from_u128(u128::from(self.asked));
        let target = Target {
            interface_type: SERVICE,
            interface_instance: Some(endpoint_id),
            subchannel_index: 0,
        };
        let (events, recorder) = EventSink::recorder();
        let endpoint = Endpoint { events, doorbell: Arc::new(Silent) };
        let link = self.bus.bind(target, endpoint).expect("one client more is welcome");
        self.log.line(format_args!("socket {} asked for", self.asked));
        self.bus.connect_hvsock(endpoint_id, SERVICE, None).expect("the version has it");
        self.waiting.insert(self.asked, (link, recorder));
    }
}
