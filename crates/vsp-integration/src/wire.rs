//! The bytes of the integration services' messages, behind the pipe's header, which is the library's.
//!
//! ```text
//!  pipe header │ IC header │ body
//!  8 bytes     │ 20 bytes  │ `size` bytes
//! ```
//!
//! Source: devices, section 2. Integers are little-endian.

use std::fmt;

use kmcl::Guid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest message that a service sends, behind the pipe's header: a shutdown.
///
/// As a packet it has 24 bytes more in front, descriptor and pipe header: 2104 in all, which fits the
/// 4096 bytes that Linux has for one. With 8 more behind it fits every ring: the smallest has a page of
/// data, Linux's here have three.
pub const MAX_MESSAGE_BYTES: usize = size_of::<IcHeader>() + size_of::<ShutdownBody>();
const _: () = assert!(MAX_MESSAGE_BYTES + 24 + 8 < 4096);

/// Bytes of the text in a shutdown.
pub const SHUTDOWN_TEXT_BYTES: usize = 2048;

/// A version: of the framework, or of one service's messages.
#[repr(C)]
#[derive(
    Clone, Copy, Eq, FromBytes, Hash, Immutable, IntoBytes, KnownLayout, PartialEq, Unaligned,
)]
pub struct Version {
    /// Before the point.
    pub major: U16,
    /// Behind it.
    pub minor: U16,
}
const _: () = assert!(size_of::<Version>() == 4);

impl Version {
    /// `major.minor`.
    #[must_use]
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major: U16::new(major), minor: U16::new(minor) }
    }

    /// Major in the upper half, minor in the lower: the older one is the smaller one.
    #[must_use]
    pub const fn to_u32(self) -> u32 {
        (self.major.get() as u32) << 16 | self.minor.get() as u32
    }

    /// What [`Self::to_u32`] says.
    #[must_use]
    pub const fn from_u32(value: u32) -> Self {
        let [a, b, c, d] = value.to_be_bytes();
        Self::new(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a message is about. Any number can stand in a header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MessageType(pub u16);

impl MessageType {
    /// Which versions to speak.
    pub const NEGOTIATE: Self = Self(0);
    /// A heartbeat.
    pub const HEARTBEAT: Self = Self(1);
    /// A shutdown.
    pub const SHUTDOWN: Self = Self(3);
    /// The time.
    pub const TIME_SYNC: Self = Self(4);
}

/// How a request went, as the guest says: an HRESULT. Any number may come.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct IcStatus(pub u32);

impl IcStatus {
    /// Done, or accepted.
    pub const SUCCESS: Self = Self(0);
    /// Refused.
    pub const FAIL: Self = Self(0x8000_4005);
    /// Not known to this guest.
    pub const UNSUPPORTED: Self = Self(0x8007_0032);
    /// Wrong in some number.
    pub const INVALID_ARGUMENT: Self = Self(0x8007_0057);

    /// Whether it is a success: the top bit is clear.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 >> 31 == 0
    }
}

impl fmt::Debug for IcStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for IcStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::SUCCESS => "success",
            Self::FAIL => "refused",
            Self::UNSUPPORTED => "not supported",
            Self::INVALID_ARGUMENT => "invalid argument",
            _ => return write!(f, "{:#010x}", self.0),
        };
        write!(f, "{:#010x} ({name})", self.0)
    }
}

/// In front of each message's body.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct IcHeader {
    /// The framework version that is spoken; 0.0 in a negotiation.
    pub framework: Version,
    /// [`MessageType`].
    pub message_type: U16,
    /// The version of the service's messages that is spoken; 0.0 in a negotiation.
    pub message: Version,
    /// Bytes of the body.
    pub size: U16,
    /// [`IcStatus`]; 0 in a request.
    pub status: U32,
    /// Chosen by the host, returned by the guest.
    pub transaction_id: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<IcHeader>() == 20);

impl IcHeader {
    /// Part of a request and its answer.
    pub const FLAG_TRANSACTION: u8 = 1;
    /// A request.
    pub const FLAG_REQUEST: u8 = 2;
    /// An answer.
    pub const FLAG_RESPONSE: u8 = 4;
}

/// In front of the versions in a negotiation: those of the framework, then those of the messages.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct NegotiateHead {
    /// How many of the framework follow. 1 in an answer, 0 where the guest wants none.
    pub frameworks: U16,
    /// How many of the messages follow. As before.
    pub messages: U16,
    /// Zero.
    pub reserved: U32,
}
const _: () = assert!(size_of::<NegotiateHead>() == 8);

/// The body of a guest's answer to a negotiation.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct NegotiateAnswer {
    /// 1 and 1, or a 0.
    pub head: NegotiateHead,
    /// The version of the framework that the guest has chosen.
    pub framework: Version,
    /// The version of the messages that it has chosen.
    pub message: Version,
}
const _: () = assert!(size_of::<NegotiateAnswer>() == 16);

/// The body of a heartbeat.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct HeartbeatBody {
    /// Counted by the host. A guest answers with the next number.
    pub sequence: U64,
    /// How the guest's applications are, in its answer: 0 unknown, 1 healthy, 2 critical.
    pub application_state: U32,
    /// Zero.
    pub reserved: [U32; 7],
}
const _: () = assert!(size_of::<HeartbeatBody>() == 40);

/// The body of a shutdown.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct ShutdownBody {
    /// As in a guest's event log: [`Self::REASON_PLANNED`].
    pub reason: U32,
    /// Seconds until it happens.
    pub timeout_seconds: U32,
    /// `FLAG_*`.
    pub flags: U32,
    /// A text for people, which a zero ends. UTF-8 here: no source says more than "bytes", and no free
    /// guest shows it.
    pub text: [u8; SHUTDOWN_TEXT_BYTES],
}
const _: () = assert!(size_of::<ShutdownBody>() == 2060);

impl ShutdownBody {
    /// Planned by an administrator.
    pub const REASON_PLANNED: u32 = 0x8000_0000;
    /// Applications that object are not heard.
    pub const FLAG_FORCE: u32 = 1;
    /// Starts anew afterwards.
    pub const FLAG_RESTART: u32 = 2;
    /// Writes memory to disk before.
    pub const FLAG_HIBERNATE: u32 = 4;
}

/// The body of a time message since version 4.0.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct TimeBody {
    /// The time on the host, in units of 100 ns since 1601-01-01 UTC.
    pub parent_time: U64,
    /// The guest's reference time when that was read, in units of 100 ns.
    pub reference_time: U64,
    /// `FLAG_*`.
    pub flags: u8,
    /// NTP's leap indicator; 0: none.
    pub leap: u8,
    /// NTP's stratum; 0: not said.
    pub stratum: u8,
    /// Zero.
    pub reserved: [u8; 5],
}
const _: () = assert!(size_of::<TimeBody>() == 24);

impl TimeBody {
    /// The guest sets its clock.
    pub const FLAG_SYNC: u8 = 1;
    /// The guest learns how its clock is going.
    pub const FLAG_SAMPLE: u8 = 2;
}

/// The body of a time message before version 4.0.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct OldTimeBody {
    /// As [`TimeBody::parent_time`].
    pub parent_time: U64,
    /// What the guest's clock says, if the host knows; 0.
    pub child_time: U64,
    /// How long messages take there and back, in units of 100 ns; 0: not known.
    pub round_trip: U64,
    /// As [`TimeBody::flags`].
    pub flags: u8,
    /// Zero: fills the packet up.
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<OldTimeBody>() == 32);

/// One of the integration services.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Service {
    /// Asks the guest whether it is alive.
    Heartbeat,
    /// Has the guest power off, start anew or hibernate.
    Shutdown,
    /// Tells the guest the time.
    TimeSync,
}

impl Service {
    /// All of them, in the order in which they are saved.
    pub const ALL: [Self; 3] = [Self::Heartbeat, Self::Shutdown, Self::TimeSync];

    /// Framework versions that are offered: that of Windows Server 2008, and all since.
    pub const FRAMEWORKS: &'static [Version] = &[Version::new(1, 0), Version::new(3, 0)];

    /// Its place in [`Self::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Its name in log lines and saved states.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Heartbeat => "heartbeat",
            Self::Shutdown => "shutdown",
            Self::TimeSync => "time-sync",
        }
    }

    /// The interface type of its channel.
    ///
    /// Source: devices, section 0; so are the instances.
    #[must_use]
    pub const fn interface(self) -> Guid {
        Guid::from_u128(match self {
            Self::Heartbeat => 0x5716_4f39_9115_4e78_ab55_382f_3bd5_422d,
            Self::Shutdown => 0x0e0b_6031_5213_4934_818b_38d9_0ced_39db,
            Self::TimeSync => 0x9527_e630_d0ae_497b_adce_e80a_b017_5caf,
        })
    }

    /// The instance of its channel, the same in every guest.
    #[must_use]
    pub const fn instance(self) -> Guid {
        Guid::from_u128(match self {
            Self::Heartbeat => 0xfd14_9e91_82e0_4a7d_afa6_2a41_66cb_d7c0,
            Self::Shutdown => 0xb665_0ff7_33bc_4840_8048_e067_6786_f393,
            Self::TimeSync => 0x2dd1_ce17_079e_403c_b352_a192_1ee2_07ee,
        })
    }

    /// The type of its messages, other than negotiations.
    #[must_use]
    pub const fn message_type(self) -> MessageType {
        match self {
            Self::Heartbeat => MessageType::HEARTBEAT,
            Self::Shutdown => MessageType::SHUTDOWN,
            Self::TimeSync => MessageType::TIME_SYNC,
        }
    }

    /// Versions of its messages that are offered, oldest first.
    #[must_use]
    pub const fn versions(self) -> &'static [Version] {
        const V1: Version = Version::new(1, 0);
        const V3: Version = Version::new(3, 0);
        match self {
            Self::Heartbeat => const { &[V1, V3] },
            Self::Shutdown => const { &[V1, V3, Version::new(3, 1), Version::new(3, 2)] },
            Self::TimeSync => const { &[V1, V3, Version::new(4, 0)] },
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
