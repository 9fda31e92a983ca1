//! Guest memory that a packet describes and does not carry: the Rust form of an MDL.

use vmbus_memory::GuestMemory;
use vmbus_wire::ranges::{GpaRange, GpaRangeIter, GpaRanges};
use vmbus_wire::{PAGE_SHIFT, PAGE_SIZE_U32};

use crate::bus::Residency;
use crate::channel::Channel;
use crate::error::Error;
use crate::flags::ExternalDataFlags;

/// The external data of one packet: checked ranges of guest RAM. The ranges are a private copy; what
/// they name is memory that the guest can change at any moment.
#[derive(Clone, Copy)]
pub struct ExternalData<'a> {
    memory: &'a GuestMemory,
    ranges: GpaRanges<'a>,
    flags: ExternalDataFlags,
}

impl<'a> ExternalData<'a> {
    /// A view of ranges that [`outside`] has found nothing wrong with.
    #[inline]
    pub(crate) fn new(
        memory: &'a GuestMemory,
        ranges: GpaRanges<'a>,
        flags: ExternalDataFlags,
    ) -> Self {
        Self { memory, ranges, flags }
    }

    /// Whether all of it is there; what is not is on its way then.
    pub(crate) fn ensure_resident(&self, residency: &dyn Residency, channel: &Channel) -> bool {
        let events = channel.events();
        // Every segment is asked for, so that they come in side by side.
        self.segments()
            .fold(true, |all, (gpa, len)| residency.ensure(gpa, u64::from(len), &events) && all)
    }

    /// The memory that the ranges name.
    #[must_use]
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Bytes of all ranges together; at least 1.
    #[must_use]
    pub fn len(&self) -> u32 {
        // Bounded by `Limits::EXTERNAL_DATA` when the packet arrived.
        u32::try_from(self.ranges.total_bytes()).unwrap_or(u32::MAX)
    }

    /// Never: a packet with external data describes at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether [`ExternalDataFlags::READ_ONLY`] was asked for.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(ExternalDataFlags::READ_ONLY)
    }

    /// The ranges as the guest described them, page by page.
    #[must_use]
    pub fn ranges(&self) -> GpaRangeIter<'a> {
        self.ranges.iter()
    }

    /// Guest physical addresses and lengths in bytes, in order, neighbouring pages of a range
    /// joined: what an I/O vector is made of.
    #[must_use]
    pub fn segments(&self) -> Segments<'a> {
        Segments { ranges: self.ranges.iter(), rest: Rest::default() }
    }

    /// Copies from byte `offset` of the data on. Returns the bytes copied: fewer than asked for at
    /// the end of the data.
    ///
    /// # Errors
    /// [`Error::NotMemory`] where the memory has gone.
    pub fn read_at(&self, offset: u32, into: &mut [u8]) -> Result<usize, Error> {
        let mut into = into;
        self.walk(offset, into.len(), |gpa, len| {
            let (part, rest) = std::mem::take(&mut into).split_at_mut(len);
            into = rest;
            self.memory.read(gpa, part).is_ok()
        })
    }

    /// Copies to byte `offset` of the data on. Returns the bytes copied: fewer than given at the end
    /// of the data.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::NotMemory`] where the memory has gone.
    pub fn write_at(&self, offset: u32, from: &[u8]) -> Result<usize, Error> {
        if self.is_read_only() {
            return Err(Error::ReadOnly);
        }
        let mut from = from;
        self.walk(offset, from.len(), |gpa, len| {
            let (part, rest) = from.split_at(len);
            from = rest;
            self.memory.write(gpa, part).is_ok()
        })
    }

    /// Calls `visit` for each piece of the `len` bytes from `offset` on, as far as there is data.
    fn walk(
        &self,
        offset: u32,
        len: usize,
        mut visit: impl FnMut(u64, usize) -> bool,
    ) -> Result<usize, Error> {
        let mut skip = offset;
        let mut left = len;
        for (gpa, segment) in self.segments() {
            if left == 0 {
                break;
            }
            if skip >= segment {
                skip -= segment;
                continue;
            }
            let piece = ((segment - skip) as usize).min(left);
            let gpa = gpa + u64::from(skip);
            if !visit(gpa, piece) {
                return Err(Error::NotMemory { gpa, len: piece as u64 });
            }
            skip = 0;
            left -= piece;
        }
        Ok(len - left)
    }
}

/// The first segment of `ranges` that is not wholly in RAM: guest physical address and bytes.
#[inline]
pub(crate) fn outside(memory: &GuestMemory, ranges: GpaRanges<'_>) -> Option<(u64, u64)> {
    for range in ranges {
        // Most guests have one or two regions, so that lowest and highest page decide for all.
        let (mut low, mut high) = (u64::MAX, 0);
        for &pfn in range.pfns {
            low = low.min(pfn);
            high = high.max(pfn);
        }
        // Page frame numbers are at most `MAX_PFN`: neither product overflows, but the sum does for
        // all pages there are.
        let span = (high.wrapping_sub(low) << PAGE_SHIFT).checked_add(PAGE_SIZE_U32.into());
        let span = span.and_then(|span| usize::try_from(span).ok());
        let within = span.is_some_and(|span| memory.slice(low << PAGE_SHIFT, span).is_ok());
        if !within {
            let outside =
                Rest::from(range).find(|&(gpa, len)| !memory.contains(gpa, u64::from(len)));
            if let Some((gpa, len)) = outside {
                return Some((gpa, u64::from(len)));
            }
        }
    }
    None
}

/// See [`ExternalData::segments`].
pub struct Segments<'a> {
    ranges: GpaRangeIter<'a>,
    rest: Rest<'a>,
}

/// What is left of a range.
#[derive(Default)]
struct Rest<'a> {
    pfns: &'a [u64],
    byte_offset: u32,
    byte_count: u32,
}

impl<'a> From<GpaRange<'a>> for Rest<'a> {
    fn from(range: GpaRange<'a>) -> Self {
        let GpaRange { byte_count, byte_offset, pfns } = range;
        Self { pfns, byte_offset, byte_count }
    }
}

impl Iterator for Rest<'_> {
    type Item = (u64, u32);

    #[inline]
    fn next(&mut self) -> Option<(u64, u32)> {
        let (&first, mut pfns) = self.pfns.split_first()?;
        let gpa = first * u64::from(PAGE_SIZE_U32) + u64::from(self.byte_offset);
        let mut len = self.byte_count.min(PAGE_SIZE_U32 - self.byte_offset);
        let mut last = first;
        while let Some((&next, rest)) = pfns.split_first() {
            if next != last + 1 {
                break;
            }
            // The pages of a range hold exactly its bytes: the sum stays within `byte_count`.
            len += (self.byte_count - len).min(PAGE_SIZE_U32);
            last = next;
            pfns = rest;
        }
        *self = Self { pfns, byte_offset: 0, byte_count: self.byte_count - len };
        Some((gpa, len))
    }
}

impl Iterator for Segments<'_> {
    type Item = (u64, u32);

    #[inline]
    fn next(&mut self) -> Option<(u64, u32)> {
        loop {
            if let Some(segment) = self.rest.next() {
                return Some(segment);
            }
            self.rest = self.ranges.next()?.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmbus_memory::GuestMemory;

    fn words(ranges: &[GpaRange<'_>]) -> Vec<u64> {
        let mut words = Vec::new();
        for range in ranges {
            words.push(range.header_word());
            words.extend_from_slice(range.pfns);
        }
        words
    }

    #[test]
    fn segments_join_neighbours_and_nothing_else() {
        for (ranges, expected) in [
            (vec![GpaRange { byte_count: 1, byte_offset: 4095, pfns: &[2] }], vec![(0x2fff, 1)]),
            (
                vec![GpaRange { byte_count: 0x1800, byte_offset: 0x900, pfns: &[2, 3, 9] }],
                vec![(0x2900, 0x700 + 0x1000), (0x9000, 0x100)],
            ),
            (
                vec![
                    GpaRange { byte_count: 0x1000, byte_offset: 0, pfns: &[1] },
                    GpaRange { byte_count: 0x800, byte_offset: 0, pfns: &[2] },
                    GpaRange { byte_count: 0x800, byte_offset: 0x801, pfns: &[2, 7] },
                ],
                vec![(0x1000, 0x1000), (0x2000, 0x800), (0x2801, 0x7ff), (0x7000, 1)],
            ),
        ] {
            let memory = GuestMemory::memfd(64 << 10).unwrap();
            let words = words(&ranges);
            let parsed = GpaRanges::parse(&words, u32::try_from(ranges.len()).unwrap()).unwrap();
            let data = ExternalData::new(&memory, parsed, ExternalDataFlags::empty());
            assert_eq!(data.segments().collect::<Vec<_>>(), expected, "{ranges:?}");
        }
    }

    #[test]
    fn reads_and_writes_cross_pages_and_end_with_the_data() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let words = words(&[GpaRange { byte_count: 0x1010, byte_offset: 0xff8, pfns: &[5, 2, 8] }]);
        let ranges = GpaRanges::parse(&words, 1).unwrap();
        let data = ExternalData::new(&memory, ranges, ExternalDataFlags::empty());
        let bytes: Vec<u8> = (0..0x1100).map(|n| u8::try_from(n % 251).unwrap()).collect();
        assert_eq!(data.write_at(0, &bytes).unwrap(), 0x1010);
        let mut back = vec![0; 0x1100];
        assert_eq!(data.read_at(0, &mut back).unwrap(), 0x1010);
        assert_eq!(back[..0x1010], bytes[..0x1010]);
        let mut part = [0; 20];
        assert_eq!(data.read_at(0x1008 - 12, &mut part).unwrap(), 20);
        assert_eq!(part[..], bytes[0x1008 - 12..0x1008 + 8]);
        assert_eq!(data.read_at(0x1010, &mut part).unwrap(), 0);
    }

    #[test]
    fn read_only_data_refuses_writes_and_pages_outside_ram_are_refused() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let words_ = words(&[GpaRange { byte_count: 16, byte_offset: 0, pfns: &[1] }]);
        let ranges = GpaRanges::parse(&words_, 1).unwrap();
        let data = ExternalData::new(&memory, ranges, ExternalDataFlags::READ_ONLY);
        assert_eq!(data.write_at(0, &[1]), Err(Error::ReadOnly));

        let words_ = words(&[GpaRange { byte_count: 0x2000, byte_offset: 0, pfns: &[15, 16] }]);
        let ranges = GpaRanges::parse(&words_, 1).unwrap();
        assert_eq!(outside(&memory, ranges), Some((0xf000, 0x2000)));
        let words_ = words(&[GpaRange { byte_count: 0x2001, byte_offset: 1, pfns: &[3, 16, 2] }]);
        let ranges = GpaRanges::parse(&words_, 1).unwrap();
        assert_eq!(outside(&memory, ranges), Some((0x10000, 0x1000)));
    }
}
