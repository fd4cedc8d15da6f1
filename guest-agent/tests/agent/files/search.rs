//! FilesystemService: searches.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use soulbox_proto::guest::v1::*;
use tonic::Status;

use super::{USER, touch};
use crate::common::files::*;
use crate::common::*;

struct Searched {
    matches: Vec<SearchMatch>,
    end: SearchEnd,
}

async fn search(guest: &Guest, request: SearchRequest) -> Result<Searched, Status> {
    let mut responses = guest.files().search(request).await?.into_inner();
    let mut matches = Vec::new();
    loop {
        match responses.message().await?.unwrap().message.unwrap() {
            search_response::Message::Match(found) => matches.push(found),
            search_response::Message::End(end) => {
                assert!(responses.message().await?.is_none());
                return Ok(Searched { matches, end });
            }
        }
    }
}

impl Searched {
    /// Paths below the folder, with lines.
    fn lines(&self, folder: &Path) -> BTreeSet<String> {
        let folder = folder.display().to_string() + "/";
        let line = |found: &SearchMatch| {
            let path = String::from_utf8(found.path.to_vec()).unwrap();
            let path = path.strip_prefix(&folder).unwrap_or(&path).to_owned();
            match found.line_number {
                0 => path,
                number => format!("{path}:{number}"),
            }
        };
        self.matches.iter().map(line).collect()
    }
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// A small project.
fn project(guest: &Guest) -> PathBuf {
    let top = guest.folder().join("project");
    for (path, text) in [
        ("src/main.rs", "fn main() {\n    // needle 1\n}\n"),
        (
            "src/lib.rs",
            "// NEEDLE\n\npub fn f() {}\n// needle needle\n",
        ),
        ("src/gen/out.rs", "needle\n"),
        ("target/x.rs", "needle\n"),
        (".gitignore", "target/\n*.log\n"),
        ("src/.gitignore", "gen\n!kept.log\n"),
        ("src/kept.log", "needle"),
        ("a.log", "needle"),
        (".hidden/x.rs", "needle\n"),
        ("binary", "needle\0needle\n"),
    ] {
        touch(top.join(path));
        fs::write(top.join(path), text).unwrap();
    }
    top
}

#[tokio::test]
async fn searches_content_but_what_is_ignored() {
    let guest = Guest::start().await;
    let top = project(&guest);
    fs::write(top.join("binary"), [&[0; 10][..], b"needle\n"].concat()).unwrap();
    let request = SearchRequest {
        path: Some(at(&top)),
        pattern: "needle".to_owned(),
        ..SearchRequest::default()
    };
    let found = search(&guest, request.clone()).await.unwrap();
    assert_eq!(
        found.lines(&top),
        set(["src/main.rs:2", "src/lib.rs:4", "src/kept.log:1"])
    );
    assert_eq!(
        (found.end.matches, found.end.truncated, found.end.unreadable),
        (3, false, 0)
    );
    let twice = found
        .matches
        .iter()
        .find(|found| found.line_number == 4)
        .unwrap();
    assert_eq!(&twice.line[..], b"// needle needle");
    let ranges: Vec<_> = twice
        .ranges
        .iter()
        .map(|range| (range.start, range.end))
        .collect();
    assert_eq!(ranges, [(3, 9), (10, 16)]);

    let all = SearchRequest {
        no_ignore: true,
        hidden: true,
        case_insensitive: true,
        globs: vec!["*.rs".to_owned(), "!gen/".to_owned()],
        ..request.clone()
    };
    let expected = [
        "src/main.rs:2",
        "src/lib.rs:1",
        "src/lib.rs:4",
        "target/x.rs:1",
        ".hidden/x.rs:1",
    ];
    assert_eq!(
        search(&guest, all).await.unwrap().lines(&top),
        set(expected)
    );

    let context = SearchRequest {
        path: Some(at(top.join("src/lib.rs"))),
        context_lines: 1,
        ..request.clone()
    };
    let found = search(&guest, context).await.unwrap();
    let lines: Vec<_> = found
        .matches
        .iter()
        .map(|found| (found.line_number, found.context))
        .collect();
    assert_eq!(lines, [(3, true), (4, false)]);

    let few = SearchRequest {
        max_matches: 2,
        ..request.clone()
    };
    let found = search(&guest, few).await.unwrap();
    assert_eq!((found.matches.len(), found.end.truncated), (2, true));
    let shallow = SearchRequest {
        max_depth: 1,
        ..request.clone()
    };
    assert!(search(&guest, shallow).await.unwrap().matches.is_empty());
    let literal = SearchRequest {
        pattern: "f() {".to_owned(),
        literal: true,
        ..request
    };
    assert_eq!(
        search(&guest, literal).await.unwrap().lines(&top),
        set(["src/lib.rs:3"])
    );
}

#[tokio::test]
async fn finds_files_by_name() {
    let guest = Guest::start().await;
    let top = project(&guest);
    let request = SearchRequest {
        path: Some(at(&top)),
        globs: vec!["*.rs".to_owned()],
        ..SearchRequest::default()
    };
    let found = search(&guest, request.clone()).await.unwrap();
    // A glob that names a file wants it, also where it is ignored itself.
    assert_eq!(found.lines(&top), set(["src/main.rs", "src/lib.rs"]));
    assert!(
        found
            .matches
            .iter()
            .all(|found| found.kind() == FileKind::Regular)
    );
    let all = SearchRequest {
        globs: Vec::new(),
        ..request
    };
    let expected = ["binary", "src", "src/kept.log", "src/lib.rs", "src/main.rs"];
    assert_eq!(
        search(&guest, all).await.unwrap().lines(&top),
        set(expected)
    );
}

#[tokio::test]
async fn a_search_stays_below_its_root_and_within_its_rights() {
    let guest = Guest::start().await;
    let top = project(&guest);
    symlink("/etc", top.join("src/etc")).unwrap();
    symlink("/etc/passwd", top.join("src/passwd")).unwrap();
    touch(top.join("src/closed"));
    fs::write(top.join("src/closed"), "needle").unwrap();
    fs::set_permissions(top.join("src/closed"), PermissionsExt::from_mode(0o600)).unwrap();
    let request = SearchRequest {
        path: Some(FilePath {
            user: USER.to_owned(),
            ..below(&top, "/src")
        }),
        pattern: "root|needle 1".to_owned(),
        ..SearchRequest::default()
    };
    let found = search(&guest, request).await.unwrap();
    assert_eq!(found.lines(&top), set(["/src/main.rs:2"]));
    assert_eq!(found.end.unreadable, 1);
}

#[tokio::test]
async fn patterns_that_are_none_or_too_large_are_refused() {
    let guest = Guest::start().await;
    let top = project(&guest);
    let request = |pattern: &str| SearchRequest {
        path: Some(at(&top)),
        pattern: pattern.to_owned(),
        ..SearchRequest::default()
    };
    for pattern in [
        "(",
        "a{1000}{1000}{1000}",
        r"\p{L}{5000}",
        "a\nb",
        &"x".repeat(65_537),
    ] {
        let refused = search(&guest, request(pattern)).await.err().unwrap();
        assert_eq!(fields(&refused), ["pattern"], "{pattern:.20}");
    }
    let refused = search(
        &guest,
        SearchRequest {
            globs: vec!["a".to_owned(), "{".to_owned()],
            context_lines: 101,
            ..request("x")
        },
    );
    assert_eq!(fields(&refused.await.err().unwrap()), ["context_lines"]);
    let glob = SearchRequest {
        globs: vec!["a".to_owned(), "[z-a]".to_owned()],
        ..request("x")
    };
    assert_eq!(
        fields(&search(&guest, glob).await.err().unwrap()),
        ["globs[1]"]
    );
    // One that other engines would take for ever for.
    fs::write(top.join("a.txt"), "a".repeat(50_000) + "!\n").unwrap();
    let found = search(&guest, request("(a+)+$")).await.unwrap();
    assert_eq!(found.end.matches, 0);
}

#[tokio::test]
async fn lines_and_results_have_bounds() {
    let guest = Guest::start().await;
    let top = guest.folder().join("top");
    touch(top.join("long"));
    fs::write(top.join("long"), "x".repeat(1 << 20) + "needle\nneedle\n").unwrap();
    let request = SearchRequest {
        path: Some(at(&top)),
        pattern: "needle".to_owned(),
        max_matches: 100_000,
        ..SearchRequest::default()
    };
    let found = search(&guest, request.clone()).await.unwrap();
    assert_eq!(found.matches.len(), 2);
    assert_eq!(found.matches[0].line.len(), 4096);
    // More matches than are held at once are told all, in order and once.
    let text: String = (0..60_000).map(|line| format!("needle {line}\n")).collect();
    fs::write(top.join("long"), text).unwrap();
    let found = search(&guest, request).await.unwrap();
    assert_eq!(found.matches.len(), 60_000);
    let numbers = found.matches.iter().map(|found| found.line_number);
    assert!(numbers.eq(1..=60_000));
    assert!(peak_resident_kib(guest.agent_pid()) < 64 << 10);
}
