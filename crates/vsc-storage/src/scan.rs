//! Finding the disks of a controller.

use vstor_wire::scsi::inquiry::PERIPHERAL_ABSENT;
use vstor_wire::scsi::luns::parse_lun_list;
use vstor_wire::scsi::vpd;
use vstor_wire::srb::ScsiAddress;

use crate::client::StorageClient;
use crate::disk::{DiskInfo, parse_inquiry, parse_page_list};
use crate::error::Error;

/// Paths and targets that guests look at.
///
/// Source: devices, section 1: paths 0 to 7, targets 0 and 1.
const PATHS: std::ops::Range<u8> = 0..8;
const TARGETS: std::ops::Range<u8> = 0..2;

impl StorageClient {
    /// Looks for disks at every address a controller can have, and asks each what it is. What is
    /// there and is no disk is passed over.
    ///
    /// # Errors
    /// [`Error::Timeout`] and the failure of the client; an address that refuses to answer is one
    /// without disks.
    pub fn scan(&mut self) -> Result<Vec<DiskInfo>, Error> {
        let mut disks = Vec::new();
        for path in PATHS {
            for target in TARGETS {
                self.scan_target(ScsiAddress::new(path, target, 0), &mut disks)?;
            }
        }
        Ok(disks)
    }

    fn scan_target(&mut self, target: ScsiAddress, disks: &mut Vec<DiskInfo>) -> Result<(), Error> {
        let Some(list) = present(self.report_luns(target))? else { return Ok(()) };
        for lun in parse_lun_list(&list) {
            let address = ScsiAddress { lun, ..target };
            if disks.iter().any(|disk| disk.address == address) {
                continue; // a list that names it twice
            }
            if let Some(disk) = present(self.identify(address))?.flatten() {
                disks.push(disk);
            }
        }
        Ok(())
    }

    /// Asks one logical unit what it is: `None` for one that is no disk.
    ///
    /// # Errors
    /// [`Error::Scsi`] where it refuses to say, [`Error::BlockSize`] and [`Error::ShortData`] where
    /// what it says makes no disk; [`Error::Timeout`]; the failure of the client.
    pub fn identify(&mut self, address: ScsiAddress) -> Result<Option<DiskInfo>, Error> {
        let standard = self.inquiry(address, None)?;
        if standard.first() == Some(&PERIPHERAL_ABSENT) {
            return Ok(None);
        }
        let Some(mut disk) = parse_inquiry(address, &standard) else { return Ok(None) };
        // Pages are optional: a disk without them is a disk.
        if let Some(list) = present(self.inquiry(address, Some(vpd::SUPPORTED_PAGES)))? {
            for page in vpd::PAGES {
                if page != vpd::SUPPORTED_PAGES
                    && parse_page_list(&list).contains(&page)
                    && let Some(data) = present(self.inquiry(address, Some(page)))?
                {
                    disk.take_page(page, &data);
                }
            }
        }
        let large = disk.take_capacity_10(&self.read_capacity_10(address)?)?;
        match present(self.read_capacity_16(address))? {
            Some(data) => disk.take_capacity_16(&data)?,
            None if large => return Err(Error::ShortData { opcode: 0x9e, got: 0, needed: 32 }),
            None => {}
        }
        if let Some(data) = present(self.mode_sense(address))? {
            disk.take_mode(&data);
        }
        Ok(Some(disk))
    }
}

/// `None` for what a device does not have or does not want to say; other errors stay.
fn present<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(Error::Scsi(_) | Error::BlockSize(_) | Error::ShortData { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
