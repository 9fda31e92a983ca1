//! The guest's sockets, with a clock.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kmcl_worker::Source;
use saved_state::StreamKind;
use vmbus_host::HostBus;
use vsp_socket::limits::TICK_PERIOD;
use vsp_socket::{
    AdoptedSockets, Driver, FrozenSockets, RestoringSockets, SocketBroker, SocketConfig,
};

use super::Waited;
use super::timer::Timer;
use crate::vm::VmError;
use crate::vm::saved::State;
use crate::workers::Workers;

/// The sockets of a guest that runs. Fields are dropped in this order.
pub(crate) struct Sockets {
    _clock: Waited,
    _turns: Waited,
    broker: Arc<Broker>,
}

struct Broker {
    broker: SocketBroker,
    since: Instant,
}

/// A connection has something to do, or somebody wants one.
struct Turns(Arc<Broker>);

impl Source for Turns {
    fn ready(&self) -> bool {
        self.0.broker.ready()
    }
}

impl AsFd for Broker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.broker.as_fd()
    }
}

impl Sockets {
    /// Serves the guest's sockets behind `path`.
    pub(crate) fn serve(
        bus: &HostBus,
        path: &Path,
        workers: &Arc<Workers>,
    ) -> Result<Self, VmError> {
        let driver = Arc::clone(workers) as Arc<dyn Driver>;
        let broker = SocketBroker::new(bus.clone(), driver, SocketConfig::new(path))?;
        Self::drive(broker, workers)
    }

    fn drive(broker: SocketBroker, workers: &Arc<Workers>) -> Result<Self, VmError> {
        let failed = |source| VmError::Driver { what: "waiting for sockets", source };
        let broker = Arc::new(Broker { broker, since: Instant::now() });
        let turns = Arc::new(Turns(Arc::clone(&broker)));
        let source = workers.add_source(Arc::clone(&broker), turns).map_err(failed)?;
        let turns = Waited { workers: Arc::clone(workers), source };
        let ticking = Arc::clone(&broker);
        let tick = move || ticking.broker.tick(ticking.since.elapsed());
        let clock = Timer::every(TICK_PERIOD, workers, tick)?;
        Ok(Self { _clock: clock, _turns: turns, broker })
    }

    pub(crate) fn freeze(&self) -> Result<FrozenSockets, VmError> {
        Ok(self.broker.broker.freeze()?)
    }
}

/// Sockets out of a saved state. Their connections have ended.
pub(crate) enum Restoring {
    /// There were none, and are none.
    None,
    /// There were some, and are none any more.
    Gone(AdoptedSockets),
    /// There were some, and are.
    Served(Box<RestoringSockets>),
    /// There were none; from now on there are.
    New(Box<Path>),
}

impl Restoring {
    /// `had` says whether the guest had sockets, `path` where it is to have some.
    pub(crate) fn new(
        bus: &HostBus,
        had: bool,
        path: Option<&Path>,
        workers: &Arc<Workers>,
        state: &mut State<impl Read>,
    ) -> Result<Self, VmError> {
        if !had {
            return Ok(path.map_or(Self::None, |path| Self::New(path.into())));
        }
        let device = state.bytes(StreamKind::DEVICE)?;
        let Some(path) = path else {
            let adopted = AdoptedSockets::adopt(bus, &device[..]);
            return adopted.map(Self::Gone).map_err(|error| state.wrong(error));
        };
        let driver = Arc::clone(workers) as Arc<dyn Driver>;
        let config = SocketConfig::new(path);
        let restoring = SocketBroker::restoring(bus.clone(), driver, config, &device[..]);
        restoring.map(|it| Self::Served(Box::new(it))).map_err(|error| state.wrong(error))
    }

    /// The bus has brought what there was: it ends, and new connections can be made.
    pub(crate) fn start(
        self,
        bus: &HostBus,
        workers: &Arc<Workers>,
    ) -> Result<Option<Sockets>, VmError> {
        match self {
            Self::None => Ok(None),
            Self::Gone(adopted) => {
                adopted.withdraw();
                Ok(None)
            }
            Self::Served(restoring) => Sockets::drive(restoring.start(), workers).map(Some),
            Self::New(path) => Sockets::serve(bus, &path, workers).map(Some),
        }
    }
}
