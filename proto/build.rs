//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use std::path::PathBuf;

use prost::Message as _;

const FILES: [&str; 5] = [
    "soulbox/vmm/v1/control.proto",
    "soulbox/guest/v1/guest.proto",
    "soulbox/guest/v1/filesystem.proto",
    "soulbox/guest/v1/code.proto",
    "soulbox/host/v1/host.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Connections are made elsewhere, and an rpc may be called Connect.
        .build_transport(false)
        .bytes(".soulbox.guest.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
