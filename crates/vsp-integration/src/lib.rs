//! Integration services of a VMBus guest: heartbeat, shutdown, time synchronisation.
