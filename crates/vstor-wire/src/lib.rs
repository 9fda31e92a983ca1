//! The bytes of the VMBus storage protocol: vstor packets, SRBs, SCSI commands and sense data. No I/O, no unsafe, no_std
