//! Every step of the life cycle, as a table of each side, and what holds whatever happens.

use std::collections::{BTreeSet, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// The server's steps. `state words: event -> state words | effects`; the words narrow the line down
/// to one of several conditions (in front) or say what holds afterwards (behind):
///
/// - `started`: it delivers packets as soon as it is open;
/// - `disabling`: Disable was asked for while the channel was open;
/// - `reopening`: the open began in Closed;
/// - `armed`: Pause came while the channel was Disabled.
///
/// Source: kmcl-semantics section 3.2; D-2 to D-4, D-11, D-12.
const SERVER: &str = "
    Disabled: Enable -> Enabled !started !armed | Connect
    Disabled: Start -> Disabled !armed |
    Disabled: Pause -> Disabled armed |
    Disabled: Disable -> Disabled | Cancel(CANCELLED)
    Disabled: PeerClosed -> Disabled |
    Disabled: refuses ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained MovedAway

    Enabled: ConnectRefused -> Disabled !started | Cancel(CANCELLED)
    Enabled: PeerOpened -> Opening !reopening | Attach CallOpened
    Enabled: Start -> Enabled started |
    Enabled: Pause -> Enabled !started |
    Enabled: Disable -> Disabled !started | Cancel(CANCELLED) Disconnect
    Enabled: PeerClosed -> Enabled |
    Enabled: MovedAway -> Disabled !started !disabling | LetGo
    Enabled: refuses Enable Offered OpenFailed OpenAccepted OpenRefused Drained

    Opening started: OpenAccepted -> Active started | AcceptOpen TransmitOn CallStarted QueueOn CallPostStarted
    Opening !started: OpenAccepted -> Paused !started | AcceptOpen TransmitOn
    Opening !reopening: OpenRefused -> Enabled | Cancel(CANCELLED) ReleaseGpadls Detach RefuseOpen
    Opening reopening: OpenRefused -> Closed | Cancel(CANCELLED) ReleaseGpadls Detach RefuseOpen
    Opening: refuses Enable ConnectRefused Offered PeerOpened OpenFailed Start Pause Drained Disable PeerClosed MovedAway

    Paused: Start -> Active started | CallStarted QueueOn CallPostStarted
    Paused: Pause -> Paused !started |
    Paused: Disable -> Closing disabling | Cancel(CANCELLED) AwaitDrain
    Paused: PeerClosed -> Closing !disabling | Cancel(DEVICE_REMOVED) AwaitDrain
    Paused: MovedAway -> Disabled !started !disabling | LetGo
    Paused: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained

    Active: Start -> Active started |
    Active: Pause -> Pausing !started | QueueOff CallSuspend AwaitDrain
    Active: Disable -> Closing disabling | QueueOff CallSuspend Cancel(CANCELLED) AwaitDrain
    Active: PeerClosed -> Closing !disabling | QueueOff CallSuspend Cancel(DEVICE_REMOVED) AwaitDrain
    Active: MovedAway -> Disabled !started !disabling | LetGo
    Active: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained

    Pausing: Start -> Pausing started |
    Pausing: Pause -> Pausing !started |
    Pausing started: Drained -> Active started | CallStarted QueueOn CallPostStarted
    Pausing !started: Drained -> Paused !started |
    Pausing: Disable -> Closing disabling | Cancel(CANCELLED) AwaitDrain
    Pausing: PeerClosed -> Closing !disabling | Cancel(DEVICE_REMOVED) AwaitDrain
    Pausing: MovedAway -> Disabled !started !disabling | LetGo
    Pausing: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused

    Closing: Start -> Closing started |
    Closing: Pause -> Closing !started |
    Closing !disabling: Drained -> Closed | CallClosed ReleaseGpadls Detach ReportClosed
    Closing disabling: Drained -> Disabled !started !disabling | CallClosed ReleaseGpadls Detach ReportClosed Disconnect
    Closing: Disable -> Closing disabling |
    Closing: PeerClosed -> Closing |
    Closing: MovedAway -> Disabled !started !disabling | LetGo
    Closing: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused

    Closed: PeerOpened -> Opening reopening | Attach CallOpened
    Closed: Start -> Closed started |
    Closed: Pause -> Closed !started |
    Closed: Disable -> Disabled !started | Cancel(CANCELLED) Disconnect
    Closed: PeerClosed -> Closed |
    Closed: MovedAway -> Disabled !started !disabling | LetGo
    Closed: refuses Enable ConnectRefused Offered OpenFailed OpenAccepted OpenRefused Drained
";

/// The client's steps, as [`SERVER`]. It is never Closed: after every closing it is Disabled.
const CLIENT: &str = "
    Disabled !armed: Enable -> Enabled started | Connect
    Disabled armed: Enable -> Enabled !started !armed | Connect
    Disabled: Start -> Disabled !armed |
    Disabled: Pause -> Disabled armed |
    Disabled: Disable -> Disabled | Cancel(CANCELLED)
    Disabled: PeerClosed -> Disabled |
    Disabled: refuses ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained MovedAway

    Enabled started: ConnectRefused -> Disabled !started !armed | Cancel(CANCELLED)
    Enabled !started: ConnectRefused -> Disabled !started armed | Cancel(CANCELLED)
    Enabled: Offered -> Connecting | RequestOpen
    Enabled: OpenFailed -> Disabled !started | Cancel(DEVICE_REMOVED) Disconnect CallPnpFailure
    Enabled: Start -> Enabled started |
    Enabled: Pause -> Enabled !started |
    Enabled: Disable -> Disabled !started | Cancel(CANCELLED) Disconnect
    Enabled: PeerClosed -> Disabled !started | Cancel(DEVICE_REMOVED) Disconnect CallPnpFailure
    Enabled: refuses Enable PeerOpened OpenAccepted OpenRefused Drained MovedAway

    Connecting: PeerOpened -> Opening | Attach CallOpened
    Connecting: OpenFailed -> Disabled !started | Cancel(DEVICE_REMOVED) Disconnect CallPnpFailure
    Connecting: Start -> Connecting started |
    Connecting: Pause -> Connecting !started |
    Connecting: Disable -> Disabled !started | Cancel(CANCELLED) Disconnect
    Connecting: PeerClosed -> Disabled !started | Cancel(DEVICE_REMOVED) Disconnect CallPnpFailure
    Connecting: refuses Enable ConnectRefused Offered OpenAccepted OpenRefused Drained MovedAway

    Opening started: OpenAccepted -> Active started | TransmitOn CallStarted QueueOn CallPostStarted
    Opening !started: OpenAccepted -> Paused !started | TransmitOn
    Opening: OpenRefused -> Disabled !started | Cancel(CANCELLED) ReleaseGpadls Detach Disconnect
    Opening: refuses Enable ConnectRefused Offered PeerOpened OpenFailed Start Pause Drained Disable PeerClosed MovedAway

    Paused: Start -> Active started | CallStarted QueueOn CallPostStarted
    Paused: Pause -> Paused !started |
    Paused: Disable -> Closing disabling | Cancel(CANCELLED) AwaitDrain
    Paused: PeerClosed -> Closing !disabling | Cancel(DEVICE_REMOVED) AwaitDrain
    Paused: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained MovedAway

    Active: Start -> Active started |
    Active: Pause -> Pausing !started | QueueOff CallSuspend AwaitDrain
    Active: Disable -> Closing disabling | QueueOff CallSuspend Cancel(CANCELLED) AwaitDrain
    Active: PeerClosed -> Closing !disabling | QueueOff CallSuspend Cancel(DEVICE_REMOVED) AwaitDrain
    Active: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused Drained MovedAway

    Pausing: Start -> Pausing started |
    Pausing: Pause -> Pausing !started |
    Pausing started: Drained -> Active started | CallStarted QueueOn CallPostStarted
    Pausing !started: Drained -> Paused !started |
    Pausing: Disable -> Closing disabling | Cancel(CANCELLED) AwaitDrain
    Pausing: PeerClosed -> Closing !disabling | Cancel(DEVICE_REMOVED) AwaitDrain
    Pausing: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused MovedAway

    Closing: Start -> Closing started |
    Closing: Pause -> Closing !started |
    Closing: Drained -> Disabled !started !disabling | CallClosed ReleaseGpadls Detach Disconnect
    Closing: Disable -> Closing disabling |
    Closing: PeerClosed -> Closing |
    Closing: refuses Enable ConnectRefused Offered PeerOpened OpenFailed OpenAccepted OpenRefused MovedAway
";

/// One line of a table, taken apart: a condition, an event, and a result unless it is refused.
struct Line {
    text: String,
    from: Condition,
    events: Vec<String>,
    to: Option<(Condition, String)>,
}

/// A state, and words that hold or, behind a `!`, do not.
struct Condition {
    state: String,
    words: Vec<String>,
}

impl Condition {
    fn parse(text: &str) -> Self {
        let mut words = text.split_whitespace().map(str::to_owned);
        Self { state: words.next().unwrap(), words: words.collect() }
    }

    fn holds(&self, life: &Lifecycle) -> bool {
        self.state == format!("{:?}", life.state)
            && self.words.iter().all(|word| {
                let (word, wanted) = word.strip_prefix('!').map_or((&**word, true), |w| (w, false));
                wanted
                    == match word {
                        "started" => life.started,
                        "disabling" => life.disable_wanted,
                        "reopening" => life.opened_from == ChannelState::Closed,
                        "armed" => life.pause_armed,
                        other => panic!("no such word: {other}"),
                    }
            })
    }
}

fn table(text: &str) -> Vec<Line> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let (from, rest) = line.split_once(": ").unwrap();
            let (events, to) = match rest.split_once(" -> ") {
                Some((event, to)) => {
                    let (to, effects) = to.split_once('|').unwrap();
                    (event, Some((Condition::parse(to), effects.trim().to_owned())))
                }
                None => (rest.strip_prefix("refuses ").unwrap(), None),
            };
            Line {
                text: line.to_owned(),
                from: Condition::parse(from),
                events: events.split_whitespace().map(str::to_owned).collect(),
                to,
            }
        })
        .collect()
}

fn spell(effects: &[Effect]) -> String {
    let spelled: Vec<_> = effects
        .iter()
        .map(|effect| match effect {
            Effect::CancelOutgoing(NtStatus::CANCELLED) => "Cancel(CANCELLED)".to_owned(),
            Effect::CancelOutgoing(NtStatus::DEVICE_REMOVED) => "Cancel(DEVICE_REMOVED)".to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    spelled.join(" ")
}

/// Every condition that some sequence of events leads to, found by trying all.
fn reachable(side: Side) -> Vec<Lifecycle> {
    let mut found = HashSet::from([Lifecycle::new(side)]);
    let mut fresh = VecDeque::from_iter(found.iter().copied());
    while let Some(life) = fresh.pop_front() {
        for event in Event::ALL {
            let mut next = life;
            if next.on(event).is_ok() && found.insert(next) {
                fresh.push_back(next);
            }
        }
    }
    found.into_iter().collect()
}

/// Tries every event in every condition that can be reached: exactly one line of the table speaks of
/// it, and says what happens. No line speaks of nothing.
fn check(side: Side, text: &str) {
    let lines = table(text);
    let mut used = BTreeSet::new();
    for life in reachable(side) {
        for event in Event::ALL {
            let name = format!("{event:?}");
            let matching: Vec<_> = (0..)
                .zip(&lines)
                .filter(|(_, line)| line.from.holds(&life) && line.events.contains(&name))
                .collect();
            let texts: Vec<_> = matching.iter().map(|(_, line)| &line.text).collect();
            let [(number, line)] = *matching else { panic!("{life:?} {event:?}: {texts:?}") };
            used.insert((number, name));
            let mut next = life;
            match (next.on(event), &line.to) {
                (Err(refused), None) => {
                    assert_eq!(refused, WrongState { event, state: life.state }, "{}", line.text);
                    assert_eq!(next, life, "a refused event changed something: {}", line.text);
                }
                (Ok(effects), Some((to, expected))) => {
                    assert_eq!(&spell(&effects), expected, "{life:?}: {}", line.text);
                    assert!(to.holds(&next), "{life:?} became {next:?}: {}", line.text);
                }
                (result, _) => panic!("{life:?}: {result:?}, but {}", line.text),
            }
        }
    }
    for (number, line) in (0..).zip(&lines) {
        for event in &line.events {
            assert!(used.contains(&(number, event.clone())), "never happens: {}", line.text);
        }
    }
}

/// Section 3.2, the server's side, D-2 to D-4, D-11, D-12.
#[test]
fn every_step_of_the_server_is_in_its_table() {
    check(Side::Server, SERVER);
}

/// Section 3.2, the client's side, D-2 to D-4, D-11, D-12.
#[test]
fn every_step_of_the_client_is_in_its_table() {
    check(Side::Client, CLIENT);
}

/// What a performer of the effects sees: each of these must be in order, whatever happens.
#[derive(Default)]
struct Performed {
    connected: bool,
    attached: bool,
    opened: bool,
    active: bool,
    queue_on: bool,
    /// The peer was told that the channel is open, and not yet that it has let go.
    accepted: bool,
    transmits: bool,
}

impl Performed {
    fn perform(&mut self, life: &Lifecycle, effect: Effect) {
        let held = |condition: bool| assert!(condition, "{effect:?} on the way to {life:?}");
        match effect {
            Effect::Connect => {
                held(!self.connected);
                self.connected = true;
            }
            Effect::RequestOpen => held(self.connected && !self.attached),
            Effect::Attach => {
                held(self.connected && !self.attached);
                self.attached = true;
            }
            Effect::CallOpened => {
                held(self.attached && !self.opened);
                self.opened = true;
            }
            Effect::AcceptOpen => {
                held(self.opened && !self.accepted);
                self.accepted = true;
            }
            Effect::RefuseOpen => {
                held(!self.attached && !self.accepted);
                self.opened = false;
            }
            Effect::TransmitOn => {
                held(self.opened && !self.transmits);
                self.transmits = true;
            }
            Effect::CallStarted => {
                held(self.transmits && !self.active);
                self.active = true;
            }
            Effect::QueueOn => {
                held(self.active && !self.queue_on);
                self.queue_on = true;
            }
            Effect::CallPostStarted => held(self.queue_on),
            Effect::QueueOff => {
                held(self.queue_on);
                self.queue_on = false;
            }
            Effect::CallSuspend => {
                held(self.active && !self.queue_on);
                self.active = false;
            }
            Effect::AwaitDrain => held(self.attached && !self.queue_on),
            Effect::CancelOutgoing(_) => held(!self.queue_on),
            Effect::CallClosed => {
                held(self.opened && !self.active);
                self.opened = false;
            }
            Effect::ReleaseGpadls => held(self.attached),
            Effect::Detach => {
                held(self.attached);
                self.attached = false;
                self.transmits = false;
            }
            Effect::ReportClosed => {
                held(self.accepted && !self.attached);
                self.accepted = false;
            }
            Effect::Disconnect => {
                held(self.connected && !self.attached && !self.accepted);
                self.connected = false;
                self.opened = false;
            }
            Effect::CallPnpFailure => held(!self.connected),
            Effect::LetGo => {
                held(self.connected);
                *self = Self::default();
            }
        }
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    prop::sample::select(&Event::ALL[..])
}

proptest! {
    /// Whatever happens, in whatever order: Opened comes before Started, Started and Suspend
    /// alternate, Closed comes once for each opening and after Suspend, the queue is on only between
    /// Started and Suspend, rings are taken and let go of in pairs, the bus is told each thing once
    /// (D-2, D-3, section 3.2).
    #[test]
    fn effects_are_in_order(
        server in any::<bool>(),
        events in prop::collection::vec(any_event(), 0..200),
    ) {
        let side = if server { Side::Server } else { Side::Client };
        let mut life = Lifecycle::new(side);
        let mut performed = Performed::default();
        for event in events {
            let Ok(effects) = life.on(event) else { continue };
            if event == Event::ConnectRefused {
                performed.connected = false;
            }
            for effect in effects {
                performed.perform(&life, effect);
            }
            let state = life.state();
            prop_assert_eq!(performed.queue_on, state == ChannelState::Active);
            prop_assert_eq!(performed.connected, state != ChannelState::Disabled);
            prop_assert_eq!(
                performed.attached,
                state.is_open() || matches!(state, ChannelState::Opening | ChannelState::Closing)
            );
            // Active is open and started, and nothing else (D-2).
            let active = state == ChannelState::Active;
            prop_assert!(!active || life.is_started());
            prop_assert!(state != ChannelState::Paused || !life.is_started());
        }
    }

    /// From everywhere Disable leads to Disabled, once the device has answered what it is asked.
    #[test]
    fn disable_leads_to_disabled(
        server in any::<bool>(),
        events in prop::collection::vec(any_event(), 0..50),
    ) {
        let side = if server { Side::Server } else { Side::Client };
        let mut life = Lifecycle::new(side);
        for event in events {
            let _refused = life.on(event);
        }
        if life.state() == ChannelState::Opening {
            life.on(Event::OpenAccepted).unwrap();
        }
        life.on(Event::Disable).unwrap();
        if life.state() == ChannelState::Closing {
            life.on(Event::Drained).unwrap();
        }
        prop_assert_eq!(life.state(), ChannelState::Disabled);
        prop_assert!(!life.is_started());
    }
}
