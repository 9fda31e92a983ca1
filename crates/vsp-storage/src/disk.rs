//! A disk: a back end, and what a guest is told about it.

mod identity;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vstor_wire::scsi::vpd::MAX_SERIAL_BYTES;

use crate::block::Backend;

pub use self::identity::{DiskDifference, DiskIdentity, FINGERPRINT_BYTES, Fingerprint};

/// Most bytes one READ or WRITE moves. A multiple of 4096; what guests are told.
pub const MAX_TRANSFER_BYTES: u32 = 0x4_0000;

/// How a disk shows itself.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Bytes per sector: 512 or 4096.
    pub sector_bytes: u32,
    /// Serial number: 1 to 36 printable ASCII characters. A guest knows the disk again by it, so it
    /// must differ between disks and stay the same for one.
    pub serial: String,
}

impl DiskOptions {
    /// A disk of 512-byte sectors.
    #[must_use]
    pub fn new(serial: impl Into<String>) -> Self {
        Self { sector_bytes: 512, serial: serial.into() }
    }
}

/// Why a back end cannot be a disk.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Guests know two sizes of sectors.
    #[error("a sector size of {got} bytes: choose 512 or 4096")]
    SectorSize {
        /// What was asked for.
        got: u32,
    },
    /// The serial number cannot be shown to a guest.
    #[error(
        "serial number {serial:?}: give 1 to {MAX_SERIAL_BYTES} printable ASCII characters without spaces at the ends"
    )]
    Serial {
        /// What was asked for.
        serial: String,
    },
    /// The size is no number of sectors.
    #[error("a disk of {bytes} bytes is not a whole, positive number of sectors of {sector_bytes}")]
    Size {
        /// Bytes of the back end.
        bytes: u64,
        /// Bytes per sector.
        sector_bytes: u32,
    },
}

/// A disk: a back end, and what a guest is told about it.
pub struct Disk {
    backend: Arc<dyn Backend>,
    profile: Profile,
    /// A controller has it, or still has requests of it.
    is_attached: AtomicBool,
    /// That of the first bytes when they were last looked at.
    fingerprint: Mutex<Option<Fingerprint>>,
    /// They may have been written since.
    has_new_header: AtomicBool,
}

impl Disk {
    /// Makes a disk of a back end.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn new(backend: Arc<dyn Backend>, options: &DiskOptions) -> Result<Arc<Self>, DiskError> {
        let profile = Profile::new(&*backend, options)?;
        Ok(Arc::new(Self {
            backend,
            profile,
            is_attached: AtomicBool::new(false),
            fingerprint: Mutex::new(None),
            has_new_header: AtomicBool::new(true),
        }))
    }

    /// What stores its bytes.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.profile.sectors
    }

    /// Bytes per sector.
    #[must_use]
    pub fn sector_bytes(&self) -> u32 {
        self.profile.sector_bytes
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.profile.read_only
    }

    /// What the disk is known by now. Reads its first bytes, unless a controller has not written there
    /// since they were last read.
    #[must_use]
    pub fn identity(&self) -> DiskIdentity {
        let Profile { sectors, sector_bytes, granularity, ref serial, read_only } = self.profile;
        DiskIdentity {
            bytes: sectors * u64::from(sector_bytes), // the size of the back end
            sector_bytes,
            physical_sector_bytes: granularity.saturating_mul(sector_bytes),
            serial: serial.clone(),
            read_only,
            fingerprint: self.fingerprint(),
        }
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        let mut kept = self.fingerprint.lock().unwrap_or_else(PoisonError::into_inner);
        // Before they are read: whoever writes meanwhile has them read again.
        if self.has_new_header.swap(false, Ordering::AcqRel) {
            let bytes = self.backend.bytes().min(FINGERPRINT_BYTES);
            let mut header = vec![0; usize::try_from(bytes).unwrap_or(0)];
            *kept = match self.backend.read_now(0, &mut header) {
                Some(Ok(())) => Some(Fingerprint::of(&header)),
                Some(Err(error)) => {
                    let serial = &self.profile.serial;
                    tracing::warn!(%error, serial, "the first bytes of a disk cannot be read");
                    None
                }
                None => None,
            };
        }
        *kept
    }

    /// The first bytes are to be read anew: somebody else may have written them.
    pub(crate) fn forget_header(&self) {
        self.has_new_header.store(true, Ordering::Release);
    }

    /// Somebody writes, or has written, from byte `offset` on.
    #[inline]
    pub(crate) fn note_write(&self, offset: u64) {
        if offset < FINGERPRINT_BYTES {
            self.forget_header();
        }
    }

    /// Whether a controller has the disk, or still has requests of it to finish after the disk was
    /// detached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::Acquire)
    }

    /// Takes the disk for a controller; `false` if another has it. Its completions can go to one
    /// place only.
    pub(crate) fn claim(&self) -> bool {
        !self.is_attached.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn release(&self) {
        self.is_attached.store(false, Ordering::Release);
    }

    pub(crate) fn profile(&self) -> &Profile {
        &self.profile
    }
}

/// What SCSI commands need to know of a disk.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    /// Size; at least 1.
    pub(crate) sectors: u64,
    /// 512 or 4096.
    pub(crate) sector_bytes: u32,
    /// Sectors that are best read and written together; a power of two.
    pub(crate) granularity: u32,
    pub(crate) serial: String,
    pub(crate) read_only: bool,
}

impl Profile {
    pub(crate) fn new(backend: &dyn Backend, options: &DiskOptions) -> Result<Self, DiskError> {
        let DiskOptions { sector_bytes, serial } = options.clone();
        if !matches!(sector_bytes, 512 | 4096) {
            return Err(DiskError::SectorSize { got: sector_bytes });
        }
        let printable = serial.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if serial.is_empty()
            || serial.len() > MAX_SERIAL_BYTES
            || !printable
            || serial.trim() != serial
        {
            return Err(DiskError::Serial { serial });
        }
        let bytes = backend.bytes();
        if bytes == 0 || !bytes.is_multiple_of(u64::from(sector_bytes)) {
            return Err(DiskError::Size { bytes, sector_bytes });
        }
        Ok(Self {
            sectors: bytes / u64::from(sector_bytes),
            sector_bytes,
            granularity: (backend.granularity() / sector_bytes).max(1),
            serial,
            read_only: backend.is_read_only(),
        })
    }

    /// A number that belongs to the serial number: FNV-1a.
    pub(crate) fn id(&self) -> u64 {
        self.serial.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::RamBackend;

    #[test]
    fn what_a_guest_cannot_be_shown_is_refused() {
        let longest = "x".repeat(36);
        for (bytes, sector_bytes, serial, ok) in [
            (4096, 512, "a", true),
            (4096, 4096, longest.as_str(), true),
            (512, 512, "two words", true),
            (4096, 1024, "a", false),
            (4096, 0, "a", false),
            (512, 4096, "a", false),
            (513, 512, "a", false),
            (4096, 512, "", false),
            (4096, 512, " a", false),
            (4096, 512, "a\n", false),
            (4096, 512, "ä", false),
            (4096, 512, &"x".repeat(37), false),
        ] {
            let backend = Arc::new(RamBackend::new(bytes).unwrap());
            let options = DiskOptions { sector_bytes, serial: serial.to_owned() };
            let disk = Disk::new(backend, &options);
            assert_eq!(disk.is_ok(), ok, "{bytes} {sector_bytes} {serial:?}");
        }
    }
}
