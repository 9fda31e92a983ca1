//! The serial port: what the guest prints, and what is typed to it.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;

/// Where the guest's console goes.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// Raises the port's interrupt.
pub(crate) struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

/// See the module.
pub(crate) struct Console {
    serial: Mutex<Serial<Interrupt, NoEvents, ConsoleOutput>>,
}

impl Console {
    /// The port, and what raises its interrupt.
    pub(crate) fn new(output: ConsoleOutput) -> Result<(Self, EventFd), Error> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(Error::Event);
        let interrupt = event()?;
        let line = interrupt.try_clone().map_err(Error::Event)?;
        let serial = Mutex::new(Serial::new(Interrupt(interrupt), output));
        Ok((Self { serial }, line))
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, NoEvents, ConsoleOutput>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        if let Err(error) = self.lock().write(register, value) {
            tracing::debug!(?error, "serial port");
        }
    }

    /// Takes bytes that were typed; returns how many fitted.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}
