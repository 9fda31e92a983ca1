//! A private copy of a disk image, so that the original is never written.
//!
//! Where the file system can share blocks the copy is a reflink and takes no time; elsewhere the
//! data is copied and holes stay holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::Image;
use crate::exit::{Failure, Result};
use crate::progress::Progress;

/// Most bytes asked of the kernel at once, so that progress is seen.
const STEP: usize = 8 << 20;

/// How a copy came about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Method {
    /// Blocks are shared with the original until one of both is written.
    Reflink,
    /// Data was copied, holes were kept.
    Sparse,
}

/// Copies `source` to a new file at `target`.
///
/// # Errors
/// A [`Failure`] of kind system where the target cannot be written, of kind disk where the source
/// cannot be read.
pub(crate) fn copy(source: &Image, target: &Path, progress: &Progress) -> Result<Method> {
    let cannot = |error: io::Error| {
        let advice = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free some space, or name a directory with --work-dir"
            }
            _ => "name a directory that can be written with --work-dir",
        };
        Failure::system(
            format_args!("cannot copy {} to {}: {error}", source.path.display(), target.display()),
            advice,
        )
    };
    let file = File::create_new(target).map_err(cannot)?;
    if ioctl_ficlone(&file, &source.file).is_ok() {
        progress.advance(source.bytes);
        return Ok(Method::Reflink);
    }
    copy_data(&source.file, &file, source.bytes, progress).map_err(cannot)?;
    Ok(Method::Sparse)
}

fn copy_data(source: &File, target: &File, bytes: u64, progress: &Progress) -> io::Result<()> {
    ftruncate(target, bytes)?;
    let mut at = 0;
    while at < bytes {
        // A source that knows nothing of holes answers that everything is data.
        let data = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data.min(bytes),
            Err(Errno::NXIO) => bytes, // nothing but a hole up to the end
            Err(_) => at,
        };
        progress.advance(data - at);
        let hole = seek(source, SeekFrom::Hole(data)).map_or(bytes, |hole| hole.min(bytes));
        copy_extent(source, target, data, hole.max(data), progress)?;
        at = hole.max(data);
    }
    Ok(())
}

fn copy_extent(
    source: &File,
    target: &File,
    start: u64,
    end: u64,
    progress: &Progress,
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let step = usize::try_from(end - at).unwrap_or(STEP).min(STEP);
        let (mut from, mut to) = (at, at);
        let copied = match copy_file_range(source, Some(&mut from), target, Some(&mut to), step) {
            Ok(copied) => copied,
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                copy_through_memory(source, target, at, step)?
            }
            Err(error) => return Err(error.into()),
        } as u64;
        if copied == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it became shorter meanwhile",
            ));
        }
        at += copied;
        progress.advance(copied);
    }
    Ok(())
}

/// For pairs of file systems (or a block device) between which the kernel does not copy.
fn copy_through_memory(source: &File, target: &File, at: u64, bytes: usize) -> io::Result<usize> {
    let mut buffer = vec![0; bytes];
    let read = source.read_at(&mut buffer, at)?;
    let data = buffer.get(..read).unwrap_or_default();
    target.write_all_at(data, at)?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// An image with data at both ends and a hole between.
    fn sparse_image(dir: &Path) -> Image {
        let path = dir.join("source");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[0xa5; 70_000], 0).unwrap();
        file.write_all_at(&[0x5a; 512], (64 << 20) - 512).unwrap();
        Image::open(&path).unwrap()
    }

    fn assert_equal(source: &Image, copy: &Image) {
        assert_eq!(source.bytes, copy.bytes);
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for offset in (0..source.bytes).step_by(1 << 20) {
            source.read_at(offset, &mut a).unwrap();
            copy.read_at(offset, &mut b).unwrap();
            assert!(a == b, "differs within 1 MiB at {offset}");
        }
    }

    #[test]
    fn a_copy_has_the_same_data_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let source = sparse_image(dir.path());
        let target = dir.path().join("copy");
        copy(&source, &target, &Progress::hidden()).unwrap();
        let copy = Image::open(&target).unwrap();
        assert_equal(&source, &copy);
        let allocated = copy.file.metadata().unwrap().blocks() * 512;
        assert!(allocated < 8 << 20, "{allocated} bytes allocated for 70512 bytes of data");
    }

    #[test]
    fn data_goes_through_memory_where_the_kernel_does_not_copy() {
        let dir = tempfile::tempdir().unwrap();
        let source = sparse_image(dir.path());
        let target = File::create_new(dir.path().join("copy")).unwrap();
        let copied = copy_through_memory(&source.file, &target, 0, 80_000).unwrap();
        assert_eq!(copied, 80_000);
        target.set_len(source.bytes).unwrap();
        target.write_all_at(&[0x5a; 512], source.bytes - 512).unwrap();
        assert_equal(&source, &Image::open(&dir.path().join("copy")).unwrap());
    }

    #[test]
    fn an_existing_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let source = sparse_image(dir.path());
        let failure = copy(&source, &source.path, &Progress::hidden()).unwrap_err();
        assert!(failure.to_string().contains("exists"), "{failure}");
        assert_equal(&source, &Image::open(&source.path).unwrap());
    }
}
