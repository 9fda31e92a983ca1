//! Holding single numbers of a record against what they may be.

use vmbus_wire::version::Version;

use crate::limits::{MAX_SAVED_SERIAL, SINT_COUNT};
use crate::outgoing::SlotId;
use crate::saved::error::{Misfit, RestoreError};

/// A record in its chunk, to say where something is wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) chunk: u32,
    pub(super) record: &'static str,
}

type Checked<T = ()> = Result<T, RestoreError>;

impl Place {
    #[cold]
    pub(super) fn wrong(self, field: &'static str, why: Misfit) -> RestoreError {
        let Self { chunk, record } = self;
        RestoreError::Field { chunk, record, field, why }
    }

    #[inline]
    pub(super) fn range(
        self,
        field: &'static str,
        found: u64,
        least: u64,
        most: u64,
    ) -> Checked<u64> {
        if (least..=most).contains(&found) {
            Ok(found)
        } else {
            Err(self.wrong(field, Misfit::Range { found, least, most }))
        }
    }

    /// A count of at most `most`.
    #[inline]
    pub(super) fn count(self, field: &'static str, found: u32, most: usize) -> Checked {
        self.range(field, u64::from(found), 0, most as u64).map(drop)
    }

    #[inline]
    pub(super) fn half_word(self, field: &'static str, found: u32) -> Checked<u16> {
        let (least, most) = (0, u64::from(u16::MAX));
        let wrong = || self.wrong(field, Misfit::Range { found: found.into(), least, most });
        u16::try_from(found).map_err(|_| wrong())
    }

    #[inline]
    pub(super) fn serial(self, field: &'static str, found: u64) -> Checked<u64> {
        self.range(field, found, 0, MAX_SAVED_SERIAL)
    }

    pub(super) fn version(self, field: &'static str, found: u32) -> Checked<Version> {
        let unknown = || self.wrong(field, Misfit::Unknown { found: found.into() });
        Version::from_wire(found).ok_or_else(unknown)
    }

    #[inline]
    pub(super) fn vp(self, field: &'static str, vp: u32, vp_count: u32) -> Checked<u32> {
        if vp < vp_count {
            return Ok(vp);
        }
        let (found, most) = (vp.into(), vp_count.saturating_sub(1).into());
        Err(self.wrong(field, Misfit::Range { found, least: 0, most }))
    }

    /// A message slot. The one that messages go to before a guest has named any need not be there.
    #[inline]
    pub(super) fn slot(
        self,
        (vp_field, vp): (&'static str, u32),
        (sint_field, sint): (&'static str, u32),
        vp_count: u32,
    ) -> Checked<SlotId> {
        let most = u64::from(SINT_COUNT) - 1;
        let wrong = || Misfit::Range { found: sint.into(), least: 0, most };
        let sint = u8::try_from(sint).ok().filter(|sint| *sint < SINT_COUNT);
        let slot = SlotId { vp, sint: sint.ok_or_else(|| self.wrong(sint_field, wrong()))? };
        if slot != SlotId::DEFAULT {
            self.vp(vp_field, vp, vp_count)?;
        }
        Ok(slot)
    }

    /// Numbers that must be behind those of the record before.
    #[inline]
    pub(super) fn behind(self, field: &'static str, found: u64, is_behind: bool) -> Checked {
        if is_behind { Ok(()) } else { Err(self.wrong(field, Misfit::Order { found })) }
    }

    /// Fields that `other` says are not there: `(name, whether it is)`.
    #[inline]
    pub(super) fn absent(self, fields: &[(&'static str, bool)], other: &'static str) -> Checked {
        match fields.iter().find(|(_, is_there)| *is_there) {
            None => Ok(()),
            Some((field, _)) => Err(self.wrong(field, Misfit::Contradiction { other })),
        }
    }
}
