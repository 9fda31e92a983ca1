//! Getting a kernel to run: the image, the RAM disk, the command line, what firmware would tell it, and
//! the state of a processor that enters it in 64-bit mode.
//!
//! Source: the Linux x86 boot protocol, 64-bit entry.

mod acpi;
mod processor;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, load_cmdline};
use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::layout::{
    ACPI, BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_BYTES, HIGH_RAM, KERNEL, LOW_RAM_END,
    RESET_VECTOR,
};
use crate::memory::Ram;

pub(crate) use processor::set_up as set_up_processor;

/// What a guest boots.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// A bzImage or an uncompressed kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// All the firmware there is: asks the keyboard controller for a reset.
const RESET_CODE: [u8; 5] = [
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
];

/// Memory that a guest may use, and that it must leave alone.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// The type of loader that has no number of its own.
const OTHER_LOADER: u8 = 0xff;
/// How far from the start of a bzImage's code its 64-bit entry is.
const ENTRY_64: u64 = 0x200;
/// The magic number of the boot parameters.
const MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;

/// Loads everything and returns where the first processor begins.
pub(crate) fn load(ram: &Ram, config: &BootConfig, vps: u32) -> Result<u64, Error> {
    let command_line = command_line(config)?;
    let kernel = load_kernel(ram, &config.kernel)?;
    let mut params = boot_params::default();
    let entry = match kernel.setup_header {
        Some(header) => {
            params.hdr = header;
            kernel.kernel_load.0 + ENTRY_64
        }
        None => kernel.kernel_load.0,
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = MAGIC;
    params.hdr.type_of_loader = OTHER_LOADER;

    load_cmdline(&*ram.map, GuestAddress(COMMAND_LINE), &command_line)
        .map_err(|error| Error::CommandLine(error.to_string()))?;
    // Constants below 4 GiB.
    params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(config.command_line.len() + 1).unwrap_or(u32::MAX);

    if let Some(initrd) = &config.initrd {
        let (at, bytes) = load_initrd(ram, initrd, kernel.kernel_end)?;
        params.hdr.ramdisk_image = at;
        params.hdr.ramdisk_size = bytes;
    }
    params.acpi_rsdp_addr = acpi::write(&ram.map, vps)?;
    add_memory_map(&mut params, ram);
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, &*ram.map)
        .map_err(|error| Error::Memory(error.to_string()))?;
    processor::write_tables(&ram.map)?;
    ram.map
        .write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
        .map_err(|error| Error::Memory(error.to_string()))?;
    Ok(entry)
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

fn load_kernel(ram: &Ram, path: &Path) -> Result<KernelLoaderResult, Error> {
    let mut file = open(path)?;
    let start = Some(GuestAddress(KERNEL));
    let compressed = BzImage::load(&*ram.map, None, &mut file, start);
    compressed.or_else(|_| {
        let again = file.seek(SeekFrom::Start(0));
        again.map_err(|source| Error::File { path: path.to_owned(), source })?;
        Elf::load(&*ram.map, None, &mut file, start)
            .map_err(|error| Error::Kernel { path: path.to_owned(), why: error.to_string() })
    })
}

fn command_line(config: &BootConfig) -> Result<Cmdline, Error> {
    let (bytes, most) = (config.command_line.len(), COMMAND_LINE_BYTES - 1);
    if bytes > most {
        return Err(Error::CommandLine(format!("{bytes} bytes, at most {most} fit")));
    }
    Cmdline::try_from(&config.command_line, COMMAND_LINE_BYTES)
        .map_err(|error| Error::CommandLine(error.to_string()))
}

/// Puts the RAM disk at the end of low memory, where a kernel that unpacks itself does not come.
fn load_initrd(ram: &Ram, path: &Path, kernel_end: u64) -> Result<(u32, u32), Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let mut file = open(path)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let end = ram.low_end();
    let at = end.checked_sub(bytes).map(|at| at & !0xfff).filter(|at| *at >= kernel_end);
    let too_large = Error::InitrdSize { bytes, room: end.saturating_sub(kernel_end) };
    let (Some(at), Ok(len)) = (at, usize::try_from(bytes)) else { return Err(too_large) };
    ram.map
        .read_exact_volatile_from(GuestAddress(at), &mut file, len)
        .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
    // Low memory ends below 4 GiB.
    Ok((u32::try_from(at).unwrap_or(0), u32::try_from(bytes).unwrap_or(0)))
}

fn add_memory_map(params: &mut boot_params, ram: &Ram) {
    let map = [
        (0, LOW_RAM_END, RAM),
        (ACPI, KERNEL - ACPI, RESERVED),
        (KERNEL, ram.low_end() - KERNEL, RAM),
        (HIGH_RAM, ram.high_bytes(), RAM),
    ];
    let mut count = 0;
    let used = map.into_iter().filter(|(_, size, _)| *size != 0);
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(used) {
        (entry.addr, entry.size, entry.r#type) = (addr, size, type_);
        count += 1;
    }
    params.e820_entries = count;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(kernel: &Path) -> BootConfig {
        BootConfig { kernel: kernel.to_owned(), initrd: None, command_line: String::new() }
    }

    /// Files that are missing, or not what they claim, are told by name; nothing is booted.
    #[test]
    fn what_cannot_be_booted_is_refused_by_name() {
        let ram = Ram::new(64 << 20).unwrap();
        let missing = load(&ram, &config(Path::new("/nowhere/vmlinuz")), 1).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/vmlinuz"), "{missing}");
        let this = Path::new(file!()).file_name().unwrap();
        let this = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(this);
        let text = load(&ram, &config(&this), 1).unwrap_err();
        assert!(matches!(text, Error::Kernel { .. }), "{text}");
        let long = BootConfig {
            command_line: "x".repeat(COMMAND_LINE_BYTES),
            ..config(Path::new("unused"))
        };
        assert!(matches!(command_line(&long), Err(Error::CommandLine(_))));
        let too_large = load_initrd(&ram, &this, ram.low_end()).unwrap_err();
        assert!(matches!(too_large, Error::InitrdSize { room: 0, .. }), "{too_large}");
    }

    #[test]
    fn memory_sizes_that_no_guest_can_have_are_refused() {
        for (bytes, possible) in [
            (0, false),
            (32 << 20, false),
            (64 << 20, true),
            ((64 << 20) + 4096, false),
            (2 << 40, false),
        ] {
            assert_eq!(Ram::new(bytes).is_ok(), possible, "{bytes}");
        }
    }

    /// RAM behind the gap begins at 4 GiB, and the guest is told of both pieces.
    #[test]
    fn memory_goes_around_the_gap() {
        let ram = Ram::new(4 << 30).unwrap();
        assert_eq!((ram.low_end(), ram.high_bytes()), (3 << 30, 1 << 30));
        let mut params = boot_params::default();
        add_memory_map(&mut params, &ram);
        let (addr, size) = (params.e820_table[3].addr, params.e820_table[3].size);
        assert_eq!((params.e820_entries, addr, size), (4, 4 << 30, 1 << 30));
    }
}
