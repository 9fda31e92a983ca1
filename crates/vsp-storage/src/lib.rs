//! SCSI disks for guests: the host's end (VSP) of the VMBus storage protocol.
//!
//! A [`ScsiController`] offers a channel over any [`Bus`](kmcl::bus::Bus). What guests find on it are
//! [`Disk`]s at SCSI addresses, which may come and go while guests run. A disk stores its bytes in a
//! [`Backend`](block::Backend): a raw file ([`block::open_file`]) through io_uring or threads, memory
//! ([`block::RamBackend`]), or something of one's own.
//!
//! ```text
//!   guest ── channel ──► lane ──► SCSI target ──► back end ──► file
//!                         │  one per channel        │
//!                         ◄──────── Completions ────┘ when its descriptor is readable
//! ```
//!
//! A controller can be saved in the middle of its work and go on in another process:
//! [`ScsiController::freeze`], [`ScsiController::restoring`].
//!
//! ```text
//!   freeze ──► wait ──► streams ──► move_away  ···  restoring ──► attach ──► enable ──► restore_channel ──► start
//!      └──────── thaw ────┘                          the same disks, or it is refused
//! ```
//!
//! No request is carried out again while its original can still land: a [`Backend`](block::Backend) says
//! of each what became of it ([`block::IoOutcome`]), and only from that follows what its packet is saved
//! as.
//!
//! Data moves between the back end and guest memory without a copy of ours: the back end gets the
//! guest's pages as I/O vectors. A request allocates nothing on its way once as many were in flight
//! before.
//!
//! The crate makes no thread but those of a back end, and no event loop. Who has one implements
//! [`Driver`] with it: it says which channels there are to process, and which completions to wait for.
//!
//! | module | what it does |
//! |---|---|
//! | [`block`] | requests on bytes, and the back ends that perform them |
//! | `scsi` | what each command means for a disk; pure |
//! | `controller` | the protocol of the channel, requests in flight, resets, subchannels, saving and restoring |
//!
//! Source: devices, section 1.

pub mod block;
mod controller;
mod disk;
mod driver;
#[cfg(feature = "faults")]
pub mod faults;
mod scsi;

pub use controller::{
    AttachError, Completions, ControllerConfig, ControllerError, ControllerRestoreError,
    ControllerSave, EnableError, FrozenController, MAX_SUB_CHANNELS, PausedController,
    REQUESTS_PER_CHANNEL, RestoreChannelError, RestoringController, SavedDisk, SavedStream,
    ScsiController, StartError, StreamSave, StreamSaveError,
};
pub use disk::{
    Disk, DiskDifference, DiskError, DiskIdentity, DiskOptions, FINGERPRINT_BYTES, Fingerprint,
    MAX_TRANSFER_BYTES,
};
pub use driver::Driver;
pub use scsi::bus::{LunError, MAX_LUNS, MAX_PATHS, MAX_TARGETS};
pub use vstor_wire::srb::ScsiAddress;
