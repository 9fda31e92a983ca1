//! How two processes get to know each other.
//!
//! ```text
//! guest                                   host
//!   │── connect ───────────────────────────▶│
//!   │── Hello: version, memory, attention ─▶│  checks everything
//!   │◀─ Welcome: version, event port ───────│
//!   │◀─ Refused: version, reason, text ─────│  or this, and the end
//! ```
//!
//! A guest that comes back says `Resume` instead: [`crate::resume`].

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmbus_memory::{FdRegion, GuestMemory};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::MAX_CHANNEL_ID;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::epoch::{Epoch, PeerEpoch};
use crate::error::{ConnectionError, FrameError, Reason, ResumeError, reason_text};
use crate::event::PeerEvent;
use crate::frame::{
    Frame, FrameRef, Greeting, HelloRegion, Kind, MAX_DOORBELLS_PER_FRAME, MAX_HELLO_REGIONS,
    MAX_REASON_TEXT, RESUMABLE, ResumeClaim, TRANSPORT_VERSION,
};
use crate::link::Received;
use crate::resume::{self, SavedGuest};

/// The first frame of a process that has connected.
pub(crate) enum First {
    Hello(Hello),
    Resume(Returning),
}

/// What a guest has introduced itself with.
pub(crate) struct Hello {
    pub(crate) memory: GuestMemory,
    /// Rung for what has no channel: the shared interrupt page of old versions.
    pub(crate) attention: PeerEvent,
    /// It would go on with another process that serves.
    pub(crate) resumable: bool,
}

/// A guest that comes back to a connection that was saved.
pub(crate) struct Returning {
    pub(crate) memory: GuestMemory,
    pub(crate) attention: PeerEvent,
    /// By event flag. Not all of them before [`Self::is_complete`].
    pub(crate) doorbells: BTreeMap<u16, PeerEvent>,
    announced: usize,
    /// The answer to its last post did not reach it.
    pub(crate) answer_again: bool,
}

impl First {
    /// Checks what a guest says, and maps its memory. `saved` is the connection that a guest may go
    /// on with.
    pub(crate) fn accept(
        received: Received,
        max_memory_bytes: u64,
        saved: Option<&SavedGuest>,
    ) -> Result<Self, ConnectionError> {
        let Received { bytes, descriptors } = received;
        let frame = FrameRef::parse(&bytes)?;
        if !matches!(frame.kind, Kind::Hello | Kind::Resume) {
            let state = "waiting for its greeting";
            return Err(FrameError::Unexpected { kind: frame.kind, state }.into());
        }
        // The version before anything that it may change.
        let (greeting, rest) = frame.greeting()?;
        check_version(&greeting)?;
        if frame.kind == Kind::Hello {
            let (attention, memory) =
                donation(&frame, &greeting, rest, descriptors, max_memory_bytes)?;
            let resumable = frame.a & RESUMABLE != 0;
            return Ok(Self::Hello(Hello { memory, attention, resumable }));
        }

        let saved = saved.ok_or(ResumeError::NotRestoring)?;
        let short = FrameError::PayloadTooShort { kind: frame.kind, len: frame.payload.len() };
        let (claim, rest) = ResumeClaim::read_from_prefix(rest).map_err(|_| short)?;
        saved.is_named(&claim)?;
        let answer_again = saved.is_current(&claim)?;
        let too_many = ResumeError::TooManyDoorbells { announced: frame.b };
        if frame.b > MAX_CHANNEL_ID {
            return Err(too_many.into());
        }
        let announced = usize::try_from(frame.b).map_err(|_| too_many)?;
        let (attention, memory) = donation(&frame, &greeting, rest, descriptors, max_memory_bytes)?;
        let identity = resume::identify(&memory).map_err(ConnectionError::system("fstat"))?;
        saved.has_memory(&identity)?;
        let doorbells = BTreeMap::new();
        Ok(Self::Resume(Returning { memory, attention, doorbells, announced, answer_again }))
    }
}

impl Returning {
    /// Takes a frame of doorbells.
    pub(crate) fn add(&mut self, received: Received) -> Result<(), ConnectionError> {
        let Received { bytes, descriptors } = received;
        let frame = FrameRef::parse(&bytes)?;
        if frame.kind != Kind::Doorbells {
            let state = "waiting for its doorbells";
            return Err(FrameError::Unexpected { kind: frame.kind, state }.into());
        }
        let len = frame.payload.len();
        let wrong = FrameError::PayloadTooShort { kind: frame.kind, len };
        let flags = <[U32]>::ref_from_bytes(frame.payload).map_err(|_| wrong)?;
        let (expected, got) = (flags.len(), descriptors.len());
        if got != expected || expected == 0 {
            return Err(FrameError::Descriptors { kind: frame.kind, expected, got }.into());
        }
        let came = self.doorbells.len() + flags.len();
        if came > self.announced {
            // At most 2047, checked when it was announced.
            let announced = u32::try_from(self.announced).unwrap_or(u32::MAX);
            return Err(ResumeError::DoorbellCount { announced, came }.into());
        }
        for (flag, descriptor) in flags.iter().zip(descriptors) {
            let flag = event_flag(flag.get())?;
            let doorbell = PeerEvent::from_peer(descriptor, "a channel's doorbell")?;
            if self.doorbells.insert(flag, doorbell).is_some() {
                return Err(ResumeError::DoorbellTwice { flag }.into());
            }
        }
        Ok(())
    }

    /// Whether all doorbells have come.
    pub(crate) fn is_complete(&self) -> bool {
        self.doorbells.len() == self.announced
    }
}

/// The memory that a guest brings along, and the descriptor before it.
fn donation(
    frame: &FrameRef<'_>,
    greeting: &Greeting,
    rest: &[u8],
    descriptors: Vec<OwnedFd>,
    max_memory_bytes: u64,
) -> Result<(PeerEvent, GuestMemory), ConnectionError> {
    let kind = frame.kind;
    let regions = greeting.regions.get();
    let count = match usize::try_from(regions) {
        Ok(count @ 1..=MAX_HELLO_REGIONS) => count,
        _ => return Err(FrameError::Regions { regions }.into()),
    };
    let (regions, _later_versions) = <[HelloRegion]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| FrameError::PayloadTooShort { kind, len: frame.payload.len() })?;
    let regions = regions.to_vec();
    let bytes = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.len.get()));
    if bytes > max_memory_bytes {
        return Err(ConnectionError::TooMuchMemory { bytes, limit: max_memory_bytes });
    }
    let (expected, got) = (1 + count, descriptors.len());
    if got != expected {
        return Err(FrameError::Descriptors { kind, expected, got }.into());
    }
    let mut descriptors = descriptors.into_iter();
    let missing = FrameError::Descriptors { kind, expected, got: 0 };
    let attention = descriptors.next().ok_or(missing)?;
    let attention = PeerEvent::from_peer(attention, "the attention event")?;
    let regions = descriptors.zip(regions).map(|(fd, region)| FdRegion {
        fd,
        fd_offset: region.fd_offset.get(),
        gpa: region.gpa.get(),
        len: region.len.get(),
    });
    Ok((attention, GuestMemory::from_fds(regions.collect())?))
}

/// A channel's event flag, as a guest gives it.
pub(crate) fn event_flag(flag: u32) -> Result<u16, FrameError> {
    match u16::try_from(flag) {
        Ok(narrow) if (1..=MAX_CHANNEL_ID).contains(&flag) => Ok(narrow),
        _ => Err(FrameError::EventFlag { flag }),
    }
}

/// How the memory is described in a greeting: the descriptors after `attention`, and the regions.
///
/// # Errors
/// [`FrameError::Regions`] where the memory is in too many pieces, or has no descriptors.
fn describe<'a>(
    memory: &'a GuestMemory,
    attention: BorrowedFd<'a>,
) -> Result<(Vec<HelloRegion>, Vec<BorrowedFd<'a>>), FrameError> {
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
    Ok((regions, descriptors))
}

/// What a guest says first, and the descriptors that go with it.
///
/// # Errors
/// As for [`describe`].
pub(crate) fn hello<'a>(
    memory: &'a GuestMemory,
    attention: BorrowedFd<'a>,
    resumable: bool,
) -> Result<(Frame, Vec<BorrowedFd<'a>>), FrameError> {
    let (regions, descriptors) = describe(memory, attention)?;
    let greeting = Greeting::new(regions.len());
    let flags = if resumable { RESUMABLE } else { 0 };
    let parts = [greeting.as_bytes(), regions.as_bytes()];
    Ok((Frame::new(Kind::Hello, flags, 0, &parts), descriptors))
}

/// What a guest says that comes back, and the descriptors that go with it. As many doorbells as it
/// says follow, in [`doorbells`].
///
/// # Errors
/// As for [`describe`].
pub(crate) fn resume<'a>(
    memory: &'a GuestMemory,
    attention: BorrowedFd<'a>,
    claim: &ResumeClaim,
    doorbells: usize,
) -> Result<(Frame, Vec<BorrowedFd<'a>>), FrameError> {
    let (regions, descriptors) = describe(memory, attention)?;
    let greeting = Greeting::new(regions.len());
    let parts = [greeting.as_bytes(), claim.as_bytes(), regions.as_bytes()];
    let doorbells = u32::try_from(doorbells).unwrap_or(u32::MAX); // at most 2047
    Ok((Frame::new(Kind::Resume, 0, doorbells, &parts), descriptors))
}

/// Frames with what the host is to ring, by event flag.
pub(crate) fn doorbells<'a>(
    doorbells: &[(u32, BorrowedFd<'a>)],
) -> impl Iterator<Item = (Frame, Vec<BorrowedFd<'a>>)> {
    doorbells.chunks(MAX_DOORBELLS_PER_FRAME).map(|some| {
        let flags: Vec<U32> = some.iter().map(|(flag, _)| U32::new(*flag)).collect();
        let descriptors = some.iter().map(|(_, descriptor)| *descriptor).collect();
        (Frame::new(Kind::Doorbells, 0, 0, &[flags.as_bytes()]), descriptors)
    })
}

/// What a host answers to a guest that it takes, and the descriptors that go with it. With a name and
/// an epoch, another process may go on with the connection.
pub(crate) fn welcome<'a>(
    event_port: BorrowedFd<'a>,
    resumable: Option<(Guid, &'a Epoch)>,
) -> (Frame, Vec<BorrowedFd<'a>>) {
    let greeting = Greeting::new(0);
    match resumable {
        None => (Frame::new(Kind::Welcome, 0, 0, &[greeting.as_bytes()]), vec![event_port]),
        Some((name, epoch)) => {
            let parts = [greeting.as_bytes(), name.as_bytes()];
            (Frame::new(Kind::Welcome, RESUMABLE, 0, &parts), vec![event_port, epoch.as_fd()])
        }
    }
}

/// What a host answers to a guest that it goes on with, and the descriptors that go with it.
pub(crate) fn resumed<'a>(
    event_port: BorrowedFd<'a>,
    epoch: &'a Epoch,
    posts: u64,
) -> (Frame, Vec<BorrowedFd<'a>>) {
    let (greeting, posts) = (Greeting::new(0), U64::new(posts));
    let parts = [greeting.as_bytes(), posts.as_bytes()];
    (Frame::new(Kind::Resumed, 0, 0, &parts), vec![event_port, epoch.as_fd()])
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

/// What a guest gets that the host takes.
pub(crate) struct Welcome {
    /// What signals the event port.
    pub(crate) event_port: PeerEvent,
    /// What it takes to go on with another process: the connection's name, and its epoch.
    pub(crate) resumable: Option<(Guid, PeerEpoch)>,
}

/// What a guest makes of the host's answer.
pub(crate) fn answer(received: Received) -> Result<Welcome, ConnectionError> {
    let Received { bytes, descriptors } = received;
    let frame = FrameRef::parse(&bytes)?;
    match frame.kind {
        Kind::Refused => Err(refused(&frame)?),
        Kind::Welcome => {
            let (greeting, rest) = frame.greeting()?;
            check_version(&greeting)?;
            if frame.a & RESUMABLE == 0 {
                let event_port = one_descriptor(Kind::Welcome, descriptors)?;
                let event_port = PeerEvent::from_peer(event_port, "the event port")?;
                return Ok(Welcome { event_port, resumable: None });
            }
            let len = frame.payload.len();
            let short = FrameError::PayloadTooShort { kind: frame.kind, len };
            let (name, _later_versions) = Guid::read_from_prefix(rest).map_err(|_| short)?;
            let (event_port, epoch) = port_and_epoch(frame.kind, descriptors)?;
            Ok(Welcome { event_port, resumable: Some((name, epoch)) })
        }
        kind => {
            let state = "waiting for its greeting";
            Err(FrameError::Unexpected { kind, state }.into())
        }
    }
}

/// What a guest gets that the host goes on with.
pub(crate) struct Resumed {
    pub(crate) event_port: PeerEvent,
    pub(crate) epoch: PeerEpoch,
    /// Posts of the guest that the host has taken.
    pub(crate) posts: u64,
}

/// What a guest that comes back makes of the host's answer.
pub(crate) fn resume_answer(received: Received) -> Result<Resumed, ConnectionError> {
    let Received { bytes, descriptors } = received;
    let frame = FrameRef::parse(&bytes)?;
    match frame.kind {
        Kind::Refused => Err(refused(&frame)?),
        Kind::Resumed => {
            let (greeting, rest) = frame.greeting()?;
            check_version(&greeting)?;
            let len = frame.payload.len();
            let short = FrameError::PayloadTooShort { kind: frame.kind, len };
            let (posts, _later_versions) = U64::read_from_prefix(rest).map_err(|_| short)?;
            let (event_port, epoch) = port_and_epoch(frame.kind, descriptors)?;
            Ok(Resumed { event_port, epoch, posts: posts.get() })
        }
        kind => {
            let state = "waiting to go on";
            Err(FrameError::Unexpected { kind, state }.into())
        }
    }
}

fn port_and_epoch(
    kind: Kind,
    descriptors: Vec<OwnedFd>,
) -> Result<(PeerEvent, PeerEpoch), ConnectionError> {
    let got = descriptors.len();
    let wrong = FrameError::Descriptors { kind, expected: 2, got };
    let [event_port, epoch] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| wrong)?;
    let event_port = PeerEvent::from_peer(event_port, "the event port")?;
    Ok((event_port, PeerEpoch::from_peer(epoch)?))
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
