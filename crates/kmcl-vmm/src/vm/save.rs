//! Saving a VM: everything stands still, is written down, and goes on here or elsewhere.
//!
//! The order: the bus; the devices, which settle what they do while the guest computes on; then its processors.
//! What was in flight is saved as it is. Only then is memory written, which nobody changes any more.

use std::io::{BufWriter, Write};
use std::time::{Duration, Instant};

use kmcl::SaveOptions;
use saved_state::FormatVersion;
use saved_state::file::FileWriter;
use saved_state::text::Producer;
use vmbus_host::HeldBus;

use super::error::VmError;
use super::saved::{NewFolder, PRODUCER};
use super::{Core, Live, Shared, VmEnd};
use crate::control::{Compression, SaveRequest, Saved, State};
use crate::devices::{StillDevices, counts_requests};
use crate::machine::Running;
use crate::memory::{self, MemoryProgress, save_memory};

/// How long requests may take to settle that run and cannot be cancelled.
const SETTLE: Duration = Duration::from_secs(10);

/// Everything that stands still. Dropped in this order: devices before the bus that they are on, both
/// before the guest does anything.
struct Still<'a> {
    devices: StillDevices,
    bus: HeldBus,
    processors: Paused<'a>,
}

/// Processors that stand, and go on when this is dropped if they did before.
struct Paused<'a>(Option<&'a Running>);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if let Some(running) = self.0 {
            running.resume();
        }
    }
}

impl<'a> Still<'a> {
    fn stand(live: &'a Live) -> Result<Self, VmError> {
        let bus = live.running.partition().bus().hold();
        let devices = live.devices.freeze()?;
        devices.wait(SETTLE)?;
        let running = &live.running;
        let goes_on = !running.is_paused();
        running.pause()?;
        Ok(Self { devices, bus, processors: Paused(goes_on.then_some(running)) })
    }
}

impl Still<'_> {
    /// The guest goes on elsewhere: nothing here does.
    fn move_away(self) {
        let Self { devices, bus, mut processors } = self;
        devices.move_away();
        bus.move_away();
        processors.0 = None;
    }
}

impl Shared {
    /// Saves the VM. Whatever fails, it goes on as before.
    pub(super) fn save(&self, request: &SaveRequest) -> Result<Saved, VmError> {
        let mut core = self.core();
        let folder = NewFolder::create(&request.destination)?;
        let before = std::mem::replace(&mut self.status().state, State::Saving);
        let saved = self.save_to(&core, &folder, request);
        {
            let mut status = self.status();
            status.state = before;
            status.progress = None;
        }
        let saved = saved?;
        if !request.keep_running {
            self.end(&mut core, VmEnd::Saved);
        }
        Ok(saved)
    }

    /// Saves the VM. If it is not to go on, it stands still for good afterwards.
    fn save_to(
        &self,
        core: &Core,
        folder: &NewFolder,
        request: &SaveRequest,
    ) -> Result<Saved, VmError> {
        let config = self.status().config.clone();
        let (saved, still) = self.write(core.live()?, folder, request)?;
        if request.keep_running {
            // The medium may be slow: the guest need not wait for it.
            drop(still);
            folder.keep(&config)?;
        } else {
            core.disks.flush()?;
            folder.keep(&config)?;
            still.move_away();
        }
        Ok(saved)
    }

    fn write<'a>(
        &self,
        live: &'a Live,
        folder: &NewFolder,
        request: &SaveRequest,
    ) -> Result<(Saved, Still<'a>), VmError> {
        let began = Instant::now();
        let still = Still::stand(live)?;
        let stood = Instant::now();
        let compression = match request.compression {
            Compression::None => memory::Compression::None,
            Compression::Zstd => memory::Compression::Zstd { level: memory::ZSTD_LEVEL },
        };
        let mut progress = |progress: MemoryProgress| self.status().progress = Some(progress);
        let ram = live.running.ram();
        let index = save_memory(ram, &folder.path("memory"), compression, &mut progress)?;
        let remembered = Instant::now();

        let options = SaveOptions { format: FormatVersion::NEWEST, producer: producer() };
        let unsavable = |error: &dyn std::error::Error| VmError::Unsavable(error.to_string());
        let mut file = FileWriter::new(options.format, options.producer);
        file.add("machine", 0, live.running.save()?);
        let stream = index.save(options.format, options.producer);
        file.add("memory", 0, stream.map_err(|error| unsavable(&error))?);
        let stream = still.bus.save(&options).map_err(|error| unsavable(&error))?;
        file.add("bus", 0, stream);
        still.devices.add_to(&mut file, &options)?;
        let mut out = BufWriter::with_capacity(64 << 10, folder.file("state")?);
        let written = file.write_to(&mut out).map_err(|error| unsavable(&error))?;
        out.flush().map_err(VmError::file(folder.path("state")))?;
        let written_at = Instant::now();

        let streams = written.streams.iter().map(|(entry, _)| entry);
        let channels = streams.filter(|entry| counts_requests(entry.stream));
        let saved = Saved {
            freeze_us: micros(stood - began),
            saved_us: micros(written_at - remembered),
            memory_us: micros(remembered - stood),
            state_bytes: written.bytes,
            memory_bytes: index.memory_bytes(),
            memory_written_bytes: index.stored_bytes(),
            in_flight: channels.map(|entry| u64::from(entry.items)).sum(),
        };
        Ok((saved, still))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn producer() -> Producer {
    Producer::new(PRODUCER).unwrap_or(Producer::EMPTY)
}
