//! The flag words of the interface. Undefined bits are refused by the functions that take them.

use bitflags::bitflags;

bitflags! {
    /// Flags of a channel on either side.
    ///
    /// Source: VmbChannelInitSetFlags; `VMBUS_CHANNEL_INIT_FLAG_*`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct ChannelFlags: u32 {
        /// Messages carry the bus's pipe header, which the library adds and takes off. No
        /// transactions and no external data then.
        const IS_PIPE = 0x1;
    }

    /// Flags of a server channel's offer.
    ///
    /// Source: VmbServerChannelInitSetFlags; `VMBUS_SERVER_CHANNEL_INIT_FLAG_*`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct ServerFlags: u32 {
        /// Offer to the local partition (D-67).
        const LOOPBACK_OFFER = 0x1;
        /// The guest publishes a device interface with the channel type as its GUID.
        const ENUMERATE_DEVICE_INTERFACE = 0x2;
        /// The channel is offered as a pipe.
        const OFFER_AS_PIPE = 0x4;
        /// After the VM's save and restore the channel is offered anew and the old instance dropped.
        const FORCE_NEW_CHANNEL = 0x8;
        /// A socket-style channel (hvsock).
        const TLNPI_PROVIDER_OFFER = 0x10;
    }

    /// Flags of every send.
    ///
    /// Source: VmbPacketSend; `VMBUS_CHANNEL_FORMAT_FLAG_*`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct SendFlags: u32 {
        /// A transaction: the packet stays in use until the peer's completion arrives.
        const WAIT_FOR_COMPLETION = 0x1;
        /// The given length counts even beyond the first range's own (at most up to the page's end).
        const FORCE_MDL_LENGTH = 0x2;
        /// The message is in pageable memory. It is always copied at once here, so this changes
        /// nothing.
        const PAGED_BUFFER = 0x4;
    }

    /// Flags of a request for a packet's external data.
    ///
    /// Source: VmbChannelPacketGetExternalData; `VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_*`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct ExternalDataFlags: u32 {
        /// The device only reads it: writes through the view are refused.
        const READ_ONLY = 0x1;
    }

    /// Flags of a GPADL, when it is created and when it is mapped.
    ///
    /// Source: VmbChannelCreateGpadlFromBuffer, VmbChannelMapGpadl; both spellings of D-56.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct GpadlFlags: u32 {
        /// The server only reads the pages.
        const READ_ONLY = 0x1;
    }
}
