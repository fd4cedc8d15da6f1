//! Templates: folders with a kernel, a root disk and a manifest that says what
//! they should be.

mod kernel;
mod manifest;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub use kernel::{KernelError, KernelImage};
pub use manifest::{FileEntry, Manifest, RootfsEntry};

const MANIFEST: &str = "manifest.json";
const MAX_MANIFEST_BYTES: u64 = 64 * 1024;
const MAX_NAME_BYTES: usize = 64;
/// How many known names an error lists.
const MAX_NAMES_LISTED: usize = 20;

/// Whether `name` may name a template. Such a name is a safe path component.
pub fn is_template_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|byte| plain(byte) || b"._-".contains(&byte))
        && name.bytes().next().is_some_and(plain)
}

/// A template whose files have been checked, and are open.
#[derive(Debug)]
pub struct OpenTemplate {
    pub manifest: Manifest,
    pub kernel: File,
    pub kernel_image: KernelImage,
    pub rootfs: File,
}

/// One line of a listing.
#[derive(Debug)]
pub struct TemplateSummary {
    pub name: String,
    pub manifest: Option<Manifest>,
    /// Why sandboxes cannot be made from it now.
    pub problem: Option<TemplateError>,
}

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("there is no template {name:?} on this node; {}", known_names(.known))]
    Unknown { name: String, known: Vec<String> },
    #[error(
        "the manifest of template {name:?} cannot be read ({message}); build the template again"
    )]
    ManifestUnreadable { name: String, message: String },
    #[error("the manifest of template {name:?} is not valid ({message}); build the template again")]
    ManifestInvalid { name: String, message: String },
    #[error("file {file:?} of template {name:?} is missing; build the template again")]
    FileMissing { name: String, file: String },
    #[error("file {file:?} of template {name:?} cannot be opened ({message}); see its permissions")]
    FileUnreadable {
        name: String,
        file: String,
        message: String,
    },
    #[error(
        "file {file:?} of template {name:?} is truncated: {found_bytes} bytes of {expected_bytes}; build the template again"
    )]
    FileTruncated {
        name: String,
        file: String,
        found_bytes: u64,
        expected_bytes: u64,
    },
    #[error(
        "file {file:?} of template {name:?} has {found_bytes} bytes but its manifest says {expected_bytes}; build the template again"
    )]
    FileChanged {
        name: String,
        file: String,
        found_bytes: u64,
        expected_bytes: u64,
    },
    #[error("the kernel of template {name:?} {error}")]
    Kernel { name: String, error: KernelError },
}

/// The folder of templates.
#[derive(Debug, Clone)]
pub struct Templates {
    folder: PathBuf,
}

// === impl Templates ===

impl Templates {
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    /// Opens a template and checks everything that can be checked without
    /// reading its files whole.
    pub fn open(&self, name: &str) -> Result<OpenTemplate, TemplateError> {
        let manifest = self.manifest(name)?;
        let folder = self.folder.join(name);
        let kernel = open_file(
            name,
            &folder,
            &manifest.kernel.file,
            manifest.kernel.size_bytes,
        )?;
        let rootfs = open_file(
            name,
            &folder,
            &manifest.rootfs.file,
            manifest.rootfs.size_bytes,
        )?;
        let kernel_image =
            KernelImage::inspect(&kernel).map_err(|error| TemplateError::Kernel {
                name: name.to_owned(),
                error,
            })?;
        Ok(OpenTemplate {
            manifest,
            kernel,
            kernel_image,
            rootfs,
        })
    }

    /// Whether a folder has this name.
    pub fn exists(&self, name: &str) -> bool {
        is_template_name(name) && self.folder.join(name).is_dir()
    }

    /// Every template there is, also those with a problem, by name.
    pub fn list(&self) -> Vec<TemplateSummary> {
        self.names()
            .into_iter()
            .map(|name| TemplateSummary {
                manifest: self.manifest(&name).ok(),
                problem: self.open(&name).err(),
                name,
            })
            .collect()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_template_name(name))
            .collect();
        names.sort();
        names
    }

    fn manifest(&self, name: &str) -> Result<Manifest, TemplateError> {
        let unknown = || TemplateError::Unknown {
            name: name.chars().take(MAX_NAME_BYTES).collect(),
            known: self.names(),
        };
        if !is_template_name(name) {
            return Err(unknown());
        }
        let unreadable = |message: String| TemplateError::ManifestUnreadable {
            name: name.to_owned(),
            message,
        };
        let folder = self.folder.join(name);
        let bytes = match read_bounded(&folder.join(MANIFEST)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.is_dir() => {
                return Err(unknown());
            }
            Err(error) => return Err(unreadable(error.to_string())),
        };
        Manifest::parse(&bytes).map_err(|message| TemplateError::ManifestInvalid {
            name: name.to_owned(),
            message,
        })
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;

    let mut bytes = Vec::new();
    let read = File::open(path)?
        .take(MAX_MANIFEST_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if read as u64 > MAX_MANIFEST_BYTES {
        return Err(io::Error::other(format!(
            "it is larger than {MAX_MANIFEST_BYTES} bytes"
        )));
    }
    Ok(bytes)
}

fn open_file(
    name: &str,
    folder: &Path,
    file: &str,
    expected_bytes: u64,
) -> Result<File, TemplateError> {
    let (name, path, file) = (name.to_owned(), folder.join(file), file.to_owned());
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, open) = match opened {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(TemplateError::FileMissing { name, file });
        }
        Err(error) => {
            let message = error.to_string();
            return Err(TemplateError::FileUnreadable {
                name,
                file,
                message,
            });
        }
    };
    if !metadata.is_file() {
        let message = "it is no regular file".to_owned();
        return Err(TemplateError::FileUnreadable {
            name,
            file,
            message,
        });
    }
    let found_bytes = metadata.len();
    match found_bytes.cmp(&expected_bytes) {
        std::cmp::Ordering::Equal => Ok(open),
        std::cmp::Ordering::Less => Err(TemplateError::FileTruncated {
            name,
            file,
            found_bytes,
            expected_bytes,
        }),
        std::cmp::Ordering::Greater => Err(TemplateError::FileChanged {
            name,
            file,
            found_bytes,
            expected_bytes,
        }),
    }
}

fn known_names(names: &[String]) -> String {
    if names.is_empty() {
        return "it has none yet: build one with images/build, or set paths.template_dir"
            .to_owned();
    }
    let listed = names
        .iter()
        .take(MAX_NAMES_LISTED)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(MAX_NAMES_LISTED) {
        0 => format!("there are: {listed}"),
        more => format!("there are: {listed} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(folder: &Path, name: &str, kernel: &[u8]) {
        let template = folder.join(name);
        std::fs::create_dir_all(&template).unwrap();
        std::fs::write(template.join("vmlinux"), kernel).unwrap();
        std::fs::write(template.join("rootfs.ext4"), [0; 4096]).unwrap();
        let manifest = serde_json::json!({
            "name": name,
            "description": "a test",
            "architecture": "x86_64",
            "kernel": {"file": "vmlinux", "size_bytes": kernel.len(), "sha256": "0".repeat(64)},
            "rootfs": {"file": "rootfs.ext4", "size_bytes": 4096, "sha256": "0".repeat(64), "filesystem": "ext4"},
            "agent_version": "0.1.0",
        });
        std::fs::write(template.join(MANIFEST), manifest.to_string()).unwrap();
    }

    #[test]
    fn problems_are_listed_and_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = kernel::tests::elf(62, &[(0x10_0000, 4096)]);
        for name in ["whole", "missing", "truncated", "torn"] {
            make(folder.path(), name, &kernel);
        }
        make(folder.path(), "arm", &kernel::tests::elf(183, &[]));
        std::fs::remove_file(folder.path().join("missing/vmlinux")).unwrap();
        std::fs::write(folder.path().join("truncated/rootfs.ext4"), [0; 100]).unwrap();
        std::fs::write(folder.path().join("torn").join(MANIFEST), "{\"name\":").unwrap();
        let templates = Templates::new(folder.path());

        assert!(templates.open("whole").is_ok());
        assert!(
            matches!(templates.open("missing"), Err(TemplateError::FileMissing { file, .. }) if file == "vmlinux")
        );
        assert!(matches!(
            templates.open("truncated"),
            Err(TemplateError::FileTruncated {
                found_bytes: 100,
                expected_bytes: 4096,
                ..
            })
        ));
        assert!(matches!(
            templates.open("torn"),
            Err(TemplateError::ManifestInvalid { .. })
        ));
        let arm = templates.open("arm").unwrap_err().to_string();
        assert!(arm.contains("AArch64"), "{arm}");

        let listed = templates.list();
        let with_problem: Vec<&str> = listed
            .iter()
            .filter(|summary| summary.problem.is_some())
            .map(|summary| summary.name.as_str())
            .collect();
        assert_eq!(listed.len(), 5);
        assert_eq!(with_problem, ["arm", "missing", "torn", "truncated"]);
    }

    #[test]
    fn an_unknown_template_names_the_known_ones() {
        let folder = tempfile::tempdir().unwrap();
        let templates = Templates::new(folder.path());
        let none = templates.open("base").unwrap_err().to_string();
        assert!(none.contains("images/build"), "{none}");
        make(folder.path(), "base", b"");
        for name in ["bose", "../base", "", "/etc"] {
            let error = templates.open(name).unwrap_err();
            assert!(matches!(&error, TemplateError::Unknown { .. }), "{error:?}");
            assert!(error.to_string().ends_with("there are: base"), "{error}");
        }
    }
}
