//! A real file system to show things with: an ext4 image made by the system's own mkfs.ext4, filled
//! with files that any Linux machine has, and judged by the system's own e2fsck.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Image;
use crate::exit::{Failure, Result};

/// The smallest image worth making: room for a journal, the tables, and some files.
pub(crate) const MIN_BYTES: u64 = 8 << 20;

/// What the smallest file systems need for themselves, in bytes: journal, inode tables, bitmaps.
const OVERHEAD: u64 = 6 << 20;

/// Bytes of a block of the file system: what the smallest file or directory takes.
const BLOCK: u64 = 4096;

/// Files come from here, in this order, until the image is half full. All are text, tables and
/// programs that Linux distributions install everywhere.
const SOURCES: [&str; 4] =
    ["/usr/share/common-licenses", "/etc", "/usr/share/zoneinfo", "/usr/share/doc"];

/// Most files that are put into an image.
const MAX_FILES: usize = 2000;

/// Depth to which the sources are searched.
const MAX_DEPTH: usize = 4;

/// Makes an ext4 image of `bytes` at `target` and fills half of it with files. `work` is a directory
/// for what is needed on the way. Returns how many files are in it.
///
/// # Errors
/// A [`Failure`] of kind system where mkfs.ext4 is missing or fails.
pub(crate) fn make(target: &Path, bytes: u64, work: &Path) -> Result<usize> {
    let mkfs = find_program("mkfs.ext4").ok_or_else(|| {
        Failure::system(
            "mkfs.ext4 is not installed",
            "install e2fsprogs, or name an image with --disk",
        )
    })?;
    let content = work.join("content");
    let cannot_gather = |error: io::Error| {
        Failure::system(
            format_args!("cannot gather files in {}: {error}", content.display()),
            "name a directory with space with --work-dir",
        )
    };
    fs::create_dir(&content).map_err(cannot_gather)?;
    let files = gather(&content, bytes.saturating_sub(OVERHEAD) / 2).map_err(cannot_gather)?;
    let kib = format!("{}k", bytes >> 10);
    let made = Command::new(mkfs)
        .args(["-q", "-F", "-L", "kmcl-demo", "-b", "4096", "-d"])
        .arg(&content)
        .arg(target)
        .arg(kib)
        .stdin(Stdio::null())
        .output();
    // The files are in the image now: another copy of them would only take space.
    fs::remove_dir_all(&content).map_err(cannot_gather)?;
    let made = made.map_err(|error| {
        Failure::system(format_args!("cannot run mkfs.ext4: {error}"), "name an image with --disk")
    })?;
    if !made.status.success() {
        return Err(Failure::system(
            format_args!("mkfs.ext4 failed: {}", String::from_utf8_lossy(&made.stderr).trim()),
            "name a directory with space with --work-dir, or an image with --disk",
        ));
    }
    Ok(files)
}

/// Copies files into `content` until they and their directories take `budget` bytes of blocks.
fn gather(content: &Path, budget: u64) -> io::Result<usize> {
    let mut gathered = Gathered { content, budget, files: 0 };
    if let Ok(program) = std::env::current_exe() {
        gathered.take(&program)?;
    }
    for source in SOURCES {
        gathered.take_all(Path::new(source), MAX_DEPTH)?;
    }
    Ok(gathered.files)
}

struct Gathered<'a> {
    content: &'a Path,
    /// Bytes that may still be taken.
    budget: u64,
    files: usize,
}

impl Gathered<'_> {
    fn take_all(&mut self, dir: &Path, depth: usize) -> io::Result<()> {
        let Ok(entries) = fs::read_dir(dir) else { return Ok(()) }; // absent here, or not ours to read
        let mut paths: Vec<PathBuf> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort(); // the same machine makes the same image
        for path in paths {
            if self.files == MAX_FILES || self.budget < BLOCK {
                break;
            }
            match fs::symlink_metadata(&path).map(|metadata| metadata.file_type()) {
                Ok(kind) if kind.is_dir() && depth > 0 => self.take_all(&path, depth - 1)?,
                Ok(kind) if kind.is_file() => self.take(&path)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes one file, if it can be read by everyone and fits.
    fn take(&mut self, path: &Path) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
        let Ok(relative) = path.strip_prefix("/") else { return Ok(()) };
        let target = self.content.join(relative);
        let new_directories = target.ancestors().skip(1).filter(|parent| !parent.exists()).count();
        let taken = metadata.len().next_multiple_of(BLOCK) + new_directories as u64 * BLOCK;
        let for_everyone = metadata.permissions().mode() & 0o004 != 0; // no secrets in a demo
        if !for_everyone || taken > self.budget || metadata.len() == 0 {
            return Ok(());
        }
        let Ok(mut source) = fs::File::open(path) else { return Ok(()) };
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut target = fs::File::create(target)?;
        io::copy(&mut source.by_ref().take(metadata.len()), &mut target)?;
        self.budget -= taken;
        self.files += 1;
        Ok(())
    }
}

/// What e2fsck says about a file system.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// No complaint.
    Clean,
    /// It complained: its exit code and what it wrote last.
    Damaged(String),
    /// It is not installed here.
    NotInstalled,
}

/// Has e2fsck judge the file system in `image`, without changing anything.
///
/// # Errors
/// A [`Failure`] of kind system where it cannot be run.
pub(crate) fn check(image: &Path) -> Result<Verdict> {
    let Some(e2fsck) = find_program("e2fsck") else { return Ok(Verdict::NotInstalled) };
    let output = Command::new(e2fsck).arg("-fn").arg(image).stdin(Stdio::null()).output().map_err(
        |error| {
            Failure::system(format_args!("cannot run e2fsck: {error}"), "check its installation")
        },
    )?;
    if output.status.success() {
        return Ok(Verdict::Clean);
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Ok(Verdict::Damaged(format!("{}: {}", output.status, last.trim())))
}

/// Whether `image` holds an ext2, 3 or 4 file system and nothing before it: only then is there
/// something for e2fsck to judge.
///
/// Source: the superblock at byte 1024, its magic number at byte 56, in the kernel's ext4 documentation.
pub(crate) fn is_ext(image: &Image) -> bool {
    let mut magic = [0; 2];
    image.file.read_exact_at(&mut magic, 1024 + 56).is_ok() && magic == [0x53, 0xef]
}

/// `name` in PATH, or where system programs are on systems whose users have no sbin in PATH.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .filter(|dir| dir.as_os_str() != OsStr::new(""))
        .map(|dir| dir.join(name))
        .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_made_recognised_and_judged() {
        if find_program("mkfs.ext4").is_none() || find_program("e2fsck").is_none() {
            eprintln!("skipped: e2fsprogs is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let files = make(&path, 16 << 20, dir.path()).unwrap();
        assert!(files > 0);
        let image = Image::open(&path).unwrap();
        assert_eq!(image.bytes, 16 << 20);
        assert!(is_ext(&image));
        assert_eq!(check(&path).unwrap(), Verdict::Clean);

        // An inode table of zeros is no file system any more.
        let writable = fs::File::options().write(true).open(&path).unwrap();
        writable.write_all_at(&vec![0; 4 << 20], 4096).unwrap();
        assert!(matches!(check(&path).unwrap(), Verdict::Damaged(_)));
    }

    #[test]
    fn other_images_are_not_taken_for_ext4() {
        let dir = tempfile::tempdir().unwrap();
        for (bytes, expected) in [(512, false), (8192, false)] {
            let path = dir.path().join(bytes.to_string());
            fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            assert_eq!(is_ext(&Image::open(&path).unwrap()), expected, "{bytes} bytes");
        }
    }
}
