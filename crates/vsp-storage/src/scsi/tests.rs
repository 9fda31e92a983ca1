//! Every command: what it does, and each way to refuse it.

use std::cell::RefCell;
use std::sync::Arc;

use proptest::prelude::*;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::scsi::luns::parse_lun_list;
use vstor_wire::srb::ScsiAddress;

use super::bus::{Lun, LunError, LunTable};
use super::*;
use crate::block::RamBackend;
use crate::disk::{Disk, DiskOptions};

const LUN: ScsiAddress = ScsiAddress::new(0, 0, 0);

/// Sectors of the disk under test.
const SECTORS: u32 = 0x1000;

struct Guest(RefCell<Vec<u8>>);

impl DataBuffer for Guest {
    fn read_at(&self, offset: u32, into: &mut [u8]) -> bool {
        let bytes = self.0.borrow();
        match bytes.get(offset as usize..offset as usize + into.len()) {
            Some(from) => into.copy_from_slice(from),
            None => return false,
        }
        true
    }

    fn write_at(&self, offset: u32, from: &[u8]) -> bool {
        let mut bytes = self.0.borrow_mut();
        match bytes.get_mut(offset as usize..offset as usize + from.len()) {
            Some(to) => to.copy_from_slice(from),
            None => return false,
        }
        true
    }
}

fn disk(sector_bytes: u32, read_only: bool) -> Arc<Disk> {
    let bytes = u64::from(SECTORS) * u64::from(sector_bytes);
    let ram = RamBackend::new(bytes).unwrap();
    let ram = if read_only { ram.read_only() } else { ram };
    let options = DiskOptions { sector_bytes, serial: "kmcl-0001".into() };
    Disk::new(Arc::new(ram), &options).unwrap()
}

fn table(disk: Arc<Disk>) -> LunTable {
    LunTable::default().attach(Lun::new(LUN, disk, 1)).unwrap()
}

/// What came of a command.
#[derive(Debug)]
struct Run {
    plan: Plan,
    data: Vec<u8>,
    ranges: Vec<ByteRange>,
}

impl Run {
    fn answer(&self) -> Answer {
        match self.plan {
            Plan::Answer(answer) => answer,
            _ => panic!("{self:?}"),
        }
    }

    /// The data that was moved to the guest.
    fn moved(&self) -> &[u8] {
        let answer = self.answer();
        assert_eq!(answer.srb, SrbStatus::SUCCESS, "{answer:?}");
        &self.data[..answer.moved as usize]
    }
}

fn run_at(
    table: &LunTable,
    address: ScsiAddress,
    cdb: &[u8],
    direction: DataDirection,
    data: Vec<u8>,
) -> Run {
    let available = u32::try_from(data.len()).unwrap();
    let guest = Guest(RefCell::new(data));
    let mut ranges = Vec::new();
    let data = Data { direction, available, buffer: &guest };
    let (plan, _) = table.plan(address, Command::parse(cdb), &data, &mut ranges);
    Run { plan, data: guest.0.into_inner(), ranges }
}

fn run_on(disk: &Arc<Disk>, cdb: &[u8], direction: DataDirection, data: Vec<u8>) -> Run {
    run_at(&table(Arc::clone(disk)), LUN, cdb, direction, data)
}

/// Data to the guest.
fn read(cdb: &[u8], room: usize) -> Run {
    run_on(&disk(512, false), cdb, DataDirection::In, vec![0xee; room])
}

fn sense_of(answer: Answer) -> (SenseKey, u8, u8, Option<FieldPointer>) {
    assert_eq!(answer.srb, SrbStatus::ERROR);
    assert_eq!(answer.scsi, ScsiStatus::CHECK_CONDITION);
    assert_eq!(answer.moved, 0);
    let sense = answer.sense.unwrap();
    (sense.key, sense.code.asc, sense.code.ascq, sense.field)
}

#[test]
fn answers_with_data_have_these_bytes() {
    let mut identification = vec![0, 0x83, 0, 12 + 21, 1, 3, 0, 8, 0x30, 0, 0, 0, 0, 0, 0, 0];
    let id = disk(512, false).profile().id();
    identification[8..16].copy_from_slice(&(3 << 60 | (id & 0x0fff_ffff_ffff_ffff)).to_be_bytes());
    identification.extend(b"\x02\x01\x00\x11Msft    kmcl-0001");
    let mut limits = vec![0, 0xb0, 0, 60, 1, 0, 0, 8, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0];
    limits.extend([0, 0x20, 0, 0, 0, 0, 0, 64, 0, 0, 0, 8, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
    limits.resize(64, 0);
    let mut characteristics = vec![0, 0xb1, 0, 60, 0, 1];
    characteristics.resize(64, 0);
    let mut capacity16 = vec![0, 0, 0, 0, 0, 0, 0x0f, 0xff, 0, 0, 2, 0, 0, 3, 0xc0];
    capacity16.resize(32, 0);
    let mut caching = vec![8, 18, 4];
    caching.resize(20, 0);
    let control = [10, 10, 0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0];
    let descriptor = [0, 0, 0x10, 0, 0, 0, 2, 0];
    let join = |parts: &[&[u8]]| parts.concat();
    let rows: Vec<(&str, &[u8], Vec<u8>)> = vec![
        (
            "INQUIRY",
            &[0x12, 0, 0, 0, 255, 0],
            b"\x00\x00\x06\x02\x1f\x00\x00\x02Msft    Virtual Disk    1.0 ".to_vec(),
        ),
        ("VPD 00", &[0x12, 1, 0, 0, 255, 0], vec![0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]),
        ("VPD 80", &[0x12, 1, 0x80, 0, 255, 0], b"\x00\x80\x00\x09kmcl-0001".to_vec()),
        ("VPD 83", &[0x12, 1, 0x83, 0, 255, 0], identification),
        ("VPD B0", &[0x12, 1, 0xb0, 0, 255, 0], limits),
        ("VPD B1", &[0x12, 1, 0xb1, 0, 255, 0], characteristics),
        ("VPD B2", &[0x12, 1, 0xb2, 0, 255, 0], vec![0, 0xb2, 0, 4, 0, 0xe4, 2, 0]),
        (
            "REQUEST SENSE",
            &[3, 0, 0, 0, 252, 0],
            vec![0x70, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        ("REQUEST SENSE, descriptors", &[3, 1, 0, 0, 252, 0], vec![0x72, 0, 0, 0, 0, 0, 0, 0]),
        (
            "READ CAPACITY(10)",
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            vec![0, 0, 0x0f, 0xff, 0, 0, 2, 0],
        ),
        (
            "READ CAPACITY(16)",
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0],
            capacity16,
        ),
        (
            "REPORT LUNS",
            &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            vec![0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        ("REPORT LUNS, well known", &[0xa0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0], vec![0; 8]),
        ("MODE SENSE(6) 8", &[0x1a, 8, 8, 0, 255, 0], join(&[&[23, 0, 0x10, 0], &caching])),
        (
            "MODE SENSE(6) 8, block descriptor",
            &[0x1a, 0, 8, 0, 255, 0],
            join(&[&[31, 0, 0x10, 8], &descriptor, &caching]),
        ),
        (
            "MODE SENSE(6) 8, changeable",
            &[0x1a, 8, 0x48, 0, 255, 0],
            join(&[&[23, 0, 0x10, 0], &[8, 18], &[0; 18]]),
        ),
        (
            "MODE SENSE(6) A, default",
            &[0x1a, 8, 0x8a, 0, 255, 0],
            join(&[&[15, 0, 0x10, 0], &control]),
        ),
        (
            "MODE SENSE(6) 3F",
            &[0x1a, 8, 0x3f, 0xff, 255, 0],
            join(&[&[35, 0, 0x10, 0], &caching, &control]),
        ),
        (
            "MODE SENSE(10) 3F, long",
            &[0x5a, 0x10, 0x3f, 0, 0, 0, 0, 1, 0, 0],
            join(&[
                &[0, 54, 0, 0x10, 1, 0, 0, 16],
                &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 2, 0],
                &caching,
                &control,
            ]),
        ),
        (
            "MODE SENSE(10) 8",
            &[0x5a, 8, 8, 0, 0, 0, 0, 1, 0, 0],
            join(&[&[0, 26, 0, 0x10, 0, 0, 0, 0], &caching]),
        ),
    ];
    for (name, cdb, expected) in rows {
        let run = read(cdb, 4096);
        assert_eq!(run.moved(), expected, "{name}");
        // As much as the guest has room for, and not a byte more.
        for room in [0, 1, expected.len() - 1, expected.len(), expected.len() + 1] {
            let run = read(cdb, room);
            let fitting = room.min(expected.len());
            assert_eq!(run.moved(), &expected[..fitting], "{name} room={room}");
        }
        // The allocation length of the command counts as well: its low byte, in all of these.
        let at = match cdb[0] {
            0x25 => continue,
            0x9e => 13,
            0xa0 => 9,
            0x5a => 8,
            _ => 4,
        };
        let mut short = cdb.to_vec();
        short[at - 1] &= if matches!(cdb[0], 0xa0 | 0x5a) { 0 } else { 0xff };
        short[at] = 5;
        assert_eq!(read(&short, 4096).moved(), &expected[..5], "{name} allocation");
        // Data that is to go to the guest cannot come from it.
        let wrong = run_on(&disk(512, false), cdb, DataDirection::Out, vec![0; 64]);
        assert_eq!(wrong.answer(), Answer::invalid_request(), "{name}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_offers_no_unmap() {
    let disk = disk(512, true);
    let run = |cdb: &[u8]| run_on(&disk, cdb, DataDirection::In, vec![0; 255]);
    assert_eq!(run(&[0x1a, 8, 8, 0, 4, 0]).moved(), [23, 0, 0x90, 0]);
    assert_eq!(run(&[0x12, 1, 0xb2, 0, 8, 0]).moved(), [0, 0xb2, 0, 4, 0, 0, 0, 0]);
    assert_eq!(run(&[0x12, 1, 0xb0, 0, 64, 0]).moved()[20..44], [0; 24]);
    assert_eq!(run(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]).moved()[14], 0);
}

#[test]
fn a_disk_of_4096_byte_sectors_counts_in_them() {
    let disk = disk(4096, false);
    let run = |cdb: &[u8]| run_on(&disk, cdb, DataDirection::In, vec![0; 8192]);
    assert_eq!(run(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).moved(), [0, 0, 0x0f, 0xff, 0, 0, 16, 0]);
    let capacity = run(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]);
    assert_eq!(capacity.moved()[8..15], [0, 0, 16, 0, 0, 0, 0xc0]);
    let limits = run(&[0x12, 1, 0xb0, 0, 64, 0]);
    assert_eq!(limits.moved()[6..12], [0, 1, 0, 0, 0, 64]);
    let Plan::Io(io) = run(&[0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0]).plan else { panic!() };
    assert_eq!((io.offset, io.bytes, io.data_bytes), (3 * 4096, 8192, 8192));
}

fn io(operation: IoOperation, sector: u64, sectors: u64, data_bytes: u32) -> IoPlan {
    IoPlan { operation, offset: sector * 512, bytes: sectors * 512, data_bytes }
}

#[test]
#[expect(clippy::type_complexity, reason = "a table")]
fn commands_on_blocks_become_these_requests() {
    use DataDirection::{In, None, Out};
    use IoOperation::*;
    let read6: &[u8] = &[8, 0, 0x0f, 0xff, 1, 0];
    let zeros = vec![0; 512];
    let ones = vec![1; 512];
    #[rustfmt::skip]
    let rows: Vec<(&str, &[u8], DataDirection, Vec<u8>, Option<IoPlan>)> = vec![
        ("READ(6)", read6, In, vec![0; 512], Some(io(Read, 0xfff, 1, 512))),
        ("READ(6) 256", &[8, 0, 0, 0, 0, 0], In, vec![0; 256 * 512], Some(io(Read, 0, 256, 256 * 512))),
        ("READ(10)", &[0x28, 0, 0, 0, 1, 2, 0, 0, 3, 0], In, vec![0; 1536], Some(io(Read, 0x102, 3, 1536))),
        ("READ(10), more room", &[0x28, 8, 0, 0, 1, 2, 0, 0, 3, 0], In, vec![0; 9999], Some(io(Read, 0x102, 3, 1536))),
        ("READ(12)", &[0xa8, 0, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0], In, vec![0; 512], Some(io(Read, 0x102, 1, 512))),
        ("READ(16)", &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0], In, vec![0; 512], Some(io(Read, 7, 1, 512))),
        ("READ(10) 0", &[0x28, 0, 0, 0, 1, 2, 0, 0, 0, 0], None, vec![], Option::None),
        ("WRITE(6)", &[0x0a, 0, 0, 2, 1, 0], Out, ones.clone(), Some(io(Write { fua: false }, 2, 1, 512))),
        ("WRITE(10) FUA", &[0x2a, 8, 0, 0, 0, 2, 0, 0, 1, 0], Out, ones.clone(), Some(io(Write { fua: true }, 2, 1, 512))),
        ("WRITE(12)", &[0xaa, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0], Out, ones.clone(), Some(io(Write { fua: false }, 2, 1, 512))),
        ("WRITE(16)", &[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0], Out, ones.clone(), Some(io(Write { fua: false }, 7, 1, 512))),
        ("WRITE(10) 0", &[0x2a, 0, 0, 0, 0, 2, 0, 0, 0, 0], None, vec![], Option::None),
        ("VERIFY(10)", &[0x2f, 0, 0, 0, 0, 2, 0, 0, 9, 0], None, vec![], Some(io(Verify, 2, 9, 0))),
        ("VERIFY(10), data", &[0x2f, 2, 0, 0, 0, 2, 0, 0, 2, 0], Out, vec![1; 1024], Some(io(Compare, 2, 2, 1024))),
        ("VERIFY(16), one block", &[0x8f, 6, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0], Out, ones.clone(), Some(io(Compare, 2, 9, 512))),
        ("VERIFY(12)", &[0xaf, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0], None, vec![], Some(io(Verify, 0, 0x1000, 0))),
        ("SYNCHRONIZE CACHE(10)", &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], None, vec![], Some(io(Flush, 0, 0, 0))),
        ("SYNCHRONIZE CACHE(16)", &[0x91, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0], None, vec![], Some(io(Flush, 0, 0, 0))),
        ("WRITE SAME(10)", &[0x41, 0, 0, 0, 0, 7, 0, 0, 3, 0], Out, ones.clone(), Some(io(WriteSame, 7, 3, 512))),
        ("WRITE SAME(10) UNMAP, not zeros", &[0x41, 8, 0, 0, 0, 7, 0, 0, 3, 0], Out, ones, Some(io(WriteSame, 7, 3, 512))),
        ("WRITE SAME(10) zeros", &[0x41, 0, 0, 0, 0, 7, 0, 0, 3, 0], Out, zeros.clone(), Some(io(WriteZeroes, 7, 3, 0))),
        ("WRITE SAME(16) UNMAP", &[0x93, 8, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0], Out, zeros, Some(io(Discard, 7, 3, 0))),
        ("WRITE SAME(16) NDOB", &[0x93, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0], None, vec![], Some(io(WriteZeroes, 7, 3, 0))),
        ("WRITE SAME(16) NDOB UNMAP", &[0x93, 9, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0], None, vec![], Some(io(Discard, 7, 3, 0))),
        ("TEST UNIT READY", &[0; 6], None, vec![], Option::None),
        ("START", &[0x1b, 0, 0, 0, 1, 0], None, vec![], Option::None),
        ("STOP", &[0x1b, 0, 0, 0, 0, 0], None, vec![], Some(io(Flush, 0, 0, 0))),
        ("UNMAP nothing", &[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], None, vec![], Option::None),
    ];
    for (name, cdb, direction, data, expected) in rows {
        let run = run_on(&disk(512, false), cdb, direction, data);
        match (run.plan, expected) {
            (Plan::Io(got), Some(expected)) => assert_eq!(got, expected, "{name}"),
            (Plan::Answer(answer), Option::None) => assert_eq!(answer, Answer::good(0), "{name}"),
            (plan, expected) => panic!("{name}: {plan:?}, expected {expected:?}"),
        }
    }
}

#[test]
#[expect(clippy::type_complexity, reason = "a table")]
fn commands_are_refused_with_this_sense_data() {
    use DataDirection::{In, None, Out};
    use SenseKey::{DataProtect, IllegalRequest};
    let cdb_field = |byte, bit| Some(FieldPointer::cdb(byte).with_bit(bit));
    let length_field = |byte| Some(FieldPointer::cdb(byte));
    let list = |byte| Some(FieldPointer::parameter(byte));
    let ones = || vec![1u8; 512];
    // An UNMAP list: data length, descriptor length, descriptors.
    let unmap = |data: u16, descriptors: u16, runs: &[(u64, u32)]| {
        let mut bytes = [data.to_be_bytes(), descriptors.to_be_bytes(), [0; 2], [0; 2]].concat();
        for (lba, blocks) in runs {
            bytes.extend(lba.to_be_bytes());
            bytes.extend(blocks.to_be_bytes());
            bytes.extend([0; 4]);
        }
        bytes
    };
    let many = vec![(0, 1); 65];
    let rw = || disk(512, false);
    let ro = || disk(512, true);
    #[rustfmt::skip]
    let rows: Vec<(&str, Arc<Disk>, &[u8], DataDirection, Vec<u8>, (SenseKey, u8, u8, Option<FieldPointer>))> = vec![
        ("unknown command", rw(), &[0xff; 16], None, vec![], (IllegalRequest, 0x20, 0, Option::None)),
        ("PERSISTENT RESERVE IN", rw(), &[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0], In, vec![0; 8], (IllegalRequest, 0x20, 0, Option::None)),
        ("READ(10) cut off", rw(), &[0x28, 0, 0, 0, 0, 0, 0, 0, 1], In, ones(), (IllegalRequest, 0x24, 0, Option::None)),
        ("READ(10) RDPROTECT", rw(), &[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0], In, ones(), (IllegalRequest, 0x24, 0, cdb_field(1, 5))),
        ("READ(10) beyond the end", rw(), &[0x28, 0, 0, 0, 0x10, 0, 0, 0, 1, 0], In, ones(), (IllegalRequest, 0x21, 0, Option::None)),
        ("READ(10) across the end", rw(), &[0x28, 0, 0, 0, 0x0f, 0xff, 0, 0, 2, 0], In, vec![0; 1024], (IllegalRequest, 0x21, 0, Option::None)),
        ("READ(16) past 64 bits", rw(), &[0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0], In, ones(), (IllegalRequest, 0x21, 0, Option::None)),
        ("READ(10) too long", rw(), &[0x28, 0, 0, 0, 0, 0, 0, 2, 1, 0], In, vec![0; 0x41000], (IllegalRequest, 0x24, 0, length_field(7))),
        ("READ(12) too long", rw(), &[0xa8, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0], In, vec![0; 0x41000], (IllegalRequest, 0x24, 0, length_field(6))),
        ("WRITE(16) too long", rw(), &[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0], Out, vec![0; 0x41000], (IllegalRequest, 0x24, 0, length_field(10))),
        ("WRITE(10) beyond the end", rw(), &[0x2a, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0], Out, ones(), (IllegalRequest, 0x21, 0, Option::None)),
        ("WRITE(10), read-only", ro(), &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], Out, ones(), (DataProtect, 0x27, 0, Option::None)),
        ("VERIFY beyond the end", rw(), &[0x2f, 0, 0, 0, 0x10, 0, 0, 0, 1, 0], None, vec![], (IllegalRequest, 0x21, 0, Option::None)),
        ("VERIFY, too much to compare", rw(), &[0x2f, 2, 0, 0, 0, 0, 0, 2, 1, 0], Out, vec![0; 0x41000], (IllegalRequest, 0x24, 0, length_field(7))),
        ("VERIFY BYTCHK 10b", rw(), &[0x2f, 4, 0, 0, 0, 0, 0, 0, 1, 0], Out, ones(), (IllegalRequest, 0x24, 0, cdb_field(1, 2))),
        ("SYNCHRONIZE CACHE beyond the end", rw(), &[0x35, 0, 0, 0, 0x10, 0, 0, 0, 1, 0], None, vec![], (IllegalRequest, 0x21, 0, Option::None)),
        ("WRITE SAME 0", rw(), &[0x41, 0, 0, 0, 0, 0, 0, 0, 0, 0], Out, ones(), (IllegalRequest, 0x24, 0, length_field(7))),
        ("WRITE SAME, read-only", ro(), &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], Out, ones(), (DataProtect, 0x27, 0, Option::None)),
        ("WRITE SAME beyond the end", rw(), &[0x93, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 1, 0, 0], Out, ones(), (IllegalRequest, 0x21, 0, Option::None)),
        ("WRITE SAME ANCHOR", rw(), &[0x41, 0x10, 0, 0, 0, 0, 0, 0, 1, 0], Out, ones(), (IllegalRequest, 0x24, 0, cdb_field(1, 4))),
        ("UNMAP, list too short", rw(), &[0x42, 0, 0, 0, 0, 0, 0, 0, 7, 0], Out, vec![0; 7], (IllegalRequest, 0x1a, 0, Option::None)),
        ("UNMAP, descriptors beyond the list", rw(), &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Out, unmap(38, 32, &[(0, 1)]), (IllegalRequest, 0x26, 0, list(2))),
        ("UNMAP, too many descriptors", rw(), &[0x42, 0, 0, 0, 0, 0, 0, 4, 24, 0], Out, unmap(1046, 1040, &many), (IllegalRequest, 0x26, 0, list(2))),
        ("UNMAP beyond the end", rw(), &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Out, unmap(22, 16, &[(0x1000, 1)]), (IllegalRequest, 0x21, 0, Option::None)),
        ("UNMAP past 64 bits", rw(), &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Out, unmap(22, 16, &[(u64::MAX, u32::MAX)]), (IllegalRequest, 0x21, 0, Option::None)),
        ("UNMAP ANCHOR", rw(), &[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0], Out, unmap(22, 16, &[(0, 1)]), (IllegalRequest, 0x24, 0, cdb_field(1, 0))),
        ("UNMAP, read-only", ro(), &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Out, unmap(22, 16, &[(0, 1)]), (DataProtect, 0x27, 0, Option::None)),
        ("INQUIRY, unknown page", rw(), &[0x12, 1, 0x84, 0, 255, 0], In, vec![0; 255], (IllegalRequest, 0x24, 0, cdb_field(2, 7))),
        ("INQUIRY, page without EVPD", rw(), &[0x12, 0, 0x80, 0, 255, 0], In, vec![0; 255], (IllegalRequest, 0x24, 0, cdb_field(2, 7))),
        ("MODE SENSE, unknown page", rw(), &[0x1a, 0, 0x1c, 0, 255, 0], In, vec![0; 255], (IllegalRequest, 0x24, 0, cdb_field(2, 5))),
        ("MODE SENSE, unknown subpage", rw(), &[0x5a, 0, 8, 1, 0, 0, 0, 0, 255, 0], In, vec![0; 255], (IllegalRequest, 0x24, 0, cdb_field(3, 7))),
        ("MODE SENSE, saved", rw(), &[0x1a, 0, 0xc8, 0, 255, 0], In, vec![0; 255], (IllegalRequest, 0x39, 0, Option::None)),
        ("MODE SELECT", rw(), &[0x15, 0x10, 0, 0, 24, 0], Out, vec![0; 24], (IllegalRequest, 0x20, 0, Option::None)),
        ("READ CAPACITY(10) PMI", rw(), &[0x25, 0, 0, 0, 0, 0, 0, 0, 1, 0], In, vec![0; 8], (IllegalRequest, 0x24, 0, cdb_field(8, 0))),
        ("GET LBA STATUS", rw(), &[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], In, vec![0; 32], (IllegalRequest, 0x24, 0, cdb_field(1, 4))),
        ("REPORT LUNS, unknown selection", rw(), &[0xa0, 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0], In, vec![0; 256], (IllegalRequest, 0x24, 0, cdb_field(2, 7))),
        ("eject", rw(), &[0x1b, 0, 0, 0, 2, 0], None, vec![], (IllegalRequest, 0x24, 0, cdb_field(4, 1))),
        ("power condition", rw(), &[0x1b, 0, 0, 0, 0x20, 0], None, vec![], (IllegalRequest, 0x24, 0, cdb_field(4, 7))),
        ("TEST UNIT READY NACA", rw(), &[0, 0, 0, 0, 0, 4], None, vec![], (IllegalRequest, 0x24, 0, cdb_field(5, 2))),
    ];
    for (name, disk, cdb, direction, data, expected) in rows {
        let run = run_on(&disk, cdb, direction, data);
        assert_eq!(sense_of(run.answer()), expected, "{name}");
    }
}

#[test]
fn data_that_is_missing_or_goes_the_wrong_way_is_an_invalid_request() {
    use DataDirection::{In, None, Out};
    let unmap: &[u8] = &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    for (name, cdb, direction, bytes) in [
        ("READ without data", &[0x28u8, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], None, 0),
        ("READ from the guest", &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], Out, 512),
        ("READ, no direction", &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], None, 512),
        ("READ, buffer short", &[0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0], In, 1023),
        ("WRITE to the guest", &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], In, 512),
        ("WRITE, buffer short", &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], Out, 511),
        ("VERIFY, buffer short", &[0x2f, 2, 0, 0, 0, 0, 0, 0, 2, 0], Out, 1023),
        ("VERIFY one block, none", &[0x2f, 6, 0, 0, 0, 0, 0, 0, 2, 0], Out, 511),
        ("WRITE SAME, no block", &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], Out, 511),
        ("WRITE SAME to the guest", &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], In, 512),
        ("UNMAP, list missing", unmap, Out, 23),
        ("UNMAP to the guest", unmap, In, 24),
    ] {
        let run = run_on(&disk(512, false), cdb, direction, vec![0; bytes]);
        assert_eq!(run.answer(), Answer::invalid_request(), "{name}");
    }
}

#[test]
fn unmap_leaves_the_ranges_to_discard() {
    let mut list = vec![0, 70, 0, 64, 0, 0, 0, 0];
    for (lba, blocks) in [(0u64, 8u32), (100, 0), (0xfff, 1), (8, 8)] {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    let run =
        run_on(&disk(512, false), &[0x42, 0, 0, 0, 0, 0, 0, 0, 72, 0], DataDirection::Out, list);
    assert!(matches!(run.plan, Plan::Discard));
    let expected = [(0, 8), (0xfff, 1), (8, 8)]
        .map(|(sector, sectors)| ByteRange { offset: sector * 512, bytes: sectors * 512 });
    assert_eq!(run.ranges, expected);
}

#[test]
fn unmap_and_write_same_are_limited_as_the_block_limits_say() {
    // A disk larger than both limits; nothing of it is written.
    struct Vast;
    impl crate::block::Backend for Vast {
        fn bytes(&self) -> u64 {
            1 << 42
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn submit(&self, _: &mut Vec<crate::block::IoRequest>, _: &mut Vec<crate::block::IoDone>) {}
    }
    let disk = Disk::new(Arc::new(Vast), &DiskOptions::new("vast")).unwrap();
    let limits = run_on(&disk, &[0x12, 1, 0xb0, 0, 64, 0], DataDirection::In, vec![0; 64]);
    let at = |i: usize| u32::from_be_bytes(limits.moved()[i..i + 4].try_into().unwrap());
    let (unmap_max, same_max) = (at(20), at(40));
    for (blocks, ok) in [(unmap_max, true), (unmap_max + 1, false)] {
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
        let run = run_on(&disk, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], DataDirection::Out, list);
        match run.plan {
            Plan::Discard => assert!(ok, "{blocks}"),
            _ => assert_eq!(
                (sense_of(run.answer()), ok),
                ((SenseKey::IllegalRequest, 0x26, 0, Some(FieldPointer::parameter(16))), false)
            ),
        }
    }
    for (blocks, ok) in [(same_max, true), (same_max + 1, false)] {
        let mut cdb = [0x93, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        let run = run_on(&disk, &cdb, DataDirection::None, vec![]);
        assert_eq!(matches!(run.plan, Plan::Io(_)), ok, "{blocks}");
    }
    // The capacity is beyond READ CAPACITY(10).
    let capacity = run_on(&disk, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], DataDirection::In, vec![0; 8]);
    assert_eq!(capacity.moved(), [255, 255, 255, 255, 0, 0, 2, 0]);
}

#[test]
fn failures_of_the_back_end_have_this_sense_data() {
    use rustix::io::Errno;
    for (error, sense) in [
        (IoError::EndOfMedium { at: 5 * 512 }, (SenseKey::MediumError, 0x11, 0, Some(5))),
        (IoError::Read { at: 512, errno: Errno::IO }, (SenseKey::MediumError, 0x11, 0, Some(1))),
        (IoError::Write { at: 1024, errno: Errno::IO }, (SenseKey::MediumError, 0x0c, 0, Some(2))),
        (IoError::NoSpace, (SenseKey::DataProtect, 0x27, 7, None)),
        (IoError::WriteProtected, (SenseKey::DataProtect, 0x27, 0, None)),
        (IoError::Miscompare { at: 513 }, (SenseKey::Miscompare, 0x1d, 0, Some(1))),
        (IoError::Memory, (SenseKey::AbortedCommand, 0x4b, 0, None)),
        (IoError::Malformed, (SenseKey::HardwareError, 0x44, 0, None)),
    ] {
        let answer = Answer::failed(error, 512);
        let got = answer.sense.unwrap();
        assert_eq!((got.key, got.code.asc, got.code.ascq, got.information), sense, "{error}");
        assert_eq!((answer.srb, answer.moved), (SrbStatus::ERROR, 0));
    }
    let busy = Answer::failed(IoError::Busy, 512);
    assert_eq!((busy.srb, busy.scsi, busy.sense), (SrbStatus::BUSY, ScsiStatus::BUSY, None));
}

#[test]
fn a_lun_that_is_not_there_answers_as_guests_expect() {
    let table = table(disk(512, false));
    let run =
        |address, cdb: &[u8]| run_at(&table, address, cdb, DataDirection::In, vec![0xee; 255]);
    let inquiry: &[u8] = &[0x12, 0, 0, 0, 36, 0];
    for (path, target, lun) in [(0, 0, 1), (0, 1, 0), (7, 0, 0), (255, 255, 255)] {
        let absent = ScsiAddress::new(path, target, lun);
        let data = run(absent, inquiry);
        assert_eq!(data.moved()[0], 0x7f, "{absent}");
        let named = data.moved()[8..16] == *b"Msft    ";
        assert_eq!(named, lun == 0, "{absent}");
        for cdb in [
            &[0u8; 6][..],
            &[0x12, 1, 0x80, 0, 255, 0],
            &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            &[3, 0, 0, 0, 18, 0],
            &[0xff; 16],
        ] {
            let answer = run(absent, cdb).answer();
            assert_eq!(answer, Answer::no_lun(), "{absent} {cdb:02x?}");
            assert_eq!((answer.srb.0, answer.moved), (0x20, 0));
        }
    }
    // Any LUN of a target lists the target's LUNs, there or not.
    let list: &[u8] = &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    let luns = |address| parse_lun_list(run(address, list).moved()).collect::<Vec<_>>();
    assert_eq!(luns(ScsiAddress::new(0, 0, 9)), [0]);
    assert_eq!(luns(ScsiAddress::new(0, 1, 0)), [0u8; 0]);
}

#[test]
fn the_table_of_luns_takes_what_guests_can_reach() {
    let one = disk(512, false);
    let at = ScsiAddress::new;
    let table = LunTable::default();
    for (address, ok) in [
        (at(0, 0, 0), true),
        (at(7, 1, 254), true),
        (at(8, 0, 0), false),
        (at(0, 2, 0), false),
        (at(0, 0, 255), false),
    ] {
        let attached = table.attach(Lun::new(address, Arc::clone(&one), 1)).map(|_| ());
        assert_eq!(attached.is_ok(), ok, "{address}");
        assert_eq!(attached.err(), (!ok).then_some(LunError::OutOfReach { address }));
    }
    let full = (0..255)
        .try_fold(table, |table, lun| table.attach(Lun::new(at(3, 1, lun), Arc::clone(&one), 1)));
    let full = full.unwrap();
    let taken = full.attach(Lun::new(at(3, 1, 7), Arc::clone(&one), 1)).map(|_| ()).err();
    assert_eq!(taken, Some(LunError::Taken { address: at(3, 1, 7) }));
    let list: &[u8] = &[0xa0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0];
    let run = run_at(&full, at(3, 1, 0), list, DataDirection::In, vec![0; 4096]);
    assert_eq!(parse_lun_list(run.moved()).collect::<Vec<_>>(), (0..255).collect::<Vec<_>>());
    let (less, _) = full.detach(at(3, 1, 7)).unwrap();
    assert!(less.get(at(3, 1, 7)).is_none() && less.iter().count() == 254);
    assert_eq!(
        less.detach(at(3, 1, 7)).map(|_| ()).err(),
        Some(LunError::Empty { address: at(3, 1, 7) })
    );
}

#[test]
fn neighbours_of_a_lun_that_comes_or_goes_say_so_once() {
    let one = disk(512, false);
    let at = ScsiAddress::new;
    let ready = |table: &LunTable, address| {
        let run = run_at(table, address, &[0; 6], DataDirection::None, vec![]);
        let answer = run.answer();
        match answer.sense {
            None => assert_eq!(answer, Answer::good(0)),
            Some(_) => assert_eq!(sense_of(answer), (SenseKey::UnitAttention, 0x3f, 0x0e, None)),
        }
        answer.sense.is_none()
    };
    let table = table(Arc::clone(&one)).attach(Lun::new(at(0, 1, 0), Arc::clone(&one), 1)).unwrap();
    assert!(ready(&table, at(0, 0, 0)) && ready(&table, at(0, 1, 0)));
    let table = table.attach(Lun::new(at(0, 0, 1), Arc::clone(&one), 1)).unwrap();
    let inquiry =
        run_at(&table, at(0, 0, 0), &[0x12, 0, 0, 0, 36, 0], DataDirection::In, vec![0; 36]);
    assert_eq!(inquiry.moved().len(), 36);
    assert!(!ready(&table, at(0, 0, 0)), "an inquiry is answered and leaves the attention");
    assert!(ready(&table, at(0, 0, 0)), "once");
    assert!(ready(&table, at(0, 0, 1)), "the new LUN has nothing to say");
    assert!(ready(&table, at(0, 1, 0)), "another target is not concerned");

    let (table, _) = table.detach(at(0, 0, 1)).unwrap();
    let sense = run_at(&table, at(0, 0, 0), &[3, 0, 0, 0, 18, 0], DataDirection::In, vec![0; 18]);
    assert_eq!((sense.moved()[2], sense.moved()[12], sense.moved()[13]), (6, 0x3f, 0x0e));
    assert!(ready(&table, at(0, 0, 0)), "REQUEST SENSE has told it");

    let table = table.attach(Lun::new(at(0, 0, 2), Arc::clone(&one), 1)).unwrap();
    let list: &[u8] = &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    run_at(&table, at(0, 0, 2), list, DataDirection::In, vec![0; 64]);
    assert!(ready(&table, at(0, 0, 0)), "REPORT LUNS has told it");
}

proptest! {
    /// Whatever a guest asks for, what the back end is asked to do stays inside the disk and inside
    /// the data that there is.
    #[test]
    fn any_command_stays_inside_the_disk_and_the_data(
        cdb in proptest::collection::vec(any::<u8>(), 0..17),
        opcode in proptest::sample::select(vec![
            0x08u8, 0x0a, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42, 0x88, 0x8a, 0x8f, 0x91, 0x93, 0xa8, 0xaa,
            0xaf, 0x12, 0x1a, 0x5a, 0x9e, 0xa0, 0x03,
        ]),
        direction in proptest::sample::select(
            vec![DataDirection::In, DataDirection::Out, DataDirection::None]),
        data in proptest::collection::vec(any::<u8>(), 0..3000),
        small in any::<bool>(),
    ) {
        let mut cdb = cdb;
        if let Some(first) = cdb.first_mut() {
            *first = opcode;
        }
        if small {
            // Most random addresses are beyond any disk.
            for byte in cdb.iter_mut().take(5).skip(1) {
                *byte &= 3;
            }
        }
        let before = data.clone();
        let available = u32::try_from(data.len()).unwrap();
        let disk = disk(512, false);
        let size = disk.backend().bytes();
        let run = run_on(&disk, &cdb, direction, data);
        match run.plan {
            Plan::Answer(answer) => {
                prop_assert!(answer.moved <= available);
                let untouched = answer.moved as usize;
                prop_assert!(run.data[untouched..] == before[untouched..]);
                prop_assert!(answer.sense.is_some() == (answer.scsi == ScsiStatus::CHECK_CONDITION));
            }
            Plan::Io(io) => {
                prop_assert!(io.offset + io.bytes <= size && io.data_bytes <= available);
                prop_assert!(run.data == before);
                if matches!(io.operation, IoOperation::Read | IoOperation::Write { .. }) {
                    prop_assert_eq!(u64::from(io.data_bytes), io.bytes);
                }
            }
            Plan::Discard => {
                prop_assert!(!run.ranges.is_empty());
                prop_assert!(run.ranges.iter().all(|r| r.bytes > 0 && r.offset + r.bytes <= size));
            }
        }
    }

    /// Every command of the typed form is understood.
    #[test]
    fn typed_reads_come_out_as_they_went_in(lba in 0u32..SECTORS, blocks in 1u32..64) {
        let blocks = blocks.min(SECTORS - lba);
        let cdb = Command::read(u64::from(lba), blocks).encode().unwrap();
        let run = read(cdb.as_bytes(), 64 * 512);
        let Plan::Io(got) = run.plan else { panic!("{run:?}") };
        prop_assert_eq!(got, io(IoOperation::Read, u64::from(lba), u64::from(blocks), blocks * 512));
    }
}
