//! A command's connection to a server: the socket, the bus, the storage client, and one of its disks.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmcl_worker::{Source, Worker, WorkerError};
use vmbus_guest::ConnectionState;
use vmbus_unix::{ConnectError, ConnectionError, GuestOptions, Reason, UnixGuest};
use vsc_storage::wire::srb::ScsiAddress;
use vsc_storage::{ClientConfig, DiskInfo, Error, StorageClient};

use crate::cli::Target;
use crate::exit::{Failure, Result};

/// Subchannels that are asked for: this program moves data with one thread, which one channel and
/// another for the server's second thread keep busy.
const SUB_CHANNELS: u16 = 1;

/// Memory for rings and what else does not grow with the queue depth, in bytes.
const BASE_MEMORY: u64 = 16 << 20;

/// Memory for each request in flight, in bytes: a buffer, and another that is being handed over.
const REQUEST_MEMORY: u64 = 2 << 20;

/// How long the control messages of a server that is there may take. Data has a time-out of its own.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that is ready. Fields are dropped in this order: the client says goodbye over a bus that
/// still runs.
pub(crate) struct Connection {
    pub(crate) client: StorageClient,
    socket: PathBuf,
    timeout: Duration,
    /// Drives the bus; nothing of the data path.
    _worker: Worker,
    guest: Arc<UnixGuest>,
}

/// The control messages of the bus.
struct Control(Arc<UnixGuest>);

impl Source for Control {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

impl Connection {
    /// Connects to the server at `target`, for up to `depth` requests at once.
    ///
    /// # Errors
    /// A [`Failure`] of kind peer that says whether nobody listens, somebody else is connected, or
    /// the server does not behave.
    pub(crate) fn open(target: &Target, depth: u16) -> Result<Self> {
        Self::open_within(target, depth, Duration::ZERO)
    }

    /// As [`Self::open`], right after another connection of this process was dropped: waits until the
    /// server has noticed.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(crate) fn open_next(target: &Target, depth: u16) -> Result<Self> {
        Self::open_within(target, depth, HANDSHAKE_TIMEOUT)
    }

    fn open_within(target: &Target, depth: u16, busy: Duration) -> Result<Self> {
        let busy_until = Instant::now() + busy;
        let timeout = Duration::from_secs(target.timeout);
        let memory = BASE_MEMORY + REQUEST_MEMORY * u64::from(depth);
        let mut options = GuestOptions::new(memory);
        options.timeout = timeout.min(HANDSHAKE_TIMEOUT);
        options.reconnect = Some(Duration::from_secs(target.reconnect)).filter(|d| !d.is_zero());
        let guest = loop {
            match UnixGuest::connect_with(&target.socket, options.clone()) {
                Ok(guest) => break guest,
                Err(error) if is_busy(&error) && Instant::now() < busy_until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(refused(&target.socket, error)),
            }
        };
        let guest = Arc::new(guest);
        let worker = Worker::spawn("vmbus").map_err(no_worker)?;
        worker
            .add_source(Arc::clone(&guest), Arc::new(Control(Arc::clone(&guest))))
            .map_err(no_worker)?;

        let mut config = ClientConfig::default();
        config.queue_depth = depth;
        config.sub_channels = SUB_CHANNELS;
        config.connect_timeout = timeout;
        config.request_timeout = timeout;
        let client = StorageClient::connect(Arc::new(guest.bus().clone()), config)
            .map_err(|error| lost(&guest, &target.socket).unwrap_or_else(|| error.into()))?;
        Ok(Self { client, socket: target.socket.clone(), timeout, _worker: worker, guest })
    }

    /// How long to wait for an answer.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Channels to the server: the primary one and its subchannels.
    pub(crate) fn channels(&self) -> u16 {
        1 + self.client.properties().map_or(0, |properties| properties.sub_channels)
    }

    /// The version of VMBus agreed on, for reports.
    pub(crate) fn vmbus_version(&self) -> String {
        match self.guest.bus().state() {
            ConnectionState::Connected { version, .. } => version.to_string(),
            _ => String::from("unknown"),
        }
    }

    /// The version of the storage protocol agreed on, for reports.
    pub(crate) fn protocol(&self) -> String {
        self.client
            .properties()
            .map(|properties| properties.version.to_string())
            .unwrap_or_default()
    }

    /// Every disk of the server.
    pub(crate) fn scan(&mut self) -> Result<Vec<DiskInfo>> {
        Ok(self.client.scan()?)
    }

    /// The disk at `lun`.
    pub(crate) fn disk(&mut self, lun: u8) -> Result<DiskInfo> {
        let address = ScsiAddress::new(0, 0, lun);
        match self.client.identify(address) {
            Ok(Some(disk)) => Ok(disk),
            Ok(None) | Err(Error::Scsi(_)) => Err(Failure::disk(
                format_args!("the server at {} has no disk with LUN {lun}", self.socket.display()),
                "list its disks with kmcl disk info",
            )),
            Err(error) => Err(error.into()),
        }
    }
}

fn no_worker(error: WorkerError) -> Failure {
    Failure::system(
        format_args!("cannot drive the bus: {error}"),
        "allow this process more threads and open files (ulimit)",
    )
}

/// Whether the server has another guest.
fn is_busy(error: &ConnectError) -> bool {
    let ConnectError::Connection { source, .. } = error else { return false };
    matches!(source, ConnectionError::Refused { reason: Reason::Busy, .. })
}

/// Why the server is not to be had.
fn refused(socket: &Path, error: ConnectError) -> Failure {
    let shown = socket.display();
    match error {
        ConnectError::NoServer { .. } => Failure::peer(
            format_args!("nobody serves at {shown}"),
            "start a server there with kmcl serve, or check the path",
        ),
        ConnectError::PathTooLong { .. } => {
            Failure::peer(error, "use a shorter path, for instance a relative one")
        }
        ConnectError::Connection { source, .. } => lost_because(&source, socket),
        ConnectError::System { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            Failure::peer(
                format_args!("the socket {shown} may not be used: {source}"),
                "run as the user who started the server",
            )
        }
        ConnectError::System { call: "connect", source } => Failure::peer(
            format_args!("{shown} cannot be connected to: {source}"),
            "name the socket of a running kmcl serve",
        ),
        error => Failure::system(
            format_args!("cannot connect to {shown}: {error}"),
            "allow this process more memory and open files (ulimit), or use a lower --depth",
        ),
    }
}

/// Why the connection is over, if it is.
fn lost(guest: &UnixGuest, socket: &Path) -> Option<Failure> {
    guest.lost().map(|reason| lost_because(&reason, socket))
}

fn lost_because(reason: &ConnectionError, socket: &Path) -> Failure {
    let shown = socket.display();
    match reason {
        ConnectionError::Refused { reason: Reason::Busy, .. } => Failure::peer(
            format_args!("the server at {shown} is busy with another client"),
            "wait until that one has finished",
        ),
        ConnectionError::Closed => Failure::peer(
            format_args!("the server at {shown} has closed the connection"),
            "see what it says",
        ),
        ConnectionError::HandshakeTimeout { .. } => Failure::peer(
            format_args!("the server at {shown} does not answer: {reason}"),
            "check that it is a kmcl serve, and is not stopped",
        ),
        _ => Failure::peer(
            format_args!("no connection to {shown}: {reason}"),
            "use a server and a client of the same version",
        ),
    }
}
