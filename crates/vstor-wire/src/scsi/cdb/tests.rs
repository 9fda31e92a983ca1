use super::*;
use proptest::prelude::*;

fn extent(form: CdbForm, lba: u64, blocks: u32) -> Extent {
    Extent { form, lba, blocks }
}

fn transfer(form: CdbForm, lba: u64, blocks: u32, fua: bool) -> Transfer {
    Transfer { extent: extent(form, lba, blocks), fua }
}

/// Every command in every form, and its bytes.
#[rustfmt::skip]
fn vectors() -> std::vec::Vec<(Command, &'static [u8])> {
    use CdbForm::*;
    let lba = 0x0102_0304;
    let long = 0x0102_0304_0506_0708;
    std::vec![
        (Command::TestUnitReady, &[0, 0, 0, 0, 0, 0]),
        (Command::RequestSense { descriptor_format: false, allocation: 18 }, &[3, 0, 0, 0, 18, 0]),
        (Command::RequestSense { descriptor_format: true, allocation: 252 }, &[3, 1, 0, 0, 252, 0]),
        (Command::Inquiry { page: None, allocation: 0x0124 }, &[0x12, 0, 0, 1, 0x24, 0]),
        (Command::Inquiry { page: Some(0), allocation: 255 }, &[0x12, 1, 0, 0, 255, 0]),
        (Command::Inquiry { page: Some(0x83), allocation: 255 }, &[0x12, 1, 0x83, 0, 255, 0]),
        (Command::ModeSense(ModeSense { form: Six, disable_block_descriptors: true,
            long_lba_accepted: false, control: PageControl::Current, page: 8, subpage: 0,
            allocation: 192 }), &[0x1a, 8, 8, 0, 192, 0]),
        (Command::ModeSense(ModeSense { form: Ten, disable_block_descriptors: false,
            long_lba_accepted: true, control: PageControl::Saved, page: 0x3f, subpage: 0xff,
            allocation: 0x0102 }), &[0x5a, 0x10, 0xff, 0xff, 0, 0, 0, 1, 2, 0]),
        (Command::ReadCapacity10, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Command::ReadCapacity16 { allocation: 32 },
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]),
        (Command::Read(transfer(Six, 0x1f_0203, 4, false)), &[8, 0x1f, 2, 3, 4, 0]),
        (Command::Read(transfer(Six, 0, 256, false)), &[8, 0, 0, 0, 0, 0]),
        (Command::Read(transfer(Ten, lba, 0x0506, true)), &[0x28, 8, 1, 2, 3, 4, 0, 5, 6, 0]),
        (Command::Read(transfer(Twelve, lba, 0x0506_0708, false)),
            &[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]),
        (Command::Read(transfer(Sixteen, long, 0x090a_0b0c, true)),
            &[0x88, 8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]),
        (Command::Write(transfer(Six, 1, 1, false)), &[0x0a, 0, 0, 1, 1, 0]),
        (Command::Write(transfer(Ten, lba, 0, false)), &[0x2a, 0, 1, 2, 3, 4, 0, 0, 0, 0]),
        (Command::Write(transfer(Twelve, lba, 1, true)), &[0xaa, 8, 1, 2, 3, 4, 0, 0, 0, 1, 0, 0]),
        (Command::Write(transfer(Sixteen, long, 1, false)),
            &[0x8a, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0]),
        (Command::Verify { extent: extent(Ten, lba, 2), compare: ByteCheck::Medium },
            &[0x2f, 0, 1, 2, 3, 4, 0, 0, 2, 0]),
        (Command::Verify { extent: extent(Twelve, lba, 2), compare: ByteCheck::Blocks },
            &[0xaf, 2, 1, 2, 3, 4, 0, 0, 0, 2, 0, 0]),
        (Command::Verify { extent: extent(Sixteen, long, 2), compare: ByteCheck::OneBlock },
            &[0x8f, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 2, 0, 0]),
        (Command::SynchronizeCache { extent: extent(Ten, 0, 0), immediate: false },
            &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Command::SynchronizeCache { extent: extent(Sixteen, long, 3), immediate: true },
            &[0x91, 2, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 3, 0, 0]),
        (Command::Unmap { parameter_bytes: 0x0118 }, &[0x42, 0, 0, 0, 0, 0, 0, 1, 0x18, 0]),
        (Command::WriteSame { extent: extent(Ten, lba, 5), unmap: true, no_data: false },
            &[0x41, 8, 1, 2, 3, 4, 0, 0, 5, 0]),
        (Command::WriteSame { extent: extent(Sixteen, long, 5), unmap: true, no_data: true },
            &[0x93, 9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 5, 0, 0]),
        (Command::ReportLuns { select: 2, allocation: 0x0102_0304 },
            &[0xa0, 0, 2, 0, 0, 0, 1, 2, 3, 4, 0, 0]),
        (Command::StartStopUnit { immediate: true, power_condition: 3, load_eject: true, start: false },
            &[0x1b, 1, 0, 0, 0x32, 0]),
        (Command::StartStopUnit { immediate: false, power_condition: 0, load_eject: false, start: true },
            &[0x1b, 0, 0, 0, 1, 0]),
    ]
}

#[test]
fn every_command_has_these_bytes_both_ways() {
    for (command, bytes) in vectors() {
        let cdb = command.encode().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert_eq!(cdb.as_bytes(), bytes, "{command:?}");
        assert_eq!(Command::parse(bytes), Ok(command), "{bytes:02x?}");
        let mut padded = [0xffu8; 20];
        padded[..bytes.len()].copy_from_slice(bytes);
        assert_eq!(Command::parse(&padded), Ok(command), "padded {bytes:02x?}");
    }
}

#[test]
fn a_cdb_that_is_cut_off_is_refused_at_every_length() {
    for (_, bytes) in vectors() {
        for got in 1..bytes.len() {
            let needed = u8::try_from(bytes.len()).unwrap();
            let expected = CdbError::TooShort { opcode: bytes[0], needed, got };
            assert_eq!(Command::parse(&bytes[..got]), Err(expected), "{bytes:02x?}");
            assert_eq!(expected.sense().code, AdditionalSense::INVALID_FIELD_IN_CDB);
        }
    }
    assert_eq!(Command::parse(&[]), Err(CdbError::Empty));
}

#[test]
fn unknown_operation_codes_are_refused_as_such() {
    let known: std::vec::Vec<u8> = vectors().iter().map(|(_, bytes)| bytes[0]).collect();
    for opcode in 0..=255u8 {
        let parsed = Command::parse(&[opcode; 16]);
        let unknown = Err(CdbError::UnknownOpcode { opcode });
        assert_eq!(parsed == unknown, !known.contains(&opcode), "{opcode:#04x}");
    }
    let sense = CdbError::UnknownOpcode { opcode: 0xff }.sense();
    assert_eq!((sense.key, sense.code.asc, sense.code.ascq), (SenseKey::IllegalRequest, 0x20, 0));
}

#[test]
fn fields_that_ask_for_the_unsupported_are_pointed_to() {
    // Start from a good CDB, set one byte, and expect this byte and bit in the error.
    for (base, byte, value, bit, what) in [
        (&[0x12u8, 0, 0, 0, 36, 0][..], 1u8, 0x02u8, 1u8, "INQUIRY CMDDT"),
        (&[0x12, 0, 0, 0, 36, 0], 2, 0x83, 7, "INQUIRY page without EVPD"),
        (&[0x12, 0, 0, 0, 36, 0], 5, 0x04, 2, "INQUIRY NACA"),
        (&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8, 0x01, 0, "READ CAPACITY(10) PMI"),
        (&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 5, 0x01, 0, "READ CAPACITY(10) address"),
        (&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 1, 0x11, 4, "service action"),
        (
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
            14,
            1,
            0,
            "READ CAPACITY(16) PMI",
        ),
        (&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x20, 5, "RDPROTECT"),
        (&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 9, 0x04, 2, "READ(10) NACA"),
        (&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0xe0, 7, "WRPROTECT"),
        (&[0x2f, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x40, 6, "VRPROTECT"),
        (&[0x2f, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x04, 2, "BYTCHK 10b"),
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0], 1, 0x01, 0, "UNMAP ANCHOR"),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x10, 4, "WRITE SAME ANCHOR"),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x02, 1, "WRITE SAME LBDATA"),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x04, 2, "WRITE SAME PBDATA"),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], 1, 0x80, 7, "WRITE SAME WRPROTECT"),
    ] {
        assert!(Command::parse(base).is_ok(), "{what}");
        let mut cdb = std::vec::Vec::from(base);
        cdb[usize::from(byte)] = value;
        let expected = CdbError::InvalidField { opcode: base[0], byte, bit, value };
        assert_eq!(Command::parse(&cdb), Err(expected), "{what}");
        let sense = expected.sense();
        assert_eq!(sense.code, AdditionalSense::INVALID_FIELD_IN_CDB, "{what}");
        assert_eq!(sense.field, Some(FieldPointer::cdb(u16::from(byte)).with_bit(bit)), "{what}");
    }
}

#[test]
fn values_that_do_not_fit_their_form_are_not_encoded() {
    use CdbForm::*;
    for command in [
        Command::Read(transfer(Six, 1 << 21, 1, false)),
        Command::Read(transfer(Six, 0, 0, false)),
        Command::Read(transfer(Six, 0, 257, false)),
        Command::Read(transfer(Six, 0, 1, true)),
        Command::Read(transfer(Ten, 1 << 32, 1, false)),
        Command::Read(transfer(Ten, 0, 1 << 16, false)),
        Command::Read(transfer(Twelve, 1 << 32, 1, false)),
        Command::Verify { extent: extent(Six, 0, 1), compare: ByteCheck::Medium },
        Command::SynchronizeCache { extent: extent(Twelve, 0, 1), immediate: false },
        Command::WriteSame { extent: extent(Twelve, 0, 1), unmap: false, no_data: false },
        Command::WriteSame { extent: extent(Ten, 0, 1), unmap: false, no_data: true },
        Command::StartStopUnit {
            immediate: false,
            power_condition: 16,
            load_eject: false,
            start: true,
        },
        Command::ModeSense(ModeSense {
            form: Six,
            disable_block_descriptors: false,
            long_lba_accepted: false,
            control: PageControl::Current,
            page: 8,
            subpage: 0,
            allocation: 256,
        }),
        Command::ModeSense(ModeSense {
            form: Six,
            disable_block_descriptors: false,
            long_lba_accepted: true,
            control: PageControl::Current,
            page: 8,
            subpage: 0,
            allocation: 1,
        }),
        Command::ModeSense(ModeSense {
            form: Ten,
            disable_block_descriptors: false,
            long_lba_accepted: true,
            control: PageControl::Current,
            page: 64,
            subpage: 0,
            allocation: 1,
        }),
    ] {
        assert!(command.encode().is_err(), "{command:?}");
    }
}

#[test]
fn the_short_constructors_choose_a_form_that_fits() {
    for (command, length) in [
        (Command::read(0, 0), 10),
        (Command::read(0xffff_ffff, 0xffff), 10),
        (Command::read(0x1_0000_0000, 1), 16),
        (Command::write(0, 0x1_0000, true), 16),
        (Command::synchronize_cache(), 10),
    ] {
        assert_eq!(command.encode().map(|cdb| cdb.length()), Ok(length), "{command:?}");
    }
}

proptest! {
    /// Whatever a guest sends is read or refused, and what was read is written as it was meant.
    #[test]
    fn any_bytes_are_read_or_refused(cdb in proptest::collection::vec(any::<u8>(), 0..24)) {
        if let Ok(command) = Command::parse(&cdb) {
            let written = command.encode().unwrap();
            prop_assert_eq!(Command::parse(written.as_bytes()), Ok(command));
        }
    }
}
