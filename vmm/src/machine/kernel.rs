//! Loading a Linux kernel by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::{self, GuestMemory};

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
/// How far past its load address a bzImage's 64-bit entry is.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// The bit of `xloadflags` that says there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

const EM_X86_64: u16 = 62;
const ELF_CLASS_64: u8 = 2;
const PT_LOAD: u32 = 1;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("the kernel image could not be read")]
    Read(#[source] std::io::Error),
    #[error("the kernel image is neither an ELF vmlinux nor a bzImage; build one for x86-64")]
    Format,
    #[error("the kernel image is for another architecture ({0}); build it for x86-64")]
    Architecture(String),
    #[error("the kernel image is truncated; build or copy it again")]
    Truncated,
    #[error(
        "the kernel needs memory up to {needed_mib} MiB but the machine has {memory_mib}; give it more memory"
    )]
    TooLarge { needed_mib: u64, memory_mib: u64 },
    #[error(
        "the kernel image wants to lie below 1 MiB, where the boot structures are; link it higher"
    )]
    TooLow,
    #[error("the bzImage has no 64-bit entry; build it for x86-64")]
    No64BitEntry,
    #[error("the kernel image was refused by the loader")]
    Load(#[source] linux_loader::loader::Error),
    #[error("the boot structures could not be written to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Loads `kernel` and writes what it finds on entry. Returns its entry point.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<GuestAddress, KernelError> {
    let (entry, header) = load_image(memory, kernel)?;
    memory
        .write_slice(cmdline.as_bytes(), layout::CMDLINE)
        .map_err(KernelError::Write)?;
    memory
        .write_obj(0u8, GuestAddress(layout::CMDLINE.0 + cmdline.len() as u64))
        .map_err(KernelError::Write)?;
    let params = zero_page(memory, header, cmdline, rsdp);
    // The loader's type is plain data, but only wrapped is it known to be.
    memory
        .write_obj(BootParams(params), layout::BOOT_PARAMS)
        .map_err(KernelError::Write)?;
    Ok(entry)
}

fn load_image(
    memory: &GuestMemory,
    kernel: &mut File,
) -> Result<(GuestAddress, setup_header), KernelError> {
    let mut head = [0u8; 64];
    let file_bytes = kernel.seek(SeekFrom::End(0)).map_err(KernelError::Read)?;
    kernel.rewind().map_err(KernelError::Read)?;
    kernel.read_exact(&mut head).map_err(truncated)?;

    if head[..4] == ELF_MAGIC {
        check_elf(memory, kernel, &head, file_bytes)?;
        let start = Some(layout::HIGH_RAM_START);
        let result = Elf::load(memory, None, kernel, start).map_err(KernelError::Load)?;
        return Ok((result.kernel_load, elf_setup_header()));
    }

    let mut magic = [0u8; 4];
    kernel
        .seek(SeekFrom::Start(BZIMAGE_MAGIC_OFFSET))
        .and_then(|_| kernel.read_exact(&mut magic))
        .map_err(|_| KernelError::Format)?;
    if magic != BZIMAGE_MAGIC {
        return Err(KernelError::Format);
    }
    check_size(memory, layout::HIGH_RAM_START.0 + file_bytes)?;
    let start = Some(layout::HIGH_RAM_START);
    let result = BzImage::load(memory, None, kernel, start).map_err(KernelError::Load)?;
    let header = result.setup_header.ok_or(KernelError::Format)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }
    // The header says in 16-byte units how much of the file is the kernel.
    let setup_sectors = u64::from(if header.setup_sects == 0 {
        4
    } else {
        header.setup_sects
    });
    if (setup_sectors + 1) * 512 + u64::from(header.syssize) * 16 > file_bytes {
        return Err(KernelError::Truncated);
    }
    // The kernel decompresses itself in place and needs this much to do so.
    check_size(memory, result.kernel_load.0 + u64::from(header.init_size))?;
    let entry = GuestAddress(result.kernel_load.0 + BZIMAGE_ENTRY_64);
    Ok((entry, header))
}

/// Checks what the loader would report only as a failed read: an image cut
/// short, of another architecture, or larger than memory.
fn check_elf(
    memory: &GuestMemory,
    kernel: &mut File,
    head: &[u8; 64],
    file_bytes: u64,
) -> Result<(), KernelError> {
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    if head[4] != ELF_CLASS_64 {
        return Err(KernelError::Architecture("32-bit ELF".into()));
    }
    if head[5] != 1 {
        return Err(KernelError::Architecture("big-endian ELF".into()));
    }
    if u16_at(18) != EM_X86_64 {
        return Err(KernelError::Architecture(format!(
            "ELF machine {}",
            u16_at(18)
        )));
    }
    let headers_at = u64_at(head, 32);
    let (header_bytes, count) = (usize::from(u16_at(54)), usize::from(u16_at(56)));
    if header_bytes < 56 {
        return Err(KernelError::Truncated);
    }
    let mut headers = vec![0u8; header_bytes * count];
    kernel
        .seek(SeekFrom::Start(headers_at))
        .and_then(|_| kernel.read_exact(&mut headers))
        .map_err(truncated)?;
    for header in headers.chunks_exact(header_bytes) {
        if u32::from_le_bytes([header[0], header[1], header[2], header[3]]) != PT_LOAD {
            continue;
        }
        let (offset, address) = (u64_at(header, 8), u64_at(header, 24));
        let (in_file, in_memory) = (u64_at(header, 32), u64_at(header, 40));
        if offset
            .checked_add(in_file)
            .is_none_or(|end| end > file_bytes)
        {
            return Err(KernelError::Truncated);
        }
        if in_memory == 0 {
            continue;
        }
        if address < layout::HIGH_RAM_START.0 {
            return Err(KernelError::TooLow);
        }
        check_size(memory, address.saturating_add(in_memory.max(in_file)))?;
    }
    Ok(())
}

fn check_size(memory: &GuestMemory, end: u64) -> Result<(), KernelError> {
    let low_ram = memory::low_ram_end(memory);
    if end > low_ram {
        return Err(KernelError::TooLarge {
            needed_mib: end.div_ceil(1 << 20),
            memory_mib: low_ram >> 20,
        });
    }
    Ok(())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn truncated(error: std::io::Error) -> KernelError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => KernelError::Truncated,
        _ => KernelError::Read(error),
    }
}

/// What a bzImage carries in its header and an ELF kernel does not.
fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(BZIMAGE_MAGIC),
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

fn zero_page(
    memory: &GuestMemory,
    mut header: setup_header,
    cmdline: &str,
    rsdp: GuestAddress,
) -> boot_params {
    // "Undefined loader" (boot.rst).
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = layout::CMDLINE.0 as u32;
    header.cmdline_size = cmdline.len() as u32;
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp.0,
        ..Default::default()
    };
    let reserved_end = layout::HIGH_RAM_START.0;
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (
            layout::ACPI_TABLES.0,
            reserved_end - layout::ACPI_TABLES.0,
            E820_RESERVED,
        ),
    ];
    use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(reserved_end);
        map.push((
            start,
            region.start_addr().raw_value() + region.len() - start,
            E820_RAM,
        ));
    }
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8;
    params
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct BootParams(boot_params);

// SAFETY: boot_params is a repr(C, packed) struct of integers and arrays of
// them: it has no padding and every byte pattern is a value of it.
#[allow(unsafe_code)]
unsafe impl ByteValued for BootParams {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::io::Write;

    /// An ELF file of one segment of `bytes` NOPs at `address`.
    fn elf(machine: u16, address: u64, bytes: usize) -> Vec<u8> {
        testing::elf(machine, address, &vec![0x90; bytes])
    }

    fn memory(mib: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    fn load_bytes(image: &[u8], mib: usize) -> Result<GuestAddress, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        load(&memory(mib), &mut file, "quiet", layout::ACPI_TABLES)
    }

    #[test]
    fn loads_an_elf_kernel() {
        let entry = load_bytes(&elf(EM_X86_64, 0x10_0000, 0x1000), 2).unwrap();
        assert_eq!(entry, GuestAddress(0x10_0000));
    }

    #[test]
    fn says_what_is_wrong_with_an_image() {
        let good = elf(EM_X86_64, 0x10_0000, 0x1000);
        assert!(matches!(load_bytes(b"", 2), Err(KernelError::Truncated)));
        assert!(matches!(
            load_bytes(&[0; 4096], 2),
            Err(KernelError::Format)
        ));
        assert!(matches!(
            load_bytes(&good[..2000], 2),
            Err(KernelError::Truncated)
        ));
        assert!(matches!(
            load_bytes(&good[..70], 2),
            Err(KernelError::Truncated)
        ));
        let arm = elf(183, 0x10_0000, 0x1000);
        assert!(
            matches!(load_bytes(&arm, 2), Err(KernelError::Architecture(m)) if m.contains("183"))
        );
        let big = elf(EM_X86_64, 0x10_0000, 3 << 20);
        assert!(matches!(
            load_bytes(&big, 2),
            Err(KernelError::TooLarge {
                needed_mib: 4,
                memory_mib: 2
            })
        ));
        let low = elf(EM_X86_64, 0x1000, 0x1000);
        assert!(matches!(load_bytes(&low, 2), Err(KernelError::TooLow)));
    }

    proptest::proptest! {
        /// Whatever is in the headers, loading fails or succeeds; it never panics.
        #[test]
        fn any_header_is_checked(
            at in 4..120usize,
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..16),
        ) {
            let mut image = elf(EM_X86_64, 0x10_0000, 0x1000);
            image[at..at + bytes.len()].copy_from_slice(&bytes);
            let _ = load_bytes(&image, 2);
        }

        #[test]
        fn any_bzimage_header_is_checked(
            header in proptest::collection::vec(proptest::prelude::any::<u8>(), 0x100),
        ) {
            let mut image = vec![0u8; 8192];
            image[0x1f1..0x2f1].copy_from_slice(&header);
            image[0x202..0x206].copy_from_slice(&BZIMAGE_MAGIC);
            let _ = load_bytes(&image, 2);
        }
    }
}
