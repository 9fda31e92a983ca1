//! Byte-exact vectors of every message, put down offset by offset from the layouts of vmbus-wire
//! section 3; what is refused; and what holds for all bytes.

mod forms;
mod gpadls;
mod properties;
mod refusals;
mod vectors;

use std::vec;
use std::vec::Vec;

use super::*;
use crate::version::{FeatureFlags, Negotiated, Version};

/// A message of `size` bytes, zero but for what `parts` put at their offsets.
fn wire(size: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for &(offset, part) in parts {
        bytes[offset..offset + part.len()].copy_from_slice(part);
    }
    bytes
}

/// Version 5.3, without features as everything below 6.0.
const V5_3: Option<Negotiated> = Some((Version::V5_3, FeatureFlags::empty()));

/// Version 6.0 with these features.
fn v6_0(features: FeatureFlags) -> Option<Negotiated> {
    Some((Version::V6_0, features))
}

/// A few of the things that may be negotiated: every version, the newest also with each feature and
/// with all of them.
fn negotiations() -> Vec<Option<Negotiated>> {
    let plain = Version::ALL.map(|version| Some((version, FeatureFlags::empty())));
    let with_features = (0..8).map(|bit| v6_0(FeatureFlags::from_bits_retain(1 << bit)));
    let mut all = vec![None, v6_0(FeatureFlags::all())];
    all.extend(plain);
    all.extend(with_features);
    all
}
