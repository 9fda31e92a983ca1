//! A bus at every step of its protocol: what a guest says is written down byte by byte, the host's side is
//! the real one.

use kmcl::bus::Offer;
use kmcl::{Guid, NtStatus, Save as _};
use vmbus_host::{Config, Effect, GuestShape, Host, OfferId, OfferParams, RamMap, SaveOptions};

/// Interface type of the devices.
const TYPE: Guid = Guid::from_u128(0xba61_63d9_04a1_4d29_b605_72e2_ffb1_dc7f);

const VERSION_5_3: u32 = 0x0005_0003;
const SUCCESS: NtStatus = NtStatus::SUCCESS;

/// A host, and a guest that says what the test has it say.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The host.
    pub host: Host,
    /// What is to be performed, and is not.
    pub effects: Vec<Effect>,
}

/// A message of a guest: its number, then its fields.
pub(crate) fn message(kind: u32, words: &[u32]) -> Vec<u8> {
    let words = [&[kind, 0], words].concat();
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// INITIATE_CONTACT for version 5.3, SINT 2 of VP 0.
pub(crate) fn contact() -> Vec<u8> {
    message(14, &[VERSION_5_3, 0, 2, 0, 0, 0, 0, 0])
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A guest with four processors and two stretches of RAM.
    #[must_use]
    pub fn new() -> Self {
        let ram = RamMap::new([(0, 16 << 20), (1 << 30, 16 << 20)]);
        let host = Host::new(Config::default(), GuestShape { vp_count: 4, ram });
        Self { host, effects: Vec::new() }
    }

    /// `count` devices that are offered, and a guest that has connected and was told of them.
    #[must_use]
    pub fn connected(count: u32) -> (Self, Vec<OfferId>) {
        let mut machine = Self::new();
        let offers = (1..=count).map(|number| machine.offer(number)).collect();
        machine.say(&machine.contact());
        machine.say(&message(3, &[]));
        machine.take_messages();
        (machine, offers)
    }

    /// Offers a device.
    pub fn offer(&mut self, number: u32) -> OfferId {
        let instance = Guid::from_fields(number, 0, 0, [0; 8]);
        let offer = OfferParams::try_from(&Offer::new(TYPE, instance)).unwrap();
        self.host.offer(offer).unwrap()
    }

    /// INITIATE_CONTACT for version 5.3, SINT 2 of VP 0.
    #[must_use]
    pub fn contact(&self) -> Vec<u8> {
        contact()
    }

    /// The guest says something that the host accepts.
    pub fn say(&mut self, bytes: &[u8]) {
        let connection = if bytes.first() == Some(&14) { 4 } else { 1 };
        self.host.guest_message(connection, bytes, &mut self.effects).unwrap();
    }

    /// The guest reads every message that waits for it.
    pub fn take_messages(&mut self) -> usize {
        let mut taken = 0;
        while let Some(serial) = self.host.next_message(&[]).map(|message| message.serial) {
            self.host.message_taken(serial);
            taken += 1;
        }
        taken
    }

    /// The header of a GPADL of `pages` pages, as many words as one message has, and the messages with
    /// the rest.
    pub fn gpadl(&mut self, channel: u32, gpadl: u32, pages: u16, messages: usize) {
        let words: Vec<u64> = std::iter::once(u64::from(pages) * 4096)
            .chain((0..u64::from(pages)).map(|at| 10 + at))
            .collect();
        let (first, rest) = words.split_at(words.len().min(27));
        let bytes =
            |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let length = u32::from(pages) * 8 + 8;
        let header = message(8, &[channel, gpadl, length | 1 << 16]);
        self.say(&[header, bytes(first)].concat());
        for words in rest.chunks(28).take(messages) {
            self.say(&[message(9, &[0, gpadl]), bytes(words)].concat());
        }
    }

    /// The guest asks for a channel to be opened, in a ring that it has described whole.
    pub fn ask_to_open(&mut self, channel: u32, gpadl: u32) {
        self.gpadl(channel, gpadl, 8, 1);
        let mut open = message(5, &[channel, 0x77, gpadl, 0, 4]);
        open.resize(open.len() + 120, 0x5a);
        self.say(&open);
    }

    /// The guest has a channel opened.
    pub fn open(&mut self, offer: OfferId, channel: u32, gpadl: u32) {
        self.ask_to_open(channel, gpadl);
        self.host.open_result(offer, SUCCESS, &mut self.effects);
        self.take_messages();
    }

    /// The guest closes a channel. Its device has not let go.
    pub fn ask_to_close(&mut self, channel: u32) {
        self.say(&message(7, &[channel]));
    }

    /// The guest asks for a socket that nobody answers for.
    pub fn ask_for_socket(&mut self) {
        let guids: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
        self.say(&message(21, &guids));
    }

    /// The guest wants a channel's signals on another processor.
    pub fn ask_to_modify(&mut self, channel: u32) {
        self.say(&message(22, &[channel, 2]));
    }

    /// The guest ends its connection.
    pub fn unload(&mut self) {
        self.say(&message(16, &[]));
    }

    /// The host's state.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        save(&self.host)
    }
}

/// A host's state.
#[must_use]
pub fn save(host: &Host) -> Vec<u8> {
    let mut state = Vec::new();
    host.save(&SaveOptions::default()).unwrap().write_to(&mut state).unwrap();
    state
}

/// Restores a state, and sees to it that nothing of it is lost: the host that comes of it says the same
/// when it is saved, and goes on without contradicting itself.
pub fn assert_goes_on(state: &[u8]) {
    let host = Host::restore(state).unwrap();
    assert_eq!(host.violations(), Vec::<String>::new());
    let again = save(&host);
    assert_eq!(Host::restore(&again), Ok(host.clone()));
    let mut machine = Machine { host, effects: Vec::new() };
    let waiting = machine.host.usage();
    machine.host.devices_have_moved();
    machine.host.go_on(&mut machine.effects);
    assert_eq!(machine.host.violations(), Vec::<String>::new(), "{waiting:?}");
    // Every channel that was being opened is opened, and each that is open is closed, by its device.
    for effect in std::mem::take(&mut machine.effects) {
        if let Effect::Open { offer, .. } = effect {
            machine.host.open_result(offer, SUCCESS, &mut machine.effects);
        }
    }
    machine.take_messages();
    let offers: Vec<_> = machine.host.channels().map(|(offer, _)| offer).collect();
    for offer in offers {
        machine.host.revoke(offer, &mut machine.effects);
    }
    machine.take_messages();
    assert_eq!(machine.host.violations(), Vec::<String>::new());
}
