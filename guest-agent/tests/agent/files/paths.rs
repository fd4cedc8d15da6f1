//! FilesystemService: names, rights and attributes.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::*;

use super::{UID, USER, mode, names, shared};
use crate::common::files::*;
use crate::common::*;

#[tokio::test]
async fn tells_what_a_file_is() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let file = folder.join("file");
    fs::write(&file, "12345").unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o4751)).unwrap();
    let entry = guest.stat(at(&file)).await.unwrap();
    let real = fs::metadata(&file).unwrap();
    assert_eq!(entry.path, file.as_os_str().as_bytes());
    assert_eq!(entry.kind(), FileKind::Regular);
    assert_eq!((entry.size_bytes, entry.mode), (5, 0o4751));
    assert_eq!((entry.inode, entry.device), (real.ino(), real.dev()));
    assert_eq!(entry.modify_time.unwrap().seconds, real.mtime());
    assert_eq!(entry.links, 1);

    let link = folder.join("link");
    symlink("file", &link).unwrap();
    let entry = guest.stat(at(&link)).await.unwrap();
    assert_eq!(entry.kind(), FileKind::Symlink);
    assert_eq!(&entry.target[..], b"file");
    let followed = StatRequest {
        path: Some(at(&link)),
        follow: true,
    };
    let entry = guest.files().stat(followed).await.unwrap().into_inner();
    assert_eq!(entry.entry.unwrap().kind(), FileKind::Regular);

    // Its kind is told even where it cannot be read.
    assert_eq!(
        guest.stat(at("/dev/null")).await.unwrap().kind(),
        FileKind::CharacterDevice
    );
    let socket = guest.folder().join("socket");
    assert_eq!(
        guest.stat(at(socket)).await.unwrap().kind(),
        FileKind::Socket
    );
    assert_eq!(
        guest.stat(at("")).await.unwrap().kind(),
        FileKind::Directory
    );
}

#[tokio::test]
async fn paths_that_are_no_paths_are_told_by_field() {
    let guest = Guest::start().await;
    let refused = guest.stat(at("a\0b")).await.unwrap_err();
    assert_eq!(fields(&refused), ["path.path"]);
    let refused = guest.stat(at("x".repeat(4096))).await.unwrap_err();
    assert_eq!(fields(&refused), ["path.path"]);
    let refused = guest
        .files()
        .stat(StatRequest::default())
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["path"]);
    let refused = guest.stat(below("relative", "a")).await.unwrap_err();
    assert_eq!(fields(&refused), ["path.root"]);
    let refused = guest.stat(as_user("/", "no-such-user")).await.unwrap_err();
    assert_eq!(reason(&refused).0, "USER_NOT_FOUND");

    // The longest path that there may be is only not there; a name may be too long.
    let long = "x/".repeat(2047);
    assert_eq!(
        reason(&guest.stat(at(&long)).await.unwrap_err()).0,
        "FILE_NOT_FOUND"
    );
    let refused = guest.stat(at("x".repeat(256))).await.unwrap_err();
    assert_eq!(reason(&refused).0, "NAME_TOO_LONG");
}

#[tokio::test]
async fn names_need_not_be_text() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let name = Path::new(std::ffi::OsStr::from_bytes(b"\xff\n\xc3\x28"));
    let path = folder.join(name);
    guest.put(open(at(&path), How::Create), b"x").await.unwrap();
    assert!(path.exists());
    let (entries, _) = guest.list(at(&folder), 1, 0).await.unwrap();
    assert_eq!(entries[0].path, path.as_os_str().as_bytes());
    assert_eq!(guest.read(at(&path)).await.unwrap(), b"x");
    // Also in a message, which is text.
    fs::remove_file(&path).unwrap();
    let refused = guest.stat(at(&path)).await.unwrap_err();
    assert!(refused.message().contains("is not there"), "{refused:?}");
}

#[tokio::test]
async fn loops_and_dots_end() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    symlink("b", folder.join("a")).unwrap();
    symlink("a", folder.join("b")).unwrap();
    let refused = guest.read(at(folder.join("a"))).await.unwrap_err();
    assert_eq!(reason(&refused).0, "TOO_MANY_LINKS");
    let refused = guest
        .put(open(at(folder.join("a")), How::Replace), b"x")
        .await;
    assert_eq!(reason(&refused.unwrap_err()).0, "TOO_MANY_LINKS");

    fs::write(folder.join("file"), "x").unwrap();
    let dots = folder.join("./../shared/./file");
    assert_eq!(guest.read(at(dots)).await.unwrap(), b"x");
    let above_root = "../".repeat(100) + &folder.display().to_string()[1..] + "/file";
    assert_eq!(
        guest.read(at("/".to_owned() + &above_root)).await.unwrap(),
        b"x"
    );

    // A magic link leads to what the agent has open.
    let refused = guest.read(at("/proc/self/exe")).await.unwrap_err();
    assert_eq!(reason(&refused).0, "TOO_MANY_LINKS");
}

#[tokio::test]
async fn every_call_has_the_rights_of_its_user() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let secret = folder.join("secret");
    fs::write(&secret, "x").unwrap();
    fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let denied = |refused: tonic::Status| assert_eq!(reason(&refused).0, "PERMISSION_DENIED");
    denied(guest.read(as_user(&secret, USER)).await.unwrap_err());
    for how in [How::Replace, How::InPlace, How::Append] {
        denied(
            guest
                .put(open(as_user(&secret, USER), how), b"y")
                .await
                .unwrap_err(),
        );
    }
    denied(
        guest
            .put(open(as_user("/etc/x", USER), How::Create), b"y")
            .await
            .unwrap_err(),
    );
    let mode_of = |user| SetAttributesRequest {
        path: Some(as_user(&secret, user)),
        mode: Some(0o640),
        ..SetAttributesRequest::default()
    };
    denied(
        guest
            .files()
            .set_attributes(mode_of(USER))
            .await
            .unwrap_err(),
    );
    guest.files().set_attributes(mode_of("root")).await.unwrap();
    assert_eq!(mode(&secret), 0o640);

    // What it makes is its own, whoever did something before on the same thread.
    let theirs = folder.join("d/theirs");
    let made = OpenWrite {
        make_parents: true,
        ..open(as_user(&theirs, "54321:7"), How::Create)
    };
    guest.put(made, b"x").await.unwrap();
    for path in [theirs.as_path(), theirs.parent().unwrap()] {
        let real = fs::metadata(path).unwrap();
        assert_eq!((real.uid(), real.gid()), (UID, 7));
    }
    assert_eq!(
        (mode(&theirs), mode(theirs.parent().unwrap())),
        (0o644, 0o755)
    );
    guest.read(at(&secret)).await.unwrap();

    // In a group it may; the group of the file is told to be kept, which it cannot.
    chown(&secret, None, Some(7)).unwrap();
    assert_eq!(guest.read(as_user(&secret, "54321:7")).await.unwrap(), b"x");
    // A directory without the right to search.
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    denied(guest.stat(as_user(&secret, USER)).await.unwrap_err());
}

#[tokio::test]
async fn an_agent_that_is_not_root_has_its_own_rights_only() {
    let guest = Guest::start_as(UID).await;
    let file = guest.folder().join("file");
    guest
        .put(open(as_user(&file, USER), How::Create), b"x")
        .await
        .unwrap();
    assert_eq!(fs::metadata(&file).unwrap().uid(), UID);
    for user in ["root", "1", "54321:0"] {
        let refused = guest.read(as_user(&file, user)).await.unwrap_err();
        assert_eq!(reason(&refused).0, "PERMISSION_DENIED", "{user}");
    }
    let refused = guest.read(as_user("/etc/shadow", USER)).await.unwrap_err();
    assert_eq!(reason(&refused).0, "PERMISSION_DENIED");
}

#[tokio::test]
async fn relative_paths_are_taken_from_home() {
    let guest = Guest::start_as_init().await;
    let home = guest.sh("echo 'pat:x:54321:54321::/tmp/pat:/bin/sh' >>/etc/passwd; mkdir -m 755 /tmp/pat; chown 54321 /tmp/pat").await;
    assert_eq!(home.code(), 0);
    guest
        .put(open(as_user("a", "pat"), How::Create), b"x")
        .await
        .unwrap();
    assert_eq!(guest.read(at("/tmp/pat/a")).await.unwrap(), b"x");
    let (entries, _) = guest.list(as_user("", "pat"), 1, 0).await.unwrap();
    assert_eq!(names(&entries), ["a"]);
    assert_eq!(
        guest.read(as_user("../pat/./a", "pat")).await.unwrap(),
        b"x"
    );
    guest.sh("rm -r /tmp/pat").await;
    let refused = guest.read(as_user("a", "pat")).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    assert!(refused.message().contains("home"), "{refused:?}");
}

#[tokio::test]
async fn makes_directories() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let make = async |path: PathBuf, parents, mode| {
        let request = MakeDirectoryRequest {
            path: Some(at(path)),
            parents,
            mode,
        };
        Ok::<_, tonic::Status>(guest.files().make_directory(request).await?.into_inner())
    };
    let made = make(folder.join("a"), false, Some(0o1777)).await.unwrap();
    assert!(made.made);
    assert_eq!(mode(&folder.join("a")), 0o1777);
    let refused = make(folder.join("a"), false, None).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_EXISTS");
    assert!(!make(folder.join("a"), true, None).await.unwrap().made);
    let refused = make(folder.join("x/y"), false, None).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    assert!(
        make(folder.join("x/y//z/"), true, Some(0o700))
            .await
            .unwrap()
            .made
    );
    assert_eq!(
        (mode(&folder.join("x/y")), mode(&folder.join("x/y/z"))),
        (0o755, 0o700)
    );
    fs::write(folder.join("file"), "").unwrap();
    let refused = make(folder.join("file/d"), true, None).await.unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_A_DIRECTORY");
    let refused = make(PathBuf::from("/"), false, None).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_EXISTS");
    symlink("nowhere", folder.join("dangling")).unwrap();
    let refused = make(folder.join("dangling/d"), true, None)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
}

#[tokio::test]
async fn moves_swaps_and_links() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let (a, b) = (folder.join("a"), folder.join("b"));
    fs::write(&a, "a").unwrap();
    fs::write(&b, "b").unwrap();
    let request = |from: &Path, to: &Path| MoveRequest {
        from: Some(at(from)),
        // Its own user is not read.
        to: Some(as_user(to, "no-such-user")),
        ..MoveRequest::default()
    };
    let refused = guest.files().r#move(request(&a, &b)).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_EXISTS");
    let swap = MoveRequest {
        exchange: true,
        ..request(&a, &b)
    };
    guest.files().r#move(swap).await.unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"b");
    let replace = MoveRequest {
        replace: true,
        ..request(&a, &b)
    };
    let moved = guest.files().r#move(replace).await.unwrap().into_inner();
    assert_eq!(moved.entry.unwrap().path, b.as_os_str().as_bytes());
    assert!(!a.exists());
    assert_eq!(fs::read(&b).unwrap(), b"b");
    fs::create_dir(folder.join("d")).unwrap();
    let below = request(&folder.join("d"), &folder.join("d/e"));
    assert_eq!(
        fields(&guest.files().r#move(below).await.unwrap_err()),
        ["to.path"]
    );
    let both = MoveRequest {
        replace: true,
        exchange: true,
        ..request(&a, &b)
    };
    assert_eq!(
        fields(&guest.files().r#move(both).await.unwrap_err()),
        ["exchange"]
    );

    let link = |path: &Path, target: &'static [u8]| MakeSymlinkRequest {
        path: Some(at(path)),
        target: target.into(),
    };
    let made = guest
        .files()
        .make_symlink(link(&a, b"\xff/x"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(&made.entry.unwrap().target[..], b"\xff/x");
    let refused = guest
        .files()
        .make_symlink(link(&a, b"x"))
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_EXISTS");
    for target in [&b""[..], b"a\0"] {
        let refused = guest
            .files()
            .make_symlink(link(&a, target))
            .await
            .unwrap_err();
        assert_eq!(fields(&refused), ["target"]);
    }
    // The link itself moves.
    guest
        .files()
        .r#move(request(&a, &folder.join("c")))
        .await
        .unwrap();
    assert!(fs::symlink_metadata(folder.join("c")).unwrap().is_symlink());
}

#[tokio::test]
async fn sets_attributes() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let file = folder.join("file");
    fs::write(&file, "0123456789").unwrap();
    symlink("file", folder.join("link")).unwrap();
    let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 5 });
    let request = SetAttributesRequest {
        path: Some(at(folder.join("link"))),
        mode: Some(0o4711),
        uid: Some(UID),
        gid: Some(7),
        modify_time: time(1_000),
        access_time: time(-2_000),
        size_bytes: Some(4),
        follow: true,
    };
    let set = guest
        .files()
        .set_attributes(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(set.entry.unwrap().size_bytes, 4);
    let real = fs::metadata(&file).unwrap();
    assert_eq!(
        (mode(&file), real.uid(), real.gid(), real.len()),
        (0o4711, UID, 7, 4)
    );
    assert_eq!(
        (real.mtime(), real.mtime_nsec(), real.atime()),
        (1_000, 5, -2_000)
    );

    let link = SetAttributesRequest {
        mode: None,
        size_bytes: None,
        follow: false,
        uid: Some(1),
        ..request.clone()
    };
    guest.files().set_attributes(link.clone()).await.unwrap();
    let real = fs::symlink_metadata(folder.join("link")).unwrap();
    assert_eq!((real.uid(), real.mtime()), (1, 1_000));
    assert_eq!(fs::metadata(&file).unwrap().uid(), UID);
    let mode_of_link = SetAttributesRequest {
        mode: Some(0o600),
        ..link
    };
    let refused = guest
        .files()
        .set_attributes(mode_of_link)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_SUPPORTED");
    let size_of_directory = SetAttributesRequest {
        path: Some(at(&folder)),
        ..request
    };
    let refused = guest
        .files()
        .set_attributes(size_of_directory)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "IS_A_DIRECTORY");
}

#[tokio::test]
async fn extended_attributes_are_kept() {
    let guest = Guest::start().await;
    // One on the disk, one in memory.
    for folder in [
        shared(&guest),
        tempfile::tempdir_in("/dev/shm").unwrap().keep(),
    ] {
        let file = folder.join("file");
        fs::write(&file, "x").unwrap();
        let set = |name: &str, value: Option<&'static [u8]>| SetXattrRequest {
            path: Some(at(&file)),
            name: Bytes::copy_from_slice(name.as_bytes()),
            value: value.map(Bytes::from_static),
            follow: false,
        };
        guest
            .files()
            .set_xattr(set("trusted.a", Some(b"1")))
            .await
            .unwrap();
        let user = guest
            .files()
            .set_xattr(set("user.b", Some(b"\0\xff")))
            .await;
        if let Err(refused) = &user {
            // A kernel whose tmpfs has none of users.
            assert_eq!(reason(refused).0, "NOT_SUPPORTED");
            assert!(folder.starts_with("/dev/shm"));
        }
        let get = |user| GetXattrsRequest {
            path: Some(as_user(&file, user)),
            follow: false,
        };
        let all = guest
            .files()
            .get_xattrs(get("root"))
            .await
            .unwrap()
            .into_inner()
            .xattrs;
        let of = |xattrs: &[Xattr], name: &str| {
            let found = xattrs.iter().find(|xattr| xattr.name == name.as_bytes());
            found.map(|xattr| xattr.value.clone())
        };
        assert_eq!(of(&all, "trusted.a").unwrap(), b"1"[..]);
        if user.is_ok() {
            assert_eq!(of(&all, "user.b").unwrap(), b"\0\xff"[..]);
            // A file that is replaced keeps those of users.
            guest
                .put(open(at(&file), How::Replace), b"y")
                .await
                .unwrap();
            let kept = guest
                .files()
                .get_xattrs(get(USER))
                .await
                .unwrap()
                .into_inner()
                .xattrs;
            assert_eq!(of(&kept, "user.b").unwrap(), b"\0\xff"[..]);
            assert_eq!(of(&kept, "trusted.a"), None);
            for _ in 0..2 {
                guest.files().set_xattr(set("user.b", None)).await.unwrap();
            }
            let none = guest
                .files()
                .get_xattrs(get("root"))
                .await
                .unwrap()
                .into_inner()
                .xattrs;
            assert_eq!(of(&none, "user.b"), None);
        }
        let refused = guest
            .files()
            .set_xattr(set("", Some(b"x")))
            .await
            .unwrap_err();
        assert_eq!(fields(&refused), ["name"]);
        if folder.starts_with("/dev/shm") {
            fs::remove_dir_all(folder).unwrap();
        }
    }
    let none = GetXattrsRequest {
        path: Some(at("/proc/self/status")),
        follow: true,
    };
    let none = guest.files().get_xattrs(none).await.unwrap().into_inner();
    assert!(none.xattrs.is_empty());
}
