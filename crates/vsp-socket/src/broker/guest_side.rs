//! A guest that wants to be connected to a program of the host.

use std::time::Duration;

use kmcl::NtStatus;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use vmbus_host::HvsockConnect;
use vmbus_wire::hvsock::port_of_service;

use super::{Core, Entry, Turn};
use crate::connection::{Connection, Names};
use crate::limits::CONNECT_TIMEOUT;
use crate::listener::{Connected, connect_to, path_of_port};

/// A request that waits for a program whose queue is full.
pub(super) struct Queued {
    request: HvsockConnect,
    port: u32,
    /// When that was first seen by a tick.
    since: Option<Duration>,
}

impl Queued {
    pub(super) fn go_on(&mut self) {
        self.since = None;
    }
}

impl Turn {
    pub(super) fn connect(&mut self, core: &Core, request: HvsockConnect) {
        match port_of_service(request.service_id()) {
            Some(port) => {
                if let Some(queued) = self.try_connect(core, Queued { request, port, since: None })
                {
                    self.queued.push_back(queued);
                }
            }
            None => request.refuse(NtStatus::CONNECTION_REFUSED),
        }
    }

    /// Answers a request, or gives it back if the program is busy.
    fn try_connect(&mut self, core: &Core, queued: Queued) -> Option<Queued> {
        let port = queued.port;
        if !self.has_room(core) {
            queued.request.refuse(NtStatus::INSUFFICIENT_RESOURCES);
            return None;
        }
        // As the bus would, but it counts that as our mistake.
        let names = Names {
            service: queued.request.service_id(),
            endpoint: queued.request.endpoint_id(),
            from_host: false,
        };
        if self.connections.values().any(|entry| entry.has_offered(names)) {
            tracing::debug!(port, "a guest asks for a connection that it has");
            queued.request.refuse(NtStatus::CONNECTION_REFUSED);
            return None;
        }
        let socket = match connect_to(&path_of_port(&core.config.path, port)) {
            Connected::To(socket) => socket,
            Connected::Busy => return Some(queued),
            Connected::Refused(error) => {
                tracing::debug!(port, %error, "a guest's connection is refused");
                queued.request.refuse(match error {
                    Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS => {
                        NtStatus::INSUFFICIENT_RESOURCES
                    }
                    _ => NtStatus::CONNECTION_REFUSED,
                });
                return None;
            }
        };
        let Queued { request, .. } = queued;
        let token = self.token();
        if let Err(error) = core.poller.add(&socket, token, EventFlags::empty()) {
            tracing::debug!(port, %error, "a guest's connection cannot be waited for");
            request.refuse(NtStatus::INSUFFICIENT_RESOURCES);
            return None;
        }
        let (poller, inbox) = (core.poller.clone(), core.inbox.clone());
        let connection = Connection::new(token, names, socket, poller, inbox);
        match core.offer(&connection) {
            Ok(channel) => {
                let channel = Some(channel);
                self.connections.insert(token, Entry { connection, channel });
                request.accept();
            }
            Err(error) => {
                tracing::debug!(port, %error, "a guest's connection cannot be offered");
                request.refuse(NtStatus::INSUFFICIENT_RESOURCES);
            }
        }
        None
    }

    pub(super) fn tick_requests(&mut self, core: &Core, now: Duration) {
        for mut queued in std::mem::take(&mut self.queued) {
            let since = *queued.since.get_or_insert(now);
            match self.try_connect(core, queued) {
                Some(queued) if now.saturating_sub(since) >= CONNECT_TIMEOUT => {
                    queued.request.refuse(NtStatus::CONNECTION_REFUSED);
                }
                Some(queued) => self.queued.push_back(queued),
                None => {}
            }
        }
    }
}
