//! One suite over both forms of a ring.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use vmbus_memory::*;
use vmbus_ring::*;
use vmbus_wire::packet::PacketKind;

#[test]
fn a_packet_goes_through() {
    let memory = GuestMemory::memfd(16 * 4096).unwrap();
    let budget = MappingBudget::default();
    let pages = || RingPages::map(&memory, &[3, 5, 4], &budget).unwrap();
    initialize(&pages());
    let (mut w, mut r) = (RingWriter::new(pages()).unwrap(), RingReader::new(pages()).unwrap());
    assert!(w.pages().is_mapped());
    for n in 0..1000u64 {
        let payload = vec![n as u8; 8 * (n as usize % 50)];
        w.push(&OutgoingPacket {
            kind: PacketKind::InBand,
            wants_completion: true,
            transaction_id: n,
            extension: &[],
            payload: &[&payload],
        })
        .unwrap();
        assert!(!w.publish());
        let p = r.peek().unwrap().unwrap();
        assert_eq!((p.transaction_id, p.payload_len as usize), (n, payload.len()));
        let mut got = vec![0; payload.len()];
        assert_eq!(p.copy_payload(&mut got), payload.len());
        assert_eq!(got, payload);
        r.advance();
        assert!(r.peek().unwrap().is_none());
        assert!(!r.publish());
    }
}
