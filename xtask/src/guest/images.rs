//! The laboratory's folder: kernels, RAM disks, programs and scripts, as the scripts expect them.

use std::fs;
use std::path::{Path, PathBuf};

use super::parts::Parts;
use super::stories::{KERNELS, PROBE, Run, STORIES};
use super::tree::Recipe;
use crate::run::Failure;

/// Modules that a guest needs, those they depend on beside.
const GUEST_MODULES: [&str; 8] = [
    "hv_vmbus",
    "sd_mod",
    "hv_storvsc",
    "hv_utils",
    "hv_sock",
    "crc32c_generic",
    "crc32c-intel",
    "ext4",
];
/// The same of a guest with virtio.
const VIRTIO_MODULES: [&str; 5] =
    ["virtio_pci", "virtio_blk", "crc32c_generic", "crc32c-intel", "ext4"];
/// Modules of the emulated machine.
const OUTER_MODULES: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "kvm", "kvm-amd"];
/// Programs that a guest works with.
const GUEST_PROGRAMS: [&str; 4] = ["fio", "mkfs.ext4", "e2fsck", "socat"];
/// Programs that the emulated machine works with.
const OUTER_PROGRAMS: [&str; 3] = ["e2fsck", "socat", "qemu-system-x86_64"];
/// What QEMU reads when it starts a kernel.
const FIRMWARE: [&str; 3] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/kvmvapic.bin",
];
/// Where things are mounted.
const FOLDERS: [&str; 14] = [
    "dev",
    "lab",
    "lib/modules",
    "lib/x86_64-linux-gnu",
    "lib64",
    "mnt",
    "out",
    "proc",
    "sbin",
    "sys",
    "tmp",
    "tools",
    "usr",
    "var",
];
/// The scripts on the host's side, and those on the guest's.
const HOST_SCRIPTS: [(&str, &str); 2] =
    [("lab.sh", include_str!("scripts/lab.sh")), ("vm.sh", include_str!("scripts/vm.sh"))];
const COMMANDS: &str = include_str!("scripts/commands.sh");

/// Everything that a run of the laboratory needs.
pub(super) struct Lab {
    /// The folder that the scripts call `LAB`.
    pub(super) folder: PathBuf,
    /// The emulated machine's RAM disk.
    pub(super) outer: PathBuf,
    /// And its kernel.
    pub(super) outer_kernel: PathBuf,
}

/// Builds the laboratory's folder, except for what is there and has not changed.
pub(super) fn build(parts: &Parts) -> Result<Lab, Failure> {
    let folder = parts.folder.join("lab");
    for (number, guest) in parts.guests.iter().enumerate() {
        let place = folder.join(format!("guests/{number}"));
        let mut kernel = Recipe::default();
        kernel.file(&guest.image, "vmlinuz");
        kernel.build(&place)?;
        for (name, modules) in [("initrd", &GUEST_MODULES[..]), ("initrd-virtio", &VIRTIO_MODULES)]
        {
            let mut disk = Recipe::new(&FOLDERS);
            disk.busybox();
            disk.text("init", include_str!("scripts/guest-init.sh"));
            disk.text("commands.sh", COMMANDS);
            disk.text("sbin/poweroff", include_str!("scripts/guest-poweroff.sh"));
            disk.text("sbin/reboot", include_str!("scripts/guest-reboot.sh"));
            disk.modules(guest, modules, "lib/modules")?;
            let tree = parts.folder.join(format!("{name}-{number}"));
            link(&disk.ram_disk(&tree)?, &place.join(name))?;
        }
    }
    let mut tools = Recipe::new(&["lost+found"]);
    for program in GUEST_PROGRAMS {
        tools.program(program)?;
    }
    link(&tools.disk(&parts.folder.join("guest-tools"))?, &folder.join("tools.img"))?;
    let mut tools = Recipe::new(&["usr"]);
    for program in OUTER_PROGRAMS {
        tools.program(program)?;
    }
    for file in FIRMWARE {
        tools.file(&Path::new("/").join(file), file);
    }
    tools.build(&folder.join("tools"))?;
    let mut programs = Recipe::default();
    programs.file(&parts.kmcl, "kmcl");
    programs.file(&parts.hostile, "hostile");
    programs.build(&folder.join("bin"))?;
    let mut scripts = Recipe::default();
    for (name, text) in HOST_SCRIPTS {
        scripts.text(name, text);
    }
    for story in STORIES.iter().chain([&PROBE]) {
        scripts.text(&format!("stories/{}.sh", story.name), story.script);
    }
    scripts.build(&folder.join("scripts"))?;
    let mut outer = Recipe::new(&FOLDERS);
    outer.busybox();
    outer.text("init", include_str!("scripts/outer-init.sh"));
    outer.modules(&parts.outer, &OUTER_MODULES, "lib/modules")?;
    let outer = outer.ram_disk(&parts.folder.join("outer"))?;
    Ok(Lab { folder, outer, outer_kernel: parts.outer.image.clone() })
}

impl Lab {
    /// Writes down what is to be run.
    pub(super) fn write_runs(&self, runs: &[Run]) -> Result<(), Failure> {
        let mut list = String::new();
        for (number, run) in runs.iter().enumerate() {
            let Run { kernel, synic, cpus, story } = run;
            let guest = KERNELS.iter().position(|name| name == kernel).unwrap_or(0);
            list.push_str(&format!("{number} {guest} {synic} {cpus} {}\n", story.name));
        }
        let path = self.folder.join("runs");
        fs::write(&path, list).map_err(|source| Failure::File { path, source })
    }
}

/// Puts a file where it is expected.
fn link(from: &Path, to: &Path) -> Result<(), Failure> {
    let failed = |source| Failure::File { path: to.to_owned(), source };
    let _not_there = fs::remove_file(to);
    to.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
    fs::hard_link(from, to).map_err(failed)
}
