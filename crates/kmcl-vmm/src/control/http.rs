//! HTTP/1.1, as much of it as requests of a VM need: bytes to a request's head, an answer to bytes.
//!
//! Every request is a method, a path, and perhaps a body with a length. There are no queries, no chunks,
//! no encodings; `Host` is not asked for, since a socket has but one.

use httparse::{EMPTY_HEADER, Header, Status};
use serde::Serialize;

use super::api::{ControlError, ErrorKind};

/// Most bytes of a request line and header.
pub const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most fields of a header.
pub const MAX_FIELDS: usize = 32;
/// Most bytes of a body.
pub const MAX_BODY_BYTES: usize = 64 << 10;

/// What comes before a request's body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Head {
    pub(super) method: String,
    pub(super) path: String,
    /// Bytes of the head itself.
    pub(super) bytes: usize,
    /// Bytes of the body behind it: at most [`MAX_BODY_BYTES`].
    pub(super) body_bytes: usize,
    /// Whether another request may follow.
    pub(super) keep_alive: bool,
    /// Whether the body comes only when it has been asked for.
    pub(super) expects_continue: bool,
}

impl Head {
    /// Reads the head of a request from what has come; `None` while it is not all there.
    ///
    /// # Errors
    /// [`ControlError`] for what is no request, or too much of one. Nothing that follows can be trusted
    /// to begin another.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>, ControlError> {
        let within = bytes.get(..MAX_HEAD_BYTES).unwrap_or(bytes);
        let mut fields = [EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        let length = match request.parse(within).map_err(refused)? {
            Status::Complete(length) => length,
            Status::Partial if within.len() == MAX_HEAD_BYTES => {
                let what = format!("request line and header: more than {MAX_HEAD_BYTES} bytes");
                return Err(ControlError::new(ErrorKind::HeadTooLarge, what));
            }
            Status::Partial => return Ok(None),
        };
        let (Some(method), Some(path), Some(version)) =
            (request.method, request.path, request.version)
        else {
            return Err(ControlError::invalid("a request without a request line"));
        };
        let fields = &*request.headers;
        if values(fields, "Transfer-Encoding").next().is_some() {
            let what = "a body with Transfer-Encoding: send its Content-Length instead";
            return Err(ControlError::new(ErrorKind::Length, what));
        }
        let body_bytes = body_bytes(fields)?;
        let asks = |name, token: &str| {
            values(fields, name)
                .flat_map(|value| value.split(|&byte| byte == b','))
                .any(|one| one.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
        };
        let is_1_1 = version == 1;
        Ok(Some(Self {
            method: method.to_owned(),
            path: path.to_owned(),
            bytes: length,
            body_bytes,
            keep_alive: !asks("Connection", "close")
                && (is_1_1 || asks("Connection", "keep-alive")),
            expects_continue: is_1_1 && body_bytes > 0 && asks("Expect", "100-continue"),
        }))
    }
}

fn values<'a>(fields: &'a [Header<'_>], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    fields
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .map(|field| field.value)
}

fn body_bytes(fields: &[Header<'_>]) -> Result<usize, ControlError> {
    let mut lengths = values(fields, "Content-Length");
    let Some(length) = lengths.next() else { return Ok(0) };
    let digits = std::str::from_utf8(length).unwrap_or_default();
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number || lengths.next().is_some() {
        return Err(ControlError::invalid("Content-Length is not one number"));
    }
    // Digits that are no number are too many of them.
    match digits.parse() {
        Ok(length) if length <= MAX_BODY_BYTES => Ok(length),
        _ => {
            let what = format!("a body of {digits} bytes: at most {MAX_BODY_BYTES}");
            Err(ControlError::new(ErrorKind::TooLarge, what))
        }
    }
}

fn refused(error: httparse::Error) -> ControlError {
    let kind = match error {
        httparse::Error::TooManyHeaders => ErrorKind::HeadTooLarge,
        httparse::Error::Version => ErrorKind::HttpVersion,
        _ => ErrorKind::Invalid,
    };
    ControlError::new(kind, format!("not a request: {error}"))
}

/// An answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Answer {
    status: (u16, &'static str),
    /// The method that is allowed, where another was used.
    allow: Option<&'static str>,
    body: Option<Vec<u8>>,
}

impl Answer {
    /// It was done, and there is nothing to say.
    pub(super) fn done() -> Self {
        Self { status: (204, "No Content"), allow: None, body: None }
    }

    /// It was done, and this came out.
    pub(super) fn with(body: &impl Serialize) -> Self {
        match serde_json::to_vec(body) {
            Ok(body) => Self { status: (200, "OK"), allow: None, body: Some(body) },
            // A path that is not UTF-8 has no JSON.
            Err(error) => Self::error(&ControlError::failed(format!("the answer: {error}"))),
        }
    }

    /// It was refused, or has failed.
    pub(super) fn error(error: &ControlError) -> Self {
        let body = serde_json::to_vec(error).ok();
        Self { status: error.kind.status(), allow: None, body }
    }

    /// Says which method is allowed.
    pub(super) fn allowing(self, method: &'static str) -> Self {
        Self { allow: Some(method), ..self }
    }

    /// Its bytes. The body is left out `for_head`: an answer to the method HEAD has none.
    pub(super) fn to_bytes(&self, keep_alive: bool, for_head: bool) -> Vec<u8> {
        let (code, reason) = self.status;
        let mut head = format!("HTTP/1.1 {code} {reason}\r\n");
        if let Some(method) = self.allow {
            head.push_str(&format!("Allow: {method}\r\n"));
        }
        if let Some(body) = &self.body {
            let length = body.len();
            head.push_str("Content-Type: application/json\r\n");
            head.push_str(&format!("Content-Length: {length}\r\n"));
        }
        head.push_str(if keep_alive { "\r\n" } else { "Connection: close\r\n\r\n" });
        let mut bytes = head.into_bytes();
        bytes.extend(self.body.as_deref().filter(|_| !for_head).unwrap_or_default());
        bytes
    }
}

/// What asks for a body that is held back.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(head: &str) -> Option<ErrorKind> {
        Head::parse(head.as_bytes()).err().map(|error| error.kind)
    }

    #[test]
    fn a_head_is_read_once_it_is_there() {
        let whole = "PUT /api/v1/vm.save HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(Head::parse(&whole.as_bytes()[..end]), Ok(None), "{end} bytes");
        }
        let expected = Head {
            method: "PUT".into(),
            path: "/api/v1/vm.save".into(),
            bytes: whole.len(),
            body_bytes: 17,
            keep_alive: true,
            expects_continue: false,
        };
        assert_eq!(Head::parse(format!("{whole}more").as_bytes()), Ok(Some(expected)));
    }

    #[test]
    fn what_is_no_request_is_refused_by_its_kind() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD_BYTES));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_FIELDS + 1));
        let most = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_FIELDS));
        let put = |fields: &str| format!("PUT / HTTP/1.1\r\n{fields}\r\n\r\n");
        for (head, expected) in [
            ("\0\0\0".into(), Some(ErrorKind::Invalid)),
            ("GET / SIP/2.0\r\n\r\n".into(), Some(ErrorKind::HttpVersion)),
            ("GET / HTTP/2.0\r\n\r\n".into(), Some(ErrorKind::HttpVersion)),
            ("GET /\r\n\r\n".into(), Some(ErrorKind::Invalid)),
            ("{\"a\": 1}\r\n\r\n".into(), Some(ErrorKind::Invalid)),
            ("GET / HTTP/1.1\r\n: x\r\n\r\n".into(), Some(ErrorKind::Invalid)),
            (long, Some(ErrorKind::HeadTooLarge)),
            (many, Some(ErrorKind::HeadTooLarge)),
            (most, None),
            (put("Content-Length: 65536"), None),
            (put("Content-Length: 65537"), Some(ErrorKind::TooLarge)),
            (put("Content-Length: 99999999999999999999999"), Some(ErrorKind::TooLarge)),
            (put("Content-Length: -1"), Some(ErrorKind::Invalid)),
            (put("Content-Length: +1"), Some(ErrorKind::Invalid)),
            (put("Content-Length:"), Some(ErrorKind::Invalid)),
            (put("Content-Length: 1\r\nContent-Length: 1"), Some(ErrorKind::Invalid)),
            (put("Transfer-Encoding: chunked"), Some(ErrorKind::Length)),
        ] {
            let start: String = head.chars().take(80).collect();
            assert_eq!(kind(&head), expected, "{start:?}");
        }
    }

    #[test]
    fn who_may_go_on() {
        for (line, fields, keep_alive, expects_continue) in [
            ("HTTP/1.1", "", true, false),
            ("HTTP/1.1", "connection: Close\r\n", false, false),
            ("HTTP/1.1", "Connection: x, close\r\n", false, false),
            ("HTTP/1.0", "", false, false),
            ("HTTP/1.0", "Connection: Keep-Alive\r\n", true, false),
            ("HTTP/1.1", "Content-Length: 1\r\nExpect: 100-continue\r\n", true, true),
            ("HTTP/1.1", "Expect: 100-continue\r\n", true, false),
            ("HTTP/1.0", "Content-Length: 1\r\nExpect: 100-continue\r\n", false, false),
        ] {
            let text = format!("PUT / {line}\r\n{fields}\r\n");
            let head = Head::parse(text.as_bytes()).unwrap().unwrap();
            assert_eq!(
                (head.keep_alive, head.expects_continue),
                (keep_alive, expects_continue),
                "{text:?}"
            );
        }
    }

    #[test]
    fn answers_say_how_long_they_are_and_whether_they_are_the_last() {
        let refused = ControlError::new(ErrorKind::Method, "no");
        let refused = Answer::error(&refused).allowing("GET");
        for (answer, keep_alive, for_head, expected) in [
            (Answer::done(), true, false, "HTTP/1.1 204 No Content\r\n\r\n"),
            (Answer::done(), false, false, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"),
            (
                Answer::with(&[1, 2]),
                true,
                false,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n[1,2]",
            ),
            (
                refused,
                true,
                true,
                "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\n\
                 Content-Type: application/json\r\nContent-Length: 32\r\n\r\n",
            ),
        ] {
            let bytes = answer.to_bytes(keep_alive, for_head);
            assert_eq!(String::from_utf8_lossy(&bytes), expected);
        }
    }

    proptest! {
        /// Any bytes are a head, the beginning of one, or an error; a head is never longer than they are.
        #[test]
        fn any_bytes_are_read_or_refused(
            noise in prop::collection::vec(any::<u8>(), 0..64),
            at in 0usize..64,
        ) {
            let mut bytes = b"PUT /api HTTP/1.1\r\nContent-Length: 9\r\nConnection: a\r\n\r\n".to_vec();
            let at = at.min(bytes.len());
            bytes.splice(at..at, noise);
            if let Ok(Some(head)) = Head::parse(&bytes) {
                prop_assert!(head.bytes <= bytes.len() && head.body_bytes <= MAX_BODY_BYTES);
            }
        }
    }
}
