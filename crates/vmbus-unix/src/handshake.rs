//! How two processes get to know each other.
//!
//! ```text
//! guest                                   host
//!   │── connect ───────────────────────────▶│
//!   │── Hello: version, memory, attention ─▶│  checks everything
//!   │◀─ Welcome: version, event port ───────│
//!   │◀─ Refused: version, reason, text ─────│  or this, and the end
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmbus_memory::{FdRegion, GuestMemory};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{ConnectionError, FrameError, Reason, reason_text};
use crate::event::PeerEvent;
use crate::frame::{
    Frame, FrameRef, Greeting, HelloRegion, Kind, MAX_HELLO_REGIONS, MAX_REASON_TEXT,
    TRANSPORT_VERSION,
};
use crate::link::Received;

/// What a guest has introduced itself with.
pub(crate) struct Hello {
    pub(crate) memory: GuestMemory,
    /// Rung for what has no channel: the shared interrupt page of old versions.
    pub(crate) attention: PeerEvent,
}

impl Hello {
    /// Checks what a guest says, and maps its memory.
    pub(crate) fn accept(
        received: Received,
        max_memory_bytes: u64,
    ) -> Result<Self, ConnectionError> {
        let Received { bytes, descriptors } = received;
        let frame = FrameRef::parse(&bytes)?;
        if frame.kind != Kind::Hello {
            let state = "waiting for its greeting";
            return Err(FrameError::Unexpected { kind: frame.kind, state }.into());
        }
        // The version before anything that it may change.
        let (greeting, rest) = frame.greeting()?;
        check_version(&greeting)?;
        let regions = greeting.regions.get();
        let count = match usize::try_from(regions) {
            Ok(count @ 1..=MAX_HELLO_REGIONS) => count,
            _ => return Err(FrameError::Regions { regions }.into()),
        };
        let (regions, _later_versions) =
            <[HelloRegion]>::ref_from_prefix_with_elems(rest, count).map_err(|_| {
                FrameError::PayloadTooShort { kind: Kind::Hello, len: frame.payload.len() }
            })?;
        let regions = regions.to_vec();
        let bytes = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.len.get()));
        if bytes > max_memory_bytes {
            return Err(ConnectionError::TooMuchMemory { bytes, limit: max_memory_bytes });
        }
        let (expected, got) = (1 + count, descriptors.len());
        if got != expected {
            return Err(FrameError::Descriptors { kind: Kind::Hello, expected, got }.into());
        }
        let mut descriptors = descriptors.into_iter();
        let missing = FrameError::Descriptors { kind: Kind::Hello, expected, got: 0 };
        let attention = descriptors.next().ok_or(missing)?;
        let attention = PeerEvent::from_peer(attention, "the attention event")?;
        let regions = descriptors.zip(regions).map(|(fd, region)| FdRegion {
            fd,
            fd_offset: region.fd_offset.get(),
            gpa: region.gpa.get(),
            len: region.len.get(),
        });
        Ok(Self { memory: GuestMemory::from_fds(regions.collect())?, attention })
    }
}

/// What a guest says first, and the descriptors that go with it.
///
/// # Errors
/// [`FrameError::Regions`] where the memory is in too many pieces, or has no descriptors.
pub(crate) fn hello<'a>(
    memory: &'a GuestMemory,
    attention: BorrowedFd<'a>,
) -> Result<(Frame, Vec<BorrowedFd<'a>>), FrameError> {
    let mut descriptors = vec![attention];
    let mut regions = Vec::new();
    for region in memory.regions() {
        let Some((fd, fd_offset)) = region.backing() else { continue };
        descriptors.push(fd);
        regions.push(HelloRegion {
            gpa: region.gpa().into(),
            len: region.len().into(),
            fd_offset: fd_offset.into(),
        });
    }
    let all = memory.regions().len();
    if regions.len() != all || !(1..=MAX_HELLO_REGIONS).contains(&all) {
        return Err(FrameError::Regions { regions: u32::try_from(all).unwrap_or(u32::MAX) });
    }
    let greeting = Greeting::new(regions.len());
    Ok((Frame::new(Kind::Hello, 0, 0, &[greeting.as_bytes(), regions.as_bytes()]), descriptors))
}

/// What a host answers to a guest that it takes. Goes with the event port.
pub(crate) fn welcome() -> Frame {
    Frame::new(Kind::Welcome, 0, 0, &[Greeting::new(0).as_bytes()])
}

/// What a host says to a guest that it does not take, or no longer.
pub(crate) fn refusal(reason: Reason, text: &str) -> Frame {
    let mut end = text.len().min(MAX_REASON_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default();
    let greeting = Greeting::new(0);
    Frame::new(Kind::Refused, reason.to_wire(), 0, &[greeting.as_bytes(), text.as_bytes()])
}

/// What a guest makes of the host's answer: what signals the event port.
pub(crate) fn answer(received: Received) -> Result<PeerEvent, ConnectionError> {
    let Received { bytes, descriptors } = received;
    let frame = FrameRef::parse(&bytes)?;
    match frame.kind {
        Kind::Refused => Err(refused(&frame)?),
        Kind::Welcome => {
            let (greeting, _later_versions) = frame.greeting()?;
            check_version(&greeting)?;
            let event = one_descriptor(Kind::Welcome, descriptors)?;
            PeerEvent::from_peer(event, "the event port")
        }
        kind => {
            let state = "waiting for its greeting";
            Err(FrameError::Unexpected { kind, state }.into())
        }
    }
}

/// Why the host does not take the guest: the other version above all.
pub(crate) fn refused(frame: &FrameRef<'_>) -> Result<ConnectionError, FrameError> {
    let (greeting, text) = frame.greeting()?;
    let reason = Reason::from_wire(frame.a);
    Ok(match check_version(&greeting) {
        Err(other_version) => other_version,
        Ok(()) => ConnectionError::Refused { reason, text: reason_text(text) },
    })
}

/// The one descriptor that a frame of this kind carries.
pub(crate) fn one_descriptor(kind: Kind, descriptors: Vec<OwnedFd>) -> Result<OwnedFd, FrameError> {
    let got = descriptors.len();
    match <[OwnedFd; 1]>::try_from(descriptors) {
        Ok([descriptor]) => Ok(descriptor),
        Err(_) => Err(FrameError::Descriptors { kind, expected: 1, got }),
    }
}

/// None of the descriptors that a frame of this kind does not carry.
pub(crate) fn no_descriptor(kind: Kind, descriptors: &[impl AsFd]) -> Result<(), FrameError> {
    match descriptors.len() {
        0 => Ok(()),
        got => Err(FrameError::Descriptors { kind, expected: 0, got }),
    }
}

fn check_version(greeting: &Greeting) -> Result<(), ConnectionError> {
    match greeting.transport_version.get() {
        TRANSPORT_VERSION => Ok(()),
        theirs => Err(ConnectionError::Version { theirs }),
    }
}
