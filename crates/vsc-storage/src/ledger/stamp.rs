//! What a stamped block looks like, and what a block that was read turns out to be.

use vmbus_wire::PAGE_SIZE_U32;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a line: the unit in which a tear within a block is seen.
pub(super) const LINE_BYTES: usize = 64;

/// Bytes of a block may be a power of two from one line up to this.
pub(super) const MAX_BLOCK_BYTES: u32 = 16 * PAGE_SIZE_U32;

/// A block consists of lines, each of which says on its own where it belongs and who wrote it.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Unaligned,
)]
struct Line {
    seed: U64,
    /// Number of the write, from 1 on.
    write: U64,
    /// Number of the block on the disk.
    block: U64,
    /// Number of the line in the block.
    line: U64,
    /// Follows from the rest.
    check: [U64; 4],
}

const _: () = assert!(size_of::<Line>() == LINE_BYTES);

/// Every bit of the result depends on every bit of `word`: the last steps of MurmurHash3, which are
/// a bijection.
const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let word = (word ^ (word >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ (word >> 33)
}

impl Line {
    fn new(seed: u64, write: u64, block: u64, line: u64) -> Self {
        let mut state = 0x6b6d_636c_6c69_6e65; // zeroes must not be a line of anything
        for word in [seed, write, block, line] {
            state = mix(state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
        let check = std::array::from_fn(|_| {
            state = mix(state).wrapping_add(0x9e37_79b9_7f4a_7c15);
            U64::new(state)
        });
        let [seed, write, block, line] = [seed, write, block, line].map(U64::new);
        Self { seed, write, block, line, check }
    }
}

/// Who wrote a line, as far as the line says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Writer {
    /// Nobody yet: zeroes.
    Nobody,
    /// The write with this number.
    Write(u64),
    /// It is not a stamp.
    Unknown,
}

impl std::fmt::Display for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nobody => f.write_str("zeroes"),
            Self::Write(write) => write!(f, "write {write}"),
            Self::Unknown => f.write_str("bytes that nobody wrote"),
        }
    }
}

/// What the bytes of a block are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Content {
    /// Zeroes throughout.
    Nothing,
    /// Write `write` of this ledger, of block `block`, whole.
    Whole { write: u64, block: u64 },
    /// Lines of one writer up to byte `byte`, and of another from there on.
    Torn { byte: usize, before: Writer, after: Writer },
    /// The line at byte `byte` belongs to byte `home` of block `block`.
    Shifted { byte: usize, write: u64, block: u64, home: u64 },
    /// A stamp of the ledger with this seed.
    OtherSeed { seed: u64 },
    /// Not a stamp from the first line on.
    Unknown,
}

/// What one line is.
enum Reading {
    Zeroes,
    Stamp(Line),
    Unknown,
}

fn read_line(bytes: &[u8]) -> Reading {
    if bytes.iter().all(|byte| *byte == 0) {
        return Reading::Zeroes;
    }
    match Line::read_from_bytes(bytes) {
        Ok(line)
            if line
                == Line::new(
                    line.seed.get(),
                    line.write.get(),
                    line.block.get(),
                    line.line.get(),
                ) =>
        {
            Reading::Stamp(line)
        }
        _ => Reading::Unknown,
    }
}

/// Stamps `bytes`, whole lines, as block `block` of write `write`.
pub(super) fn stamp(seed: u64, write: u64, block: u64, bytes: &mut [u8]) {
    for (line, bytes) in (0..).zip(bytes.chunks_exact_mut(LINE_BYTES)) {
        bytes.copy_from_slice(Line::new(seed, write, block, line).as_bytes());
    }
}

/// What `bytes`, whole lines, are in a ledger with this seed.
pub(super) fn read(seed: u64, bytes: &[u8]) -> Content {
    let mut first = None;
    let lines = (0_u64..).zip(bytes.chunks_exact(LINE_BYTES));
    for ((number, bytes), at) in lines.zip((0..).step_by(LINE_BYTES)) {
        let (writer, place) = match read_line(bytes) {
            Reading::Zeroes => (Writer::Nobody, None),
            Reading::Unknown => (Writer::Unknown, None),
            Reading::Stamp(line) if line.seed.get() != seed => {
                return Content::OtherSeed { seed: line.seed.get() };
            }
            Reading::Stamp(line) => {
                let (write, block) = (line.write.get(), line.block.get());
                if line.line.get() != number {
                    let home = line.line.get().wrapping_mul(LINE_BYTES as u64);
                    return Content::Shifted { byte: at, write, block, home };
                }
                (Writer::Write(write), Some((write, block)))
            }
        };
        match first {
            None => first = Some((writer, place)),
            Some(before) if before == (writer, place) => {}
            Some((before, _)) => return Content::Torn { byte: at, before, after: writer },
        }
    }
    match first {
        Some((Writer::Nobody, _)) => Content::Nothing,
        Some((_, Some((write, block)))) => Content::Whole { write, block },
        _ => Content::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(write: u64, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        stamp(7, write, block, &mut bytes);
        bytes
    }

    #[test]
    fn a_block_says_what_it_is() {
        let torn = [&block(3, 5)[..192], &block(4, 5)[192..]].concat();
        let half = [&block(3, 5)[..256], &[0; 256]].concat();
        let late = [&[0; 256], &block(3, 5)[256..]].concat();
        let shifted = [&block(3, 5)[64..], &block(3, 6)[..64]].concat();
        let mut damaged = block(3, 5);
        damaged[511] ^= 1;
        let two_blocks = [&block(3, 5)[..64], &block(3, 6)[64..]].concat();
        for (bytes, expected) in [
            (vec![0; 512], Content::Nothing),
            (block(3, 5), Content::Whole { write: 3, block: 5 }),
            (torn, Content::Torn { byte: 192, before: Writer::Write(3), after: Writer::Write(4) }),
            (half, Content::Torn { byte: 256, before: Writer::Write(3), after: Writer::Nobody }),
            (late, Content::Torn { byte: 256, before: Writer::Nobody, after: Writer::Write(3) }),
            (shifted, Content::Shifted { byte: 0, write: 3, block: 5, home: 64 }),
            (
                damaged,
                Content::Torn { byte: 448, before: Writer::Write(3), after: Writer::Unknown },
            ),
            (
                two_blocks,
                Content::Torn { byte: 64, before: Writer::Write(3), after: Writer::Write(3) },
            ),
            (vec![0xa5; 512], Content::Unknown),
            (Vec::new(), Content::Unknown),
        ] {
            assert_eq!(read(7, &bytes), expected);
        }
        assert_eq!(read(8, &block(3, 5)), Content::OtherSeed { seed: 7 });
    }

    proptest! {
        /// A block is whole only where every byte of it is what was stamped.
        #[test]
        fn no_damage_passes(write in 1_u64.., number: u64, at in 0_usize..4096, flip in 1_u8..) {
            let mut bytes = vec![0; 4096];
            stamp(7, write, number, &mut bytes);
            prop_assert_eq!(read(7, &bytes), Content::Whole { write, block: number });
            bytes[at] ^= flip;
            let passes = matches!(read(7, &bytes), Content::Whole { .. } | Content::Nothing);
            prop_assert!(!passes);
        }
    }
}
