//! Saving the host, and going on: in the same host, or in another one.

use kmcl::{ChannelState, Frozen, Save};

use crate::world::World;

/// What keeps a host as it is, to be saved.
pub(crate) struct Hold {
    gadget: Option<Frozen>,
    churn: Option<Frozen>,
}

/// A host in bytes: what another process would read. The guest and the disk are not in it: they stay.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SavedWorld {
    gadget: Option<Vec<u8>>,
    churn: Option<Vec<u8>>,
}

impl World {
    /// Freezes the host: from now on only what is under way in its devices comes to its end.
    pub fn freeze(&mut self) {
        self.log.line(format_args!("freeze"));
        let freeze = |channel: &kmcl::Channel| {
            let is_there = channel.state() != ChannelState::Disabled;
            is_there.then(|| channel.freeze().expect("not frozen yet"))
        };
        let gadget = freeze(self.host.as_ref().expect("a host").gadget.channel());
        let churn = freeze(self.host.as_ref().expect("a host").churn.channel());
        self.hold = Some(Hold { gadget, churn });
    }

    /// Whether nothing is under way in the devices of a frozen host: it can be saved.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let Some(Hold { gadget, churn }) = &self.hold else { return false };
        [gadget, churn].into_iter().flatten().all(|frozen| frozen.running() == 0)
    }

    /// Saves a host that was frozen and has settled, through a buffer of `buffer` bytes at first.
    #[must_use]
    pub fn save(&mut self, buffer: usize) -> SavedWorld {
        let Hold { gadget, churn } = self.hold.as_ref().expect("the host is frozen");
        let save = |frozen: &Option<Frozen>| {
            let frozen = frozen.as_ref()?;
            Some(write(frozen.save().expect("the channel has settled"), buffer))
        };
        SavedWorld { gadget: save(gadget), churn: save(churn) }
    }

    /// Lets a frozen host go on as if nothing had happened.
    pub fn thaw(&mut self) {
        self.log.line(format_args!("thaw"));
        self.hold = None;
    }
}

/// All that a save gives, through a buffer that grows from `first` bytes to what is needed.
fn write(mut save: impl Save, first: usize) -> Vec<u8> {
    let (mut state, mut buffer) = (Vec::new(), vec![0; first]);
    loop {
        let step = save.step(&mut buffer).expect("nothing stands in the way of a save");
        state.extend_from_slice(&buffer[..step.written]);
        if step.done {
            return state;
        }
        assert!(step.needed > 0, "a save neither goes on nor says what it needs");
        if step.written == 0 {
            assert!(step.needed > buffer.len(), "a buffer of the size asked for is not used");
            buffer.resize(step.needed, 0);
        }
    }
}
