//! Memory that is read from its file while the guest runs.
//!
//! A thread brings in what somebody waits for, and the rest one part after the other in between. Pages
//! that are zeros are left missing until somebody touches them. When all parts are in, the thread gives
//! memory back to the system's own handling, where a missing page is one of zeros, and ends.
//!
//! Where the file fails half-way, the missing pages are nowhere: whoever touches one waits for ever.
//! Nothing may go on with zeros in their place, which the guest could write to its disk. So the owner is
//! told, and has to end the process.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::fault::MissingPages;
use super::index::PART_BYTES;
use super::part;
use super::source::PartReader;
use crate::error::Error;

/// Told once if memory cannot be loaded: the guest cannot go on, and the process should end. Called on a
/// thread of its own.
pub type LoadFailed = Box<dyn FnOnce(Error) + Send>;

/// How far loading has come.
#[derive(Clone, Debug)]
enum Phase {
    Loading,
    Loaded,
    Failed(String),
}

/// What the thread and the memory's owners share.
struct Shared {
    stopping: AtomicBool,
    loaded_bytes: AtomicU64,
    phase: Mutex<Phase>,
    changed: Condvar,
}

/// Memory that is being loaded. Dropped with the last of the memory's users, and not before: the thread
/// then ends, wherever it is.
pub(super) struct Loading {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Loading {
    pub(super) fn start(
        pages: MissingPages,
        reader: PartReader,
        failed: LoadFailed,
    ) -> Result<Self, Error> {
        let shared = Arc::new(Shared::new());
        let loader = Loader::new(pages, reader, Arc::clone(&shared));
        let thread = thread::Builder::new().name("memory".to_owned());
        let thread = thread.spawn(move || loader.run(failed)).map_err(Error::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Bytes of memory that are there, or known to be zeros.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.shared.loaded_bytes.load(Ordering::Relaxed)
    }

    /// Waits until all of it is there.
    pub(super) fn wait(&self) -> Result<(), Error> {
        let mut phase = self.shared.phase();
        loop {
            match &*phase {
                Phase::Loading => {
                    let waited = self.shared.changed.wait(phase);
                    phase = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Phase::Loaded => return Ok(()),
                Phase::Failed(why) => {
                    return Err(Error::Memory(format!("cannot be loaded: {why}")));
                }
            }
        }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let phase = self.shared.phase();
        self.shared.stopping.store(true, Ordering::Relaxed);
        drop(phase);
        self.shared.changed.notify_all();
        // It may be the thread itself that drops this, in its owner's callback.
        let thread = self.thread.take();
        if let Some(thread) = thread.filter(|it| it.thread().id() != thread::current().id()) {
            let _ended = thread.join();
        }
    }
}

impl Shared {
    fn new() -> Self {
        Self {
            stopping: AtomicBool::new(false),
            loaded_bytes: AtomicU64::new(0),
            phase: Mutex::new(Phase::Loading),
            changed: Condvar::new(),
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        *self.phase() = phase;
        self.changed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// What brings parts in.
pub(super) struct Loader {
    pages: MissingPages,
    reader: PartReader,
    /// Of each part, whether it is in.
    loaded: Vec<bool>,
    /// No part before this one is missing.
    first_missing: usize,
    shared: Arc<Shared>,
}

impl Loader {
    /// One that brings in what it is told to, on the caller's thread.
    #[cfg(test)]
    pub(super) fn by_hand(pages: MissingPages, reader: PartReader) -> Self {
        Self::new(pages, reader, Arc::new(Shared::new()))
    }

    /// Parts that are in.
    #[cfg(test)]
    pub(super) fn loaded(&self) -> usize {
        self.loaded.iter().filter(|loaded| **loaded).count()
    }

    fn new(pages: MissingPages, reader: PartReader, shared: Arc<Shared>) -> Self {
        let loaded = vec![false; reader.index().parts.len()];
        Self { pages, reader, loaded, first_missing: 0, shared }
    }

    fn run(mut self, failed: LoadFailed) {
        match self.load() {
            Ok(true) => self.shared.set(Phase::Loaded),
            Ok(false) => {}
            Err(error) => {
                self.shared.set(Phase::Failed(error.to_string()));
                failed(error);
                // As long as `pages` are held, whoever touches a missing one waits.
                let mut phase = self.shared.phase();
                while !self.shared.is_stopping() {
                    let waited = self.shared.changed.wait(phase);
                    phase = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Brings everything in; false if there is nobody left to do it for.
    fn load(&mut self) -> Result<bool, Error> {
        while !self.shared.is_stopping() {
            self.serve()?;
            if !self.prefetch()? {
                self.pages.release().map_err(failed)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Brings in every page that somebody waits for.
    pub(super) fn serve(&mut self) -> Result<(), Error> {
        while let Some(offset) = self.pages.next().map_err(failed)? {
            self.bring_in(usize::try_from(offset / PART_BYTES).unwrap_or(usize::MAX))?;
            // The part may have had zeros there, or have been in before the page was asked for.
            self.pages.settle(offset).map_err(failed)?;
        }
        Ok(())
    }

    /// Brings in the next part that nobody waits for; false if all are in.
    fn prefetch(&mut self) -> Result<bool, Error> {
        let rest = self.loaded.get(self.first_missing..).unwrap_or_default();
        let Some(next) = rest.iter().position(|loaded| !loaded) else { return Ok(false) };
        let number = self.first_missing + next;
        self.bring_in(number)?;
        self.first_missing = number + 1;
        Ok(true)
    }

    /// Brings in what part `number` has beside zeros, unless it is in already.
    fn bring_in(&mut self, number: usize) -> Result<(), Error> {
        let Some(loaded) = self.loaded.get_mut(number).filter(|loaded| !**loaded) else {
            return Ok(());
        };
        if let Some(content) = self.reader.read(number)? {
            let offset = number as u64 * PART_BYTES;
            if self.pages.are_huge() {
                self.pages.fill(offset, content).map_err(failed)?;
            } else {
                for run in part::runs(content) {
                    let bytes = content.get(run.clone()).unwrap_or_default();
                    self.pages.fill(offset + run.start as u64, bytes).map_err(failed)?;
                }
            }
        }
        *loaded = true;
        self.shared.loaded_bytes.fetch_add(PART_BYTES, Ordering::Relaxed);
        Ok(())
    }
}

fn failed(error: io::Error) -> Error {
    Error::Memory(format!("pages cannot be filled: {error}"))
}
