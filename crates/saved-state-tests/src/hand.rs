//! Streams whose records are made by hand: for what no process here can have, such as a virtual processor.

use kmcl::Guid;
use saved_state::reader::Kinds;
use saved_state::text::Producer;
use saved_state::{
    Encode, FormatVersion, HeaderFlags, Step, StreamInfo, StreamKind, StreamWriter, WriteError,
};

/// Most bytes of a chunk that is made by hand.
const ROOM_BYTES: usize = 64 << 10;

/// A stream, record by record.
pub(crate) struct Hand {
    writer: StreamWriter,
    out: Vec<u8>,
}

impl Hand {
    /// Begins one that belongs to no interface.
    pub(crate) fn begin(stream: StreamKind, kinds: Kinds, items: u32) -> Self {
        let info = StreamInfo {
            stream,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer: Producer::new("made by hand").unwrap(),
            chunks: 0,
            bytes: 0,
            items,
        };
        let writer = StreamWriter::new(FormatVersion::NEWEST, info, kinds).unwrap();
        let mut hand = Self { writer, out: Vec::new() };
        hand.keep(|writer, room| writer.header(room));
        hand
    }

    /// Adds a record.
    pub(crate) fn record(&mut self, record: &impl Encode) {
        self.keep(|writer, room| writer.record(record, room));
    }

    /// All of it.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.keep(|writer, room| writer.end(room));
        self.out
    }

    fn keep(
        &mut self,
        write: impl FnOnce(&mut StreamWriter, &mut [u8]) -> Result<Step, WriteError>,
    ) {
        let mut room = vec![0; ROOM_BYTES];
        let Step::Written { bytes } = write(&mut self.writer, &mut room).unwrap() else {
            panic!("no room")
        };
        self.out.extend_from_slice(&room[..bytes]);
    }
}
