//! GPADLs on their way to the host and back.

use kmcl::bus::GpadlPages;
use vmbus_wire::message::{GpadlTeardown, GuestMessage, MessageType};
use vmbus_wire::status::NtStatus;

use super::Guest;
use super::dispatch::failure;
use crate::channel::Phase;
use crate::effect::{ClientEvent, Effect};
use crate::error::{HostError, RequestError};
use crate::gpadl::{self, Gpadl, MAX_GPADLS, Owner, State};
use crate::post::{MAX_QUEUED_MESSAGES, Tag};

impl Guest {
    /// Describes `pages` to the host, for `channel_id`, which exists.
    ///
    /// # Errors
    /// [`RequestError::Limit`] where a bound is reached; pages that no GPADL can describe.
    pub(super) fn describe(
        &mut self,
        channel_id: u32,
        owner: Owner,
        pages: &GpadlPages,
    ) -> Result<u32, RequestError> {
        if self.gpadls.len() >= MAX_GPADLS {
            return Err(RequestError::Limit { what: "GPADLs of one guest", limit: MAX_GPADLS });
        }
        let words = gpadl::words(pages)?;
        let id = self.free_gpadl();
        let messages = gpadl::messages(channel_id, id, &words, pages.ranges.len())?;
        if self.outbox.len() + messages.len() > MAX_QUEUED_MESSAGES {
            let limit = MAX_QUEUED_MESSAGES;
            return Err(RequestError::Limit { what: "messages that wait to be posted", limit });
        }
        let state = State::Creating { unwanted: false, tell_torn_down: false };
        self.gpadls.insert(id, Gpadl { channel: channel_id, owner, state });
        if let Some(channel) = self.channels.get_mut(&channel_id) {
            channel.gpadls.insert(id);
        }
        for message in messages {
            self.outbox.push(Tag::Gpadl(id), message);
        }
        self.pump();
        Ok(id)
    }

    /// A handle that no live GPADL has. There are more handles than GPADLs, so the search ends.
    fn free_gpadl(&mut self) -> u32 {
        loop {
            let id = self.next_gpadl;
            self.next_gpadl = self.next_gpadl.wrapping_add(1).max(1);
            if !self.gpadls.contains_key(&id) {
                return id;
            }
        }
    }

    /// GPADL_CREATED.
    pub(super) fn gpadl_created(
        &mut self,
        channel_id: u32,
        gpadl_id: u32,
        status: u32,
    ) -> Result<(), HostError> {
        let kind = MessageType::GpadlCreated;
        let late = self
            .channels
            .get_mut(&channel_id)
            .is_some_and(|channel| channel.given_up.remove(&gpadl_id));
        if late {
            return Ok(());
        }
        let Some(gpadl) = self.gpadls.get_mut(&gpadl_id) else {
            return Err(HostError::UnknownGpadl { kind, gpadl_id });
        };
        if gpadl.channel != channel_id {
            let expected = gpadl.channel;
            return Err(HostError::GpadlChannel { gpadl_id, expected, got: channel_id });
        }
        let State::Creating { unwanted, tell_torn_down } = gpadl.state else {
            return Err(HostError::GpadlState { kind, gpadl_id, state: gpadl.state.name() });
        };
        let owner = gpadl.owner;
        if status != 0 {
            // The host may refuse before it has seen everything.
            self.outbox.withdraw(Tag::Gpadl(gpadl_id));
            self.not_created(gpadl_id, failure(status));
            self.settle(channel_id);
            return Ok(());
        }
        let unsent = self.outbox.waiting(Tag::Gpadl(gpadl_id));
        if unsent != 0 {
            return Err(HostError::TooEarly { kind, gpadl_id, unsent });
        }
        gpadl.state = State::Created;
        match owner {
            Owner::Ring => self.ring_created(channel_id, gpadl_id),
            Owner::Client if unwanted => self.tear_down(gpadl_id, tell_torn_down),
            Owner::Client => {
                let client = self.channels.get(&channel_id).and_then(|channel| channel.client);
                if let Some(client) = client {
                    let status = NtStatus::SUCCESS;
                    self.tell(client, ClientEvent::GpadlCreated { gpadl: gpadl_id, status });
                }
            }
        }
        Ok(())
    }

    fn ring_created(&mut self, channel_id: u32, gpadl_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        match std::mem::replace(&mut channel.phase, Phase::Closing) {
            Phase::CreatingRing { open, given_up: false, .. } => {
                self.open_ring(channel_id, gpadl_id, &open);
            }
            _ => self.tear_down(gpadl_id, false),
        }
    }

    /// The host does not have the GPADL, and will not: forgets it, and tells who waits for it.
    fn not_created(&mut self, gpadl_id: u32, status: NtStatus) {
        let Some(gpadl) = self.gpadls.remove(&gpadl_id) else { return };
        let Some(channel) = self.channels.get_mut(&gpadl.channel) else { return };
        channel.gpadls.remove(&gpadl_id);
        let client = channel.client;
        match gpadl.owner {
            Owner::Ring => {
                let phase = std::mem::replace(&mut channel.phase, Phase::Idle);
                let wanted = matches!(phase, Phase::CreatingRing { given_up: false, .. });
                if let (Some(client), true) = (client, wanted) {
                    self.tell(client, ClientEvent::OpenFailed { gpadl: gpadl_id, status });
                }
                self.let_go(Effect::RingReleased { gpadl: gpadl_id });
            }
            Owner::Client => {
                let Some(client) = client else { return };
                let (gpadl, State::Creating { unwanted, tell_torn_down }) = (gpadl_id, gpadl.state)
                else {
                    return;
                };
                if !unwanted {
                    self.tell(client, ClientEvent::GpadlCreated { gpadl, status });
                }
                if tell_torn_down {
                    self.tell(client, ClientEvent::GpadlTornDown { gpadl });
                }
            }
        }
    }

    /// At a rescind: the host need not answer for a GPADL whose creation crosses it, and no device
    /// has heard of it. Such a GPADL ends here; an answer that comes all the same is no surprise.
    pub(super) fn give_up_unanswered(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get_mut(&channel_id) else { return };
        let creating = |id: &u32| {
            self.gpadls.get(id).is_some_and(|gpadl| matches!(gpadl.state, State::Creating { .. }))
        };
        let unanswered: Vec<u32> = channel.gpadls.iter().copied().filter(creating).collect();
        channel.given_up.extend(&unanswered);
        for id in unanswered {
            self.outbox.withdraw(Tag::Gpadl(id));
            self.not_created(id, NtStatus::DEVICE_REMOVED);
        }
    }

    /// Has the host let go of a GPADL that it has.
    pub(super) fn tear_down(&mut self, gpadl_id: u32, tell_torn_down: bool) {
        let Some(gpadl) = self.gpadls.get_mut(&gpadl_id) else { return };
        gpadl.state = State::TearingDown { tell_torn_down };
        let message = GpadlTeardown { channel_id: gpadl.channel.into(), gpadl_id: gpadl_id.into() };
        self.send(Tag::Gpadl(gpadl_id), GuestMessage::GpadlTeardown(message));
    }

    /// Has the host let go of every GPADL of a channel that is closed: the ring's, unless its open
    /// still waits for an answer, and those that the client has left.
    pub(super) fn tear_down_unused(&mut self, channel_id: u32) {
        let Some(channel) = self.channels.get(&channel_id) else { return };
        let opening = matches!(channel.phase, Phase::CreatingRing { .. } | Phase::Opening { .. });
        let ids: Vec<u32> = channel.gpadls.iter().copied().collect();
        for id in ids {
            let Some(gpadl) = self.gpadls.get_mut(&id) else { continue };
            match (&mut gpadl.state, gpadl.owner) {
                (_, Owner::Ring) if opening => {}
                (State::Creating { unwanted, .. }, _) => *unwanted = true,
                (State::Created, _) => self.tear_down(id, false),
                (State::TearingDown { .. }, _) => {}
            }
        }
    }

    /// GPADL_TORNDOWN.
    pub(super) fn gpadl_torn_down(&mut self, gpadl_id: u32) -> Result<(), HostError> {
        let kind = MessageType::GpadlTorndown;
        let Some(gpadl) = self.gpadls.get(&gpadl_id) else {
            return Err(HostError::UnknownGpadl { kind, gpadl_id });
        };
        let State::TearingDown { tell_torn_down } = gpadl.state else {
            return Err(HostError::GpadlState { kind, gpadl_id, state: gpadl.state.name() });
        };
        let unsent = self.outbox.waiting(Tag::Gpadl(gpadl_id));
        if unsent != 0 {
            return Err(HostError::TooEarly { kind, gpadl_id, unsent });
        }
        let (channel_id, owner) = (gpadl.channel, gpadl.owner);
        self.gpadls.remove(&gpadl_id);
        let mut client = None;
        if let Some(channel) = self.channels.get_mut(&channel_id) {
            channel.gpadls.remove(&gpadl_id);
            client = channel.client;
        }
        match (owner, client) {
            (Owner::Ring, _) => self.let_go(Effect::RingReleased { gpadl: gpadl_id }),
            (Owner::Client, Some(client)) if tell_torn_down => {
                self.tell(client, ClientEvent::GpadlTornDown { gpadl: gpadl_id });
            }
            (Owner::Client, _) => {}
        }
        self.settle(channel_id);
        Ok(())
    }
}
