//! SCSI disks for guests: a VMBus storage VSP with raw-file and RAM back ends
pub mod block;
