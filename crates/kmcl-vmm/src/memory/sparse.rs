//! Reading a part of a sparse file without its holes: a memfd most of which was never touched, or a file
//! that memory was saved into.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Where the first byte from `at` on is that is not in a hole; `None`: nowhere.
pub(super) fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok(Some(found.max(at))),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes has none.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

/// Where the first hole from `at` on begins, at or before `end`.
fn next_hole(file: &File, at: u64, end: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Hole(at)) {
        // At least one byte, so that a file system that contradicts itself stops nobody.
        Ok(found) => Ok(found.clamp(at.saturating_add(1).min(end), end)),
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(end),
        Err(error) => Err(error.into()),
    }
}

/// Reads the bytes from `at` on, as many as `content` has. Holes are zeros.
pub(super) fn read(file: &File, at: u64, content: &mut [u8]) -> io::Result<()> {
    let end = at.saturating_add(content.len() as u64);
    let (mut rest, mut next) = (content, at);
    while !rest.is_empty() {
        let data = next_data(file, next)?.map_or(end, |data| data.min(end));
        let (zeros, behind) = split(rest, data - next);
        zeros.fill(0);
        if behind.is_empty() {
            break;
        }
        let hole = next_hole(file, data, end)?;
        let (bytes, behind) = split(behind, hole - data);
        file.read_exact_at(bytes, data)?;
        (rest, next) = (behind, hole);
    }
    Ok(())
}

/// The first `len` bytes, or all, and the rest.
fn split(bytes: &mut [u8], len: u64) -> (&mut [u8], &mut [u8]) {
    let len = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len()));
    bytes.split_at_mut(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any window of a file with holes is what reading all of it gives.
    #[test]
    fn a_window_is_what_the_file_has() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        for (at, len) in [(0, 1), (8192, 4096), (70_000, 30_000), (300_000, 1), (1_000_000, 48_576)]
        {
            file.write_all_at(&vec![u8::try_from(at % 200 + 1).unwrap(); len], at).unwrap();
        }
        let mut whole = vec![0; 1 << 20];
        file.read_exact_at(&mut whole, 0).unwrap();
        for (at, len) in [
            (0, 1 << 20),
            (0, 4096),
            (1, 20_000),
            (65_536, 65_536),
            (200_000, 90_000),
            (500_000, 0),
        ] {
            let mut window = vec![0xff; len];
            read(&file, at, &mut window).unwrap();
            let start = usize::try_from(at).unwrap();
            assert!(window == whole[start..start + len], "{at}+{len}");
        }
        assert!(read(&file, (1 << 20) - 10, &mut [0; 20]).is_ok(), "a hole has no end");
    }
}
