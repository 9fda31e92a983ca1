//! What only shows in a process of its own: limits, users, full file systems.
//!
//! Each test runs itself again in a child that a small shell script has prepared. Where the system
//! does not let the script do its work, the test says so and passes.

use std::path::Path;
use std::process::{Command, ExitStatus};

use super::harness::{FILES, Rig, io_threads, on_each};
use crate::block::{FileOptions, ImageError, IoError, IoOperation, open_file};

/// Set in children: the folder prepared for them.
const FOLDER: &str = "VSP_STORAGE_TEST_FOLDER";

/// Exit code of a script that could not prepare.
const CANNOT: i32 = 77;

/// Runs test `name` again, prepared by `script`, which ends with `exec "$@"`.
fn child(name: &str, folder: &Path, script: &str) -> ExitStatus {
    let test = std::env::current_exe().unwrap();
    Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(test)
        .args(["--exact", &format!("block::tests::limits::{name}"), "--nocapture"])
        .env(FOLDER, folder)
        .env("TMPDIR", folder)
        .status()
        .unwrap()
}

fn judge(status: ExitStatus) {
    match status.code() {
        Some(0) => {}
        Some(CANNOT) => eprintln!("skipped: not permitted here"),
        _ => panic!("{status}"),
    }
}

#[test]
fn a_limit_on_file_sizes_is_no_space() {
    if std::env::var_os(FOLDER).is_none() {
        let folder = tempfile::tempdir().unwrap();
        // The signal is ignored so that the system reports an error instead of ending us. The limit
        // comes after the images are made, below.
        return judge(child(
            "a_limit_on_file_sizes_is_no_space",
            folder.path(),
            r#"trap '' XFSZ && exec "$@""#,
        ));
    }
    on_each(&FILES, |rig| {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let before = getrlimit(Resource::Fsize);
        setrlimit(Resource::Fsize, Rlimit { current: Some(64 << 10), ..before }).unwrap();
        let write = |offset| rig.run(IoOperation::Write { fua: false }, offset, None, &[(0, 4096)]);
        let (inside, beyond) = (write(0), write(512 << 10));
        let same = rig.run(IoOperation::WriteSame, 512 << 10, Some(4096), &[(0, 512)]);
        setrlimit(Resource::Fsize, before).unwrap();
        assert_eq!(inside, Ok(()));
        assert_eq!(beyond, Err(IoError::NoSpace));
        assert_eq!(same, Err(IoError::NoSpace));
    });
}

#[test]
fn a_full_file_system_fails_writes_and_nothing_else() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        let folder = tempfile::tempdir().unwrap();
        return judge(child(
            "a_full_file_system_fails_writes_and_nothing_else",
            folder.path(),
            r#"
                unshare --mount --map-root-user true || exit 77
                exec unshare --mount --map-root-user sh -c '
                    mount -t tmpfs -o size=256k tmpfs "$VSP_STORAGE_TEST_FOLDER" || exit 77
                    exec "$@"' sh "$@"
            "#,
        ));
    };
    for kind in FILES {
        eprintln!("--- {kind:?}");
        let Some(rig) = Rig::new(kind) else { continue };
        let write = |rig: &Rig, offset| {
            rig.run(IoOperation::Write { fua: false }, offset, None, &[(0, 0x1_0000)])
        };
        let results: Vec<_> = (0..8u64).map(|i| write(&rig, i << 16)).collect();
        assert_eq!(results.first(), Some(&Ok(())), "{results:?}");
        assert_eq!(results.last(), Some(&Err(IoError::NoSpace)), "{results:?}");
        assert_eq!(rig.run(IoOperation::Read, 0, None, &[(0, 0x1_0000)]), Ok(()));
        // Space that is given back can be used again.
        assert_eq!(rig.run(IoOperation::Discard, 0, Some(0x4_0000), &[]), Ok(()));
        assert_eq!(write(&rig, 0x7_0000), Ok(()));
    }
    drop(folder);
}

#[test]
fn threads_stand_in_where_io_uring_cannot_be_set_up() {
    use crate::block::{CacheMode, Engine};
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if std::env::var_os(FOLDER).is_none() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.img"), [7; 4096]).unwrap();
        return judge(child(
            "threads_stand_in_where_io_uring_cannot_be_set_up",
            folder.path(),
            r#"exec "$@""#,
        ));
    }
    let folder = std::env::var_os(FOLDER).unwrap();
    let image = Path::new(&folder).join("disk.img");
    // Room for the image and one descriptor more: threads need one, io_uring needs two.
    let lowest_free = rustix::io::dup(std::io::stdin()).map(|fd| {
        use std::os::fd::AsRawFd;
        u64::try_from(fd.as_raw_fd()).unwrap()
    });
    let before = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: Some(lowest_free.unwrap() + 2), ..before };
    let options =
        |engine| FileOptions { engine, cache: CacheMode::Buffered, ..FileOptions::default() };
    setrlimit(Resource::Nofile, limit).unwrap();
    let refused = open_file(&image, &options(Engine::IoUring)).err();
    let opened = open_file(&image, &options(Engine::Auto));
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(matches!(refused, Some(ImageError::Resources { .. })), "{refused:?}");
    let backend = opened.unwrap();
    assert_eq!(backend.bytes(), 4096);
    // A thread bears its name only once it runs.
    let start = std::time::Instant::now();
    while io_threads() != 4 {
        assert!(start.elapsed().as_secs() < 30, "{} threads", io_threads());
        std::thread::yield_now();
    }
}

#[test]
fn an_image_of_somebody_else_is_refused_in_one_clear_line() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let open = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(folder.path(), open(0o755)).unwrap();
        for (name, mode) in [("secret", 0o000), ("fixed", 0o444)] {
            let path = folder.path().join(name);
            std::fs::write(&path, [0; 512]).unwrap();
            std::fs::set_permissions(&path, open(mode)).unwrap();
        }
        // Permissions mean nothing to root.
        return judge(child(
            "an_image_of_somebody_else_is_refused_in_one_clear_line",
            folder.path(),
            r#"
                [ "$(id -u)" = 0 ] || exec "$@"
                command -v setpriv > /dev/null || exit 77
                setpriv --reuid=65534 --clear-groups test -x "$1" || exit 77
                exec setpriv --reuid=65534 --clear-groups "$@"
            "#,
        ));
    };
    let path = |name| Path::new(&folder).join(name);
    let read_only = FileOptions { read_only: true, ..FileOptions::default() };
    let refused = |name, options| open_file(&path(name), options).err();
    let default = &FileOptions::default();
    assert_eq!(
        refused("secret", &read_only),
        Some(ImageError::NotReadable { path: path("secret") })
    );
    assert_eq!(refused("secret", default), Some(ImageError::NotWritable { path: path("secret") }));
    assert_eq!(refused("fixed", default), Some(ImageError::NotWritable { path: path("fixed") }));
    assert_eq!(refused("fixed", &read_only), None);
}
