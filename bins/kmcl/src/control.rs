//! How another process of the same user asks a server to save itself: a second socket beside the one
//! for guests.
//!
//! ```text
//! kmcl save                                   kmcl serve
//!    │── SaveRequest, one line of JSON ───────────▶│  freezes
//!    │◀─ Part: bytes of the saved state ───────────│  …
//!    │◀─ Saved: what was saved, as JSON ───────────│  stays frozen
//!    │     the file is written, synced, renamed    │
//!    │── Keep: the file is there ─────────────────▶│  ends, and tells its guest nothing
//!    │◀─ end of the connection ────────────────────│
//! ```
//!
//! Instead of *Part* and *Saved* there may be *Failed*, with the reason as JSON. Whatever else happens, an
//! end of the connection or silence, the server goes on as before: what was sent is void then.
//!
//! Every message after the request is a frame: one byte that says what it is, four for the length,
//! little-endian, then the rest.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// The version of what goes over the socket.
pub(crate) const PROTOCOL: u32 = 1;

/// Most bytes of a request's line.
pub(crate) const MAX_REQUEST_BYTES: u64 = 4096;

/// Most bytes of a frame.
pub(crate) const MAX_FRAME_BYTES: u32 = 1 << 20;

/// How long either side waits for the other to take or give the next bytes. A server is frozen
/// meanwhile.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What a server is asked for.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct SaveRequest {
    pub(crate) protocol: u32,
    /// The server is to go on, whatever becomes of the saved state.
    pub(crate) go_on: bool,
    /// Bytes of the buffers that the state is saved into; a chunk that is larger gets one of its size.
    pub(crate) buffer_bytes: u32,
    /// How long requests that run may take to settle, in milliseconds.
    pub(crate) settle_ms: u64,
}

/// What was saved.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Saved {
    /// Requests in flight.
    pub(crate) in_flight: u32,
    /// From the begin of the freeze until no request was running.
    pub(crate) settled_us: u64,
    /// From the begin of the freeze until the last byte was sent.
    pub(crate) saved_us: u64,
    /// Bytes of the saved state.
    pub(crate) bytes: u64,
}

/// Why nothing was saved, as it goes over the socket.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Refusal {
    kind: Exit,
    message: String,
    #[serde(default)]
    advice: String,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.kind, refusal.message, refusal.advice)
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Bytes of the saved state.
    Part = b'p',
    /// All of it was sent.
    Saved = b's',
    /// Nothing was saved.
    Failed = b'f',
    /// The saved state is kept.
    Keep = b'k',
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Part, Self::Saved, Self::Failed, Self::Keep].into_iter().find(|k| *k as u8 == byte)
    }
}

/// The control socket of the server whose socket for guests is at `socket`.
pub(crate) fn path_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".control");
    path.into()
}

/// Sends a frame; `bytes` are at most [`MAX_FRAME_BYTES`].
///
/// # Errors
/// Those of `out`.
pub(crate) fn send(out: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let [a, b, c, d] = length.to_le_bytes();
    out.write_all(&[kind as u8, a, b, c, d])?;
    out.write_all(bytes)
}

/// Takes a frame, whose bytes replace those in `into`.
///
/// # Errors
/// Those of `input`; [`io::ErrorKind::InvalidData`] for what is no frame, and
/// [`io::ErrorKind::UnexpectedEof`] where none comes.
pub(crate) fn receive(input: &mut impl Read, into: &mut Vec<u8>) -> io::Result<Kind> {
    let mut head = [0; 5];
    input.read_exact(&mut head)?;
    let [kind, a, b, c, d] = head;
    let length = u32::from_le_bytes([a, b, c, d]);
    let kind = Kind::of(kind).filter(|_| length <= MAX_FRAME_BYTES);
    let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
    into.clear();
    // Grows with what comes, not with what is promised.
    let came = input.take(length.into()).read_to_end(into)?;
    if came as u64 != u64::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(kind)
}

/// Sends bytes of the saved state, as a [`Write`].
pub(crate) struct Parts<W>(pub(crate) W);

impl<W: Write> Write for Parts<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = bytes.get(..MAX_FRAME_BYTES as usize).unwrap_or(bytes);
        send(&mut self.0, Kind::Part, part)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_as_they_were_sent() {
        let mut sent = Vec::new();
        send(&mut sent, Kind::Saved, b"{}").unwrap();
        let big = vec![7; MAX_FRAME_BYTES as usize + 1];
        Parts(&mut sent).write_all(&big).unwrap();
        send(&mut sent, Kind::Keep, b"").unwrap();
        let (mut input, mut bytes, mut came) = (&sent[..], Vec::new(), Vec::new());
        while !input.is_empty() {
            came.push((receive(&mut input, &mut bytes).unwrap(), bytes.len()));
        }
        let whole = MAX_FRAME_BYTES as usize;
        let expected = [(Kind::Saved, 2), (Kind::Part, whole), (Kind::Part, 1), (Kind::Keep, 0)];
        assert_eq!(came, expected);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for (bytes, expected) in [
            (&b""[..], io::ErrorKind::UnexpectedEof),
            (b"p\x01", io::ErrorKind::UnexpectedEof),
            (b"p\x02\0\0\0x", io::ErrorKind::UnexpectedEof),
            (b"x\0\0\0\0", io::ErrorKind::InvalidData),
            (b"p\x01\0\x10\0", io::ErrorKind::InvalidData),
            (b"p\xff\xff\xff\xff", io::ErrorKind::InvalidData),
        ] {
            let error = receive(&mut &bytes[..], &mut Vec::new()).unwrap_err();
            assert_eq!(error.kind(), expected, "{bytes:?}");
        }
    }

    proptest! {
        /// Any bytes are a frame or an error, and never more than was sent.
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut into = Vec::new();
            if receive(&mut &bytes[..], &mut into).is_ok() {
                prop_assert!(into.len() + 5 <= bytes.len());
            }
        }
    }
}
