//! The packet header (section 5.10.6) and what its fields may hold.

use virtio_vsock::packet::PKT_HEADER_SIZE;

use super::{HOST_CID, Ports};

pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;

/// The only socket type offered (VIRTIO_VSOCK_TYPE_STREAM).
pub(super) const TYPE_STREAM: u16 = 1;

/// Flags of a SHUTDOWN packet, named from its sender's side.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for (section 5.10.6, `enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

/// Names a connection: the guest's CID and the host's are the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// `struct virtio_vsock_hdr`, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload after the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

// === impl Op ===

impl Op {
    pub(super) fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

// === impl Key ===

impl Key {
    /// A number unique to the connection.
    pub(super) fn token(self) -> u64 {
        u64::from(self.host_port) << 32 | u64::from(self.guest_port)
    }

    pub(super) fn from_token(token: u64) -> Self {
        Self {
            host_port: (token >> 32) as u32,
            guest_port: token as u32,
        }
    }
}

impl From<Key> for Ports {
    fn from(key: Key) -> Self {
        Self {
            host_port: key.host_port,
            guest_port: key.guest_port,
        }
    }
}

impl From<Ports> for Key {
    fn from(ports: Ports) -> Self {
        Self {
            host_port: ports.host_port,
            guest_port: ports.guest_port,
        }
    }
}

// === impl Header ===

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The connection that a packet from the guest belongs to.
    pub(super) fn key(&self) -> Key {
        Key {
            host_port: self.dst_port,
            guest_port: self.src_port,
        }
    }

    /// An RST for a connection of the guest's.
    pub(super) fn reset(key: Key, guest_cid: u64) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }

    /// The RST that answers this packet. It mirrors the addresses, and the type
    /// too, so that the guest finds the socket it is for.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    /// rust-vmm's own packet type is the second opinion on the layout.
    #[test]
    fn header_has_the_layout_of_rust_vmm() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 52,
            len: 0x99,
            kind: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 0xf0f0_0f0f,
            buf_alloc: 0x4_0000,
            fwd_cnt: 0xffff_fffe,
        };
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(
            vm_memory::GuestAddress(0),
            0x10_0000,
        )])
        .unwrap();
        let queue = virtio_queue::mock::MockSplitQueue::new(&memory, 16);
        let descriptor = virtio_queue::desc::split::Descriptor::new(0x8_0000, 4096, 2, 0);
        let mut chain = queue
            .build_desc_chain(&[virtio_queue::desc::RawDescriptor::from(descriptor)])
            .unwrap();
        let mut packet =
            virtio_vsock::packet::VsockPacket::from_rx_virtq_chain(&memory, &mut chain, 65536)
                .unwrap();
        packet.set_header_from_raw(&header.to_bytes()).unwrap();
        assert_eq!(packet.src_cid(), header.src_cid);
        assert_eq!(packet.dst_cid(), header.dst_cid);
        assert_eq!(packet.src_port(), header.src_port);
        assert_eq!(packet.dst_port(), header.dst_port);
        assert_eq!(packet.len(), header.len);
        assert_eq!(packet.type_(), header.kind);
        assert_eq!(packet.op(), header.op);
        assert_eq!(packet.flags(), header.flags);
        assert_eq!(packet.buf_alloc(), header.buf_alloc);
        assert_eq!(packet.fwd_cnt(), header.fwd_cnt);
        assert_eq!(Header::from_bytes(&header.to_bytes()), header);
    }

    #[test]
    fn key_survives_its_token() {
        let key = Key {
            host_port: u32::MAX - 1,
            guest_port: 7,
        };
        assert_eq!(Key::from_token(key.token()), key);
    }
}
