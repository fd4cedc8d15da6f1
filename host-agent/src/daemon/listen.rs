//! Where gRPC is served.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use crate::config::{Listen, Proxy};

/// The owner and a group may use the daemon; whoever may is as good as root in
/// any sandbox.
const SOCKET_MODE: u32 = 0o660;

#[derive(Debug, thiserror::Error)]
pub(super) enum ListenError {
    #[error("listen.unix_path {} is in use by another process; stop it or choose another path", .path.display())]
    InUse { path: PathBuf },
    #[error("listen.unix_path {} exists and is no socket; remove it or choose another path", .path.display())]
    NoSocket { path: PathBuf },
    #[error("listen.unix_path {} cannot be made; see the permissions of its folder", .path.display())]
    Unix { path: PathBuf, source: io::Error },
    #[error(
        "listen.unix_group {group:?} is no group of this host; make it with `groupadd` or name another"
    )]
    Group { group: String },
    #[error(
        "{field} {address} cannot be bound; see whether the address is this host's and the port is free"
    )]
    Tcp {
        field: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
}

/// Bound sockets.
#[derive(Debug)]
pub(super) struct Listeners {
    pub(super) unix: UnixListener,
    pub(super) tcp: Option<TcpListener>,
    pub(super) proxy: Option<TcpListener>,
    pub(super) unix_socket: SocketFile,
}

/// A socket's file, removed when this is dropped.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: another daemon may have put its own in the place.
    identity: Option<(u64, u64)>,
}

// === impl Listeners ===

impl Listeners {
    pub(super) fn bind(config: &Listen, proxy: &Proxy) -> Result<Self, ListenError> {
        let path = &config.unix_path;
        let unix_error = |source| ListenError::Unix {
            path: path.clone(),
            source,
        };
        let group = group_id(&config.unix_group)?;
        remove_stale(path)?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(unix_error)?;
        }
        let unix = UnixListener::bind(path).map_err(unix_error)?;
        let unix_socket = SocketFile::new(path);
        if group.is_some() {
            std::os::unix::fs::chown(path, None, group).map_err(unix_error)?;
        }
        fs::set_permissions(path, PermissionsExt::from_mode(SOCKET_MODE)).map_err(unix_error)?;
        tracing::info!(path = %path.display(), "serving on a Unix socket");
        let tcp = match config.tcp_address {
            Some(address) => {
                let listener = bind_tcp("listen.tcp_address", address)?;
                tracing::warn!(
                    address = %bound(&listener),
                    "serving on TCP without encryption or authentication: whoever reaches this address commands every sandbox; keep it on a private network"
                );
                Some(listener)
            }
            None => None,
        };
        let proxy = match proxy.address() {
            Some(address) => {
                let listener = bind_tcp("proxy.listen", address)?;
                tracing::info!(address = %bound(&listener), domain = proxy.domain, "serving sandboxes' ports over HTTP");
                Some(listener)
            }
            None => None,
        };
        Ok(Self {
            unix,
            tcp,
            proxy,
            unix_socket,
        })
    }
}

fn bind_tcp(field: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    let tcp_error = |source| ListenError::Tcp {
        field,
        address,
        source,
    };
    let listener = std::net::TcpListener::bind(address).map_err(tcp_error)?;
    listener.set_nonblocking(true).map_err(tcp_error)?;
    TcpListener::from_std(listener).map_err(tcp_error)
}

/// With the port that it has when any was asked for.
fn bound(listener: &TcpListener) -> String {
    listener
        .local_addr()
        .map_or_else(|_| String::new(), |address| address.to_string())
}

// === impl SocketFile ===

impl SocketFile {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            identity: identity(path),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // It may be removed already: what counts is that it is gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Removes a socket that a killed daemon left.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let path_buf = || path.to_owned();
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(_) => return Ok(()),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NoSocket { path: path_buf() });
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ListenError::InUse { path: path_buf() });
    }
    fs::remove_file(path).map_err(|source| ListenError::Unix {
        path: path_buf(),
        source,
    })
}

/// The number of a group that is given by name or number. /etc/group is read
/// directly: this binary is static, and glibc's name service is not.
fn group_id(group: &str) -> Result<Option<u32>, ListenError> {
    if group.is_empty() {
        return Ok(None);
    }
    if let Ok(number) = group.parse() {
        return Ok(Some(number));
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    find_group(&groups, group)
        .map(Some)
        .ok_or_else(|| ListenError::Group {
            group: group.to_owned(),
        })
}

fn find_group(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        fields.nth(1)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(path: &Path) -> Listen {
        Listen {
            unix_path: path.to_owned(),
            ..Listen::default()
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/soulboxd.sock");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listeners = Listeners::bind(&config(&path), &Proxy::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert!(matches!(
            Listeners::bind(&config(&path), &Proxy::default()),
            Err(ListenError::InUse { .. })
        ));
        drop(listeners);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_place_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("soulboxd.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listeners::bind(&config(&path), &Proxy::default()),
            Err(ListenError::NoSocket { .. })
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn groups_are_found_by_name_or_number() {
        assert_eq!(find_group("root:x:0:\nkvm:x:104:a,b\n", "kvm"), Some(104));
        assert_eq!(find_group("root:x:0:\nkvm:x:bad:\n", "kvm"), None);
        assert_eq!(group_id("77").unwrap(), Some(77));
        assert_eq!(group_id("").unwrap(), None);
        assert!(matches!(
            group_id("no such group"),
            Err(ListenError::Group { .. })
        ));
    }
}
