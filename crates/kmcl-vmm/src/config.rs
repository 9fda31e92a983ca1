//! What a VM is made of, as its owner writes it down: on the command line, to the control interface, and
//! beside a saved VM, with which it travels.
//!
//! Everything here is JSON too. Fields that are not given have their defaults; fields that nobody knows
//! are refused, so that a misspelt one is not silently ignored.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most disks of a VM, over all its controllers.
pub const MAX_DISKS: usize = 256;
/// Most storage controllers.
pub const MAX_CONTROLLERS: u8 = 8;
/// Most disks of one controller: the LUNs that its guest is told of.
pub const MAX_DISKS_PER_CONTROLLER: usize = 64;
/// Longest name of a disk, in bytes.
pub const MAX_ID_BYTES: usize = 20;

/// A VM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The kernel: a bzImage or an ELF file. A restored VM has no need of it until it is reset.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub command_line: String,
    /// Memory, in bytes: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Whether the memory is made of huge pages of 2 MiB, which the system must have set aside.
    #[serde(default)]
    pub huge_pages: bool,
    /// Processors.
    pub processors: u32,
    /// Who provides Hyper-V's interfaces; without it, whoever can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synic: Option<SynicMode>,
    /// The disks that it begins with.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Storage controllers. They are there also without disks, which may come later.
    #[serde(default = "one")]
    pub controllers: u8,
    /// Subchannels that a guest may open for each controller, beside the primary one.
    #[serde(default)]
    pub sub_channels: u16,
    /// The Unix socket behind which the guest's sockets are; without it, the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<PathBuf>,
    /// What a reset of the guest does.
    #[serde(default)]
    pub on_reset: OnReset,
}

fn one() -> u8 {
    1
}

/// Who provides Hyper-V's interfaces.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SynicMode {
    /// KVM.
    Kernel,
    /// This program.
    User,
}

/// What a reset of the guest does.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The VM begins anew.
    #[default]
    Restart,
    /// The VM ends.
    Exit,
}

/// A disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Its name, by which it is removed, and its serial number: 1 to [`MAX_ID_BYTES`] letters, digits,
    /// `-`, `_` and `.`. Without one it is `disk` and a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its image: a raw file.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    #[serde(default)]
    pub read_only: bool,
    /// Through which caches the image is read and written.
    #[serde(default)]
    pub cache: Cache,
    /// The controller that it is behind, from 0.
    #[serde(default)]
    pub controller: u8,
    /// Its LUN; without it, the first that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<u8>,
}

/// Through which caches an image is read and written.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The system's page cache. A guest's flush reaches the medium.
    #[default]
    Buffered,
    /// None.
    Direct,
}
