//! SCSI disks for guests: a VMBus storage VSP with raw-file and RAM back ends
pub mod block;
mod disk;
mod scsi;
pub use disk::{Disk, DiskError, DiskOptions, MAX_TRANSFER_BYTES};
pub use scsi::bus::{LunError, MAX_LUNS, MAX_PATHS, MAX_TARGETS};
