//! FilesystemService: single files and directories.

mod common;

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use common::files::*;
use common::*;
use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Nobody's uid.
const USER: &str = "54321";
const UID: u32 = 54_321;

/// A folder that every user may write, as /tmp is.
fn shared(guest: &Guest) -> PathBuf {
    let folder = guest.folder().join("shared");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    folder
}

fn names(entries: &[Entry]) -> Vec<&str> {
    let names = entries.iter().map(|entry| std::str::from_utf8(&entry.path));
    names.map(Result::unwrap).collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Files that nobody asked for.
fn leftovers(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path());
    let hidden = |path: &PathBuf| {
        path.file_name()
            .unwrap()
            .as_bytes()
            .starts_with(b".soulbox-")
    };
    files.filter(hidden).collect()
}

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
async fn reads_all_or_a_part() {
    let guest = Guest::start().await;
    let file = shared(&guest).join("file");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|byte| (byte % 251) as u8).collect();
    fs::write(&file, &bytes).unwrap();
    assert_eq!(guest.read(at(&file)).await.unwrap(), bytes);
    let part = guest
        .read_part(at(&file), 1_000_000, 777_777)
        .await
        .unwrap();
    assert_eq!(part, &bytes[1_000_000..1_777_777]);
    let rest = guest.read_part(at(&file), 2_999_999, 0).await.unwrap();
    assert_eq!(rest, &bytes[2_999_999..]);
    assert_eq!(guest.read_part(at(&file), 4_000_000, 5).await.unwrap(), b"");
    fs::write(&file, "").unwrap();
    assert_eq!(guest.read(at(&file)).await.unwrap(), b"");
    let refused = guest.read_part(at(&file), u64::MAX, 0).await.unwrap_err();
    assert_eq!(fields(&refused), ["offset"]);
}

#[tokio::test]
async fn what_is_no_regular_file_is_refused_at_once() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let fifo = folder.join("fifo");
    guest.sh(&format!("mkfifo {}", fifo.display())).await;
    // Opening it would wait for a writer, or wake one.
    let writer = guest
        .exec(sh(&format!("echo x >{}", fifo.display())))
        .await
        .unwrap();
    for (path, expected) in [
        (fifo.as_path(), "NOT_A_REGULAR_FILE"),
        (Path::new("/dev/zero"), "NOT_A_REGULAR_FILE"),
        (&guest.folder().join("socket"), "NOT_A_REGULAR_FILE"),
        (Path::new("/"), "IS_A_DIRECTORY"),
        (&folder, "IS_A_DIRECTORY"),
        (&folder.join("none"), "FILE_NOT_FOUND"),
    ] {
        let refused = guest.read(at(path)).await.unwrap_err();
        assert_eq!(reason(&refused).0, expected, "{}", path.display());
        if expected != "FILE_NOT_FOUND" {
            for how in [How::Replace, How::InPlace, How::Append] {
                let refused = guest.put(open(at(path), how), b"x").await.unwrap_err();
                assert_eq!(reason(&refused).0, expected, "{} {how:?}", path.display());
            }
        }
    }
    // The writer still waits for whoever opens it.
    assert_eq!(fs::read(&fifo).unwrap(), b"x\n");
    writer.finish().await.unwrap();
    let refused = guest.read(at(folder.join("fifo/x"))).await.unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_A_DIRECTORY");
}

#[tokio::test]
async fn files_without_a_size_are_read_to_their_end() {
    let guest = Guest::start().await;
    let status = guest.read(at("/proc/self/status")).await.unwrap();
    assert!(String::from_utf8(status).unwrap().contains("soulbox-guest"));
    // Larger than one read gives.
    let symbols = guest.read(at("/proc/kallsyms")).await.unwrap();
    assert!(symbols.len() > 100_000 && symbols.ends_with(b"\n"));
    let part = guest
        .read_part(at("/proc/self/status"), 5, 9)
        .await
        .unwrap();
    assert_eq!(part, b"\tsoulbox-");
    // Waits for messages unless told not to.
    assert!(guest.read(at("/proc/kmsg")).await.is_ok());
}

#[tokio::test]
async fn replaces_a_file_as_a_whole() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let file = folder.join("file");
    fs::write(&file, "old").unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o2741)).unwrap();
    chown(&file, Some(UID), Some(UID + 1)).unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o2741)).unwrap();

    let (requests, stream) = mpsc::channel(8);
    requests
        .send(opening(open(at(&file), How::Replace)))
        .await
        .unwrap();
    requests.send(data("new ")).await.unwrap();
    let mut client = guest.files();
    let call = tokio::spawn(async move { client.write(ReceiverStream::new(stream)).await });
    until(|| leftovers(&folder).len() == 1).await;
    assert_eq!(fs::read(&file).unwrap(), b"old");
    requests.send(data("text")).await.unwrap();
    requests.send(commit()).await.unwrap();
    let written = call.await.unwrap().unwrap().into_inner();
    assert_eq!(written.written_bytes, 8);
    assert_eq!(written.entry.unwrap().size_bytes, 8);
    assert_eq!(fs::read(&file).unwrap(), b"new text");
    let real = fs::metadata(&file).unwrap();
    assert_eq!(
        (real.uid(), real.gid(), mode(&file)),
        (UID, UID + 1, 0o2741)
    );
    assert!(leftovers(&folder).is_empty());
}

#[tokio::test]
async fn a_write_that_ends_early_leaves_the_file_as_it_was() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let file = folder.join("file");
    fs::write(&file, "old").unwrap();
    for path in [file.clone(), folder.join("new")] {
        // The caller forgets to say that it is whole …
        let requests = vec![opening(open(at(&path), How::Replace)), data("half")];
        assert_eq!(
            fields(&guest.write(requests).await.unwrap_err()),
            ["commit"]
        );
        // … or goes away.
        let (requests, stream) = mpsc::channel(8);
        requests
            .send(opening(open(at(&path), How::Replace)))
            .await
            .unwrap();
        requests.send(data("half")).await.unwrap();
        let mut client = guest.files();
        let call = tokio::spawn(async move { client.write(ReceiverStream::new(stream)).await });
        until(|| leftovers(&folder).len() == 1).await;
        call.abort();
        until(|| leftovers(&folder).is_empty()).await;
        drop(requests);
    }
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert!(!folder.join("new").exists());
}

#[tokio::test]
async fn two_writers_of_one_file_are_each_whole() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    let file = folder.join("file");
    let (one, two) = (vec![b'1'; 2_000_000], vec![b'2'; 2_000_000]);
    let write = |bytes| guest.put(open(at(&file), How::Replace), bytes);
    for _ in 0..5 {
        let (first, second) = tokio::join!(write(&one), write(&two));
        first.unwrap();
        second.unwrap();
        let bytes = fs::read(&file).unwrap();
        assert!(bytes == one || bytes == two);
    }
    // Of two that create it, one does.
    fs::remove_file(&file).unwrap();
    let create = |bytes| guest.put(open(at(&file), How::Create), bytes);
    let (first, second) = tokio::join!(create(&one), create(&two));
    let refused = match (first, second) {
        (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(&refused).0, "FILE_EXISTS");
    assert!(leftovers(&folder).is_empty());
}

#[tokio::test]
async fn writes_in_place_and_appends() {
    let guest = Guest::start().await;
    let file = shared(&guest).join("a/b/file");
    let refused = guest
        .put(open(at(&file), How::InPlace), b"x")
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    let made = OpenWrite {
        make_parents: true,
        mode: Some(0o666),
        ..open(at(&file), How::InPlace)
    };
    guest.put(made, b"0123456789").await.unwrap();
    assert_eq!(mode(&file), 0o666);
    let inode = fs::metadata(&file).unwrap().ino();

    let middle = OpenWrite {
        offset: 4,
        ..open(at(&file), How::InPlace)
    };
    guest.put(middle.clone(), b"xx").await.unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"0123xx6789");
    let cut = OpenWrite {
        truncate: true,
        sync: true,
        ..middle
    };
    guest.put(cut, b"yy").await.unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"0123yy");
    let known = |size| OpenWrite {
        expected_size_bytes: Some(size),
        ..open(at(&file), How::Append)
    };
    guest.put(known(6), b"zz").await.unwrap();
    let refused = guest.put(known(6), b"!").await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_CHANGED");
    assert_eq!(fs::read(&file).unwrap(), b"0123yyzz");
    assert_eq!(fs::metadata(&file).unwrap().ino(), inode);

    let wrong = OpenWrite {
        offset: 1,
        truncate: true,
        expected_size_bytes: Some(0),
        mode: Some(0o10000),
        ..open(at(&file), How::Replace)
    };
    let refused = guest.put(wrong, b"x").await.unwrap_err();
    let expected = [
        "open.offset",
        "open.truncate",
        "open.expected_size_bytes",
        "open.mode",
    ];
    assert_eq!(fields(&refused), expected);
    let unspecified = open(at(&file), How::Unspecified);
    assert_eq!(
        fields(&guest.put(unspecified, b"x").await.unwrap_err()),
        ["open.how"]
    );
}

#[tokio::test]
async fn a_link_leads_to_the_file_that_is_written() {
    let guest = Guest::start().await;
    let folder = shared(&guest);
    fs::create_dir(folder.join("d")).unwrap();
    fs::write(folder.join("d/file"), "old").unwrap();
    symlink("d/file", folder.join("link")).unwrap();
    symlink("d/new", folder.join("dangling")).unwrap();
    for name in ["link", "dangling"] {
        guest
            .put(open(at(folder.join(name)), How::Replace), b"new")
            .await
            .unwrap();
        assert!(
            fs::symlink_metadata(folder.join(name))
                .unwrap()
                .is_symlink()
        );
    }
    assert_eq!(fs::read(folder.join("d/file")).unwrap(), b"new");
    assert_eq!(fs::read(folder.join("d/new")).unwrap(), b"new");
}

#[tokio::test]
async fn a_full_disk_is_told_and_the_partial_file_gone() {
    let guest = Guest::start_as_init().await;
    let mounted = guest
        .sh("mkdir /run/small && mount -t tmpfs -o size=1m small /run/small")
        .await;
    assert_eq!(mounted.code(), 0);
    let file = "/run/small/file";
    guest
        .put(open(at(file), How::Replace), b"old")
        .await
        .unwrap();
    let refused = guest
        .put(open(at(file), How::Replace), &vec![1; 3_000_000])
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(reason(&refused).0, "DISK_FULL");
    assert_eq!(guest.read(at(file)).await.unwrap(), b"old");
    let (entries, _) = guest.list(at("/run/small"), 1, 0).await.unwrap();
    assert_eq!(names(&entries), [file]);
    assert!(
        guest
            .put(open(at(file), How::Append), &vec![1; 3_000_000])
            .await
            .is_err()
    );

    let read_only = guest.sh("mount -o remount,ro /run/small").await;
    assert_eq!(read_only.code(), 0);
    for how in [How::Replace, How::InPlace, How::Append] {
        let refused = guest.put(open(at(file), how), b"x").await.unwrap_err();
        assert_eq!(reason(&refused).0, "READ_ONLY", "{how:?}");
    }
    assert_eq!(
        reason(&guest.remove(at(file), false).await.unwrap_err()).0,
        "READ_ONLY"
    );
    // The mount itself stays, with what is in it.
    for recursive in [false, true] {
        let refused = guest.remove(at("/run/small"), recursive).await.unwrap_err();
        assert_eq!(reason(&refused).0, "FILE_BUSY");
    }
    let refused = guest.remove(at("/run"), true).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_BUSY");
    let moved = MoveRequest {
        from: Some(at("/run/small/file")),
        to: Some(at("/tmp/file")),
        ..MoveRequest::default()
    };
    let refused = guest.files().r#move(moved).await.unwrap_err();
    assert_eq!(reason(&refused).0, "CROSSES_FILESYSTEMS");
    assert_eq!(guest.read(at(file)).await.unwrap()[..3], *b"old");
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

#[tokio::test]
async fn a_caller_that_does_not_read_holds_little() {
    let guest = Guest::start().await;
    let file = shared(&guest).join("file");
    fs::write(&file, vec![7; 64 << 20]).unwrap();
    let mut streams = Vec::new();
    for _ in 0..50 {
        let request = ReadRequest {
            path: Some(at(&file)),
            ..ReadRequest::default()
        };
        streams.push(guest.files().read(request).await.unwrap().into_inner());
    }
    // Others are served meanwhile, by threads that do not wait for these. On another
    // connection: all that this one may have on its way is taken.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut other = FilesystemServiceClient::new(guest.connection().await);
    for _ in 0..50 {
        let request = StatRequest {
            path: Some(at(&file)),
            follow: false,
        };
        other.stat(request).await.unwrap();
    }
    let threads = fs::read_dir(format!("/proc/{}/task", guest.agent_pid())).unwrap();
    assert!(threads.count() < 50);
    assert!(peak_resident_kib(guest.agent_pid()) < 160 << 10);
}
