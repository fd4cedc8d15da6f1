//! KVM_GET_XSAVE2 and KVM_SET_XSAVE, whose buffers are as long as the host says.
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;

use super::state::new_xsave;
use crate::machine::kvm::{KvmError, refused};

/// Words of the part that every host has.
const FIXED_WORDS: usize = 1024;

/// Reads the XSAVE area; `words` is what [`super::state::xsave_words`] says.
pub(super) fn get(vcpu: &VcpuFd, words: usize) -> Result<Vec<u32>, KvmError> {
    let mut xsave = new_xsave(words)?;
    // SAFETY: the buffer has at least the bytes that KVM_CAP_XSAVE2 named, which
    // is what the kernel writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(refused("KVM_GET_XSAVE2"))?;
    let fixed = xsave.as_fam_struct_ref().xsave.region;
    Ok(fixed.iter().chain(xsave.as_slice()).copied().collect())
}

/// Writes the XSAVE area, which has as many words as `get` gives.
pub(super) fn set(vcpu: &VcpuFd, area: &[u32]) -> Result<(), KvmError> {
    let mut xsave = new_xsave(area.len())?;
    let (fixed, extra) = area.split_at(FIXED_WORDS.min(area.len()));
    // SAFETY: only the fixed part is written, not the length that the wrapper
    // relies on.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    for (to, from) in region.iter_mut().zip(fixed) {
        *to = *from;
    }
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(extra) {
        *to = *from;
    }
    // SAFETY: the buffer has the bytes that KVM_CAP_XSAVE2 named, which is what
    // the kernel reads; it checks what they say.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(refused("KVM_SET_XSAVE"))
}
