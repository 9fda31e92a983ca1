//! Machines and their memory. No state of a real processor is here: it is another one each time, and on
//! each host. Records are made by hand, in the structures of KVM's interface on x86-64, with values as a
//! guest has them that has just begun to run.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kmcl_vmm::memory::{Compression, Form, Load, MemoryIndex, PART_BYTES, Ram, save_memory};
use kmcl_vmm::{Error, Machine, RestoreConfig};
use saved_state::machine::{
    CRASH_BYTES, KINDS, MachineRecord, PartitionRecord, ProcessorRecord, SynicMode, SynicRecord,
};
use saved_state::memory::{
    self, MemoryFileRecord, MemoryForm, MemoryPartsRecord, MemoryRegionRecord,
};
use saved_state::text::Producer;
use saved_state::{FormatVersion, Save as _, StreamKind, StreamReader};

use crate::hand::Hand;

// ---- Processors -----------------------------------------------------------------------------------------

/// Bytes of KVM's structures. Source: arch/x86/include/uapi/asm/kvm.h, by the fields.
const REGISTERS: usize = 18 * 8;
const SPECIAL_REGISTERS: usize = 8 * 24 + 2 * 16 + 5 * 8 + 2 * 8 + 32;
const DEBUG_REGISTERS: usize = 16 * 8;
const XCRS: usize = 8 + 16 * 16 + 16 * 8;
const LOCAL_APIC: usize = 1024;
const EVENTS: usize = 64;
const PIC: usize = 16;
const IO_APIC: usize = 24 + 24 * 8;

/// `bytes` zeros with some numbers in them, each at its offset.
fn structure(bytes: usize, fields: &[(usize, u64, usize)]) -> Vec<u8> {
    let mut all = vec![0; bytes];
    for &(at, value, len) in fields {
        all[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }
    all
}

/// The registers of a processor in 64-bit mode: flat segments, paging, a stack.
fn special_registers() -> Vec<u8> {
    let mut fields = Vec::new();
    // TR, CS, DS, ES, SS: limit, selector, type; then present, DPL, D/B, S, L, G, AVL, unusable.
    for (number, selector, kind, flags) in [
        (6, 0, 0xb, 1),
        (0, 0x10, 0xb, 0x0000_0101_0100_0001_u64),
        (1, 0x18, 0x3, 0x0000_0100_0101_0001),
        (2, 0x18, 0x3, 0x0000_0100_0101_0001),
        (5, 0x18, 0x3, 0x0000_0100_0101_0001),
    ] {
        let at = number * 24;
        fields.extend([(at + 8, 0xffff_ffff, 4), (at + 12, selector, 2), (at + 14, kind, 1)]);
        fields.push((at + 15, flags, 8));
    }
    let tables = 8 * 24;
    fields.extend([(tables, 0x5000, 8), (tables + 8, 0xfff, 2), (tables + 16, 0x4000, 8)]);
    let control = tables + 2 * 16;
    // CR0 to CR4, CR8, EFER, the APIC's base.
    fields.extend([(control, 0x8005_0033, 8), (control + 16, 0x9000, 8), (control + 24, 0x6f0, 8)]);
    fields.extend([(control + 40, 0xd01, 8), (control + 48, 0xfee0_0900, 8)]);
    structure(SPECIAL_REGISTERS, &fields)
}

/// Processor `index`: the first one runs, the others wait to be started.
fn processor(index: u32) -> ProcessorRecord {
    const UNINITIALIZED: u32 = 1;
    let leaf = |words: [u32; 7]| words.into_iter().flat_map(u32::to_le_bytes);
    let cpuid = [
        [0, 0, 0, 0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        [1, 0, 0, 0x0005_0654, index << 24 | 0x800, 0x8020_2001, 0x078b_fbff],
        [0x4000_0000, 0, 0, 0x4000_000a, 0x7263_694d, 0x666f_736f, 0x7648_2074],
        [0x4000_0001, 0, 0, 0x3123_7648, 0, 0, 0],
        [0x8000_0001, 0, 0, 0, 0, 1, 0x2010_0800],
    ];
    let msr = |number: u32, value: u64| {
        number.to_le_bytes().into_iter().chain(value.to_le_bytes()).collect::<Vec<_>>()
    };
    ProcessorRecord {
        index,
        mp_state: if index == 0 { 0 } else { UNINITIALIZED },
        cpuid: cpuid.into_iter().flat_map(leaf).collect(),
        // RSP, RIP, RFLAGS.
        registers: structure(REGISTERS, &[(48, 0x8ff0, 8), (128, 0x10_0200, 8), (136, 2, 8)]),
        special_registers: special_registers(),
        debug_registers: structure(DEBUG_REGISTERS, &[(32, 0xffff_0ff0, 8), (40, 0x400, 8)]),
        // One register: XCR0.
        xcrs: structure(XCRS, &[(0, 1, 4), (16, 7, 8)]),
        // FCW, MXCSR, XSTATE_BV.
        xsave: structure(520, &[(0, 0x37f, 2), (24, 0x1f80, 4), (512, 3, 8)]),
        // Id, version, spurious interrupt vector; LVT entries masked.
        local_apic: structure(
            LOCAL_APIC,
            &[
                (0x20, u64::from(index) << 24, 4),
                (0x30, 0x5_0014, 4),
                (0xf0, 0x1ff, 4),
                (0x320, 0x1_0000, 4),
                (0x350, 0x1_0700, 4),
                (0x360, 0x1_0400, 4),
            ],
        ),
        events: structure(EVENTS, &[]),
        // STAR, LSTAR, PAT.
        msrs: [
            msr(0xc000_0081, 0x0023_0010 << 32),
            msr(0xc000_0082, 0xffff_ffff_8100_0000),
            msr(0x277, 0x0007_0406_0007_0406),
        ]
        .concat(),
        tsc_ahead: u64::from(index) * 12,
        tsc_deadline: 0,
    }
}

fn synic(index: u32, mode: SynicMode) -> SynicRecord {
    const MASKED: u64 = 1 << 16;
    let mut sints = [MASKED; 16];
    sints[2] = 0xf3;
    let running = index == 0;
    // The first timer periodic and direct, every 4 ms: KVM alone has them.
    let stimers = [0x1_0031, 40_000, 0, 0, 0, 0, 0, 0_u64];
    SynicRecord {
        index,
        scontrol: 1,
        siefp: if running { 0x7001 } else { 0 },
        simp: if running { 0x6001 } else { 0 },
        sints: sints.map(u64::to_le_bytes).concat(),
        vp_assist_page: 0,
        stimers: match mode {
            SynicMode::Kernel if running => stimers.map(u64::to_le_bytes).concat(),
            _ => Vec::new(),
        },
    }
}

/// A machine with so many processors, whose user has typed `typed`.
pub(crate) fn machine(processors: u32, mode: SynicMode, typed: &[u8]) -> Vec<u8> {
    let mut hand = Hand::begin(StreamKind::MACHINE, KINDS, processors);
    // 115200 baud, no interrupts, FIFOs, 8N1, empty, CTS and DSR.
    let serial = vec![1, 0, 0, 0xc1, 3, 0x60, 8, 0xb0, 0];
    hand.record(&MachineRecord { processors, serial, serial_input: typed.to_vec() });
    let crashed = mode == SynicMode::User;
    hand.record(&PartitionRecord {
        mode: mode.into(),
        tsc_khz: 2_600_000,
        tsc: 5_200_000_000,
        clock_ns: 2_000_000_000,
        reference_time: 20_000_000,
        guest_os_id: 0x8100_0601_0100_0000,
        hypercall: 0x8001,
        reference_tsc: 0xa001,
        tsc_invariant: 1,
        crash: if crashed {
            (1..=5).map(|it| it << 4).flat_map(u64::to_le_bytes).collect()
        } else {
            Vec::new()
        },
        // All masked; the vector of the first interrupt.
        pic_master: structure(PIC, &[(2, 0xff, 1), (5, 0x30, 1)]),
        pic_slave: structure(PIC, &[(2, 0xff, 1), (5, 0x38, 1)]),
        io_apic: io_apic(),
    });
    for index in 0..processors {
        hand.record(&processor(index));
    }
    for index in 0..processors {
        hand.record(&synic(index, mode));
    }
    hand.end()
}

fn io_apic() -> Vec<u8> {
    let mut fields = vec![(0, 0xfec0_0000, 8)];
    fields.extend((0..24).map(|pin| (24 + pin * 8, 1 << 16, 8)));
    structure(IO_APIC, &fields)
}

const _: () = assert!(CRASH_BYTES == 40 && SPECIAL_REGISTERS == 312 && XCRS == 392);

std::thread_local! {
    /// As little as a guest can have. Nothing is in it.
    static RAM: Ram = Ram::new(LEAST).unwrap();
}

const LEAST: u64 = 64 << 20;

/// What comes of a machine's state, its bus left out: an error.
pub(crate) fn restored(state: &[u8]) -> Error {
    let ram = RAM.with(Ram::clone);
    let config = RestoreConfig { ram, mode: None, console: Box::new(std::io::sink()) };
    match Machine::restoring(config, state, &[]) {
        Err(error) => error,
        Ok(_) => panic!("a machine without a bus"),
    }
}

/// Whether it was the state itself that was refused.
pub(crate) fn is_of_the_state(error: &Error) -> bool {
    matches!(error, Error::State(_) | Error::HyperV(hyperv_kvm::Error::State(_)))
}

/// The state is taken as one. Whether its processors can be, depends on the host: on KVM, that it is there,
/// and on the guest's frequency and features. That its bus is missing is seen last.
pub fn assert_is_a_machine(state: &[u8]) {
    let error = restored(state);
    assert!(!is_of_the_state(&error), "{error}");
}

// ---- Memory -------------------------------------------------------------------------------------------------

/// Zstandard's longest block, and how many a part has.
const BLOCK_BYTES: u64 = 128 << 10;
const BLOCKS: u64 = PART_BYTES / BLOCK_BYTES;
/// Parts that are not all zeros: each block of them is filled with one byte.
const PARTS: [u64; 3] = [0, 5, 31];

/// The byte that fills a block; half of the blocks of part 5 are zeros.
fn byte_of(part: u64, block: u64) -> u8 {
    let byte = u8::try_from(part * 7 + block + 1).unwrap();
    if part == 5 && block % 2 == 1 { 0 } else { byte }
}

/// Where each block is, and with what it is filled.
fn blocks() -> impl Iterator<Item = (u64, u8)> {
    let of_part = |part| {
        (0..BLOCKS)
            .map(move |block| (part * PART_BYTES + block * BLOCK_BYTES, byte_of(part, block)))
    };
    PARTS.into_iter().flat_map(of_part)
}

/// The index that is written with 64 MiB of memory, as it is.
pub(crate) fn plain_memory() -> Vec<u8> {
    let ram = Ram::new(LEAST).unwrap();
    for (at, byte) in blocks() {
        ram.memory().fill(at, BLOCK_BYTES, byte).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let index = save_memory(&ram, &path, Compression::None, &mut |_| {}).unwrap();
    let mut state = Vec::new();
    let producer = Producer::new("golden").unwrap();
    index.save(FormatVersion::NEWEST, producer).unwrap().write_to(&mut state).unwrap();
    state
}

/// A part as a frame that does not depend on who compresses it: a run for each block (RFC 8878, 3.1.1).
fn frame(part: u64) -> Vec<u8> {
    // Magic number; one segment, a content size of four bytes.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend(u32::try_from(PART_BYTES).unwrap().to_le_bytes());
    for block in 0..BLOCKS {
        const RUN: u64 = 1 << 1;
        let is_last = u64::from(block == BLOCKS - 1);
        let header = BLOCK_BYTES << 3 | RUN | is_last;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(byte_of(part, block));
    }
    frame
}

/// The index of the same memory in frames of [`frame`]; the checksums are of what is in it, and the same.
pub(crate) fn compressed_memory() -> Vec<u8> {
    let (plain, _) = records(&plain_memory());
    let mut lengths = vec![0; plain.checksums.len()];
    let mut file_bytes = 0;
    for part in PARTS {
        let at = usize::try_from(part).unwrap() * 4;
        let length = frame(part).len();
        lengths[at..at + 4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        file_bytes += length as u64;
    }
    let mut hand = Hand::begin(StreamKind::MEMORY, memory::KINDS, 1);
    hand.record(&MemoryFileRecord {
        memory_bytes: LEAST,
        part_bytes: PART_BYTES,
        form: MemoryForm::Zstd.into(),
        file_bytes,
        regions: 1,
    });
    hand.record(&MemoryRegionRecord { gpa: 0, offset: 0, len: LEAST });
    hand.record(&MemoryPartsRecord { first: 0, lengths, checksums: plain.checksums });
    hand.end()
}

/// The last of its records of parts, and its file's.
fn records(state: &[u8]) -> (MemoryPartsRecord, MemoryFileRecord) {
    let mut reader = StreamReader::new(StreamKind::MEMORY, memory::KINDS);
    let (mut input, mut parts, mut file) = (state, None, None);
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        match chunk.kind() {
            memory::MEMORY_PARTS => parts = Some(chunk.decode().unwrap()),
            memory::MEMORY_FILE => file = Some(chunk.decode().unwrap()),
            _ => {}
        }
    }
    (parts.unwrap(), file.unwrap())
}

/// An index, with the file that it describes, becomes the memory that was saved.
pub fn assert_memory_comes_back(state: &[u8]) {
    let index = MemoryIndex::read(state).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let file = File::create_new(&path).unwrap();
    match index.form() {
        Form::Plain => {
            file.set_len(index.file_bytes()).unwrap();
            for (at, byte) in blocks().filter(|(_, byte)| *byte != 0) {
                file.write_all_at(&vec![byte; usize::try_from(BLOCK_BYTES).unwrap()], at).unwrap();
            }
        }
        Form::Zstd => {
            let frames: Vec<u8> = PARTS.into_iter().flat_map(frame).collect();
            assert_eq!(frames.len() as u64, index.file_bytes());
            file.write_all_at(&frames, 0).unwrap();
        }
    }
    let ram = Ram::restore(&path, &index, Load::Eager, false, &mut |_| {}).unwrap();
    assert_eq!(ram.bytes(), LEAST);
    let is_all = |at: u64, byte: u8| {
        let mut found = vec![!byte; usize::try_from(BLOCK_BYTES).unwrap()];
        ram.memory().read(at, &mut found).unwrap();
        found.iter().all(|it| *it == byte)
    };
    for (at, byte) in blocks() {
        assert!(is_all(at, byte), "{BLOCK_BYTES} bytes at {at:#x}, of {byte:#x}");
    }
    assert!(is_all(PART_BYTES, 0));
}
