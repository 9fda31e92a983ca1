//! A host that was restored, on its way back to work.
//!
//! Between a save and the restore, two things have happened that no event tells: the devices are others,
//! which hold nothing of the guest's until they are given it; and effects that were under way at the
//! save have not been performed. Both follow from the state alone, so nothing more was saved:
//!
//! | state | what was lost | what follows |
//! |---|---|---|
//! | opening | the device's answer, or the question | [`Effect::Open`] again |
//! | open | the rings that the device had | [`Effect::Resume`] |
//! | closing | that the device has let go: it is gone | as after [`Host::closed`] |
//! | being modified | the answer, or the question | [`Effect::Retarget`] again |
//! | an hvsock request | the answer, or the question | [`Effect::ConnectHvsock`] again |
//! | a GPADL taken back, mapped by the device | that it is unmapped: the device is gone | the guest gets its answer |

use vmbus_wire::message::{GpadlTorndown, HostMessage};

use crate::channel::{OfferState, OpenState};
use crate::effect::Effect;
use crate::host::Host;
use crate::offer::{OfferId, OfferParams};
use crate::open::default_event_flag;

impl Host {
    /// The devices are others now. What the former ones had still to let go of, they have; offers that
    /// are to be new channels after a restore ([`OfferParams::force_new_channel`]) are withdrawn, and
    /// returned to be made again. The first step after a restore.
    pub fn devices_have_moved(&mut self) -> Vec<OfferParams> {
        self.devices_hold_nothing();
        let mut renewed = Vec::new();
        let mut nobody = Vec::new(); // is there to be told
        for offer in self.all_offers() {
            let Some(channel) = self.channels.get(offer) else { continue };
            let stands = matches!(channel.offer, OfferState::Hidden | OfferState::Offered);
            if stands && channel.params.force_new_channel {
                renewed.push(channel.params.clone());
                self.closed(offer, &mut nobody); // first, so that the guest gets its answers
                self.revoke(offer, &mut nobody);
            }
        }
        renewed
    }

    /// What devices have still to let go of, they have. They know of no open; those that the guest waits
    /// for are left to [`Host::go_on`].
    pub(crate) fn devices_hold_nothing(&mut self) {
        let mut later = Vec::new();
        for offer in self.all_offers() {
            let Some(channel) = self.channels.get(offer) else { continue };
            if matches!(channel.open, OpenState::Closing(_) | OpenState::Reopening(..)) {
                self.closed(offer, &mut later);
            }
            self.let_go_of_torn_down(offer);
        }
    }

    fn let_go_of_torn_down(&mut self, offer: OfferId) {
        let Some(channel) = self.channels.get(offer) else { return };
        let done = self.gpadls.device_has_moved(offer, |gpadl| channel.has_ring_in(gpadl));
        for gpadl_id in done {
            self.send(&HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: gpadl_id.into() }));
        }
    }

    /// What has to be done for the devices that go on, and for the guest. The second and last step after a
    /// restore, once devices are there to be told.
    pub fn go_on(&self, effects: &mut Vec<Effect>) {
        for (offer, channel) in self.channels.iter() {
            let channel_id = channel.channel_id;
            // The rings are there: `violations` would have said so.
            match &channel.open {
                OpenState::Opening(open) => {
                    if let Ok(rings) = self.standing_rings(offer, channel_id, open) {
                        effects.push(Effect::Open { offer, rings: Box::new(rings) });
                    }
                }
                OpenState::Open(open) => {
                    if let Ok(rings) = self.standing_rings(offer, channel_id, open) {
                        effects.push(Effect::Resume { offer, rings: Box::new(rings) });
                    }
                }
                OpenState::Closed
                | OpenState::Abandoned(_)
                | OpenState::Closing(_)
                | OpenState::Reopening(..) => {}
            }
            if let Some(modifying) = channel.modifying {
                let flag = match &channel.open {
                    OpenState::Open(open) => open.event_flag,
                    _ => default_event_flag(channel_id), // closed meanwhile: it will fail
                };
                let interrupt = self.interrupt(channel_id, Some(modifying.target_vp), flag);
                effects.push(Effect::Retarget { offer, interrupt, serial: modifying.serial });
            }
        }
        effects.extend(self.hvsock.waiting.values().copied().map(Effect::ConnectHvsock));
    }

    fn all_offers(&self) -> Vec<OfferId> {
        self.channels.iter().map(|(offer, _)| offer).collect()
    }
}
