//! Memory saved and restored, in every way, and what is refused.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::mpsc::channel;

use tempfile::TempDir;
use vmbus_memory::{MappingBudget, RingPages};

use super::*;

const MIB: u64 = 1 << 20;
const FORMS: [Compression; 2] = [Compression::None, Compression::Zstd { level: ZSTD_LEVEL }];

/// What is at each of some guest addresses, over the whole of a memory of `bytes`.
fn samples(bytes: u64) -> Vec<(u64, Vec<u8>)> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut samples = Vec::new();
    for region in layout(bytes) {
        // The first and the last bytes of a region; the end of one part and the start of the next.
        for at in [0, PART_BYTES - 3, region.len - 3] {
            samples.push((region.gpa + at, vec![0xa5, 0x5a, 1]));
        }
        for _ in 0..20 {
            let len = [1, 100, 4096, 40_000][usize::try_from(random() % 4).unwrap()];
            // From the third part on, away from those above.
            let room = region.len - 3 * PART_BYTES - len as u64;
            let gpa = region.gpa + 2 * PART_BYTES + random() % room;
            samples.push((gpa, (0..len).map(|_| random().to_le_bytes()[0]).collect()));
        }
    }
    samples
}

/// A memory with [`samples`] in it, of which later ones win.
fn filled(bytes: u64) -> Ram {
    let ram = Ram::new(bytes).unwrap();
    for (gpa, bytes) in samples(bytes) {
        ram.memory().write(gpa, &bytes).unwrap();
    }
    ram
}

/// That both have the same bytes, everywhere.
#[track_caller]
fn assert_same(one: &Ram, other: &Ram, what: &str) {
    assert_eq!(one.placed(), other.placed());
    let (mut left, mut right) = (part::buffer(), part::buffer());
    let mut at = 0;
    while at < one.bytes() {
        let gpa = Placed::gpa_of(&one.placed(), at).unwrap();
        one.memory().read(gpa, &mut left).unwrap();
        other.memory().read(gpa, &mut right).unwrap();
        assert!(left == right, "{what}: part at {at:#x}");
        at += PART_BYTES;
    }
}

fn save(ram: &Ram, to: &Path, compression: Compression) -> MemoryIndex {
    save_memory(ram, to, compression, &mut |_| {}).unwrap()
}

fn eager(from: &Path, index: &MemoryIndex) -> Result<Ram, Error> {
    Ram::restore(from, index, Load::Eager, false, &mut |_| {})
}

fn lazy(from: &Path, index: &MemoryIndex) -> Ram {
    let failed: LoadFailed = Box::new(|error| panic!("{error}"));
    Ram::restore(from, index, Load::Lazy { failed }, false, &mut |_| {}).unwrap()
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Whether this system lets us bring in pages when they are touched.
fn can_be_lazy() -> bool {
    let ram = Ram::new(LEAST).unwrap();
    let can = MissingPages::watch(&ram.map, false);
    if let Err(error) = &can {
        println!("not tested: userfaultfd: {error}");
    }
    can.is_ok()
}

#[test]
fn memory_comes_back_in_every_way() {
    let dir = dir();
    let ram = filled(LEAST);
    for compression in FORMS {
        let path = dir.path().join(format!("{compression:?}"));
        let mut last = None;
        let index = save_memory(&ram, &path, compression, &mut |progress| last = Some(progress));
        let index = index.unwrap();
        let MemoryProgress { done_bytes, total_bytes, written_bytes } = last.unwrap();
        assert_eq!((done_bytes, total_bytes, written_bytes), (LEAST, LEAST, index.stored_bytes()));
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), index.file_bytes());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

        let mut last = None;
        let restored =
            Ram::restore(&path, &index, Load::Eager, false, &mut |progress| last = Some(progress));
        let restored = restored.unwrap();
        assert_same(&ram, &restored, "eager");
        assert_eq!(last.unwrap().done_bytes, LEAST);

        // Every page of it is touched while it is still being loaded.
        let restored = lazy(&path, &index);
        assert_same(&ram, &restored, "lazy");
        restored.wait_until_loaded().unwrap();
        assert_eq!(restored.loaded_bytes(), LEAST);
        assert_same(&ram, &restored, "lazy, loaded");

        // Saved while it is still being loaded, what is missing is not taken for zeros.
        let again = dir.path().join("at once");
        assert_eq!(save(&lazy(&path, &index), &again, compression), index);
        fs::remove_file(&again).unwrap();

        // And once more from what was restored, to the same file byte by byte.
        let again = dir.path().join("again");
        assert_eq!(save(&restored, &again, compression), index);
        assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap());
        fs::remove_file(&again).unwrap();
    }
}

/// Memory on both sides of the gap, nearly all of it never touched: neither files nor memory are filled with
/// zeros.
#[test]
fn zeros_are_neither_written_nor_read() {
    let dir = dir();
    let bytes = 4 << 30;
    let ram = filled(bytes);
    let blocks = |file: &File| file.metadata().unwrap().blocks() * 512;
    // A page that was touched, and is zeros again.
    ram.memory().write(100 * MIB, &[1]).unwrap();
    ram.memory().fill(100 * MIB, 1, 0).unwrap();
    for compression in FORMS {
        let path = dir.path().join(format!("{compression:?}"));
        let index = save(&ram, &path, compression);
        let stored = index.stored_bytes();
        assert!(stored <= blocks(&ram.file) - 4096, "{stored} of {} bytes", blocks(&ram.file));
        let kept = File::open(&path).unwrap();
        assert!(blocks(&kept) < blocks(&ram.file) + MIB, "{} bytes on the disk", blocks(&kept));
        for restored in [eager(&path, &index).unwrap(), lazy(&path, &index)] {
            restored.wait_until_loaded().unwrap();
            assert!(blocks(&restored.file) < blocks(&ram.file), "{compression:?}");
            for (gpa, _) in samples(bytes) {
                let (mut left, mut right) = ([0; 4096], [0; 4096]);
                let gpa = gpa / 4096 * 4096;
                ram.memory().read(gpa, &mut left).unwrap();
                restored.memory().read(gpa, &mut right).unwrap();
                assert_eq!(left, right, "{compression:?} {gpa:#x}");
            }
        }
    }
}

#[test]
fn a_file_that_is_there_is_left_alone() {
    let dir = dir();
    let path = dir.path().join("memory");
    fs::write(&path, "precious").unwrap();
    let error = save_memory(&filled(LEAST), &path, Compression::None, &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

/// Nothing is left of a file that could not be written to its end.
#[test]
fn a_file_that_cannot_be_written_is_removed() {
    let dir = dir();
    let path = dir.path().join("memory");
    fs::write(&path, "half of it").unwrap();
    // Opened for reading, it takes nothing.
    let file = File::open(&path).unwrap();
    let written = save::save_into(&filled(LEAST), &file, &path, Compression::None, &mut |_| {});
    assert!(matches!(written, Err(Error::File { .. })), "{written:?}");
    assert!(!path.exists());
}

/// What is not the file that was saved, or is damaged, is refused; nothing of it is taken for memory.
#[test]
fn other_files_are_refused() {
    let dir = dir();
    let ram = filled(LEAST);
    type Change = fn(&Path, &MemoryIndex);
    let changes: [(&str, Change); 7] = [
        ("No such file or directory", |path, _| fs::remove_file(path).unwrap()),
        ("not a file", |path, _| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("bytes, and had", |path, index| set_len(path, index.file_bytes() - 1)),
        ("bytes, and had", |path, index| set_len(path, index.file_bytes() + 1)),
        ("bytes, and had", |path, _| set_len(path, 0)),
        ("the 2 MiB at offset 0x0 of memory", |path, index| {
            flip(path, index.parts[0].at + u64::from(index.parts[0].length) / 2);
        }),
        // Of an index that is not of this file: checksums differ, or frames.
        ("of the 2 MiB at offset|the 2 MiB at offset", |path, index| {
            fs::write(path, vec![0x55; usize::try_from(index.file_bytes()).unwrap()]).unwrap();
        }),
    ];
    for compression in FORMS {
        for (number, (expected, change)) in changes.iter().enumerate() {
            let path = dir.path().join(format!("{compression:?} {number}"));
            let index = save(&ram, &path, compression);
            change(&path, &index);
            let error = eager(&path, &index).unwrap_err().to_string();
            let told = expected.split('|').any(|expected| error.contains(expected));
            assert!(told && error.starts_with(path.to_str().unwrap()), "{expected}: {error}");
        }
    }
}

fn set_len(path: &Path, len: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Frames that hold more than a part, or less, or what is none, within the bounds of an index.
#[test]
fn frames_that_are_not_one_part_are_refused() {
    let dir = dir();
    let bomb = {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        let zeros = part::buffer();
        (0..512).for_each(|_| encoder.write_all(&zeros).unwrap());
        encoder.finish().unwrap()
    };
    assert!(bomb.len() < usize::try_from(MIB).unwrap(), "a GiB in {} bytes", bomb.len());
    let two = zstd::bulk::compress(&part::buffer(), 1).unwrap().repeat(2);
    let short = zstd::bulk::compress(&part::buffer()[1..], 1).unwrap();
    let cut = zstd::bulk::compress(&part::buffer(), 1).unwrap()[..20].to_vec();
    for (name, frame, expected) in [
        ("bomb", bomb, "too small"),
        ("two", two, "too small"),
        ("short", short, "has 2097151 bytes"),
        ("cut", cut, "the frame at byte 0, of the 2 MiB at offset 0x400000"),
        ("garbage", vec![0x33; 1000], "the frame at byte 0"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, &frame).unwrap();
        let mut index = MemoryIndex::zeros(Form::Zstd, layout(LEAST));
        index.parts[2].length = u32::try_from(frame.len()).unwrap();
        let error = eager(&path, &index).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}

/// Many threads on all pages at once, each in an order of its own.
#[test]
fn whoever_touches_a_page_that_is_not_there_gets_what_was_saved() {
    let dir = dir();
    let ram = filled(LEAST);
    for compression in FORMS {
        let path = dir.path().join(format!("{compression:?}"));
        let index = save(&ram, &path, compression);
        let restored = lazy(&path, &index);
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let (ram, restored) = (&ram, &restored);
                scope.spawn(move || {
                    let pages = LEAST / 4096;
                    for n in 0..pages {
                        // No two threads have a step in common; each shares no factor with the pages.
                        let gpa = (n * (2 * thread + 4097) + thread * 1000) % pages * 4096;
                        let (mut left, mut right) = ([0; 4096], [0; 4096]);
                        ram.memory().read(gpa, &mut left).unwrap();
                        restored.memory().read(gpa, &mut right).unwrap();
                        assert!(left == right, "{compression:?} thread {thread} at {gpa:#x}");
                    }
                });
            }
        });
        assert_same(&ram, &restored, "after all of them");
    }
}

/// A ring is read through a mapping of its own, which nobody watches: its pages are brought in before.
#[test]
fn a_ring_that_was_not_loaded_yet_has_its_bytes() {
    if !can_be_lazy() {
        return;
    }
    let dir = dir();
    let path = dir.path().join("memory");
    let ram = Ram::new(LEAST).unwrap();
    // Each in a part of its own.
    let pfns = [0x1000, 0x3001, 0x2fff, 0x0005];
    for pfn in pfns {
        ram.memory().write(pfn * 4096, &[pfn.to_le_bytes()[0] | 0x80; 4096]).unwrap();
    }
    let index = save(&ram, &path, Compression::None);

    // Nothing is brought in but what is asked for.
    let source = MemoryFile::open(&path, &index).unwrap();
    let restored = Ram::new(LEAST).unwrap();
    let pages = MissingPages::watch(&restored.map, false).unwrap();
    let mut loader = lazy::Loader::by_hand(pages, source.reader().unwrap());
    let memory = restored.memory().clone();
    let reader = std::thread::spawn(move || {
        let ring = RingPages::map(&memory, &pfns, &MappingBudget::default()).unwrap();
        assert!(ring.is_mapped());
        let mut data = vec![0; 3 * 4096];
        ring.read(0, &mut data);
        (ring.control_word::<0>().load(std::sync::atomic::Ordering::Relaxed), data)
    });
    while !reader.is_finished() {
        loader.serve().unwrap();
        std::thread::yield_now();
    }
    let (control, data) = reader.join().unwrap();
    assert_eq!(control, 0x8080_8080);
    for (page, pfn) in data.chunks(4096).zip(&pfns[1..]) {
        assert_eq!(page, [pfn.to_le_bytes()[0] | 0x80; 4096], "page {pfn:#x}");
    }
    assert_eq!(loader.loaded(), 4, "parts that a page of the ring is in");
}

/// Whoever still uses the memory keeps it being loaded; the last one ends that, wherever it is.
#[test]
fn loading_lives_as_long_as_the_memory() {
    let dir = dir();
    let ram = filled(LEAST);
    let path = dir.path().join("memory");
    let index = save(&ram, &path, Compression::Zstd { level: ZSTD_LEVEL });
    for _ in 0..20 {
        drop(lazy(&path, &index));
    }
    let memory = lazy(&path, &index).memory().clone();
    let (mut left, mut right) = (part::buffer(), part::buffer());
    for part in (0..LEAST / PART_BYTES).rev() {
        let gpa = part * PART_BYTES;
        ram.memory().read(gpa, &mut left).unwrap();
        memory.read(gpa, &mut right).unwrap();
        assert!(left == right, "{gpa:#x}");
    }
}

/// A file that turns out to be damaged while the guest runs: its owner is told where, a save is refused,
/// and the pages that are missing stay so: nobody ever finds zeros there.
#[test]
fn memory_that_cannot_be_loaded_stays_missing() {
    if !can_be_lazy() {
        return;
    }
    let dir = dir();
    let ram = filled(LEAST);
    let path = dir.path().join("memory");
    let index = save(&ram, &path, Compression::None);
    flip(&path, 0);
    let (told, failures) = channel();
    let failed: LoadFailed = Box::new(move |error| told.send(error.to_string()).unwrap());
    let load = Load::Lazy { failed };
    let restored = Ram::restore(&path, &index, load, false, &mut |_| {}).unwrap();
    let error = failures.recv().unwrap();
    assert!(error.contains("the 2 MiB at offset 0x0 of memory"), "{error}");
    assert!(restored.wait_until_loaded().is_err());
    let again = dir.path().join("again");
    assert!(save_memory(&restored, &again, Compression::None, &mut |_| {}).is_err());
    assert!(!again.exists());
    // It is still watched: one mapping has one who brings in its pages.
    assert!(MissingPages::watch(&restored.map, false).is_err());
}

/// Its owner may let go of the memory in the very call that tells of the failure.
#[test]
fn a_failure_may_end_everything() {
    let dir = dir();
    let path = dir.path().join("memory");
    let index = save(&filled(LEAST), &path, Compression::None);
    flip(&path, 0);
    if !can_be_lazy() {
        return;
    }
    let (give, take) = channel::<Ram>();
    let (told, failures) = channel();
    let failed: LoadFailed = Box::new(move |_| {
        drop(take.recv());
        told.send(()).unwrap();
    });
    let load = Load::Lazy { failed };
    give.send(Ram::restore(&path, &index, load, false, &mut |_| {}).unwrap()).unwrap();
    failures.recv().unwrap();
}

/// With huge pages where the system has some; else, what is missing is said.
#[test]
fn huge_pages_are_had_or_asked_for() {
    let needed = LEAST / UNIT;
    let ram = match Ram::with_huge_pages(LEAST) {
        Ok(ram) => ram,
        Err(error) => {
            println!("not tested: {error}");
            assert!(free_huge_pages().unwrap_or(0) < 2 * needed, "{error}");
            assert!(matches!(error, Error::HugePages { needed: 32, .. }), "{error:?}");
            return;
        }
    };
    for (gpa, bytes) in samples(LEAST) {
        ram.memory().write(gpa, &bytes).unwrap();
    }
    let dir = dir();
    for compression in FORMS {
        let path = dir.path().join(format!("{compression:?}"));
        let index = save(&ram, &path, compression);
        for load in [Load::Eager, Load::Lazy { failed: Box::new(|error| panic!("{error}")) }] {
            let how = format!("{compression:?} {load:?}");
            let Ok(restored) = Ram::restore(&path, &index, load, true, &mut |_| {}) else {
                assert!(free_huge_pages().unwrap_or(0) < needed);
                println!("not tested: {how}: too few huge pages");
                continue;
            };
            assert_same(&ram, &restored, &how);
            restored.wait_until_loaded().unwrap();
            assert_same(&ram, &restored, &how);
        }
        // From huge pages to others.
        assert_same(&ram, &lazy(&path, &index), "small pages");
    }
    assert!(matches!(Ram::with_huge_pages(MOST), Err(Error::HugePages { .. })));
}

#[test]
fn memory_that_no_guest_has_is_refused() {
    for bytes in [0, LEAST - UNIT, LEAST + 4096, MOST + UNIT, u64::MAX] {
        assert!(matches!(Ram::new(bytes), Err(Error::MemorySize { .. })), "{bytes}");
    }
    let mut index = MemoryIndex::zeros(Form::Plain, layout(LEAST));
    index.regions[0].gpa = UNIT;
    let error = eager(Path::new("/nowhere"), &index).unwrap_err();
    assert!(matches!(error, Error::MemoryLayout { bytes: LEAST }), "{error}");
}
