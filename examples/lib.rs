//! Whole programs of less than 80 lines each, to be read and run:
//!
//! | example | what it shows |
//! |---|---|
//! | `echo` | a device and its driver in one process: the smallest whole use of the library |
//! | `event_loop` | the library in an event loop of one's own |
//! | `storage` | a SCSI disk on a host with one worker thread, and a guest that reads it |
