//! The guest's integration services, with a clock.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyperv_kvm::Partition;
use saved_state::StreamKind;
use vmbus_host::HostBus;
use vsp_integration::{
    Clocks, Driver, Event, FrozenServices, HeartbeatStatus, IntegrationConfig, IntegrationServices,
    Observer, RestoringServices, SHUTDOWN_ANSWER_LIMIT, ShutdownAnswer, ShutdownRequest,
};

use super::Waited;
use super::timer::Timer;
use crate::vm::VmError;
use crate::vm::saved::State;
use crate::workers::Workers;

/// How often services do what is due.
const TICK: Duration = Duration::from_secs(1);

/// How much longer than the services themselves an answer is waited for.
const GRACE: Duration = Duration::from_secs(5);

/// What the log and a saved state call them.
const NAME: &str = "integration";

/// The services of a guest that runs. Fields are dropped in this order.
pub(crate) struct Services {
    _clock: Waited,
    ticking: Arc<Ticking>,
}

/// What the clock drives.
pub(crate) struct Ticking {
    services: IntegrationServices,
    partition: Partition,
    /// The guest's processors stand: it is not to be asked whether it lives.
    stands: AtomicBool,
    answers: Arc<Answers>,
}

/// What the guest has said to a shutdown.
#[derive(Default)]
struct Answers {
    last: Mutex<Option<ShutdownAnswer>>,
    changed: Condvar,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Option<ShutdownAnswer>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Answers {
    fn happened(&self, event: Event) {
        match event {
            Event::ShutdownEnded { answer, .. } => {
                *self.lock() = Some(answer);
                self.changed.notify_all();
            }
            other => tracing::debug!(?other, "integration services"),
        }
    }
}

impl Services {
    /// Offers them on the bus of a machine.
    pub(crate) fn offer(
        bus: &HostBus,
        workers: &Arc<Workers>,
        partition: &Partition,
    ) -> Result<Self, VmError> {
        let answers = Arc::<Answers>::default();
        let services = IntegrationServices::new(
            Arc::new(bus.clone()),
            Arc::clone(workers) as Arc<dyn Driver>,
            Arc::clone(&answers) as Arc<dyn Observer>,
            config(),
        )?;
        services.offer()?;
        Self::drive(services, answers, workers, partition)
    }

    /// Has them tick from now on.
    fn drive(
        services: IntegrationServices,
        answers: Arc<Answers>,
        workers: &Arc<Workers>,
        partition: &Partition,
    ) -> Result<Self, VmError> {
        let ticking = Arc::new(Ticking {
            services,
            partition: partition.clone(),
            stands: AtomicBool::new(false),
            answers,
        });
        let due = Arc::clone(&ticking);
        let clock = Timer::every(TICK, workers, move || due.tick())?;
        Ok(Self { _clock: clock, ticking })
    }

    /// For whoever asks the guest something, or how it is.
    pub(crate) fn ticking(&self) -> &Arc<Ticking> {
        &self.ticking
    }

    /// The guest's processors stand, or go on.
    pub(crate) fn set_standing(&self, stands: bool) {
        if self.ticking.stands.swap(stands, Ordering::Relaxed) && !stands {
            self.ticking.services.resync();
        }
    }

    pub(crate) fn freeze(&self) -> Result<FrozenServices, VmError> {
        Ok(self.ticking.services.freeze()?)
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        // Whoever waits for an answer gets none.
        self.ticking.answers.lock().get_or_insert(ShutdownAnswer::Closed);
        self.ticking.answers.changed.notify_all();
    }
}

impl Ticking {
    /// Does what is due.
    fn tick(&self) {
        if !self.stands.load(Ordering::Relaxed)
            && let Ok(reference_time) = self.partition.reference_time()
        {
            self.services.tick(Clocks { now: SystemTime::now().into(), reference_time });
        }
    }

    /// What is known of the guest's life.
    pub(crate) fn heartbeat(&self) -> HeartbeatStatus {
        self.services.heartbeat()
    }

    /// Asks the guest, and waits for its answer.
    pub(crate) fn shut_down(&self, request: ShutdownRequest) -> Result<(), VmError> {
        *self.answers.lock() = None;
        self.services.request_shutdown(request, "asked for by the VM's owner")?;
        let limit = Duration::from_nanos(100 * SHUTDOWN_ANSWER_LIMIT) + GRACE;
        let until = Instant::now() + limit;
        let mut answer = self.answers.lock();
        loop {
            match *answer {
                Some(ShutdownAnswer::Accepted) => return Ok(()),
                Some(ShutdownAnswer::Silent) => break,
                Some(other) => {
                    return Err(VmError::Guest(format!("{}: {other}", request.kind)));
                }
                None => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.answers.changed.wait_timeout(answer, left);
            answer = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Err(VmError::Silent { seconds: limit.as_secs() })
    }
}

/// Services out of a saved state, offered on a bus that takes them for those that it had.
pub(crate) struct Restoring {
    services: RestoringServices,
    answers: Arc<Answers>,
}

impl Restoring {
    pub(crate) fn new(
        bus: &HostBus,
        workers: &Arc<Workers>,
        state: &mut State<impl Read>,
    ) -> Result<Self, VmError> {
        let device = state.bytes(StreamKind::DEVICE)?;
        let answers = Arc::<Answers>::default();
        let services = IntegrationServices::restoring(
            Arc::new(bus.clone()),
            Arc::clone(workers) as Arc<dyn Driver>,
            Arc::clone(&answers) as Arc<dyn Observer>,
            config(),
            &device[..],
        );
        let mut services = services.map_err(|error| state.wrong(error))?;
        services.enable()?;
        for index in 0..services.channels() {
            let channel = state.bytes(StreamKind::CHANNEL)?;
            let restored = services.restore_channel(index, &channel[..]);
            restored.map_err(|error| state.wrong(error))?;
        }
        Ok(Self { services, answers })
    }

    /// Has them go on.
    pub(crate) fn start(
        self,
        workers: &Arc<Workers>,
        partition: &Partition,
    ) -> Result<Services, VmError> {
        let services = self.services.start().map_err(|error| {
            VmError::State(format!("the integration services cannot go on: {error}"))
        })?;
        let services = Services::drive(services, self.answers, workers, partition)?;
        // The guest's clock is behind: it is told so at once.
        services.ticking.tick();
        Ok(services)
    }
}

fn config() -> IntegrationConfig {
    IntegrationConfig { name: NAME.to_owned() }
}
