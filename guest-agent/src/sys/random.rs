//! What the kernel's random number generator takes besides reads; random(4).

use std::ffi::c_int;
use std::fs::File;
use std::io;

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};

/// The most that one call adds.
pub(crate) const MAX_ENTROPY_BYTES: usize = 512;

// Of linux/random.h. The first one's argument is a header of two ints with the
// bytes behind it, of which the number has the size of the header only.
const RNDADDENTROPY: Opcode = opcode::write::<[c_int; 2]>(b'R', 0x03);
const RNDRESEEDCRNG: Opcode = opcode::none(b'R', 0x07);

/// `struct rand_pool_info`, with room for the most.
#[repr(C)]
struct PoolInfo {
    entropy_bits: c_int,
    buffer_bytes: c_int,
    buffer: [u8; MAX_ENTROPY_BYTES],
}

/// Adds `bytes` to the pool of `random` (/dev/urandom), and counts every bit of
/// them as unknown to anybody. Fails with EINVAL where there are too many.
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo {
        entropy_bits: 0,
        buffer_bytes: 0,
        buffer: [0; MAX_ENTROPY_BYTES],
    };
    let too_many = || io::Error::from(rustix::io::Errno::INVAL);
    let buffer = info.buffer.get_mut(..bytes.len()).ok_or_else(too_many)?;
    buffer.copy_from_slice(bytes);
    info.buffer_bytes = c_int::try_from(bytes.len()).map_err(io::Error::other)?;
    info.entropy_bits = info.buffer_bytes * 8;
    // SAFETY: the ioctl reads the two ints and then `buffer_bytes` bytes, which
    // are within the buffer that follows them. It writes nothing.
    unsafe { ioctl(random, Setter::<RNDADDENTROPY, PoolInfo>::new(info)) }?;
    Ok(())
}

/// Makes the generator take a new key from its pool now. The generators of all
/// CPUs, and those that the vDSO keeps in processes, see that theirs is old before
/// they give out another byte. Fails with ENODATA before the first seed.
pub(crate) fn reseed(random: &File) -> io::Result<()> {
    // SAFETY: the ioctl has no argument.
    unsafe { ioctl(random, NoArg::<RNDRESEEDCRNG>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    // More entropy does this machine no harm.
    #[test]
    fn the_kernel_takes_entropy_and_a_new_key() {
        let random = File::open("/dev/urandom").unwrap();
        for length in [1, 32, 33, MAX_ENTROPY_BYTES] {
            add_entropy(&random, &vec![0xa5; length]).unwrap();
            reseed(&random).unwrap();
        }
    }

    #[test]
    fn more_than_the_buffer_is_refused() {
        let random = File::open("/dev/urandom").unwrap();
        let error = add_entropy(&random, &[0; MAX_ENTROPY_BYTES + 1]).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::INVAL));
    }

    #[test]
    fn another_device_says_no() {
        let null = File::open("/dev/null").unwrap();
        assert!(add_entropy(&null, b"x").is_err() && reseed(&null).is_err());
    }
}
