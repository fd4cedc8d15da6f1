//! Dialling a guest port through the monitor's Unix socket: one line each way,
//! as with Firecracker and Cloud Hypervisor.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use soulbox_proto::guest::RPC_PORT;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// "OK 4294967295\n".
const MAX_ANSWER_BYTES: usize = 14;
/// What a caller who does not read leaves here: a few of the agent's chunks of
/// 64 KiB. A connection has one Exec, so its window is the stream's.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// Dials when it is first used, and again whenever its connection is lost.
pub(super) fn channel(vsock_socket: PathBuf) -> Channel {
    // The name only fills HTTP's authority.
    Endpoint::from_static("http://guest")
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect_with_connector_lazy(tower::service_fn(move |_| {
            let path = vsock_socket.clone();
            async move { dial(&path).await.map(TokioIo::new) }
        }))
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
    async fn refusals_and_nonsense_are_errors() {
        for answer in [b"".as_slice(), b"NO\n", b"OK 11111111111111111111111\n"] {
            assert!(dial_against(answer).await.is_err());
        }
    }
}
