//! What can be wrong with an image file, and what is said about it.

use std::fs::{self, File};
use std::path::Path;

use super::harness::{DISK_BYTES, FILES, Kind, Rig, on_each, open};
use crate::block::{
    CacheMode, Engine, FileOptions, ImageError, IoError, IoOperation, IoOutcome, open_file,
};

fn refusal(path: &Path) -> String {
    let error = open_file(path, &FileOptions::default()).err().unwrap();
    let message = error.to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains(&format!("{path:?}")), "{message}");
    message
}

#[test]
fn files_that_cannot_be_disks_are_refused_in_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);

    assert!(refusal(&path("missing")).contains("does not exist"));
    assert!(refusal(folder.path()).contains("is a directory"));
    assert!(refusal(Path::new("/dev/null")).contains("is a character device"));

    File::create(path("empty")).unwrap();
    assert!(refusal(&path("empty")).contains("is empty"));

    fs::write(path("odd"), [0; 1025]).unwrap();
    assert!(refusal(&path("odd")).contains("1025 bytes, no multiple of the sector size 512"));

    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(refusal(&path("pipe")).contains("is a pipe"));

    let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    assert!(refusal(&path("socket")).contains("is a socket"));

    fs::write(path("small sectors"), [0; 512 * 9]).unwrap();
    let options = FileOptions { sector_bytes: 4096, ..FileOptions::default() };
    let error = open_file(&path("small sectors"), &options).err().unwrap();
    assert!(error.to_string().contains("no multiple of the sector size 4096"), "{error}");
}

#[test]
fn an_image_is_served_once_unless_all_only_read() {
    on_each(&FILES, |rig| {
        let again = |read_only| open(rig.kind, rig.image(), read_only).unwrap();
        for read_only in [false, true] {
            let error = again(read_only).err().unwrap();
            assert_eq!(error, ImageError::InUse { path: rig.image().to_owned() });
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    fs::write(&image, [1; 4096]).unwrap();
    let kind = Kind::File(Engine::Auto, CacheMode::Direct);
    let first = open(kind, &image, true).unwrap().unwrap();
    let second = open(kind, &image, true).unwrap().unwrap();
    assert!(matches!(open(kind, &image, false).unwrap(), Err(ImageError::InUse { .. })));
    drop((first, second));
    assert!(open(kind, &image, false).unwrap().is_ok());
}

#[test]
fn read_only_disks_refuse_every_kind_of_write() {
    let refused = IoOutcome::Done(Err(IoError::WriteProtected));
    for kind in FILES {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        fs::write(&image, vec![7; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
        let Some(backend) = open(kind, &image, true) else { continue };
        let backend = backend.unwrap();
        assert!(backend.is_read_only());
        let rig = Rig::new(Kind::Ram).unwrap();
        for operation in [
            IoOperation::Write { fua: true },
            IoOperation::Discard,
            IoOperation::WriteZeroes,
            IoOperation::WriteSame,
        ] {
            let mut done = Vec::new();
            let request = rig.request(operation, 0, None, &[(0, 512)]);
            backend.submit(&mut vec![request], &mut done);
            assert_eq!(done.pop().unwrap().outcome, refused, "{operation:?}");
        }
        assert_eq!(fs::read(&image).unwrap()[..512], [7; 512]);
    }
    let ram = crate::block::RamBackend::new(4096).unwrap().read_only();
    let rig = Rig::new(Kind::Ram).unwrap();
    let mut done = Vec::new();
    let write = rig.request(IoOperation::Write { fua: false }, 0, None, &[(0, 512)]);
    crate::block::Backend::submit(&ram, &mut vec![write], &mut done);
    assert_eq!(done.pop().unwrap().outcome, refused);
}
