//! A small guest that drives any back end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus_memory::GuestMemory;

use crate::block::{
    Backend, Buffers, CacheMode, Engine, Fate, FileOptions, ImageError, IoDone, IoError,
    IoOperation, IoOutcome, IoRequest, RamBackend, TestMedium, TestTime, open_file,
};

/// Bytes of the disks under test.
pub(super) const DISK_BYTES: u64 = 1 << 20;

/// Bytes of the guest's memory.
pub(super) const MEMORY_BYTES: u64 = 4 << 20;

/// The kinds of back end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    File(Engine, CacheMode),
    Ram,
    /// A medium for tests, on which everything takes a moment.
    Test,
}

pub(super) const FILES: [Kind; 4] = [
    Kind::File(Engine::IoUring, CacheMode::Direct),
    Kind::File(Engine::IoUring, CacheMode::Buffered),
    Kind::File(Engine::Threads(3), CacheMode::Direct),
    Kind::File(Engine::Threads(3), CacheMode::Buffered),
];

/// A disk under test, and the guest memory its requests use.
pub(super) struct Rig {
    pub(super) kind: Kind,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) memory: GuestMemory,
    ram: Option<Arc<RamBackend>>,
    medium: Option<TestMedium>,
    image: Option<PathBuf>,
    _folder: Option<tempfile::TempDir>,
}

/// Runs `test` for every kind of back end, `kinds` only if given.
pub(super) fn on_each(kinds: &[Kind], test: impl Fn(&Rig)) {
    for &kind in kinds {
        eprintln!("--- {kind:?}");
        if let Some(rig) = Rig::new(kind) {
            test(&rig);
        }
    }
}

/// All kinds.
pub(super) fn all() -> Vec<Kind> {
    FILES.into_iter().chain([Kind::Ram, Kind::Test]).collect()
}

impl Rig {
    /// A disk of zeros; `None` where the system refuses io_uring.
    pub(super) fn new(kind: Kind) -> Option<Self> {
        let in_memory = |backend, ram, medium| {
            let memory = GuestMemory::memfd(MEMORY_BYTES).unwrap();
            Some(Self { kind, backend, memory, ram, medium, image: None, _folder: None })
        };
        match kind {
            Kind::File(..) => {}
            Kind::Ram => {
                let ram = Arc::new(RamBackend::new(DISK_BYTES).unwrap());
                return in_memory(Arc::clone(&ram) as Arc<dyn Backend>, Some(ram), None);
            }
            Kind::Test => {
                let medium = TestMedium::new(DISK_BYTES, TestTime::Real).unwrap();
                medium.choose_fates(|io| Fate {
                    parts: 3,
                    // The first byte that differs is told, not the last.
                    backwards: io.number % 2 == 0 && io.operation != IoOperation::Compare,
                    can_cancel: !io.number.is_multiple_of(5),
                    ..Fate::after(Duration::from_micros(20 + io.number % 100))
                });
                medium.set_slots(20);
                return in_memory(medium.backend().unwrap(), None, Some(medium));
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
        let backend = open(kind, &image, false)?.unwrap();
        Some(Self {
            kind,
            backend,
            memory: GuestMemory::memfd(MEMORY_BYTES).unwrap(),
            ram: None,
            medium: None,
            image: Some(image),
            _folder: Some(folder),
        })
    }

    /// The file behind the disk, seen from elsewhere.
    pub(super) fn image(&self) -> &Path {
        self.image.as_deref().unwrap()
    }

    /// What is on the disk, seen from elsewhere.
    pub(super) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        match (&self.ram, &self.medium) {
            (Some(ram), _) => ram.medium().read(0, &mut bytes).unwrap(),
            (_, Some(medium)) => medium.contents().read(0, &mut bytes).unwrap(),
            _ => File::open(self.image()).unwrap().read_exact_at(&mut bytes, 0).unwrap(),
        }
        bytes
    }

    /// Empties the host's page cache of the file, so that a partial write of a page has to read it.
    pub(super) fn forget_cache(&self) {
        if let Some(image) = &self.image {
            let file = File::open(image).unwrap();
            rustix::fs::fsync(&file).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
    }

    /// A request whose buffers are `segments`; its length is theirs unless `bytes` is given.
    pub(super) fn request(
        &self,
        operation: IoOperation,
        offset: u64,
        bytes: Option<u64>,
        segments: &[(u64, u32)],
    ) -> IoRequest {
        let data = segments.iter().map(|&(_, len)| u64::from(len)).sum();
        let mut buffers = Buffers::new();
        buffers.set(&self.memory, segments.iter().copied(), data).unwrap();
        IoRequest { token: 0, operation, offset, bytes: bytes.unwrap_or(data), buffers }
    }

    /// Submits all requests at once and waits for them; in the order in which they finish.
    pub(super) fn run_all(&self, mut requests: Vec<IoRequest>) -> Vec<IoDone> {
        let count = requests.len();
        let mut done = Vec::new();
        self.backend.submit(&mut requests, &mut done);
        assert!(requests.is_empty());
        self.wait(&mut done, count);
        done
    }

    /// Reaps until `count` requests are done.
    pub(super) fn wait(&self, done: &mut Vec<IoDone>, count: usize) {
        while done.len() < count {
            let fd = self.backend.completion_fd().expect("the rest is finished already");
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "{} of {count} done", done.len());
            self.backend.reap(done);
        }
        assert_eq!(done.len(), count);
    }

    /// Performs one request.
    pub(super) fn run(
        &self,
        operation: IoOperation,
        offset: u64,
        bytes: Option<u64>,
        segments: &[(u64, u32)],
    ) -> Result<(), IoError> {
        let request = self.request(operation, offset, bytes, segments);
        match self.run_all(vec![request]).pop().unwrap().outcome {
            IoOutcome::Done(result) => result,
            outcome => panic!("{outcome:?}, which nobody asked for"),
        }
    }
}

/// Opens `image` with the engine of `kind`; `None` where the system refuses io_uring.
pub(super) fn open(
    kind: Kind,
    image: &Path,
    read_only: bool,
) -> Option<Result<Arc<dyn Backend>, ImageError>> {
    let Kind::File(engine, cache) = kind else { panic!("no file") };
    let options = FileOptions { read_only, cache, engine, ..FileOptions::default() };
    match open_file(image, &options) {
        Err(ImageError::Resources { errno, .. }) if engine == Engine::IoUring => {
            eprintln!("skipped: io_uring is refused here: {errno}");
            None
        }
        opened => Some(opened),
    }
}

/// I/O threads of this process that bear their name.
pub(super) fn io_threads() -> usize {
    let is_ours = |task: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("disk-io"))
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter(|task| task.as_ref().is_ok_and(is_ours)).count()
}
