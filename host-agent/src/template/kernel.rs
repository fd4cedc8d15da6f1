//! What a kernel image is, read from its first bytes, so that a wrong one is
//! told in words before a monitor is started with it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// An x86-64 kernel in a form that the monitor loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelImage {
    /// The end of what it occupies in guest memory while it starts.
    pub end_address: u64,
}

/// Completes the sentence "The kernel of template … {}".
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    #[error("is built for {found}, but this node runs x86-64; build the template for x86-64")]
    Architecture { found: String },
    #[error("is neither an ELF vmlinux nor a bzImage; build the template again")]
    Format,
    #[error("ends in the middle of its headers; build the template again")]
    Truncated,
    #[error("cannot be read ({message}); see the disk it lies on")]
    Read { message: String },
    #[error(
        "needs {needed_mib} MiB to start, but the sandbox has {memory_mib} MiB; ask for more memory"
    )]
    TooLarge { needed_mib: u64, memory_mib: u32 },
}

const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
const ELF_HEADER_BYTES: usize = 64;
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const EM_X86_64: u16 = 62;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const MAX_PROGRAM_HEADERS: u16 = 256;
/// Documentation/arch/x86/boot.rst: the header's fields that are needed here.
const SETUP_HEADER_BYTES: usize = 0x270;
const SETUP_MAGIC: (usize, &[u8; 4]) = (0x202, b"HdrS");
const SETUP_PREF_ADDRESS: usize = 0x258;
const SETUP_INIT_SIZE: usize = 0x260;
/// Documentation/arch/arm64/booting.rst.
const ARM64_MAGIC: (usize, &[u8; 4]) = (0x38, b"ARM\x64");
/// What a kernel needs beside its own image to reach its init.
const HEADROOM_BYTES: u64 = 16 << 20;

// === impl KernelImage ===

impl KernelImage {
    pub fn inspect(file: &File) -> Result<Self, KernelError> {
        let mut header = [0; SETUP_HEADER_BYTES];
        let length = read_up_to(file, &mut header, 0)?;
        let header = &header[..length];
        if header.starts_with(ELF_MAGIC) {
            return inspect_elf(file, header);
        }
        if has(header, SETUP_MAGIC) {
            return inspect_bzimage(header);
        }
        if has(header, ARM64_MAGIC) {
            return Err(KernelError::Architecture {
                found: architecture(183),
            });
        }
        Err(KernelError::Format)
    }

    /// Whether it can start in so much memory.
    pub fn check_fits(&self, memory_mib: u32) -> Result<(), KernelError> {
        let needed_bytes = self.end_address.saturating_add(HEADROOM_BYTES);
        if needed_bytes > u64::from(memory_mib) << 20 {
            return Err(KernelError::TooLarge {
                needed_mib: needed_bytes.div_ceil(1 << 20),
                memory_mib,
            });
        }
        Ok(())
    }
}

fn inspect_elf(file: &File, header: &[u8]) -> Result<KernelImage, KernelError> {
    if header.len() < ELF_HEADER_BYTES {
        return Err(KernelError::Truncated);
    }
    let machine = u16_at(header, 18);
    if machine != EM_X86_64 {
        return Err(KernelError::Architecture {
            found: architecture(machine),
        });
    }
    if header[4] != ELF_CLASS_64 || header[5] != ELF_LITTLE_ENDIAN {
        return Err(KernelError::Architecture {
            found: "32-bit x86".to_owned(),
        });
    }
    let (offset, size, count) = (
        u64_at(header, 32),
        usize::from(u16_at(header, 54)),
        u16_at(header, 56),
    );
    if size != PROGRAM_HEADER_BYTES || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Format);
    }
    let mut table = vec![0; size * usize::from(count)];
    if read_up_to(file, &mut table, offset)? < table.len() {
        return Err(KernelError::Truncated);
    }
    let end_address = table
        .chunks_exact(size)
        .filter(|entry| u32_at(entry, 0) == PT_LOAD)
        .map(|entry| u64_at(entry, 24).saturating_add(u64_at(entry, 40)))
        .max()
        .unwrap_or(0);
    Ok(KernelImage { end_address })
}

fn inspect_bzimage(header: &[u8]) -> Result<KernelImage, KernelError> {
    if header.len() < SETUP_HEADER_BYTES {
        return Err(KernelError::Truncated);
    }
    let end_address = u64_at(header, SETUP_PREF_ADDRESS)
        .saturating_add(u64::from(u32_at(header, SETUP_INIT_SIZE)));
    Ok(KernelImage { end_address })
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, KernelError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(KernelError::Read {
                    message: error.to_string(),
                });
            }
        }
    }
    Ok(filled)
}

fn has(header: &[u8], (offset, magic): (usize, &[u8; 4])) -> bool {
    header.get(offset..offset + magic.len()) == Some(magic)
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// The name of an ELF machine number (elf(5), System V ABI).
fn architecture(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        20 | 21 => "PowerPC".to_owned(),
        22 => "S390".to_owned(),
        40 => "32-bit Arm".to_owned(),
        183 => "AArch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("ELF machine {other}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// An ELF header and program headers with (physical address, memory size).
    pub(in crate::template) fn elf(machine: u16, segments: &[(u64, u64)]) -> Vec<u8> {
        let mut image = vec![0; ELF_HEADER_BYTES];
        image[..4].copy_from_slice(ELF_MAGIC);
        image[4] = ELF_CLASS_64;
        image[5] = ELF_LITTLE_ENDIAN;
        image[18..20].copy_from_slice(&machine.to_le_bytes());
        image[32..40].copy_from_slice(&(ELF_HEADER_BYTES as u64).to_le_bytes());
        image[54..56].copy_from_slice(&56_u16.to_le_bytes());
        image[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
        for (address, size) in segments {
            let mut entry = [0; PROGRAM_HEADER_BYTES];
            entry[..4].copy_from_slice(&PT_LOAD.to_le_bytes());
            entry[24..32].copy_from_slice(&address.to_le_bytes());
            entry[40..48].copy_from_slice(&size.to_le_bytes());
            image.extend_from_slice(&entry);
        }
        image
    }

    fn bzimage(pref_address: u64, init_size: u32) -> Vec<u8> {
        let mut image = vec![0; SETUP_HEADER_BYTES];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[SETUP_PREF_ADDRESS..][..8].copy_from_slice(&pref_address.to_le_bytes());
        image[SETUP_INIT_SIZE..][..4].copy_from_slice(&init_size.to_le_bytes());
        image
    }

    fn inspect(bytes: &[u8]) -> Result<KernelImage, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        KernelImage::inspect(&file)
    }

    #[test]
    fn both_forms_tell_where_they_end() {
        let image = inspect(&elf(62, &[(0x10_0000, 0x1000), (0x100_0000, 0x20_0000)])).unwrap();
        assert_eq!(image.end_address, 0x120_0000);
        let image = inspect(&bzimage(0x100_0000, 0x20_0000)).unwrap();
        assert_eq!(image.end_address, 0x120_0000);
    }

    #[test]
    fn other_machines_are_named() {
        let named = |machine| inspect(&elf(machine, &[])).unwrap_err().to_string();
        assert!(named(183).contains("AArch64"));
        assert!(named(243).contains("RISC-V"));
        assert!(named(9999).contains("9999"));
        let mut arm64 = vec![0; 100];
        arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert!(inspect(&arm64).unwrap_err().to_string().contains("AArch64"));
    }

    #[test]
    fn too_little_memory_is_said_in_mib() {
        let image = inspect(&elf(62, &[(0x100_0000, 200 << 20)])).unwrap();
        assert_eq!(
            image.check_fits(128),
            Err(KernelError::TooLarge {
                needed_mib: 232,
                memory_mib: 128
            })
        );
        assert_eq!(image.check_fits(232), Ok(()));
    }

    proptest! {
        /// No prefix and no damage of a header makes it panic.
        #[test]
        fn damage_is_an_error_and_no_panic(cut in 0..200_usize, at in 0..120_usize, with: u8) {
            let mut image = elf(62, &[(u64::MAX, u64::MAX), (1, 1)]);
            image[at] = with;
            image.truncate(cut);
            let _ = inspect(&image);
            let mut image = bzimage(u64::MAX, u32::MAX);
            image[at * 5] = with;
            image.truncate(cut * 4);
            let _ = inspect(&image);
        }
    }
}
