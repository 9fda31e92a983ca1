//! Integration services for guests: the host's end (VSP) of heartbeat, shutdown and time
//! synchronisation.
//!
//! | service | what it does | in a Linux guest |
//! |---|---|---|
//! | [`Service::Heartbeat`] | asks every 2 s whether the guest is alive | hv_utils |
//! | [`Service::Shutdown`] | has it power off, start anew or hibernate | hv_utils; then `systemd`, or whatever it is |
//! | [`Service::TimeSync`] | tells it the time: to set its clock by, and every 5 s as a sample | hv_utils: `/dev/ptp_hyperv`, for `chrony` |
//!
//! [`IntegrationServices`] offers a channel for each over any [`Bus`](kmcl::bus::Bus). The guest opens
//! those that it has a driver for; each then goes the same way:
//!
//! ```text
//!   host                                            guest
//!    │ ◄──────────────── opens the channel ─────────── │
//!    │ ─── negotiate: framework 1.0, 3.0; 1.0 … 3.2 ─► │
//!    │ ◄── negotiate: 3.0; 3.2 ─────────────────────── │
//!    │ ─── request n ────────────────────────────────► │   tick(), request_shutdown()
//!    │ ◄── answer n: status ────────────────────────── │   Observer, heartbeat()
//! ```
//!
//! Both requests and answers are in-band packets of a message pipe, without completions. A service has
//! one request open at a time, but that a message which sets the guest's clock waits for nobody; what a
//! guest says unasked, twice, late or wrong is ignored, at any rate that it likes.
//!
//! | it can be asked to | from version | |
//! |---|---|---|
//! | power off | 1.0 | |
//! | reboot | 3.1 | refused before: the guest would power off |
//! | hibernate | 3.2 | refused before |
//!
//! # Time
//!
//! The crate makes no thread and has no clock. Whoever has one calls [`IntegrationServices::tick`] about
//! once a second, with the time of day and the guest's reference time, while the guest is running:
//!
//! ```
//! use std::error::Error;
//! use std::sync::Arc;
//! use std::time::SystemTime;
//!
//! use kmcl::Channel;
//! use kmcl::loopback::LoopbackBus;
//! use vsp_integration::{
//!     Clocks, Driver, Event, IntegrationConfig, IntegrationServices, Observer, Phase, Service,
//!     ShutdownError, ShutdownKind, ShutdownRequest,
//! };
//!
//! struct Log;
//!
//! impl Observer for Log {
//!     fn happened(&self, event: Event) {
//!         match event {
//!             Event::ShutdownEnded { request, answer } => println!("{}: {answer}", request.kind),
//!             other => println!("{other:?}"),
//!         }
//!     }
//! }
//!
//! struct Nobody; // see `Driver` for one that drives
//!
//! impl Driver for Nobody {
//!     fn add_channel(&self, _: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
//!         Ok(())
//!     }
//!
//!     fn remove_channel(&self, _: &Channel) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn Error>> {
//! let bus: Arc<dyn kmcl::bus::Bus> = LoopbackBus::new(1 << 20)?;
//! let config = IntegrationConfig::default();
//! let services = IntegrationServices::new(bus, Arc::new(Nobody), Arc::new(Log), config)?;
//! services.offer()?;
//!
//! let reference_time = 0; // of the guest
//! services.tick(Clocks { now: SystemTime::now().into(), reference_time });
//!
//! // No guest has come yet.
//! let request = ShutdownRequest { kind: ShutdownKind::PowerOff, force: false };
//! let refused = services.request_shutdown(request, "maintenance").unwrap_err();
//! assert_eq!(refused, ShutdownError::NotReady { phase: Phase::Closed });
//! assert_eq!(services.phase(Service::Heartbeat), Phase::Closed);
//! # Ok(())
//! # }
//! ```
//!
//! # Saving and restoring
//!
//! At any moment, in the middle of a negotiation or of a shutdown:
//!
//! ```text
//!   freeze ──► streams ──► move_away  ···  restoring ──► enable ──► restore_channel ──► start ──► tick
//!      └──── thaw                              three channels
//! ```
//!
//! What was asked before is answered after. A restored guest's clock is behind: the first tick tells it
//! to set it.
//!
//! | module | what it does |
//! |---|---|
//! | [`protocol`] | what is said, as a pure machine |
//! | [`wire`] | the bytes |
//! | `services` | the machine on three channels, saved and restored |
//!
//! Source: devices, section 2.

#![forbid(unsafe_code)]

mod driver;
pub mod protocol;
mod services;
pub mod wire;

pub use driver::{Driver, Observer};
pub use protocol::{
    ApplicationState, Clocks, Event, FileTime, HEARTBEAT_PERIOD, HeartbeatStatus, MAX_REASON_BYTES,
    Phase, SHUTDOWN_ANSWER_LIMIT, ShutdownAnswer, ShutdownError, ShutdownKind, ShutdownRequest,
    StateError, TIME_SAMPLE_PERIOD, Versions,
};
pub use services::{
    FrozenServices, IntegrationConfig, IntegrationError, IntegrationServices, RestoreServiceError,
    RestoringServices, STATE_INTERFACE, SavedStream, ServicesRestoreError, ServicesSave,
    StartError, StreamSave, StreamSaveError,
};
pub use wire::{IcStatus, Service, Version};
