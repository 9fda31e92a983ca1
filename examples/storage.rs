//! A SCSI disk embedded in a host with one worker thread, and a guest that writes and reads it. The
//! two share memory over a Unix socket, and could as well be two processes.
//!
//! `cargo run -p kmcl-examples --example storage`

use std::error::Error;
use std::sync::Arc;

use kmcl::{Channel, Guid};
use kmcl_worker::{Source, Worker};
use vmbus_unix::{UnixGuest, UnixHost};
use vsc_storage::{ClientConfig, StorageClient};
use vsp_storage::block::RamBackend;
use vsp_storage::{
    Completions, ControllerConfig, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};

type Failure = Box<dyn Error + Send + Sync>;

/// Runs the controller's channels on the worker. A RAM disk is never waited for.
struct OneWorker(Arc<Worker>);

impl Driver for OneWorker {
    fn add_channel(&self, channel: &Channel) -> Result<(), Failure> {
        Ok(self.0.add(channel)?)
    }
    fn remove_channel(&self, channel: &Channel) {
        self.0.remove(channel);
    }
    fn add_completions(&self, _completions: Arc<Completions>) -> Result<(), Failure> {
        Ok(())
    }
    fn remove_completions(&self, _completions: &Arc<Completions>) {}
}

/// Control messages of either end of the bus.
struct Messages<T>(Arc<T>, fn(&T) -> bool);

impl<T: Send + Sync> Source for Messages<T> {
    fn ready(&self) -> bool {
        self.1(&self.0)
    }
}

fn main() -> Result<(), Failure> {
    // The host: a bus behind a socket, a controller with one disk, and the thread that runs both.
    let socket = std::env::temp_dir().join(format!("kmcl-example-{}.sock", std::process::id()));
    let worker = Arc::new(Worker::spawn("host")?);
    let host = Arc::new(UnixHost::bind(&socket)?);
    let host_bus = Arc::new(host.bus().clone());
    let config = ControllerConfig::new(Guid::from_u128(0xd15c));
    let controller = ScsiController::new(host_bus, Arc::new(OneWorker(worker.clone())), config)?;
    let disk = Disk::new(Arc::new(RamBackend::new(64 << 20)?), &DiskOptions::new("example"))?;
    controller.attach(ScsiAddress::new(0, 0, 0), disk)?;
    controller.offer()?;
    worker.add_source(host.clone(), Arc::new(Messages(host, UnixHost::ready)))?;

    // The guest: donates memory, finds the controller, and uses its disk.
    let guest = Arc::new(UnixGuest::connect(&socket, 32 << 20)?);
    let guest_worker = Worker::spawn("guest")?;
    guest_worker.add_source(guest.clone(), Arc::new(Messages(guest.clone(), UnixGuest::ready)))?;
    let bus = Arc::new(guest.bus().clone());
    let mut client = StorageClient::connect(bus, ClientConfig::default())?;
    let disk = client.scan()?.into_iter().next().ok_or("no disk found")?;
    let pattern: Vec<u8> = (0..=250_u8).cycle().take(1 << 20).collect();
    client.write(&disk, 4096, &pattern)?;
    client.flush(&disk)?;
    let mut back = vec![0; pattern.len()];
    client.read(&disk, 4096, &mut back)?;
    assert_eq!(back, pattern);
    println!("{} bytes written, read back and equal", back.len());
    drop(client);
    controller.close();
    Ok(())
}
