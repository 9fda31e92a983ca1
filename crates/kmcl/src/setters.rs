//! The Init setters: allowed while the channel is Disabled, refused with the documented statuses
//! otherwise.
//!
//! Source: kmcl-semantics section 4; D-1, D-53 to D-55, D-59 to D-61, D-68.

use std::sync::Arc;

use vmbus_wire::guid::Guid;

use crate::bus::USER_DATA_SIZE;
use crate::callbacks::{PnpFailure, ProcessPacket, SaveRestorePacket, StateChange};
use crate::channel::{Channel, lock};
use crate::error::Error;
use crate::flags::{ChannelFlags, ServerFlags};
use crate::lifecycle::{ChannelState, Side};
use crate::settings::{Limits, Settings};

impl Channel {
    /// Flags common to both endpoints.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for undefined bits.
    ///
    /// Source: VmbChannelInitSetFlags.
    pub fn init_set_flags(&self, flags: ChannelFlags) -> Result<(), Error> {
        self.set("init_set_flags", None, |settings| {
            in_mask("Flags", flags.bits(), ChannelFlags::all().bits())?;
            settings.flags = flags;
            Ok(())
        })
    }

    /// A short label for logs and counters, at most [`Limits::NAME`] bytes.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for a longer one.
    ///
    /// Source: VmbChannelInitSetFriendlyName.
    pub fn init_set_friendly_name(&self, name: &str) -> Result<(), Error> {
        self.set("init_set_friendly_name", None, |settings| {
            if name.len() > Limits::NAME {
                return Err(argument(2, "Name", name.len() as u64));
            }
            name.clone_into(&mut settings.friendly_name);
            Ok(())
        })
    }

    /// The largest message that will ever be sent, in bytes; 4096 by default.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for 0 or more than
    /// [`Limits::PACKET_SIZE`].
    ///
    /// Source: VmbChannelInitSetMaximumPacketSize.
    pub fn init_set_maximum_packet_size(&self, packet_size: u32) -> Result<(), Error> {
        self.set("init_set_maximum_packet_size", None, |settings| {
            settings.maximum_packet_size =
                within(2, "PacketSize", packet_size, Limits::PACKET_SIZE)?;
            Ok(())
        })
    }

    /// The most external data of a packet, in bytes, and the most ranges (MDLs) it comes in. None by
    /// default.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 or 3 for 0 or more than
    /// [`Limits::EXTERNAL_DATA`] or [`Limits::EXTERNAL_RANGES`].
    ///
    /// Source: VmbChannelInitSetMaximumExternalData.
    pub fn init_set_maximum_external_data(
        &self,
        data_size: u32,
        chain_length: u32,
    ) -> Result<(), Error> {
        self.set("init_set_maximum_external_data", None, |settings| {
            let data_size = within(2, "DataSize", data_size, Limits::EXTERNAL_DATA)?;
            let chain_length = within(3, "ChainLength", chain_length, Limits::EXTERNAL_RANGES)?;
            settings.external_data_size = data_size;
            settings.external_data_ranges = chain_length;
            Ok(())
        })
    }

    /// Bytes of the driver's own area on each incoming packet; none by default.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for more than
    /// [`Limits::CLIENT_CONTEXT`].
    ///
    /// Source: VmbChannelInitSetClientContextSize.
    pub fn init_set_client_context_size(&self, context_size: u32) -> Result<(), Error> {
        self.set("init_set_client_context_size", None, |settings| {
            if context_size > Limits::CLIENT_CONTEXT {
                return Err(argument(2, "ContextSize", u64::from(context_size)));
            }
            settings.client_context_size = context_size;
            Ok(())
        })
    }

    /// What takes the packets. Without it an incoming packet stops the channel.
    ///
    /// # Errors
    /// [`Error::NotInitializing`].
    ///
    /// Source: VmbChannelInitSetProcessPacketCallbacks.
    pub fn init_set_process_packet_callbacks(
        &self,
        callbacks: Arc<dyn ProcessPacket>,
    ) -> Result<(), Error> {
        self.set("init_set_process_packet_callbacks", None, |settings| {
            settings.process_packet = Some(callbacks);
            Ok(())
        })
    }

    /// What hears of state changes; optional.
    ///
    /// # Errors
    /// [`Error::NotInitializing`].
    ///
    /// Source: VmbChannelInitSetStateChangeCallbacks.
    pub fn init_set_state_change_callbacks(
        &self,
        callbacks: Arc<dyn StateChange>,
    ) -> Result<(), Error> {
        self.set("init_set_state_change_callbacks", None, |settings| {
            settings.state_change = Some(callbacks);
            Ok(())
        })
    }

    /// Pages of both rings, control pages included: 8 and 8 by default. Rings that would not hold the
    /// largest packet are made as large as that takes.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a server, whose client donates both rings;
    /// [`Error::Argument`] 2 or 3 for fewer than 2 or more than [`Limits::RING_PAGES`].
    ///
    /// Source: VmbClientChannelInitSetRingBufferPageCount; D-55.
    pub fn client_init_set_ring_buffer_page_count(
        &self,
        incoming_pages: u32,
        outgoing_pages: u32,
    ) -> Result<(), Error> {
        let function = "client_init_set_ring_buffer_page_count";
        self.set(function, Some(Side::Client), |settings| {
            for (position, name, pages) in
                [(2, "IncomingPageCount", incoming_pages), (3, "OutgoingPageCount", outgoing_pages)]
            {
                if !(2..=Limits::RING_PAGES).contains(&pages) {
                    return Err(argument(position, name, u64::from(pages)));
                }
            }
            settings.incoming_pages = incoming_pages;
            settings.outgoing_pages = outgoing_pages;
            Ok(())
        })
    }

    /// Which channel to bind to: any instance of a type, or one; and who hears of a failure.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a server.
    ///
    /// Source: VmbClientChannelInitSetTargetPnp.
    pub fn client_init_set_target_pnp(
        &self,
        interface_type: Guid,
        interface_instance: Option<Guid>,
        failure: Option<Arc<dyn PnpFailure>>,
    ) -> Result<(), Error> {
        self.set("client_init_set_target_pnp", Some(Side::Client), |settings| {
            settings.interface_type = interface_type;
            settings.interface_instance = interface_instance;
            settings.pnp_failure = failure;
            Ok(())
        })
    }

    /// The virtual processor that the peer's signals interrupt; 0 by default. An extension.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a server.
    pub fn client_init_set_target_vp(&self, target_vp: u32) -> Result<(), Error> {
        self.set("client_init_set_target_vp", Some(Side::Client), |settings| {
            settings.target_vp = target_vp;
            Ok(())
        })
    }

    /// Flags of the offer.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a client; [`Error::Argument`] 2 for undefined bits.
    ///
    /// Source: VmbServerChannelInitSetFlags.
    pub fn server_init_set_flags(&self, flags: ServerFlags) -> Result<(), Error> {
        self.set("server_init_set_flags", Some(Side::Server), |settings| {
            in_mask("Flags", flags.bits(), ServerFlags::all().bits())?;
            settings.server_flags = flags;
            Ok(())
        })
    }

    /// The type (the protocol) and the instance that are offered.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a client.
    ///
    /// Source: VmbServerChannelInitSetTargetInterfaceId; D-54.
    pub fn server_init_set_target_interface_id(
        &self,
        interface_type: Guid,
        interface_instance: Guid,
    ) -> Result<(), Error> {
        self.set("server_init_set_target_interface_id", Some(Side::Server), |settings| {
            settings.interface_type = interface_type;
            settings.interface_instance = Some(interface_instance);
            Ok(())
        })
    }

    /// What is asked of the driver for each of its packets in flight, when the channel is saved and
    /// restored. Without it packets are saved without private state, and none can be restored (D-24).
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a client.
    ///
    /// Source: VmbServerChannelInitSetSaveRestorePacketCallbacks.
    pub fn server_init_set_save_restore_packet_callbacks(
        &self,
        callbacks: Arc<dyn SaveRestorePacket>,
    ) -> Result<(), Error> {
        let function = "server_init_set_save_restore_packet_callbacks";
        self.set(function, Some(Side::Server), |settings| {
            settings.save_restore = Some(callbacks);
            Ok(())
        })
    }

    /// The virtual trust level that sees the offer; 0 by default.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a client; [`Error::Argument`] 2 above [`Limits::VTL`]
    /// (D-68).
    ///
    /// Source: VmbServerChannelInitSetTargetVtl.
    pub fn server_init_set_target_vtl(&self, target_vtl: u8) -> Result<(), Error> {
        self.set("server_init_set_target_vtl", Some(Side::Server), |settings| {
            if target_vtl > Limits::VTL {
                return Err(argument(2, "TargetVtl", u64::from(target_vtl)));
            }
            settings.target_vtl = target_vtl;
            Ok(())
        })
    }

    /// MMIO space that the guest is asked to reserve, in MiB: needed, and nice to have on top.
    ///
    /// # Errors
    /// [`Error::NotInitializing`], also on a client; [`Error::NoMmio`] where both are 0 (D-53).
    ///
    /// Source: VmbServerChannelInitSetMmioMegabytes.
    pub fn server_init_set_mmio_megabytes(
        &self,
        mmio_megabytes: u16,
        mmio_megabytes_optional: u16,
    ) -> Result<(), Error> {
        self.set("server_init_set_mmio_megabytes", Some(Side::Server), |settings| {
            if mmio_megabytes == 0 && mmio_megabytes_optional == 0 {
                return Err(Error::NoMmio);
            }
            settings.mmio_megabytes = mmio_megabytes;
            settings.mmio_megabytes_optional = mmio_megabytes_optional;
            Ok(())
        })
    }

    /// Bytes of completion payload for which ring space is reserved before a packet is delivered; as
    /// much as the largest message by default. An extension: the smaller it is, the more packets can
    /// be in flight in a small ring.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for more than [`Limits::PACKET_SIZE`].
    pub fn init_set_maximum_completion_size(&self, bytes: u32) -> Result<(), Error> {
        self.set("init_set_maximum_completion_size", None, |settings| {
            if bytes > Limits::PACKET_SIZE {
                return Err(argument(2, "CompletionSize", u64::from(bytes)));
            }
            settings.maximum_completion_size = Some(bytes);
            Ok(())
        })
    }

    /// Incoming packets for which everything is reserved when the channel opens, and so the most
    /// that are outstanding at a time; 256 by default. An extension.
    ///
    /// # Errors
    /// [`Error::NotInitializing`]; [`Error::Argument`] 2 for 0 or more than [`Limits::PACKETS`].
    pub fn init_set_maximum_packet_count(&self, packets: u32) -> Result<(), Error> {
        self.set("init_set_maximum_packet_count", None, |settings| {
            settings.maximum_packet_count = within(2, "PacketCount", packets, Limits::PACKETS)?;
            Ok(())
        })
    }

    /// Makes the channel the `index`th subchannel of its type and instance; 0, a primary channel, by
    /// default. An extension.
    ///
    /// # Errors
    /// [`Error::NotInitializing`].
    pub fn init_set_subchannel_index(&self, index: u16) -> Result<(), Error> {
        self.set("init_set_subchannel_index", None, |settings| {
            settings.subchannel_index = index;
            Ok(())
        })
    }

    /// Device-defined bytes: of the offer on a server, of the open request on a client. Zeroes by
    /// default. An extension.
    ///
    /// # Errors
    /// [`Error::NotInitializing`].
    pub fn init_set_user_data(&self, user_data: &[u8; USER_DATA_SIZE]) -> Result<(), Error> {
        self.set("init_set_user_data", None, |settings| {
            settings.user_data = *user_data;
            Ok(())
        })
    }

    /// Changes the settings, if that is allowed now.
    fn set(
        &self,
        function: &'static str,
        only: Option<Side>,
        change: impl FnOnce(&mut Settings) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // Held while the settings change, so that Enable sees all of a change or nothing.
        let control = lock(&self.shared.control);
        // The life cycle comes to rest before callbacks and users see it: both have to be Disabled.
        let state = match self.state() {
            ChannelState::Disabled => control.life.state(),
            state => state,
        };
        if state != ChannelState::Disabled || only.is_some_and(|side| side != self.side()) {
            let needed = match only {
                Some(Side::Server) => "server",
                Some(Side::Client) => "client",
                None => "",
            };
            return Err(Error::NotInitializing { function, needed, state });
        }
        let mut settings = lock(&self.shared.settings);
        change(&mut settings)?;
        self.shared.bounds.set(&settings);
        drop(settings);
        drop(control);
        // Idle packets were made for the former settings.
        self.traffic().forget_idle_packets();
        Ok(())
    }
}

fn argument(position: u8, name: &'static str, value: u64) -> Error {
    Error::Argument { position, name, value }
}

fn within(position: u8, name: &'static str, value: u32, limit: u32) -> Result<u32, Error> {
    if value == 0 || value > limit {
        return Err(argument(position, name, u64::from(value)));
    }
    Ok(value)
}

fn in_mask(name: &'static str, bits: u32, mask: u32) -> Result<(), Error> {
    if bits & !mask != 0 {
        return Err(argument(2, name, u64::from(bits)));
    }
    Ok(())
}
