//! Guest memory.

/// All of the guest's memory. A handle: clones share the mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
