//! A client against a server that lies, falls silent, or dies: typed errors, and every request ends
//! once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod server;

use std::time::{Duration, Instant};

use kmcl::NtStatus;
use server::{MAX_TRANSFER, Reply, Server, config};
use vsc_storage::wire::packet::{Operation, VstorPacket};
use vsc_storage::wire::protocol::ChannelProperties;
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::wire::srb::{ScsiAddress, ScsiRequest, ScsiStatus, SrbStatus};
use vsc_storage::{AnswerError, Error, HandshakeError, Request, StorageClient};
use zerocopy::IntoBytes;

const LUN: ScsiAddress = ScsiAddress::new(0, 0, 0);

/// Makes an honest packet a dishonest one.
type Lie = fn(VstorPacket) -> Vec<u8>;

/// What it is called, how it is told, how it is found out.
type Row = (&'static str, Lie, fn(&Error) -> bool);

fn with_srb(packet: VstorPacket, change: impl FnOnce(&mut ScsiRequest)) -> Vec<u8> {
    let mut srb: ScsiRequest = packet.body();
    change(&mut srb);
    packet.with_body(&srb).as_bytes().to_vec()
}

#[test]
fn a_lie_in_an_answer_is_an_error_of_that_request_alone() {
    let lies: [Row; 8] = [
        (
            "nothing",
            |_| Vec::new(),
            |error| *error == Error::Answer(AnswerError::Length { got: 0, needed: 64 }),
        ),
        (
            "half a packet",
            |packet| packet.as_bytes()[..32].to_vec(),
            |error| *error == Error::Answer(AnswerError::Length { got: 32, needed: 64 }),
        ),
        (
            "another operation",
            |packet| {
                VstorPacket { operation: Operation::EXECUTE_SRB, ..packet }.as_bytes().to_vec()
            },
            |error| {
                *error
                    == Error::Answer(AnswerError::Operation { operation: Operation::EXECUTE_SRB })
            },
        ),
        (
            "more bytes than there were",
            |packet| with_srb(packet, |srb| srb.data_transfer_length = 513.into()),
            |error| *error == Error::Answer(AnswerError::Moved { claimed: 513, asked: 512 }),
        ),
        (
            "fewer bytes than needed",
            |packet| with_srb(packet, |srb| srb.data_transfer_length = 511.into()),
            |error| *error == Error::ShortTransfer { asked: 512, moved: 511 },
        ),
        (
            "an SRB status that does not exist",
            |packet| with_srb(packet, |srb| srb.finish(SrbStatus(0x3f), ScsiStatus::GOOD, 512)),
            |error| matches!(error, Error::Scsi(scsi) if scsi.srb_status == SrbStatus(0x3f)),
        ),
        (
            "sense data that is none",
            |packet| {
                with_srb(packet, |srb| {
                    srb.finish_with_sense(SrbStatus::ERROR, 0, &[0xff; 20]);
                    srb.sense_info_length = 255;
                })
            },
            |error| matches!(error, Error::Scsi(scsi) if scsi.sense.is_none()),
        ),
        (
            "a packet that failed",
            |packet| {
                let status = NtStatus::UNSUCCESSFUL.0.into();
                VstorPacket { status, ..packet }.as_bytes().to_vec()
            },
            |error| {
                *error
                    == Error::Refused {
                        operation: Operation::EXECUTE_SRB,
                        status: NtStatus::UNSUCCESSFUL,
                    }
            },
        ),
    ];
    let server = Server::start();
    let mut client = server.client(|_| {});
    let disk = client.identify(LUN).unwrap().unwrap();
    let mut data = [0; 512];
    for (name, lie, expected) in lies {
        server.set_policy(move |_, honest| Reply::Bytes(lie(*honest)));
        let error = client.read(&disk, 0, &mut data).unwrap_err();
        assert!(expected(&error), "{name}: {error:?}");
        server.set_policy(|_, _| Reply::Honest);
        client.read(&disk, 512, &mut data).unwrap_or_else(|error| panic!("after {name}: {error}"));
        assert_eq!(data, [1; 512], "after {name}");
    }
}

#[test]
fn lies_in_the_initialisation_end_it() {
    let properties = |max_transfer_bytes: u32| {
        move |request: &VstorPacket, honest: &VstorPacket| {
            if request.operation != Operation::QUERY_PROPERTIES {
                return Reply::Honest;
            }
            let mut body: ChannelProperties = honest.body();
            body.max_transfer_bytes = max_transfer_bytes.into();
            Reply::Bytes(honest.with_body(&body).as_bytes().to_vec())
        }
    };
    let server = Server::start();
    server.set_policy(properties(100));
    let error = StorageClient::connect(server.bus.clone(), config(|_| {})).unwrap_err();
    assert_eq!(error, HandshakeError::TransferLimit { max_transfer_bytes: 100 }.into());

    server.set_policy(|_, _| Reply::Bytes(vec![1, 0, 0]));
    let error = StorageClient::connect(server.bus.clone(), config(|_| {})).unwrap_err();
    assert_eq!(error, AnswerError::Length { got: 8, needed: 64 }.into());

    server.set_policy(properties(u32::MAX));
    let client = server.client(|_| {});
    assert!(client.max_transfer_bytes() <= vsc_storage::MAX_TRANSFER_BYTES);
}

#[test]
fn subchannels_that_never_come_are_a_time_out() {
    let server = Server::start();
    let limit = Duration::from_millis(50);
    server.forget_sub_channels();
    let error = StorageClient::connect(
        server.bus.clone(),
        config(|config| {
            config.sub_channels = 2;
            config.connect_timeout = limit;
        }),
    )
    .unwrap_err();
    assert_eq!(error, Error::Timeout(limit));
}

#[test]
fn silence_is_a_time_out_and_a_late_answer_harms_nobody() {
    let server = Server::start();
    let limit = Duration::from_millis(50);
    let mut client = server.client(|config| config.request_timeout = limit);
    let disk = client.identify(LUN).unwrap().unwrap();
    server.set_policy(|_, _| Reply::Hold);
    let mut data = [0; 512];
    assert_eq!(client.read(&disk, 0, &mut data), Err(Error::Timeout(limit)));
    server.wait_held(1);
    server.set_policy(|_, _| Reply::Honest);
    server.release(|_| {});
    client.read(&disk, 1024, &mut data).unwrap();
    assert_eq!(data, [2; 512]);
    // The buffer of the request that was given up on is not among those in use any more.
    while client.in_flight() != 0 {
        client.wait(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn every_request_ends_once_when_the_server_dies() {
    for sub_channels in [0, 2] {
        let server = Server::start();
        let mut client = server.client(|config| config.sub_channels = sub_channels);
        server.set_policy(|_, _| Reply::Hold);
        for token in 0..20 {
            let buffer = client.allocate(4096).unwrap();
            let cdb = Command::read(token, 1).encode().unwrap();
            client
                .submit(Request::new(LUN, cdb).reading(buffer, 0, 512).with_token(token))
                .unwrap();
        }
        server.wait_held(20);
        server.die();
        let started = Instant::now();
        let mut tokens = Vec::new();
        while tokens.len() < 20 {
            client.wait_completion(Duration::from_secs(1)).unwrap();
            while let Some(completion) = client.next_completion() {
                assert!(completion.result.is_err(), "{:?}", completion.result);
                assert!(completion.buffer.is_some());
                tokens.push(completion.token);
            }
        }
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        tokens.sort_unstable();
        assert_eq!(tokens, (0..20).collect::<Vec<_>>());
        assert_eq!(client.failure(), Some(Error::Disconnected));
        assert_eq!(client.next_completion().map(|completion| completion.token), None);
        let cdb = Command::TestUnitReady.encode().unwrap();
        assert_eq!(client.submit(Request::new(LUN, cdb)).unwrap_err().error, Error::Disconnected);
        assert_eq!(client.test_unit_ready(LUN), Err(Error::Disconnected));
    }
}

#[test]
fn a_blocking_call_ends_when_the_server_dies() {
    let server = Server::start();
    let mut client = server.client(|_| {});
    let disk = client.identify(LUN).unwrap().unwrap();
    server.set_policy(|_, _| Reply::Hold);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.wait_held(4);
            server.die();
        });
        let started = Instant::now();
        let mut data = vec![0; 4 * MAX_TRANSFER as usize];
        assert_eq!(client.read(&disk, 0, &mut data), Err(Error::Disconnected));
        assert!(started.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn rings_of_garbage_end_the_client_and_every_request() {
    let server = Server::start();
    let mut client = server.client(|_| {});
    server.set_policy(|_, _| Reply::Hold);
    let buffer = client.allocate(4096).unwrap();
    let cdb = Command::read(0, 1).encode().unwrap();
    client.submit(Request::new(LUN, cdb).reading(buffer, 0, 512)).unwrap();
    server.wait_held(1);
    // Everything that both ends share, rings included.
    let memory = server.bus.memory();
    memory.fill(0, memory.total_bytes(), 0xff).unwrap();
    let started = Instant::now();
    let error = loop {
        match client.wait(Duration::from_millis(10)) {
            Ok(_) => assert!(started.elapsed() < Duration::from_secs(10), "garbage goes unnoticed"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Channel(_) | Error::Disconnected), "{error:?}");
    assert!(client.next_completion().unwrap().result.is_err());
    assert_eq!(client.in_flight(), 0);
}
