//! Filesystems that are on disks, and how full they are.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::statvfs;
use soulbox_proto::guest::v1::GuestDisk;

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// "major:minor"
    device: String,
    point: Vec<u8>,
}

/// Looks at each filesystem once, where it was mounted first.
pub(super) fn look(mountinfo: &str) -> Vec<GuestDisk> {
    let mut seen = HashSet::new();
    let mounts = mountinfo.lines().filter_map(Mount::parse);
    let mut first = mounts.filter(|mount| seen.insert(mount.device.clone()));
    let mut disks = Vec::new();
    for mount in &mut first {
        disks.extend(mount.look());
    }
    disks
}

// === impl Mount ===

impl Mount {
    /// "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw": a line of
    /// /proc/self/mountinfo. None where it is of no disk: virtual filesystems have
    /// major number 0. The root is told whatever it is.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        let (major, _) = device.split_once(':')?;
        let is_disk = major.parse::<u32>().ok()? != 0;
        (is_disk || point == "/").then(|| Self {
            device: device.to_owned(),
            point: unescape(point.as_bytes()),
        })
    }

    fn look(&self) -> Option<GuestDisk> {
        let stat = statvfs(OsStr::from_bytes(&self.point)).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        (stat.f_blocks > 0).then(|| GuestDisk {
            mount_point: self.point.clone().into(),
            total_bytes: bytes(stat.f_blocks),
            used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            available_bytes: bytes(stat.f_bavail),
            inodes: stat.f_files,
            inodes_free: stat.f_ffree,
        })
    }
}

/// Three octal digits after a backslash are a byte.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let octal = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() {
            rest.get(4..).unwrap_or_default()
        } else {
            more
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_disks_and_the_root_are_looked_at() {
        let point = |line| Mount::parse(line).map(|mount| mount.point);
        assert_eq!(
            point("36 35 254:0 / /my\\040data rw,noatime shared:1 - ext4 /dev/vda rw").as_deref(),
            Some(&b"/my data"[..])
        );
        assert_eq!(
            point("1 0 0:21 / / rw - overlay overlay rw").as_deref(),
            Some(&b"/"[..])
        );
        assert_eq!(point("22 1 0:5 / /dev rw - devtmpfs devtmpfs rw"), None);
        assert_eq!(point("22 1 x:5 / /dev rw"), None);
        assert_eq!(point("22 1"), None);
    }

    #[test]
    fn a_disk_is_told_once() {
        let twice =
            "1 0 254:0 / / rw - ext4 /dev/vda rw\n2 1 254:0 /etc /etc rw - ext4 /dev/vda rw\n";
        let disks = look(twice);
        assert_eq!(disks.len(), 1);
        assert!(disks[0].mount_point == "/" && disks[0].total_bytes > 0);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>(), bytes in any::<Vec<u8>>()) {
            let _ = Mount::parse(&text);
            prop_assert!(unescape(&bytes).len() <= bytes.len());
        }

        #[test]
        fn what_the_kernel_escapes_comes_back(name in any::<Vec<u8>>()) {
            let escape = |byte: &u8| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                byte => vec![*byte],
            };
            let escaped: Vec<u8> = name.iter().flat_map(escape).collect();
            prop_assert_eq!(unescape(&escaped), name);
        }
    }
}
