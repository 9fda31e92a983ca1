use super::*;
use crate::error::{FieldError, FieldProblem};
use crate::record::{Decode, Encode, EncodeError};
use crate::schema::Fields;

const ID: Guid = Guid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

fn channel() -> BusChannelRecord<'static> {
    BusChannelRecord {
        offer: 1 << 40,
        channel_id: 2047,
        interface_type: ID,
        interface_instance: ID,
        subchannel_index: 3,
        enumerate_device_interface: true,
        pipe: true,
        tlnpi_provider: true,
        force_new_channel: true,
        mmio_megabytes: 4,
        mmio_megabytes_optional: 5,
        user_defined: &[6; MAX_USER_BYTES],
        offer_step: OfferStep::Offered,
        open_step: OpenStep::Reopening,
        reserved: true,
        open_id: 7,
        reply_vp: 8,
        reply_sint: 9,
        ring_gpadl: 10,
        downstream_page_offset: 11,
        interrupts: true,
        target_vp: 12,
        event_flag: 13,
        connection_id: 14,
        user_data: &[15],
        closing_gpadl: 16,
        closing_accepted: true,
        closing_told: true,
        closing_reply_vp: 17,
        closing_reply_sint: 18,
        modifying: true,
        modifying_serial: u64::MAX,
        modifying_vp: 19,
        modifying_told: true,
    }
}

fn encoded<R: Encode>(record: &R) -> Result<Vec<u8>, EncodeError> {
    let mut room = vec![0; record.encoded_len()];
    record.encode(&mut room)?;
    assert_eq!((R::KIND.check)(&room), Ok(()), "what was written is not read");
    Ok(room)
}

/// Every field comes back, and every field of the table was in use.
fn there_and_back<'a, R>(record: &R, room: &'a mut Vec<u8>)
where
    R: Encode + Decode<'a> + PartialEq + std::fmt::Debug,
{
    *room = encoded(record).unwrap();
    let used: Vec<u32> =
        Fields::new(room, R::KIND.fields).map(|found| found.unwrap().number).collect();
    let all: Vec<u32> = R::KIND.fields.iter().map(|field| field.number).collect();
    assert_eq!(used, all, "{}", R::KIND.name);
    assert_eq!(&R::decode(room).unwrap(), record);
}

#[test]
fn every_field_comes_back() {
    let host = BusHostRecord {
        newest_version: 1,
        gpadl_page_quota: u64::MAX,
        vp_count: 2,
        connection: ConnectionStep::Disconnecting,
        after_end: AfterEnd::Failed,
        after_end_vp: 3,
        after_end_sint: 4,
        failed_version: 5,
        last_serial: 6,
        offers_made: 7,
        last_channel_id: 8,
        last_message: 9,
        paused: true,
        before_pause: 10,
        ram_runs: 11,
        channels: 12,
        gpadls: 13,
        hvsock_requests: 14,
        messages: u32::MAX,
    };
    let connection = BusConnectionRecord {
        version: 1,
        features: 2,
        slot_vp: 3,
        slot_sint: 4,
        named: true,
        client_id: ID,
        interrupt_page: 5,
        parent_to_child_monitor: 6,
        child_to_parent_monitor: 7,
        offers_requested: true,
    };
    let hvsock =
        BusHvsockRecord { id: 1, endpoint_id: ID, service_id: ID, contained: true, silo_id: ID };
    let message = BusMessageRecord {
        serial: 1,
        slot_vp: 2,
        slot_sint: 3,
        message: &[4; MAX_MESSAGE_BYTES],
        for_reserved: true,
    };
    let list = [5; MAX_WORD_BYTES];
    let gpadl = BusGpadlRecord {
        offer: 1,
        gpadl: 2,
        step: GpadlStep::Assembling,
        in_use: true,
        range_count: 3,
        words_total: 4,
        received: &list[..],
        ranges: &list[1..],
        wide: true,
        pfns: &list[2..],
    };
    let room = &mut Vec::new();
    there_and_back(&host, room);
    there_and_back(&connection, room);
    there_and_back(&BusRamRecord { first_pfn: 1, end_pfn: 2 }, room);
    there_and_back(&hvsock, room);
    there_and_back(&channel(), &mut Vec::new());
    there_and_back(&message, &mut Vec::new());
    there_and_back(&gpadl, &mut Vec::new());
}

#[test]
fn what_no_reader_would_take_is_not_written() {
    let refused =
        |number, name, problem| Err(EncodeError::Field(FieldError { number, name, problem }));
    let missing = FieldProblem::Missing;
    assert_eq!(encoded(&BusChannelRecord { offer: 0, ..channel() }), refused(1, "offer", missing));
    assert_eq!(
        encoded(&BusChannelRecord { open_step: OpenStep::Unspecified, ..channel() }),
        refused(14, "open_step", missing)
    );
    let long = FieldProblem::Length { found: 121, most: 120 };
    assert_eq!(
        encoded(&BusChannelRecord { user_data: &[1; 121], ..channel() }),
        refused(25, "user_data", long)
    );
    let message = BusMessageRecord { serial: 1, message: &[], ..BusMessageRecord::default() };
    assert_eq!(encoded(&message), refused(4, "message", missing));
    let gpadl: BusGpadlRecord<&[u8]> =
        BusGpadlRecord { offer: 1, step: GpadlStep::Created, ..BusGpadlRecord::default() };
    for (record, number, name) in [
        (BusGpadlRecord { offer: 0, ..gpadl }, 1, "offer"),
        (BusGpadlRecord { step: GpadlStep::Unspecified, ..gpadl }, 3, "step"),
    ] {
        assert_eq!(encoded(&record), refused(number, name, missing));
    }
    let list = &[0; MAX_WORD_BYTES + 1][..];
    for (record, number, name) in [
        (BusGpadlRecord { received: list, ..gpadl }, 7, "received"),
        (BusGpadlRecord { ranges: list, ..gpadl }, 8, "ranges"),
        (BusGpadlRecord { pfns: list, ..gpadl }, 10, "pfns"),
    ] {
        let long = FieldProblem::Length { found: 65_529, most: 65_528 };
        assert_eq!(encoded(&record), refused(number, name, long));
    }
}

#[test]
fn bytes_that_lie_in_pieces_are_written_where_they_belong() {
    struct Pieces(u8);
    impl Filled for Pieces {
        fn len(&self) -> usize {
            self.0.into()
        }
        fn fill(&self, room: &mut [u8]) {
            assert_eq!(room.len(), self.len());
            room.fill(self.0);
        }
    }
    let pieces = BusGpadlRecord {
        offer: 1,
        gpadl: 0,
        step: GpadlStep::Created,
        in_use: false,
        range_count: 0,
        words_total: 0,
        received: Pieces(0),
        ranges: Pieces(8),
        wide: false,
        pfns: Pieces(200),
    };
    let bytes = encoded(&pieces).unwrap();
    let decoded = BusGpadlRecord::<&[u8]>::decode(&bytes).unwrap();
    let expected = (&[][..], &[8; 8][..], &[200; 200][..]);
    assert_eq!((decoded.received, decoded.ranges, decoded.pfns), expected);
}
