//! Disks that come and go, and the table of them that commands are judged by.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError, RwLock};

use kmcl::SendFlags;
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::srb::ScsiAddress;

use super::completions::Completions;
use super::{ControllerError, Core, lock};
use crate::disk::Disk;
use crate::scsi::bus::{Lun, LunError, LunTable};

/// The disks of a controller.
#[derive(Default)]
pub(super) struct Luns {
    table: RwLock<Arc<LunTable>>,
    /// Counts changes of the table.
    generation: AtomicU64,
    /// Counts disks that were attached.
    pub(super) attachments: AtomicU64,
    attached: Mutex<Vec<Attached>>,
    /// One of `attached` was detached and has not gone yet.
    has_detached: AtomicBool,
}

/// A disk from its attachment until its last request has ended.
struct Attached {
    lun: Arc<Lun>,
    completions: Option<Arc<Completions>>,
    is_detached: bool,
}

impl Attached {
    /// Whether the disk was detached and nothing of it is in flight.
    fn is_over(&self) -> bool {
        // Requests in flight hold their LUN, and so do tables that it is in: the present one, and
        // those that batches go by. Once it is in none, nobody can take hold of it any more.
        self.is_detached && Arc::strong_count(&self.lun) == 1
    }
}

/// A table that a batch of packets goes by.
struct Cached {
    /// Address of the `Luns`: only compared.
    of: usize,
    generation: u64,
    table: Arc<LunTable>,
}

thread_local! {
    /// The table of the batch that this thread processes. Kept from one packet to the next: taking
    /// hold of it for each would cost more than all the rest of judging a read. [`Luns::forget`] ends
    /// it with the batch, so that no disk is held longer.
    static CACHED: Cell<Option<Cached>> = const { Cell::new(None) };
}

impl Luns {
    /// Calls `judge` with the present table. No lock is held meanwhile.
    pub(super) fn with_table<T>(&self, judge: impl FnOnce(&LunTable) -> T) -> T {
        // Pairs with the store in `change`: a guest that was told of a change meets it.
        let generation = self.generation.load(Ordering::Acquire);
        let of = std::ptr::from_ref(self).addr();
        let cached = match CACHED.take() {
            Some(cached) if cached.of == of && cached.generation == generation => cached,
            _ => Cached { of, generation, table: self.table() },
        };
        let result = judge(&cached.table);
        CACHED.set(Some(cached));
        result
    }

    /// Ends what this thread's batch has kept.
    pub(super) fn forget(&self) {
        drop(CACHED.take());
        // We let go of the table, then look whether a disk was detached; who detaches one says so,
        // then looks whether somebody holds the table. Without a full fence on both sides each may
        // miss the other, and the disk stays until the guest's next packet. Pairs with the fence in
        // `retire_disks`.
        fence(Ordering::SeqCst);
    }

    pub(super) fn table(&self) -> Arc<LunTable> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the table to what `change` makes of it.
    fn change<T>(
        &self,
        change: impl FnOnce(&LunTable) -> Result<(LunTable, T), LunError>,
    ) -> Result<T, LunError> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let (changed, result) = change(&table)?;
        *table = Arc::new(changed);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(result)
    }

    /// Disks that were ever attached.
    pub(super) fn attachments(&self) -> u64 {
        self.attachments.load(Ordering::Relaxed)
    }

    /// The completions of all disks.
    pub(super) fn completions(&self) -> Vec<Arc<Completions>> {
        lock(&self.attached).iter().filter_map(|one| one.completions.clone()).collect()
    }

    /// All completions, which nobody waits for after this.
    pub(super) fn take_completions(&self) -> Vec<Arc<Completions>> {
        lock(&self.attached).iter_mut().filter_map(|one| one.completions.take()).collect()
    }

    /// Lets go of every disk.
    pub(super) fn clear(&self) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::default();
        for one in lock(&self.attached).drain(..) {
            one.lun.disk.release();
        }
    }
}

impl Core {
    /// See [`ScsiController::attach`](super::ScsiController::attach).
    pub(super) fn attach(
        &self,
        address: ScsiAddress,
        disk: Arc<Disk>,
    ) -> Result<(), ControllerError> {
        if self.is_held() {
            return Err(LunError::Frozen { address }.into());
        }
        let attachment = self.luns.attachments.fetch_add(1, Ordering::Relaxed) + 1;
        self.attach_as(address, disk, attachment)?;
        self.notify();
        Ok(())
    }

    /// Puts a disk in its place without telling the guest.
    pub(super) fn attach_as(
        &self,
        address: ScsiAddress,
        disk: Arc<Disk>,
        attachment: u64,
    ) -> Result<(), ControllerError> {
        if !disk.claim() {
            return Err(LunError::InUse { address }.into());
        }
        // Now rather than when the controller is saved: that must not wait for a disk.
        let _kept = disk.identity();
        let lun = Lun::new(address, disk, attachment);
        if let Err(error) = self.attach_claimed(&lun) {
            lun.disk.release();
            return Err(error);
        }
        Ok(())
    }

    fn attach_claimed(&self, lun: &Arc<Lun>) -> Result<(), ControllerError> {
        // Before the guest can reach the disk, somebody must wait for its completions.
        let completions = match lun.disk.backend().completion_fd() {
            Some(fd) => {
                let fd = fd.try_clone_to_owned().map_err(ControllerError::Descriptor)?;
                let new = Completions::new(self.myself.clone(), Arc::clone(&lun.disk), fd);
                self.driver.add_completions(Arc::clone(&new)).map_err(ControllerError::Driver)?;
                Some(new)
            }
            None => None,
        };
        let entry = Attached { lun: Arc::clone(lun), completions, is_detached: false };
        lock(&self.luns.attached).push(entry);
        let added = self.luns.change(|table| Ok((table.attach(Arc::clone(lun))?, ())));
        if added.is_err() {
            let unused = {
                let mut attached = lock(&self.luns.attached);
                let at = attached.iter().position(|one| Arc::ptr_eq(&one.lun, lun));
                at.and_then(|at| attached.swap_remove(at).completions)
            };
            if let Some(unused) = unused {
                self.driver.remove_completions(&unused);
            }
        }
        Ok(added?)
    }

    /// See [`ScsiController::detach`](super::ScsiController::detach).
    pub(super) fn detach(&self, address: ScsiAddress) -> Result<Arc<Disk>, LunError> {
        if self.is_held() {
            return Err(LunError::Frozen { address });
        }
        let lun = self.luns.change(|table| table.detach(address))?;
        let disk = Arc::clone(&lun.disk);
        {
            let mut attached = lock(&self.luns.attached);
            if let Some(one) = attached.iter_mut().find(|one| Arc::ptr_eq(&one.lun, &lun)) {
                one.is_detached = true;
                self.luns.has_detached.store(true, Ordering::Release);
            }
        }
        drop(lun);
        self.retire_disks();
        self.notify();
        Ok(disk)
    }

    /// Lets go of disks that were detached and whose last request has ended.
    pub(super) fn retire_disks(&self) {
        if !self.luns.has_detached.load(Ordering::Acquire) {
            return;
        }
        fence(Ordering::SeqCst); // pairs with that in `Luns::forget`
        let over: Vec<Attached> = {
            let mut attached = lock(&self.luns.attached);
            let all = std::mem::take(&mut *attached);
            let (over, rest) = all.into_iter().partition(Attached::is_over);
            *attached = rest;
            let more = attached.iter().any(|one| one.is_detached);
            self.luns.has_detached.store(more, Ordering::Release);
            over
        };
        for Attached { lun, completions, .. } in over {
            if let Some(completions) = completions {
                self.driver.remove_completions(&completions);
            }
            lun.disk.release();
        }
    }

    /// Tells a guest that is there to look at its LUNs again. It looks anyway when it comes.
    ///
    /// For a LUN that is gone too: REMOVE_DEVICE names none, so a guest could as well take it for the
    /// end of the controller.
    fn notify(&self) {
        let Some(form) = self.ready_form() else { return };
        let Some(channel) = self.channel(0) else { return };
        let Some(packet) = channel.packet_allocate() else {
            // So many notices wait that the guest is going to look.
            return;
        };
        let notice = VstorPacket::notice(Operation::ENUMERATE_BUS);
        if let Err(error) = packet.send(notice.bytes(form), None, SendFlags::empty()) {
            tracing::debug!(error = %error.error, "guest not told of changed LUNs");
        }
    }
}
