//! Sandboxes from their making to their end.

use anyhow::{Context, Result, ensure};

use super::{create, eventually, host, sh, shared, succeed, template_dir};

pub(crate) fn machines_have_the_shape_asked_for() -> Result<()> {
    let s = shared();
    let id = create(
        &s.host,
        &["--vcpus", "4", "--memory-mib", "384", "--disk-mib", "10240"],
    )?;
    assert_eq!(succeed(sh(&s.host, &id, "nproc"))?, "4\n");
    let memory_kib: u64 = succeed(sh(
        &s.host,
        &id,
        "awk '/MemTotal/ {print $2}' /proc/meminfo",
    ))?
    .trim()
    .parse()?;
    ensure!(
        (300 << 10..384 << 10).contains(&memory_kib),
        "{memory_kib} KiB"
    );
    let disk_mib: u64 = succeed(sh(&s.host, &id, "df -m --output=size / | tail -1"))?
        .trim()
        .parse()?;
    ensure!(disk_mib > 9 * 1024, "the root has {disk_mib} MiB");
    // The machine is what ACPI said it is: VMGenID and pvpanic found their drivers.
    let devices = succeed(sh(
        &s.host,
        &id,
        "ls /sys/bus/acpi/devices /sys/bus/platform/drivers/vmgenid /sys/bus/platform/drivers/pvpanic-mmio",
    ))?;
    for name in ["LNRO0005:00", "PNP0501:00", "QEMU0001:00"] {
        ensure!(devices.contains(name), "no {name} in {devices}");
    }
    let agent_kib = super::status_kib(&succeed(sh(&s.host, &id, "cat /proc/1/status"))?, "VmRSS:")?;
    ensure!(
        agent_kib <= 8 << 10,
        "soulbox-guest has {agent_kib} KiB resident"
    );
    succeed(s.host.soulbox(&["rm", &id]))?;
    Ok(())
}

pub(crate) fn a_bzimage_boots_too() -> Result<()> {
    // The template's folder links its kernel; the kernel's cache has both forms.
    let base = template_dir().join("base");
    let bzimage = base.join("bzImage");
    ensure!(bzimage.is_file(), "{} is missing", bzimage.display());
    let host = host("");
    let folder = host.path("templates/compressed");
    std::fs::create_dir_all(&folder)?;
    std::os::unix::fs::symlink(&bzimage, folder.join("bzImage"))?;
    std::os::unix::fs::symlink(base.join("rootfs.ext4"), folder.join("rootfs.ext4"))?;
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(base.join("manifest.json"))?)?;
    manifest["name"] = "compressed".into();
    manifest["kernel"]["file"] = "bzImage".into();
    manifest["kernel"]["size_bytes"] = bzimage.metadata()?.len().into();
    std::fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let config = std::fs::read_to_string(host.path("soulboxd.toml"))?;
    let config = config.replace(
        &format!("{:?}", template_dir()),
        &format!("{:?}", host.path("templates")),
    );
    std::fs::write(host.path("soulboxd.toml"), config)?;

    let _daemon = host.start();
    let output = host.soulbox(&["run", "--template", "compressed", "--", "uname", "-m"]);
    assert_eq!(succeed(output)?, "x86_64\n");
    host.assert_nothing_left();
    Ok(())
}

pub(crate) fn a_request_id_makes_one_sandbox() -> Result<()> {
    let s = shared();
    let options = ["--request-id", "once", "--label", "test=once"];
    let first = create(&s.host, &options)?;
    assert_eq!(create(&s.host, &options)?, first);
    let other = s
        .host
        .soulbox(&["create", "--request-id", "once", "--vcpus", "2"]);
    ensure!(!other.status.success());
    let listed = succeed(
        s.host
            .soulbox(&["ls", "--label", "test=once", "--output", "json"]),
    )?;
    assert_eq!(listed.matches("\"sb-").count(), 1, "{listed}");
    succeed(s.host.soulbox(&["rm", &first]))?;
    Ok(())
}

pub(crate) fn a_time_to_live_ends() -> Result<()> {
    let s = shared();
    let id = create(&s.host, &["--ttl", "20s"])?;
    eventually("the sandbox is deleted when its time is over", || {
        Ok(!succeed(s.host.soulbox(&["ls"]))?.contains(&id))
    })
}

pub(crate) fn run_leaves_nothing() -> Result<()> {
    let host = host("");
    let mut daemon = host.start();
    let output = host.soulbox(&[
        "run",
        "--timings",
        "--",
        "python3",
        "-c",
        "print(6*7); exit(3)",
    ]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(3), &b"42\n"[..])
    );
    let timings = String::from_utf8(output.stderr).context("UTF-8")?;
    eprintln!("{timings}");
    for stage in [
        "admission",
        "spawn",
        "boot",
        "configure",
        "first_exec",
        "total",
    ] {
        ensure!(timings.contains(stage), "no {stage} in {timings}");
    }
    ensure!(!succeed(host.soulbox(&["ls"]))?.contains("sb-"));
    host.assert_nothing_left();
    daemon.terminate();
    ensure!(!host.socket().exists());
    Ok(())
}
