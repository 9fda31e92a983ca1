//! A VMBus ring's reader and writer: batches, index protocols, when to signal
