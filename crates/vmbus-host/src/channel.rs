//! One channel, and all of them: how far each has come with the guest and with its device.
//!
//! A channel has two sides to keep, and each takes its own time: the guest learns of the offer and of
//! its end, the device of an open and of its end. So there are two states, one for each.
//!
//! Source: vmbus-wire section 3, "Sequences".

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use kmcl::bus::USER_DATA_SIZE;

use crate::limits::{MAX_CHANNEL_ID, MAX_CHANNELS};
use crate::offer::{OfferError, OfferId, OfferKey, OfferParams};
use crate::outgoing::SlotId;

/// How the offer stands: what the guest of the present connection has been told of it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum OfferState {
    /// The device offers it. The guest was not told: it is not connected, has not asked, or cannot
    /// make sense of it; or it has yet to release a former channel of the same name.
    Hidden,
    /// The device offers it, and the guest was told so.
    Offered,
    /// The device has withdrawn it, and the guest was told so. The guest has yet to release the
    /// channel id.
    Rescinded,
    /// The device has withdrawn it, and the guest knows nothing of it any more. Only the device still
    /// has to let go.
    Released,
}

/// How far opening and closing has come: what the device has been told, and what the guest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum OpenState {
    /// Not open, and the device has nothing of the guest's.
    Closed,
    /// The guest has asked to open it and waits. The device was told, and has not answered.
    Opening(OpenParams),
    /// The device has accepted, and the guest was told that the channel is open.
    Open(OpenParams),
    /// The guest was told that the channel is open, and has not closed it. The device has let go of
    /// it on its own account; usually it withdraws the offer next.
    Abandoned(OpenKind),
    /// For the guest the channel is closed: it has closed it, or was told of the rescind, or is gone.
    /// The device was told, or is withdrawing by itself, and has not let go.
    Closing(Closing),
    /// As `Closing`, and the guest has asked to open it again and waits. The device was not told of
    /// that yet.
    Reopening(Closing, OpenParams),
}

/// What the guest has asked for in opening a channel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OpenParams {
    /// How it was opened, and so how the guest gets its answers.
    pub kind: OpenKind,
    /// The GPADL in which the rings lie.
    pub ring_gpadl: u32,
    /// Pages of it that form the guest-to-host ring; the rest is the host-to-guest ring.
    pub downstream_page_offset: u32,
    /// The VP to interrupt; `None` for no interrupts.
    pub target_vp: Option<u32>,
    /// The event flag by which the host signals the guest.
    pub event_flag: u16,
    /// The connection by which the guest signals the host.
    pub connection_id: u32,
    /// Device-defined bytes.
    pub user_data: [u8; USER_DATA_SIZE],
}

/// How a channel was opened.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum OpenKind {
    /// By OPEN_CHANNEL.
    Ordinary {
        /// The guest's number for the open, returned in the result.
        open_id: u32,
    },
    /// By OPEN_RESERVED_CHANNEL: it outlives an UNLOAD.
    Reserved {
        /// Where the result goes.
        slot: SlotId,
    },
}

/// What is left of an open that is over for the guest.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Closing {
    /// The GPADL in which the rings lie that the device may still use.
    pub ring_gpadl: u32,
    /// The device has accepted the open, and so will say that it has let go. If it refuses the open
    /// after all, it never had anything.
    pub accepted: bool,
    /// Where CLOSE_RESERVED_RESPONSE goes once the device has let go, if the guest waits for one.
    pub reserved_reply: Option<SlotId>,
}

/// A MODIFY_CHANNEL that is being carried out.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Modifying {
    /// Serial number of the [`Effect::Retarget`](crate::Effect::Retarget).
    pub serial: u64,
    /// The VP that is to be interrupted.
    pub target_vp: u32,
    /// Whether the guest waits for MODIFY_CHANNEL_RESPONSE.
    pub answered: bool,
}

/// One channel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Channel {
    /// Names it to the guest: 1 to 2047.
    pub channel_id: u32,
    /// What the device offers.
    pub params: OfferParams,
    /// See [`OfferState`].
    pub offer: OfferState,
    /// See [`OpenState`].
    pub open: OpenState,
    /// The MODIFY_CHANNEL that is being carried out.
    pub modifying: Option<Modifying>,
}

impl Channel {
    /// Whether the device has been given an open, and has not let go.
    #[must_use]
    pub fn device_holds(&self) -> bool {
        match self.open {
            OpenState::Closed | OpenState::Abandoned(_) => false,
            OpenState::Opening(_)
            | OpenState::Open(_)
            | OpenState::Closing(_)
            | OpenState::Reopening(..) => true,
        }
    }

    /// Whether rings lie in this GPADL that the device uses. Those of an open that waits for the
    /// device to let go of the last one do not count: nobody uses them yet.
    #[must_use]
    pub fn has_ring_in(&self, gpadl: u32) -> bool {
        match &self.open {
            OpenState::Closed | OpenState::Abandoned(_) => false,
            OpenState::Opening(open) | OpenState::Open(open) => open.ring_gpadl == gpadl,
            OpenState::Closing(closing) | OpenState::Reopening(closing, _) => {
                closing.ring_gpadl == gpadl
            }
        }
    }

    /// The connection by which the guest signals, or will once it is told that the channel is open.
    #[must_use]
    pub fn signal_connection(&self) -> Option<u32> {
        match &self.open {
            OpenState::Opening(open) | OpenState::Open(open) | OpenState::Reopening(_, open) => {
                Some(open.connection_id)
            }
            OpenState::Closed | OpenState::Abandoned(_) | OpenState::Closing(_) => None,
        }
    }

    /// The guest closes a channel that is opening or open, or the device withdraws it.
    pub(crate) fn begin_close(open: &OpenParams, accepted: bool) -> OpenState {
        let ring_gpadl = open.ring_gpadl;
        OpenState::Closing(Closing { ring_gpadl, accepted, reserved_reply: None })
    }

    /// Whether it is open or opening as a reserved channel.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        let kind = match &self.open {
            OpenState::Opening(open) | OpenState::Open(open) => open.kind,
            OpenState::Abandoned(kind) => *kind,
            OpenState::Closed | OpenState::Closing(_) | OpenState::Reopening(..) => return false,
        };
        matches!(kind, OpenKind::Reserved { .. })
    }
}

impl OpenState {
    /// The state's name, for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Opening(_) => "opening",
            Self::Open(_) => "open",
            Self::Abandoned(_) => "abandoned by its device",
            Self::Closing(_) => "closing",
            Self::Reopening(..) => "closing, to be opened again",
        }
    }
}

/// All channels of a host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Channels {
    pub(crate) table: BTreeMap<OfferId, Channel>,
    by_channel_id: BTreeMap<u32, OfferId>,
    /// The last offer's number.
    pub(crate) offers_made: u64,
    /// The channel id given out last. Ids go round, so that what a guest still says of a channel it
    /// has released does not hit another one.
    pub(crate) last_channel_id: u32,
}

impl Channels {
    /// Adds a channel that the guest does not know of.
    pub(crate) fn add(&mut self, params: OfferParams) -> Result<OfferId, OfferError> {
        let key = params.key;
        if self.standing(key).is_some() {
            return Err(OfferError::Clash { key });
        }
        let channel_id = self.free_channel_id()?;
        self.last_channel_id = channel_id;
        self.offers_made += 1;
        let id = OfferId(self.offers_made);
        let channel = Channel {
            channel_id,
            params,
            offer: OfferState::Hidden,
            open: OpenState::Closed,
            modifying: None,
        };
        self.table.insert(id, channel);
        self.by_channel_id.insert(channel_id, id);
        Ok(id)
    }

    /// Adds a channel that was saved, behind the others; not if another one has its channel id.
    pub(crate) fn put_back(&mut self, id: OfferId, channel: Channel) -> bool {
        match self.by_channel_id.entry(channel.channel_id) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(id);
                self.table.insert(id, channel);
                true
            }
        }
    }

    fn free_channel_id(&self) -> Result<u32, OfferError> {
        let count = self.table.len();
        // `last_channel_id` is at most MAX_CHANNEL_ID: it came from here.
        let after = self.last_channel_id + 1..=MAX_CHANNEL_ID;
        let free =
            after.chain(1..=self.last_channel_id).find(|id| !self.by_channel_id.contains_key(id));
        free.ok_or(OfferError::TooManyChannels { count })
    }

    /// The offer of this key that its device has not withdrawn.
    pub(crate) fn standing(&self, key: OfferKey) -> Option<OfferId> {
        self.find(key, |offer| matches!(offer, OfferState::Hidden | OfferState::Offered))
    }

    /// The offer of this key that the guest still has to release.
    pub(crate) fn rescinded(&self, key: OfferKey) -> Option<OfferId> {
        self.find(key, |offer| offer == OfferState::Rescinded)
    }

    fn find(&self, key: OfferKey, wanted: impl Fn(OfferState) -> bool) -> Option<OfferId> {
        let matching = |channel: &Channel| channel.params.key == key && wanted(channel.offer);
        self.table.iter().find(|(_, channel)| matching(channel)).map(|(id, _)| *id)
    }

    pub(crate) fn get(&self, id: OfferId) -> Option<&Channel> {
        self.table.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: OfferId) -> Option<&mut Channel> {
        self.table.get_mut(&id)
    }

    /// The channel that the guest calls by this id, whether or not it was told of it.
    pub(crate) fn by_channel_id(&self, channel_id: u32) -> Option<OfferId> {
        self.by_channel_id.get(&channel_id).copied()
    }

    pub(crate) fn remove(&mut self, id: OfferId) {
        if let Some(channel) = self.table.remove(&id) {
            self.by_channel_id.remove(&channel.channel_id);
        }
    }

    /// All channels, oldest offer first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (OfferId, &Channel)> {
        self.table.iter().map(|(id, channel)| (*id, channel))
    }

    /// The ids of all channels in the order in which a guest is to be told of them: oldest offer
    /// first, and every subchannel behind the primary channels.
    pub(crate) fn in_offer_order(&self) -> Vec<OfferId> {
        let mut ids: Vec<(bool, OfferId)> = self
            .table
            .iter()
            .map(|(id, channel)| (channel.params.key.subchannel_index != 0, *id))
            .collect();
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// What is wrong with the books, if anything.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.table.len() > MAX_CHANNELS {
            wrong.push(format!("{} channels", self.table.len()));
        }
        let named = self.by_channel_id.len();
        if named != self.table.len() {
            wrong.push(format!("{} channels, {named} channel ids", self.table.len()));
        }
        let mut names = Vec::with_capacity(self.table.len());
        let mut connections = Vec::with_capacity(self.table.len());
        for (id, channel) in &self.table {
            let channel_id = channel.channel_id;
            if !(1..=MAX_CHANNEL_ID).contains(&channel_id) || id.0 > self.offers_made {
                wrong.push(format!("{id:?} has channel id {channel_id}"));
            }
            if self.by_channel_id(channel_id) != Some(*id) {
                wrong.push(format!("channel id {channel_id} of {id:?} is another one's"));
            }
            if matches!(channel.offer, OfferState::Hidden | OfferState::Offered) {
                names.push((channel.params.key, *id));
            }
            if let Some(told) = impossible(channel) {
                wrong.push(format!("{id:?} is {:?} and {told}", channel.offer));
            }
            connections.extend(channel.signal_connection().map(|connection| (connection, *id)));
        }
        for (key, id, other) in shared(names) {
            wrong.push(format!("{id:?} and {other:?} are both offers of {key}"));
        }
        for (connection, id, other) in shared(connections) {
            wrong.push(format!("{id:?} and {other:?} share signal connection {connection:#x}"));
        }
        wrong
    }
}

/// Neighbours, once sorted, that have the same of something.
fn shared<T: Copy + Ord>(mut all: Vec<(T, OfferId)>) -> Vec<(T, OfferId, OfferId)> {
    all.sort_unstable();
    let pairs = all.iter().zip(all.iter().skip(1));
    let same = pairs.filter(|((a, _), (b, _))| a == b);
    same.map(|((what, id), (_, other))| (*what, *id, *other)).collect()
}

/// The open state's name, if it cannot go with the offer's.
fn impossible(channel: &Channel) -> Option<&'static str> {
    let possible = match (channel.offer, &channel.open) {
        (OfferState::Offered, _) => true,
        (OfferState::Hidden, OpenState::Closed | OpenState::Closing(_)) => true,
        // A reserved channel outlives the connection in which it was opened.
        (OfferState::Hidden, OpenState::Opening(_) | OpenState::Open(_)) => channel.is_reserved(),
        (OfferState::Hidden, OpenState::Abandoned(_) | OpenState::Reopening(..)) => false,
        (OfferState::Rescinded, open) => {
            matches!(open, OpenState::Closed | OpenState::Closing(_))
        }
        (OfferState::Released, open) => matches!(open, OpenState::Closing(_)),
    };
    (!possible).then(|| channel.open.name())
}
