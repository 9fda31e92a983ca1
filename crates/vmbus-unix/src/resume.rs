//! How a connection outlives the process that serves it.
//!
//! A host is held, saved and killed; another process takes its place with the saved state, and the
//! guest goes on with it: the same memory, the same rings, the same open channels. Nothing of VMBus is
//! negotiated again, and the guest's drivers notice nothing.
//!
//! ```text
//! the host's process   Serving ──hold──▶ Held ──save──▶ Saved ──SIGKILL, move_away──▶ gone
//!                         ▲                │              │
//!                         └────release─────┴───release────┘   after a save: the epoch is raised
//!
//! the next process     Waiting ──Resume of the guest──▶ Back ──finish──▶ Serving
//!                         ▲                              │               the epoch is raised
//!                         └──────────lost again──────────┘
//!
//! the guest's link     Up ──end of the socket──▶ Down ──connect, Resume──▶ Asking ──Resumed──▶ Up
//!                                                 ▲ │                         │
//!                                                 │ └─time over─▶ Over ◀──────┤ refused
//!                                                 └──────────lost, busy───────┘
//! ```
//!
//! # How a server moves
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use kmcl::{Save, SaveOptions};
//! use vmbus_unix::{HostOptions, RestoringHost, UnixHost};
//!
//! # fn devices(_: &vmbus_host::HostBus) {}
//! # fn keep(_: &[u8], _: &[u8]) {}
//! # fn save(host: UnixHost) -> Result<(), Box<dyn std::error::Error>> {
//! // The process that is about to end:
//! let held = host.hold()?;
//! // … freezes its channels, waits until none has a packet running, and saves them as well …
//! let (mut transport, mut bus) = (Vec::new(), Vec::new());
//! held.save(&SaveOptions::default())?.write_to(&mut transport)?;
//! held.bus().save(&SaveOptions::default())?.write_to(&mut bus)?;
//! keep(&transport, &bus);
//! // … and is killed; or has the channels and the host move away; or releases the host, and thaws
//! // the channels after that.
//! held.move_away();
//! # Ok(())
//! # }
//! # fn restore(transport: &[u8], bus: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//! // The process that takes its place:
//! let path = "/run/vmbus";
//! let restoring = UnixHost::bind_restoring(path, HostOptions::default(), transport, bus)?;
//! devices(restoring.bus()); // make their offers, and are restored
//! if !restoring.drive_until_back(Duration::from_secs(5))? {
//!     return Err("the guest has not come back".into());
//! }
//! let host = restoring.finish()?;
//! // … and starts the channels.
//! # drop(host);
//! # Ok(())
//! # }
//! ```
//!
//! The guest asks for it when it connects: [`GuestOptions::reconnect`](crate::GuestOptions::reconnect). A
//! guest that does not, and a host that cannot, end with each other as ever.
//!
//! # On the wire
//!
//! ```text
//! guest                                                        host
//!   │── Hello: would resume ─────────────────────────────────────▶│
//!   │◀─ Welcome: the connection's name, the epoch ────────────────│
//!   │        …                                               killed, restored
//!   │── Resume: name, epoch, numbers, memory, attention ─────────▶│  checks everything
//!   │── Doorbells: what is rung for each channel ────────────────▶│  as many frames as it takes
//!   │◀─ Resumed: posts taken, event port, epoch ──────────────────│
//!   │◀─ Posted: if the answer to the last post was lost ──────────│
//!   │── Post: if the last post was not taken ────────────────────▶│
//!   │◀─ Listening, for each open channel, once the bus goes on ───│
//! ```
//!
//! # What each side keeps
//!
//! | | keeps | at most |
//! |---|---|---|
//! | guest | the post that is not answered | 1: the bus makes no further one before the answer |
//! | guest | how many posts it has made, answers it has got, messages it has taken | 3 numbers |
//! | guest | the connection's name, and the file in which the epoch stands | |
//! | guest | what the host rings, one descriptor per channel | 2047 |
//! | host, saved | how many posts it has taken, and the last answer | 2 numbers |
//! | host, saved | how many messages it has given | 1 number |
//! | host, saved | name, epoch, which doorbells are in use, which files the guest's memory is | 256 bytes, 64 regions |
//! | host's bus, saved | messages that the guest has not been given | [`vmbus_host::limits`] |
//! | host that waits | processes that claim to be the guest, each with its doorbells | [`MAX_HANDSHAKES`](crate::MAX_HANDSHAKES), for [`HostOptions::handshake_timeout`](crate::HostOptions::handshake_timeout) |
//!
//! No frame is kept that was given to the socket.
//!
//! # Why nothing is lost, and nothing comes twice
//!
//! 1. *A frame given to the socket is given to the guest.* On a Unix socket a datagram goes into the
//!    receiver's queue whole, in the call that sends it, or not at all; what is in the queue stays there
//!    when the sender dies, and is read before the end of the connection. The guest reads until that
//!    end before it looks for another host. So what the guest has taken is what the host has given; the
//!    numbers are compared all the same, and a host refuses where they differ.
//! 2. *A frame of the guest that the host has not taken comes again.* It dies with the host's socket.
//!    The guest has one post on its way at most, and has it until it is answered. The number of posts
//!    that the state has seen says whether it has seen this one.
//! 3. *Its answer comes again* if it was still waiting for room in the socket: the state has it.
//! 4. *A state is of one moment.* While a host is held it takes nothing and gives nothing; messages
//!    and answers stay where the state has them. Whatever the host does later makes the state one of
//!    a connection that no longer exists. So the epoch is raised *before* it goes on, in a file of which
//!    the guest has a descriptor: that cannot wait, cannot be lost with the host, and is seen by
//!    whoever asks later. A state is good for the epoch that it was saved in, and no other one.
//!    The channels of a host go on after it, not before: what they put into the rings would come of a
//!    state that is still good. So a host is released before its channels are thawed.
//! 5. *A state is used once.* The process that goes on with it raises the epoch before anything comes
//!    of it; one that fails before that leaves it good for the next try.
//! 6. *Signals may be lost,* so the host rings every channel's doorbell once it goes on, and the guest
//!    rings back for every one that it is given anew. A signal for nothing does no harm.
//!
//! Frames that make no difference are not counted: `Listening` is sent again for every open channel,
//! with the doorbells of the new process.
//!
//! # Whose connection it is
//!
//! The name is 128 random bits, chosen by the host for each connection and told to its guest alone; no
//! later connection has it, in whatever process. The memory is known by device and inode of its
//! files, which the guest has to show: a guest that comes back with other memory is another one. A
//! guest that lies about its epoch or its numbers gets a state that does not fit its memory. That is
//! its own loss: a restored host trusts the guest's memory no more than it did before.
//!
//! Both need the machine to be the same one. A state that is moved to another machine finds no guest
//! there.

use std::collections::BTreeSet;

use vmbus_memory::GuestMemory;
use vmbus_wire::guid::Guid;

use rustix::fs::fstat;
use rustix::io::Errno;

use crate::error::{FrameError, ResumeError};
use crate::frame::ResumeClaim;

/// How far a connection has come, as its host knows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Progress {
    /// Posts of the guest that were taken.
    pub(crate) posts: u64,
    /// What the last one was answered.
    pub(crate) post_status: u16,
    /// Messages that the guest was given.
    pub(crate) messages: u64,
}

/// Which file a region of memory is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RegionIdentity {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) file_offset: u64,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// What identifies the memory, region by region.
pub(crate) fn identify(memory: &GuestMemory) -> Result<Vec<RegionIdentity>, Errno> {
    let backed = memory.regions().iter().filter_map(|region| {
        region.backing().map(|(fd, file_offset)| (region.gpa(), region.len(), file_offset, fd))
    });
    backed
        .map(|(gpa, len, file_offset, fd)| {
            let status = fstat(fd)?;
            let (device, inode) = (status.st_dev, status.st_ino);
            Ok(RegionIdentity { gpa, len, file_offset, device, inode })
        })
        .collect()
}

/// A connection as it was saved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct SavedGuest {
    pub(crate) connection_id: Guid,
    pub(crate) epoch: u64,
    pub(crate) progress: Progress,
    /// Event flags that channels ring.
    pub(crate) doorbells: BTreeSet<u16>,
    pub(crate) regions: Vec<RegionIdentity>,
}

impl SavedGuest {
    /// Whether this is the connection that a guest speaks of. Before its descriptors are looked at.
    pub(crate) fn is_named(&self, claim: &ResumeClaim) -> Result<(), ResumeError> {
        if claim.connection_id == self.connection_id {
            Ok(())
        } else {
            Err(ResumeError::OtherConnection { claimed: claim.connection_id })
        }
    }

    /// Whether the guest has come with the memory that it had.
    pub(crate) fn has_memory(&self, memory: &[RegionIdentity]) -> Result<(), ResumeError> {
        let (saved, claimed) = (self.regions.len(), memory.len());
        if saved != claimed {
            return Err(ResumeError::Regions { saved, claimed });
        }
        let mut pairs = self.regions.iter().zip(memory);
        match pairs.position(|(saved, claimed)| saved != claimed) {
            Some(region) => Err(ResumeError::OtherMemory { region }),
            None => Ok(()),
        }
    }

    /// Whether the state is of the moment that the guest is in. Returns whether the answer to the
    /// guest's last post has to be given again.
    pub(crate) fn is_current(&self, claim: &ResumeClaim) -> Result<bool, ResumeError> {
        let (saved, claimed) = (self.epoch, claim.epoch.get());
        if saved != claimed {
            return Err(ResumeError::Epoch { saved, claimed });
        }
        let (given, taken) = (self.progress.messages, claim.messages.get());
        if given != taken {
            return Err(ResumeError::Messages { given, taken });
        }
        let taken = self.progress.posts;
        let (made, answered) = (claim.posts.get(), claim.answers.get());
        let unanswered = made.checked_sub(answered);
        if !matches!(unanswered, Some(0 | 1)) || (taken != made && taken != answered) {
            return Err(ResumeError::Posts { taken, made, answered });
        }
        Ok(taken != answered)
    }

    /// Whether there is a doorbell for everything that rings.
    pub(crate) fn has_doorbells(&self, given: impl Fn(u16) -> bool) -> Result<(), ResumeError> {
        match self.doorbells.iter().find(|flag| !given(**flag)) {
            Some(&flag) => Err(ResumeError::DoorbellMissing { flag }),
            None => Ok(()),
        }
    }
}

/// How far a connection has come, as its guest knows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct GuestProgress {
    pub(crate) posts: u64,
    pub(crate) answers: u64,
    pub(crate) messages: u64,
}

impl GuestProgress {
    /// Whether the last post has to be made again, for a host that has taken so many.
    pub(crate) fn posts_again(&self, taken: u64) -> Result<bool, FrameError> {
        if taken != self.posts && taken != self.answers {
            return Err(FrameError::PostsTaken { taken, made: self.posts });
        }
        Ok(taken != self.posts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> SavedGuest {
        let region = RegionIdentity { gpa: 0, len: 4096, file_offset: 0, device: 1, inode: 77 };
        SavedGuest {
            connection_id: Guid::from_u128(9),
            epoch: 3,
            progress: Progress { posts: 10, post_status: 19, messages: 20 },
            doorbells: BTreeSet::from([1, 2047]),
            regions: vec![region, RegionIdentity { gpa: 4096, ..region }],
        }
    }

    fn claim(epoch: u64, posts: u64, answers: u64, messages: u64) -> ResumeClaim {
        ResumeClaim {
            connection_id: Guid::from_u128(9),
            epoch: epoch.into(),
            posts: posts.into(),
            answers: answers.into(),
            messages: messages.into(),
        }
    }

    #[test]
    fn a_state_is_good_for_its_moment_and_no_other() {
        use ResumeError::{Epoch, Messages, Posts};
        const MAX: u64 = u64::MAX;
        let posts = |made, answered| Err(Posts { taken: 10, made, answered });
        let table = [
            (claim(3, 10, 10, 20), Ok(false)), // nothing on its way
            (claim(3, 11, 10, 20), Ok(false)), // a post on its way that was not taken
            (claim(3, 10, 9, 20), Ok(true)),   // its answer
            (claim(2, 10, 10, 20), Err(Epoch { saved: 3, claimed: 2 })),
            (claim(4, 10, 10, 20), Err(Epoch { saved: 3, claimed: 4 })),
            (claim(MAX, 10, 10, 20), Err(Epoch { saved: 3, claimed: MAX })),
            (claim(3, 10, 10, 19), Err(Messages { given: 20, taken: 19 })),
            (claim(3, 10, 10, 21), Err(Messages { given: 20, taken: 21 })),
            (claim(3, 10, 10, MAX), Err(Messages { given: 20, taken: MAX })),
            (claim(3, 11, 11, 20), posts(11, 11)),
            (claim(3, 12, 11, 20), posts(12, 11)),
            (claim(3, 9, 9, 20), posts(9, 9)),
            (claim(3, 12, 10, 20), posts(12, 10)), // two on their way
            (claim(3, 9, 10, 20), posts(9, 10)),   // an answer to nothing
            (claim(3, MAX, 10, 20), posts(MAX, 10)),
            (claim(3, 10, MAX, 20), posts(10, MAX)),
            (claim(3, 0, MAX, 20), posts(0, MAX)),
            (claim(3, MAX, MAX, 20), posts(MAX, MAX)),
        ];
        for (claim, expected) in table {
            assert_eq!(saved().is_current(&claim), expected, "{claim:?}");
        }
        let mut full = saved();
        full.progress.posts = MAX;
        assert_eq!(full.is_current(&claim(3, MAX, MAX - 1, 20)), Ok(true));
    }

    #[test]
    fn the_guest_makes_its_post_again_where_the_state_has_not_seen_it() {
        let progress = |posts, answers| GuestProgress { posts, answers, messages: 0 };
        let table = [
            (progress(10, 10), 10, Ok(false)),
            (progress(11, 10), 10, Ok(true)),
            (progress(11, 10), 11, Ok(false)), // the answer comes
            (progress(11, 10), 12, Err(FrameError::PostsTaken { taken: 12, made: 11 })),
            (progress(11, 10), 0, Err(FrameError::PostsTaken { taken: 0, made: 11 })),
            (progress(0, 0), u64::MAX, Err(FrameError::PostsTaken { taken: u64::MAX, made: 0 })),
        ];
        for (progress, taken, expected) in table {
            assert_eq!(progress.posts_again(taken), expected, "{progress:?} {taken}");
        }
    }

    #[test]
    fn another_guest_is_known_by_its_name_and_its_memory() {
        let saved = saved();
        let other = ResumeClaim { connection_id: Guid::from_u128(8), ..claim(3, 10, 10, 20) };
        let claimed = other.connection_id;
        assert_eq!(saved.is_named(&other), Err(ResumeError::OtherConnection { claimed }));
        assert_eq!(saved.is_named(&claim(0, 0, 0, 0)), Ok(()));
        type Change = fn(&mut Vec<RegionIdentity>);
        let other = |region| Err(ResumeError::OtherMemory { region });
        let table: [(&str, Change, _); 8] = [
            ("the same", |_| {}, Ok(())),
            ("none", Vec::clear, Err(ResumeError::Regions { saved: 2, claimed: 0 })),
            ("address", |r| r[1].gpa = 8192, other(1)),
            ("length", |r| r[1].len = 8192, other(1)),
            ("offset", |r| r[0].file_offset = 4096, other(0)),
            ("device", |r| r[0].device = 2, other(0)),
            ("inode", |r| r[1].inode = 78, other(1)),
            ("order", |r| r.swap(0, 1), other(0)),
        ];
        for (what, change, expected) in table {
            let mut memory = saved.regions.clone();
            change(&mut memory);
            assert_eq!(saved.has_memory(&memory), expected, "{what}");
        }
    }

    #[test]
    fn every_doorbell_in_use_must_be_given() {
        assert_eq!(saved().has_doorbells(|_| true), Ok(()));
        let missing = ResumeError::DoorbellMissing { flag: 2047 };
        assert_eq!(saved().has_doorbells(|flag| flag < 100), Err(missing));
    }
}
