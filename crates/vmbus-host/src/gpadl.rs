//! GPADLs: lists of guest pages that a guest describes to a channel.
//!
//! A GPADL arrives in pieces: a header with the first words, then as many bodies as it takes. Bodies
//! name no channel, so that of two channels only one may be receiving a GPADL of the same id; whole
//! ones are told apart by channel *and* id.
//!
//! Source: vmbus-wire section 3, messages 8 to 12, and section 5.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use vmbus_wire::message::{GpadlError, GpadlHeader};
use vmbus_wire::ranges::{GpaRanges, RangeError};
use zerocopy::little_endian::U64;

use crate::limits::{MAX_GPADLS, MAX_GPADLS_PER_CHANNEL, MAX_INCOMPLETE_GPADLS};
use crate::offer::OfferId;
use crate::pages::Pages;
use crate::shape::RamMap;

/// The GPADLs of one guest.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Gpadls {
    pub(crate) table: BTreeMap<(OfferId, u32), Gpadl>,
    /// Whose GPADL of this id is receiving bodies.
    assembling: BTreeMap<u32, OfferId>,
    /// Pages of all of `table`.
    pages: u64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Gpadl {
    pub(crate) state: GpadlState,
    /// What it counts against the quota.
    pages: u64,
    /// The device has it mapped.
    pub(crate) in_use: bool,
}

/// How far a GPADL has come, and what the guest has been told of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum GpadlState {
    /// Words are missing. The guest waits for GPADL_CREATED; the device cannot see it.
    Assembling(Assembly),
    /// The guest was told that it exists; the device may look it up.
    Created(Pages),
    /// The guest has taken it back and waits for GPADL_TORNDOWN, which is held back while a ring or
    /// the device uses the pages. The device finds it no more; after a restore an open ring in it is
    /// found again by these pages.
    TearingDown(Pages),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Assembly {
    /// Grows with what arrives, not with what the header announces.
    pub(crate) words: Vec<u64>,
    pub(crate) words_total: usize,
    pub(crate) range_count: u16,
}

/// Whether a GPADL is whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    Incomplete,
    Created,
}

/// What became of a GPADL that the guest takes back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Teardown {
    /// Gone; the guest is to be told.
    Done,
    /// Still used; [`Gpadls::device_let_go`] or [`Gpadls::set_in_use`] ends it.
    Held,
}

/// Why a message about a GPADL was refused. Always the guest's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GpadlRefusal {
    /// The channel has a GPADL of this id.
    #[error("the channel has a GPADL of this id")]
    Duplicate,
    /// Bodies for this id would be ambiguous: another channel is receiving them.
    #[error("another channel is receiving a GPADL of this id")]
    IdBusy,
    /// The channel has no such GPADL.
    #[error("the channel has no such GPADL")]
    Unknown,
    /// A body for an id under which nothing is being received.
    #[error("no GPADL of this id is being received")]
    NoHeader,
    /// A body without a single word.
    #[error("a body of no words")]
    EmptyBody,
    /// The header contradicts itself.
    #[error(transparent)]
    Header(#[from] GpadlError),
    /// The ranges are wrong.
    #[error(transparent)]
    Ranges(#[from] RangeError),
    /// A page that is not RAM.
    #[error("page frame {pfn:#x} is not RAM")]
    NotRam {
        /// The page frame.
        pfn: u64,
    },
    /// The channel has as many GPADLs as it may have.
    #[error("the channel has {count} GPADLs, the limit")]
    TooManyOfChannel {
        /// How many.
        count: usize,
    },
    /// The guest has as many GPADLs as it may have.
    #[error("the guest has {count} GPADLs, the limit")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// As many GPADLs are being received as may be.
    #[error("{count} GPADLs are incomplete, the limit")]
    TooManyIncomplete {
        /// How many.
        count: usize,
    },
    /// The guest's GPADLs would describe more pages than it may share.
    #[error("{asked} more pages, {used} of {quota} are in use")]
    Quota {
        /// Pages of the GPADL.
        asked: u64,
        /// Pages of the guest's other GPADLs.
        used: u64,
        /// The quota.
        quota: u64,
    },
    /// Words are missing still: it can be neither used nor taken back.
    #[error("{have} of {total} words have arrived")]
    Incomplete {
        /// Words that arrived.
        have: usize,
        /// Words announced.
        total: usize,
    },
    /// The guest has taken it back already.
    #[error("the GPADL is being torn down")]
    TearingDown,
}

impl Gpadls {
    /// Takes a header and the words in it.
    pub(crate) fn begin(
        &mut self,
        offer: OfferId,
        header: &GpadlHeader<'_>,
        ram: &RamMap,
        quota: u64,
    ) -> Result<Progress, GpadlRefusal> {
        let words_total = header.word_count()?;
        let gpadl = header.fields.gpadl_id.get();
        let range_count = header.fields.range_count.get();
        if self.table.contains_key(&(offer, gpadl)) {
            return Err(GpadlRefusal::Duplicate);
        }
        // `word_count` has made sure of two words for every range.
        let pages = (words_total - usize::from(range_count)) as u64;
        self.check_room(offer, pages, quota)?;

        let words: Vec<u64> =
            header.words().iter().take(words_total).map(|word| word.get()).collect();
        let assembly = Assembly { words, words_total, range_count };
        let (state, progress) = if assembly.words.len() == words_total {
            (GpadlState::Created(assembly.finish(ram)?), Progress::Created)
        } else {
            self.start_assembling(offer, gpadl)?;
            (GpadlState::Assembling(assembly), Progress::Incomplete)
        };
        self.table.insert((offer, gpadl), Gpadl { state, pages, in_use: false });
        self.pages += pages;
        Ok(progress)
    }

    fn start_assembling(&mut self, offer: OfferId, gpadl: u32) -> Result<(), GpadlRefusal> {
        let count = self.assembling.len();
        if count >= MAX_INCOMPLETE_GPADLS {
            return Err(GpadlRefusal::TooManyIncomplete { count });
        }
        match self.assembling.entry(gpadl) {
            Entry::Occupied(_) => Err(GpadlRefusal::IdBusy),
            Entry::Vacant(entry) => {
                entry.insert(offer);
                Ok(())
            }
        }
    }

    fn check_room(&self, offer: OfferId, asked: u64, quota: u64) -> Result<(), GpadlRefusal> {
        let count = self.of_channel(offer).count();
        if count >= MAX_GPADLS_PER_CHANNEL {
            return Err(GpadlRefusal::TooManyOfChannel { count });
        }
        let count = self.table.len();
        if count >= MAX_GPADLS {
            return Err(GpadlRefusal::TooMany { count });
        }
        let used = self.pages;
        if used + asked > quota {
            return Err(GpadlRefusal::Quota { asked, used, quota });
        }
        Ok(())
    }

    /// Which channel is receiving bodies for this id.
    pub(crate) fn receiver(&self, gpadl: u32) -> Option<OfferId> {
        self.assembling.get(&gpadl).copied()
    }

    /// Takes the words of a body. An error other than [`GpadlRefusal::EmptyBody`] and
    /// [`GpadlRefusal::NoHeader`] ends the GPADL: all words have come, and they are wrong.
    pub(crate) fn extend(
        &mut self,
        gpadl: u32,
        words: &[U64],
        ram: &RamMap,
    ) -> Result<Progress, GpadlRefusal> {
        let offer = self.receiver(gpadl).ok_or(GpadlRefusal::NoHeader)?;
        let entry = self.table.get_mut(&(offer, gpadl)).ok_or(GpadlRefusal::NoHeader)?;
        let GpadlState::Assembling(assembly) = &mut entry.state else {
            return Err(GpadlRefusal::NoHeader);
        };
        let before = assembly.words.len();
        let missing = assembly.words_total - before;
        assembly.words.extend(words.iter().take(missing).map(|word| word.get()));
        if assembly.words.len() == before {
            return Err(GpadlRefusal::EmptyBody);
        }
        if assembly.words.len() < assembly.words_total {
            return Ok(Progress::Incomplete);
        }
        match assembly.finish(ram) {
            Ok(pages) => {
                entry.state = GpadlState::Created(pages);
                self.assembling.remove(&gpadl);
                Ok(Progress::Created)
            }
            Err(refusal) => {
                self.remove(offer, gpadl);
                Err(refusal)
            }
        }
    }

    /// The guest takes a GPADL back; `in_ring`: the channel's ring lies in it.
    pub(crate) fn tear_down(
        &mut self,
        offer: OfferId,
        gpadl: u32,
        in_ring: bool,
    ) -> Result<Teardown, GpadlRefusal> {
        let entry = self.table.get_mut(&(offer, gpadl)).ok_or(GpadlRefusal::Unknown)?;
        match &entry.state {
            GpadlState::Assembling(assembly) => Err(assembly.incomplete()),
            GpadlState::TearingDown(_) => Err(GpadlRefusal::TearingDown),
            GpadlState::Created(_) if in_ring || entry.in_use => {
                entry.begin_teardown();
                Ok(Teardown::Held)
            }
            GpadlState::Created(_) => {
                self.remove(offer, gpadl);
                Ok(Teardown::Done)
            }
        }
    }

    /// The pages of a GPADL that is whole and not being taken back.
    pub(crate) fn get(&self, offer: OfferId, gpadl: u32) -> Result<&Pages, GpadlRefusal> {
        match self.table.get(&(offer, gpadl)).map(|entry| &entry.state) {
            Some(GpadlState::Created(pages)) => Ok(pages),
            Some(GpadlState::Assembling(assembly)) => Err(assembly.incomplete()),
            Some(GpadlState::TearingDown(_)) => Err(GpadlRefusal::TearingDown),
            None => Err(GpadlRefusal::Unknown),
        }
    }

    /// The device maps or unmaps a GPADL. `true`: its teardown waited for that, and is done;
    /// `in_ring` as in [`Gpadls::tear_down`].
    pub(crate) fn set_in_use(
        &mut self,
        offer: OfferId,
        gpadl: u32,
        in_use: bool,
        in_ring: bool,
    ) -> bool {
        let Some(entry) = self.table.get_mut(&(offer, gpadl)) else { return false };
        match entry.state {
            GpadlState::Created(_) => entry.in_use = in_use,
            GpadlState::TearingDown(_) if !in_use => {
                entry.in_use = false;
                if !in_ring {
                    self.remove(offer, gpadl);
                    return true;
                }
            }
            GpadlState::TearingDown(_) | GpadlState::Assembling(_) => {}
        }
        false
    }

    /// The device has let go of everything of its channel. The GPADLs whose teardown waited for that.
    pub(crate) fn device_let_go(&mut self, offer: OfferId) -> Vec<u32> {
        let mut done = Vec::new();
        for (id, entry) in self.of_channel_mut(offer) {
            entry.in_use = false;
            if entry.is_tearing_down() {
                done.push(id);
            }
        }
        for id in &done {
            self.remove(offer, *id);
        }
        done
    }

    /// The pages of a GPADL in which a ring lies, whether or not it is being taken back.
    pub(crate) fn ring_pages(&self, offer: OfferId, gpadl: u32) -> Result<&Pages, GpadlRefusal> {
        match self.table.get(&(offer, gpadl)).map(|entry| &entry.state) {
            Some(GpadlState::TearingDown(pages)) => Ok(pages),
            _ => self.get(offer, gpadl),
        }
    }

    /// Adds a GPADL that was saved, behind the others; not if another one receives bodies of its id.
    pub(crate) fn put_back(
        &mut self,
        offer: OfferId,
        gpadl: u32,
        state: GpadlState,
        in_use: bool,
    ) -> bool {
        if let GpadlState::Assembling(_) = state {
            match self.assembling.entry(gpadl) {
                Entry::Occupied(_) => return false,
                Entry::Vacant(entry) => {
                    entry.insert(offer);
                }
            }
        }
        let pages = state.pages();
        self.pages += pages;
        self.table.insert((offer, gpadl), Gpadl { state, pages, in_use });
        true
    }

    /// The device of a channel is another one now, that has mapped nothing. What is being taken back, and
    /// no ring lies in, is gone; the rest stays as it is until the new device says otherwise.
    pub(crate) fn device_has_moved(
        &mut self,
        offer: OfferId,
        in_ring: impl Fn(u32) -> bool,
    ) -> Vec<u32> {
        let mut done = Vec::new();
        for (id, entry) in self.of_channel_mut(offer) {
            if entry.is_tearing_down() {
                entry.in_use = false;
                if !in_ring(id) {
                    done.push(id);
                }
            }
        }
        for id in &done {
            self.remove(offer, *id);
        }
        done
    }

    /// Drops the GPADLs of a channel that are incomplete: the guest is to be told that they failed.
    pub(crate) fn drop_incomplete(&mut self, offer: OfferId) -> Vec<u32> {
        let is_incomplete = |(id, entry): (u32, &Gpadl)| {
            matches!(entry.state, GpadlState::Assembling(_)).then_some(id)
        };
        let dropped: Vec<u32> = self.of_channel(offer).filter_map(is_incomplete).collect();
        for id in &dropped {
            self.remove(offer, *id);
        }
        dropped
    }

    /// Drops every GPADL but the rings named by `kept`.
    pub(crate) fn disconnect(&mut self, kept: &[(OfferId, u32)]) {
        self.retain(|offer, id, _| kept.contains(&(offer, id)));
    }

    /// Drops every GPADL of a channel that is no more.
    pub(crate) fn remove_channel(&mut self, offer: OfferId) {
        self.retain(|owner, _, _| owner != offer);
    }

    fn retain(&mut self, keep: impl Fn(OfferId, u32, &Gpadl) -> bool) {
        let dropped: Vec<(OfferId, u32)> = self
            .table
            .iter()
            .filter(|((offer, id), entry)| !keep(*offer, *id, entry))
            .map(|(key, _)| *key)
            .collect();
        for (offer, id) in dropped {
            self.remove(offer, id);
        }
    }

    fn remove(&mut self, offer: OfferId, gpadl: u32) {
        if let Some(entry) = self.table.remove(&(offer, gpadl)) {
            self.pages -= entry.pages;
            if matches!(entry.state, GpadlState::Assembling(_)) {
                self.assembling.remove(&gpadl);
            }
        }
    }

    fn of_channel(&self, offer: OfferId) -> impl Iterator<Item = (u32, &Gpadl)> {
        self.table.range((offer, 0)..=(offer, u32::MAX)).map(|((_, id), entry)| (*id, entry))
    }

    fn of_channel_mut(&mut self, offer: OfferId) -> impl Iterator<Item = (u32, &mut Gpadl)> {
        self.table.range_mut((offer, 0)..=(offer, u32::MAX)).map(|((_, id), entry)| (*id, entry))
    }

    /// GPADLs, incomplete ones included.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// GPADLs of which words are missing.
    pub(crate) fn incomplete(&self) -> usize {
        self.assembling.len()
    }

    /// Pages that count against the quota.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Every GPADL, with its channel and id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (OfferId, u32, &Gpadl)> {
        self.table.iter().map(|((offer, id), entry)| (*offer, *id, entry))
    }

    /// What is wrong with the books, if anything.
    pub(crate) fn violations(&self, quota: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        let pages: u64 = self.table.values().map(|entry| entry.pages).sum();
        if pages != self.pages || pages > quota {
            wrong
                .push(format!("{pages} GPADL pages, {} on the books, {quota} allowed", self.pages));
        }
        if self.table.len() > MAX_GPADLS || self.assembling.len() > MAX_INCOMPLETE_GPADLS {
            let (all, incomplete) = (self.table.len(), self.assembling.len());
            wrong.push(format!("{all} GPADLs, {incomplete} incomplete"));
        }
        let (mut assembling, mut of_channel) = (0, (OfferId(0), 0));
        for ((offer, id), entry) in &self.table {
            of_channel =
                if of_channel.0 == *offer { (*offer, of_channel.1 + 1) } else { (*offer, 1) };
            if of_channel.1 > MAX_GPADLS_PER_CHANNEL {
                wrong.push(format!("{} GPADLs on {offer:?}", of_channel.1));
            }
            if let GpadlState::Assembling(assembly) = &entry.state {
                assembling += 1;
                if entry.in_use || assembly.words.len() >= assembly.words_total {
                    wrong.push(format!("incomplete GPADL {id:#x} of {offer:?}: {entry:?}"));
                }
                if self.receiver(*id) != Some(*offer) {
                    wrong.push(format!("incomplete GPADL {id:#x} of {offer:?} is another one's"));
                }
            }
        }
        if assembling != self.assembling.len() {
            let on_the_books = &self.assembling;
            wrong.push(format!("{assembling} incomplete, on the books {on_the_books:?}"));
        }
        wrong
    }
}

impl Gpadl {
    pub(crate) fn is_tearing_down(&self) -> bool {
        matches!(self.state, GpadlState::TearingDown(_))
    }

    fn begin_teardown(&mut self) {
        if let GpadlState::Created(pages) = &mut self.state {
            self.state = GpadlState::TearingDown(std::mem::take(pages));
        }
    }
}

impl GpadlState {
    /// What it counts against the quota.
    fn pages(&self) -> u64 {
        match self {
            // Two words for every range: `GpadlHeader::word_count` and a restore make sure of it.
            Self::Assembling(assembly) => {
                (assembly.words_total - usize::from(assembly.range_count)) as u64
            }
            Self::Created(pages) | Self::TearingDown(pages) => pages.count() as u64,
        }
    }
}

impl Assembly {
    fn incomplete(&self) -> GpadlRefusal {
        GpadlRefusal::Incomplete { have: self.words.len(), total: self.words_total }
    }

    fn finish(&self, ram: &RamMap) -> Result<Pages, GpadlRefusal> {
        let ranges = GpaRanges::parse(&self.words, u32::from(self.range_count))?;
        Pages::new(ranges, ram).map_err(|pfn| GpadlRefusal::NotRam { pfn })
    }
}
