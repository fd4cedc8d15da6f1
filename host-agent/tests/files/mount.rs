//! The mount, used by real programs, and what happens around it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};
use rustix::process::Signal;

use crate::Case;
use crate::world::{SmallDisk, World, noise, sh, snapshot, until};

pub const ALL: &[Case] = &[
    ("mount::real_programs_work_in_it", real_programs_work_in_it),
    (
        "mount::a_repository_is_kept_in_it",
        a_repository_is_kept_in_it,
    ),
    ("mount::a_database_is_kept_in_it", a_database_is_kept_in_it),
    (
        "mount::bytes_are_where_they_should_be",
        bytes_are_where_they_should_be,
    ),
    (
        "mount::names_and_attributes_are_set",
        names_and_attributes_are_set,
    ),
    (
        "mount::extended_attributes_are_kept",
        extended_attributes_are_kept,
    ),
    (
        "mount::a_removed_file_lives_while_it_is_open",
        a_removed_file_lives_while_it_is_open,
    ),
    (
        "mount::a_large_directory_is_listed_whole",
        a_large_directory_is_listed_whole,
    ),
    (
        "mount::what_the_kernel_has_needs_no_guest",
        what_the_kernel_has_needs_no_guest,
    ),
    (
        "mount::changes_of_the_guest_are_seen",
        changes_of_the_guest_are_seen,
    ),
    (
        "mount::no_race_leaves_old_content",
        no_race_leaves_old_content,
    ),
    ("mount::a_full_disk_is_told", a_full_disk_is_told),
    (
        "mount::read_only_refuses_changes",
        read_only_refuses_changes,
    ),
    (
        "mount::another_user_is_refused_what_is_not_its",
        another_user_is_refused_what_is_not_its,
    ),
    (
        "mount::files_without_a_size_are_read",
        files_without_a_size_are_read,
    ),
    (
        "mount::it_goes_when_the_sandbox_goes",
        it_goes_when_the_sandbox_goes,
    ),
    (
        "mount::an_agent_that_comes_back_is_used",
        an_agent_that_comes_back_is_used,
    ),
    (
        "mount::it_ends_as_it_is_asked_to",
        it_ends_as_it_is_asked_to,
    ),
    (
        "mount::a_killed_one_is_cleared_away",
        a_killed_one_is_cleared_away,
    ),
    (
        "mount::what_cannot_be_mounted_is_said",
        what_cannot_be_mounted_is_said,
    ),
];

fn real_programs_work_in_it() {
    let world = World::start();
    let mounted = world.mount();
    let source = world.host().join("source");
    fs::create_dir(&source).unwrap();
    sh(
        &source,
        "mkdir -p a/b/c 'with space' && echo hello >a/b/c/file
         ln -s c/file a/b/link && printf 'x%.0s' {1..100000} >a/large
         chmod 640 a/large && chmod 750 'with space' && touch -d 2001-02-03T04:05:06.5 a/b/c/file",
    );
    fs::write(source.join("noise"), noise(3 << 20, 1)).unwrap();
    sh(mounted.path(), &format!("cp -a {}/. .", source.display()));
    assert_eq!(snapshot(mounted.path()), snapshot(&source));
    assert_eq!(snapshot(&world.guest()), snapshot(&source));

    let found = sh(mounted.path(), "find . -type f | sort | tr '\\n' ' '");
    assert_eq!(found.trim(), "./a/b/c/file ./a/large ./noise");
    sh(
        mounted.path(),
        "mv a moved && mv noise moved/b/ && test ! -e a && cmp moved/b/noise ../host/source/noise
         dd if=moved/b/noise of=dd.out bs=64k status=none && cmp dd.out moved/b/noise
         dd if=/dev/zero of=dd.out bs=4k count=1 seek=3 conv=notrunc,fsync status=none
         tar -cf all.tar moved && mkdir out && tar -xf all.tar -C out && diff -r moved out/moved
         sed -i s/hello/goodbye/ moved/b/c/file && grep -q goodbye moved/b/link
         echo one >log && echo two >>log && test \"$(wc -l <log)\" = 2
         python3 -c 'import os
os.makedirs(\"p/q\")
with open(\"p/q/f\", \"w+\") as f:
    f.write(\"abc\" * 10000); f.flush(); f.seek(3); assert f.read(3) == \"abc\"
    f.truncate(5)
assert os.path.getsize(\"p/q/f\") == 5
os.replace(\"p/q/f\", \"p/g\"); assert os.listdir(\"p/q\") == []'
         rm -r out moved p",
    );
    let left = sh(mounted.path(), "ls -A | sort | tr '\\n' ' '");
    assert_eq!(left.trim(), "all.tar dd.out log with space");
    assert_eq!(snapshot(mounted.path()), snapshot(&world.guest()));
}

fn a_repository_is_kept_in_it() {
    let world = World::start();
    let mounted = world.mount();
    sh(
        mounted.path(),
        "git init -q -b main repo && cd repo
         for i in $(seq 60); do mkdir -p d$((i % 7)); echo file $i >d$((i % 7))/$i; done
         git add . && git commit -qm first
         git mv d1 e1 && echo changed >>d2/2 && git commit -qam second
         git checkout -q HEAD~1 && test -d d1 && git checkout -q main && test -d e1
         git gc -q && git fsck --strict 2>&1 | grep -v dangling || true
         git clone -q . ../clone && test -z \"$(git status --porcelain)\"",
    );
    // Without the mount it is the same repository.
    let log = sh(
        &world.guest().join("repo"),
        "git status --porcelain; git log --oneline | wc -l",
    );
    assert_eq!(log.trim(), "2");
    sh(&world.guest().join("clone"), "git fsck --strict");
}

/// Locks, a journal that is removed, and reads and writes in no order.
fn a_database_is_kept_in_it() {
    let world = World::start();
    let mounted = world.mount();
    let script = "import sqlite3, sys
db = sqlite3.connect('data.db')
db.execute('create table t (k integer primary key, v blob)')
for i in range(200):
    with db:
        db.execute('insert into t values (?, ?)', (i * 7919 % 200, bytes([i]) * 3000))
with db:
    db.execute('delete from t where k % 3 = 0')
db.execute('vacuum')
assert db.execute('pragma integrity_check').fetchone() == ('ok',)
print(db.execute('select count(*), sum(length(v)) from t').fetchone())";
    fs::write(world.host().join("db.py"), script).unwrap();
    let run = format!("python3 {}/db.py", world.host().display());
    assert_eq!(sh(mounted.path(), &run).trim(), "(133, 399000)");
    let check = "python3 -c \"import sqlite3; print(sqlite3.connect('data.db').execute('pragma integrity_check').fetchone()[0])\"";
    assert_eq!(sh(&world.guest(), check).trim(), "ok");
}

fn bytes_are_where_they_should_be() {
    let world = World::start();
    let mounted = world.mount();
    let (here, there) = (mounted.join("file"), world.guest().join("file"));
    let mut expected = noise(20 << 20, 2);
    fs::write(&here, &expected).unwrap();
    assert!(fs::read(&there).unwrap() == expected);
    assert!(fs::read(&here).unwrap() == expected);
    // In no order, through two descriptors, with reads between.
    let one = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&here)
        .unwrap();
    let other = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&here)
        .unwrap();
    let mut state = 12345_u64;
    for round in 0..200_u64 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let length = usize::try_from(state >> 40).unwrap() % 100_000 + 1;
        let offset = usize::try_from(state >> 20).unwrap() % (expected.len() + 1000);
        let data = noise(length, round + 3);
        let file = if round % 2 == 0 { &one } else { &other };
        file.write_all_at(&data, offset as u64).unwrap();
        if offset + length > expected.len() {
            expected.resize(offset + length, 0);
        }
        expected[offset..offset + length].copy_from_slice(&data);
        let from = offset.saturating_sub(5000);
        let mut back = vec![0; (length + 5000).min(expected.len() - from)];
        let reader = if round % 3 == 0 { &one } else { &other };
        reader.read_exact_at(&mut back, from as u64).unwrap();
        assert!(back == expected[from..from + back.len()], "round {round}");
        assert_eq!(one.metadata().unwrap().len(), expected.len() as u64);
    }
    one.sync_all().unwrap();
    assert!(fs::read(&there).unwrap() == expected);
    // Shorter, longer, and at the end.
    one.set_len(1000).unwrap();
    one.set_len(3000).unwrap();
    expected.truncate(1000);
    expected.resize(3000, 0);
    let mut append = OpenOptions::new().append(true).open(&here).unwrap();
    for _ in 0..10 {
        append.write_all(b"more").unwrap();
        // The guest's end is the end.
        let mut end = OpenOptions::new().append(true).open(&there).unwrap();
        end.write_all(b"guest").unwrap();
    }
    drop(append);
    drop((one, other));
    let now = fs::read(&there).unwrap();
    assert!(now.starts_with(&expected));
    let text = String::from_utf8(now[3000..].to_vec()).unwrap();
    assert_eq!(text.matches("more").count(), 10);
    assert_eq!(text.matches("guest").count(), 10);
    until(|| fs::read(&here).unwrap() == now);
    // Truncated when it is opened.
    fs::write(&here, "short").unwrap();
    assert_eq!(fs::read(&there).unwrap(), b"short");
    // Through a mapping, as linkers write.
    let script = "import mmap
with open('file', 'r+b') as f:
    f.truncate(10000)
    m = mmap.mmap(f.fileno(), 10000); m[5000:5005] = b'magic'; m.flush(); m.close()";
    sh(mounted.path(), &format!("python3 -c \"{script}\""));
    assert_eq!(&fs::read(&there).unwrap()[5000..5005], b"magic");
}

fn names_and_attributes_are_set() {
    let world = World::start();
    let mounted = world.mount();
    let (here, there) = (mounted.path(), world.guest());
    fs::create_dir(here.join("dir")).unwrap();
    fs::write(here.join("one"), "1").unwrap();
    fs::write(here.join("two"), "2").unwrap();
    let refused = renameat_with(
        CWD,
        here.join("one"),
        CWD,
        here.join("two"),
        RenameFlags::NOREPLACE,
    );
    assert_eq!(refused, Err(rustix::io::Errno::EXIST));
    renameat_with(
        CWD,
        here.join("one"),
        CWD,
        here.join("two"),
        RenameFlags::EXCHANGE,
    )
    .unwrap();
    assert_eq!(fs::read(here.join("one")).unwrap(), b"2");
    assert_eq!(fs::read(there.join("two")).unwrap(), b"1");
    renameat_with(
        CWD,
        here.join("one"),
        CWD,
        here.join("three"),
        RenameFlags::NOREPLACE,
    )
    .unwrap();
    fs::rename(here.join("three"), here.join("two")).unwrap();
    assert_eq!(fs::read(there.join("two")).unwrap(), b"2");
    assert!(!there.join("three").exists());

    // What is in a directory that is moved goes on.
    let mut open = File::create(here.join("dir/open")).unwrap();
    open.write_all(b"before ").unwrap();
    fs::rename(here.join("dir"), here.join("moved")).unwrap();
    open.write_all(b"after").unwrap();
    drop(open);
    assert_eq!(fs::read(there.join("moved/open")).unwrap(), b"before after");
    assert_eq!(fs::read(here.join("moved/open")).unwrap(), b"before after");

    let error = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    assert_eq!(error(fs::create_dir(here.join("moved"))), libc::EEXIST);
    assert_eq!(error(fs::remove_dir(here.join("moved"))), libc::ENOTEMPTY);
    assert_eq!(error(fs::remove_file(here.join("none"))), libc::ENOENT);
    assert_eq!(
        error(File::open(here.join("two/x")).map(drop)),
        libc::ENOTDIR
    );
    assert_eq!(
        error(fs::hard_link(here.join("two"), here.join("hard"))),
        libc::EPERM
    );
    assert_eq!(
        error(fs::write(here.join("x".repeat(256)), "")),
        libc::ENAMETOOLONG
    );
    sh(here, "! mkfifo pipe 2>/dev/null");

    symlink("../else/where", here.join("link")).unwrap();
    assert_eq!(
        fs::read_link(there.join("link")).unwrap(),
        Path::new("../else/where")
    );
    assert_eq!(
        fs::read_link(here.join("link")).unwrap(),
        Path::new("../else/where")
    );

    sh(
        here,
        "chown 12:34 two && chmod 4751 two && touch -d '1969-12-31T23:59:58Z' two",
    );
    for root in [here, &there] {
        let two = fs::metadata(root.join("two")).unwrap();
        assert_eq!(two.permissions().mode() & 0o7777, 0o4751);
        assert_eq!((two.uid(), two.gid()), (12, 34));
        assert_eq!((two.mtime(), two.mtime_nsec()), (-2, 0));
    }
    // Made without w for its owner, and written to all the same, as git does.
    sh(
        here,
        "umask 333; echo sealed >sealed; test \"$(stat -c %a sealed)\" = 444",
    );
    until(|| {
        fs::metadata(there.join("sealed"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
            == 0o444
    });
    assert_eq!(fs::read(there.join("sealed")).unwrap(), b"sealed\n");
    // Programs see the numbers that the guest's programs see.
    let inode = |root: &Path| fs::metadata(root.join("moved/open")).unwrap().ino();
    assert_eq!(inode(here), inode(&there));
    let source = sh(here, "df --output=source . | tail -1");
    assert!(source.starts_with(crate::world::SANDBOX), "{source}");
}

fn extended_attributes_are_kept() {
    let world = World::start();
    let mounted = world.mount();
    let file = mounted.join("file");
    fs::write(&file, "").unwrap();
    let set = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&file, name, value, flags);
    let get = |name: &str| {
        let mut value = vec![0; 100];
        let length = rustix::fs::getxattr(&file, name, &mut value[..])?;
        value.truncate(length);
        Ok::<_, rustix::io::Errno>(value)
    };
    if set("user.one", b"first", XattrFlags::CREATE).is_err() {
        // Some machines' temporary files have none.
        let there = world.guest().join("file");
        let refused = rustix::fs::setxattr(there, "user.one", b"first", XattrFlags::empty());
        assert!(refused.is_err());
        return;
    }
    assert_eq!(
        set("user.one", b"", XattrFlags::CREATE),
        Err(rustix::io::Errno::EXIST)
    );
    assert_eq!(
        set("user.two", b"", XattrFlags::REPLACE),
        Err(rustix::io::Errno::NODATA)
    );
    set("user.one", b"second", XattrFlags::REPLACE).unwrap();
    assert_eq!(get("user.one").unwrap(), b"second");
    let mut names = [0; 100];
    let length = rustix::fs::listxattr(&file, &mut names[..]).unwrap();
    assert_eq!(&names[..length], b"user.one\0");
    let mut there = [0; 100];
    let length =
        rustix::fs::getxattr(world.guest().join("file"), "user.one", &mut there[..]).unwrap();
    assert_eq!(&there[..length], b"second");
    rustix::fs::removexattr(&file, "user.one").unwrap();
    assert_eq!(get("user.one"), Err(rustix::io::Errno::NODATA));
    assert_eq!(get("security.capability"), Err(rustix::io::Errno::NODATA));
}

fn a_removed_file_lives_while_it_is_open() {
    let world = World::start();
    let mounted = world.mount();
    let path = mounted.join("file");
    fs::write(&path, "before").unwrap();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!path.exists());
    fs::write(&path, "another").unwrap();
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(b" and after").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before and after");
    // The same where another takes its place.
    let mut old = File::open(&path).unwrap();
    fs::write(mounted.join("new"), "new").unwrap();
    fs::rename(mounted.join("new"), &path).unwrap();
    text.clear();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "another");
    drop((file, old));
    // Nothing is left of them in the guest.
    let names = || {
        let entries = fs::read_dir(world.guest()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    until(|| names() == ["file"]);
    assert_eq!(fs::read(world.guest().join("file")).unwrap(), b"new");
}

fn a_large_directory_is_listed_whole() {
    const FILES: usize = 3500;
    let world = World::start();
    let large = world.guest().join("large");
    fs::create_dir(&large).unwrap();
    for number in 0..FILES {
        fs::write(large.join(format!("{number:05}")), "x").unwrap();
    }
    let mounted = world.mount();
    // Once from the guest, once from what was kept.
    for _ in 0..2 {
        let mut names: Vec<_> = fs::read_dir(mounted.join("large"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), FILES);
        assert!(
            names
                .iter()
                .enumerate()
                .all(|(at, name)| *name == format!("{at:05}"))
        );
    }
    let sizes = sh(
        mounted.path(),
        "ls -l large | awk '{ n += $5 } END { print n }'",
    );
    assert_eq!(sizes.trim(), FILES.to_string());
    sh(mounted.path(), "rm -r large");
    assert!(!large.exists());
}

/// With the agent stopped, nothing but a cache can answer.
fn what_the_kernel_has_needs_no_guest() {
    let world = World::start();
    fs::create_dir(world.guest().join("dir")).unwrap();
    fs::write(world.guest().join("dir/file"), "content").unwrap();
    symlink("file", world.guest().join("dir/link")).unwrap();
    let mounted = world.mount();
    let look = || {
        let found = fs::metadata(mounted.join("dir/file")).unwrap();
        let names = fs::read_dir(mounted.join("dir")).unwrap().count();
        let content = fs::read(mounted.join("dir/link")).unwrap();
        let is_absent = fs::metadata(mounted.join("dir/none")).is_err();
        (found.len(), names, content, is_absent)
    };
    let first = look();
    assert_eq!(first, (7, 2, b"content".to_vec(), true));
    // What came before a change settled is asked for once more.
    look();
    world.signal_agent(Signal::STOP);
    let kept = std::panic::catch_unwind(std::panic::AssertUnwindSafe(look));
    world.signal_agent(Signal::CONT);
    assert_eq!(kept.unwrap(), first);
}

fn changes_of_the_guest_are_seen() {
    let world = World::start();
    let (guest, mounted) = (world.guest(), world.mount());
    let here = |name: &str| mounted.join(name);
    fs::create_dir_all(guest.join("dir/inner")).unwrap();
    fs::write(guest.join("dir/inner/file"), "one").unwrap();
    let read = |name: &str| fs::read_to_string(here(name)).ok();
    until(|| read("dir/inner/file").as_deref() == Some("one"));
    for round in 0..20 {
        // Its size and its content, with the size the same.
        fs::write(guest.join("dir/inner/file"), format!("{round:03}")).unwrap();
        until(|| read("dir/inner/file") == Some(format!("{round:03}")));
    }
    // Through a descriptor that was open before.
    let open = File::open(here("dir/inner/file")).unwrap();
    let mut bytes = [0; 3];
    open.read_exact_at(&mut bytes, 0).unwrap();
    let writer = OpenOptions::new()
        .write(true)
        .open(guest.join("dir/inner/file"))
        .unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    drop(writer);
    until(|| open.read_exact_at(&mut bytes, 0).is_ok() && &bytes == b"new");
    // Made, where it was known not to be; replaced; removed.
    assert_eq!(read("made"), None);
    fs::write(guest.join("made"), "made").unwrap();
    until(|| read("made").as_deref() == Some("made"));
    fs::write(guest.join("other"), "replaced").unwrap();
    fs::rename(guest.join("other"), guest.join("made")).unwrap();
    until(|| read("made").as_deref() == Some("replaced") && read("other").is_none());
    fs::remove_file(guest.join("made")).unwrap();
    until(|| !here("made").exists());
    // Modes and links.
    fs::write(guest.join("mode"), "").unwrap();
    for mode in [0o600, 0o755] {
        fs::set_permissions(guest.join("mode"), fs::Permissions::from_mode(mode)).unwrap();
        until(|| fs::metadata(here("mode")).is_ok_and(|found| found.mode() & 0o777 == mode));
    }
    symlink("mode", guest.join("link")).unwrap();
    until(|| fs::read_link(here("link")).is_ok_and(|target| target == Path::new("mode")));
    fs::remove_file(guest.join("link")).unwrap();
    symlink("elsewhere", guest.join("link")).unwrap();
    until(|| fs::read_link(here("link")).is_ok_and(|target| target == Path::new("elsewhere")));
    // Directories that move, with what is in them, and another in their place.
    fs::rename(guest.join("dir"), guest.join("moved")).unwrap();
    until(|| read("moved/inner/file").as_deref() == Some("new") && !here("dir").exists());
    fs::create_dir_all(guest.join("dir/inner")).unwrap();
    fs::write(guest.join("dir/inner/file"), "another").unwrap();
    until(|| read("dir/inner/file").as_deref() == Some("another"));
    fs::write(guest.join("moved/inner/file"), "moved on").unwrap();
    until(|| read("moved/inner/file").as_deref() == Some("moved on"));
    // Listings.
    let names = || fs::read_dir(here("dir/inner")).unwrap().count();
    assert_eq!(names(), 1);
    for number in 0..10 {
        fs::write(guest.join(format!("dir/inner/{number}")), "").unwrap();
    }
    until(|| names() == 11);
    // More than a watch keeps: it says so, and all is asked for anew.
    let many = guest.join("many");
    fs::create_dir(&many).unwrap();
    until(|| here("many").exists());
    sh(
        &guest,
        "for i in $(seq 300); do for j in 1 2 3; do echo $j >many/$i; done; done",
    );
    until(|| (1..=300).all(|number| read(&format!("many/{number}")).as_deref() == Some("3\n")));
}

/// Readers run while the guest writes: whatever interleaves, the last is seen.
fn no_race_leaves_old_content() {
    let world = World::start();
    let guest = world.guest();
    let mounted = world.mount();
    let files: Vec<_> = (0..4).map(|number| format!("file-{number}")).collect();
    let over = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|threads| {
        for name in &files {
            let (source, target) = (guest.join(name), mounted.join(name));
            threads.spawn(move || {
                let mut round = 0_u32;
                while Instant::now() < over {
                    round += 1;
                    let text = format!("{round} {}", "x".repeat((round % 50) as usize));
                    match round % 3 {
                        0 => fs::write(&source, text).unwrap(),
                        1 => {
                            let fresh = source.with_extension("fresh");
                            fs::write(&fresh, text).unwrap();
                            fs::rename(&fresh, &source).unwrap();
                        }
                        _ => {
                            let _ = fs::remove_file(&source);
                        }
                    }
                }
                fs::write(&source, format!("last of {round}")).unwrap();
            });
            threads.spawn(move || {
                while Instant::now() < over {
                    let _ = fs::read(&target);
                    let _ = fs::metadata(&target);
                    let _ = fs::read_dir(target.parent().unwrap()).unwrap().count();
                }
            });
        }
    });
    for name in &files {
        let last = fs::read(guest.join(name)).unwrap();
        assert!(last.starts_with(b"last"));
        until(|| fs::read(mounted.join(name)).is_ok_and(|seen| seen == last));
        let size = last.len() as u64;
        until(|| fs::metadata(mounted.join(name)).unwrap().len() == size);
    }
    until(|| {
        fs::read_dir(mounted.path()).unwrap().count() == fs::read_dir(&guest).unwrap().count()
    });
}

fn a_full_disk_is_told() {
    let world = World::start();
    let _disk = SmallDisk::on(&world.guest().join("small"), "4m");
    let mounted = world.mount();
    let path = mounted.join("small/file");
    let written = || {
        let mut file = File::create(&path)?;
        file.write_all(&noise(8 << 20, 3))?;
        file.sync_all()
    };
    let full = written().unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    // What is shown is what is there.
    let there = fs::read(world.guest().join("small/file")).unwrap();
    assert!(there.len() <= 4 << 20);
    assert!(fs::read(&path).unwrap() == there);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "there is room again").unwrap();
}

fn read_only_refuses_changes() {
    let world = World::start();
    fs::write(world.guest().join("file"), "text").unwrap();
    let mounted = world.mount_as("root", &["--read-only"]);
    assert_eq!(fs::read(mounted.join("file")).unwrap(), b"text");
    let refused = fs::write(mounted.join("file"), "other").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let refused = fs::create_dir(mounted.join("dir")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(fs::read(world.guest().join("file")).unwrap(), b"text");
}

/// The rights are those of the sandbox's user, whoever asks here.
fn another_user_is_refused_what_is_not_its() {
    let world = World::start();
    let open =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    open(world.guest().parent().unwrap(), 0o755);
    open(&world.guest(), 0o777);
    fs::write(world.guest().join("secret"), "secret").unwrap();
    open(&world.guest().join("secret"), 0o600);
    fs::write(world.guest().join("shown"), "shown").unwrap();
    open(&world.guest().join("shown"), 0o644);
    let mounted = world.mount_as("12345:12345", &[]);
    let denied = |result: std::io::Result<File>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
    };
    denied(File::open(mounted.join("secret")));
    denied(OpenOptions::new().append(true).open(mounted.join("shown")));
    assert_eq!(fs::read(mounted.join("shown")).unwrap(), b"shown");
    fs::write(mounted.join("own"), "own").unwrap();
    assert_eq!(
        fs::metadata(world.guest().join("own")).unwrap().uid(),
        12345
    );
    // It may not open it again for writing; it has it open.
    sh(mounted.path(), "umask 333; echo sealed >sealed");
    assert_eq!(fs::read(world.guest().join("sealed")).unwrap(), b"sealed\n");
}

fn files_without_a_size_are_read() {
    let world = World::start();
    let directory = world.host().join("proc");
    fs::create_dir(&directory).unwrap();
    let mut command = world.soulbox();
    command.args([
        "mount",
        "--user",
        "root",
        &format!("{}:/", crate::world::SANDBOX),
    ]);
    // Of the whole machine, to have /proc in it as another filesystem. Its watch is
    // not waited for.
    let mut child = command.arg(&directory).spawn().unwrap();
    let version = directory.join("proc/version");
    until(|| fs::read(&version).is_ok_and(|text| text.starts_with(b"Linux version")));
    let uptime = || fs::read_to_string(directory.join("proc/uptime")).unwrap();
    let first = uptime();
    until(|| uptime() != first);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert!(crate::world::wait(&mut child).success());
}

fn it_goes_when_the_sandbox_goes() {
    let mut world = World::start();
    fs::write(world.guest().join("file"), "text").unwrap();
    let mut mounted = world.mount();
    let open = File::open(mounted.join("file")).unwrap();
    world.kill_agent();
    let (status, said) = mounted.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("the sandbox is gone"), "{said}");
    assert!(!mounted.is_mounted());
    assert!(fs::read_dir(mounted.path()).unwrap().next().is_none());
    // And who still has something of it hears so.
    let mut byte = [0];
    let refused = open.read_at(&mut byte, 1 << 20).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOTCONN));
}

/// As when soulboxd restarts: sandboxes run on.
fn an_agent_that_comes_back_is_used() {
    let mut world = World::start();
    fs::write(world.guest().join("file"), "before").unwrap();
    let mounted = world.mount();
    assert_eq!(fs::read(mounted.join("file")).unwrap(), b"before");
    world.kill_agent();
    fs::write(world.guest().join("file"), "between").unwrap();
    world.start_agent();
    until(|| fs::read(mounted.join("file")).is_ok_and(|text| text == b"between"));
    fs::write(world.guest().join("file"), "after").unwrap();
    until(|| fs::read(mounted.join("file")).is_ok_and(|text| text == b"after"));
}

fn it_ends_as_it_is_asked_to() {
    let world = World::start();
    for signal in [Signal::INT, Signal::TERM] {
        let mut mounted = world.mount();
        let name = format!("written-{}", signal.as_raw());
        let mut open = File::create(mounted.join(&name)).unwrap();
        open.write_all(b"on its way").unwrap();
        mounted.signal(signal);
        let (status, said) = mounted.ended();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""));
        assert!(!mounted.is_mounted());
        // What was written is there, though nobody closed it.
        assert_eq!(fs::read(world.guest().join(&name)).unwrap(), b"on its way");
    }
    let mut mounted = world.mount();
    let flags = rustix::mount::UnmountFlags::empty();
    rustix::mount::unmount(mounted.path(), flags).unwrap();
    let (status, said) = mounted.ended();
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
}

fn a_killed_one_is_cleared_away() {
    let world = World::start();
    fs::write(world.guest().join("file"), "text").unwrap();
    let mut mounted = world.mount();
    mounted.signal(Signal::KILL);
    mounted.ended();
    let dead = fs::metadata(mounted.path()).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN));
    let again = world.mount_on(mounted.path(), "root", &[]);
    assert_eq!(fs::read(again.join("file")).unwrap(), b"text");
}

fn what_cannot_be_mounted_is_said() {
    let world = World::start();
    let mounted = world.mount();
    let says = |directory: &Path, place: &str| {
        let mut command = world.soulbox();
        command
            .args(["mount", "--user", "root", place])
            .arg(directory);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let place = world.place("");
    assert!(says(mounted.path(), &place).contains("has a mount of soulbox already"));
    assert!(says(&world.host().join("none"), &place).contains("give a directory that is there"));
    fs::write(world.host().join("file"), "").unwrap();
    assert!(says(&world.host().join("file"), &place).contains("give a directory that is there"));
    fs::write(world.guest().join("file"), "").unwrap();
    assert!(says(&world.host(), &world.place("file")).contains("is no directory"));
    assert!(says(&world.host(), &world.place("none")).contains("is not there"));
    assert!(mounted.path().join("file").exists());
}
