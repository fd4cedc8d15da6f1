//! FilesystemService: directories and roots.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::*;

use super::{USER, touch};
use crate::common::files::*;
use crate::common::*;

fn relative(entries: &[Entry], folder: &Path) -> Vec<String> {
    let strip = |entry: &Entry| {
        let path = Path::new(std::ffi::OsStr::from_bytes(&entry.path));
        path.strip_prefix(folder).unwrap().display().to_string()
    };
    entries.iter().map(strip).collect()
}

#[tokio::test]
async fn lists_by_depth_and_name_in_pages_of_any_size() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    for path in ["b/2", "b/1", "b/d/x", "a/9", "a-b", "A", "c/e/f/g", "c/z"] {
        touch(top.join(path));
    }
    symlink("b", top.join("link")).unwrap();
    let expected = [
        "A", "a", "a-b", "b", "c", "link", "a/9", "b/1", "b/2", "b/d", "c/e", "c/z", "b/d/x",
        "c/e/f",
    ];
    for page_size in 1..=15 {
        let (entries, pages) = guest.list(at(&top), 3, page_size).await.unwrap();
        assert_eq!(relative(&entries, &top), expected, "pages of {page_size}");
        assert!(pages >= expected.len().div_ceil(page_size as usize));
    }
    let (entries, pages) = guest.list(at(&top), 0, 0).await.unwrap();
    assert_eq!(relative(&entries, &top), expected[..6]);
    assert_eq!((pages, &entries[5].target[..]), (1, &b"b"[..]));
    let (entries, _) = guest.list(at(&top), 256, 0).await.unwrap();
    assert_eq!(entries.len(), 15);

    // What comes and goes between pages disturbs nothing else.
    let page = |page_token| ListRequest {
        path: Some(at(&top)),
        page_size: 2,
        page_token,
        ..ListRequest::default()
    };
    let first = guest
        .files()
        .list(page(bytes::Bytes::new()))
        .await
        .unwrap()
        .into_inner();
    fs::remove_file(top.join("A")).unwrap();
    fs::remove_dir_all(top.join("a")).unwrap();
    touch(top.join("a0"));
    let second = guest
        .files()
        .list(page(first.next_page_token))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(relative(&second.entries, &top), ["a-b", "a0"]);

    for (request, field) in [
        (page("x".into()), "page_token"),
        (page("\u{1}a/b".into()), "page_token"),
        (
            ListRequest {
                depth: 257,
                ..page(bytes::Bytes::new())
            },
            "depth",
        ),
        (
            ListRequest {
                page_size: 10_001,
                ..page(bytes::Bytes::new())
            },
            "page_size",
        ),
    ] {
        assert_eq!(
            fields(&guest.files().list(request).await.unwrap_err()),
            [field]
        );
    }
    let refused = guest.list(at(top.join("a-b")), 1, 0).await.unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_A_DIRECTORY");
    // A token is compared, and leads nowhere.
    let strange = page("\u{1}../../etc".into());
    let strange = ListRequest {
        depth: 3,
        ..strange
    };
    let listed = guest.files().list(strange).await.unwrap().into_inner();
    assert!(
        listed
            .entries
            .iter()
            .all(|entry| entry.path.starts_with(top.as_os_str().as_bytes()))
    );
}

#[tokio::test]
async fn many_names_come_in_pages_that_are_small() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    fs::create_dir(&top).unwrap();
    for index in 0..12_000 {
        fs::write(top.join(format!("{index:05}-{}", "x".repeat(150))), "").unwrap();
    }
    let (entries, pages) = guest.list(at(&top), 1, 10_000).await.unwrap();
    assert_eq!(entries.len(), 12_000);
    assert!(entries.is_sorted_by(|one, other| one.path < other.path));
    assert!(pages > 2, "a page has a limit in bytes, too");
}

#[tokio::test]
async fn what_may_not_be_looked_into_is_listed_itself() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    touch(top.join("closed/x"));
    touch(top.join("open/x"));
    fs::set_permissions(top.join("closed"), PermissionsExt::from_mode(0o700)).unwrap();
    let (entries, _) = guest.list(as_user(&top, USER), 9, 0).await.unwrap();
    assert_eq!(relative(&entries, &top), ["closed", "open", "open/x"]);
    let refused = guest
        .list(as_user(top.join("closed"), USER), 1, 0)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused).0, "PERMISSION_DENIED");
}

#[tokio::test]
async fn removes_trees_and_nothing_else() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    let kept = guest.folder().join("kept/file");
    touch(&kept);
    touch(top.join("a/b/c"));
    symlink(kept.parent().unwrap(), top.join("a/link")).unwrap();
    symlink("nowhere", top.join("a/dangling")).unwrap();
    let refused = guest.remove(at(&top), false).await.unwrap_err();
    assert_eq!(reason(&refused).0, "DIRECTORY_NOT_EMPTY");
    assert_eq!(
        guest
            .remove(at(top.join("a/dangling")), true)
            .await
            .unwrap(),
        1
    );
    // Deeper than descriptors are held.
    let mut deep = top.join("deep");
    for _ in 0..300 {
        deep.push("d");
        touch(deep.join("f"));
    }
    // top, a, b, c, link, and 301 directories with 300 files.
    assert_eq!(guest.remove(at(&top), true).await.unwrap(), 5 + 301 + 300);
    assert!(!top.exists() && kept.exists());

    let refused = guest.remove(at(&top), true).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    let missing = RemoveRequest {
        path: Some(at(top.join("x/y"))),
        missing_ok: true,
        recursive: true,
    };
    assert_eq!(
        guest
            .files()
            .remove(missing)
            .await
            .unwrap()
            .into_inner()
            .removed,
        0
    );
    let file = guest.remove(at(kept.join("")), true).await.unwrap_err();
    assert_eq!(reason(&file).0, "NOT_A_DIRECTORY");
}

#[tokio::test]
async fn the_root_is_never_removed() {
    let guest = Guest::start_as_init().await;
    for path in ["/", "//", "/.", "/..", "/etc/..", "/etc/../", "", ".."] {
        for recursive in [false, true] {
            let refused = guest.remove(at(path), recursive).await.unwrap_err();
            assert_eq!(reason(&refused).0, "FILE_BUSY", "{path:?}");
        }
    }
    // That of a call, too, by whatever name.
    guest
        .sh("mkdir -p /tmp/root/d; touch /tmp/root/d/f; ln -s / /tmp/root/slash")
        .await;
    for path in ["/", "", "d/..", "../..", "slash/"] {
        let refused = guest
            .remove(below("/tmp/root", path), true)
            .await
            .unwrap_err();
        let reason = reason(&refused).0;
        assert!(
            reason == "FILE_BUSY" || reason == "NOT_A_DIRECTORY",
            "{path:?}: {reason}"
        );
    }
    assert_eq!(
        guest
            .sh("test -e /tmp/root/d/f && test -e /etc/passwd")
            .await
            .code(),
        0
    );
    // The proc of its agent, which nobody may remove.
    assert!(guest.remove(at("/proc"), true).await.is_err());
    assert_eq!(guest.sh("test -e /proc/1/status").await.code(), 0);
}

#[tokio::test]
async fn nothing_leads_out_of_a_root() {
    let guest = Guest::start().await;
    let root = guest.folder().join("root");
    let outside = guest.folder().join("outside");
    touch(root.join("etc/passwd"));
    fs::write(&outside, "secret").unwrap();
    let secret = fs::read("/etc/passwd").unwrap();
    symlink("/etc/passwd", root.join("absolute")).unwrap();
    symlink("../outside", root.join("relative")).unwrap();
    symlink("../../../../../../etc/passwd", root.join("dots")).unwrap();
    symlink("/", root.join("slash")).unwrap();

    // Each is what it would be in a machine with this root.
    for path in [
        "absolute",
        "dots",
        "slash/etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
    ] {
        assert_eq!(guest.read(below(&root, path)).await.unwrap(), b"", "{path}");
        guest
            .put(open(below(&root, path), How::Replace), b"new")
            .await
            .unwrap();
        guest
            .put(open(below(&root, path), How::InPlace), b"NEW")
            .await
            .unwrap();
        assert_eq!(fs::read(root.join("etc/passwd")).unwrap(), b"NEW", "{path}");
        fs::write(root.join("etc/passwd"), "").unwrap();
    }
    let refused = guest.read(below(&root, "relative")).await.unwrap_err();
    assert_eq!(reason(&refused).0, "FILE_NOT_FOUND");
    guest
        .put(open(below(&root, "relative"), How::Create), b"inside")
        .await
        .unwrap();
    assert_eq!(fs::read(root.join("outside")).unwrap(), b"inside");
    assert_eq!(fs::read(&outside).unwrap(), b"secret");
    assert_eq!(fs::read("/etc/passwd").unwrap(), secret);

    let moved = MoveRequest {
        from: Some(below(&root, "outside")),
        to: Some(at("../../moved")),
        ..MoveRequest::default()
    };
    guest.files().r#move(moved).await.unwrap();
    assert!(root.join("moved").exists());
    let (entries, _) = guest.list(below(&root, "slash"), 9, 0).await.unwrap();
    assert!(entries.len() < 12, "{entries:?}");
    // Magic links of /proc lead to what the agent has open.
    let proc = guest.read(below("/proc/self", "exe")).await.unwrap_err();
    assert_eq!(reason(&proc).0, "TOO_MANY_LINKS");
    let no_root = guest.read(below(root.join("none"), "x")).await.unwrap_err();
    assert_eq!(reason(&no_root).0, "FILE_NOT_FOUND");
}

/// Two threads swap a directory and a link out of the root, while calls go through it.
#[tokio::test]
async fn a_link_that_is_swapped_in_leads_nowhere() {
    let guest = Guest::start().await;
    let root = guest.folder().join("root");
    let outside = guest.folder().join("outside");
    for folder in [&root, &outside] {
        fs::create_dir(folder).unwrap();
    }
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/file"), "inside").unwrap();
    fs::write(outside.join("file"), "secret").unwrap();
    symlink(&outside, root.join("link")).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let swap = std::thread::spawn({
        let (root, over) = (root.clone(), Arc::clone(&over));
        move || {
            let root = fs::File::open(root).unwrap();
            while !over.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(&root, "d", &root, "link", flags).unwrap();
            }
        }
    });
    let mut read = 0;
    for round in 0..400 {
        match guest.read(below(&root, "d/file")).await {
            Ok(bytes) => {
                assert_eq!(bytes, b"inside");
                read += 1;
            }
            Err(refused) => {
                let reason = reason(&refused).0;
                assert!(
                    ["FILE_NOT_FOUND", "FILE_CHANGED"].contains(&reason.as_str()),
                    "{reason}"
                );
            }
        }
        let name = format!("d/new-{round}");
        let _ = guest
            .put(open(below(&root, &name), How::Replace), b"x")
            .await;
        let _ = guest.remove(below(&root, &name), true).await;
        if let Ok((entries, _)) = guest.list(below(&root, ""), 3, 0).await {
            assert!(entries.iter().all(|entry| entry.size_bytes != 6
                || entry.kind() != FileKind::Regular
                || entry.path.ends_with(b"file")));
        }
    }
    over.store(true, Ordering::Relaxed);
    swap.join().unwrap();
    assert!(read > 0);
    let left: Vec<_> = fs::read_dir(&outside).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"secret");
}

/// The same, while a tree is removed: what the link leads to stays.
#[tokio::test]
async fn a_removal_follows_no_link_that_is_swapped_in() {
    let guest = Guest::start().await;
    let outside = guest.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "kept").unwrap();
    for round in 0..20 {
        let top = guest.folder().join(format!("top-{round}"));
        for index in 0..50 {
            touch(top.join(format!("d/{index}/f")));
        }
        symlink(&outside, top.join("link")).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let swap = std::thread::spawn({
            let (top, over) = (fs::File::open(&top).unwrap(), Arc::clone(&over));
            move || {
                while !over.load(Ordering::Relaxed) {
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    let _ = rustix::fs::renameat_with(&top, "d", &top, "link", flags);
                }
            }
        });
        let _ = guest.remove(at(&top), true).await;
        over.store(true, Ordering::Relaxed);
        swap.join().unwrap();
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"kept");
        let _ = fs::remove_dir_all(&top);
    }
}

// === Search ===
