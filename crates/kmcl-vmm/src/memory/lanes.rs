//! Work on several parts at once.

use std::thread;

/// Most threads that work on parts. Each has about 4 MiB of buffers; with more, the file is what one
/// waits for.
const MAX_LANES: usize = 8;

/// A thread's tools, the part it is at, and what has become of it.
pub(super) trait Lane: Send {
    /// Works on its part, once.
    fn work(&mut self);
    /// Whether it has been at work since it was given its part.
    fn is_done(&self) -> bool;
}

/// How many lanes this machine keeps busy.
pub(super) fn count() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(MAX_LANES))
}

/// Has each lane work on its part, and waits for all of them.
pub(super) fn run<L: Lane>(lanes: &mut [L]) {
    let Some((own, others)) = lanes.split_first_mut() else { return };
    thread::scope(|scope| {
        for lane in others.iter_mut() {
            // Where no thread can be had, the work is done below.
            let _none_to_be_had = thread::Builder::new()
                .name("memory".to_owned())
                .spawn_scoped(scope, || lane.work());
        }
        own.work();
    });
    others.iter_mut().filter(|lane| !lane.is_done()).for_each(Lane::work);
}
