//! VMBus between two processes: memory in a memfd, signals by eventfd, messages over a Unix socket
