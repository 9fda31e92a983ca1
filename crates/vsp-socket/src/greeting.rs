//! What a program of the host says first: to which port of the guest it wants to be connected.

use crate::limits::MAX_GREETING_BYTES;

/// The line `CONNECT <port>\n`, as far as it has come. Any case, any white space between the words.
#[derive(Debug)]
pub(crate) struct Greeting {
    line: [u8; MAX_GREETING_BYTES],
    len: usize,
}

/// Why a program is not connected.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum GreetingError {
    /// No end of the line where it should have come.
    #[error("no end of line within {MAX_GREETING_BYTES} bytes")]
    TooLong,
    /// Another word, or none.
    #[error("not a CONNECT")]
    NotConnect,
    /// Something else than a number of 32 bits.
    #[error("not a port")]
    NotAPort,
    /// More than two words.
    #[error("more than a CONNECT and a port")]
    TooManyWords,
}

impl Greeting {
    pub(crate) fn new() -> Self {
        Self { line: [0; MAX_GREETING_BYTES], len: 0 }
    }

    /// Takes bytes up to the end of the line, and none behind it: those are the guest's. Returns how many
    /// it has taken, and the port once the line is whole.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> (usize, Result<Option<u32>, GreetingError>) {
        let mut taken = 0;
        for &byte in bytes {
            let Some(place) = self.line.get_mut(self.len) else {
                return (taken, Err(GreetingError::TooLong));
            };
            *place = byte;
            self.len += 1;
            taken += 1;
            if byte == b'\n' {
                let line = self.line.get(..self.len).unwrap_or_default();
                return (taken, port(line).map(Some));
            }
        }
        match self.len < MAX_GREETING_BYTES {
            true => (taken, Ok(None)),
            false => (taken, Err(GreetingError::TooLong)),
        }
    }
}

fn port(line: &[u8]) -> Result<u32, GreetingError> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    if !words.next().is_some_and(|word| word.eq_ignore_ascii_case(b"connect")) {
        return Err(GreetingError::NotConnect);
    }
    let port = words.next().and_then(|word| str::from_utf8(word).ok());
    // A sign would parse.
    let port = port.filter(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    let port = port.and_then(|word| word.parse().ok()).ok_or(GreetingError::NotAPort)?;
    match words.next() {
        None => Ok(port),
        Some(_) => Err(GreetingError::TooManyWords),
    }
}

/// What a program is told once the guest has taken its connection: the port that the guest sees on the
/// host's side.
pub(crate) fn answer(port: u32) -> String {
    format!("OK {port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port_or_is_refused() {
        use GreetingError::{NotAPort, NotConnect, TooLong, TooManyWords};
        let table: [(&[u8], Result<u32, GreetingError>); 16] = [
            (b"CONNECT 52\n", Ok(52)),
            (b"CONNECT 0\n", Ok(0)),
            (b"CONNECT 4294967295\n", Ok(u32::MAX)),
            (b"connect\t 7 \r\n", Ok(7)),
            (b"CONNECT 4294967296\n", Err(NotAPort)),
            (b"CONNECT +7\n", Err(NotAPort)),
            (b"CONNECT -7\n", Err(NotAPort)),
            (b"CONNECT 0x7\n", Err(NotAPort)),
            (b"CONNECT \xff\n", Err(NotAPort)),
            (b"CONNECT\n", Err(NotAPort)),
            (b"CONNECT 7 8\n", Err(TooManyWords)),
            (b"CONNECTED 7\n", Err(NotConnect)),
            (b"GET / HTTP/1.1\r\n", Err(NotConnect)),
            (b"\n", Err(NotConnect)),
            (b"CONNECT                        7\n", Err(TooLong)),
            (&[0; 64], Err(TooLong)),
        ];
        for (line, expected) in table {
            let got = Greeting::new().take(line).1;
            assert_eq!(got, expected.map(Some), "{:?}", line.escape_ascii().to_string());
        }
    }

    /// In whatever pieces the line comes, it means the same, and nothing behind it is taken.
    #[test]
    fn pieces_of_a_line_are_put_together() {
        let stream = b"CONNECT 1024\nfor the guest\n";
        for piece in 1..=stream.len() {
            let mut greeting = Greeting::new();
            let mut taken = 0;
            let port = stream.chunks(piece).find_map(|bytes| {
                let (more, heard) = greeting.take(bytes);
                taken += more;
                heard.unwrap()
            });
            assert_eq!((port, taken), (Some(1024), 13), "pieces of {piece}");
        }
    }

    #[test]
    fn an_endless_line_is_taken_no_further_than_its_bound() {
        let mut greeting = Greeting::new();
        for _ in 0..MAX_GREETING_BYTES - 1 {
            assert_eq!(greeting.take(b"x"), (1, Ok(None)));
        }
        assert_eq!(greeting.take(b"x"), (1, Err(GreetingError::TooLong)));
        assert_eq!(greeting.take(b"x"), (0, Err(GreetingError::TooLong)));
    }
}
