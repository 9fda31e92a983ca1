//! The life cycle of a channel, as one pure step: an event goes in, the next condition and the
//! effects to perform come out. Nothing here calls back, waits, or knows a ring.
//!
//! ```text
//!            Enable            PeerOpened          OpenAccepted
//! Disabled ─────────▶ Enabled ──────────▶ Opening ──────────────▶ Paused ⇄ Active
//!    ▲       client: ▶ Connecting ▶          │ OpenRefused          │  ▲      │ Pause
//!    │                                       ▼                      │  └ Pausing ◀
//!    │                              where it came from              ▼  Drained
//!    └───────────────────────────────────────────────────────── Closing ──▶ Closed (server)
//! ```
//!
//! Two axes are folded into it: the connection (Disabled to Closed) and whether the channel was
//! started. *Active* is open and started, and nothing else (D-2).
//!
//! Source: WDK header, state model; `kmcl` DDI pages of VmbChannelEnable, Disable, Start and Pause;
//! decisions D-2 to D-11.

use vmbus_wire::status::NtStatus;

/// Which end of the channel this is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Side {
    /// The device's end on the host (VSP): offers the channel.
    Server,
    /// The driver's end in the guest (VSC): opens the channel and donates its memory.
    Client,
}

/// Where a channel is in its life.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ChannelState {
    /// Allocated; setters are allowed; the bus knows nothing of it.
    Disabled,
    /// Server: the offer is made and nobody has opened it. Client: waits for a matching offer.
    Enabled,
    /// Client: bound to an offer; the bus was asked to open it and has not answered.
    Connecting,
    /// The rings are there; the device is being asked (`opened`) whether it accepts.
    Opening,
    /// Open and not started: packets may be sent, none is delivered.
    Paused,
    /// Open and started: packets are delivered.
    Active,
    /// `suspend` was delivered; waits for the device to complete the packets it still has.
    Pausing,
    /// As `Pausing`, but the channel goes down afterwards.
    Closing,
    /// Server: the guest has closed the channel; the offer stands and can be opened again.
    Closed,
}

impl ChannelState {
    /// Every state, for tables.
    pub const ALL: [Self; 9] = [
        Self::Disabled,
        Self::Enabled,
        Self::Connecting,
        Self::Opening,
        Self::Paused,
        Self::Active,
        Self::Pausing,
        Self::Closing,
        Self::Closed,
    ];

    /// Whether the rings are attached and the peer has been told so.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Paused | Self::Active | Self::Pausing)
    }

    /// Whether a packet may be sent, or queued to be sent later. Before the opening and after the
    /// closing by the guest packets wait; a disabled or closing channel refuses them (D-33).
    #[must_use]
    pub fn accepts_sends(self) -> bool {
        !matches!(self, Self::Disabled | Self::Closing)
    }
}

/// What happens to a channel.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// VmbChannelEnable.
    Enable,
    /// The bus did not take the offer or the binding asked for by [`Effect::Connect`].
    ConnectRefused,
    /// Client: an offer matches.
    Offered,
    /// The peer has opened the channel (server), or the open succeeded (client).
    PeerOpened,
    /// Client: the open failed, or the offer could not be connected.
    OpenFailed,
    /// The device's `opened` returned success.
    OpenAccepted,
    /// The device's `opened` returned a failure, or the rings cannot be used.
    OpenRefused,
    /// VmbChannelStart.
    Start,
    /// VmbChannelPause.
    Pause,
    /// The last incoming packet outstanding was completed.
    Drained,
    /// VmbChannelDisable.
    Disable,
    /// The guest has closed the channel (server), the offer was rescinded (client), or the bus is
    /// gone.
    PeerClosed,
    /// The channel was saved, and goes on elsewhere.
    MovedAway,
}

impl Event {
    /// Every event, for tables.
    pub const ALL: [Self; 13] = [
        Self::Enable,
        Self::ConnectRefused,
        Self::Offered,
        Self::PeerOpened,
        Self::OpenFailed,
        Self::OpenAccepted,
        Self::OpenRefused,
        Self::Start,
        Self::Pause,
        Self::Drained,
        Self::Disable,
        Self::PeerClosed,
        Self::MovedAway,
    ];
}

/// What the caller of [`Lifecycle::on`] has to do, in the order given.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Effect {
    /// Make the offer (server) or ask for a matching one (client).
    Connect,
    /// Client: ask the bus to open the channel.
    RequestOpen,
    /// Take the rings over, incoming queue off.
    Attach,
    /// Call `opened`; its result comes back as [`Event::OpenAccepted`] or [`Event::OpenRefused`].
    CallOpened,
    /// Server: tell the guest that the channel is open.
    AcceptOpen,
    /// Server: tell the guest that the open failed.
    RefuseOpen,
    /// Queued packets may go into the ring from now on.
    TransmitOn,
    /// Call `started`.
    CallStarted,
    /// Deliver incoming packets from now on.
    QueueOn,
    /// Call `post_started`.
    CallPostStarted,
    /// Deliver no further packet; return once no packet callback runs.
    QueueOff,
    /// Call `suspend`.
    CallSuspend,
    /// End every outgoing packet that is queued or in flight, with this status.
    CancelOutgoing(NtStatus),
    /// Report [`Event::Drained`] once no incoming packet is outstanding.
    AwaitDrain,
    /// Call `closed`.
    CallClosed,
    /// Undo what GPADLs the device has left (D-58).
    ReleaseGpadls,
    /// Let go of the rings.
    Detach,
    /// Server: tell the bus that the channel has let go; the offer stands.
    ReportClosed,
    /// Leave the bus: withdraw the offer (server), close the channel (client).
    Disconnect,
    /// Client: call the PnP failure callback.
    CallPnpFailure,
    /// Server: let go of rings, packets and bus without a word to anybody.
    LetGo,
}

/// An event that makes no sense in the present state: a caller's or a bus's mistake.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{event:?} is not possible while the channel is {state:?}")]
pub struct WrongState {
    /// What was asked.
    pub event: Event,
    /// Where the channel was, and still is.
    pub state: ChannelState,
}

/// The life cycle of one channel. Plain data.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Lifecycle {
    side: Side,
    state: ChannelState,
    /// Ended by Start, begun by Pause; survives a close and reopen on the server.
    started: bool,
    /// Pause on a disabled channel: the next Enable does not start it (D-4).
    pause_armed: bool,
    /// Where a refused open returns to: Enabled or Closed.
    opened_from: ChannelState,
    /// Disable was asked for, so Closing ends in Disabled on the server as well.
    disable_wanted: bool,
}

/// The sequence that makes an open channel Active.
const STARTING: [Effect; 3] = [Effect::CallStarted, Effect::QueueOn, Effect::CallPostStarted];

impl Lifecycle {
    /// A channel just allocated.
    #[must_use]
    pub fn new(side: Side) -> Self {
        Self {
            side,
            state: ChannelState::Disabled,
            started: false,
            pause_armed: false,
            opened_from: ChannelState::Enabled,
            disable_wanted: false,
        }
    }

    /// Where the channel is.
    #[must_use]
    pub fn state(&self) -> ChannelState {
        self.state
    }

    /// Which end it is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// Whether the channel delivers packets as soon as it is open.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// Takes one step, and says what has to be done about it.
    ///
    /// # Errors
    /// [`WrongState`] for a pair that the table in the tests lists as refused; nothing changes then.
    pub fn on(&mut self, event: Event) -> Result<Vec<Effect>, WrongState> {
        use ChannelState as S;
        use Event as E;
        let refused = WrongState { event, state: self.state };
        let effects = match (self.state, event) {
            (S::Disabled, E::Enable) => {
                self.started = self.side == Side::Client && !self.pause_armed;
                self.pause_armed = false;
                self.disable_wanted = false;
                self.state = S::Enabled;
                vec![Effect::Connect]
            }
            (S::Enabled, E::ConnectRefused) => {
                // The pause was not used up.
                self.pause_armed = self.side == Side::Client && !self.started;
                self.end();
                vec![Effect::CancelOutgoing(NtStatus::CANCELLED)]
            }
            (S::Enabled, E::Offered) if self.side == Side::Client => {
                self.state = S::Connecting;
                vec![Effect::RequestOpen]
            }

            (S::Enabled | S::Closed, E::PeerOpened) if self.side == Side::Server => self.opening(),
            (S::Connecting, E::PeerOpened) => self.opening(),
            (S::Enabled | S::Connecting, E::OpenFailed) if self.side == Side::Client => {
                self.failed()
            }
            (S::Opening, E::OpenAccepted) => self.open(),
            (S::Opening, E::OpenRefused) => self.refuse(),

            (S::Disabled, E::Start) => {
                self.pause_armed = false;
                vec![]
            }
            (S::Paused, E::Start) => {
                self.started = true;
                self.state = S::Active;
                STARTING.to_vec()
            }
            (S::Opening, E::Start | E::Pause | E::Disable) => return Err(refused),
            (_, E::Start) => {
                self.started = true;
                vec![]
            }

            (S::Disabled, E::Pause) => {
                self.pause_armed = true;
                vec![]
            }
            (S::Active, E::Pause) => {
                self.started = false;
                self.state = S::Pausing;
                vec![Effect::QueueOff, Effect::CallSuspend, Effect::AwaitDrain]
            }
            (_, E::Pause) => {
                self.started = false;
                vec![]
            }

            (S::Pausing, E::Drained) => self.paused(),
            (S::Closing, E::Drained) => self.closed(),

            // What a restore has brought before the channel was enabled is given up.
            (S::Disabled, E::Disable) => vec![Effect::CancelOutgoing(NtStatus::CANCELLED)],
            (S::Enabled | S::Connecting | S::Closed, E::Disable) => {
                self.end();
                vec![Effect::CancelOutgoing(NtStatus::CANCELLED), Effect::Disconnect]
            }
            (S::Paused | S::Active | S::Pausing | S::Closing, E::Disable) => {
                self.disable_wanted = true;
                self.closing(NtStatus::CANCELLED)
            }

            // A close that crosses our own going down, or comes twice, has nothing left to do.
            (S::Disabled | S::Closed, E::PeerClosed) => vec![],
            (S::Enabled, E::PeerClosed) if self.side == Side::Server => vec![],
            (S::Enabled | S::Connecting, E::PeerClosed) => self.failed(),
            (S::Paused | S::Active | S::Pausing | S::Closing, E::PeerClosed) => {
                self.closing(NtStatus::DEVICE_REMOVED)
            }

            (S::Disabled | S::Opening | S::Connecting, E::MovedAway) => return Err(refused),
            (_, E::MovedAway) if self.side == Side::Server => {
                self.end();
                vec![Effect::LetGo]
            }

            _ => return Err(refused),
        };
        Ok(effects)
    }

    fn opening(&mut self) -> Vec<Effect> {
        self.opened_from = self.state;
        self.state = ChannelState::Opening;
        vec![Effect::Attach, Effect::CallOpened]
    }

    fn open(&mut self) -> Vec<Effect> {
        let mut effects = vec![];
        if self.side == Side::Server {
            effects.push(Effect::AcceptOpen);
        }
        effects.push(Effect::TransmitOn);
        if self.started {
            self.state = ChannelState::Active;
            effects.extend(STARTING);
        } else {
            self.state = ChannelState::Paused;
        }
        effects
    }

    /// D-3: no further callback; the server's offer stands as before, the client is Disabled.
    fn refuse(&mut self) -> Vec<Effect> {
        let mut effects = vec![
            Effect::CancelOutgoing(NtStatus::CANCELLED),
            Effect::ReleaseGpadls,
            Effect::Detach,
        ];
        match self.side {
            Side::Server => {
                self.state = self.opened_from;
                effects.push(Effect::RefuseOpen);
            }
            Side::Client => {
                self.end();
                effects.push(Effect::Disconnect);
            }
        }
        effects
    }

    fn failed(&mut self) -> Vec<Effect> {
        self.end();
        vec![
            Effect::CancelOutgoing(NtStatus::DEVICE_REMOVED),
            Effect::Disconnect,
            Effect::CallPnpFailure,
        ]
    }

    fn paused(&mut self) -> Vec<Effect> {
        // Start may have come while the device was still completing packets.
        if self.started {
            self.state = ChannelState::Active;
            STARTING.to_vec()
        } else {
            self.state = ChannelState::Paused;
            vec![]
        }
    }

    fn closing(&mut self, status: NtStatus) -> Vec<Effect> {
        let before = std::mem::replace(&mut self.state, ChannelState::Closing);
        // Our own packets end before we wait for the device: it may need their end to finish what
        // it was given.
        let cancel = Effect::CancelOutgoing(status);
        match before {
            ChannelState::Active => {
                vec![Effect::QueueOff, Effect::CallSuspend, cancel, Effect::AwaitDrain]
            }
            ChannelState::Closing => vec![],
            _ => vec![cancel, Effect::AwaitDrain],
        }
    }

    fn closed(&mut self) -> Vec<Effect> {
        let mut effects = vec![Effect::CallClosed, Effect::ReleaseGpadls, Effect::Detach];
        if self.side == Side::Server {
            effects.push(Effect::ReportClosed);
        }
        if self.side == Side::Client || self.disable_wanted {
            self.end();
            effects.push(Effect::Disconnect);
        } else {
            self.state = ChannelState::Closed;
        }
        effects
    }

    fn end(&mut self) {
        self.state = ChannelState::Disabled;
        self.started = false;
        self.disable_wanted = false;
    }
}

#[cfg(test)]
mod tests;
