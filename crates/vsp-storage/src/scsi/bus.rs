//! The LUNs of a controller, and the commands that concern them all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vstor_wire::scsi::cdb::{CdbError, Command};
use vstor_wire::scsi::inquiry::StandardInquiry;
use vstor_wire::scsi::luns::{LunEntry, LunListHeader};
use vstor_wire::scsi::sense::{AdditionalSense, FieldPointer, SenseData, SenseKey};
use vstor_wire::srb::ScsiAddress;
use zerocopy::IntoBytes;

use super::{Answer, ByteRange, Data, Page, Plan, plan, reply};
use crate::disk::Disk;

/// Buses of a controller; guests look no further.
pub const MAX_PATHS: u8 = 8;

/// Targets on a bus; guests look no further.
pub const MAX_TARGETS: u8 = 2;

/// LUNs of a target; guests look no further.
pub const MAX_LUNS: u16 = 255;

/// Bytes of the longest list of LUNs.
const MAX_LIST_BYTES: usize =
    size_of::<LunListHeader>() + MAX_LUNS as usize * size_of::<LunEntry>();

/// The one unit attention condition that there is.
pub(crate) const UNIT_ATTENTION: AdditionalSense = AdditionalSense::REPORTED_LUNS_DATA_HAS_CHANGED;

const LUNS_CHANGED: SenseData = SenseData::new(SenseKey::UnitAttention, UNIT_ATTENTION);

/// A disk at its address.
pub(crate) struct Lun {
    pub(crate) address: ScsiAddress,
    pub(crate) disk: Arc<Disk>,
    /// Which attachment of its controller this is: an address may get another disk.
    pub(crate) attachment: u64,
    /// The next command is refused once, so that the guest learns that its neighbours have changed.
    luns_changed: AtomicBool,
}

/// The LUNs of a controller at one time. A change makes a new table, so that a reader needs no lock.
#[derive(Clone, Default)]
pub(crate) struct LunTable {
    /// Sorted by address.
    luns: Vec<Arc<Lun>>,
}

/// Why the table of LUNs cannot be changed that way.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LunError {
    /// Guests would not find it there.
    #[error(
        "LUN {address} is out of reach: a controller has {MAX_PATHS} paths of {MAX_TARGETS} targets of {MAX_LUNS} LUNs"
    )]
    OutOfReach {
        /// What was asked for.
        address: ScsiAddress,
    },
    /// Another disk is there.
    #[error("LUN {address} is taken")]
    Taken {
        /// What was asked for.
        address: ScsiAddress,
    },
    /// The controller is frozen or being saved: what has to be saved must not change.
    #[error("LUN {address} cannot change while the controller is frozen")]
    Frozen {
        /// What was asked for.
        address: ScsiAddress,
    },
    /// The disk is attached already, perhaps to another controller, or has requests to finish.
    #[error("the disk for LUN {address} is attached elsewhere")]
    InUse {
        /// Where it was to be.
        address: ScsiAddress,
    },
    /// There is no disk.
    #[error("there is no disk at LUN {address}")]
    Empty {
        /// What was asked for.
        address: ScsiAddress,
    },
}

impl LunTable {
    /// The table with one more disk.
    pub(crate) fn attach(&self, lun: Arc<Lun>) -> Result<Self, LunError> {
        let address = lun.address;
        if address.path >= MAX_PATHS
            || address.target >= MAX_TARGETS
            || u16::from(address.lun) >= MAX_LUNS
        {
            return Err(LunError::OutOfReach { address });
        }
        let Err(place) = self.find(address) else {
            return Err(LunError::Taken { address });
        };
        let mut table = self.clone();
        table.tell_target(address);
        table.luns.insert(place, lun);
        Ok(table)
    }

    /// The table with one disk less, and what was there.
    pub(crate) fn detach(&self, address: ScsiAddress) -> Result<(Self, Arc<Lun>), LunError> {
        let place = self.find(address).map_err(|_| LunError::Empty { address })?;
        let mut table = self.clone();
        let gone = table.luns.remove(place);
        table.tell_target(address);
        Ok((table, gone))
    }

    pub(crate) fn get(&self, address: ScsiAddress) -> Option<&Arc<Lun>> {
        self.find(address).ok().and_then(|place| self.luns.get(place))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Lun>> {
        self.luns.iter()
    }

    #[inline]
    fn find(&self, address: ScsiAddress) -> Result<usize, usize> {
        self.luns.binary_search_by_key(&address, |lun| lun.address)
    }

    /// The LUNs of the target that `address` names.
    fn target(&self, address: ScsiAddress) -> impl Iterator<Item = &Arc<Lun>> {
        self.luns.iter().filter(move |lun| {
            (lun.address.path, lun.address.target) == (address.path, address.target)
        })
    }

    /// Lets the LUNs of a target report that the list of them has changed.
    fn tell_target(&self, address: ScsiAddress) {
        for lun in self.target(address) {
            lun.luns_changed.store(true, Ordering::Relaxed);
        }
    }

    /// Forgets what the LUNs have to report: a guest that is new has seen nothing else.
    pub(crate) fn forget_changes(&self) {
        for lun in &self.luns {
            lun.take_attention();
        }
    }

    /// What a command to `address` comes to. The disk it is for comes along, if there is one.
    #[inline]
    pub(crate) fn plan(
        &self,
        address: ScsiAddress,
        command: Result<Command, CdbError>,
        data: &Data<'_>,
        ranges: &mut Vec<ByteRange>,
    ) -> (Plan, Option<&Arc<Lun>>) {
        let lun = self.get(address);
        let answer = match (command, lun) {
            (Ok(Command::ReportLuns { select, allocation }), _) => {
                self.report_luns(address, data, select, allocation)
            }
            (Ok(Command::Inquiry { page: None, allocation }), None) => {
                let absent = StandardInquiry::absent(address.lun);
                reply(data, absent.as_bytes(), u32::from(allocation))
            }
            (_, None) => Answer::no_lun(),
            (Ok(Command::RequestSense { descriptor_format, allocation }), Some(lun)) => {
                request_sense(lun, data, descriptor_format, allocation)
            }
            (Ok(command), Some(lun)) => {
                // A guest that asks who is there gets to know anyway.
                let asks = matches!(command, Command::Inquiry { .. });
                if !asks && lun.take_attention() {
                    Answer::check(LUNS_CHANGED)
                } else {
                    return (plan(&command, lun.disk.profile(), data, ranges), Some(lun));
                }
            }
            (Err(error), Some(_)) => Answer::check(error.sense()),
        };
        (Plan::Answer(answer), lun)
    }

    fn report_luns(
        &self,
        address: ScsiAddress,
        data: &Data<'_>,
        select: u8,
        allocation: u32,
    ) -> Answer {
        let entries = match select {
            0 | 2 => usize::MAX,
            1 => 0, // only well known LUNs, of which there are none
            _ => return Answer::invalid_field(FieldPointer::cdb(2).with_bit(7)),
        };
        let luns = || self.target(address).take(entries);
        let mut page = Page::<MAX_LIST_BYTES>::new();
        let count = u8::try_from(luns().count()).unwrap_or(u8::MAX);
        page.push(LunListHeader::new(count).as_bytes());
        for lun in luns() {
            page.push(LunEntry::new(lun.address.lun).as_bytes());
            lun.take_attention();
        }
        reply(data, page.as_slice(), allocation)
    }
}

impl Lun {
    /// `disk` at `address`, as the `attachment`th.
    pub(crate) fn new(address: ScsiAddress, disk: Arc<Disk>, attachment: u64) -> Arc<Self> {
        Arc::new(Self { address, disk, attachment, luns_changed: AtomicBool::new(false) })
    }

    /// Whether the guest is yet to be told of changed neighbours.
    pub(crate) fn has_attention(&self) -> bool {
        self.luns_changed.load(Ordering::Relaxed)
    }

    pub(crate) fn set_attention(&self, has_attention: bool) {
        self.luns_changed.store(has_attention, Ordering::Relaxed);
    }

    /// Whether the guest is to be told of changed neighbours; from now on it is not.
    fn take_attention(&self) -> bool {
        // The load keeps the usual case free of writes to a shared cache line.
        self.luns_changed.load(Ordering::Relaxed)
            && self.luns_changed.swap(false, Ordering::Relaxed)
    }
}

/// REQUEST SENSE: what is pending; errors of commands have been reported with them.
fn request_sense(lun: &Lun, data: &Data<'_>, descriptor_format: bool, allocation: u8) -> Answer {
    let sense = if lun.take_attention() { LUNS_CHANGED } else { SenseData::NONE };
    if descriptor_format {
        reply(data, &sense.to_descriptor(), u32::from(allocation))
    } else {
        reply(data, &sense.to_fixed(), u32::from(allocation))
    }
}
