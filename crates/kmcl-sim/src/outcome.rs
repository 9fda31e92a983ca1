//! What a world comes to.

use std::collections::BTreeMap;
use std::fmt;

use crate::log::Ends;
use crate::storage::StorageEnd;

/// The end of everything that was begun in a world. Two runs of one plan and seed that differ only in
/// their saves have the same outcome.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Outcome {
    /// Requests to the disk, by number, and how each ended.
    pub storage: BTreeMap<u64, StorageEnd>,
    /// What is on the disk, block by block.
    pub blocks: Vec<Vec<u8>>,
    /// Packets of the second device and of its driver.
    pub packets: Ends,
    /// What must not be.
    pub violations: Vec<String>,
}

impl Outcome {
    /// Whether nothing was lost, doubled or reordered.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// How this outcome differs from `other`; empty where it does not.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, same: bool, one: &dyn fmt::Debug, two: &dyn fmt::Debug| {
            if !same {
                found.push(format!("{what}: {one:?}, not {two:?}"));
            }
        };
        compare("storage", self.storage == other.storage, &self.storage, &other.storage);
        compare("packets", self.packets == other.packets, &self.packets, &other.packets);
        let differing: Vec<usize> = (0..self.blocks.len().max(other.blocks.len()))
            .filter(|&at| self.blocks.get(at) != other.blocks.get(at))
            .collect();
        compare("blocks", differing.is_empty(), &differing, &());
        compare(
            "violations",
            self.violations == other.violations,
            &self.violations,
            &other.violations,
        );
        found
    }
}
