//! Dialling a guest port through the monitor's Unix socket: one line each way,
//! as with Firecracker and Cloud Hypervisor.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::net::RecvFlags;
use soulbox_proto::guest::RPC_PORT;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::sync::lock;

/// "OK 4294967295\n".
const MAX_ANSWER_BYTES: usize = 14;

/// Ways to one guest's port: spare connections that it has accepted already, as
/// long as there are any, then new ones.
#[derive(Debug)]
pub(super) struct Dialler {
    vsock_socket: PathBuf,
    spares: Mutex<Vec<OwnedFd>>,
}

// === impl Dialler ===

impl Dialler {
    pub(super) fn new(vsock_socket: &Path, spares: Vec<OwnedFd>) -> Self {
        Self {
            vsock_socket: vsock_socket.to_owned(),
            spares: Mutex::new(spares),
        }
    }

    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        while let Some(spare) = self.take_spare() {
            if is_open(&spare)
                && let Ok(stream) = into_stream(spare)
            {
                return Ok(stream);
            }
        }
        dial(&self.vsock_socket).await
    }

    fn take_spare(&self) -> Option<OwnedFd> {
        lock(&self.spares).pop()
    }
}

/// Whether the guest has not closed its end. An agent may have said its part of
/// the handshake already.
fn is_open(spare: &OwnedFd) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(spare, &mut [0_u8; 1], flags) {
        Ok((received, _)) => received > 0,
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    }
}

fn into_stream(spare: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(spare);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn dial(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream
        .write_all(format!("CONNECT {RPC_PORT}\n").as_bytes())
        .await?;
    // Byte by byte: what follows the newline belongs to HTTP/2.
    let mut answer = Vec::with_capacity(MAX_ANSWER_BYTES);
    loop {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            break;
        }
        answer.push(byte);
        if answer.len() >= MAX_ANSWER_BYTES {
            return Err(io::Error::other("the monitor's vsock answer is too long"));
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other(
            "the monitor's vsock refused the connection",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn dial_against(answer: &'static [u8]) -> io::Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        };
        let (dialled, ()) = tokio::join!(dial(&path), serve);
        let mut rest = Vec::new();
        dialled?.read_to_end(&mut rest).await?;
        Ok(rest)
    }

    #[tokio::test]
    async fn bytes_after_the_answer_stay_in_the_stream() {
        assert_eq!(
            dial_against(b"OK 1073741824\nPRI *").await.unwrap(),
            b"PRI *"
        );
    }

    #[tokio::test]
    async fn spares_come_first_unless_the_guest_has_closed_them() {
        let folder = tempfile::tempdir().unwrap();
        let (open, mut guest) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut guest, b"hello").unwrap();
        let (idle, _idle_guest) = std::os::unix::net::UnixStream::pair().unwrap();
        let (closed, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let spares = vec![idle.into(), open.into(), closed.into()];
        let dialler = Dialler::new(&folder.path().join("none"), spares);
        let mut first = dialler.connect().await.unwrap();
        let mut said = [0; 5];
        first.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        dialler.connect().await.unwrap();
        assert!(dialler.connect().await.is_err());
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_errors() {
        for answer in [b"".as_slice(), b"NO\n", b"OK 11111111111111111111111\n"] {
            assert!(dial_against(answer).await.is_err());
        }
    }
}
