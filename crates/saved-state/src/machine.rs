//! Records of a machine: what a VMM has beside memory and devices (`kmcl-vmm`), and its partition and
//! processors (`hyperv-kvm`).
//!
//! The state of a processor is what KVM gives for it, in the structures of its interface on x86-64, which
//! grow at their end only: `struct kvm_regs` and so on. Everything else is in fields. What the numbers
//! say together is checked by their owner.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`MachineRecord`].
pub const MACHINE: RecordKind = RecordKind(256);
/// The kind of [`PartitionRecord`].
pub const PARTITION: RecordKind = RecordKind(257);
/// The kind of [`ProcessorRecord`].
pub const PROCESSOR: RecordKind = RecordKind(258);
/// The kind of [`SynicRecord`].
pub const SYNIC: RecordKind = RecordKind(259);

/// The kinds of a machine's stream, in the order in which they come.
pub const KINDS: Kinds =
    &[MachineRecord::KIND, PartitionRecord::KIND, ProcessorRecord::KIND, SynicRecord::KIND];

/// Most processors of a machine.
pub const MAX_PROCESSORS: u32 = 64;
/// Registers of the serial port.
pub const SERIAL_REGISTERS: usize = 9;
/// Most bytes that were typed, and that the guest has not read.
pub const MAX_SERIAL_INPUT_BYTES: usize = 64;
/// Bytes of an interrupt controller: the largest of them.
pub const CHIP_BYTES: usize = 512;
/// Crash registers, in bytes.
pub const CRASH_BYTES: usize = 5 * 8;
/// Bytes of each CPUID leaf: leaf, subleaf, flags, EAX, EBX, ECX, EDX.
pub const LEAF_BYTES: usize = 7 * 4;
/// Most CPUID leaves: as many as KVM takes.
pub const MAX_LEAVES: usize = 256;
/// Bytes of each MSR: its number, then its value.
pub const MSR_BYTES: usize = 4 + 8;
/// Most MSRs of a processor. KVM lists fewer than half as many.
pub const MAX_MSRS: usize = 1024;
/// Most bytes of the area that XSAVE writes: all that processors have today is below 12 KiB.
pub const MAX_XSAVE_BYTES: usize = 32 << 10;
/// Most bytes of any other structure of KVM's: the local APIC's registers.
pub const MAX_STRUCTURE_BYTES: usize = 1024;
/// Bytes of the sixteen synthetic interrupt sources.
pub const SINT_BYTES: usize = 16 * 8;
/// Bytes of the four synthetic timers: configuration and count of each.
pub const STIMER_BYTES: usize = 4 * 2 * 8;

/// What a VMM has of its own. Once, first.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MachineRecord {
    /// Processors: a processor's record and a SynIC's record follow for each.
    #[prost(uint32, tag = "1")]
    pub processors: u32,
    /// The serial port's registers: divisor (low, high), interrupt enable, interrupt identification, line
    /// control, line status, modem control, modem status, scratch.
    #[prost(bytes = "vec", tag = "2")]
    pub serial: Vec<u8>,
    /// What was typed, and the guest has not read.
    #[prost(bytes = "vec", tag = "3")]
    pub serial_input: Vec<u8>,
}

impl Record for MachineRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: MACHINE,
        name: "machine.machine",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "processors", Shape::Uint32).required(),
            Field::new(2, "serial", Shape::Bytes { most: SERIAL_REGISTERS }).required(),
            Field::new(3, "serial_input", Shape::Bytes { most: MAX_SERIAL_INPUT_BYTES }),
        ],
        check: record::check::<Self>,
    };
}

/// Who provides Hyper-V's interfaces.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum SynicMode {
    /// Not said; never written.
    Unspecified = 0,
    /// KVM.
    Kernel = 1,
    /// The VMM.
    User = 2,
}

/// What all processors share. Once, behind the machine's record.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PartitionRecord {
    /// Who provided Hyper-V's interfaces.
    #[prost(enumeration = "SynicMode", tag = "1")]
    pub mode: i32,
    /// Frequency of the TSC in kHz.
    #[prost(uint32, tag = "2")]
    pub tsc_khz: u32,
    /// The TSC of the first processor.
    #[prost(fixed64, tag = "3")]
    pub tsc: u64,
    /// KVM's clock, in ns, of the moment of [`Self::tsc`].
    #[prost(uint64, tag = "4")]
    pub clock_ns: u64,
    /// Hyper-V's reference time, in units of 100 ns, of the moment of [`Self::tsc`].
    #[prost(uint64, tag = "5")]
    pub reference_time: u64,
    /// MSR GUEST_OS_ID.
    #[prost(uint64, tag = "6")]
    pub guest_os_id: u64,
    /// MSR HYPERCALL.
    #[prost(uint64, tag = "7")]
    pub hypercall: u64,
    /// MSR REFERENCE_TSC.
    #[prost(uint64, tag = "8")]
    pub reference_tsc: u64,
    /// MSR TSC_INVARIANT_CONTROL.
    #[prost(uint64, tag = "9")]
    pub tsc_invariant: u64,
    /// MSRs CRASH_P0 to P4, eight bytes each, least significant first. Absent: zeros.
    #[prost(bytes = "vec", tag = "10")]
    pub crash: Vec<u8>,
    /// The first interrupt controller of a PC: `struct kvm_pic_state`.
    #[prost(bytes = "vec", tag = "11")]
    pub pic_master: Vec<u8>,
    /// The second one.
    #[prost(bytes = "vec", tag = "12")]
    pub pic_slave: Vec<u8>,
    /// The I/O APIC: `struct kvm_ioapic_state`.
    #[prost(bytes = "vec", tag = "13")]
    pub io_apic: Vec<u8>,
}

impl Record for PartitionRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: PARTITION,
        name: "machine.partition",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "mode", Shape::Enum(&SYNIC_MODES)).required(),
            Field::new(2, "tsc_khz", Shape::Uint32).required(),
            Field::new(3, "tsc", Shape::Fixed64),
            Field::new(4, "clock_ns", Shape::Uint64),
            Field::new(5, "reference_time", Shape::Uint64),
            Field::new(6, "guest_os_id", Shape::Uint64),
            Field::new(7, "hypercall", Shape::Uint64),
            Field::new(8, "reference_tsc", Shape::Uint64),
            Field::new(9, "tsc_invariant", Shape::Uint64),
            Field::new(10, "crash", Shape::Bytes { most: CRASH_BYTES }),
            Field::new(11, "pic_master", Shape::Bytes { most: CHIP_BYTES }).required(),
            Field::new(12, "pic_slave", Shape::Bytes { most: CHIP_BYTES }).required(),
            Field::new(13, "io_apic", Shape::Bytes { most: CHIP_BYTES }).required(),
        ],
        check: record::check::<Self>,
    };
}

const SYNIC_MODES: [&str; 3] = ["unspecified", "kernel", "user"];

/// A processor. Each, in the order of their indices.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ProcessorRecord {
    /// Its index.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Whether it runs, halts, or waits to be started: `struct kvm_mp_state`.
    #[prost(uint32, tag = "2")]
    pub mp_state: u32,
    /// What CPUID tells on it, [`LEAF_BYTES`] for each leaf.
    #[prost(bytes = "vec", tag = "3")]
    pub cpuid: Vec<u8>,
    /// `struct kvm_regs`.
    #[prost(bytes = "vec", tag = "4")]
    pub registers: Vec<u8>,
    /// `struct kvm_sregs`.
    #[prost(bytes = "vec", tag = "5")]
    pub special_registers: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[prost(bytes = "vec", tag = "6")]
    pub debug_registers: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[prost(bytes = "vec", tag = "7")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_xsave`; zeros at the end are left out.
    #[prost(bytes = "vec", tag = "8")]
    pub xsave: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[prost(bytes = "vec", tag = "9")]
    pub local_apic: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "10")]
    pub events: Vec<u8>,
    /// [`MSR_BYTES`] for each MSR, but Hyper-V's and the two below.
    #[prost(bytes = "vec", tag = "11")]
    pub msrs: Vec<u8>,
    /// How far its TSC is before that of the first processor, modulo 2^64.
    #[prost(fixed64, tag = "12")]
    pub tsc_ahead: u64,
    /// MSR TSC_DEADLINE.
    #[prost(fixed64, tag = "13")]
    pub tsc_deadline: u64,
}

impl Record for ProcessorRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: PROCESSOR,
        name: "machine.processor",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "index", Shape::Uint32),
            Field::new(2, "mp_state", Shape::Uint32),
            Field::new(3, "cpuid", Shape::Bytes { most: MAX_LEAVES * LEAF_BYTES }).required(),
            Field::new(4, "registers", Shape::Bytes { most: MAX_STRUCTURE_BYTES }).required(),
            Field::new(5, "special_registers", Shape::Bytes { most: MAX_STRUCTURE_BYTES })
                .required(),
            Field::new(6, "debug_registers", Shape::Bytes { most: MAX_STRUCTURE_BYTES }).required(),
            Field::new(7, "xcrs", Shape::Bytes { most: MAX_STRUCTURE_BYTES }).required(),
            Field::new(8, "xsave", Shape::Bytes { most: MAX_XSAVE_BYTES }),
            Field::new(9, "local_apic", Shape::Bytes { most: MAX_STRUCTURE_BYTES }).required(),
            Field::new(10, "events", Shape::Bytes { most: MAX_STRUCTURE_BYTES }).required(),
            Field::new(11, "msrs", Shape::Bytes { most: MAX_MSRS * MSR_BYTES }),
            Field::new(12, "tsc_ahead", Shape::Fixed64),
            Field::new(13, "tsc_deadline", Shape::Fixed64),
        ],
        check: record::check::<Self>,
    };
}

/// The synthetic registers of a processor. Each, behind the last processor's record, in the order of their
/// indices.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SynicRecord {
    /// The processor's index.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// MSR SCONTROL.
    #[prost(uint64, tag = "2")]
    pub scontrol: u64,
    /// MSR SIEFP.
    #[prost(uint64, tag = "3")]
    pub siefp: u64,
    /// MSR SIMP.
    #[prost(uint64, tag = "4")]
    pub simp: u64,
    /// MSRs SINT0 to SINT15, eight bytes each, least significant first.
    #[prost(bytes = "vec", tag = "5")]
    pub sints: Vec<u8>,
    /// MSR VP_ASSIST_PAGE.
    #[prost(uint64, tag = "6")]
    pub vp_assist_page: u64,
    /// MSRs STIMER0_CONFIG to STIMER3_COUNT, eight bytes each. Absent: zeros.
    #[prost(bytes = "vec", tag = "7")]
    pub stimers: Vec<u8>,
}

impl Record for SynicRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: SYNIC,
        name: "machine.synic",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "index", Shape::Uint32),
            Field::new(2, "scontrol", Shape::Uint64),
            Field::new(3, "siefp", Shape::Uint64),
            Field::new(4, "simp", Shape::Uint64),
            Field::new(5, "sints", Shape::Bytes { most: SINT_BYTES }).required(),
            Field::new(6, "vp_assist_page", Shape::Uint64),
            Field::new(7, "stimers", Shape::Bytes { most: STIMER_BYTES }),
        ],
        check: record::check::<Self>,
    };
}
