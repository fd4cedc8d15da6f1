//! A TAP descriptor (Documentation/networking/tuntap.rst).
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_ulong};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, ioctl_fionbio};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER_BYTES;

/// The ioctls that are made here, which the seccomp filter has to allow.
pub(crate) const TAP_IOCTLS: [c_ulong; 3] =
    [libc::TUNGETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD];

/// What a TAP has to have been opened with, as far as it tells: Ethernet frames,
/// with a `virtio_net_hdr` before them. Whether IFF_NO_PI was set it does not
/// tell: TUNGETIFF says IFF_NOFILTER with the same bit.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_VNET_HDR;

/// A TAP that speaks `virtio_net_hdr_v1` and never blocks.
#[derive(Debug)]
pub struct Tap(OwnedFd);

#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error(
        "it is not a TAP that is attached to an interface ({0}); open /dev/net/tun and TUNSETIFF it"
    )]
    NoTap(io::Error),
    #[error("it was opened with flags {0:#x}; open it as IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")]
    Flags(u16),
    #[error("it could not be set up: {0}")]
    SetUp(io::Error),
}

// === impl Tap ===

impl Tap {
    /// Checks what the descriptor is, and makes it what the device needs.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an `ifreq`, which `request` is. Another kind
        // of file might take the number for something else; but its number says
        // that so many bytes are written, and to a TUN device only.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        if got < 0 {
            return Err(TapError::NoTap(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has set the flags, and any bits are valid ones.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let kind = FLAGS | libc::IFF_TUN;
        if c_int::from(flags) & kind != FLAGS {
            return Err(TapError::Flags(flags.cast_unsigned()));
        }
        let header_bytes = HEADER_BYTES as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        let set = unsafe {
            libc::ioctl(
                fd.as_raw_fd(),
                libc::TUNSETVNETHDRSZ,
                &raw const header_bytes,
            )
        };
        if set < 0 {
            return Err(TapError::SetUp(io::Error::last_os_error()));
        }
        ioctl_fionbio(&fd, true).map_err(|errno: Errno| TapError::SetUp(errno.into()))?;
        Ok(Self(fd))
    }

    /// Has the host hand over packets with what a driver with these features
    /// takes: partial checksums, and segments larger than the MTU.
    pub(super) fn set_offloads(&self, driver_features: u64) -> io::Result<()> {
        let offloads = offloads(driver_features);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                c_ulong::from(offloads),
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The TUN_F_* flags for what the driver takes.
fn offloads(driver_features: u64) -> c_uint {
    let has = |bit: u32| driver_features & 1 << bit != 0;
    // Segments need the checksum's feature (section 5.1.3.1), and the TAP, too,
    // refuses them without.
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let segments = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
    [
        (true, libc::TUN_F_CSUM),
        (has(VIRTIO_NET_F_GUEST_TSO4), libc::TUN_F_TSO4),
        (has(VIRTIO_NET_F_GUEST_TSO6), libc::TUN_F_TSO6),
        (segments && has(VIRTIO_NET_F_GUEST_ECN), libc::TUN_F_TSO_ECN),
    ]
    .into_iter()
    .filter_map(|(taken, flag)| taken.then_some(flag))
    .fold(0, |flags, flag| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_taken_only_with_checksums() {
        let all = 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(offloads(all), 0);
        assert_eq!(offloads(all | 1 << VIRTIO_NET_F_GUEST_CSUM), 0xf);
        let ecn = 1 << VIRTIO_NET_F_GUEST_ECN | 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(offloads(ecn), libc::TUN_F_CSUM);
    }
}
