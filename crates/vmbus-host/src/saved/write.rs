//! From a host to its records.

use std::borrow::Borrow;
use std::ops::Bound;

use kmcl::SaveOptions;
use saved_state::bus::{BusRamRecord, KINDS};
use saved_state::{
    Encode, FieldError, FieldProblem, HeaderFlags, Save, SaveStep, Step, StreamInfo, StreamKind,
    StreamWriter, WriteError,
};
use vmbus_wire::guid::Guid;

use crate::host::Host;
use crate::limits::MAX_RAM_RUNS;
use crate::offer::OfferId;
use crate::saved::gpadl;
use crate::saved::to_records::{
    Counts, agreed, channel_record, connection_record, host_record, hvsock_record, message_record,
};

/// A host that is being saved: over a host that is borrowed, or one that is shared and does not change.
///
/// Memory: the caller's buffer, and this value.
#[derive(Clone, Debug)]
pub struct HostSave<H> {
    host: H,
    writer: StreamWriter,
    next: At,
}

/// What is written next.
#[derive(Clone, Copy, Debug)]
enum At {
    Header,
    Host,
    Ram(usize),
    Connection,
    /// The channel behind this one.
    Channels(Bound<OfferId>),
    /// The GPADL behind this one.
    Gpadls(Bound<(OfferId, u32)>),
    /// The request behind this one.
    Hvsock(Bound<u64>),
    Messages(usize),
    End,
    Over,
}

impl Host {
    /// Begins to save the host, at whatever step it is.
    ///
    /// # Errors
    /// [`WriteError`], where the format asked for cannot say it, or the guest's memory has more than
    /// [`MAX_RAM_RUNS`] pieces.
    pub fn save(&self, options: &SaveOptions) -> Result<HostSave<&Self>, WriteError> {
        HostSave::new(self, options)
    }
}

impl<H: Borrow<Host>> HostSave<H> {
    /// As [`Host::save`], over a host that is borrowed in any way.
    ///
    /// # Errors
    /// As [`Host::save`].
    pub fn new(host: H, options: &SaveOptions) -> Result<Self, WriteError> {
        let counts = Counts::of(host.borrow());
        if counts.ram_runs as usize > MAX_RAM_RUNS {
            let (found, most) = (u64::from(counts.ram_runs), MAX_RAM_RUNS as u64);
            let problem = FieldProblem::Range { found, most };
            let why = FieldError { number: 15, name: "ram_runs", problem };
            return Err(WriteError::Field { record: "bus.host", why });
        }
        let info = StreamInfo {
            stream: StreamKind::BUS,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer: options.producer,
            chunks: counts.chunks(),
            bytes: 0,
            items: counts.channels,
        };
        let writer = StreamWriter::new(options.format, info, KINDS)?;
        Ok(Self { host, writer, next: At::Header })
    }
}

impl<H: Borrow<Host>> Save for HostSave<H> {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let host = self.host.borrow();
        let mut out = Out { writer: &mut self.writer, buffer, written: 0 };
        let needed = self.next.go_on(host, &mut out)?;
        Ok(SaveStep { written: out.written, needed: needed.unwrap_or(0), done: needed.is_none() })
    }
}

/// The buffer of one step.
struct Out<'a> {
    writer: &'a mut StreamWriter,
    buffer: &'a mut [u8],
    written: usize,
}

impl Out<'_> {
    /// How much room it takes, if there is too little.
    fn put(
        &mut self,
        write: impl FnOnce(&mut StreamWriter, &mut [u8]) -> Result<Step, WriteError>,
    ) -> Result<Option<usize>, WriteError> {
        let room = self.buffer.get_mut(self.written..).unwrap_or_default();
        match write(self.writer, room)? {
            Step::Written { bytes } => {
                self.written += bytes;
                Ok(None)
            }
            Step::Needs { bytes } => Ok(Some(bytes)),
        }
    }

    fn record(&mut self, record: &impl Encode) -> Result<Option<usize>, WriteError> {
        self.put(|writer, room| writer.record(record, room))
    }
}

impl At {
    /// Writes as much as there is room for. What it would take to go on; `None` when all is written.
    fn go_on(&mut self, host: &Host, out: &mut Out<'_>) -> Result<Option<usize>, WriteError> {
        // A list is walked through from where the last step has stopped: `self` is what was written.
        if let Self::Header = self {
            if let Some(needed) = out.put(StreamWriter::header)? {
                return Ok(Some(needed));
            }
            *self = Self::Host;
        }
        if let Self::Host = self {
            if let Some(needed) = out.record(&host_record(host))? {
                return Ok(Some(needed));
            }
            *self = Self::Ram(0);
        }
        if let Self::Ram(next) = self {
            for &(first_pfn, end_pfn) in host.shape.ram.runs().iter().skip(*next) {
                if let Some(needed) = out.record(&BusRamRecord { first_pfn, end_pfn })? {
                    return Ok(Some(needed));
                }
                *next += 1;
            }
            *self = Self::Connection;
        }
        if let Self::Connection = self {
            if let Some(agreed) = agreed(&host.connection)
                && let Some(needed) = out.record(&connection_record(agreed))?
            {
                return Ok(Some(needed));
            }
            *self = Self::Channels(Bound::Unbounded);
        }
        if let Self::Channels(after) = self {
            for (&id, channel) in host.channels.table.range((*after, Bound::Unbounded)) {
                if let Some(needed) = out.record(&channel_record(id, channel))? {
                    return Ok(Some(needed));
                }
                *after = Bound::Excluded(id);
            }
            *self = Self::Gpadls(Bound::Unbounded);
        }
        if let Self::Gpadls(after) = self {
            for (&key, held) in host.gpadls.table.range((*after, Bound::Unbounded)) {
                if let Some(needed) = out.record(&gpadl::to_record(key, held))? {
                    return Ok(Some(needed));
                }
                *after = Bound::Excluded(key);
            }
            *self = Self::Hvsock(Bound::Unbounded);
        }
        if let Self::Hvsock(after) = self {
            for (&id, request) in host.hvsock.waiting.range((*after, Bound::Unbounded)) {
                if let Some(needed) = out.record(&hvsock_record(request))? {
                    return Ok(Some(needed));
                }
                *after = Bound::Excluded(id);
            }
            *self = Self::Messages(0);
        }
        if let Self::Messages(next) = self {
            for message in host.outgoing.queue.iter().skip(*next) {
                if let Some(needed) = out.record(&message_record(message))? {
                    return Ok(Some(needed));
                }
                *next += 1;
            }
            *self = Self::End;
        }
        if let Self::End = self {
            if let Some(needed) = out.put(StreamWriter::end)? {
                return Ok(Some(needed));
            }
            *self = Self::Over;
        }
        Ok(None)
    }
}
