//! The initialisation of a storage channel, as a state machine without I/O: answers go in, requests
//! come out.
//!
//! ```text
//! BEGIN -> QUERY_PROTOCOL_VERSION (newest first, next older one while refused) -> QUERY_PROPERTIES
//!       -> END -> [CREATE_SUB_CHANNELS, then the caller opens them]
//! ```
//!
//! Source: devices, section 1.

use vmbus_wire::status::NtStatus;
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::{
    ChannelProperties, ProtocolVersion, ProtocolVersionBody, SubChannelRequest,
};

/// Least bytes that one SRB must be able to transfer: a page.
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`: `max_transfer_bytes` is rounded down to pages.
const MIN_TRANSFER_BYTES: u32 = 4096;

/// What both sides have agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Properties {
    /// Version of the storage protocol.
    pub version: ProtocolVersion,
    /// Most bytes one SRB may transfer; whole pages, at least one.
    pub max_transfer_bytes: u32,
    /// Most subchannels the server would make.
    pub max_sub_channels: u16,
    /// Subchannels that were asked for and granted.
    pub sub_channels: u16,
}

/// Why the initialisation failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The server refused a step.
    #[error("the server answered {operation:?} with {status}")]
    Refused {
        /// The step.
        operation: Operation,
        /// The server's status.
        status: NtStatus,
    },
    /// The server speaks no version that this client does.
    #[error("the server refuses every protocol version from {newest} down to {oldest}")]
    NoCommonVersion {
        /// The version asked for first.
        newest: ProtocolVersion,
        /// The version asked for last.
        oldest: ProtocolVersion,
    },
    /// The server's limit on transfers is less than a page.
    #[error("the server allows transfers of at most {max_transfer_bytes} bytes, less than a page")]
    TransferLimit {
        /// What it says.
        max_transfer_bytes: u32,
    },
    /// An answer came when none was asked for.
    #[error("an answer came although the initialisation was over")]
    Unexpected,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Send this request, and come back with its answer.
    Send(VstorPacket),
    /// The primary channel is ready. Open as many subchannels as the properties say.
    Done(Properties),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Awaiting {
    Begin,
    Version(ProtocolVersion),
    Properties(ProtocolVersion),
    End(Properties),
    SubChannels(Properties),
    Nothing,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Handshake {
    awaiting: Awaiting,
    newest: ProtocolVersion,
    wanted_sub_channels: u16,
}

impl Handshake {
    /// An initialisation that asks for versions from `newest` down, and for up to
    /// `wanted_sub_channels` subchannels; and its first request.
    pub(crate) fn new(newest: ProtocolVersion, wanted_sub_channels: u16) -> (Self, VstorPacket) {
        let handshake = Self { awaiting: Awaiting::Begin, newest, wanted_sub_channels };
        (handshake, VstorPacket::request(Operation::BEGIN_INITIALIZATION))
    }

    /// Takes the answer to the request last given out.
    ///
    /// # Errors
    /// [`HandshakeError`]; the initialisation is over then.
    pub(crate) fn on_answer(&mut self, answer: &VstorPacket) -> Result<Step, HandshakeError> {
        let (awaiting, step) =
            self.after(answer).inspect_err(|_| self.awaiting = Awaiting::Nothing)?;
        self.awaiting = awaiting;
        Ok(step)
    }

    fn after(&self, answer: &VstorPacket) -> Result<(Awaiting, Step), HandshakeError> {
        let must_succeed = |operation| match answer.status() {
            NtStatus::SUCCESS => Ok(()),
            status => Err(HandshakeError::Refused { operation, status }),
        };
        match self.awaiting {
            Awaiting::Begin => {
                must_succeed(Operation::BEGIN_INITIALIZATION)?;
                self.ask_for_version(|version| version <= self.newest)
            }
            Awaiting::Version(asked) if answer.status() == NtStatus::REVISION_MISMATCH => {
                self.ask_for_version(|version| version < asked)
            }
            Awaiting::Version(version) => {
                must_succeed(Operation::QUERY_PROTOCOL_VERSION)?;
                let request = VstorPacket::request(Operation::QUERY_PROPERTIES);
                Ok((Awaiting::Properties(version), Step::Send(request)))
            }
            Awaiting::Properties(version) => {
                must_succeed(Operation::QUERY_PROPERTIES)?;
                let properties = self.accept(version, &answer.body())?;
                let request = VstorPacket::request(Operation::END_INITIALIZATION);
                Ok((Awaiting::End(properties), Step::Send(request)))
            }
            Awaiting::End(properties) => {
                must_succeed(Operation::END_INITIALIZATION)?;
                if properties.sub_channels == 0 {
                    return Ok((Awaiting::Nothing, Step::Done(properties)));
                }
                let request = VstorPacket::request(Operation::CREATE_SUB_CHANNELS)
                    .with_body(&SubChannelRequest { count: properties.sub_channels.into() });
                Ok((Awaiting::SubChannels(properties), Step::Send(request)))
            }
            Awaiting::SubChannels(properties) => {
                must_succeed(Operation::CREATE_SUB_CHANNELS)?;
                Ok((Awaiting::Nothing, Step::Done(properties)))
            }
            Awaiting::Nothing => Err(HandshakeError::Unexpected),
        }
    }

    /// Asks for the newest version that is `eligible`.
    fn ask_for_version(
        &self,
        eligible: impl Fn(ProtocolVersion) -> bool,
    ) -> Result<(Awaiting, Step), HandshakeError> {
        let [oldest, ..] = ProtocolVersion::ALL;
        let version = ProtocolVersion::ALL.into_iter().rev().find(|version| eligible(*version));
        let Some(version) = version else {
            return Err(HandshakeError::NoCommonVersion { newest: self.newest, oldest });
        };
        let request = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION)
            .with_body(&ProtocolVersionBody::new(version));
        Ok((Awaiting::Version(version), Step::Send(request)))
    }

    fn accept(
        &self,
        version: ProtocolVersion,
        answer: &ChannelProperties,
    ) -> Result<Properties, HandshakeError> {
        let claimed = answer.max_transfer_bytes.get();
        if claimed < MIN_TRANSFER_BYTES {
            return Err(HandshakeError::TransferLimit { max_transfer_bytes: claimed });
        }
        let multi_channel = version.has_sub_channels()
            && answer.flags.get() & ChannelProperties::MULTI_CHANNEL != 0;
        let max_sub_channels = if multi_channel { answer.max_sub_channel_count.get() } else { 0 };
        Ok(Properties {
            version,
            max_transfer_bytes: claimed - claimed % MIN_TRANSFER_BYTES,
            max_sub_channels,
            sub_channels: max_sub_channels.min(self.wanted_sub_channels),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A server that accepts versions up to `newest` and has these properties.
    struct Server {
        newest: u16,
        flags: u32,
        max_sub_channels: u16,
        max_transfer_bytes: u32,
        /// Refuse this operation with this status.
        refuse: Option<(Operation, NtStatus)>,
    }

    impl Default for Server {
        fn default() -> Self {
            Self {
                newest: 0x0602,
                flags: 1,
                max_sub_channels: 4,
                max_transfer_bytes: 0x4_0000,
                refuse: None,
            }
        }
    }

    impl Server {
        fn answer(&self, request: &VstorPacket) -> VstorPacket {
            match self.refuse {
                Some((operation, status)) if operation == request.operation => {
                    return VstorPacket::answer(status);
                }
                _ => {}
            }
            let ok = VstorPacket::answer(NtStatus::SUCCESS);
            match request.operation {
                Operation::QUERY_PROTOCOL_VERSION => {
                    let asked = request.body::<ProtocolVersionBody>().version();
                    if asked.0 > self.newest {
                        return VstorPacket::answer(NtStatus::REVISION_MISMATCH);
                    }
                    ok
                }
                Operation::QUERY_PROPERTIES => {
                    let mut properties: ChannelProperties = ok.body();
                    properties.flags = self.flags.into();
                    properties.max_sub_channel_count = self.max_sub_channels.into();
                    properties.max_transfer_bytes = self.max_transfer_bytes.into();
                    ok.with_body(&properties)
                }
                _ => ok,
            }
        }

        /// Runs a whole initialisation; also the operations that were sent.
        fn run(&self, wanted: u16) -> (Vec<Operation>, Result<Properties, HandshakeError>) {
            let (mut handshake, mut request) = Handshake::new(ProtocolVersion::WIN10, wanted);
            let mut sent = Vec::new();
            loop {
                sent.push(request.operation);
                assert!(sent.len() < 20, "no end: {sent:?}");
                match handshake.on_answer(&self.answer(&request)) {
                    Ok(Step::Send(next)) => request = next,
                    Ok(Step::Done(properties)) => return (sent, Ok(properties)),
                    Err(error) => return (sent, Err(error)),
                }
            }
        }
    }

    #[test]
    fn the_steps_come_in_the_protocols_order() {
        let (sent, properties) = Server::default().run(2);
        assert_eq!(
            sent,
            [
                Operation::BEGIN_INITIALIZATION,
                Operation::QUERY_PROTOCOL_VERSION,
                Operation::QUERY_PROPERTIES,
                Operation::END_INITIALIZATION,
                Operation::CREATE_SUB_CHANNELS,
            ]
        );
        assert_eq!(
            properties,
            Ok(Properties {
                version: ProtocolVersion::WIN10,
                max_transfer_bytes: 0x4_0000,
                max_sub_channels: 4,
                sub_channels: 2
            })
        );
    }

    #[test]
    fn versions_are_asked_for_downwards() {
        for (newest, expected) in [
            (0x0602, Ok(ProtocolVersion::WIN10)),
            (0x0700, Ok(ProtocolVersion::WIN10)),
            (0x0601, Ok(ProtocolVersion::WIN8_1)),
            (0x0600, Ok(ProtocolVersion::WIN8_1)),
            (0x0501, Ok(ProtocolVersion::WIN8)),
            (0x0402, Ok(ProtocolVersion::WIN7)),
            (0x0200, Ok(ProtocolVersion::WIN6)),
            (
                0x0100,
                Err(HandshakeError::NoCommonVersion {
                    newest: ProtocolVersion::WIN10,
                    oldest: ProtocolVersion::WIN6,
                }),
            ),
        ] {
            let (_, got) = Server { newest, ..Server::default() }.run(0);
            assert_eq!(got.map(|properties| properties.version), expected, "newest={newest:#x}");
        }
    }

    #[test]
    fn every_refusal_names_its_step() {
        for operation in [
            Operation::BEGIN_INITIALIZATION,
            Operation::QUERY_PROTOCOL_VERSION,
            Operation::QUERY_PROPERTIES,
            Operation::END_INITIALIZATION,
            Operation::CREATE_SUB_CHANNELS,
        ] {
            let status = NtStatus::INVALID_DEVICE_STATE;
            let server = Server { refuse: Some((operation, status)), ..Server::default() };
            let (sent, got) = server.run(1);
            assert_eq!(got, Err(HandshakeError::Refused { operation, status }));
            assert_eq!(sent.last(), Some(&operation));
        }
    }

    #[test]
    fn properties_are_taken_for_what_they_are_worth() {
        for (server, wanted, expected) in [
            (Server { max_transfer_bytes: 4095, ..Server::default() }, 0, Err(4095)),
            (Server { max_transfer_bytes: 0, ..Server::default() }, 0, Err(0)),
            (Server { max_transfer_bytes: 4096, ..Server::default() }, 0, Ok((4096, 0))),
            (Server { max_transfer_bytes: 10_000, ..Server::default() }, 0, Ok((8192, 0))),
            (Server { max_transfer_bytes: u32::MAX, ..Server::default() }, 9, Ok((0xffff_f000, 4))),
            (Server { flags: 0, ..Server::default() }, 9, Ok((0x4_0000, 0))),
            (Server { newest: 0x0402, ..Server::default() }, 9, Ok((0x4_0000, 0))),
        ] {
            let (_, got) = server.run(wanted);
            let got = got.map(|p| (p.max_transfer_bytes, p.sub_channels));
            let expected = expected
                .map_err(|max_transfer_bytes| HandshakeError::TransferLimit { max_transfer_bytes });
            assert_eq!(got, expected);
        }
    }

    proptest! {
        /// Whatever a server answers, the initialisation ends after at most as many steps as there
        /// are, and never grants more subchannels than wanted.
        #[test]
        fn any_answers_end_it(answers: Vec<[u8; 24]>, wanted: u16) {
            let (mut handshake, _) = Handshake::new(ProtocolVersion::WIN10, wanted);
            let mut steps = 0;
            for bytes in answers.iter().cycle().take(16) {
                let mut payload = [0; 64];
                payload[8..32].copy_from_slice(bytes);
                // Half of the answers are successes, so that later steps are reached.
                if bytes[23] & 1 == 0 { payload[8..12].fill(0); }
                let (answer, _) = VstorPacket::parse(&payload).unwrap();
                match handshake.on_answer(&answer) {
                    Ok(Step::Send(_)) => steps += 1,
                    Ok(Step::Done(properties)) => {
                        prop_assert!(properties.sub_channels <= wanted);
                        prop_assert!(properties.max_transfer_bytes >= 4096);
                        break;
                    }
                    Err(_) => {
                        prop_assert_eq!(handshake.on_answer(&answer), Err(HandshakeError::Unexpected));
                        break;
                    }
                }
                prop_assert!(steps <= 3 + ProtocolVersion::ALL.len());
            }
        }
    }
}
