//! FilesystemService: what is read from files and written to them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::Duration;

use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{UID, leftovers, mode, names, shared};
use crate::common::files::*;
use crate::common::*;

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
async fn what_long_calls_took_of_memory_is_given_back() {
    let guest = Guest::start().await;
    let file = shared(&guest).join("long");
    let bytes = vec![7; 64 << 20];
    let create = open(at(&file), How::Create);
    guest.put(create, &bytes).await.unwrap();
    assert!(guest.read(at(&file)).await.unwrap() == bytes);
    let own_kib = || {
        let status = fs::read_to_string(format!("/proc/{}/status", guest.agent_pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon"));
        let number = line.unwrap().split_whitespace().nth(1).unwrap();
        number.parse::<u64>().unwrap()
    };
    until(|| own_kib() < 3 * 1024).await;
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
