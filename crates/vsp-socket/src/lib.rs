//! Sockets between a VMBus guest and Unix sockets of its host.
