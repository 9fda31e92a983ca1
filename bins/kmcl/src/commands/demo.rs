//! `kmcl demo`: one process serves a disk image, this one uses it, and every byte is proven.

mod moves;
mod plan;
mod proof;
mod server;

use std::path::Path;

use serde::Serialize;

use self::moves::{Moved, Place};
use self::plan::Area;
use self::proof::{Bench, Proof, compare_files};
use self::server::Server;
use crate::cli::{Demo, Target};
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::image::ext4::{self, Verdict};
use crate::image::{Image, copy};
use crate::interrupt::Interrupt;
use crate::output::{Output, Report, Table};
use crate::progress::Length;
use crate::size::Size;

/// Seconds after which a silent server is given up.
const SERVER_TIMEOUT_S: u64 = 30;

/// Requests in flight where whole disks are transferred: more do not make it faster.
const TRANSFER_DEPTH: u16 = 16;

/// What the demonstration has shown.
#[derive(Serialize)]
struct Shown {
    image_bytes: u64,
    /// Files in the image that was made, or nothing for one that was given.
    image_files: Option<usize>,
    vmbus_version: String,
    storage_protocol: String,
    back_end: String,
    channels: u16,
    queue_depth: u16,
    #[serde(flatten)]
    proof: Proof,
    /// What e2fsck says in the end: `clean`, or why it was not asked.
    file_system: &'static str,
    /// Bytes that are not what they must be, and requests that never ended. The command fails where this
    /// is not 0.
    lost: u64,
    /// Requests that ended twice. The command fails where this is not 0.
    duplicated: u64,
    #[serde(flatten)]
    moved: Moved,
}

impl Report for Shown {
    fn table(&self) -> Table {
        let table = Table::pairs()
            .pair("bytes read", Size(self.proof.bytes_read))
            .pair("bytes written", Size(self.proof.bytes_written))
            .pair("bytes verified", Size(self.proof.bytes_verified));
        self.moved
            .add_to(table)
            .pair("lost", self.lost)
            .pair("duplicated", self.duplicated)
            .pair("file system", self.file_system)
            .pair(
                "VMBus",
                format_args!("version {}, {} channels", self.vmbus_version, self.channels),
            )
            .pair(
                "storage protocol",
                format_args!("{}, queue depth {}", self.storage_protocol, self.queue_depth),
            )
    }
}

pub(crate) fn run(arguments: &Demo, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let work_root = arguments.work_dir.clone().unwrap_or_else(std::env::temp_dir);
    let work = tempfile::Builder::new().prefix("kmcl-demo-").tempdir_in(&work_root);
    let work = work.map_err(|error| {
        Failure::system(
            format_args!("cannot work in {}: {error}", work_root.display()),
            "name a directory that can be written with --work-dir",
        )
    })?;
    let (original, image_files) = obtain_image(arguments, work.path(), output)?;
    let copy_path = work.path().join("disk.img");
    let progress = output.progress("copying the image", Length::Bytes(original.bytes));
    let method = copy::copy(&original, &copy_path, &progress)?;
    drop(progress);
    tracing::info!(?method, "image copied");
    let served = Image::open(&copy_path)?;

    let mut shown = prove(arguments, work.path(), &original, &served, output, &interrupt)?;
    shown.image_files = image_files;
    let progress = output.progress("checking the file system", Length::Unknown);
    shown.file_system = judge(&original, &served)?;
    drop(progress);
    output.report(&shown)
}

/// The image to work on a copy of: the one that was named, or one that is made.
fn obtain_image(arguments: &Demo, work: &Path, output: &Output) -> Result<(Image, Option<usize>)> {
    if let Some(path) = &arguments.disk {
        let image = Image::open(path)?;
        image.lock_shared()?;
        output.step(format_args!("image {}, {}", path.display(), Size(image.bytes)))?;
        return Ok((image, None));
    }
    let bytes = arguments.size.0;
    if bytes < ext4::MIN_BYTES || !bytes.is_multiple_of(4096) {
        return Err(Failure::usage(
            format_args!("an ext4 image of {bytes} bytes cannot be made"),
            format_args!(
                "choose a --size of at least {}, a multiple of 4 KiB",
                Size(ext4::MIN_BYTES)
            ),
        ));
    }
    let path = work.join("original.img");
    let progress = output.progress("making an ext4 image", Length::Unknown);
    let files = ext4::make(&path, bytes, work)?;
    drop(progress);
    let image = Image::open(&path)?;
    output.step(format_args!("ext4 image made, {} with {files} files", Size(image.bytes)))?;
    Ok((image, Some(files)))
}

/// Starts the server, runs every step, stops the server, and compares the files.
fn prove(
    arguments: &Demo,
    work: &Path,
    original: &Image,
    served: &Image,
    output: &Output,
    interrupt: &Interrupt,
) -> Result<Shown> {
    let socket = work.join("vmbus.sock");
    let second = moves::make_disk(work)?;
    let disks = [served.path.as_path(), &second];
    let (server, ready) = Server::start(arguments.back_end, &disks, &socket)?;
    let depth = arguments.depth.min(TRANSFER_DEPTH);
    let target = Target { socket: socket.clone(), timeout: SERVER_TIMEOUT_S, reconnect: 0 };
    let mut connection = Connection::open(&target, depth)?;
    let disk = connection.disk(0)?;
    let (vmbus_version, storage_protocol) = (connection.vmbus_version(), connection.protocol());
    let channels = connection.channels();
    output.step(format_args!(
        "server is process {}, back end {}; VMBus {vmbus_version}, storage protocol {storage_protocol}",
        server.id(),
        ready.backend,
    ))?;
    if disk.bytes() != original.bytes {
        let what = format!("the disk has {} bytes, the image {}", disk.bytes(), original.bytes);
        return Err(Failure::mismatch(disk.bytes().min(original.bytes), what));
    }
    let mut bench = Bench {
        client: &mut connection.client,
        disk: &disk,
        original,
        served,
        area: Area::new(disk.bytes(), arguments.write_limit.0),
        output,
        interrupt,
        proof: Proof::default(),
    };
    bench.read_whole_disk()?;
    let passes = bench.write_pattern()?;
    bench.verify_pattern(&passes)?;
    bench.unmap()?;
    let proof = std::mem::take(&mut bench.proof);
    drop(connection);
    let place = Place { work, socket: &socket, disks: &disks };
    let (server, moved) = moves::run(arguments, &place, server, output, interrupt)?;
    // Not looking for another server: that this one goes away is not planned.
    let mut connection = Connection::open_next(&target, depth)?;
    let mut bench = Bench {
        client: &mut connection.client,
        disk: &disk,
        original,
        served,
        area: Area::new(disk.bytes(), arguments.write_limit.0),
        output,
        interrupt,
        proof,
    };
    bench.write_back()?;
    let mut proof = bench.proof;
    drop(connection);
    server.stop()?;

    let progress = output.progress("comparing the files", Length::Bytes(original.bytes));
    proof.bytes_verified += compare_files(original, served, interrupt, &progress)?;
    drop(progress);
    Ok(Shown {
        image_bytes: original.bytes,
        image_files: None,
        vmbus_version,
        storage_protocol,
        back_end: ready.backend,
        channels,
        queue_depth: arguments.depth,
        proof,
        file_system: "",
        lost: 0,
        duplicated: 0,
        moved,
    })
}

/// Asks e2fsck about the served image, if it holds what e2fsck understands. An image that was not
/// clean to begin with proves nothing.
fn judge(original: &Image, served: &Image) -> Result<&'static str> {
    if !ext4::is_ext(original) {
        return Ok("not ext4, not checked");
    }
    match ext4::check(&served.path)? {
        Verdict::Clean => Ok("clean, says e2fsck"),
        Verdict::NotInstalled => Ok("not checked: e2fsck is not installed"),
        Verdict::Damaged(what) => match ext4::check(&original.path)? {
            Verdict::Clean => Err(Failure::mismatch(
                0,
                format_args!("the file system on the copy is damaged, says e2fsck: {what}"),
            )),
            _ => Ok("not clean, as in the original"),
        },
    }
}
