//! The control interface of a VM: HTTP/1.1 on a Unix socket, described by `docs/api.yaml`.

mod api;

pub use api::{
    Compression, ControlError, Controlled, Counters, Crash, DiskAddress, ErrorKind, Heartbeat,
    HeartbeatState, Hex, Info, RemoveDiskRequest, SaveRequest, Saved, ShutdownRequest, State,
};
