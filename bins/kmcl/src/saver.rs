//! Whoever asks a server for its state and keeps it: the other end of the control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::control::{
    Kind, MAX_FRAME_BYTES, PATIENCE, PROTOCOL, Refusal, SaveRequest, Saved, path_of, receive, send,
};
use crate::exit::{Failure, Result};
use crate::size::Size;
use crate::whole_file::{WholeFile, write_failure};

/// How long a server may take to end.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// Asks one server.
pub(crate) struct Saver<'a> {
    socket: &'a Path,
    buffer: Size,
    settle: Duration,
}

/// A server whose state was saved and is on the medium, and that stands still. It goes on, and the state
/// is void, unless it is told to [end](Self::end) or killed.
#[must_use = "dropping it lets the server go on"]
pub(crate) struct FrozenServer {
    stream: UnixStream,
}

impl<'a> Saver<'a> {
    /// Will ask the server whose socket for guests is at `socket`; it saves into buffers of `buffer`
    /// bytes, and waits `settle` at most for requests that run.
    pub(crate) fn new(socket: &'a Path, buffer: Size, settle: Duration) -> Self {
        Self { socket, buffer, settle }
    }

    /// Has the server save itself to the file at `path`, which appears whole or not at all. With `go_on`
    /// the server goes on in any case; otherwise it stands still, and is handed back.
    ///
    /// # Errors
    /// The [`Failure`] of the server, the connection or the file. The server goes on then.
    pub(crate) fn save_to(
        &self,
        path: &Path,
        go_on: bool,
    ) -> Result<(Saved, Option<FrozenServer>)> {
        // Made first: a file that cannot be made is no reason to freeze anybody.
        let mut file = WholeFile::create(path)?;
        let stream = self.request(go_on)?;
        let saved = self.take_parts(&stream, |part| {
            file.write_all(part).map_err(|error| write_failure(path, &error))
        })?;
        file.commit()?;
        Ok((saved, (!go_on).then_some(FrozenServer { stream })))
    }

    /// Begins a save and gives it up after `bytes` bytes, so that the server goes on.
    ///
    /// # Errors
    /// As for [`Self::save_to`].
    pub(crate) fn give_up_after(&self, bytes: u64) -> Result<()> {
        let stream = self.request(false)?;
        let mut left = bytes;
        let enough = || Failure::system("enough", "");
        let outcome = self.take_parts(&stream, |part| {
            left = left.checked_sub(part.len() as u64).ok_or_else(enough)?;
            Ok(())
        });
        match outcome {
            Err(failure) if failure != enough() => Err(failure),
            _ => Ok(()),
        }
    }

    fn request(&self, go_on: bool) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(path_of(self.socket)).map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => "run as the user who started the server",
                _ => "name the --socket of a running kmcl serve",
            };
            Failure::peer(
                format_args!("no server at {} can be asked: {error}", self.socket.display()),
                advice,
            )
        })?;
        let request = SaveRequest {
            protocol: PROTOCOL,
            go_on,
            buffer_bytes: u32::try_from(self.buffer.0).unwrap_or(MAX_FRAME_BYTES),
            settle_ms: u64::try_from(self.settle.as_millis()).unwrap_or(u64::MAX),
        };
        let mut line = serde_json::to_vec(&request).map_err(|e| self.lost(&e.into()))?;
        line.push(b'\n');
        let patience = PATIENCE + self.settle;
        let asked = stream
            .set_read_timeout(Some(patience))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .and_then(|()| stream.write_all(&line));
        asked.map_err(|error| self.lost(&error))?;
        Ok(stream)
    }

    fn take_parts(
        &self,
        stream: &UnixStream,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Saved> {
        let mut input = io::BufReader::with_capacity(64 << 10, stream);
        let mut bytes = Vec::new();
        loop {
            match receive(&mut input, &mut bytes).map_err(|error| self.lost(&error))? {
                Kind::Part => take(&bytes)?,
                Kind::Saved => {
                    return serde_json::from_slice(&bytes).map_err(|e| self.lost(&e.into()));
                }
                Kind::Failed => {
                    let refusal: Refusal =
                        serde_json::from_slice(&bytes).map_err(|e| self.lost(&e.into()))?;
                    return Err(refusal.into());
                }
                Kind::Keep => return Err(self.lost(&io::ErrorKind::InvalidData.into())),
            }
        }
    }

    fn lost(&self, error: &io::Error) -> Failure {
        Failure::peer(
            format_args!("the server at {} was not saved: {error}", self.socket.display()),
            "see what it says with -v; it goes on as before",
        )
    }
}

impl FrozenServer {
    /// Has the server end, because its guest goes on elsewhere, and waits until it has.
    ///
    /// # Errors
    /// A [`Failure`] of kind peer where it does not answer. The saved state is good if it is gone.
    pub(crate) fn end(mut self) -> Result<()> {
        let ended = send(&mut self.stream, Kind::Keep, &[])
            .and_then(|()| self.stream.set_read_timeout(Some(END_PATIENCE)))
            .and_then(|()| self.stream.read(&mut [0]));
        match ended {
            Ok(0) => Ok(()),
            Ok(_) => Err(Failure::peer("the server says more than it should", "report this")),
            Err(error) => Err(Failure::peer(
                format_args!("whether the server has ended is not known: {error}"),
                "the saved state is good unless the server goes on",
            )),
        }
    }
}
