//! One end of the socket: frames out, in order and bounded; frames in, with their descriptors.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{ConnectionError, FrameError};
use crate::frame::{Frame, MAX_DESCRIPTORS, MAX_FRAME_SIZE};
use crate::poller::wait_for;

/// Frames that may wait for the socket to take them. A guest has one message and a doorbell on its
/// way at a time; a host answers one post before it reads the next, and tells of one signal per
/// channel that is being opened.
pub(crate) const MAX_QUEUED_FRAMES: usize = 2048;

const CONTROL_SIZE: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// A frame that came, and the descriptors that came with it.
pub(crate) struct Received {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A connected socket (`SOCK_SEQPACKET`), and the frames that wait for it.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    waiting: VecDeque<(Frame, Vec<OwnedFd>)>,
    /// Nothing is given to the socket.
    held: bool,
}

impl Link {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, waiting: VecDeque::new(), held: false }
    }

    /// Sends a frame now, or as soon as the socket takes it: after those that wait already.
    pub(crate) fn send(
        &mut self,
        frame: Frame,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        if self.waiting.is_empty() && self.offer(&frame, descriptors)? {
            return Ok(());
        }
        let frames = self.waiting.len();
        if frames >= MAX_QUEUED_FRAMES {
            return Err(ConnectionError::NotReading { frames });
        }
        let kept = descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<Result<_, _>>();
        self.waiting.push_back((frame, kept.map_err(ConnectionError::system("dup"))?));
        Ok(())
    }

    /// Sends a frame now, or not at all: `false` where others wait or the socket is full.
    pub(crate) fn try_send(&mut self, frame: &Frame) -> Result<bool, ConnectionError> {
        if self.waiting.is_empty() { self.offer(frame, &[]) } else { Ok(false) }
    }

    /// Sends what waits, as far as the socket takes it. Returns whether nothing waits any more.
    pub(crate) fn flush(&mut self) -> Result<bool, ConnectionError> {
        while let Some((frame, descriptors)) = self.waiting.front() {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            if !self.offer(frame, &descriptors)? {
                return Ok(false);
            }
            self.waiting.pop_front();
        }
        Ok(true)
    }

    /// From now on frames wait whether the socket has room or not; or no longer.
    pub(crate) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether frames wait.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the peer has closed its end. Frames that it sent before may be unread.
    pub(crate) fn is_hung_up(&self) -> bool {
        wait_for(&self.socket, PollFlags::empty(), Some(Duration::ZERO)) == Ok(true)
    }

    /// Gives the frame to the socket, unless it is full.
    fn offer(&self, frame: &Frame, fds: &[BorrowedFd<'_>]) -> Result<bool, ConnectionError> {
        if self.held {
            return Ok(false);
        }
        let mut space = [MaybeUninit::uninit(); CONTROL_SIZE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(FrameError::DescriptorsCut.into()); // our fault: there is space for the most
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            return match sendmsg(
                &self.socket,
                &[IoSlice::new(frame.as_bytes())],
                &mut control,
                flags,
            ) {
                Ok(_) => Ok(true),
                Err(Errno::AGAIN) => Ok(false),
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => Err(ConnectionError::Closed),
                Err(error) => Err(ConnectionError::system("sendmsg")(error)),
            };
        }
    }

    /// The next frame, or `None` where none has come. Does not wait.
    pub(crate) fn receive(&self) -> Result<Option<Received>, ConnectionError> {
        // One byte more than any frame has, so that a longer one shows.
        let mut bytes = vec![0; MAX_FRAME_SIZE + 1];
        let mut space = [MaybeUninit::uninit(); CONTROL_SIZE];
        // Closes, when dropped, what is not taken out of it.
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut reset = false;
        let received = loop {
            let buffer = &mut [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, buffer, &mut control, flags) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                // A peer that has closed without reading everything resets the connection. Linux
                // tells of that once, and before it gives what the peer had said.
                Err(Errno::CONNRESET) if !reset => reset = true,
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(ConnectionError::Closed),
                Err(error) => return Err(ConnectionError::system("recvmsg")(error)),
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        // Alignment may leave space for one more than there should be.
        let too_many = descriptors.len() > MAX_DESCRIPTORS;
        if too_many || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(FrameError::DescriptorsCut.into());
        }
        if received.flags.contains(ReturnFlags::TRUNC) || received.bytes > MAX_FRAME_SIZE {
            return Err(FrameError::TooLong.into());
        }
        if received.bytes == 0 {
            return Err(ConnectionError::Closed);
        }
        bytes.truncate(received.bytes);
        Ok(Some(Received { bytes, descriptors }))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::event::OwnEvent;
    use crate::frame::Kind;

    pub(crate) fn pair() -> (Link, Link) {
        let kind = SocketType::SEQPACKET;
        let (one, two) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        (Link::new(one), Link::new(two))
    }

    fn numbered(number: u32) -> Frame {
        Frame::new(Kind::Posted, number, 0, &[&[0; 200]])
    }

    fn number(received: &Received) -> u32 {
        crate::frame::FrameRef::parse(&received.bytes).unwrap().a
    }

    #[test]
    fn frames_and_descriptors_arrive_together() {
        let (mut one, two) = pair();
        assert!(two.receive().unwrap().is_none());
        let events = [OwnEvent::new().unwrap(), OwnEvent::new().unwrap()];
        one.send(numbered(1), &[]).unwrap();
        one.send(numbered(2), &[events[0].as_fd(), events[1].as_fd()]).unwrap();
        let (first, second) = (two.receive().unwrap().unwrap(), two.receive().unwrap().unwrap());
        assert_eq!((number(&first), first.descriptors.len()), (1, 0));
        assert_eq!((number(&second), second.descriptors.len()), (2, 2));
        one.send(numbered(3), &[]).unwrap();
        assert!(!two.is_hung_up());
        drop(one);
        assert!(two.is_hung_up());
        assert_eq!(number(&two.receive().unwrap().unwrap()), 3);
        assert!(matches!(two.receive(), Err(ConnectionError::Closed)));
    }

    /// A peer that does not read: what waits keeps its order, has its descriptors, and its bound.
    #[test]
    fn what_a_full_socket_does_not_take_waits_its_turn_and_is_bounded() {
        let (mut one, two) = pair();
        let event = OwnEvent::new().unwrap();
        let mut sent = 0;
        let full = loop {
            match one.send(numbered(sent), &[event.as_fd()]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(
            matches!(full, ConnectionError::NotReading { frames: MAX_QUEUED_FRAMES }),
            "{full}"
        );
        assert!(one.is_waiting() && !one.try_send(&numbered(0)).unwrap());
        for expected in 0..sent {
            let received = loop {
                if let Some(received) = two.receive().unwrap() {
                    break received;
                }
                one.flush().unwrap();
            };
            assert_eq!((number(&received), received.descriptors.len()), (expected, 1));
        }
        assert!(one.flush().unwrap() && !one.is_waiting());
        assert!(one.try_send(&numbered(0)).unwrap());
    }

    #[test]
    fn a_link_that_is_held_gives_nothing_and_loses_nothing() {
        let (mut one, two) = pair();
        one.hold(true);
        one.send(numbered(1), &[]).unwrap();
        assert!(!one.try_send(&numbered(9)).unwrap() && !one.flush().unwrap());
        assert!(two.receive().unwrap().is_none());
        one.hold(false);
        one.send(numbered(2), &[]).unwrap();
        assert!(one.flush().unwrap());
        for expected in [1, 2] {
            assert_eq!(number(&two.receive().unwrap().unwrap()), expected);
        }
        assert!(two.receive().unwrap().is_none());
    }

    #[test]
    fn last_words_are_heard_even_where_the_peer_has_not_listened() {
        let (mut one, mut two) = pair();
        one.send(numbered(1), &[]).unwrap();
        two.send(numbered(2), &[]).unwrap();
        drop(two);
        assert!(matches!(one.send(numbered(3), &[]), Err(ConnectionError::Closed)));
        assert_eq!(number(&one.receive().unwrap().unwrap()), 2);
        assert!(matches!(one.receive(), Err(ConnectionError::Closed)));
    }

    #[test]
    fn what_is_too_long_or_too_much_is_refused_and_closed() {
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        {
            let (one, two) = pair();
            let event = OwnEvent::new().unwrap();
            let send = |bytes: &[u8], descriptors: usize| {
                let fds = vec![event.as_fd(); descriptors];
                let mut space = vec![MaybeUninit::uninit(); 4096];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if descriptors > 0 {
                    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
                }
                sendmsg(&one, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT).unwrap();
            };
            send(&[0; MAX_FRAME_SIZE + 1], 3);
            assert!(matches!(two.receive(), Err(ConnectionError::Frame(FrameError::TooLong))));
            send(&[0; 60_000], 0);
            assert!(matches!(two.receive(), Err(ConnectionError::Frame(FrameError::TooLong))));
            for more in [1, 2, 100] {
                send(&[0; 16], MAX_DESCRIPTORS + more);
                assert!(matches!(
                    two.receive(),
                    Err(ConnectionError::Frame(FrameError::DescriptorsCut))
                ));
            }
            send(&[0; 16], MAX_DESCRIPTORS);
            assert_eq!(two.receive().unwrap().unwrap().descriptors.len(), MAX_DESCRIPTORS);
        }
        assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
    }
}
