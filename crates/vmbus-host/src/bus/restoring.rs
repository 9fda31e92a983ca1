//! A bus that was restored, until its devices and its guest are there.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use kmcl::bus::{Endpoint, OpenRings};
use vmbus_memory::{GuestMemory, MappingBudget};

use crate::bus::perform::CannotOpen;
use crate::bus::{Active, HostBus, Inner, shape};
use crate::channel::{Channel, OfferState};
use crate::effect::Effect;
use crate::host::Host;
use crate::limits::MAX_CHANNELS;
use crate::offer::{OfferError, OfferId, OfferKey, OfferParams};
use crate::port::GuestPort;
use crate::saved::RestoreError;
use crate::shape::GuestShape;

/// What a restored bus knows of the offers that were made to it so far.
#[derive(Default)]
pub(super) struct Restoring {
    /// Saved offers that are to be new channels, and were not made yet.
    renewed: BTreeMap<OfferKey, OfferParams>,
    /// Those made that the saved state has.
    adopted: BTreeMap<OfferId, Adopted>,
    /// Those made that it has not. They have ids, and are not on the host's books.
    extra: BTreeMap<OfferId, OfferKey>,
    /// How often any of these has changed.
    changes: u64,
    /// [`HostBus::finish_restore`] is under way.
    finishing: bool,
}

struct Adopted {
    saved: OfferParams,
    made: OfferParams,
    /// It is a new channel.
    renewed: bool,
}

/// Offers that were not saved are numbered from the end, so that they do not meet others: those are
/// bounded by [`MAX_SAVED_SERIAL`](crate::limits::MAX_SAVED_SERIAL), and counted from there.
const LAST_EXTRA: u64 = u64::MAX;

/// How the offers that were made to a restored bus differ from those that were saved. As text: a line
/// for each.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct OffersDiffer {
    /// Saved, and not made.
    pub missing: Vec<OfferKey>,
    /// Made, and not saved.
    pub extra: Vec<OfferKey>,
    /// Made, but not as they were saved.
    pub changed: Vec<ChangedOffer>,
}

/// A parameter of an offer that is not as it was saved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ChangedOffer {
    /// Which offer.
    pub key: OfferKey,
    /// Which of [`OfferParams`]' fields.
    pub field: &'static str,
    /// What was saved.
    pub saved: String,
    /// What was offered now.
    pub offered: String,
}

/// Why a restored bus cannot go on. It is as it was, and [`HostBus::finish_restore`] can be called again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinishRestoreError {
    /// The bus is not being restored; or another thread is finishing it.
    #[error("the bus is not being restored")]
    NotRestoring,
    /// The devices are not those that were saved.
    #[error("other devices than those that were saved:\n{0}")]
    OffersDiffer(OffersDiffer),
    /// The port has no guest.
    #[error("the guest is not there")]
    NoGuest,
    /// The guest has another number of virtual processors.
    #[error("the guest has {found} virtual processors, saved were {saved}")]
    VpCount {
        /// What was saved.
        saved: u32,
        /// What the port says.
        found: u32,
    },
    /// The guest's RAM is elsewhere.
    #[error(
        "the guest has {found_pages} pages of RAM, saved were {saved_pages}; page frame {pfn:#x} {}",
        if *saved { "was RAM, and is none now" } else { "was none, and is RAM now" }
    )]
    Ram {
        /// Pages there were.
        saved_pages: u64,
        /// Pages there are.
        found_pages: u64,
        /// The first page frame that is RAM in one of them only.
        pfn: u64,
        /// Whether that is the saved one.
        saved: bool,
    },
    /// A channel that was open cannot be resumed.
    #[error("the channel of {key} cannot be resumed: {why}")]
    Resume {
        /// Whose channel.
        key: OfferKey,
        /// What has failed, in words.
        why: String,
    },
}

impl HostBus {
    /// A bus that goes on with a saved state: that of a bus which has [moved away](crate::HeldBus::move_away).
    ///
    /// It stands still until [`HostBus::finish_restore`]. Until then the devices make their offers anew,
    /// in any order, and are taken for those that the guest knows. Who answers socket connections is to be
    /// set as well.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restoring(
        port: Arc<dyn GuestPort>,
        budget: MappingBudget,
        saved: &[u8],
    ) -> Result<Self, RestoreError> {
        Ok(Self::restoring_host(port, budget, Host::restore(saved)?))
    }

    /// As [`HostBus::restoring`], from what [`HostRestore`](crate::HostRestore) has read.
    #[must_use]
    pub fn restoring_host(port: Arc<dyn GuestPort>, budget: MappingBudget, mut host: Host) -> Self {
        let renewed = host.devices_have_moved();
        let renewed = renewed.into_iter().map(|params| (params.key, params)).collect();
        let mut inner = Inner::new(host, None);
        inner.holds = 1;
        inner.restoring = Some(Restoring { renewed, ..Restoring::default() });
        Self::of(port, budget, inner)
    }

    /// Goes on where the saved bus has stopped, once all offers are made and the guest is there: every
    /// device whose channel was open gets [`BusEvent::Opened`](kmcl::bus::BusEvent::Opened) with
    /// [`OpenRings::resumed`]; what was asked of devices and not answered is asked again; and messages go
    /// both ways.
    ///
    /// # Errors
    /// [`FinishRestoreError`]. Nothing has changed then, for the guest and for devices: more offers may be
    /// made, others withdrawn, and this be called again.
    pub fn finish_restore(&self) -> Result<(), FinishRestoreError> {
        let finishing = Finishing::begin(self)?;
        loop {
            let memory = self.shared.port.memory();
            let found = shape(self.shared.port.vp_count(), memory.as_ref());
            let seen = finishing.look();
            compare_shapes(seen.host.shape(), &found)?;
            if !seen.differ.is_none() {
                return Err(FinishRestoreError::OffersDiffer(seen.differ));
            }
            let mut effects = Vec::new();
            seen.host.go_on(&mut effects);
            let resumed = self.resume(&seen.host, memory.as_ref(), &mut effects)?;
            if finishing.commit(&seen, &resumed, memory, found, effects) {
                drop(finishing);
                self.tell_resumed(resumed);
                return Ok(());
            }
            // A device or the guest has changed something meanwhile.
            self.undo(resumed);
        }
    }

    /// Tells devices before anything else can happen to their channels, and lets go.
    fn tell_resumed(&self, resumed: Vec<Resumed>) {
        for Resumed { offer, device, opened, .. } in resumed {
            if let Err(status) = self.tell_opened(offer, &device, opened) {
                self.feed(|host, effects| host.open_result(offer, status, effects));
            }
        }
        self.release();
    }

    /// Prepares the channels that were open; takes their effects out of `effects`.
    fn resume(
        &self,
        host: &Host,
        memory: Option<&GuestMemory>,
        effects: &mut Vec<Effect>,
    ) -> Result<Vec<Resumed>, FinishRestoreError> {
        let mut resumed = Vec::new();
        let mut rest = Vec::new();
        for effect in effects.drain(..) {
            let Effect::Resume { offer, rings } = effect else {
                rest.push(effect);
                continue;
            };
            let device = self.lock().devices.get(&offer).cloned();
            // Adopted, and there is memory: both were compared. They may be gone since.
            let (Some(device), Some(memory)) = (device, memory) else { continue };
            match self.prepare(&device, memory, &rings, true) {
                Ok((active, opened)) => resumed.push(Resumed { offer, device, active, opened }),
                Err(refused) => {
                    self.undo(resumed);
                    return Err(cannot_resume(host, offer, &refused));
                }
            }
        }
        *effects = rest;
        Ok(resumed)
    }

    fn undo(&self, resumed: Vec<Resumed>) {
        for Resumed { active, .. } in resumed {
            active.signal.set_target(None);
            self.shared.port.unlisten(active.connection_id);
        }
    }

    /// Whether the bus is being restored, and a device takes back what it has offered since: then the
    /// offer stands as it did, and waits for another device.
    pub(super) fn takes_back(&self, offer: OfferId) -> bool {
        let mut inner = self.lock();
        let Some(restoring) = &mut inner.restoring else { return false };
        restoring.changes += 1;
        if restoring.extra.remove(&offer).is_some() {
            return true;
        }
        match restoring.adopted.remove(&offer) {
            None => false,
            Some(Adopted { renewed: false, .. }) => true,
            Some(Adopted { saved, .. }) => {
                // A channel of its own, which nobody has used.
                restoring.renewed.insert(saved.key, saved);
                inner.step(|host, effects| host.revoke(offer, effects));
                true
            }
        }
    }
}

/// A channel that is ready to go on.
struct Resumed {
    offer: OfferId,
    device: Arc<Endpoint>,
    active: Active,
    opened: OpenRings,
}

/// The one call of [`HostBus::finish_restore`] that is under way.
struct Finishing<'a>(&'a HostBus);

/// What a restored bus was like at one moment.
struct Seen {
    host: Arc<Host>,
    changes: u64,
    differ: OffersDiffer,
}

impl<'a> Finishing<'a> {
    fn begin(bus: &'a HostBus) -> Result<Self, FinishRestoreError> {
        match &mut bus.lock().restoring {
            Some(restoring) if !restoring.finishing => {
                restoring.finishing = true;
                Ok(Self(bus))
            }
            _ => Err(FinishRestoreError::NotRestoring),
        }
    }

    fn look(&self) -> Seen {
        let inner = self.0.lock();
        let host = Arc::clone(&inner.host);
        // It is there for as long as this value is: nobody else ends a restore.
        let restoring = inner.restoring.as_ref();
        let changes = restoring.map_or(0, |restoring| restoring.changes);
        let differ = restoring.map(|restoring| restoring.compare(&host)).unwrap_or_default();
        Seen { host, changes, differ }
    }

    /// Ends the restore; not if anything has changed since. The bus is held still.
    fn commit(
        &self,
        seen: &Seen,
        resumed: &[Resumed],
        memory: Option<GuestMemory>,
        found: GuestShape,
        effects: Vec<Effect>,
    ) -> bool {
        let mut inner = self.0.lock();
        let changes = inner.restoring.as_ref().map(|restoring| restoring.changes);
        // `seen` has the host, so that a step since then has made another one.
        if !Arc::ptr_eq(&inner.host, &seen.host) || changes != Some(seen.changes) {
            return false;
        }
        inner.restoring = None;
        inner.memory = memory;
        if seen.host.shape() != &found {
            // There was no guest.
            inner.step(|host, effects| host.guest_reset(found, effects));
        }
        let active = resumed.iter().map(|resumed| (resumed.offer, resumed.active.clone()));
        inner.active.extend(active);
        inner.effects.extend(effects);
        true
    }
}

impl Drop for Finishing<'_> {
    fn drop(&mut self) {
        if let Some(restoring) = &mut self.0.lock().restoring {
            restoring.finishing = false;
        }
    }
}

impl Inner {
    /// An offer that is made while the bus is being restored.
    pub(super) fn adopt(&mut self, made: OfferParams) -> Result<OfferId, OfferError> {
        let key = made.key;
        let host = Arc::clone(&self.host);
        let Some(restoring) = &mut self.restoring else { return Err(OfferError::Clash { key }) };
        restoring.changes += 1;
        if let Some(saved) = restoring.renewed.get(&key).cloned() {
            drop(host); // it is about to change
            let offer = self.step(|host, _| host.offer(made.clone()))?;
            if let Some(restoring) = &mut self.restoring {
                restoring.renewed.remove(&key);
                restoring.adopted.insert(offer, Adopted { saved, made, renewed: true });
            }
            return Ok(offer);
        }
        let standing = host.standing(key).and_then(|offer| Some((offer, host.channel(offer)?)));
        if let Some((offer, channel)) = standing {
            if restoring.adopted.contains_key(&offer) {
                return Err(OfferError::Clash { key });
            }
            let saved = channel.params.clone();
            restoring.adopted.insert(offer, Adopted { saved, made, renewed: false });
            return Ok(offer);
        }
        if restoring.extra.values().any(|other| *other == key) {
            return Err(OfferError::Clash { key });
        }
        let count = restoring.adopted.len() + restoring.extra.len();
        if count >= MAX_CHANNELS {
            return Err(OfferError::TooManyChannels { count });
        }
        let first = restoring.extra.first_key_value().map_or(LAST_EXTRA, |(first, _)| first.0 - 1);
        restoring.extra.insert(OfferId(first), key);
        Ok(OfferId(first))
    }
}

impl Restoring {
    fn compare(&self, host: &Host) -> OffersDiffer {
        let stands =
            |channel: &Channel| matches!(channel.offer, OfferState::Hidden | OfferState::Offered);
        let waiting = host
            .channels()
            .filter(|(offer, channel)| stands(channel) && !self.adopted.contains_key(offer))
            .map(|(_, channel)| channel.params.key);
        OffersDiffer {
            missing: waiting.chain(self.renewed.keys().copied()).collect(),
            extra: self.extra.values().copied().collect(),
            changed: self.adopted.values().flat_map(Adopted::changes).collect(),
        }
    }
}

impl Adopted {
    fn changes(&self) -> Vec<ChangedOffer> {
        let OfferParams {
            key,
            enumerate_device_interface,
            pipe,
            tlnpi_provider,
            force_new_channel,
            mmio_megabytes,
            mmio_megabytes_optional,
            user_defined,
        } = &self.saved;
        let made = &self.made;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let rows: [(&'static str, String, String); 7] = [
            (
                "enumerate_device_interface",
                enumerate_device_interface.to_string(),
                made.enumerate_device_interface.to_string(),
            ),
            ("pipe", pipe.to_string(), made.pipe.to_string()),
            ("tlnpi_provider", tlnpi_provider.to_string(), made.tlnpi_provider.to_string()),
            (
                "force_new_channel",
                force_new_channel.to_string(),
                made.force_new_channel.to_string(),
            ),
            ("mmio_megabytes", mmio_megabytes.to_string(), made.mmio_megabytes.to_string()),
            (
                "mmio_megabytes_optional",
                mmio_megabytes_optional.to_string(),
                made.mmio_megabytes_optional.to_string(),
            ),
            ("user_defined", hex(user_defined), hex(&made.user_defined)),
        ];
        let changed = |(field, saved, offered)| ChangedOffer { key: *key, field, saved, offered };
        rows.into_iter().filter(|(_, saved, offered)| saved != offered).map(changed).collect()
    }
}

impl OffersDiffer {
    /// Whether there is no difference.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.changed.is_empty()
    }
}

impl fmt::Display for OffersDiffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        let mut line = |line: fmt::Arguments<'_>| {
            let begun = f.write_str(std::mem::replace(&mut between, "\n"));
            begun.and_then(|()| f.write_fmt(line))
        };
        for key in &self.missing {
            line(format_args!("missing: {key}"))?;
        }
        for key in &self.extra {
            line(format_args!("extra: {key}"))?;
        }
        for ChangedOffer { key, field, saved, offered } in &self.changed {
            line(format_args!("changed: {key}: {field} was {saved}, is {offered}"))?;
        }
        Ok(())
    }
}

fn cannot_resume(host: &Host, offer: OfferId, why: &CannotOpen) -> FinishRestoreError {
    let why = why.to_string();
    match host.channel(offer) {
        Some(channel) => FinishRestoreError::Resume { key: channel.params.key, why },
        None => FinishRestoreError::NotRestoring, // it was there a moment ago
    }
}

fn compare_shapes(saved: &GuestShape, found: &GuestShape) -> Result<(), FinishRestoreError> {
    if *saved == GuestShape::default() || saved == found {
        return Ok(()); // there was no guest, and whoever is there now is new
    }
    if *found == GuestShape::default() {
        return Err(FinishRestoreError::NoGuest);
    }
    if saved.vp_count != found.vp_count {
        let (saved, found) = (saved.vp_count, found.vp_count);
        return Err(FinishRestoreError::VpCount { saved, found });
    }
    let (then, now) = (&saved.ram, &found.ram);
    let ends = then.runs().iter().chain(now.runs()).flat_map(|(first, end)| [*first, *end]);
    // Where they differ, they begin to differ at the end of a run.
    let pfn = ends.filter(|pfn| then.contains(*pfn) != now.contains(*pfn)).min().unwrap_or(0);
    let (saved_pages, found_pages) = (then.pages(), now.pages());
    Err(FinishRestoreError::Ram { saved_pages, found_pages, pfn, saved: then.contains(pfn) })
}
