//! A saved partition, checked: what comes out of its records before anything is done with it.
//!
//! Records are a peer's bytes. Here lengths and counts are held against what they must be, and bytes become
//! KVM's structures; what KVM makes of a value that it does not like, it says itself.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_ioapic_state,
    kvm_lapic_state, kvm_msr_entry, kvm_pic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use saved_state::machine::{
    LEAF_BYTES, MSR_BYTES, PartitionRecord, ProcessorRecord, SynicMode, SynicRecord,
};
use zerocopy::FromBytes;

use crate::cpuid::MAX_VPS;
use crate::probe::Mode;
use crate::processor::msrs;
use crate::registers::Globals;
use crate::save::PartitionState;
use crate::synic::Values;

/// Why records are not a saved partition.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another number of records than there are processors.
    #[error("{found} {what}, {expected} expected")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// Records out of order, or one twice.
    #[error("{what} {found} in the place of {expected}")]
    Index {
        /// Of what.
        what: &'static str,
        /// Its index.
        found: u32,
        /// The index that should be there.
        expected: u32,
    },
    /// Something has another length than it must have.
    #[error("processor {vp}: {what} has {found} bytes, not {expected}")]
    Size {
        /// Whose; 0 for what all share.
        vp: u32,
        /// What.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What that should be.
        expected: usize,
    },
    /// A list is not of whole entries.
    #[error("processor {vp}: {what} of {found} bytes, not a multiple of {unit}")]
    List {
        /// Whose.
        vp: u32,
        /// What.
        what: &'static str,
        /// Its length.
        found: usize,
        /// Bytes of an entry.
        unit: usize,
    },
    /// More leaves of CPUID than there can be.
    #[error("processor {vp}: {found} leaves of CPUID, limit {KVM_MAX_CPUID_ENTRIES}")]
    Leaves {
        /// Whose.
        vp: u32,
        /// How many.
        found: usize,
    },
    /// An MSR that is not a processor's, or has a field of its own.
    #[error("processor {vp}: MSR {msr:#x} in the list of its MSRs")]
    Msr {
        /// Whose.
        vp: u32,
        /// The MSR's number.
        msr: u32,
    },
    /// Nobody provided Hyper-V's interfaces.
    #[error("mode {found}")]
    Mode {
        /// What is there.
        found: i32,
    },
}

/// A saved partition.
pub(crate) struct State {
    pub(crate) shared: SharedState,
    pub(crate) processors: Vec<ProcessorState>,
    pub(crate) synics: Vec<SynicState>,
}

/// What all processors share.
#[derive(Clone)]
pub(crate) struct SharedState {
    pub(crate) mode: Mode,
    pub(crate) tsc_khz: u32,
    pub(crate) tsc: u64,
    pub(crate) clock_ns: u64,
    pub(crate) reference_time: u64,
    pub(crate) globals: Globals,
    pub(crate) pics: [kvm_pic_state; 2],
    pub(crate) io_apic: kvm_ioapic_state,
}

/// A processor.
pub(crate) struct ProcessorState {
    pub(crate) mp_state: u32,
    pub(crate) cpuid: CpuId,
    pub(crate) registers: kvm_regs,
    pub(crate) special_registers: kvm_sregs,
    pub(crate) debug_registers: kvm_debugregs,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) xsave: Vec<u8>,
    pub(crate) local_apic: kvm_lapic_state,
    pub(crate) events: kvm_vcpu_events,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) tsc_ahead: u64,
    pub(crate) tsc_deadline: u64,
}

/// The synthetic registers of a processor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct SynicState {
    pub(crate) values: Values,
    pub(crate) stimers: [u64; STIMERS],
}

/// Registers of the synthetic timers.
pub(crate) const STIMERS: usize = 8;

impl TryFrom<PartitionState> for State {
    type Error = StateError;

    fn try_from(records: PartitionState) -> Result<Self, StateError> {
        let PartitionState { partition, processors, synics } = records;
        let count = processors.len();
        if count == 0 || count > MAX_VPS as usize {
            let expected = count.clamp(1, MAX_VPS as usize);
            return Err(StateError::Count { what: "processors", found: count, expected });
        }
        if synics.len() != count {
            let found = synics.len();
            return Err(StateError::Count { what: "SynICs", found, expected: count });
        }
        let in_order = |what, found, expected| match found == expected {
            true => Ok(()),
            false => Err(StateError::Index { what, found, expected }),
        };
        let processors = (0..).zip(processors).map(|(expected, record)| {
            in_order("processor", record.index, expected)?;
            ProcessorState::try_from(record)
        });
        let synics = (0..).zip(synics).map(|(expected, record)| {
            in_order("SynIC", record.index, expected)?;
            SynicState::try_from(record)
        });
        Ok(Self {
            shared: partition.try_into()?,
            processors: processors.collect::<Result<_, _>>()?,
            synics: synics.collect::<Result<_, _>>()?,
        })
    }
}

/// Bytes as one of KVM's structures, of exactly its length.
fn structure<T: FromBytes>(vp: u32, what: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    let (found, expected) = (bytes.len(), size_of::<T>());
    T::read_from_bytes(bytes).map_err(|_| StateError::Size { vp, what, found, expected })
}

/// Numbers of eight bytes. Where they may be `absent`, no bytes are zeros.
fn numbers<const N: usize>(
    vp: u32,
    what: &'static str,
    bytes: &[u8],
    absent: bool,
) -> Result<[u64; N], StateError> {
    let mut numbers = [0; N];
    if absent && bytes.is_empty() {
        return Ok(numbers);
    }
    if bytes.len() != N * 8 {
        return Err(StateError::Size { vp, what, found: bytes.len(), expected: N * 8 });
    }
    let (eights, _) = bytes.as_chunks::<8>();
    numbers.iter_mut().zip(eights).for_each(|(to, from)| *to = u64::from_le_bytes(*from));
    Ok(numbers)
}

/// Entries of a list.
fn entries<'a, const N: usize>(
    vp: u32,
    what: &'static str,
    bytes: &'a [u8],
) -> Result<&'a [[u8; N]], StateError> {
    match bytes.as_chunks::<N>() {
        (entries, []) => Ok(entries),
        _ => Err(StateError::List { vp, what, found: bytes.len(), unit: N }),
    }
}

impl TryFrom<PartitionRecord> for SharedState {
    type Error = StateError;

    fn try_from(record: PartitionRecord) -> Result<Self, StateError> {
        let PartitionRecord {
            mode,
            tsc_khz,
            tsc,
            clock_ns,
            reference_time,
            guest_os_id,
            hypercall,
            reference_tsc,
            tsc_invariant,
            crash,
            pic_master,
            pic_slave,
            io_apic,
        } = record;
        let mode = match SynicMode::try_from(mode) {
            Ok(SynicMode::Kernel) => Mode::Kernel,
            Ok(SynicMode::User) => Mode::User,
            Ok(SynicMode::Unspecified) | Err(_) => return Err(StateError::Mode { found: mode }),
        };
        let crash = numbers(0, "crash registers", &crash, true)?;
        let globals = Globals { guest_os_id, hypercall, reference_tsc, tsc_invariant, crash };
        Ok(Self {
            mode,
            tsc_khz,
            tsc,
            clock_ns,
            reference_time,
            globals,
            pics: [structure(0, "PIC", &pic_master)?, structure(0, "PIC", &pic_slave)?],
            io_apic: structure(0, "I/O APIC", &io_apic)?,
        })
    }
}

impl TryFrom<ProcessorRecord> for ProcessorState {
    type Error = StateError;

    fn try_from(record: ProcessorRecord) -> Result<Self, StateError> {
        let ProcessorRecord {
            index: vp,
            mp_state,
            cpuid,
            registers,
            special_registers,
            debug_registers,
            xcrs,
            xsave,
            local_apic,
            events,
            msrs,
            tsc_ahead,
            tsc_deadline,
        } = record;
        let leaves = entries::<LEAF_BYTES>(vp, "CPUID", &cpuid)?;
        let leaves: Vec<_> = leaves.iter().map(leaf_of).collect();
        let found = leaves.len();
        let cpuid = CpuId::from_entries(&leaves).ok().filter(|_| found <= KVM_MAX_CPUID_ENTRIES);
        let msrs = entries::<MSR_BYTES>(vp, "MSRs", &msrs)?.iter().map(msr_of);
        let msrs = msrs.map(|msr| match msrs::is_listed(msr.index) {
            true => Ok(msr),
            false => Err(StateError::Msr { vp, msr: msr.index }),
        });
        Ok(Self {
            mp_state,
            cpuid: cpuid.ok_or(StateError::Leaves { vp, found })?,
            registers: structure(vp, "registers", &registers)?,
            special_registers: structure(vp, "special registers", &special_registers)?,
            debug_registers: structure(vp, "debug registers", &debug_registers)?,
            xcrs: structure(vp, "XCRs", &xcrs)?,
            xsave,
            local_apic: structure(vp, "local APIC", &local_apic)?,
            events: structure(vp, "events", &events)?,
            msrs: msrs.collect::<Result<_, _>>()?,
            tsc_ahead,
            tsc_deadline,
        })
    }
}

impl TryFrom<SynicRecord> for SynicState {
    type Error = StateError;

    fn try_from(record: SynicRecord) -> Result<Self, StateError> {
        let SynicRecord { index, scontrol, siefp, simp, sints, vp_assist_page, stimers } = record;
        let sints = numbers(index, "interrupt sources", &sints, false)?;
        let stimers = numbers(index, "timers", &stimers, true)?;
        Ok(Self { values: Values { scontrol, siefp, simp, sints, vp_assist_page }, stimers })
    }
}

/// A leaf in a list of them.
pub(crate) fn leaf_bytes(leaf: &kvm_cpuid_entry2) -> impl Iterator<Item = u8> + use<> {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *leaf;
    [function, index, flags, eax, ebx, ecx, edx].into_iter().flat_map(u32::to_le_bytes)
}

fn leaf_of(bytes: &[u8; LEAF_BYTES]) -> kvm_cpuid_entry2 {
    let (words, _) = bytes.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let mut next = || words.next().unwrap_or(0); // seven, as its length says
    kvm_cpuid_entry2 {
        function: next(),
        index: next(),
        flags: next(),
        eax: next(),
        ebx: next(),
        ecx: next(),
        edx: next(),
        ..Default::default()
    }
}

/// An MSR in a list of them.
pub(crate) fn msr_bytes(msr: &kvm_msr_entry) -> impl Iterator<Item = u8> + use<> {
    msr.index.to_le_bytes().into_iter().chain(msr.data.to_le_bytes())
}

fn msr_of(bytes: &[u8; MSR_BYTES]) -> kvm_msr_entry {
    let [a, b, c, d, value @ ..] = *bytes;
    let index = u32::from_le_bytes([a, b, c, d]);
    kvm_msr_entry { index, data: u64::from_le_bytes(value), ..Default::default() }
}
