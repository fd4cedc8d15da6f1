//! FilesystemService: what Watch tells.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::watch_response::Message;
use soulbox_proto::guest::v1::*;
use tonic::{Status, Streaming};

use crate::common::files::*;
use crate::common::*;

struct Watch {
    responses: Streaming<WatchResponse>,
    directories: u64,
}

async fn watch(guest: &Guest, path: &Path, recursive: bool) -> Result<Watch, Status> {
    let request = WatchRequest {
        path: Some(at(path)),
        recursive,
    };
    let mut responses = guest.files().watch(request).await?.into_inner();
    match responses.message().await?.unwrap().message.unwrap() {
        Message::Ready(ready) => Ok(Watch {
            responses,
            directories: ready.directories,
        }),
        other => panic!("the first is {other:?}"),
    }
}

impl Watch {
    async fn message(&mut self) -> Result<Option<Message>, Status> {
        let message = tokio::time::timeout(LONG, self.responses.message())
            .await
            .unwrap()?;
        Ok(message.map(|response| response.message.unwrap()))
    }

    /// "created d/", "renamed a -> b" …
    async fn event(&mut self) -> String {
        match self.message().await.unwrap().unwrap() {
            Message::Event(event) => shown(&event),
            other => panic!("{other:?}"),
        }
    }

    async fn events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        for _ in 0..count {
            events.push(self.event().await);
        }
        events
    }

    /// All up to the one that is told last.
    async fn upto(&mut self, last: &str) -> Vec<String> {
        let mut events = Vec::new();
        loop {
            events.push(self.event().await);
            if events.last().unwrap() == last {
                return events;
            }
        }
    }
}

fn shown(event: &WatchEvent) -> String {
    let kind = format!("{:?}", event.kind()).to_lowercase();
    let slash = if event.directory { "/" } else { "" };
    let path = String::from_utf8_lossy(&event.path);
    if event.from.is_empty() {
        format!("{kind} {path}{slash}")
    } else {
        format!(
            "{kind} {} -> {path}{slash}",
            String::from_utf8_lossy(&event.from)
        )
    }
}

fn top(guest: &Guest) -> std::path::PathBuf {
    let top = guest.folder().join("top");
    fs::create_dir(&top).unwrap();
    top
}

#[tokio::test]
async fn tells_what_is_made_written_renamed_and_removed() {
    let guest = Guest::start().await;
    let top = top(&guest);
    fs::create_dir(top.join("d")).unwrap();
    let mut watch = watch(&guest, &top, true).await.unwrap();
    assert_eq!(watch.directories, 2);
    fs::write(top.join("d/f"), "x").unwrap();
    assert_eq!(
        watch.events(3).await,
        ["created d/f", "written d/f", "written d/f"]
    );
    fs::rename(top.join("d/f"), top.join("g")).unwrap();
    assert_eq!(watch.event().await, "renamed d/f -> g");
    fs::rename(top.join("d"), top.join("e")).unwrap();
    assert_eq!(watch.event().await, "renamed d -> e/");
    // It has its new name at once.
    fs::create_dir(top.join("e/sub")).unwrap();
    assert_eq!(watch.event().await, "created e/sub/");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(top.join("g"), mode).unwrap();
    assert_eq!(watch.event().await, "attributes g");
    fs::remove_file(top.join("g")).unwrap();
    fs::remove_dir_all(top.join("e")).unwrap();
    let events = watch.upto("removed e/").await;
    assert_eq!(events, ["removed g", "removed e/sub/", "removed e/"]);

    // From and to elsewhere.
    let outside = guest.folder().join("outside");
    fs::create_dir_all(outside.join("x/y")).unwrap();
    fs::write(outside.join("x/y/z"), "").unwrap();
    fs::rename(outside.join("x"), top.join("x")).unwrap();
    let events = watch.upto("created x/y/z").await;
    assert_eq!(events, ["created x/", "created x/y/", "created x/y/z"]);
    fs::rename(top.join("x"), outside.join("x")).unwrap();
    assert_eq!(watch.event().await, "removed x/");
    fs::write(outside.join("x/y/z"), "unseen").unwrap();
    fs::write(top.join("seen"), "").unwrap();
    assert_eq!(watch.event().await, "created seen");
}

#[tokio::test]
async fn a_file_that_is_replaced_comes_to_be_when_it_is_whole() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut all = watch(&guest, &top, true).await.unwrap();
    let file = top.join("file");
    for text in [&b"one"[..], b"two"] {
        guest
            .put(open(at(&file), How::Replace), text)
            .await
            .unwrap();
        assert_eq!(all.events(2).await, ["created file", "written file"]);
    }
    // A file is watched by its name.
    let mut one = watch(&guest, &file, true).await.unwrap();
    fs::write(top.join("other"), "").unwrap();
    guest
        .put(open(at(&file), How::Replace), b"three")
        .await
        .unwrap();
    assert_eq!(one.events(2).await, ["created ", "written "]);
    fs::remove_file(&file).unwrap();
    assert_eq!(one.event().await, "removed ");
    fs::write(&file, "").unwrap();
    assert_eq!(one.event().await, "created ");
}

#[tokio::test]
async fn what_is_made_before_a_new_directory_is_watched_is_told() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut watch = watch(&guest, &top, true).await.unwrap();
    let mut expected = BTreeSet::new();
    for round in 0..30 {
        let mut path = format!("{round}");
        for _ in 0..10 {
            fs::create_dir(top.join(&path)).unwrap();
            expected.insert(format!("created {path}/"));
            fs::write(top.join(&path).join("f"), "").unwrap();
            expected.insert(format!("created {path}/f"));
            path += "/d";
        }
    }
    fs::write(top.join("last"), "").unwrap();
    let mut told = BTreeSet::new();
    while !told.is_superset(&expected) {
        let event = watch.event().await;
        if event.starts_with("created") {
            assert!(event == "created last" || told.insert(event), "told twice");
        }
    }
}

#[tokio::test]
async fn renames_of_new_directories_lose_none() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut watch = watch(&guest, &top, true).await.unwrap();
    for round in 0..50 {
        let (a, b) = (top.join("a"), top.join(format!("b{round}")));
        fs::create_dir_all(a.join("x")).unwrap();
        fs::rename(&a, &b).unwrap();
        fs::create_dir(&a).unwrap();
        fs::rename(&a, top.join(format!("c{round}"))).unwrap();
    }
    // Wherever they are now, they are watched.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for round in 0..50 {
        fs::write(top.join(format!("b{round}/x/f")), "").unwrap();
        fs::write(top.join(format!("c{round}/f")), "").unwrap();
    }
    let mut missing: BTreeSet<_> = (0..50)
        .flat_map(|round| {
            [
                format!("created b{round}/x/f"),
                format!("created c{round}/f"),
            ]
        })
        .collect();
    while !missing.is_empty() {
        let event = watch.event().await;
        missing.remove(&event);
    }
}

#[tokio::test]
async fn a_file_that_is_written_all_the_time_is_told_now_and_then() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut file = fs::File::create(top.join("f")).unwrap();
    let mut watch = watch(&guest, &top, false).await.unwrap();
    let start = Instant::now();
    let writer = std::thread::spawn(move || {
        let over = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < over {
            file.write_all(b"x").unwrap();
            std::thread::sleep(Duration::from_micros(200));
        }
        // Not closed before it is told.
        file
    });
    let mut told = 0;
    while start.elapsed() < Duration::from_millis(1500) {
        assert_eq!(watch.event().await, "written f");
        told += 1;
    }
    let file = writer.join().unwrap();
    // Ten times a second, and the first.
    let most = start.elapsed().as_millis() / 100 + 2;
    assert!(told >= 2 && told <= most, "{told} of {most}");
    drop(file);
    assert_eq!(watch.event().await, "written f");
}

#[tokio::test]
async fn events_that_are_lost_are_told_and_nothing_is_missed_after() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut watch = watch(&guest, &top, true).await.unwrap();
    let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    // The caller does not read: what the agent has taken waits, and so does the rest in
    // the kernel, until that is full.
    let (a, b) = (top.join("a"), top.join("b"));
    fs::write(&a, "").unwrap();
    for _ in 0..2 * most {
        fs::rename(&a, &b).unwrap();
        fs::rename(&b, &a).unwrap();
    }
    fs::create_dir_all(top.join("new/sub")).unwrap();
    loop {
        if let Message::Overflow(_) = watch.message().await.unwrap().unwrap() {
            break;
        }
    }
    fs::write(top.join("new/sub/f"), "").unwrap();
    loop {
        match watch.message().await.unwrap().unwrap() {
            Message::Event(event) if shown(&event) == "created new/sub/f" => break,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_watch_ends_with_what_is_watched() {
    let guest = Guest::start().await;
    let top = top(&guest);
    let mut gone = watch(&guest, &top, true).await.unwrap();
    fs::remove_dir(&top).unwrap();
    assert_eq!(gone.event().await, "removed /");
    assert_eq!(gone.message().await.unwrap(), None);
    let refused = watch(&guest, &top, true).await.err().unwrap();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    let refused = watch(&guest, Path::new("/dev/null"), true)
        .await
        .err()
        .unwrap();
    assert_eq!(reason(&refused).0, "NOT_A_REGULAR_FILE");
}

#[tokio::test]
async fn many_directories_are_watched_and_let_go() {
    let guest = Guest::start().await;
    // Disks have few inodes to spare.
    let top = tempfile::tempdir_in("/dev/shm").unwrap();
    let top = top.path();
    for outer in 0..100 {
        for inner in 0..1000 {
            fs::create_dir_all(top.join(format!("{outer}/{inner}"))).unwrap();
        }
    }
    let mut watch = watch(&guest, top, true).await.unwrap();
    assert_eq!(watch.directories, 100_101);
    fs::write(top.join("99/999/f"), "").unwrap();
    assert_eq!(watch.event().await, "created 99/999/f");
    let held = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", guest.agent_pid())).unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        links
            .filter(|link| link.to_string_lossy().contains("inotify"))
            .count()
    };
    assert_eq!(held(), 1);
    drop(watch);
    until(|| held() == 0).await;
}

#[tokio::test]
async fn too_many_watches_are_refused() {
    // The limits of a user namespace are its own.
    let guest = Guest::start_limited("echo 8 >/proc/sys/user/max_inotify_watches").await;
    let top = top(&guest);
    for index in 0..5 {
        fs::create_dir(top.join(format!("d{index}"))).unwrap();
    }
    let mut first = watch(&guest, &top, true).await.unwrap();
    let refused = watch(&guest, &top, true).await.err().unwrap();
    assert_eq!(reason(&refused).0, "OUT_OF_RESOURCES");
    // Also when it comes to that later.
    for index in 0..5 {
        fs::create_dir(top.join(format!("e{index}"))).unwrap();
    }
    let refused = loop {
        match first.message().await {
            Ok(message) => assert!(matches!(message.unwrap(), Message::Event(_))),
            Err(refused) => break refused,
        }
    };
    assert_eq!(reason(&refused).0, "OUT_OF_RESOURCES");
}
