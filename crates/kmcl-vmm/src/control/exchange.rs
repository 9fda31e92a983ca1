//! One connection's requests and answers, without its socket: bytes and the time go in, requests and bytes
//! come out.
//!
//! ```text
//!         ┌───────────────────────────────────────────┐ another request may follow
//!         ▼                                           │
//!      Request ──── all of it ───▶ Call ── answer ─▶ Answer ──── it was the last ───▶ Drain ──▶ Over
//!         │ malformed, too much, too slow             ▲                                          ▲
//!         ├───────────────────────────────────────────┘                                          │
//!         └── nothing came, or the peer has gone ────────────────────────────────────────────────┘
//! ```
//!
//! *Drain*: a socket that is closed while bytes wait in it tells its peer of an error, which may hide the
//! answer that was sent before. So what still comes is read and thrown away, for a moment.

use std::time::{Duration, Instant};

use super::api::{ControlError, ErrorKind};
use super::http::{Answer, CONTINUE, Head};

/// How long a request may take to come, from its first byte to its last.
pub const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a peer may take to read its answer.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How long bytes are thrown away after the last answer, and how many.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
const DRAIN_BYTES: usize = 1 << 20;

/// A request that has come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wants {
    /// Bytes from its peer.
    Read,
    /// Room for bytes to its peer: there are some [to send](Exchange::to_send).
    Write,
    /// Bytes to throw away; nothing is sent any more.
    Drain,
    /// The answer to its request.
    Answer,
    /// Nothing: it is to be closed.
    Close,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Exchange {
    step: Step,
    /// At most a request and what was read with its last byte.
    input: Vec<u8>,
    /// The head at the begin of `input`, once it is there.
    head: Option<Head>,
    output: Vec<u8>,
    sent: usize,
    /// No request comes after this one.
    last: bool,
    for_head: bool,
    peer_ended: bool,
    drained: usize,
    /// When the step that it is at was begun, and with its first byte a request.
    since: Instant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    Request,
    Call,
    Answer,
    Drain,
    Over,
}

impl Exchange {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            step: Step::Request,
            input: Vec::new(),
            head: None,
            output: Vec::new(),
            sent: 0,
            last: false,
            for_head: false,
            peer_ended: false,
            drained: 0,
            since: now,
        }
    }

    /// What it waits for now.
    pub(super) fn wants(&self) -> Wants {
        match self.step {
            Step::Request | Step::Answer if !self.to_send().is_empty() => Wants::Write,
            Step::Request => Wants::Read,
            Step::Call => Wants::Answer,
            Step::Answer | Step::Drain => Wants::Drain,
            Step::Over => Wants::Close,
        }
    }

    /// When it has waited long enough: [`Exchange::expire`] then. A call takes as long as it takes, and a
    /// connection without a request may stay: it is closed when its place is needed.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let patience = match self.step {
            Step::Request if self.input.is_empty() => return None,
            Step::Request => REQUEST_PATIENCE,
            Step::Answer => ANSWER_PATIENCE,
            Step::Drain => DRAIN_PATIENCE,
            Step::Call | Step::Over => return None,
        };
        Some(self.since + patience)
    }

    /// Since when there is no request, not even the begin of one.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (self.step == Step::Request && self.input.is_empty()).then_some(self.since)
    }

    /// The peer has sent bytes; gives a request that is complete with them.
    pub(super) fn received(&mut self, bytes: &[u8], now: Instant) -> Option<Request> {
        match self.step {
            Step::Request => {
                if self.input.is_empty() {
                    self.since = now;
                }
                self.input.extend_from_slice(bytes);
                self.next(now)
            }
            Step::Drain => {
                self.drained += bytes.len();
                if self.drained > DRAIN_BYTES {
                    self.step = Step::Over;
                }
                None
            }
            // Nobody has asked for bytes.
            Step::Call | Step::Answer | Step::Over => None,
        }
    }

    /// The peer sends no more. It may still read.
    pub(super) fn ended(&mut self, now: Instant) {
        self.peer_ended = true;
        match self.step {
            Step::Request if !self.input.is_empty() => {
                self.refuse(&ControlError::invalid("the request ends in its middle"), now);
            }
            Step::Request | Step::Drain => self.step = Step::Over,
            Step::Call | Step::Answer | Step::Over => {}
        }
    }

    /// The answer to the request that [`Exchange::received`] or [`Exchange::sent`] gave.
    pub(super) fn answer(&mut self, answer: &Answer, now: Instant) {
        self.output = answer.to_bytes(!self.last, self.for_head);
        self.sent = 0;
        self.step = Step::Answer;
        self.since = now;
    }

    /// Bytes for the peer.
    pub(super) fn to_send(&self) -> &[u8] {
        self.output.get(self.sent..).unwrap_or_default()
    }

    /// The peer has taken as many of them; gives the next request, where it has come already.
    pub(super) fn sent(&mut self, bytes: usize, now: Instant) -> Option<Request> {
        self.sent = self.sent.saturating_add(bytes);
        if !self.to_send().is_empty() {
            return None;
        }
        self.output.clear();
        self.sent = 0;
        if self.step != Step::Answer {
            return None;
        }
        self.since = now;
        if self.last || self.peer_ended && self.input.is_empty() {
            self.step = if self.peer_ended { Step::Over } else { Step::Drain };
            return None;
        }
        self.step = Step::Request;
        let next = self.next(now);
        if self.peer_ended {
            self.ended(now);
        }
        next
    }

    /// Its [deadline](Exchange::deadline) has come.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.step == Step::Request && !self.input.is_empty() {
            let what = format!("a request may take {} s", REQUEST_PATIENCE.as_secs());
            self.refuse(&ControlError::new(ErrorKind::Slow, what), now);
        } else {
            self.step = Step::Over;
        }
    }

    /// Whatever it is at, no request follows.
    pub(super) fn finish(&mut self) {
        self.last = true;
        if self.step == Step::Request {
            self.step = Step::Over;
        }
    }

    /// Answers with an error behind which nothing can be read.
    pub(super) fn refuse(&mut self, error: &ControlError, now: Instant) {
        self.last = true;
        self.input.clear();
        self.answer(&Answer::error(error), now);
    }

    fn next(&mut self, now: Instant) -> Option<Request> {
        if self.head.is_none() {
            match Head::parse(&self.input) {
                Ok(head) => self.head = head,
                Err(error) => {
                    self.refuse(&error, now);
                    return None;
                }
            }
            if self.head.as_ref().is_some_and(|head| head.expects_continue) {
                self.output = CONTINUE.to_vec();
                self.sent = 0;
            }
        }
        let head = self.head.as_ref()?;
        let end = head.bytes + head.body_bytes;
        let body = self.input.get(head.bytes..end)?.to_vec();
        self.input.drain(..end);
        let Head { method, path, keep_alive, .. } = self.head.take()?;
        // Nobody waits to be asked for what has come.
        self.output.clear();
        self.sent = 0;
        self.last |= !keep_alive;
        self.for_head = method == "HEAD";
        self.step = Step::Call;
        Some(Request { method, path, body })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GET: &str = "GET /a HTTP/1.1\r\n\r\n";

    fn text(exchange: &Exchange) -> &str {
        std::str::from_utf8(exchange.to_send()).unwrap()
    }

    /// Takes all there is to send.
    fn take(exchange: &mut Exchange, now: Instant) -> (String, Option<Request>) {
        let sent = text(exchange).to_owned();
        (sent.clone(), exchange.sent(sent.len(), now))
    }

    #[test]
    fn requests_follow_one_another_and_each_waits_for_the_answer_before() {
        let now = Instant::now();
        let mut exchange = Exchange::new(now);
        let three = format!("{GET}PUT /b HTTP/1.1\r\nContent-Length: 3\r\n\r\nxyz{GET}");
        let first = exchange.received(three.as_bytes(), now).unwrap();
        assert_eq!((first.path.as_str(), exchange.wants()), ("/a", Wants::Answer));
        exchange.answer(&Answer::done(), now);
        let (answer, second) = take(&mut exchange, now);
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
        let expected = Request { method: "PUT".into(), path: "/b".into(), body: b"xyz".into() };
        assert_eq!(second, Some(expected));
        exchange.answer(&Answer::done(), now);
        assert!(take(&mut exchange, now).1.is_some());
        exchange.answer(&Answer::done(), now);
        assert_eq!(take(&mut exchange, now).1, None);
        assert_eq!(exchange.wants(), Wants::Read);
        assert_eq!(exchange.idle_since(), Some(now));
    }

    #[test]
    fn the_last_answer_is_followed_by_silence() {
        let now = Instant::now();
        for (request, status) in [
            ("GET /a HTTP/1.1\r\nConnection: close\r\n\r\nmore", "204"),
            ("GET /a HTTP/1.0\r\n\r\n", "204"),
            ("\0", "400"),
            ("PUT /a HTTP/1.1\r\nContent-Length: 70000\r\n\r\nxx", "413"),
        ] {
            let mut exchange = Exchange::new(now);
            if exchange.received(request.as_bytes(), now).is_some() {
                exchange.answer(&Answer::done(), now);
            }
            let (answer, next) = take(&mut exchange, now);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
            assert!(answer.contains("\r\nConnection: close\r\n"), "{request:?}: {answer}");
            assert_eq!((next, exchange.wants()), (None, Wants::Drain), "{request:?}");
            assert_eq!(exchange.received(GET.as_bytes(), now), None, "{request:?}");
            assert_eq!(exchange.wants(), Wants::Drain, "{request:?}");
            exchange.received(&vec![0; DRAIN_BYTES], now);
            assert_eq!(exchange.wants(), Wants::Close, "{request:?}");
        }
    }

    /// Every wait has an end, but that for a call.
    #[test]
    fn whoever_is_slow_is_told_or_closed() {
        let start = Instant::now();
        let after = |patience| Some(start + patience);
        let exchange = Exchange::new(start);
        assert_eq!(
            (exchange.deadline(), exchange.idle_since()),
            (None, Some(start)),
            "says nothing"
        );

        let mut exchange = Exchange::new(start);
        for byte in GET.as_bytes().iter().take(9) {
            let later = start + Duration::from_secs(5);
            let now = exchange.idle_since().unwrap_or(later);
            assert_eq!(exchange.received(&[*byte], now), None);
            assert_eq!(exchange.deadline(), after(REQUEST_PATIENCE), "more bytes, no more time");
        }
        exchange.expire(start);
        assert!(text(&exchange).starts_with("HTTP/1.1 408 "), "a slow request");
        assert_eq!(exchange.deadline(), after(ANSWER_PATIENCE));
        exchange.sent(5, start);
        exchange.expire(start);
        assert_eq!(exchange.wants(), Wants::Close, "a slow reader");

        let mut exchange = Exchange::new(start);
        exchange.received(GET.as_bytes(), start).unwrap();
        assert_eq!(exchange.deadline(), None, "a call");
        exchange.finish();
        exchange.answer(&Answer::done(), start);
        take(&mut exchange, start);
        assert_eq!((exchange.wants(), exchange.deadline()), (Wants::Drain, after(DRAIN_PATIENCE)));
        exchange.expire(start);
        assert_eq!(exchange.wants(), Wants::Close, "drained long enough");
    }

    #[test]
    fn whoever_sends_no_more_is_still_answered() {
        let now = Instant::now();
        let mut exchange = Exchange::new(now);
        exchange.received(GET.as_bytes(), now).unwrap();
        exchange.ended(now);
        exchange.answer(&Answer::done(), now);
        let (answer, _) = take(&mut exchange, now);
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
        assert_eq!(exchange.wants(), Wants::Close);

        let mut exchange = Exchange::new(now);
        exchange.received(format!("{GET}{GET}GE").as_bytes(), now).unwrap();
        exchange.ended(now);
        exchange.answer(&Answer::done(), now);
        assert!(take(&mut exchange, now).1.is_some(), "what came before the end");
        exchange.answer(&Answer::done(), now);
        take(&mut exchange, now);
        assert!(text(&exchange).starts_with("HTTP/1.1 400 "), "{}", text(&exchange));
    }

    #[test]
    fn a_body_that_is_held_back_is_asked_for() {
        let now = Instant::now();
        let head = "PUT /a HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
        let mut exchange = Exchange::new(now);
        assert_eq!(exchange.received(head.as_bytes(), now), None);
        assert_eq!(
            (text(&exchange), exchange.wants()),
            ("HTTP/1.1 100 Continue\r\n\r\n", Wants::Write)
        );
        take(&mut exchange, now);
        assert_eq!(exchange.received(b"x", now), None);
        assert_eq!(exchange.wants(), Wants::Read, "asked once");
        assert_eq!(exchange.received(b"y", now).unwrap().body, b"xy");

        let mut exchange = Exchange::new(now);
        assert!(exchange.received(format!("{head}xy").as_bytes(), now).is_some());
        assert_eq!(text(&exchange), "", "it was there already");
    }

    proptest! {
        /// However a stream is cut into pieces, the same requests come of it.
        #[test]
        fn pieces_do_not_matter(sizes in prop::collection::vec(1usize..40, 1..20)) {
            let now = Instant::now();
            let stream = format!("{GET}PUT /b HTTP/1.1\r\nContent-Length: 30\r\n\r\n{}{GET}", "x".repeat(30));
            let (mut exchange, mut rest, mut came) = (Exchange::new(now), stream.as_bytes(), Vec::new());
            for size in sizes.into_iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, behind) = rest.split_at(size.min(rest.len()));
                rest = behind;
                let mut next = exchange.received(piece, now);
                while let Some(request) = next {
                    came.push((request.path, request.body.len()));
                    exchange.answer(&Answer::done(), now);
                    next = take(&mut exchange, now).1;
                }
            }
            prop_assert_eq!(came, [("/a".into(), 0), ("/b".into(), 30), ("/a".to_owned(), 0)]);
        }
    }
}
