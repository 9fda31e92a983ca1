//! One end of the transport, made by hand.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};
use tempfile::TempDir;
use vmbus_memory::GuestMemory;
use vmbus_unix::frame::{FrameHeader, Greeting, HelloRegion, Kind, MAGIC, TRANSPORT_VERSION};
use vmbus_unix::{HostEvent, HostOptions, Reason, UnixHost};
use zerocopy::{FromBytes, IntoBytes};

/// A server that does only what the test has it do.
pub(crate) struct Server {
    pub(crate) host: UnixHost,
    pub(crate) path: PathBuf,
    _directory: TempDir,
}

impl Server {
    pub(crate) fn new(options: HostOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmbus");
        let host = UnixHost::bind_with(&path, options).unwrap();
        Self { host, path, _directory: directory }
    }

    /// Drives the host until there is nothing to do; returns what it tells of.
    pub(crate) fn settle(&self) -> Vec<HostEvent> {
        let mut more = false;
        while more || self.host.wait(Some(std::time::Duration::ZERO)).unwrap() {
            more = self.host.drive().unwrap();
        }
        self.host.take_events()
    }

    /// Shows that the server is well: takes a guest, and lets it go.
    #[track_caller]
    pub(crate) fn assert_takes_a_guest(&self) {
        let raw = Raw::welcomed(self);
        raw.send(&post(1, b"\x0e\0\0\0"), &[]); // a message too short to mean anything
        assert!(self.settle().is_empty());
        assert_eq!(raw.receive().unwrap().header.kind, Kind::Posted as u32);
        drop(raw);
        assert!(matches!(self.settle()[..], [HostEvent::GuestGone { .. }]));
        assert_eq!(self.host.guest(), None);
    }
}

/// A frame that came.
pub(crate) struct Came {
    pub(crate) header: FrameHeader,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A socket, used without any rule.
pub(crate) struct Raw(pub(crate) OwnedFd);

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Self(socket)
    }

    /// Connected, introduced, and taken.
    #[track_caller]
    pub(crate) fn welcomed(server: &Server) -> Self {
        let raw = Self::connect(&server.path);
        let memory = GuestMemory::memfd(1 << 20).unwrap();
        let event = event();
        let (fd, _) = memory.regions()[0].backing().unwrap();
        raw.send(&hello(&[region(0, 1 << 20, 0)]), &[event.as_fd(), fd]);
        let events = server.settle();
        assert!(matches!(events[..], [HostEvent::GuestConnected { .. }]), "{events:?}");
        let welcome = raw.receive().unwrap();
        assert_eq!(welcome.header.kind, Kind::Welcome as u32);
        assert_eq!(welcome.descriptors.len(), 1);
        raw
    }

    pub(crate) fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        self.try_send(bytes, descriptors).unwrap();
    }

    pub(crate) fn try_send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = vec![MaybeUninit::uninit(); 4096];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
    }

    /// The next frame; `None` at the end of the connection.
    pub(crate) fn receive(&self) -> Option<Came> {
        let mut bytes = vec![0; 4096];
        let mut space = vec![MaybeUninit::uninit(); 4096];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let buffer = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.0, buffer, &mut control, flags) {
            // What was not read at the other end resets the connection; what was said stays.
            Err(Errno::CONNRESET) => recvmsg(&self.0, buffer, &mut control, flags),
            received => received,
        };
        let len = received.unwrap().bytes;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        let (header, payload) = FrameHeader::read_from_prefix(&bytes[..len]).ok()?;
        Some(Came { header, payload: payload.to_vec(), descriptors })
    }

    /// The connection was ended with this reason. Returns the text.
    #[track_caller]
    pub(crate) fn assert_refused(&self, reason: Reason) -> String {
        let came = self.receive().expect("a last word");
        assert_eq!(came.header.kind, Kind::Refused as u32);
        assert_eq!(Reason::from_wire(came.header.a.get()), reason);
        assert!(self.receive().is_none(), "and the end");
        String::from_utf8(came.payload[size_of::<Greeting>()..].to_vec()).unwrap()
    }
}

pub(crate) fn frame(kind: u32, a: u32, b: u32, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let header = FrameHeader {
        kind: kind.into(),
        payload_len: u32::try_from(payload.len()).unwrap().into(),
        a: a.into(),
        b: b.into(),
    };
    [header.as_bytes(), &payload].concat()
}

pub(crate) fn greeting(regions: u32) -> Greeting {
    Greeting { magic: MAGIC, transport_version: TRANSPORT_VERSION.into(), regions: regions.into() }
}

pub(crate) fn hello(regions: &[HelloRegion]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap();
    frame(Kind::Hello as u32, 0, 0, &[greeting(count).as_bytes(), regions.as_bytes()])
}

pub(crate) fn region(gpa: u64, len: u64, fd_offset: u64) -> HelloRegion {
    HelloRegion { gpa: gpa.into(), len: len.into(), fd_offset: fd_offset.into() }
}

pub(crate) fn post(connection_id: u32, message: &[u8]) -> Vec<u8> {
    frame(Kind::Post as u32, connection_id, 0, &[message])
}

/// Longer than anything takes on a machine that is busy with other things: reached only by a fault.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Does something again and again until it says that it is done.
#[track_caller]
pub(crate) fn eventually(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not even after {PATIENCE:?}");
    }
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Descriptors and mappings of this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Held {
    descriptors: usize,
    mappings: usize,
}

pub(crate) fn held() -> Held {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    Held {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        // Those of memfds: the allocator's own come and go.
        mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
    }
}
