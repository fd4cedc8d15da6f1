//! The ready-call: one message to the host, so that nobody has to ask.

use std::io;
use std::time::Duration;

use prost::Message as _;
use soulbox_proto::guest::v1::Hello;
use soulbox_proto::guest::{HOST_CID, READY_PORT};
use tokio::io::AsyncWriteExt as _;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::system::boot_time_us;

/// Twenty in one second. A host listens before it boots a guest, so a refusal is
/// a mistake there, and the guest serves all the same.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Tells the host that the agent listens.
pub(crate) async fn call(agent_started_us: u64) {
    let hello = Hello {
        agent_version: crate::VERSION.to_owned(),
        agent_started_us,
        agent_ready_us: boot_time_us(),
    };
    let hello = hello.encode_length_delimited_to_vec();
    for attempt in 1..=ATTEMPTS {
        match send(&hello).await {
            Ok(()) => return,
            Err(error) if attempt == 1 || attempt == ATTEMPTS => {
                eprintln!("soulbox-guest: ready-call {attempt} of {ATTEMPTS} failed: {error}");
            }
            Err(_) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn send(hello: &[u8]) -> io::Result<()> {
    let mut stream = VsockStream::connect(VsockAddr::new(HOST_CID, READY_PORT)).await?;
    stream.write_all(hello).await?;
    stream.shutdown(std::net::Shutdown::Write)
}
