//! FilesystemService: Download and Upload.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use soulbox_proto::guest::v1::*;
use tar::{EntryType, Header};
use tonic::Status;

use super::{UID, USER};
use crate::common::files::*;
use crate::common::*;

async fn download(
    guest: &Guest,
    path: FilePath,
    compression: Compression,
) -> Result<(DownloadBegin, Vec<u8>), Status> {
    let request = DownloadRequest {
        path: Some(path),
        compression: compression.into(),
    };
    let mut responses = guest.files().download(request).await?.into_inner();
    let first = responses.message().await?.unwrap().message.unwrap();
    let download_response::Message::Begin(begin) = first else {
        panic!("the first is no begin");
    };
    let mut bytes = Vec::new();
    while let Some(response) = responses.message().await? {
        match response.message.unwrap() {
            download_response::Message::Data(data) => bytes.extend_from_slice(&data),
            download_response::Message::Begin(_) => panic!("a second begin"),
        }
    }
    Ok((begin, bytes))
}

async fn upload(guest: &Guest, open: OpenUpload, archive: &[u8]) -> Result<UploadResponse, Status> {
    let mut requests = vec![UploadRequest {
        message: Some(upload_request::Message::Open(open)),
    }];
    requests.extend(archive.chunks(64 * 1024).map(|data| UploadRequest {
        message: Some(upload_request::Message::Data(Bytes::copy_from_slice(data))),
    }));
    let response = guest.files().upload(tokio_stream::iter(requests)).await?;
    Ok(response.into_inner())
}

fn into(path: impl AsRef<Path>) -> OpenUpload {
    OpenUpload {
        path: Some(at(path)),
        ..OpenUpload::default()
    }
}

/// With all that an archive can hold.
fn tree(folder: &Path) -> PathBuf {
    let top = folder.join("tree");
    fs::create_dir_all(top.join("d/empty")).unwrap();
    fs::write(top.join("d/small"), "small").unwrap();
    fs::write(
        top.join("large"),
        (0..2_000_000_u32)
            .map(|byte| (byte % 241) as u8)
            .collect::<Vec<_>>(),
    )
    .unwrap();
    fs::write(top.join("nothing"), "").unwrap();
    let long = top.join("x".repeat(200)).join("y".repeat(200));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("z".repeat(250)), "long").unwrap();
    fs::write(top.join("line\nend"), "odd").unwrap();
    symlink("d/small", top.join("link")).unwrap();
    symlink("w".repeat(300), top.join("dangling")).unwrap();
    fs::hard_link(top.join("d/small"), top.join("hard")).unwrap();
    fs::set_permissions(top.join("nothing"), PermissionsExt::from_mode(0o4511)).unwrap();
    fs::set_permissions(top.join("d"), PermissionsExt::from_mode(0o555)).unwrap();
    for path in ["large", "d"] {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
        fs::File::open(top.join(path))
            .unwrap()
            .set_modified(time)
            .unwrap();
    }
    top
}

fn assert_same(one: &Path, other: &Path) {
    let diff = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([one, other])
        .output()
        .unwrap();
    assert!(
        diff.status.success(),
        "{}",
        String::from_utf8_lossy(&diff.stdout)
    );
    for path in ["d", "large", "nothing", "d/small"] {
        let (one, other) = (
            fs::metadata(one.join(path)).unwrap(),
            fs::metadata(other.join(path)).unwrap(),
        );
        assert_eq!(
            (one.mode(), one.mtime()),
            (other.mode(), other.mtime()),
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_tree_goes_down_and_up_again() {
    let guest = Guest::start().await;
    let top = tree(guest.folder());
    let size = 2_000_000;
    for compression in [Compression::Unspecified, Compression::Zstd] {
        let (begin, bytes) = download(&guest, at(&top), compression).await.unwrap();
        assert_eq!(begin.compression(), compression);
        assert_eq!(begin.entry.unwrap().kind(), FileKind::Directory);
        assert_eq!(bytes.len() < size, compression == Compression::Zstd);
        // By tar itself …
        let name = format!("{compression:?}");
        let by_tar = guest.folder().join(format!("tar-{name}"));
        fs::create_dir(&by_tar).unwrap();
        let plain = match compression {
            Compression::Zstd => zstd::decode_all(&bytes[..]).unwrap(),
            Compression::Unspecified => bytes.clone(),
        };
        fs::write(guest.folder().join("archive"), &plain).unwrap();
        let archive = guest.folder().join("archive");
        let tar = Command::new("tar")
            .args(["-xpf"])
            .arg(archive)
            .arg("-C")
            .arg(&by_tar)
            .status();
        assert!(tar.unwrap().success());
        assert_same(&top, &by_tar);
        // … and by the agent.
        let up = guest.folder().join(format!("up-{name}/new"));
        let open = OpenUpload {
            compression: compression.into(),
            ..into(&up)
        };
        let uploaded = upload(&guest, open.clone(), &bytes).await.unwrap();
        assert_same(&top, &up);
        assert_eq!(uploaded.entries, 12);
        assert_eq!(uploaded.file_bytes, 2_000_000 + 5 + 4 + 3);
        let inode = |path: &str| fs::metadata(up.join(path)).unwrap().ino();
        assert_eq!(inode("hard"), inode("d/small"));
        assert_eq!(fs::metadata(up.join("large")).unwrap().mtime_nsec(), 0);
        // Over what is there.
        upload(&guest, open, &bytes).await.unwrap();
        assert_same(&top, &up);
    }
}

#[tokio::test]
async fn what_tar_makes_is_unpacked() {
    let guest = Guest::start().await;
    let top = tree(guest.folder());
    for format in ["pax", "gnu", "ustar", "v7"] {
        let mut tar = Command::new("tar");
        tar.args(["-c", "--format", format, "-C"]).arg(&top);
        if matches!(format, "ustar" | "v7") {
            tar.args(["d", "large", "nothing"]);
        } else {
            tar.arg(".");
        }
        let archive = tar.output().unwrap();
        assert!(
            archive.status.success(),
            "{}",
            String::from_utf8_lossy(&archive.stderr)
        );
        let up = guest.folder().join(format);
        upload(&guest, into(&up), &archive.stdout).await.unwrap();
        for name in ["d", "large", "nothing"] {
            let diff = Command::new("diff")
                .arg("-r")
                .arg(top.join(name))
                .arg(up.join(name))
                .status();
            assert!(diff.unwrap().success(), "{format} {name}");
        }
        // Of which only pax has a fraction.
        let nanos = if format == "pax" { 123_456_789 } else { 0 };
        for name in ["d", "large"] {
            let found = fs::metadata(up.join(name)).unwrap();
            assert_eq!(
                (found.mtime(), found.mtime_nsec()),
                (1_000_000_000, nanos),
                "{format} {name}"
            );
        }
    }
}

#[tokio::test]
async fn one_file_goes_down_by_its_name() {
    let guest = Guest::start().await;
    let file = guest.folder().join("file");
    fs::write(&file, "text").unwrap();
    let (_, bytes) = download(&guest, at(&file), Compression::Zstd)
        .await
        .unwrap();
    let up = guest.folder().join("up");
    let compressed = OpenUpload {
        compression: Compression::Zstd.into(),
        ..into(&up)
    };
    upload(&guest, compressed, &bytes).await.unwrap();
    assert_eq!(fs::read(up.join("file")).unwrap(), b"text");
    // What compression would not help stays as it is.
    let noise: Vec<u8> = (0..300_000_u64)
        .map(|index| {
            (index
                .wrapping_mul(6_364_136_223_846_793_005)
                .rotate_left(29)
                >> 17) as u8
        })
        .scan(1_u64, |state, byte| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            Some(byte ^ (*state >> 33) as u8)
        })
        .collect();
    fs::write(&file, &noise).unwrap();
    let (begin, bytes) = download(&guest, at(&file), Compression::Zstd)
        .await
        .unwrap();
    assert_eq!(begin.compression(), Compression::Unspecified);
    assert!(bytes.len() > noise.len());
    let refused = download(&guest, at("/dev/null"), Compression::Unspecified)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_A_REGULAR_FILE");
}

#[tokio::test]
async fn owners_are_the_users_unless_root_keeps_them() {
    let guest = Guest::start().await;
    let folder = guest.folder().join("shared");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    let mut archive = Vec::new();
    add(&mut archive, b"d/", b"", EntryType::Directory, b"");
    add(&mut archive, b"d/f", b"", EntryType::Regular, b"x");
    add(&mut archive, b"d/l", b"f", EntryType::Symlink, b"");
    end(&mut archive);
    let open = |user: &str, keep_owners| OpenUpload {
        path: Some(as_user(folder.join(user), user)),
        keep_owners,
        ..OpenUpload::default()
    };
    upload(&guest, open(USER, false), &archive).await.unwrap();
    upload(&guest, open("root", true), &archive).await.unwrap();
    for path in ["d", "d/f", "d/l"] {
        let owner = |user: &str| {
            fs::symlink_metadata(folder.join(user).join(path))
                .unwrap()
                .uid()
        };
        assert_eq!((owner(USER), owner("root")), (UID, 7), "{path}");
    }
    let refused = upload(&guest, open(USER, true), &archive)
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["open.keep_owners"]);
    // A directory that the user may not write.
    let refused = upload(
        &guest,
        OpenUpload {
            path: Some(as_user("/etc", USER)),
            ..OpenUpload::default()
        },
        &archive,
    )
    .await
    .unwrap_err();
    assert_eq!(reason(&refused).0, "PERMISSION_DENIED");
}

/// An entry as only a hostile hand makes it: the `tar` crate refuses such names.
fn add(archive: &mut Vec<u8>, path: &[u8], link: &[u8], entry_type: EntryType, body: &[u8]) {
    let mut header = Header::new_ustar();
    let ustar = header.as_ustar_mut().unwrap();
    ustar.name[..path.len()].copy_from_slice(path);
    ustar.linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(entry_type);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(7);
    header.set_mtime(1_000);
    header.set_size(body.len() as u64);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(body);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fn end(archive: &mut Vec<u8>) {
    archive.resize(archive.len() + 1024, 0);
}

#[tokio::test]
async fn nothing_of_a_hostile_archive_lands_outside() {
    let guest = Guest::start().await;
    let outside = guest.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("kept"), "kept").unwrap();
    let absolute = outside.to_str().unwrap().as_bytes();
    let into_outside = [absolute, b"/new"].concat();
    let kept = [absolute, b"/kept"].concat();
    type Entries<'a> = &'a [(&'a [u8], &'a [u8], EntryType)];
    let file = EntryType::Regular;
    let cases: [(Entries<'_>, &str); 12] = [
        (&[(&into_outside, b"", file)], "PATH_ESCAPES"),
        (&[(b"../outside/new", b"", file)], "PATH_ESCAPES"),
        (&[(b"a/../../outside/new", b"", file)], "PATH_ESCAPES"),
        (
            &[(b"l", absolute, EntryType::Symlink), (b"l/new", b"", file)],
            "PATH_ESCAPES",
        ),
        (
            &[
                (b"l", b"../outside", EntryType::Symlink),
                (b"l/new", b"", file),
            ],
            "PATH_ESCAPES",
        ),
        (
            &[
                (b"l", b"../outside", EntryType::Symlink),
                (b"l/d/", b"", EntryType::Directory),
            ],
            "PATH_ESCAPES",
        ),
        (
            &[
                (b"l", b"..", EntryType::Symlink),
                (b"l/outside/new", b"", file),
            ],
            "PATH_ESCAPES",
        ),
        (&[(b"h", &kept, EntryType::Link)], "PATH_ESCAPES"),
        (
            &[(b"h", b"../outside/kept", EntryType::Link)],
            "PATH_ESCAPES",
        ),
        (
            &[
                (b"l", b"../outside", EntryType::Symlink),
                (b"h", b"l/kept", EntryType::Link),
            ],
            "PATH_ESCAPES",
        ),
        (&[(b"dev", b"", EntryType::Char)], "NOT_SUPPORTED"),
        (&[(b"pipe", b"", EntryType::Fifo)], "NOT_SUPPORTED"),
    ];
    for (index, (entries, expected)) in cases.iter().enumerate() {
        let mut archive = Vec::new();
        for (path, link, entry_type) in *entries {
            let body: &[u8] = if *entry_type == file { b"evil" } else { b"" };
            add(&mut archive, path, link, *entry_type, body);
        }
        end(&mut archive);
        let refused = upload(
            &guest,
            into(guest.folder().join(format!("into{index}"))),
            &archive,
        )
        .await;
        assert_eq!(reason(&refused.unwrap_err()).0, *expected, "{index}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{index}");
        assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept", "{index}");
    }

    // A link is replaced, not written through; a hard link to one is the link itself.
    let mut archive = Vec::new();
    add(
        &mut archive,
        b"f",
        b"../outside/kept",
        EntryType::Symlink,
        b"",
    );
    add(&mut archive, b"h", b"f", EntryType::Link, b"");
    add(&mut archive, b"f", b"", file, b"evil");
    end(&mut archive);
    upload(&guest, into(guest.folder().join("into")), &archive)
        .await
        .unwrap();
    assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept");
    assert!(
        fs::symlink_metadata(guest.folder().join("into/h"))
            .unwrap()
            .is_symlink()
    );
}

#[tokio::test]
async fn archives_that_are_cut_or_damaged_are_told() {
    let guest = Guest::start().await;
    let mut archive = Vec::new();
    add(&mut archive, b"whole", b"", EntryType::Regular, b"x");
    add(&mut archive, b"cut", b"", EntryType::Regular, &[7; 100_000]);
    end(&mut archive);
    let into_cut = guest.folder().join("into");
    for length in [1, 700, 5_000, 60_000, archive.len() - 1024] {
        let refused = upload(&guest, into(&into_cut), &archive[..length])
            .await
            .unwrap_err();
        assert_eq!(fields(&refused), ["data"], "{length}");
        assert!(
            refused.message().contains("ends in the middle"),
            "{refused:?}"
        );
        if (2_000..archive.len() - 2_000).contains(&length) {
            // What is not whole is gone; what came before is there.
            assert!(!into_cut.join("cut").exists());
            assert_eq!(fs::read(into_cut.join("whole")).unwrap(), b"x");
        }
    }
    let compressed = OpenUpload {
        compression: Compression::Zstd.into(),
        ..into(&into_cut)
    };
    let zstd = zstd::encode_all(&archive[..], 1).unwrap();
    let refused = upload(&guest, compressed.clone(), &zstd[..zstd.len() / 2])
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["data"]);
    let refused = upload(&guest, compressed, b"no zstd at all")
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["data"]);
    let refused = upload(&guest, into(&into_cut), &[1; 1024])
        .await
        .unwrap_err();
    assert!(refused.message().contains("checksum"), "{refused:?}");

    // A size that no disk has: what comes is too little.
    let mut header = Header::new_gnu();
    header.set_path("huge").unwrap();
    header.set_size(u64::MAX >> 1);
    header.set_mode(0o644);
    header.set_cksum();
    let refused = upload(&guest, into(&into_cut), header.as_bytes())
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["data"]);
    assert!(!into_cut.join("huge").exists());
}

#[tokio::test]
async fn many_small_files_go_down_and_up() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    for outer in 0..20 {
        fs::create_dir_all(top.join(format!("{outer}"))).unwrap();
        for inner in 0..100 {
            fs::write(
                top.join(format!("{outer}/{inner}")),
                format!("{outer}.{inner}"),
            )
            .unwrap();
        }
    }
    let (_, bytes) = download(&guest, at(&top), Compression::Zstd).await.unwrap();
    let open = OpenUpload {
        compression: Compression::Zstd.into(),
        ..into(guest.folder().join("up"))
    };
    let uploaded = upload(&guest, open, &bytes).await.unwrap();
    assert_eq!(uploaded.entries, 2020);
    let diff = Command::new("diff")
        .arg("-r")
        .arg(&top)
        .arg(guest.folder().join("up"))
        .status();
    assert!(diff.unwrap().success());
}
