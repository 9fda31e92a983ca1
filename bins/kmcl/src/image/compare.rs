//! Where two byte strings part, and checksums of long ones.

/// Index of the first byte in which `a` and `b` differ; a shorter one differs where it ends.
pub(crate) fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None; // one pass of vector instructions, and nearly always the answer
    }
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    Some(same)
}

/// A CRC-32C over everything that was shown to it, in order, and how much that was.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Checksum {
    crc32c: u32,
    bytes: u64,
}

impl Checksum {
    /// Adds `data` at the end.
    pub(crate) fn add(&mut self, data: &[u8]) {
        self.crc32c = crc32c::crc32c_append(self.crc32c, data);
        self.bytes += data.len() as u64;
    }

    /// How many bytes were added.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.crc32c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        for (a, b, expected) in [
            (&b"same"[..], &b"same"[..], None),
            (b"", b"", None),
            (b"abc", b"abd", Some(2)),
            (b"xbc", b"abc", Some(0)),
            (b"ab", b"abc", Some(2)),
            (b"abc", b"", Some(0)),
        ] {
            assert_eq!(first_difference(a, b), expected, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_checksum_does_not_depend_on_how_the_data_is_cut() {
        let data = b"123456789";
        let mut whole = Checksum::default();
        whole.add(data);
        // The check value of CRC-32C in RFC 3720, appendix B.4, and every catalogue of CRCs.
        assert_eq!(whole.to_string(), "e3069283");
        for cut in 0..=data.len() {
            let mut cut_in_two = Checksum::default();
            cut_in_two.add(&data[..cut]);
            cut_in_two.add(&data[cut..]);
            assert_eq!(cut_in_two, whole, "cut at {cut}");
        }
        assert_eq!(whole.bytes(), 9);
    }
}
