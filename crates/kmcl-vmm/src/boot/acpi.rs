//! The ACPI tables: processors, one interrupt controller, a way to power off, and the VMBus.
//!
//! Source: hyperv-host section 6.

use acpi_tables::aml::{self, Device, Name, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::layout::{
    ACPI, IO_APIC, LOCAL_APIC, RESET, RESET_VALUE, RESET_VECTOR, SERIAL, SERIAL_GSI, SLEEP_CONTROL,
    SLEEP_STATUS, SLEEP_TYPE_OFF,
};

const OEM: [u8; 6] = *b"KMCL  ";
const TABLE: [u8; 8] = *b"KMCLVMM ";

/// What a PC has and this is none: a guest that believes in a clock waits long for it to tick.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Tables being laid out, one behind the other.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Puts a table in and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        while !self.bytes.len().is_multiple_of(16) {
            self.bytes.push(0);
        }
        let at = ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut Sink(&mut self.bytes));
        at
    }
}

struct Sink<'a>(&'a mut Vec<u8>);

impl AmlSink for Sink<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// Writes the tables for `vps` processors and returns the address of their root.
pub(crate) fn write(memory: &GuestMemoryMmap, vps: u32) -> Result<u64, Error> {
    let mut tables = Tables { bytes: Vec::new() };
    let dsdt = tables.add(&dsdt());
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    let port = |at: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, at.into());
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    let fadt = tables.add(&fadt.finalize());

    let apic = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, TABLE, 1, apic);
    for vp in 0..vps {
        // VPs are counted in the order of their indices, which are their APIC ids: at most 64.
        let id = u8::try_from(vp).unwrap_or(u8::MAX);
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    let madt = tables.add(&madt);

    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    let root = tables.add(&Rsdp::new(OEM, xsdt));

    let (bytes, room) = (tables.bytes.len() as u64, RESET_VECTOR - ACPI);
    if bytes > room {
        return Err(Error::Acpi { bytes, room });
    }
    memory
        .write_slice(&tables.bytes, GuestAddress(ACPI))
        .map_err(|error| Error::Memory(error.to_string()))?;
    Ok(root)
}

/// The devices: the VMBus, the serial port, and the sleep state of power-off.
fn dsdt() -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    let name = |name, value: &'static dyn Aml| Name::new(Path::new(name), value);

    let nothing = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![]));
    let (hid, uid) = (name("_HID", &"VMBus"), name("_UID", &0_u8));
    let (ddn, sta) = (name("_DDN", &"VMBUS"), name("_STA", &0x0f_u8));
    let vmbus = Device::new(Path::new("VMBS"), vec![&hid, &uid, &ddn, &sta, &nothing]);

    let ports = aml::IO::new(SERIAL, SERIAL, 0, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let hid = Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501"));
    let ddn = name("_DDN", &"COM1");
    let serial = Device::new(Path::new("COM1"), vec![&hid, &uid, &ddn, &resources]);

    Scope::new(Path::new("_SB_"), vec![&vmbus, &serial]).to_aml_bytes(&mut dsdt);
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF]);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut dsdt);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let table = bytes(memory, at, len as usize);
        let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    /// The way that a kernel goes: from the root to each table, and to the VMBus in the last one.
    #[test]
    fn the_tables_lead_to_the_vmbus() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let root = write(&memory, 3).unwrap();
        let rsdp = bytes(&memory, root, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let entries: Vec<Vec<u8>> = xsdt[36..]
            .as_chunks::<8>()
            .0
            .iter()
            .map(|entry| table(&memory, u64::from_le_bytes(*entry)))
            .collect();
        let find = |name: &[u8]| entries.iter().find(|table| &table[..4] == name).unwrap();
        let fadt = find(b"FACP");
        let dsdt = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(dsdt.windows(6).any(|text| text == b"VMBus\0"), "no driver finds the bus");
        // Three processors and an I/O APIC behind the fixed part.
        let madt = find(b"APIC");
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!((madt[44 + 16 + 2], madt[44 + 16 + 3]), (2, 2), "ids are VP indices");
    }
}
