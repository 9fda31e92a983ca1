//! The second device: a host that does what packets ask for, now or later, and sends packets itself.
//!
//! | module | what it is |
//! |---|---|
//! | `wire` | the messages |
//! | `device` | the host's end |
//! | `driver` | the guest's end |

pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod wire;
