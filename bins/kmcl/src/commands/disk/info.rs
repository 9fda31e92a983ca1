//! `kmcl disk info`: what a server's disks are.

use serde::Serialize;
use vsc_storage::DiskInfo;

use crate::cli::Info;
use crate::connection::Connection;
use crate::exit::Result;
use crate::output::{Output, Report, Table};
use crate::size::Size;

#[derive(Serialize)]
struct Disks {
    protocol: String,
    channels: u16,
    max_transfer_bytes: u32,
    disks: Vec<Disk>,
}

#[derive(Serialize)]
struct Disk {
    lun: u8,
    path: u8,
    target: u8,
    bytes: u64,
    block_bytes: u32,
    physical_block_bytes: u64,
    read_only: bool,
    write_cache: bool,
    solid_state: bool,
    unmap: bool,
    vendor: String,
    product: String,
    revision: String,
    serial: Option<String>,
}

impl From<DiskInfo> for Disk {
    fn from(disk: DiskInfo) -> Self {
        Self {
            lun: disk.address.lun,
            path: disk.address.path,
            target: disk.address.target,
            bytes: disk.bytes(),
            block_bytes: disk.block_bytes,
            physical_block_bytes: disk.physical_block_bytes,
            read_only: disk.read_only,
            write_cache: disk.write_cache,
            solid_state: disk.solid_state,
            unmap: disk.unmap.is_some(),
            vendor: disk.vendor,
            product: disk.product,
            revision: disk.revision,
            serial: disk.serial,
        }
    }
}

impl Report for Disks {
    fn table(&self) -> Table {
        let heading = ["LUN", "size", "block", "access", "write cache", "unmap", "model", "serial"];
        let mut table = Table::with_heading(&heading);
        for disk in &self.disks {
            let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
            table.row(vec![
                disk.lun.to_string(),
                Size(disk.bytes).to_string(),
                format!("{}/{}", disk.block_bytes, disk.physical_block_bytes),
                if disk.read_only { "read-only" } else { "read-write" }.to_owned(),
                yes(disk.write_cache),
                yes(disk.unmap),
                format!("{} {} {}", disk.vendor, disk.product, disk.revision),
                disk.serial.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
        table
    }
}

pub(crate) fn run(arguments: &Info, output: &Output) -> Result<()> {
    let mut connection = Connection::open(&arguments.target, 1)?;
    let disks = connection.scan()?.into_iter().map(Disk::from).collect();
    output.report(&Disks {
        protocol: connection.protocol(),
        channels: connection.channels(),
        max_transfer_bytes: connection.client.max_transfer_bytes(),
        disks,
    })
}
