//! The state in which a processor enters a 64-bit kernel, and that of one that waits to be started.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_fpu, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::layout::{BOOT_PARAMS, GDT, IDT, PAGE_TABLES};

/// Descriptors: null, null, 64-bit code, data, task.
const DESCRIPTORS: [u64; 5] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
const CODE: u16 = 2 * 8;
const DATA: u16 = 3 * 8;
const TASK: u16 = 4 * 8;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Offsets of the local APIC's registers, and what the pins of a PC are wired to.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVER_EXTERNAL: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

/// Writes descriptors and page tables: the first GiB is mapped to itself, in pieces of 2 MiB.
pub(super) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let write = |at: u64, value: u64| {
        memory
            .write_obj(value.to_le(), GuestAddress(at))
            .map_err(|error| Error::Memory(error.to_string()))
    };
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        write(at, descriptor)?;
    }
    write(IDT, 0)?;
    let (level4, level3, level2) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    write(level4, level3 | PRESENT_WRITABLE)?;
    write(level3, level2 | PRESENT_WRITABLE)?;
    for (at, page) in (level2..).step_by(8).zip((0..1 << 30).step_by(2 << 20)) {
        write(at, page | PRESENT_WRITABLE | LARGE)?;
    }
    Ok(())
}

/// Sets a processor up: the first one enters the kernel at `entry`, others wait for it.
pub(crate) fn set_up(vcpu: &VcpuFd, index: u32, entry: u64) -> Result<(), Error> {
    let msrs = [kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        data: MISC_ENABLE_FAST_STRING,
        ..Default::default()
    }];
    if let Ok(msrs) = Msrs::from_entries(&msrs) {
        vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    }
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(Error::kvm("KVM_SET_FPU"))?;
    wire_apic(vcpu)?;
    let mp_state = if index == 0 { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(Error::kvm("KVM_SET_MP_STATE"))?;
    if index != 0 {
        return Ok(());
    }
    let registers = kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: BOOT_PARAMS,
        rbp: BOOT_PARAMS,
        rsi: BOOT_PARAMS,
        ..Default::default()
    };
    vcpu.set_regs(&registers).map_err(Error::kvm("KVM_SET_REGS"))?;
    enter_long_mode(vcpu)
}

fn wire_apic(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut apic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    for (at, mode) in [(APIC_LVT_LINT0, DELIVER_EXTERNAL), (APIC_LVT_LINT1, DELIVER_NMI)] {
        let register = apic.regs.get_mut(at..at + 4).unwrap_or_default();
        for (register, byte) in register.iter_mut().zip(mode.to_le_bytes()) {
            *register = i8::from_le_bytes([byte]);
        }
    }
    vcpu.set_lapic(&apic).map_err(Error::kvm("KVM_SET_LAPIC"))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut special = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: CODE, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: DATA, type_: 0x3, db: 1, ..flat };
    let task = kvm_segment { selector: TASK, type_: 0xb, s: 0, limit: 0xffff, g: 0, ..flat };
    special.cs = code;
    [special.ds, special.es, special.fs, special.gs, special.ss] = [data; 5];
    special.tr = task;
    special.gdt.base = GDT;
    special.gdt.limit = 5 * 8 - 1;
    special.idt.base = IDT;
    special.idt.limit = 7;
    special.cr0 = CR0_PE | CR0_ET | CR0_PG;
    special.cr3 = PAGE_TABLES;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&special).map_err(Error::kvm("KVM_SET_SREGS"))
}
