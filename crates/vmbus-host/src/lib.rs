//! The host's control plane of VMBus: versions, offers, GPADLs, open and close
