//! `manifest.json` of a template.

use serde::{Deserialize, Serialize};

use crate::record::Base;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub name: String,
    pub description: String,
    pub architecture: String,
    pub kernel: FileEntry,
    pub rootfs: RootfsEntry,
    pub agent_version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// A name in the template's folder.
    pub file: String,
    pub size_bytes: u64,
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootfsEntry {
    /// A name in the template's folder.
    pub file: String,
    /// A multiple of 4,096.
    pub size_bytes: u64,
    pub sha256: String,
    pub filesystem: String,
}

// === impl Manifest ===

impl Manifest {
    /// Decodes and checks `json`; the error is half a sentence.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.architecture != "x86_64" {
            return Err(format!(
                "architecture is {:?}, but this node runs \"x86_64\"",
                self.architecture
            ));
        }
        if self.rootfs.filesystem != "ext4" {
            return Err(format!(
                "rootfs.filesystem is {:?}, but only \"ext4\" can be booted",
                self.rootfs.filesystem
            ));
        }
        for file in [&self.kernel.file, &self.rootfs.file] {
            if file.is_empty() || file.starts_with('.') || file.contains(['/', '\0']) {
                return Err(format!("{file:?} is no name of a file beside the manifest"));
            }
        }
        if self.rootfs.size_bytes == 0 || !self.rootfs.size_bytes.is_multiple_of(4096) {
            return Err(format!(
                "rootfs.size_bytes is {}, no multiple of 4096",
                self.rootfs.size_bytes
            ));
        }
        Ok(())
    }

    /// What tells its files from those of another build.
    pub fn base(&self) -> Base {
        Base {
            kernel_sha256: self.kernel.sha256.clone(),
            rootfs_sha256: self.rootfs.sha256.clone(),
        }
    }

    /// The size of the root disk, rounded up.
    pub fn rootfs_mib(&self) -> u64 {
        self.rootfs.size_bytes.div_ceil(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let mut value = serde_json::json!({
            "name": "base", "description": "", "architecture": "x86_64",
            "kernel": {"file": "vmlinux", "size_bytes": 1, "sha256": ""},
            "rootfs": {"file": "rootfs.ext4", "size_bytes": 8192, "sha256": "", "filesystem": "ext4"},
            "agent_version": "0.1.0",
        });
        change(&mut value);
        value.to_string().into_bytes()
    }

    #[test]
    fn the_documented_form_parses() {
        let manifest = Manifest::parse(&json(|_| {})).unwrap();
        assert_eq!(manifest.rootfs_mib(), 1);
    }

    #[test]
    fn whatever_cannot_be_booted_is_refused() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 6] = [
            (|m| m["architecture"] = "aarch64".into(), "aarch64"),
            (|m| m["kernel"]["file"] = "../vmlinux".into(), "../vmlinux"),
            (|m| m["rootfs"]["file"] = "".into(), "no name"),
            (|m| m["rootfs"]["size_bytes"] = 4097.into(), "4096"),
            (|m| m["rootfs"]["filesystem"] = "erofs".into(), "erofs"),
            (|m| m["cmdline"] = "x".into(), "unknown field"),
        ];
        for (change, expected) in cases {
            let error = Manifest::parse(&json(change)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
