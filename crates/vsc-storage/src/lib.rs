//! The guest's end of the VMBus storage protocol, in user space
