//! The tiny guest of the benches: it dirties memory, says so, and waits for the
//! byte that a bench writes into its snapshot.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use soulbox_vmm::devices::DeviceState;
use soulbox_vmm::machine::layout::COM1_PORT;
use soulbox_vmm::snapshot;
use soulbox_vmm::testing::{code, tiny_guest};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// What the guest writes to its console when its memory is dirty, and when it
/// runs again after a restore. Bytes that no log line has, for another monitor's
/// log may go the same way.
pub(crate) const READY: u8 = 0x01;
pub(crate) const RESTORED: u8 = 0x02;

/// How long a guest may be silent that has something to say.
const PATIENCE: Duration = Duration::from_secs(60);

/// The byte it waits for, in RAM that is dirtied by nothing else.
const GO_ADDRESS: u32 = 0x20_0000;
/// Where the rings of its network device lie, if it has one: zeros, so nothing is
/// in them.
const RINGS: u64 = 0x30_0000;
const QUEUE_SIZE: u16 = 256;
/// What Linux's driver takes.
const NET_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK (virtio 1.2, section 2.1).
const DRIVEN: u32 = 1 | 2 | 4 | 8;
/// What it dirties begins here.
const DIRTY_START: u32 = 0x40_0000;
const PAGE_BYTES: u32 = 4096;

/// RAM that holds the guest and what it dirties.
pub(crate) const fn memory_mib(dirty_mib: u32) -> u32 {
    128 + dirty_mib
}

/// A kernel image that writes a word to each page of `dirty_mib`, then READY to
/// its console, waits until the byte at GO_ADDRESS is set, writes RESTORED and
/// halts. In all but the loops it has few instructions: a KVM without vmx or svm
/// emulates each of them in 650 ns.
pub(crate) fn image(dirty_mib: u32) -> Vec<u8> {
    let mut guest = Vec::new();
    if dirty_mib > 0 {
        let pages = (dirty_mib << 20) / PAGE_BYTES;
        guest.push(0xbf); // mov edi, DIRTY_START
        guest.extend(DIRTY_START.to_le_bytes());
        guest.push(0xb9); // mov ecx, pages
        guest.extend(pages.to_le_bytes());
        guest.extend([0x89, 0x3f]); // store: mov [rdi], edi
        guest.extend([0x81, 0xc7]); // add edi, PAGE_BYTES
        guest.extend(PAGE_BYTES.to_le_bytes());
        guest.extend([0xff, 0xc9]); // dec ecx
        guest.extend([0x75, 0xf4]); // jnz store
    }
    guest.push(0xbb); // mov ebx, GO_ADDRESS
    guest.extend(GO_ADDRESS.to_le_bytes());
    guest.extend(code::out(COM1_PORT, READY));
    guest.extend([0x80, 0x3b, 0x00]); // wait: cmp byte [rbx], 0
    guest.extend([0x74, 0xfb]); // je wait
    guest.extend(code::out(COM1_PORT, RESTORED));
    guest.extend(code::HALT);
    tiny_guest(&guest)
}

/// Lets every guest that is restored from this memory file go on.
pub(crate) fn let_go(memory: &Path) -> Result<()> {
    File::options()
        .write(true)
        .open(memory)
        .and_then(|file| file.write_all_at(&[1], u64::from(GO_ADDRESS)))
        .with_context(|| format!("writing to {}", memory.display()))
}

/// Makes a snapshot's network device one that a driver has set up. A driver of the
/// guest's own would be dozens of instructions in an emulated ring 0.
pub(crate) fn drive_net(path: &Path) -> Result<()> {
    let mut state = File::open(path)
        .map_err(anyhow::Error::new)
        .and_then(|file| Ok(snapshot::read(&file)?))
        .with_context(|| format!("reading {}", path.display()))?;
    let net = state
        .devices
        .iter_mut()
        .find(|device| device.name == "net")
        .context("a snapshot without a network device")?;
    let DeviceState::Virtio(transport) = &mut net.state else {
        bail!("a network device that is not virtio");
    };
    transport.status = DRIVEN;
    transport.driver_features = NET_FEATURES;
    transport.activated = true;
    for (start, queue) in (RINGS..).step_by(0x1_0000).zip(&mut transport.queues) {
        (queue.size, queue.ready) = (QUEUE_SIZE, true);
        queue.desc_table = start;
        queue.avail_ring = start + 0x4000;
        queue.used_ring = start + 0x8000;
    }
    File::create(path)
        .map_err(anyhow::Error::new)
        .and_then(|file| Ok(snapshot::write(&file, &state)?))
        .with_context(|| format!("writing {}", path.display()))
}

/// Reads a console until `byte` has come `count` times.
pub(crate) fn await_byte(console: &mut PipeReader, byte: u8, count: usize) -> Result<()> {
    await_byte_for(console, byte, count, PATIENCE)
}

fn await_byte_for(
    console: &mut PipeReader,
    byte: u8,
    count: usize,
    patience: Duration,
) -> Result<()> {
    let timeout = Timespec::try_from(patience)?;
    let (mut seen, mut chunk, mut left) = (Vec::new(), [0; 4096], count);
    while left > 0 {
        let readable = poll(&mut [PollFd::new(console, PollFlags::IN)], Some(&timeout));
        if readable.context("waiting for a console")? == 0 {
            let (seen, missing) = (String::from_utf8_lossy(&seen), left);
            bail!(
                "nothing from a guest for {patience:?}; {missing} of {count} are missing: {seen}"
            );
        }
        let read = match console.read(&mut chunk) {
            Ok(0) => bail!("the guest ended: {}", String::from_utf8_lossy(&seen)),
            Ok(read) => &chunk[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("reading a console"),
        };
        seen.extend_from_slice(read);
        left = left.saturating_sub(read.iter().filter(|&&found| found == byte).count());
    }
    Ok(())
}

/// The bytes that a guest dirties, copied to a fresh file beside its snapshots:
/// what a snapshot of them cannot do without. The source is in memory already.
pub(crate) fn copy_to(folder: &Path, source: &[u8]) -> Result<()> {
    let path = folder.join("copy");
    let written = File::create_new(&path).and_then(|mut file| file.write_all(source));
    let removed = std::fs::remove_file(&path);
    written
        .and(removed)
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read_past_other_output() {
        let (mut console, mut guest) = std::io::pipe().unwrap();
        guest.write_all(b"log line\n\x02more\x02").unwrap();
        assert!(await_byte(&mut console, RESTORED, 2).is_ok());

        let await_one = |console: &mut PipeReader| {
            let error = await_byte_for(console, READY, 1, Duration::from_millis(50));
            error.unwrap_err().to_string()
        };
        let silence = await_one(&mut console);
        assert!(silence.contains("1 of 1 are missing"), "{silence}");
        guest.write_all(b"no such kernel").unwrap();
        drop(guest);
        let ended = await_one(&mut console);
        assert!(ended.contains("no such kernel"), "{ended}");
    }
}
