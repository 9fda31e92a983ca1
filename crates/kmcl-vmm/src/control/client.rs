//! The other end of the control interface, for programs that ask: it blocks.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Status};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::api::{
    ControlError, Counters, DiskAddress, ErrorKind, Info, RemoveDiskRequest, SaveRequest, Saved,
    ShutdownRequest,
};
use super::call::{API_ROOT, REQUESTS};
use super::http::{MAX_FIELDS, MAX_HEAD_BYTES};
use crate::config::DiskConfig;

/// Most bytes of an answer's body.
pub const MAX_ANSWER_BYTES: usize = 4 << 20;

/// How long connecting may take, and the answer to a question, which waits for no other request. A change
/// takes as long as it takes, and as those before it do.
pub const QUESTION_PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer, or not the one hoped for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody can be reached.
    #[error("{path}: {source}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// What the system said: [`io::ErrorKind::NotFound`] and [`io::ErrorKind::ConnectionRefused`] where no
        /// VM is controlled there, [`io::ErrorKind::PermissionDenied`] where it is somebody else's.
        source: io::Error,
    },
    /// The connection has broken, or nothing came in time. A change may have been made, or may yet be.
    #[error("the connection to the VM: {0}")]
    Connection(#[from] io::Error),
    /// What came is no answer.
    #[error("what answers is no VM's control interface: {0}")]
    Answer(String),
    /// There is no such request. Nothing was sent.
    #[error("there is no request {0:?}")]
    NoSuchRequest(String),
    /// The VM has refused, or failed.
    #[error(transparent)]
    Refused(#[from] ControlError),
}

/// A connection to a VM. After any error but [`Error::Refused`] and [`Error::NoSuchRequest`] it is of no
/// more use.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// What has been read and not used.
    input: Vec<u8>,
}

impl Client {
    /// Connects to the VM that is controlled at `path`.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = || {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // A connection waits for a place in the queue as long as bytes would for room.
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(QUESTION_PATIENCE))?;
            connect(&socket, &address)?;
            Ok(UnixStream::from(socket))
        };
        let refused = |source: io::Error| Error::Connect { path: path.to_owned(), source };
        Ok(Self { stream: stream().map_err(refused)?, input: Vec::new() })
    }

    /// How the VM is.
    ///
    /// # Errors
    /// [`Error`].
    pub fn info(&mut self) -> Result<Info, Error> {
        self.ask("vm.info", b"")
    }

    /// What it has counted.
    ///
    /// # Errors
    /// [`Error`].
    pub fn counters(&mut self) -> Result<Counters, Error> {
        self.ask("vm.counters", b"")
    }

    /// Stops its processors.
    ///
    /// # Errors
    /// [`Error`].
    pub fn pause(&mut self) -> Result<(), Error> {
        self.change("vm.pause", &())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`Error`].
    pub fn resume(&mut self) -> Result<(), Error> {
        self.change("vm.resume", &())
    }

    /// Saves it; returns once it is saved.
    ///
    /// # Errors
    /// [`Error`].
    pub fn save(&mut self, request: &SaveRequest) -> Result<Saved, Error> {
        let body = json(request)?;
        self.ask("vm.save", &body)
    }

    /// Asks its guest to power off; returns once it has said that it will.
    ///
    /// # Errors
    /// [`Error`].
    pub fn shutdown(&mut self, request: &ShutdownRequest) -> Result<(), Error> {
        self.change("vm.shutdown", request)
    }

    /// Asks its guest to restart; returns once it has said that it will.
    ///
    /// # Errors
    /// [`Error`].
    pub fn reboot(&mut self, request: &ShutdownRequest) -> Result<(), Error> {
        self.change("vm.reboot", request)
    }

    /// Gives its guest a disk.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add_disk(&mut self, disk: &DiskConfig) -> Result<DiskAddress, Error> {
        let body = json(disk)?;
        self.ask("vm.add-disk", &body)
    }

    /// Takes a disk away.
    ///
    /// # Errors
    /// [`Error`].
    pub fn remove_disk(&mut self, request: &RemoveDiskRequest) -> Result<(), Error> {
        self.change("vm.remove-disk", request)
    }

    /// Makes a request by its name, one of [`REQUESTS`], with a body that may be empty; gives the body of the
    /// answer, which is JSON, or empty where there is nothing to say.
    ///
    /// # Errors
    /// [`Error`].
    pub fn request(&mut self, name: &str, body: &[u8]) -> Result<Vec<u8>, Error> {
        let known = REQUESTS.iter().find(|(_, known)| *known == name);
        let Some((method, name)) = known else {
            return Err(Error::NoSuchRequest(name.to_owned()));
        };
        let length = body.len();
        let mut bytes = format!(
            "{method} {API_ROOT}{name} HTTP/1.1\r\nHost: vm\r\nContent-Length: {length}\r\n\r\n"
        )
        .into_bytes();
        bytes.extend_from_slice(body);
        let sent = self.stream.write_all(&bytes);
        let until = (*method == "GET").then(|| Instant::now() + QUESTION_PATIENCE);
        // Whoever refuses a request may say so and close before it has read all of it.
        match (self.answer(until), sent) {
            (Err(Error::Connection(_)), Err(error)) => Err(error.into()),
            (answer, _) => answer,
        }
    }

    /// Waits until the VM closes the connection, as it does when it has ended.
    ///
    /// # Errors
    /// [`Error::Connection`], of a connection that ends otherwise.
    pub fn wait_for_end(mut self) -> Result<(), Error> {
        self.stream.set_read_timeout(None)?;
        let mut unread = [0; 256];
        loop {
            match self.stream.read(&mut unread) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn ask<T: DeserializeOwned>(&mut self, name: &str, body: &[u8]) -> Result<T, Error> {
        let answer = self.request(name, body)?;
        serde_json::from_slice(&answer).map_err(|error| Error::Answer(error.to_string()))
    }

    fn change(&mut self, name: &str, body: &impl Serialize) -> Result<(), Error> {
        let body = json(body)?;
        self.request(name, if body == b"null" { b"" } else { &body }).map(|_nothing| ())
    }

    fn answer(&mut self, until: Option<Instant>) -> Result<Vec<u8>, Error> {
        let head = loop {
            match AnswerHead::parse(&self.input)? {
                Some(AnswerHead { code: 100..=199, bytes, .. }) => drop(self.input.drain(..bytes)),
                Some(head) => break head,
                None => self.read(until)?,
            }
        };
        let end = head.bytes + head.body_bytes;
        while self.input.len() < end {
            self.read(until)?;
        }
        let mut body: Vec<u8> = self.input.drain(..end).collect();
        body.drain(..head.bytes);
        if (200..=299).contains(&head.code) {
            return Ok(body);
        }
        let error: ControlError = serde_json::from_slice(&body)
            .map_err(|_| Error::Answer(format!("status {} without a reason", head.code)))?;
        Err(error.into())
    }

    fn read(&mut self, until: Option<Instant>) -> Result<(), Error> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        self.stream.set_read_timeout(left)?;
        let mut bytes = [0; 4096];
        let length = match self.stream.read(&mut bytes) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            Err(error) => return Err(error.into()),
        };
        self.input.extend_from_slice(bytes.get(..length).unwrap_or_default());
        Ok(())
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>, Error> {
    // A path that is not UTF-8 has no JSON.
    serde_json::to_vec(body)
        .map_err(|error| ControlError::new(ErrorKind::Invalid, error.to_string()).into())
}

/// What comes before an answer's body.
#[derive(Debug, Eq, PartialEq)]
struct AnswerHead {
    code: u16,
    /// Bytes of the head itself.
    bytes: usize,
    body_bytes: usize,
}

impl AnswerHead {
    /// Reads it from what has come; `None` while it is not all there.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, Error> {
        let within = bytes.get(..MAX_HEAD_BYTES).unwrap_or(bytes);
        let mut fields = [EMPTY_HEADER; MAX_FIELDS];
        let mut answer = httparse::Response::new(&mut fields);
        let length = match answer.parse(within) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) if within.len() < MAX_HEAD_BYTES => return Ok(None),
            Ok(Status::Partial) => return Err(Error::Answer("its header does not end".into())),
            Err(error) => return Err(Error::Answer(error.to_string())),
        };
        let code = answer.code.unwrap_or(0);
        let mut fields = answer.headers.iter();
        let body = fields.find(|field| field.name.eq_ignore_ascii_case("Content-Length"));
        let body_bytes = match body {
            Some(field) => {
                let digits = std::str::from_utf8(field.value).unwrap_or_default();
                digits.parse().ok().filter(|length| *length <= MAX_ANSWER_BYTES)
            }
            None if matches!(code, 100..=199 | 204) => Some(0),
            None => None,
        };
        match body_bytes {
            Some(body_bytes) => Ok(Some(Self { code, bytes: length, body_bytes })),
            None => Err(Error::Answer("its length cannot be told, or is too much".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client at whose other end is this.
    fn answered(answer: &str) -> Result<Info, Error> {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(answer.as_bytes()).unwrap();
        far.shutdown(std::net::Shutdown::Write).unwrap();
        Client { stream: near, input: Vec::new() }.info()
    }

    #[test]
    fn what_is_no_answer_is_said_so() {
        let ok = "HTTP/1.1 200 OK\r\n";
        for (answer, expected) in [
            ("220 mail.example ESMTP\r\n".into(), "no VM's"),
            (format!("{ok}\r\n"), "length"),
            (format!("{ok}Content-Length: x\r\n\r\n"), "length"),
            (format!("{ok}Content-Length: {}\r\n\r\n", MAX_ANSWER_BYTES + 1), "too much"),
            (format!("{ok}A: {}", "x".repeat(MAX_HEAD_BYTES)), "does not end"),
            (format!("{ok}Content-Length: 2\r\n\r\n{{}}"), "missing field"),
            (format!("{ok}Content-Length: 3\r\n\r\n{{}}"), "connection"),
            ("HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n".into(), "status 500"),
            (String::new(), "connection"),
        ] {
            let start: String = answer.chars().take(80).collect();
            let error = answered(&answer).unwrap_err();
            assert!(error.to_string().contains(expected), "{start:?}: {error}");
        }
    }

    #[test]
    fn a_refusal_keeps_its_kind() {
        let body = r#"{"kind":"state","message":"it is paused","more":1}"#;
        let answer = format!(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 409 Conflict\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        match answered(&answer) {
            Err(Error::Refused(error)) => assert_eq!(error, ControlError::state("it is paused")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_that_does_not_exist_is_not_sent() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut client = Client { stream: near, input: Vec::new() };
        assert!(matches!(client.request("vm.explode", b""), Err(Error::NoSuchRequest(_))));
        drop(client);
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).unwrap();
        assert!(sent.is_empty());
    }
}
