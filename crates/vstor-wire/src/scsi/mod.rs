//! The SCSI commands a disk understands, and the data and sense data it answers with.
//!
//! Only what a disk behind a storage channel needs: SPC-4 and SBC-3, without protection
//! information, reservations and task management. All multi-byte fields are big-endian.

pub mod capacity;
pub mod cdb;
pub mod inquiry;
pub mod luns;
pub mod mode;
pub mod sense;
pub mod unmap;
pub mod vpd;
