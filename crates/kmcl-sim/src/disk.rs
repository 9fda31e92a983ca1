//! The disk: a medium whose time is the world's, and on which the seed decides how long each request
//! takes, in which parts it lands, and whether it lets itself be cancelled.
//!
//! The medium outlives the host. What a host has begun and nobody has seen the end of goes on without
//! it, as it does in a kernel or on a network: it may still land when another host has taken over.

use std::time::Duration;

use rustix::io::Errno;
use vsp_storage::block::{Fate, IoError, IoOperation, TestIo, TestMedium, TestTime};

use crate::rng::Rng;

/// Bytes of a block: the unit in which the disk is written and judged.
pub(crate) const BLOCK_BYTES: u32 = 512;

/// Blocks of the disk.
pub(crate) const BLOCKS: u64 = 64;

/// The block that cannot be read.
const BAD_BLOCK: u64 = 13;

/// One tick of the world's clock.
const TICK: Duration = Duration::from_micros(1);

/// A medium whose requests end as chance has it.
pub(crate) fn new_medium(mut rng: Rng, is_slow: bool) -> TestMedium {
    let bytes = BLOCKS * u64::from(BLOCK_BYTES);
    let medium = TestMedium::new(bytes, TestTime::Simulated).expect("memory for a disk");
    let slots = [2, 8, 256][rng.index(3)];
    medium.set_slots(if is_slow { 256 } else { slots });
    medium.choose_fates(move |io| fate(&mut rng, is_slow, io));
    medium
}

fn fate(rng: &mut Rng, is_slow: bool, io: &TestIo) -> Fate {
    let ticks = match is_slow {
        false => rng.delay(),
        true if rng.once_in(4) => rng.between(1000, 4000),
        true => rng.between(5, 60),
    };
    let ticks = u32::try_from(ticks).unwrap_or(0);
    let bad = BAD_BLOCK * u64::from(BLOCK_BYTES);
    let hits_bad_block = (io.offset..io.offset + io.bytes).contains(&bad);
    let result = match io.operation {
        IoOperation::Read if hits_bad_block => Err(IoError::Read { at: bad, errno: Errno::IO }),
        _ => Ok(()),
    };
    Fate {
        // Nothing of a request that fails is there: what is in its last part does not land.
        parts: if result.is_err() { 1 } else { u32::try_from(rng.between(1, 3)).unwrap_or(1) },
        backwards: rng.once_in(2),
        result,
        can_cancel: !rng.once_in(3) && !is_slow,
        ..Fate::after(TICK * ticks)
    }
}

/// Lets the medium come to the time `now`, in ticks.
pub(crate) fn advance(medium: &TestMedium, now: u64) {
    medium.advance(at(now).saturating_sub(medium.now()));
}

/// When something happens on the medium next, in ticks.
pub(crate) fn next_at(medium: &TestMedium) -> Option<u64> {
    let next = medium.next_at()?.as_nanos().div_ceil(TICK.as_nanos());
    Some(u64::try_from(next).unwrap_or(u64::MAX))
}

/// Lets everything on the medium end.
pub(crate) fn settle(medium: &TestMedium) {
    while let Some(next) = medium.next_at() {
        medium.advance(next.saturating_sub(medium.now()));
    }
}

/// What is in a block of the disk.
pub(crate) fn block(medium: &TestMedium, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let read = medium.contents().read(block * u64::from(BLOCK_BYTES), &mut bytes);
    read.expect("the block is on the disk");
    bytes
}

fn at(now: u64) -> Duration {
    TICK * u32::try_from(now).unwrap_or(u32::MAX)
}
