//! Where things are in the guest's physical address space and among its ports.
//!
//! ```text
//! 0          0x7000   0x9000    0x2_0000   0x9_fc00  0xe_0000  0x10_0000        3 GiB      4 GiB
//! ├──────────┼────────┼─────────┼──────────┼─────────┼─────────┼────────────────┼──────────┼─────────
//! │ GDT, IDT │ boot   │ page    │ command  │  gap    │ ACPI    │ kernel … RAM … │ gap:     │ RAM
//! │          │ params │ tables  │ line     │         │ tables  │ … initrd       │ APICs    │
//! ```

/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// The interrupt descriptor table: empty.
pub(crate) const IDT: u64 = 0x520;
/// The kernel's boot parameters.
pub(crate) const BOOT_PARAMS: u64 = 0x7000;
/// Page tables that map the first GiB to itself: four pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes for it, its end included.
pub(crate) const COMMAND_LINE_BYTES: usize = 4096;
/// End of the first piece of RAM that a guest may use.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, up to the kernel.
pub(crate) const ACPI: u64 = 0xe_0000;
/// Where firmware begins: a kernel that has tried everything else to reset the machine jumps there.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// Where a kernel is loaded.
pub(crate) const KERNEL: u64 = 0x10_0000;
/// Where the gap below 4 GiB begins; RAM that does not fit goes on behind it.
pub(crate) const GAP: u64 = 0xc000_0000;
/// Where RAM goes on.
pub(crate) const HIGH_RAM: u64 = 1 << 32;

/// The I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM wants on Intel.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;
/// One more.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The serial port: eight ports.
pub(crate) const SERIAL: u16 = 0x3f8;
/// Its interrupt.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Where a PC's clock would be read.
pub(crate) const CMOS_DATA: u16 = 0x71;
/// The keyboard controller's command port: 0xfe resets the machine.
pub(crate) const KEYBOARD_COMMAND: u16 = 0x64;
/// Written to sleep, and to power off.
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
/// Read while asleep.
pub(crate) const SLEEP_STATUS: u16 = 0x601;
/// Written to reset the machine.
pub(crate) const RESET: u16 = 0x602;
/// What is written there.
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of power-off, as the tables tell the guest.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
