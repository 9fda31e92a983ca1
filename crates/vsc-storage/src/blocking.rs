//! Calls that do one thing and return when it is done. They drive the client while they wait;
//! completions of requests submitted before stay where they are.

use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::scsi::cdb::{Cdb, Command};
use vstor_wire::scsi::unmap::{UnmapDescriptor, UnmapHeader};
use vstor_wire::srb::{DataDirection, ScsiAddress, ScsiRequest};
use zerocopy::IntoBytes;

use crate::client::StorageClient;
use crate::disk::DiskInfo;
use crate::error::Error;
use crate::pipeline::Extent;
use crate::request::Request;

/// What a reset ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reset {
    /// What one logical unit is doing.
    Lun(ScsiAddress),
    /// What one bus of the controller is doing.
    Bus(u8),
    /// What the whole controller is doing.
    Adapter,
}

/// The data of one command.
#[derive(Debug)]
pub enum Data<'a> {
    /// There is none.
    None,
    /// The device's data goes here.
    In(&'a mut [u8]),
    /// This goes to the device.
    Out(&'a [u8]),
}

impl StorageClient {
    /// Performs one command. Returns the bytes that were moved, which may be fewer than asked for.
    ///
    /// # Errors
    /// [`Error::Scsi`] where the device refuses or fails; [`Error::TransferTooLong`];
    /// [`Error::Timeout`]; the failure of the client.
    pub fn execute(&mut self, lun: ScsiAddress, cdb: &Cdb, data: Data<'_>) -> Result<u32, Error> {
        self.ready()?;
        let limit = self.max_transfer_bytes();
        let length = match &data {
            Data::None => 0,
            Data::In(into) => into.len(),
            Data::Out(from) => from.len(),
        };
        let bytes = u32::try_from(length).unwrap_or(u32::MAX);
        if bytes > limit {
            return Err(Error::TransferTooLong { asked: bytes, limit });
        }
        let mut request = Request::new(lun, *cdb);
        if bytes > 0 {
            let buffer = self.take_buffer(bytes)?;
            request = match &data {
                Data::Out(from) => {
                    buffer.copy_from(from)?;
                    request.writing(buffer, 0, bytes)
                }
                // A server that moves less than it says must not show what was there before.
                _ => {
                    buffer.slice()?.fill(0);
                    request.reading(buffer, 0, bytes)
                }
            };
        }
        let call = self.requests.begin_call();
        let mut request = Some(request);
        self.submit_owned(Some(call), || request.take()).map_err(|refused| refused.error)?;
        if request.is_some() {
            return Err(Error::QueueFull { depth: self.queue_depth() });
        }
        self.wait_call_end()?;
        let end = self.requests.next_call_end().ok_or(Error::NotReady)?;
        if let Some(buffer) = end.buffer {
            if let (Data::In(into), Ok(_)) = (data, &end.result) {
                buffer.copy_to(into)?;
            }
            self.put_buffer(buffer);
        }
        end.result
    }

    /// As [`Self::execute`], with the data in a vector as long as what was moved.
    fn fetch(&mut self, lun: ScsiAddress, command: Command, room: u16) -> Result<Vec<u8>, Error> {
        let mut data = vec![0; usize::from(room)];
        let moved = self.execute(lun, &command.encode()?, Data::In(&mut data))?;
        data.truncate(moved as usize);
        Ok(data)
    }

    /// The data of INQUIRY: the standard data, or a page of vital product data.
    ///
    /// # Errors
    /// Those of [`Self::execute`].
    pub fn inquiry(&mut self, lun: ScsiAddress, page: Option<u8>) -> Result<Vec<u8>, Error> {
        const ROOM: u16 = 252; // the longest that any device understands is 255
        self.fetch(lun, Command::Inquiry { page, allocation: ROOM }, ROOM)
    }

    /// The data of REPORT LUNS for the target of `lun`.
    pub(crate) fn report_luns(&mut self, lun: ScsiAddress) -> Result<Vec<u8>, Error> {
        const ROOM: u16 = 8 + 255 * 8; // a header, and every LUN that can be addressed
        self.fetch(lun, Command::ReportLuns { select: 0, allocation: ROOM.into() }, ROOM)
    }

    /// The data of READ CAPACITY(10).
    pub(crate) fn read_capacity_10(&mut self, lun: ScsiAddress) -> Result<Vec<u8>, Error> {
        self.fetch(lun, Command::ReadCapacity10, 8)
    }

    /// The data of READ CAPACITY(16).
    pub(crate) fn read_capacity_16(&mut self, lun: ScsiAddress) -> Result<Vec<u8>, Error> {
        self.fetch(lun, Command::ReadCapacity16 { allocation: 32 }, 32)
    }

    /// The data of MODE SENSE(6) for the caching page.
    pub(crate) fn mode_sense(&mut self, lun: ScsiAddress) -> Result<Vec<u8>, Error> {
        use vstor_wire::scsi::cdb::{CdbForm, ModeSense, PageControl};
        const ROOM: u8 = 192;
        let sense = ModeSense {
            form: CdbForm::Six,
            disable_block_descriptors: false,
            long_lba_accepted: false,
            control: PageControl::Current,
            page: vstor_wire::scsi::mode::CACHING_PAGE,
            subpage: 0,
            allocation: ROOM.into(),
        };
        self.fetch(lun, Command::ModeSense(sense), ROOM.into())
    }

    /// Asks whether a logical unit is ready.
    ///
    /// # Errors
    /// Those of [`Self::execute`].
    pub fn test_unit_ready(&mut self, lun: ScsiAddress) -> Result<(), Error> {
        self.execute(lun, &Command::TestUnitReady.encode()?, Data::None).map(|_| ())
    }

    /// Reads the bytes from `offset` on, as many as `into` has.
    ///
    /// # Errors
    /// [`Error::Range`] unless these are whole blocks of the disk; those of
    /// [`Self::read_extents`].
    pub fn read(&mut self, disk: &DiskInfo, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let bytes = into.len() as u64;
        disk.blocks(offset, bytes)?;
        let step = self.step(disk);
        let mut rest = into.chunks_mut(step as usize);
        self.read_extents(disk, Extent::cut(offset, bytes, step), |_, data| {
            // Extents come in order, each as long as the chunk it is for.
            if let Some(chunk) = rest.next().filter(|chunk| chunk.len() == data.len()) {
                chunk.copy_from_slice(data);
            }
            Ok::<(), Error>(())
        })?;
        Ok(())
    }

    /// Writes `from` to the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Range`] unless these are whole blocks of the disk; those of
    /// [`Self::write_extents`].
    pub fn write(&mut self, disk: &DiskInfo, offset: u64, from: &[u8]) -> Result<(), Error> {
        let bytes = from.len() as u64;
        disk.blocks(offset, bytes)?;
        let step = self.step(disk);
        let mut rest = from.chunks(step as usize);
        self.write_extents(disk, Extent::cut(offset, bytes, step), |_, data| {
            if let Some(chunk) = rest.next().filter(|chunk| chunk.len() == data.len()) {
                data.copy_from_slice(chunk);
            }
            Ok::<(), Error>(())
        })?;
        Ok(())
    }

    /// The longest transfer of whole blocks.
    fn step(&self, disk: &DiskInfo) -> u32 {
        let limit = self.max_transfer_bytes();
        (limit - limit % disk.block_bytes.max(1)).max(disk.block_bytes)
    }

    /// Brings everything written so far to the medium.
    ///
    /// # Errors
    /// Those of [`Self::execute`].
    pub fn flush(&mut self, disk: &DiskInfo) -> Result<(), Error> {
        let cdb = Command::synchronize_cache().encode()?;
        self.execute(disk.address, &cdb, Data::None).map(|_| ())
    }

    /// Tells the disk that the `bytes` bytes from `offset` on are of no use any more. On a disk whose
    /// [`UnmapLimits::reads_zero`](crate::UnmapLimits::reads_zero) is set they read as zeros
    /// afterwards. As many commands as the disk's limits ask for.
    ///
    /// # Errors
    /// [`Error::Range`] unless these are whole blocks of the disk; those of [`Self::execute`], also
    /// from a disk that has no UNMAP.
    pub fn unmap(&mut self, disk: &DiskInfo, offset: u64, bytes: u64) -> Result<(), Error> {
        let (mut lba, mut blocks) = disk.blocks(offset, bytes)?;
        let most = disk.unmap.map_or(u32::MAX, |limits| limits.max_blocks);
        while blocks > 0 {
            let step = u32::try_from(blocks).unwrap_or(u32::MAX).min(most);
            self.unmap_run(disk.address, lba, step)?;
            lba += u64::from(step);
            blocks -= u64::from(step);
        }
        Ok(())
    }

    fn unmap_run(&mut self, lun: ScsiAddress, lba: u64, blocks: u32) -> Result<(), Error> {
        const LIST_BYTES: u16 = 24;
        const _: () =
            assert!(LIST_BYTES as usize == size_of::<UnmapHeader>() + size_of::<UnmapDescriptor>());
        let mut list = [0; LIST_BYTES as usize];
        let descriptor = UnmapDescriptor::new(lba, blocks);
        if let Some(header) = UnmapHeader::new(1) {
            let parts = header.as_bytes().iter().chain(descriptor.as_bytes());
            list.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
        }
        let cdb = Command::Unmap { parameter_bytes: LIST_BYTES }.encode()?;
        self.execute(lun, &cdb, Data::Out(&list)).map(|_| ())
    }

    /// Ends what the controller, or a part of it, is doing. What was in flight there ends first.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Timeout`]; the failure of the client.
    pub fn reset(&mut self, reset: Reset) -> Result<(), Error> {
        let (operation, address) = match reset {
            Reset::Lun(address) => (Operation::RESET_LUN, address),
            Reset::Bus(path) => (Operation::RESET_BUS, ScsiAddress::new(path, 0, 0)),
            Reset::Adapter => (Operation::RESET_ADAPTER, ScsiAddress::default()),
        };
        let none = Command::TestUnitReady.encode()?; // only the address counts
        let body = ScsiRequest::new(address, &none, DataDirection::None, 0);
        self.call_operation(&VstorPacket::request(operation).with_body(&body))
    }
}
