//! What a client of the host writes before its stream begins.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::RecvFlags;

/// Longest line, its newline included.
const MAX_LINE_BYTES: usize = 32;

/// A client that has connected and not finished its CONNECT line.
#[derive(Debug)]
pub(super) struct Handshake {
    socket: OwnedFd,
    line: [u8; MAX_LINE_BYTES],
    len: usize,
    pub(super) deadline: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waiting,
    /// The guest's port that the client wants.
    Port(u32),
    /// Too long, not a CONNECT line, or the client left.
    Failed,
}

// === impl Handshake ===

impl Handshake {
    pub(super) fn new(socket: OwnedFd, deadline: Instant) -> Self {
        Self {
            socket,
            line: [0; MAX_LINE_BYTES],
            len: 0,
            deadline,
        }
    }

    /// Reads the line, and not a byte past it: what follows belongs to the
    /// stream, and a client may send it at once.
    pub(super) fn advance(&mut self) -> Progress {
        loop {
            let room = &mut self.line[self.len..];
            let (peeked, _) = match rustix::net::recv(
                &self.socket,
                &mut *room,
                RecvFlags::DONTWAIT | RecvFlags::PEEK,
            ) {
                Ok(peeked) => peeked,
                Err(Errno::AGAIN) => return Progress::Waiting,
                Err(Errno::INTR) => continue,
                Err(_) => return Progress::Failed,
            };
            let end = room[..peeked].iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(peeked, |at| at + 1);
            match rustix::net::recv(&self.socket, &mut room[..taken], RecvFlags::DONTWAIT) {
                Ok((read, _)) if read == taken && taken > 0 => self.len += taken,
                _ => return Progress::Failed,
            }
            if end.is_some() {
                return parse(&self.line[..self.len - 1]).map_or(Progress::Failed, Progress::Port);
            }
            if self.len == MAX_LINE_BYTES {
                return Progress::Failed;
            }
        }
    }

    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// `CONNECT <port>`, the port in plain decimal digits.
fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?;
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // VMADDR_PORT_ANY is no port.
    std::str::from_utf8(port)
        .ok()?
        .parse()
        .ok()
        .filter(|&port| port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Handshake) {
        let (client, device) = UnixStream::pair().unwrap();
        (client, Handshake::new(device.into(), Instant::now()))
    }

    fn answer(line: &[u8]) -> Progress {
        let (mut client, mut handshake) = pair();
        client.write_all(line).unwrap();
        handshake.advance()
    }

    #[test]
    fn only_connect_lines_pass() {
        assert_eq!(answer(b"CONNECT 52\n"), Progress::Port(52));
        assert_eq!(answer(b"CONNECT 0\n"), Progress::Port(0));
        assert_eq!(
            answer(b"CONNECT 4294967294\n"),
            Progress::Port(u32::MAX - 1)
        );
        for line in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"connect 1\n",
            b" CONNECT 1\n",
            b"CONNECT \xff\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n",
            b"CONNECT 00000000000000000000000000052\n",
        ] {
            assert_eq!(answer(line), Progress::Failed, "{line:?}");
        }
    }

    #[test]
    fn line_may_come_byte_by_byte() {
        let (mut client, mut handshake) = pair();
        for byte in b"CONNECT 1024" {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(handshake.advance(), Progress::Waiting);
        }
        client.write_all(b"\n").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(1024));
    }

    #[test]
    fn bytes_after_the_line_stay_in_the_stream() {
        let (mut client, mut handshake) = pair();
        client.write_all(b"CONNECT 7\nhello\n").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(7));
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        UnixStream::from(handshake.into_socket())
            .read_to_end(&mut rest)
            .unwrap();
        assert_eq!(rest, b"hello\n");
    }

    #[test]
    fn client_that_leaves_fails() {
        let (mut client, mut handshake) = pair();
        client.write_all(b"CONN").unwrap();
        drop(client);
        assert_eq!(handshake.advance(), Progress::Failed);
    }
}
