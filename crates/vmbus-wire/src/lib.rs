//! The bytes of VMBus: control messages, packet descriptors, control pages. No I/O, no unsafe, no_std
