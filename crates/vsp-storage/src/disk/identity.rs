//! What a disk is known by, so that a saved state meets the disk that it was saved with.

use std::fmt;

/// Bytes at the start of a disk whose contents are part of its identity: partition tables and their
/// random identifiers are there.
pub const FINGERPRINT_BYTES: u64 = 32 << 10;

/// A fingerprint of the first bytes of a disk: their 128-bit FNV-1a hash.
///
/// It is there to notice an accident: the image of another guest, a copy that has gone its own way.
/// Two different headers agree in it with a chance of about 2^-128; who wants to deceive can make them.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct Fingerprint(pub(crate) [u8; 16]);

impl Fingerprint {
    /// That of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
        let hash = |hash: u128, byte: &u8| (hash ^ u128::from(*byte)).wrapping_mul(PRIME);
        Self(bytes.iter().fold(BASIS, hash).to_be_bytes())
    }

    /// Its bytes, the most significant first.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// What a disk is known by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DiskIdentity {
    /// Size.
    pub bytes: u64,
    /// Bytes per sector.
    pub sector_bytes: u32,
    /// Bytes that are best read and written together.
    pub physical_sector_bytes: u32,
    /// Serial number.
    pub serial: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Of its first [`FINGERPRINT_BYTES`], or of all of it; `None` where the back end cannot read them
    /// on the spot, or could not.
    pub fingerprint: Option<Fingerprint>,
}

/// A way in which a disk is not the one that was saved.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum DiskDifference {
    /// The size.
    Bytes {
        /// Of the disk that was saved.
        saved: u64,
        /// Of this one.
        found: u64,
    },
    /// Bytes per sector.
    SectorBytes {
        /// Of the disk that was saved.
        saved: u32,
        /// Of this one.
        found: u32,
    },
    /// Bytes that are best read and written together.
    PhysicalSectorBytes {
        /// Of the disk that was saved.
        saved: u32,
        /// Of this one.
        found: u32,
    },
    /// The serial number.
    Serial {
        /// Of the disk that was saved.
        saved: String,
        /// Of this one.
        found: String,
    },
    /// Whether writes are refused.
    ReadOnly {
        /// Whether the disk that was saved could only be read.
        saved: bool,
    },
    /// The first bytes.
    Contents {
        /// Of the disk that was saved.
        saved: Fingerprint,
        /// Of this one; `None` if it could not be read.
        found: Option<Fingerprint>,
    },
}

impl fmt::Display for DiskDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes { saved, found } => {
                write!(f, "its size is {found} bytes, was {saved}")
            }
            Self::SectorBytes { saved, found } => {
                write!(f, "its sectors have {found} bytes, had {saved}")
            }
            Self::PhysicalSectorBytes { saved, found } => {
                write!(f, "its physical sectors have {found} bytes, had {saved}")
            }
            Self::Serial { saved, found } => {
                write!(f, "its serial number is {found:?}, was {saved:?}")
            }
            Self::ReadOnly { saved: true } => f.write_str("it can be written, could only be read"),
            Self::ReadOnly { saved: false } => f.write_str("it can only be read, could be written"),
            Self::Contents { saved, found: Some(found) } => {
                write!(f, "its first bytes have fingerprint {found}, had {saved}")
            }
            Self::Contents { found: None, .. } => f.write_str("its first bytes cannot be read"),
        }
    }
}

impl DiskIdentity {
    /// How `found` differs from this disk, which was saved. A fingerprint that was not saved is not
    /// compared.
    #[must_use]
    pub fn differences(&self, found: &Self) -> Vec<DiskDifference> {
        // No `..`: a field that is added has to be compared.
        let Self { bytes, sector_bytes, physical_sector_bytes, serial, read_only, fingerprint } =
            self;
        let mut differences = Vec::new();
        if *bytes != found.bytes {
            differences.push(DiskDifference::Bytes { saved: *bytes, found: found.bytes });
        }
        if *sector_bytes != found.sector_bytes {
            let (saved, found) = (*sector_bytes, found.sector_bytes);
            differences.push(DiskDifference::SectorBytes { saved, found });
        }
        if *physical_sector_bytes != found.physical_sector_bytes {
            let (saved, found) = (*physical_sector_bytes, found.physical_sector_bytes);
            differences.push(DiskDifference::PhysicalSectorBytes { saved, found });
        }
        if *serial != found.serial {
            let (saved, found) = (serial.clone(), found.serial.clone());
            differences.push(DiskDifference::Serial { saved, found });
        }
        if *read_only != found.read_only {
            differences.push(DiskDifference::ReadOnly { saved: *read_only });
        }
        if let Some(saved) = *fingerprint
            && found.fingerprint != Some(saved)
        {
            differences.push(DiskDifference::Contents { saved, found: found.fingerprint });
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_the_published_hash() {
        for (bytes, expected) in [
            (&b""[..], "6c62272e07bb014262b821756295c58d"),
            (b"a", "d228cb696f1a8caf78912b704e4a8964"),
            (b"foobar", "343e1662793c64bf6f0d3597ba446f18"),
        ] {
            assert_eq!(Fingerprint::of(bytes).to_string(), expected, "{bytes:?}");
        }
    }

    #[test]
    fn every_difference_has_a_line_of_its_own() {
        let saved = DiskIdentity {
            bytes: 1 << 20,
            sector_bytes: 512,
            physical_sector_bytes: 4096,
            serial: String::from("one"),
            read_only: false,
            fingerprint: Some(Fingerprint::of(b"a")),
        };
        assert_eq!(saved.differences(&saved.clone()), []);
        let other = DiskIdentity {
            bytes: 2 << 20,
            sector_bytes: 4096,
            physical_sector_bytes: 8192,
            serial: String::from("two"),
            read_only: true,
            fingerprint: Some(Fingerprint::of(b"b")),
        };
        let lines: Vec<String> =
            saved.differences(&other).iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "its size is 2097152 bytes, was 1048576",
                "its sectors have 4096 bytes, had 512",
                "its physical sectors have 8192 bytes, had 4096",
                "its serial number is \"two\", was \"one\"",
                "it can only be read, could be written",
                "its first bytes have fingerprint d228cb69721a8caf78912b704e4a8d15, had \
                 d228cb696f1a8caf78912b704e4a8964",
            ]
        );
        // Without a fingerprint that was saved, there is nothing to compare; one that was is wanted.
        let none = DiskIdentity { fingerprint: None, ..saved.clone() };
        assert_eq!(none.differences(&saved), []);
        assert_eq!(saved.differences(&none).len(), 1);
    }
}
