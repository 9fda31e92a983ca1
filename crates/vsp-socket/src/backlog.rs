//! What waits to be written, piece by piece, with every byte accounted for.

use std::collections::VecDeque;

/// Pieces of a stream, oldest first. The first one may be partly written.
#[derive(Debug)]
pub(crate) struct Backlog<P> {
    pieces: VecDeque<P>,
    /// Bytes of the first piece that are written.
    written: usize,
    /// Bytes of all pieces that are not.
    bytes: usize,
}

impl<P> Default for Backlog<P> {
    fn default() -> Self {
        Self { pieces: VecDeque::new(), written: 0, bytes: 0 }
    }
}

impl<P: AsRef<[u8]>> Backlog<P> {
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a piece; one without bytes comes back.
    pub(crate) fn push(&mut self, piece: P) -> Option<P> {
        let len = piece.as_ref().len();
        if len == 0 {
            return Some(piece);
        }
        self.bytes += len;
        self.pieces.push_back(piece);
        None
    }

    /// The bytes to write next.
    pub(crate) fn next(&self) -> Option<&[u8]> {
        self.pieces.front()?.as_ref().get(self.written..)
    }

    /// Takes note that `bytes` of those were written. The piece comes back once it is written whole.
    pub(crate) fn wrote(&mut self, bytes: usize) -> Option<P> {
        let left = self.next()?.len();
        let bytes = bytes.min(left);
        self.bytes -= bytes;
        if bytes < left {
            self.written += bytes;
            return None;
        }
        self.written = 0;
        self.pieces.pop_front()
    }

    /// Makes other pieces of those that wait, with the same bytes, oldest first.
    pub(crate) fn replace(&mut self, mut with: impl FnMut(P) -> P) {
        self.pieces = std::mem::take(&mut self.pieces).into_iter().map(&mut with).collect();
    }

    /// Gives all of it up.
    pub(crate) fn clear(&mut self) -> VecDeque<P> {
        (self.written, self.bytes) = (0, 0);
        std::mem::take(&mut self.pieces)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is pushed and however much is written each time: each byte once, in order, and each
        /// piece back when its last byte is written.
        #[test]
        fn a_stream_is_what_was_pushed(
            pieces in vec(vec(any::<u8>(), 0..40), 0..20),
            writes in vec(0..60_usize, 1..40),
        ) {
            let mut backlog = Backlog::default();
            let (mut waiting, mut pushed, mut written) = (pieces.iter(), Vec::new(), Vec::new());
            let mut back = Vec::new();
            for bytes in writes.iter().cycle().take(200).chain(&[60; 60]) {
                if let Some(piece) = waiting.next() {
                    pushed.extend_from_slice(piece);
                    prop_assert_eq!(backlog.push(piece.clone()).is_some(), piece.is_empty());
                }
                if let Some(next) = backlog.next() {
                    let bytes = (*bytes).min(next.len());
                    written.extend_from_slice(&next[..bytes]);
                    back.extend(backlog.wrote(bytes));
                }
                prop_assert_eq!(backlog.bytes(), pushed.len() - written.len());
                prop_assert_eq!(backlog.is_empty(), backlog.bytes() == 0);
            }
            prop_assert_eq!(written, pushed);
            prop_assert_eq!(back, pieces.into_iter().filter(|it| !it.is_empty()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn other_pieces_go_on_where_the_former_stopped() {
        let mut backlog = Backlog::default();
        backlog.push(b"one".to_vec());
        backlog.push(b"two".to_vec());
        assert_eq!(backlog.wrote(2), None);
        backlog.replace(|piece| piece.to_ascii_uppercase());
        assert_eq!((backlog.next(), backlog.bytes()), (Some(&b"E"[..]), 4));
        assert_eq!(backlog.wrote(1), Some(b"ONE".to_vec()));
        assert_eq!(backlog.clear(), [b"TWO".to_vec()]);
        assert_eq!((backlog.next(), backlog.bytes()), (None, 0));
    }
}
