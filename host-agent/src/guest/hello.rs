//! The ready-call: what the agent sends once it listens.

use std::io;
use std::os::fd::OwnedFd;

use prost::Message as _;
use soulbox_proto::guest::v1::Hello;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

/// A version's name and two numbers are far below this.
const MAX_HELLO_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    #[error("the guest's ready-call cannot be read")]
    Read(#[from] io::Error),
    #[error(
        "the guest's ready-call does not decode; build the template again with this version's agent"
    )]
    Decode(#[from] prost::DecodeError),
}

/// Reads the one message that `stream` carries, up to its end.
pub async fn read_hello(stream: OwnedFd) -> Result<Hello, HelloError> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?.take(MAX_HELLO_BYTES);
    let mut bytes = Vec::new();
    loop {
        // An agent need not close at once: the length tells where it ends.
        match Hello::decode_length_delimited(bytes.as_slice()) {
            Ok(hello) if !bytes.is_empty() => return Ok(hello),
            Ok(_) | Err(_) => {}
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(Hello::decode_length_delimited(bytes.as_slice())?);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream as StdStream;

    use super::*;

    fn hello() -> Hello {
        Hello {
            agent_version: "0.1.0".to_owned(),
            agent_started_us: 400_000,
            agent_ready_us: 401_000,
        }
    }

    #[tokio::test]
    async fn it_is_read_whole_even_in_pieces_and_without_a_close() {
        let bytes = hello().encode_length_delimited_to_vec();
        let (ours, mut theirs) = StdStream::pair().unwrap();
        let (first, rest) = bytes.split_at(5);
        theirs.write_all(first).unwrap();
        let reading = tokio::spawn(read_hello(ours.into()));
        tokio::task::yield_now().await;
        theirs.write_all(rest).unwrap();
        assert_eq!(reading.await.unwrap().unwrap(), hello());
    }

    #[tokio::test]
    async fn hostile_ones_are_refused() {
        for bytes in [vec![], vec![0xff; 16], vec![200, 1, 0], vec![0x7f; 8192]] {
            let (ours, mut theirs) = StdStream::pair().unwrap();
            theirs.write_all(&bytes).unwrap();
            drop(theirs);
            assert!(read_hello(ours.into()).await.is_err(), "{bytes:?}");
        }
    }
}
