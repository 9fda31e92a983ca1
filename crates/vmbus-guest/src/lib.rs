//! The guest's control plane of VMBus, in user space
