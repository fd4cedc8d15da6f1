//! The rights of one thread: those of another user, for as long as a guard lives.
//!
//! Linux keeps credentials by thread. glibc's wrappers change those of all threads,
//! so the raw calls are made here, and by rustix. The real and effective ids stay
//! the agent's: nobody else may signal or trace it meanwhile, and coming back needs
//! no privilege that was given away.

use std::io;

use rustix::process::{Gid, getegid, geteuid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
};

/// Until it is dropped, this thread has another user's rights on files.
#[must_use]
pub(crate) struct Acting {
    before: Option<Before>,
    // A guard that another thread dropped would leave this one as it is.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

struct Before {
    gid: Gid,
    groups: Vec<Gid>,
    capabilities: CapabilitySets,
}

/// Takes the rights of a user. An agent that is not root has only those of its own
/// user; others fail with EPERM.
///
/// The file-system uid decides who may open what (setfsuid(2)). Leaving 0 takes the
/// capabilities about files out of the thread's effective set (capabilities(7),
/// "Effect of user ID changes"); the others go here: CAP_SYS_RESOURCE would let a
/// user have the blocks that ext4 keeps for root, CAP_SYS_ADMIN write `trusted.*`.
/// They stay permitted, which is what brings them back.
///
/// A thread that is started meanwhile inherits all this, and no guard: start none.
pub(crate) fn act_as(uid: u32, gid: u32, groups: &[u32]) -> io::Result<Acting> {
    let (own_uid, own_gid) = (geteuid(), getegid());
    let mut acting = Acting {
        before: None,
        _of_this_thread: std::marker::PhantomData,
    };
    if (uid, gid) == (own_uid.as_raw(), own_gid.as_raw()) {
        return Ok(acting);
    }
    if !own_uid.is_root() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let capabilities = capabilities(None)?;
    // From here on the guard undoes what has been done, all or in part.
    acting.before = Some(Before {
        gid: own_gid,
        groups: getgroups()?,
        capabilities,
    });
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    set_thread_groups(&groups)?;
    set_file_ids(uid, gid)?;
    if uid != 0 {
        set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::empty(),
                ..capabilities
            },
        )?;
    }
    Ok(acting)
}

// === impl Acting ===

impl Drop for Acting {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        // The capabilities first: the rest needs CAP_SETUID and CAP_SETGID.
        let restored = set_capabilities(None, before.capabilities)
            .map_err(io::Error::from)
            .and_then(|()| set_file_ids(0, before.gid.as_raw()))
            .and_then(|()| Ok(set_thread_groups(&before.groups)?))
            // Coming back to 0 raises capabilities that may have been low before.
            .and_then(|()| Ok(set_capabilities(None, before.capabilities)?));
        // The thread serves others next. Ends the agent: see exit_on_panic.
        restored.expect("the agent's own rights cannot be refused to it");
    }
}

fn set_file_ids(uid: u32, gid: u32) -> io::Result<()> {
    // No id: asks without setting.
    const ASK: libc::c_long = -1;
    // SAFETY: both calls take numbers only, and act on the calling thread alone.
    let are = unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
        (
            libc::syscall(libc::SYS_setfsuid, ASK),
            libc::syscall(libc::SYS_setfsgid, ASK),
        )
    };
    // They say what was, never that they failed.
    if are == (uid.into(), gid.into()) {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
    use std::sync::mpsc;

    use super::*;

    const USER: u32 = 54_321;

    #[test]
    fn a_thread_has_the_rights_of_the_user_and_then_its_own_again() {
        assert!(geteuid().is_root(), "run this as root");
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "x").unwrap();
        fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
        let (before, groups) = (capabilities(None).unwrap(), getgroups().unwrap());
        let (ask, asked) = mpsc::channel::<()>();
        let beside = std::thread::spawn({
            let secret = secret.clone();
            move || asked.recv().map(|()| fs::read(secret).is_ok())
        });
        {
            let _acting = act_as(USER, USER, &[USER, USER + 1]).unwrap();
            let refused = fs::read(&secret).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(getgroups().unwrap().len(), 2);
            assert!(capabilities(None).unwrap().effective.is_empty());
            fs::write(folder.path().join("theirs"), "x").unwrap();
            ask.send(()).unwrap();
            assert!(beside.join().unwrap().unwrap());
        }
        let theirs = fs::metadata(folder.path().join("theirs")).unwrap();
        assert_eq!((theirs.uid(), theirs.gid()), (USER, USER));
        fs::read(&secret).unwrap();
        assert_eq!(capabilities(None).unwrap(), before);
        assert_eq!(getgroups().unwrap(), groups);
    }

    #[test]
    fn a_group_alone_decides_too() {
        assert!(geteuid().is_root(), "run this as root");
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let shared = folder.path().join("shared");
        fs::write(&shared, "x").unwrap();
        fs::set_permissions(&shared, PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(&shared, Some(0), Some(USER + 1)).unwrap();
        assert!({
            let _acting = act_as(USER, USER, &[USER]).unwrap();
            fs::read(&shared).is_err()
        });
        assert!({
            let _acting = act_as(USER, USER, &[USER, USER + 1]).unwrap();
            fs::read(&shared).is_ok()
        });
    }
}
