//! The bytes of the VMBus storage protocol, as a host's VSP and a guest's VSC exchange them.
//!
//! Both ends of a SCSI, IDE or Fibre Channel controller channel send each other *vstor packets*: a
//! 12-byte header and a body that depends on the operation. The body that matters is the SRB, which
//! carries one SCSI command. This crate has the structs of all of them, the SCSI commands a disk
//! understands, and the data a disk answers with. It does no I/O and keeps no state.
//!
//! | module | what it describes |
//! |---|---|
//! | [`packet`] | vstor packets in their 64-byte and 48-byte forms, operations |
//! | [`protocol`] | bodies of the initialisation: versions, channel properties, subchannels, ports |
//! | [`srb`] | the SCSI request block: addresses, statuses, flags |
//! | [`scsi`] | command descriptor blocks, sense data, and the data of each command |
//!
//! vstor packets are little-endian, everything inside a CDB or a SCSI data buffer is big-endian.
//!
//! Parsers take a private copy of a peer's bytes. Each gives a checked value, or an error that
//! carries the numbers; none panics, whatever the bytes.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod packet;
pub mod protocol;
pub mod scsi;
pub mod srb;

use vmbus_wire::guid::Guid;

/// Interface type of a synthetic SCSI controller's channel.
///
/// Source: Linux `include/linux/hyperv.h`, `HV_SCSI_GUID`.
pub const SCSI_INTERFACE: Guid = Guid::from_u128(0xba61_63d9_04a1_4d29_b605_72e2_ffb1_dc7f);

/// Interface type of an IDE disk's accelerated channel.
///
/// Source: Linux `include/linux/hyperv.h`, `HV_IDE_GUID`.
pub const IDE_INTERFACE: Guid = Guid::from_u128(0x3241_2632_86cb_44a2_9b5c_50d1_4173_54f5);

/// Interface type of a synthetic Fibre Channel adapter's channel.
///
/// Source: Linux `include/linux/hyperv.h`, `HV_SYNTHFC_GUID`.
pub const FIBRE_CHANNEL_INTERFACE: Guid =
    Guid::from_u128(0x2f9b_cc4a_0069_4af3_b76b_6fd0_be52_8cda);
