//! What KVM counts of a VM and of a vCPU: exits, interrupts and so on, by name.
//!
//! Source: KVM's interface (`KVM_GET_STATS_FD` in `Documentation/virt/kvm/api.rst` in Linux). Linux 5.14 and
//! later.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::kvm;

/// Most bytes of a name, its end included. KVM's have 48.
const MAX_NAME_BYTES: u32 = 256;
/// Most counters of one VM or vCPU. KVM has below a hundred.
const MAX_COUNTERS: u32 = 4096;
/// Most values of one counter, a histogram's.
const MAX_VALUES: u16 = 1024;

/// The counters of a VM or a vCPU: where each is. Their values are read as often as one likes, also while a
/// vCPU runs.
#[derive(Debug)]
pub struct Statistics {
    file: File,
    data_offset: u32,
    counters: Vec<Counter>,
}

#[derive(Debug)]
struct Counter {
    name: String,
    offset: u32,
    values: u16,
}

/// The beginning of the file.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct Header {
    _flags: u32,
    name_size: u32,
    num_desc: u32,
    _id_offset: u32,
    desc_offset: u32,
    data_offset: u32,
}

/// What is told of each counter, before its name.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct Descriptor {
    _flags: u32,
    _exponent: i16,
    size: u16,
    offset: u32,
    _bucket_size: u32,
}

impl Statistics {
    /// Those of a VM or a vCPU. To be asked for while it does not run: KVM answers when it has stopped.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidData`] of a file that is not as it should be.
    pub fn of(vm_or_vcpu: &impl AsRawFd) -> io::Result<Self> {
        Self::from_file(kvm::statistics(vm_or_vcpu)?)
    }

    fn from_file(file: File) -> io::Result<Self> {
        let mut bytes = [0; size_of::<Header>()];
        file.read_exact_at(&mut bytes, 0)?;
        let header = Header::read_from_bytes(&bytes).map_err(|_| invalid("a header"))?;
        if header.name_size > MAX_NAME_BYTES || header.num_desc > MAX_COUNTERS {
            return Err(invalid("the number of counters"));
        }
        let name_bytes = header.name_size as usize;
        let each = size_of::<Descriptor>() + name_bytes;
        let mut bytes = vec![0; each * header.num_desc as usize];
        file.read_exact_at(&mut bytes, header.desc_offset.into())?;
        let counters = bytes.chunks_exact(each).map(|bytes| {
            let (descriptor, name) =
                Descriptor::read_from_prefix(bytes).map_err(|_| invalid("a descriptor"))?;
            if descriptor.size > MAX_VALUES {
                return Err(invalid("the number of values"));
            }
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            Ok(Counter { name, offset: descriptor.offset, values: descriptor.size })
        });
        let counters = counters.collect::<io::Result<_>>()?;
        Ok(Self { file, data_offset: header.data_offset, counters })
    }

    /// The present values by name; of a histogram the sum.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self) -> io::Result<BTreeMap<&str, u64>> {
        let mut buffer = [0; 8 * MAX_VALUES as usize];
        let mut values = BTreeMap::new();
        for Counter { name, offset, values: count } in &self.counters {
            let bytes = buffer.get_mut(..usize::from(*count) * 8).unwrap_or_default();
            self.file.read_exact_at(bytes, u64::from(self.data_offset) + u64::from(*offset))?;
            let (words, _) = bytes.as_chunks::<8>();
            let sum =
                words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)));
            values.insert(name.as_str(), sum);
        }
        Ok(values)
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("KVM's statistics: {what}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file as KVM shows it, with names of eight bytes: one counter, one histogram of two.
    fn file(change: impl FnOnce(&mut Vec<u8>)) -> File {
        let mut bytes = Vec::new();
        let words = [0_u32, 8, 2, 24, 32, 80];
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes.extend(*b"kvm-1\0\0\0");
        for (size, offset, name) in [(1_u16, 8_u32, b"exits\0\0\0"), (2, 16, b"waits\0xx")] {
            bytes.extend([0; 6]);
            bytes.extend(size.to_ne_bytes());
            bytes.extend(offset.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
        }
        [0_u64, 77, 1, 2].iter().for_each(|value| bytes.extend(value.to_ne_bytes()));
        change(&mut bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn counters_are_found_by_their_names() {
        let statistics = Statistics::from_file(file(|_| {})).unwrap();
        assert_eq!(statistics.read().unwrap(), BTreeMap::from([("exits", 77), ("waits", 3)]));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        type Change = fn(&mut Vec<u8>);
        let rows: [(&str, Change); 5] = [
            ("nothing", Vec::clear),
            ("cut in a descriptor", |bytes| bytes.truncate(70)),
            ("names of 4 GiB", |bytes| bytes[4..8].fill(0xff)),
            ("four billion counters", |bytes| bytes[8..12].fill(0xff)),
            ("a histogram of 65535", |bytes| bytes[38..40].fill(0xff)),
        ];
        for (what, change) in rows {
            assert!(Statistics::from_file(file(change)).is_err(), "{what}");
        }
        let far = Statistics::from_file(file(|bytes| bytes[40..44].fill(0xff))).unwrap();
        assert!(far.read().is_err(), "a value beyond the end");
    }
}
