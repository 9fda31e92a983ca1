//! Guest memory that channels are given: GPADL_HEADER, GPADL_BODY, GPADL_TEARDOWN, and what devices do
//! with it.
//!
//! Every creation is answered by GPADL_CREATED and every teardown by GPADL_TORNDOWN, also when they
//! are refused: guests wait for both without a time-out.
//!
//! Source: vmbus-wire section 3, messages 8 to 12.

use kmcl::bus::GpadlPages;
use vmbus_wire::message::{
    GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, HostMessage, MessageType,
};
use vmbus_wire::status::NtStatus;

use crate::channel::OfferState;
use crate::error::Refusal;
use crate::gpadl::{GpadlRefusal, Progress, Teardown};
use crate::host::Host;
use crate::offer::OfferId;
use crate::pages::Pages;

impl Host {
    pub(crate) fn gpadl_header(&mut self, header: &GpadlHeader<'_>) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::GpadlHeader;
        let channel_id = header.fields.channel_id.get();
        let gpadl = header.fields.gpadl_id.get();
        let begun = self.begin_gpadl(MESSAGE, header);
        match &begun {
            Ok(Some(Progress::Incomplete)) => {}
            Ok(Some(Progress::Created)) => self.send_created(channel_id, gpadl, NtStatus::SUCCESS),
            // It has crossed the rescind.
            Ok(None) => self.send_created(channel_id, gpadl, NtStatus::DEVICE_REMOVED),
            Err(refusal) => self.send_created(channel_id, gpadl, creation_status(refusal)),
        }
        begun.map(|_| ())
    }

    fn begin_gpadl(
        &mut self,
        message: MessageType,
        header: &GpadlHeader<'_>,
    ) -> Result<Option<Progress>, Refusal> {
        let offer = self.known_channel(message, header.fields.channel_id.get())?;
        if self.channels.get(offer).is_none_or(|channel| channel.offer == OfferState::Rescinded) {
            return Ok(None);
        }
        let begun = self.gpadls.begin(offer, header, &self.shape.ram, self.config.gpadl_pages);
        let gpadl = header.fields.gpadl_id.get();
        begun.map(Some).map_err(|reason| Refusal::Gpadl { message, gpadl, reason })
    }

    pub(crate) fn gpadl_body(&mut self, body: &GpadlBody<'_>) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::GpadlBody;
        let gpadl = body.fields.gpadl_id.get();
        let refusal = |reason| Refusal::Gpadl { message: MESSAGE, gpadl, reason };
        let receiver = self.gpadls.receiver(gpadl).and_then(|offer| self.channels.get(offer));
        let Some(receiver) = receiver else { return Err(refusal(GpadlRefusal::NoHeader)) };
        let channel_id = receiver.channel_id;
        let extended = self.gpadls.extend(gpadl, body.words(), &self.shape.ram).map_err(refusal);
        match &extended {
            Ok(Progress::Incomplete)
            | Err(Refusal::Gpadl {
                reason: GpadlRefusal::EmptyBody | GpadlRefusal::NoHeader,
                ..
            }) => {}
            Ok(Progress::Created) => self.send_created(channel_id, gpadl, NtStatus::SUCCESS),
            Err(refusal) => self.send_created(channel_id, gpadl, creation_status(refusal)),
        }
        extended.map(|_| ())
    }

    pub(crate) fn gpadl_teardown(&mut self, message: &GpadlTeardown) -> Result<(), Refusal> {
        const MESSAGE: MessageType = MessageType::GpadlTeardown;
        let gpadl = message.gpadl_id.get();
        let torn_down =
            self.channel_with_memory(MESSAGE, message.channel_id.get()).and_then(|offer| {
                let in_ring = self.has_ring_in(offer, gpadl);
                let torn_down = self.gpadls.tear_down(offer, gpadl, in_ring);
                torn_down.map_err(|reason| Refusal::Gpadl { message: MESSAGE, gpadl, reason })
            });
        let is_answered_now = match &torn_down {
            Ok(Teardown::Done) => true,
            Ok(Teardown::Held) => false,
            // The answer comes later: to the first teardown, or to the creation.
            Err(Refusal::Gpadl {
                reason: GpadlRefusal::TearingDown | GpadlRefusal::Incomplete { .. },
                ..
            }) => false,
            // What never was is gone, and the guest waits to hear that.
            Err(_) => true,
        };
        if is_answered_now {
            self.send_torndown(gpadl);
        }
        torn_down.map(|_| ())
    }

    /// The channel that the guest means by an id, also if it has released the id too early, and the
    /// device still uses its memory.
    fn channel_with_memory(
        &self,
        message: MessageType,
        channel_id: u32,
    ) -> Result<OfferId, Refusal> {
        let is_released = |offer: &OfferId| {
            let channel = self.channels.get(*offer);
            channel.is_some_and(|channel| channel.offer == OfferState::Released)
        };
        let released = self.channels.by_channel_id(channel_id).filter(is_released);
        released.map_or_else(|| self.known_channel(message, channel_id), Ok)
    }

    /// The pages of a GPADL that the guest has created for a channel.
    ///
    /// # Errors
    /// [`GpadlRefusal`] for one that is unknown, incomplete, or being taken back.
    pub fn gpadl(&self, offer: OfferId, gpadl: u32) -> Result<GpadlPages, GpadlRefusal> {
        self.gpadls.get(offer, gpadl).map(Pages::for_device)
    }

    /// A device maps or unmaps a GPADL of its channel. While it is in use the answer to its teardown
    /// is held back. Only a device that holds its channel open can use GPADLs; when it says
    /// [`Host::closed`], it uses none.
    pub fn set_gpadl_in_use(&mut self, offer: OfferId, gpadl: u32, in_use: bool) {
        let holds = self.channels.get(offer).is_some_and(|channel| channel.device_holds());
        if in_use && !holds {
            return;
        }
        let in_ring = self.has_ring_in(offer, gpadl);
        if self.gpadls.set_in_use(offer, gpadl, in_use, in_ring) {
            self.send_torndown(gpadl);
        }
    }

    fn has_ring_in(&self, offer: OfferId, gpadl: u32) -> bool {
        self.channels.get(offer).is_some_and(|channel| channel.has_ring_in(gpadl))
    }

    fn send_created(&mut self, channel_id: u32, gpadl: u32, status: NtStatus) {
        self.send(&HostMessage::GpadlCreated(GpadlCreated::new(channel_id, gpadl, status)));
    }

    fn send_torndown(&mut self, gpadl: u32) {
        self.send(&HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: gpadl.into() }));
    }
}

/// What a guest is told of a GPADL that was refused.
fn creation_status(refusal: &Refusal) -> NtStatus {
    match refusal {
        Refusal::Gpadl {
            reason:
                GpadlRefusal::TooManyOfChannel { .. }
                | GpadlRefusal::TooMany { .. }
                | GpadlRefusal::TooManyIncomplete { .. }
                | GpadlRefusal::Quota { .. },
            ..
        } => NtStatus::INSUFFICIENT_RESOURCES,
        _ => NtStatus::INVALID_PARAMETER,
    }
}
