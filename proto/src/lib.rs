//! SoulBox's protocols. The `.proto` files beside this crate are the reference;
//! this crate holds the code generated from them and the constants both sides
//! of a socket must agree on.

#![forbid(unsafe_code)]

#[cfg(feature = "archive")]
pub mod archive;

/// Control of one `soulbox-vmm` process by its client.
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub)]
pub mod vmm {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/soulbox.vmm.v1.rs"));
    }

    /// The largest control message, in bytes, that either side sends.
    pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
    /// The most descriptors that travel beside one control message.
    pub const MAX_MESSAGE_FDS: usize = 64;
    /// The most bytes of console output that an event or reply carries.
    pub const CONSOLE_TAIL_BYTES: usize = 16 * 1024;
}

/// What the guest agent serves over vsock.
#[cfg(feature = "grpc")]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub)]
pub mod guest {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/soulbox.guest.v1.rs"));
    }

    /// The vsock context id by which a guest reaches its host.
    pub const HOST_CID: u32 = 2;
    /// The guest's vsock port on which the agent serves gRPC.
    pub const RPC_PORT: u32 = 1024;
    /// The host's vsock port to which the agent makes its ready-call.
    pub const READY_PORT: u32 = 1025;
    /// The metadata by which a call to soulboxd names the sandbox that it is for.
    pub const SANDBOX_METADATA: &str = "soulbox-sandbox";
    /// Beside it: "true" deletes the sandbox when the call ends, however it ends.
    pub const DELETE_AFTER_METADATA: &str = "soulbox-delete-sandbox-after";
    /// The most bytes of one request to the agent.
    /// An argument list can have several megabytes; the kernel refuses those
    /// that are too long, and says so better.
    pub const MAX_REQUEST_BYTES: usize = 8 * 1024 * 1024;
    /// The most bytes of stdin, stdout or stderr in one message.
    pub const MAX_CHUNK_BYTES: usize = 1024 * 1024;
}

/// What `soulboxd` serves to schedulers and to the CLI.
#[cfg(feature = "grpc")]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub)]
pub mod host {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/soulbox.host.v1.rs"));
    }
}

/// The serialised `FileDescriptorSet` of every service, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The `domain` of every `google.rpc.ErrorInfo` that SoulBox sends.
pub const ERROR_DOMAIN: &str = "soulbox";
