//! Every version of the protocol, over the transport.

use vmbus_guest::{ConnectionState, GuestConfig, LossReason};
use vmbus_host::Config;
use vmbus_unix::{ConnectionError, GuestOptions, HostOptions, UnixGuest};
use vmbus_wire::guid::Guid;
use vmbus_wire::version::{FeatureFlags, Version};

use crate::ends::*;

fn options(versions: &[Version]) -> GuestOptions {
    let mut options = GuestOptions::new(MEMORY);
    options.config = GuestConfig::new(Guid::from_u128(7));
    options.config.versions = versions.to_vec();
    options
}

/// The old ones signal by the shared interrupt page.
#[test]
fn packets_cross_in_every_version() {
    let server = Server::start();
    for version in Version::ALL {
        let client = Client::connect_with(server.path(), options(&[version])).unwrap();
        let ConnectionState::Connected { version: agreed, features, .. } =
            client.guest.bus().state()
        else {
            panic!("{version}: not connected")
        };
        assert_eq!(agreed, version);
        assert_eq!(features.is_empty(), version < Version::V6_0, "{version}: {features:?}");
        for number in 0..200u64 {
            let payload = number.to_le_bytes();
            assert_eq!(client.echo(&payload).unwrap(), payload, "{version}, packet {number}");
        }
    }
}

#[test]
fn host_and_guest_meet_at_the_newest_version_that_both_have() {
    let newest_first: Vec<_> = Version::ALL.into_iter().rev().collect();
    for newest_version in [Version::V1_1, Version::V4_1, Version::V5_0, Version::V6_0] {
        let bus = Config { newest_version, ..Config::default() };
        let server = Server::start_with(HostOptions { bus, ..HostOptions::default() }, 1);
        let client = Client::connect_with(server.path(), options(&newest_first)).unwrap();
        assert!(matches!(client.guest.bus().state(), ConnectionState::Connected { version, .. }
                if version == newest_version));
        assert_eq!(client.echo(b"we meet.").unwrap(), b"we meet.");
    }
}

#[test]
fn no_common_version_ends_the_connection_and_says_so() {
    let bus = Config { newest_version: Version::V2_4, ..Config::default() };
    let server = Server::start_with(HostOptions { bus, ..HostOptions::default() }, 1);
    let guest = UnixGuest::connect_with(server.path(), options(&[Version::V5_3, Version::V4_0]));
    let guest = guest.unwrap();
    assert!(!guest.drive_until_offered(PATIENCE).unwrap());
    let lost = guest.lost().unwrap();
    assert!(matches!(&*lost, ConnectionError::Bus(LossReason::Contact(_))), "{lost}");
    drop(guest);
    Client::connect_with(server.path(), options(&[Version::V2_4])).unwrap();
}

#[test]
fn features_are_those_that_both_ends_have() {
    let server = Server::start();
    let client = Client::connect(server.path());
    let ConnectionState::Connected { version, features, .. } = client.guest.bus().state() else {
        panic!("not connected")
    };
    assert_eq!((version, features), (Version::V6_0, GuestConfig::FEATURES));
    drop(client);
    let mut options = GuestOptions::new(MEMORY);
    options.config.features = FeatureFlags::PAUSE_RESUME;
    let client = Client::connect_with(server.path(), options).unwrap();
    assert!(matches!(client.guest.bus().state(), ConnectionState::Connected { features, .. }
            if features == FeatureFlags::PAUSE_RESUME));
    assert_eq!(client.echo(b"fewer...").unwrap(), b"fewer...");
}
