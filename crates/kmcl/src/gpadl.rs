//! GPADLs: guest pages that a client describes to its server once, to be used for as long as the
//! channel is open.
//!
//! Source: kmcl-semantics section 11; D-56 to D-58.

use std::collections::BTreeSet;

use vmbus_memory::GuestMemory;
use vmbus_memory::PageRun;
use vmbus_wire::ranges::{GpaRange, GpaRanges};
use vmbus_wire::status::NtStatus;

use crate::bus::{GpadlPages, PageRange};
use crate::channel::{Channel, lock};
use crate::clip::clip;
use crate::control::Link;
use crate::error::Error;
use crate::events::GpadlAnswer;
use crate::external::{ExternalData, outside};
use crate::flags::{ExternalDataFlags, GpadlFlags};

/// GPADLs of one channel: those created (client), or mapped (server).
#[derive(Default)]
pub(crate) struct Mappings {
    handles: BTreeSet<u32>,
}

/// A GPADL that a server endpoint has mapped. The pages are the guest's RAM and change at any
/// moment; they stay valid until [`Channel::unmap_gpadl`] or the end of `closed`.
pub struct GpadlMapping {
    memory: GuestMemory,
    words: Vec<u64>,
    range_count: u32,
    flags: ExternalDataFlags,
}

impl GpadlMapping {
    fn new(memory: GuestMemory, pages: &GpadlPages, flags: GpadlFlags) -> Result<Self, Error> {
        let mut words = Vec::new();
        for range in &pages.ranges {
            let range = view(range);
            words.push(range.header_word());
            words.extend_from_slice(range.pfns);
        }
        let range_count = u32::try_from(pages.ranges.len()).unwrap_or(u32::MAX);
        let read_only = flags.contains(GpadlFlags::READ_ONLY);
        let flags =
            if read_only { ExternalDataFlags::READ_ONLY } else { ExternalDataFlags::empty() };
        let mapping = Self { memory, words, range_count, flags };
        match outside(&mapping.memory, mapping.ranges()?) {
            None => Ok(mapping),
            Some((gpa, len)) => Err(Error::NotMemory { gpa, len }),
        }
    }

    fn ranges(&self) -> Result<GpaRanges<'_>, Error> {
        let bad = Error::Bus(NtStatus::INVALID_PARAMETER_3);
        GpaRanges::parse(&self.words, self.range_count).map_err(|_| bad)
    }

    /// The pages, to be read, written, or turned into an I/O vector.
    ///
    /// # Errors
    /// None in practice: the pages were checked when they were mapped, and RAM does not go away.
    pub fn data(&self) -> Result<ExternalData<'_>, Error> {
        Ok(ExternalData::new(&self.memory, self.ranges()?, self.flags))
    }
}

impl Channel {
    /// Client: describes `byte_count` bytes of its own memory, from guest physical address `gpa` on,
    /// to the server. Returns the handle, to be told to the server, once the server has confirmed.
    /// Blocks: the bus must be driven by another thread meanwhile.
    ///
    /// # Errors
    /// [`Error::State`] unless the channel is a client's and open; [`Error::Argument`] 2 for undefined
    /// flags, 4 for no bytes; [`Error::Bus`] with what bus or server answered; [`Error::Removed`] where the channel
    /// went down meanwhile.
    ///
    /// Source: VmbChannelCreateGpadlFromBuffer.
    pub fn create_gpadl_from_buffer(
        &self,
        flags: GpadlFlags,
        gpa: u64,
        byte_count: u32,
    ) -> Result<u32, Error> {
        let page = u64::from(vmbus_wire::PAGE_SIZE_U32);
        let no_bytes = Error::Argument { position: 4, name: "ByteCount", value: 0 };
        let last = u64::from(byte_count).checked_sub(1).ok_or(no_bytes)?;
        let end =
            gpa.checked_add(last).ok_or(Error::NotMemory { gpa, len: u64::from(byte_count) })?;
        let pfns: Vec<u64> = (gpa / page..=end / page).collect();
        let byte_offset = u32::try_from(gpa % page).unwrap_or(0);
        self.create_gpadl(flags, vec![PageRange { byte_count, byte_offset, pfns }])
    }

    /// Client: as [`Self::create_gpadl_from_buffer`], for pages from [`Channel::allocate_pages`].
    ///
    /// # Errors
    /// As there.
    pub fn create_gpadl_from_pages(
        &self,
        flags: GpadlFlags,
        pages: &PageRun,
    ) -> Result<u32, Error> {
        let bytes = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        self.create_gpadl_from_buffer(flags, pages.gpa(), bytes)
    }

    /// Client: describes a part of a list of ranges: `length` bytes from `offset` on, 0 for all that
    /// follow.
    ///
    /// # Errors
    /// As [`Self::create_gpadl_from_buffer`], and [`Error::Argument`] 3 for a malformed range, 4 or 5
    /// where the ranges do not reach so far.
    ///
    /// Source: VmbChannelCreateGpadlFromMdl.
    pub fn create_gpadl_from_mdl(
        &self,
        flags: GpadlFlags,
        ranges: &[GpaRange<'_>],
        offset: u32,
        length: u32,
    ) -> Result<u32, Error> {
        let names = ["Mdl", "StartOffsetWithinMdl", "DataLengthWithinMdl"];
        let ranges = clip(ranges, offset, length, false)
            .map_err(|error| error.at(3, names))?
            .map(|range| PageRange {
                byte_count: range.byte_count,
                byte_offset: range.byte_offset,
                pfns: range.pfns.to_vec(),
            })
            .collect();
        self.create_gpadl(flags, ranges)
    }

    fn create_gpadl(&self, flags: GpadlFlags, ranges: Vec<PageRange>) -> Result<u32, Error> {
        check(flags)?;
        let link = self.client_link("create_gpadl")?;
        let pages = GpadlPages { ranges, read_only: flags.contains(GpadlFlags::READ_ONLY) };
        let handle = link.create_gpadl(pages).map_err(Error::Bus)?;
        // From here on it is undone when the channel closes.
        lock(&self.shared.mappings).handles.insert(handle);
        let created = |answer: &GpadlAnswer| match answer {
            GpadlAnswer::Created { gpadl, .. } => *gpadl == handle,
            GpadlAnswer::TornDown { .. } => false,
        };
        match self.await_answer(created) {
            Some(GpadlAnswer::Created { status, .. }) if status.is_success() => Ok(handle),
            Some(GpadlAnswer::Created { status, .. }) => {
                lock(&self.shared.mappings).handles.remove(&handle);
                Err(Error::Bus(status))
            }
            _ => {
                if lock(&self.shared.mappings).handles.remove(&handle) {
                    link.teardown_gpadl(handle);
                }
                Err(Error::Removed { state: self.state() })
            }
        }
    }

    /// Client: takes a GPADL back. Blocks while the server has it mapped. A handle that is not this
    /// channel's is ignored.
    ///
    /// Source: VmbChannelDeleteGpadl.
    pub fn delete_gpadl(&self, gpadl: u32) {
        if !lock(&self.shared.mappings).handles.remove(&gpadl) {
            debug_assert!(false, "GPADL {gpadl:#x} is not this channel's");
            return;
        }
        let Ok(link) = self.client_link("delete_gpadl") else { return };
        link.teardown_gpadl(gpadl);
        let torn_down = |answer: &GpadlAnswer| *answer == GpadlAnswer::TornDown { gpadl };
        let _gone_either_way = self.await_answer(torn_down);
    }

    /// Server: maps a GPADL that the client has created for this channel. Each map is paired with an
    /// unmap.
    ///
    /// # Errors
    /// D-57: [`Error::State`] unless the channel is a server's and open; [`Error::Argument`] 2 for
    /// undefined flags; [`Error::AlreadyMapped`];
    /// [`Error::ReadOnly`] for write access to one created read-only; [`Error::Bus`] with
    /// STATUS_INVALID_PARAMETER_3 for an unknown handle; [`Error::NotMemory`].
    ///
    /// Source: VmbChannelMapGpadl.
    pub fn map_gpadl(&self, flags: GpadlFlags, gpadl: u32) -> Result<GpadlMapping, Error> {
        check(flags)?;
        let link = self.server_link("map_gpadl")?;
        let state = Error::State { function: "map_gpadl", state: self.state() };
        let memory = self.memory().ok_or(state)?;
        if !lock(&self.shared.mappings).handles.insert(gpadl) {
            return Err(Error::AlreadyMapped { gpadl });
        }
        link.set_gpadl_in_use(gpadl, true);
        let mapped = link.gpadl(gpadl).map_err(Error::Bus).and_then(|pages| {
            if pages.read_only && !flags.contains(GpadlFlags::READ_ONLY) {
                return Err(Error::ReadOnly);
            }
            GpadlMapping::new(memory, &pages, flags)
        });
        if mapped.is_err() {
            self.unmap_gpadl(gpadl);
        }
        mapped
    }

    /// Server: lets go of a GPADL; the client's teardown of it can be answered now. A handle that is
    /// not mapped is ignored.
    ///
    /// Source: VmbChannelUnmapGpadl.
    pub fn unmap_gpadl(&self, gpadl: u32) {
        if !lock(&self.shared.mappings).handles.remove(&gpadl) {
            debug_assert!(false, "GPADL {gpadl:#x} is not mapped");
            return;
        }
        self.with_server_link(|link| link.set_gpadl_in_use(gpadl, false));
    }

    /// Undoes what the device has left after `closed` (D-58).
    pub(crate) fn release_gpadls(&self) {
        let left = std::mem::take(&mut lock(&self.shared.mappings).handles);
        if left.is_empty() {
            return;
        }
        tracing::warn!(channel = %self.name(), count = left.len(), "GPADLs left after close undone");
        // The bus may wake foreign code: not under our lock.
        let link = lock(&self.shared.control).link.clone();
        for gpadl in left {
            match &link {
                Link::Server(link) => link.set_gpadl_in_use(gpadl, false),
                Link::Client(link) => link.teardown_gpadl(gpadl),
                Link::None => {}
            }
        }
    }

    fn await_answer(&self, wanted: impl Fn(&GpadlAnswer) -> bool) -> Option<GpadlAnswer> {
        loop {
            let seen = self.shared.mailbox.rung();
            if let Some(answer) = self.shared.mailbox.take_answer(&wanted) {
                return Some(answer);
            }
            // Inside a callback the state does not move; a bus that is gone says so by an event.
            if !self.state().accepts_sends() || self.is_ending() {
                return self.shared.mailbox.take_answer(&wanted);
            }
            self.drive_unless_driven();
            self.shared.mailbox.wait(seen, None);
        }
    }
}

fn check(flags: GpadlFlags) -> Result<(), Error> {
    let value = u64::from(flags.bits());
    match flags.difference(GpadlFlags::all()).is_empty() {
        true => Ok(()),
        false => Err(Error::Argument { position: 2, name: "Flags", value }),
    }
}

fn view(range: &PageRange) -> GpaRange<'_> {
    GpaRange { byte_count: range.byte_count, byte_offset: range.byte_offset, pfns: &range.pfns }
}
