//! The VMBus Kernel Mode Client Library outside Windows: channels, packets, quotas, GPADLs
