//! MODE SENSE.

use vstor_wire::scsi::cdb::{CdbForm, ModeSense, PageControl};
use vstor_wire::scsi::mode::{
    self, ALL_PAGES, ALL_SUBPAGES, BlockDescriptor, CACHING_PAGE, CONTROL_PAGE, CachingPage,
    ControlPage, LongBlockDescriptor, ModeHeader6, ModeHeader10,
};
use vstor_wire::scsi::sense::{AdditionalSense, FieldPointer};
use zerocopy::IntoBytes;
use zerocopy::big_endian::U16;

use super::{Answer, Page};
use crate::disk::Profile;

/// Bytes of the longest answer: header, long block descriptor, both pages.
const MAX_BYTES: usize = 8 + 16 + 20 + 12;

/// The answer's bytes, or the refusal.
pub(super) fn data(disk: &Profile, request: &ModeSense) -> Result<Page<MAX_BYTES>, Answer> {
    if request.control == PageControl::Saved {
        return Err(Answer::illegal(AdditionalSense::SAVING_PARAMETERS_NOT_SUPPORTED));
    }
    // Pages without subpages are their own subpage 0.
    if !matches!(request.subpage, 0 | ALL_SUBPAGES) {
        return Err(Answer::invalid_field(FieldPointer::cdb(3).with_bit(7)));
    }
    let all = request.page == ALL_PAGES;
    let mut pages = Page::<32>::new();
    if all || request.page == CACHING_PAGE {
        // The back ends answer a write when the system has it, not when the medium has.
        push(&mut pages, request.control, CachingPage::new(true).as_bytes());
    }
    if all || request.page == CONTROL_PAGE {
        push(&mut pages, request.control, ControlPage::new().as_bytes());
    }
    if pages.as_slice().is_empty() {
        return Err(Answer::invalid_field(FieldPointer::cdb(2).with_bit(5)));
    }
    Ok(assemble(disk, request, pages.as_slice()))
}

/// Adds a page: its values, or which of them can be changed, which is none.
fn push(pages: &mut Page<32>, control: PageControl, page: &[u8]) {
    let Some((head, body)) = page.split_at_checked(2) else { return };
    pages.push(head);
    match control {
        PageControl::Changeable => body.iter().for_each(|_| pages.push(&[0])),
        _ => pages.push(body),
    }
}

fn assemble(disk: &Profile, request: &ModeSense, pages: &[u8]) -> Page<MAX_BYTES> {
    let short = BlockDescriptor::new(disk.sectors, disk.sector_bytes);
    let long = LongBlockDescriptor::new(disk.sectors, disk.sector_bytes);
    let descriptor = match request {
        ModeSense { disable_block_descriptors: true, .. } => &[][..],
        ModeSense { long_lba_accepted: true, .. } => long.as_bytes(),
        _ => short.as_bytes(),
    };
    let protection = if disk.read_only { mode::WRITE_PROTECTED } else { 0 };
    let device_specific = mode::DPO_FUA | protection;
    // All lengths together are at most `MAX_BYTES`.
    let byte = |length: usize| u8::try_from(length).unwrap_or(u8::MAX);
    let mut out = Page::new();
    if request.form == CdbForm::Six {
        let header = ModeHeader6 {
            data_bytes: byte(3 + descriptor.len() + pages.len()),
            medium_type: 0,
            device_specific,
            descriptor_bytes: byte(descriptor.len()),
        };
        out.push(header.as_bytes());
    } else {
        let header = ModeHeader10 {
            data_bytes: U16::new(u16::from(byte(6 + descriptor.len() + pages.len()))),
            medium_type: 0,
            device_specific,
            long_lba: u8::from(descriptor.len() == size_of::<LongBlockDescriptor>()),
            reserved: 0,
            descriptor_bytes: U16::new(u16::from(byte(descriptor.len()))),
        };
        out.push(header.as_bytes());
    }
    out.push(descriptor);
    out.push(pages);
    out
}
