//! The messages of a channel's life, byte for byte, in every version.

use kmcl::bus::{GpadlPages, PageRange};
use vmbus_wire::message::gpadl::MAX_GPADL_WORDS;

use super::*;
use crate::gpadl::{FIRST_GPADL, MAX_GPADL_PAGES};

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// One channel opened, given a buffer, closed, withdrawn and released.
#[test]
fn a_channels_life_is_the_same_in_every_version_but_for_what_the_version_adds() {
    for version in Version::ALL {
        let to = 1;
        let mut lab = Lab::connected(version);
        let client = lab.bound(7);
        let mut request = ring_request(4);
        request.user_data[0] = 0xaa;
        request.user_data[119] = 0xbb;
        let ring = lab.guest.open(client, request).unwrap();
        assert_eq!(ring, FIRST_GPADL);
        lab.run();
        let mut header = le(&[8, 0, 7, ring]);
        header.extend([40, 0, 1, 0]); // one range in 40 bytes: its header and four PFNs
        header.extend(le(&[0x4000, 0, 0x100, 0, 0x101, 0, 0x102, 0, 0x103, 0]));
        assert_eq!(lab.posts, [(to, header)], "{version}");
        lab.posts.clear();

        lab.created(7, ring, NtStatus::SUCCESS).unwrap();
        let target_vp = if version >= Version::V2_4 { 3 } else { 0 };
        let mut open = le(&[5, 0, 7, 1, ring, target_vp, 2]);
        open.push(0xaa);
        open.extend([0; 118]);
        open.push(0xbb);
        if version >= Version::V6_0 {
            open.extend(le(&[0x2007]));
            open.extend([7, 0, 0, 0]); // event flag 7, no flags
        }
        assert_eq!(open.len(), if version >= Version::V6_0 { 156 } else { 148 });
        assert_eq!(lab.posts, [(to, open)], "{version}");
        lab.posts.clear();
        lab.opened_with(7, 1, NtStatus::SUCCESS).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::Opened { gpadl: ring }], "{version}");

        let range = PageRange { byte_count: 100, byte_offset: 4000, pfns: vec![0x200, 0x300] };
        let buffer = GpadlPages { ranges: vec![range], read_only: true };
        let gpadl = lab.guest.create_gpadl(client, &buffer).unwrap();
        lab.run();
        let mut header = le(&[8, 0, 7, gpadl]);
        header.extend([24, 0, 1, 0]);
        header.extend(le(&[100, 4000, 0x200, 0, 0x300, 0]));
        assert_eq!(lab.posts, [(to, header)], "{version}");
        lab.posts.clear();
        lab.created(7, gpadl, NtStatus::SUCCESS).unwrap();
        let status = NtStatus::SUCCESS;
        assert_eq!(lab.heard(), [ClientEvent::GpadlCreated { gpadl, status }], "{version}");
        lab.guest.teardown_gpadl(client, gpadl).unwrap();
        lab.run();
        assert_eq!(lab.posts, [(to, le(&[11, 0, 7, gpadl]))], "{version}");
        lab.posts.clear();
        lab.torn_down(gpadl).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::GpadlTornDown { gpadl }], "{version}");

        lab.guest.close(client);
        lab.run();
        let expected = [(to, le(&[7, 0, 7])), (to, le(&[11, 0, 7, ring]))];
        assert_eq!(lab.posts, expected, "{version}");
        lab.posts.clear();
        assert!(lab.released.is_empty(), "{version}: the host may still use the ring");
        lab.torn_down(ring).unwrap();
        assert_eq!(lab.released, [ring], "{version}");

        lab.rescind(7).unwrap();
        assert_eq!(lab.heard(), [ClientEvent::Rescinded], "{version}");
        assert!(lab.posts.is_empty(), "{version}: the client has not let go");
        lab.guest.close(client);
        lab.run();
        assert_eq!(lab.posts, [(to, le(&[13, 0, 7]))], "{version}");
        lab.guest.unbind(client);
        lab.run();
        lab.assert_rest(0, 0);
    }
}

/// 26 PFNs fit beside the range's header, then 28 words per body.
#[test]
fn long_page_lists_become_a_header_and_bodies() {
    for (pages, messages) in [(4, 1), (26, 1), (27, 2), (54, 2), (55, 3), (MAX_GPADL_PAGES, 293)] {
        let mut lab = Lab::connected(Version::V5_3);
        let client = lab.bound(1);
        let gpadl = lab.guest.open(client, ring_request(pages as u64)).unwrap();
        lab.run();
        assert_eq!(lab.posts.len(), messages, "{pages} pages");
        let mut words = Vec::new();
        for (index, (_, bytes)) in lab.posts.iter().enumerate() {
            let skip = if index == 0 {
                assert_eq!(bytes[..16], le(&[8, 0, 1, gpadl]), "{pages} pages");
                let buflen = u16::from_le_bytes([bytes[16], bytes[17]]);
                assert_eq!(usize::from(buflen), (pages + 1) * 8, "{pages} pages");
                20
            } else {
                assert_eq!(bytes[..16], le(&[9, 0, 0, gpadl]), "{pages} pages, {index}");
                16
            };
            assert!(bytes.len() <= 240, "{pages} pages, {index}");
            words.extend(
                bytes[skip..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())),
            );
        }
        let expected: Vec<u64> = std::iter::once(pages as u64 * 4096)
            .chain((0..pages as u64).map(|page| 0x100 + page))
            .collect();
        assert_eq!(words, expected, "{pages} pages");
        lab.created(1, gpadl, NtStatus::SUCCESS).unwrap();
    }
}

#[test]
fn pages_that_no_gpadl_can_describe_are_refused() {
    let range = |byte_count, byte_offset, pages: u64| PageRange {
        byte_count,
        byte_offset,
        pfns: (0..pages).collect(),
    };
    let bad = |byte_count, byte_offset, pages| RequestError::Range {
        range: 0,
        byte_count,
        byte_offset,
        pages,
    };
    let mut far = range(4096, 0, 1);
    far.pfns = vec![1 << 52];
    let whole = u32::try_from(MAX_GPADL_WORDS * 4096).unwrap();
    let table = [
        (vec![], RequestError::GpadlSize { ranges: 0, words: 0 }),
        (vec![range(0, 0, 0)], bad(0, 0, 0)),
        (vec![range(4096, 1, 1)], bad(4096, 1, 1)),
        (vec![range(4096, 0, 2)], bad(4096, 0, 2)),
        (vec![range(1, 4096, 2)], bad(1, 4096, 2)),
        (vec![range(u32::MAX, 4095, 1)], bad(u32::MAX, 4095, 1)),
        (vec![far], bad(4096, 0, 1)),
        (
            vec![range(whole, 0, MAX_GPADL_WORDS as u64)],
            RequestError::GpadlSize { ranges: 1, words: MAX_GPADL_WORDS + 1 },
        ),
    ];
    let mut lab = Lab::connected(Version::V5_3);
    let client = lab.bound(1);
    for (ranges, expected) in table {
        let pages = GpadlPages { ranges, read_only: false };
        assert_eq!(lab.guest.create_gpadl(client, &pages), Err(expected));
        assert_eq!(lab.guest.counts().gpadls, 0, "{expected}");
    }
    for (pages, outgoing) in [(4, 1), (4, 3), (3, 2), (2, 1), (4, 5), (0, 0), (8191, 100)] {
        let request = RingRequest { outgoing_pages: outgoing, ..ring_request(pages) };
        let expected = RequestError::RingShape { pages: usize::try_from(pages).unwrap(), outgoing };
        assert_eq!(lab.guest.open(client, request), Err(expected));
    }
    lab.run();
    assert!(lab.posts.is_empty());
}

/// UNLOAD has an answer from 1.1 on.
#[test]
fn unload_ends_the_connection_in_every_version() {
    for version in Version::ALL {
        let mut lab = Lab::connected(version);
        let (client, ring) = lab.opened(1);
        lab.guest.unload().unwrap();
        lab.run();
        assert_eq!(lab.posts, [(1, le(&[16, 0]))], "{version}");
        assert_eq!(lab.heard(), [ClientEvent::Rescinded], "{version}");
        lab.guest.close(client);
        lab.run();
        if version >= Version::V1_1 {
            assert!(lab.released.is_empty(), "{version}: the host may still use the ring");
            lab.host(HostMessage::UnloadComplete).unwrap();
        }
        assert_eq!(lab.events, [ConnectionEvent::Unloaded], "{version}");
        assert_eq!(lab.released, [ring], "{version}");
        assert_eq!(lab.guest.state(), ConnectionState::Unloaded);
        lab.guest.unbind(client);
        lab.assert_rest(0, 0);
    }
}
