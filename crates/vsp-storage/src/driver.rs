//! The seam to whoever runs the threads.

use std::error::Error;
use std::sync::Arc;

use kmcl::Channel;

use crate::controller::Completions;

/// Runs a controller's channels and completions: an event loop, or a worker thread.
///
/// A controller calls this from its constructor and destructor, from the calls that attach and detach
/// disks, and, for subchannels, inside a packet callback of its primary channel.
///
/// With a worker of `kmcl-worker`:
///
/// ```
/// use std::error::Error;
/// use std::sync::{Arc, Mutex};
///
/// use kmcl::Channel;
/// use kmcl_worker::{Source, SourceId, Worker};
/// use vsp_storage::{Completions, Driver};
///
/// type Result = std::result::Result<(), Box<dyn Error + Send + Sync>>;
///
/// struct DiskIo(Arc<Completions>);
///
/// impl Source for DiskIo {
///     fn ready(&self) -> bool {
///         self.0.ready()
///     }
/// }
///
/// struct OneWorker {
///     worker: Worker,
///     sources: Mutex<Vec<(Arc<Completions>, SourceId)>>,
/// }
///
/// impl Driver for OneWorker {
///     fn add_channel(&self, channel: &Channel) -> Result {
///         Ok(self.worker.add(channel)?)
///     }
///
///     fn remove_channel(&self, channel: &Channel) {
///         self.worker.remove(channel);
///     }
///
///     fn add_completions(&self, one: Arc<Completions>) -> Result {
///         let source = Arc::new(DiskIo(Arc::clone(&one)));
///         let id = self.worker.add_source(Arc::clone(&one), source)?;
///         self.sources.lock().unwrap().push((one, id));
///         Ok(())
///     }
///
///     fn remove_completions(&self, one: &Arc<Completions>) {
///         let found = {
///             let mut sources = self.sources.lock().unwrap();
///             let at = sources.iter().position(|(other, _)| Arc::ptr_eq(other, one));
///             at.map(|at| sources.swap_remove(at).1)
///         };
///         if let Some(id) = found {
///             self.worker.remove_source(id);
///         }
///     }
/// }
/// ```
pub trait Driver: Send + Sync {
    /// From now on, drive `channel`: wait for its doorbell, set its waker, call its `process`.
    ///
    /// # Errors
    /// Whatever stands in the way; the channel is given up.
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop driving `channel`. When this returns, none of its callbacks runs and it has no waker,
    /// unless this was called in one of these very callbacks.
    fn remove_channel(&self, channel: &Channel);

    /// From now on, call [`Completions::ready`] whenever `completions` is readable, on any thread.
    ///
    /// # Errors
    /// Whatever stands in the way; the disk is not attached.
    fn add_completions(
        &self,
        completions: Arc<Completions>,
    ) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Stop waiting for `completions`.
    fn remove_completions(&self, completions: &Arc<Completions>);
}
