//! Copies, by the real program, each way.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::world::{SmallDisk, World, noise, sh, snapshot, until, wait};

pub const ALL: &[Case] = &[
    ("copy::a_file_goes_up_and_down", a_file_goes_up_and_down),
    (
        "copy::destinations_are_those_of_cp",
        destinations_are_those_of_cp,
    ),
    ("copy::a_pipe_is_one_end", a_pipe_is_one_end),
    (
        "copy::any_tree_comes_back_as_it_was",
        any_tree_comes_back_as_it_was,
    ),
    ("copy::ten_thousand_files", ten_thousand_files),
    (
        "copy::a_tree_is_laid_over_another",
        a_tree_is_laid_over_another,
    ),
    ("copy::a_broken_download_goes_on", a_broken_download_goes_on),
    ("copy::a_broken_upload_goes_on", a_broken_upload_goes_on),
    (
        "copy::what_changed_meanwhile_is_begun_anew",
        what_changed_meanwhile_is_begun_anew,
    ),
    ("copy::a_full_disk_here_is_told", a_full_disk_here_is_told),
    ("copy::a_full_disk_there_is_told", a_full_disk_there_is_told),
    (
        "copy::what_cannot_be_copied_is_said",
        what_cannot_be_copied_is_said,
    ),
    (
        "copy::an_agent_that_dies_ends_it",
        an_agent_that_dies_ends_it,
    ),
    (
        "copy::programs_read_what_was_copied",
        programs_read_what_was_copied,
    ),
];

const LARGE: usize = 96 << 20;

fn display(path: &Path) -> String {
    path.display().to_string()
}

fn parts(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|it| it == "soulbox-part"))
        .collect()
}

fn a_file_goes_up_and_down() {
    let world = World::start();
    // Empty, in one message, in many, and large enough to go on.
    for (number, size) in [0, 5, 3 << 20, (9 << 20) + 7].into_iter().enumerate() {
        let source = world.host().join(format!("source-{number}"));
        let data = noise(size, number as u64 + 1);
        fs::write(&source, &data).unwrap();
        sh(
            &world.host(),
            &format!(
                "chmod 4750 source-{number}; touch -d 2002-03-04T05:06:07.125 source-{number}"
            ),
        );
        let there = world.guest().join(format!("there-{number}"));
        world.copy_well([display(&source), world.place(&format!("there-{number}"))]);
        assert!(fs::read(&there).unwrap() == data);
        let back = world.host().join(format!("back-{number}"));
        world.copy_well([world.place(&format!("there-{number}")), display(&back)]);
        assert!(fs::read(&back).unwrap() == data);
        let wanted = fs::metadata(&source).unwrap();
        for copy in [&there, &back] {
            let found = fs::metadata(copy).unwrap();
            // But for the bit that gives away the owner's rights.
            assert_eq!(found.permissions().mode() & 0o7777, 0o750);
            assert_eq!(
                (found.mtime(), found.mtime_nsec()),
                (wanted.mtime(), wanted.mtime_nsec())
            );
        }
        world.copy_well(["-a".to_owned(), display(&source), world.place("archived")]);
        let archived = fs::metadata(world.guest().join("archived")).unwrap();
        assert_eq!(archived.permissions().mode() & 0o7777, 0o4750);
    }
    assert!(parts(&world.host()).is_empty() && parts(&world.guest()).is_empty());
}

fn destinations_are_those_of_cp() {
    let world = World::start();
    let (guest, host) = (world.guest(), world.host());
    fs::create_dir_all(guest.join("dir/inner")).unwrap();
    fs::write(guest.join("dir/inner/file"), "file").unwrap();
    fs::create_dir(host.join("here")).unwrap();
    let to = |name: &str| display(&host.join(name));
    let exists = |path: &str| host.join(path).is_file();
    // A file: named anew, or into a directory under its name.
    world.copy_well([world.place("dir/inner/file"), to("renamed")]);
    world.copy_well([world.place("dir/inner/file"), to("here")]);
    assert!(exists("renamed") && exists("here/file"));
    // A directory: itself, into one, or what is in it.
    world.copy_well([world.place("dir"), to("new")]);
    world.copy_well([world.place("dir/"), to("here")]);
    world.copy_well([world.place("dir/."), to("here")]);
    assert!(exists("new/inner/file") && exists("here/dir/inner/file") && exists("here/inner/file"));
    // The same the other way.
    fs::create_dir(guest.join("there")).unwrap();
    world.copy_well([to("renamed"), world.place("there")]);
    world.copy_well([to("renamed"), world.place("there/again")]);
    world.copy_well([to("new"), world.place("there")]);
    world.copy_well([to("new/."), world.place("there")]);
    world.copy_well([to("new"), world.place("other")]);
    for path in [
        "there/renamed",
        "there/again",
        "there/new/inner/file",
        "there/inner/file",
        "other/inner/file",
    ] {
        assert!(guest.join(path).is_file(), "{path}");
    }
    // What is there is replaced; a link is followed, a device written to.
    fs::write(guest.join("there/again"), "old").unwrap();
    world.copy_well([to("renamed"), world.place("there/again")]);
    assert_eq!(fs::read(guest.join("there/again")).unwrap(), b"file");
    symlink("renamed", host.join("link")).unwrap();
    fs::write(guest.join("newer"), "newer").unwrap();
    world.copy_well([world.place("newer"), to("link")]);
    assert_eq!(fs::read(host.join("renamed")).unwrap(), b"newer");
    assert!(host.join("link").is_symlink());
    world.copy_well([to("link"), world.place("from-link")]);
    assert_eq!(fs::read(guest.join("from-link")).unwrap(), b"newer");
    world.copy_well([world.place("newer"), "/dev/null".to_owned()]);
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

fn a_pipe_is_one_end() {
    let world = World::start();
    let data = noise(5 << 20, 7);
    let mut command = world.soulbox();
    command.args(["cp", "--user", "root", "-", &world.place("piped")]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&data).unwrap();
    assert!(wait(&mut child).success());
    assert!(fs::read(world.guest().join("piped")).unwrap() == data);
    let output = world.copy([world.place("piped"), "-".to_owned()]);
    assert!(output.status.success() && output.stdout == data);
    // Nothing of what was there is lost to an input that breaks off.
    let refused = world.copy(["-".to_owned(), world.place("")]);
    assert_eq!(refused.status.code(), Some(1));
    // What programs ask.
    let mut command = world.soulbox();
    command.args([
        "--output",
        "json",
        "cp",
        "--user",
        "root",
        &world.place("piped"),
    ]);
    let output = command.arg(world.host().join("json")).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&said["entries"], &said["bytes"]),
        (&1.into(), &data.len().into())
    );
}

/// Names of any bytes, deep, long and sealed; links to anywhere.
fn any_tree_comes_back_as_it_was() {
    let world = World::start();
    let mut state = 99_u64;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    for (round, compress) in ["never", "always", "auto"].into_iter().enumerate() {
        let source = world.host().join(format!("source-{round}"));
        fs::create_dir(&source).unwrap();
        let mut directories = vec![source.clone()];
        for number in 0..150 {
            use std::os::unix::ffi::OsStringExt as _;
            let above =
                directories[usize::try_from(random(directories.len() as u64)).unwrap()].clone();
            let length = [1, 3, 20, 120, 200][usize::try_from(random(5)).unwrap()];
            let mut name = format!("{number}-").into_bytes();
            for _ in 0..length {
                name.push(match u8::try_from(random(255)).unwrap() + 1 {
                    b'/' => b'\n',
                    byte => byte,
                });
            }
            let path = above.join(std::ffi::OsString::from_vec(name));
            if path.as_os_str().len() > 3000 {
                continue;
            }
            match random(4) {
                0 => {
                    fs::create_dir(&path).unwrap();
                    directories.push(path);
                }
                1 => symlink(
                    format!("{}/../x", "y".repeat(usize::try_from(random(200)).unwrap())),
                    &path,
                )
                .unwrap(),
                _ => {
                    let size = [0, 1, 511, 512, 513, 70_000][usize::try_from(random(6)).unwrap()];
                    fs::write(&path, noise(size, number)).unwrap();
                    let mode = [0o644, 0o600, 0o755, 0o444, 0][usize::try_from(random(5)).unwrap()];
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                    let after = std::time::Duration::from_secs(random(1 << 30));
                    let file = File::open(&path).unwrap();
                    file.set_modified(std::time::UNIX_EPOCH + after).unwrap();
                }
            }
        }
        fs::set_permissions(
            directories.last().unwrap(),
            fs::Permissions::from_mode(0o555),
        )
        .unwrap();
        whole_seconds(&source);
        let compress = format!("--compress={compress}");
        let there = format!("there-{round}");
        world.copy_well([compress.clone(), display(&source), world.place(&there)]);
        assert_eq!(snapshot(&world.guest().join(&there)), snapshot(&source));
        let back = world.host().join(format!("back-{round}"));
        world.copy_well([compress, world.place(&there), display(&back)]);
        assert_eq!(snapshot(&back), snapshot(&source));
    }
}

/// Trees travel without fractions.
fn whole_seconds(root: &Path) {
    sh(
        root,
        "find . -depth ! -type f -exec touch -hd '2003-04-05 06:07:08' {} +",
    );
    sh(
        root,
        "find . -depth -type f -newermt 2020-01-01 -exec touch -d '2004-05-06 07:08:09' {} +",
    );
}

fn ten_thousand_files() {
    let world = World::start();
    let source = world.host().join("source");
    for directory in 0..100 {
        let directory = source.join(directory.to_string());
        fs::create_dir_all(&directory).unwrap();
        for file in 0..100 {
            fs::write(
                directory.join(file.to_string()),
                file.to_string().repeat(30),
            )
            .unwrap();
        }
    }
    whole_seconds(&source);
    world.copy_well([display(&source), world.place("there")]);
    let back = world.host().join("back");
    world.copy_well([world.place("there"), display(&back)]);
    assert_eq!(snapshot(&back), snapshot(&source));
}

fn a_tree_is_laid_over_another() {
    let world = World::start();
    let lay = |root: &Path| {
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join("dir/same"), "new").unwrap();
        symlink("same", root.join("dir/link")).unwrap();
    };
    let under = |root: &Path| {
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join("dir/same"), "old and longer").unwrap();
        fs::write(root.join("dir/link"), "a file").unwrap();
        fs::write(root.join("dir/kept"), "kept").unwrap();
    };
    lay(&world.guest().join("tree"));
    under(&world.host().join("target"));
    world.copy_well([world.place("tree/."), display(&world.host().join("target"))]);
    lay(&world.host().join("tree"));
    under(&world.guest().join("target"));
    world.copy_well([display(&world.host().join("tree/.")), world.place("target")]);
    for root in [world.host(), world.guest()] {
        let read = |name: &str| fs::read_to_string(root.join("target/dir").join(name)).unwrap();
        assert_eq!(read("same"), "new");
        assert_eq!(read("kept"), "kept");
        assert_eq!(read("link"), "new");
        assert!(root.join("target/dir/link").is_symlink());
    }
}

/// Stops the agent once so much more has arrived, and kills the copy.
fn break_off(world: &World, arguments: [String; 2], arrived: impl Fn() -> u64, signal: Signal) {
    let mut command = world.soulbox();
    command.args(["cp", "--user", "root"]).args(arguments);
    let before = arrived();
    let mut child = command.spawn().unwrap();
    until(|| arrived() > before + (2 << 20));
    world.signal_agent(Signal::STOP);
    kill_process(Pid::from_child(&child), signal).unwrap();
    let status = wait(&mut child);
    world.signal_agent(Signal::CONT);
    assert!(!status.success(), "it was too fast to be broken off");
}

fn part_bytes(directory: &Path) -> u64 {
    parts(directory)
        .iter()
        .filter_map(|part| fs::metadata(part).ok())
        .map(|part| part.len())
        .sum()
}

fn resumed(world: &World, arguments: [String; 2]) -> u64 {
    let mut command = world.soulbox();
    command
        .args(["--output", "json", "cp", "--user", "root"])
        .args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    said["resumed_bytes"].as_u64().unwrap()
}

fn a_broken_download_goes_on() {
    let world = World::start();
    let data = noise(LARGE, 11);
    fs::write(world.guest().join("large"), &data).unwrap();
    let target = world.host().join("large");
    let arguments = || [world.place("large"), display(&target)];
    for signal in [Signal::KILL, Signal::INT] {
        break_off(&world, arguments(), || part_bytes(&world.host()), signal);
        assert!(!target.exists());
        assert_eq!(parts(&world.host()).len(), 1);
    }
    assert!(resumed(&world, arguments()) > 2 << 20);
    assert!(fs::read(&target).unwrap() == data);
    assert!(parts(&world.host()).is_empty());
    // Another source: what there is of the old one is not used.
    fs::remove_file(&target).unwrap();
    break_off(
        &world,
        arguments(),
        || part_bytes(&world.host()),
        Signal::KILL,
    );
    let other = noise(LARGE, 12);
    fs::write(world.guest().join("large"), &other).unwrap();
    assert_eq!(resumed(&world, arguments()), 0);
    assert!(fs::read(&target).unwrap() == other);
}

fn a_broken_upload_goes_on() {
    let world = World::start();
    let source = world.host().join("large");
    let data = noise(LARGE, 13);
    fs::write(&source, &data).unwrap();
    let target = world.guest().join("large");
    fs::write(&target, "old").unwrap();
    let arguments = || [display(&source), world.place("large")];
    break_off(
        &world,
        arguments(),
        || part_bytes(&world.guest()),
        Signal::KILL,
    );
    assert_eq!(fs::read(&target).unwrap(), b"old");
    assert!(resumed(&world, arguments()) > 2 << 20);
    assert!(fs::read(&target).unwrap() == data);
    assert!(parts(&world.guest()).is_empty());
    // Anew, where that is asked for.
    break_off(
        &world,
        arguments(),
        || part_bytes(&world.guest()),
        Signal::KILL,
    );
    world.copy_well([
        "--no-resume".to_owned(),
        display(&source),
        world.place("large"),
    ]);
    assert!(fs::read(&target).unwrap() == data);
    assert!(parts(&world.guest()).is_empty());
}

/// Both ways: what comes of it is one state of the file, or an error.
fn what_changed_meanwhile_is_begun_anew() {
    let world = World::start();
    let source = world.guest().join("large");
    fs::write(&source, noise(LARGE, 14)).unwrap();
    let target = world.host().join("large");
    let mut command = world.soulbox();
    command
        .args(["cp", "--user", "root", &world.place("large")])
        .arg(&target);
    let mut child = command.spawn().unwrap();
    until(|| part_bytes(&world.host()) > 2 << 20);
    world.signal_agent(Signal::STOP);
    let other = noise(LARGE / 2, 15);
    fs::write(source.with_extension("fresh"), &other).unwrap();
    fs::rename(source.with_extension("fresh"), &source).unwrap();
    world.signal_agent(Signal::CONT);
    assert!(wait(&mut child).success());
    assert!(fs::read(&target).unwrap() == other);
    assert!(parts(&world.host()).is_empty());
}

fn a_full_disk_here_is_told() {
    let world = World::start();
    let small = world.host().join("small");
    let _disk = SmallDisk::on(&small, "4m");
    fs::create_dir(world.guest().join("tree")).unwrap();
    fs::write(world.guest().join("tree/large"), noise(8 << 20, 16)).unwrap();
    for (source, target) in [("tree/large", "file"), ("tree", "tree")] {
        let output = world.copy([world.place(source), display(&small.join(target))]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("make room"), "{said}");
    }
    // Half a file is none.
    let left = fs::read_dir(&small)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["tree"]);
    assert_eq!(fs::read_dir(small.join("tree")).unwrap().count(), 0);
}

fn a_full_disk_there_is_told() {
    let world = World::start();
    let small = world.guest().join("small");
    let _disk = SmallDisk::on(&small, "4m");
    let source = world.host().join("tree");
    fs::create_dir(&source).unwrap();
    for (name, size) in [("small", 5 << 20), ("large", 20 << 20)] {
        fs::write(source.join(name), noise(size, 17)).unwrap();
        let output = world.copy([display(&source.join(name)), world.place("small")]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("full"), "{said}");
        assert_eq!(fs::read_dir(&small).unwrap().count(), 0, "{name}");
    }
    let output = world.copy([display(&source), world.place("small")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("full"));
}

fn what_cannot_be_copied_is_said() {
    let world = World::start();
    sh(&world.guest(), "mkfifo pipe && mkdir dir && echo x >file");
    sh(
        &world.host(),
        "mkfifo pipe && mkdir -p tree && echo x >tree/file && mkfifo tree/pipe && echo x >file",
    );
    let here = |name: &str| display(&world.host().join(name));
    let says = |source: String, target: String, what: &str| {
        let output = world.copy([source, target]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(what), "{said}");
    };
    says(
        here("file"),
        here("other"),
        "one of the two must be SANDBOX:PATH",
    );
    says(
        world.place("file"),
        world.place("other"),
        "one of the two must be SANDBOX:PATH",
    );
    says(world.place("none"), here("none"), "is not there");
    says(here("none"), world.place("none"), "cannot be read");
    says(world.place("pipe"), here("none"), "is no file or directory");
    says(here("pipe"), world.place("none"), "is no file or directory");
    says(here("file"), world.place("pipe"), "is no file or directory");
    says(world.place("dir"), "-".to_owned(), "is a directory");
    says(world.place("dir"), here("file"), "is a file");
    says(here("tree"), world.place("file"), "is a file");
    says(here("file"), world.place("none/"), "is not there");
    says(world.place("file"), here("none/"), "is not there");
    says(world.place("file"), here("none/file"), "cannot be written");
    // In a tree they are left out, and counted.
    let output = world.copy([here("tree"), world.place("copied")]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("1 devices, pipes or sockets were left out"),
        "{said}"
    );
    assert!(world.guest().join("copied/file").exists());
    assert!(!world.guest().join("copied/pipe").exists());
}

fn an_agent_that_dies_ends_it() {
    let mut world = World::start();
    fs::write(world.guest().join("large"), noise(LARGE, 18)).unwrap();
    let mut command = world.soulbox();
    command
        .args(["cp", "--user", "root", &world.place("large")])
        .arg(world.host().join("large"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    until(|| part_bytes(&world.host()) > 2 << 20);
    world.kill_agent();
    assert_eq!(wait(&mut child).code(), Some(1));
    assert!(!world.host().join("large").exists());
    assert_eq!(
        parts(&world.host()).len(),
        1,
        "what came is worth going on with"
    );
}

fn programs_read_what_was_copied() {
    let world = World::start();
    sh(
        &world.host(),
        "git init -q repo && cd repo && seq 1000 >numbers && git add . && git commit -qm first",
    );
    world.copy_well([display(&world.host().join("repo")), world.place("repo")]);
    sh(
        &world.guest().join("repo"),
        "git fsck --strict && test -z \"$(git status --porcelain)\"",
    );
    world.copy_well([world.place("repo"), display(&world.host().join("back"))]);
    sh(
        &world.host().join("back"),
        "git fsck --strict && test -z \"$(git status --porcelain)\"",
    );
}
