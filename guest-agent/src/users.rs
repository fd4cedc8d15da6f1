//! `/etc/passwd` and `/etc/group`, parsed here: a static glibc cannot load the
//! name service modules that getpwnam(3) wants.

use std::path::Path;

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// The two files' text. A template without them still has root by number.
#[derive(Debug)]
pub(crate) struct Users {
    passwd: String,
    group: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no user \"{0}\" in the sandbox: name one in its /etc/passwd, or give \"uid:gid\""
)]
pub(crate) struct NoSuchUser(pub(crate) String);

/// Who runs a program for which the caller names nobody, where it exists.
const DEFAULT_USER: &str = "user";

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

// === impl Users ===

impl Users {
    /// Reads `passwd` and `group` in the folder; one that is missing is empty.
    pub(crate) fn read(etc: &Path) -> Self {
        let read = |name| {
            let bytes = std::fs::read(etc.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self {
            passwd: read("passwd"),
            group: read("group"),
        }
    }

    /// Finds a user by name or by "uid[:gid]". Empty is `user`, or else root.
    ///
    /// A number without an account has the group of the same number, no name in
    /// any group, and `/` for its home. A group that is given replaces all the
    /// groups that the account has.
    pub(crate) fn find(&self, user: &str) -> Result<Identity, NoSuchUser> {
        if user.is_empty() {
            return self.find(DEFAULT_USER).or_else(|_| self.find("0"));
        }
        if let Some(account) = self.accounts().find(|account| account.name == user) {
            return Ok(self.identity(&account));
        }
        let no_such_user = || NoSuchUser(user.to_owned());
        let (uid, gid) = match user.split_once(':') {
            Some((uid, gid)) => (uid, Some(parse_id(gid).ok_or_else(no_such_user)?)),
            None => (user, None),
        };
        let uid = parse_id(uid).ok_or_else(no_such_user)?;
        let known = self.accounts().find(|account| account.uid == uid);
        let mut identity = match known {
            Some(account) => self.identity(&account),
            None => Identity::unknown(uid),
        };
        if let Some(gid) = gid {
            identity.gid = gid;
            identity.groups = vec![gid];
        }
        Ok(identity)
    }

    /// What a number is called; the number where it has no account.
    pub(crate) fn name_of(&self, uid: u32) -> String {
        let account = self.accounts().find(|account| account.uid == uid);
        account.map_or_else(|| uid.to_string(), |account| account.name.to_owned())
    }

    fn identity(&self, account: &Account<'_>) -> Identity {
        let mut groups = vec![account.gid];
        groups.extend(
            self.groups_of(account.name)
                .filter(|gid| *gid != account.gid),
        );
        Identity {
            name: account.name.to_owned(),
            uid: account.uid,
            gid: account.gid,
            groups,
            home: or(account.home, "/"),
            shell: or(account.shell, "/bin/sh"),
        }
    }

    // name:password:uid:gid:comment:home:shell
    fn accounts(&self) -> impl Iterator<Item = Account<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = parse_id(fields.nth(1)?)?;
            let gid = parse_id(fields.next()?)?;
            let home = fields.nth(1).unwrap_or_default();
            let shell = fields.next().unwrap_or_default();
            Some(Account {
                name,
                uid,
                gid,
                home,
                shell,
            })
        })
    }

    // name:password:gid:member,member
    fn groups_of<'a>(&'a self, member: &'a str) -> impl Iterator<Item = u32> + 'a {
        self.group.lines().filter_map(move |line| {
            let mut fields = line.split(':').skip(2);
            let gid = parse_id(fields.next()?)?;
            let mut members = fields.next()?.split(',').map(str::trim);
            members.any(|name| name == member).then_some(gid)
        })
    }
}

// === impl Identity ===

impl Identity {
    fn unknown(uid: u32) -> Self {
        let (home, shell) = if uid == 0 {
            ("/root", "/bin/sh")
        } else {
            ("/", "/bin/sh")
        };
        Self {
            name: if uid == 0 {
                "root".to_owned()
            } else {
                uid.to_string()
            },
            uid,
            gid: uid,
            groups: vec![uid],
            home: home.to_owned(),
            shell: shell.to_owned(),
        }
    }
}

fn or(value: &str, default: &str) -> String {
    if value.is_empty() { default } else { value }.to_owned()
}

/// u32::MAX is "leave as it is" to setresuid(2), so it is nobody's id.
fn parse_id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let id = if digits { text.parse().ok() } else { None };
    id.filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Users {
        Users {
            passwd: "root:x:0:0:root:/root:/bin/bash\n\
                     # comment\n\nbroken:x\nuser:x:1000:1000:,,,:/home/user:/bin/bash\n\
                     daemon:x:1:1:::\n"
                .to_owned(),
            group: "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:\ndocker:x:998:other, user\n"
                .to_owned(),
        }
    }

    #[test]
    fn finds_by_name_with_supplementary_groups() {
        let user = users().find("user").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups),
            (1000, 1000, vec![1000, 27, 998])
        );
        assert_eq!(
            (user.home.as_str(), user.shell.as_str()),
            ("/home/user", "/bin/bash")
        );
    }

    #[test]
    fn nobody_named_is_user_or_else_root() {
        assert_eq!(users().find("").unwrap().name, "user");
        let empty = Users {
            passwd: String::new(),
            group: String::new(),
        };
        let root = empty.find("").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
    }

    #[test]
    fn a_number_is_its_account_where_there_is_one() {
        assert_eq!(users().find("1000").unwrap(), users().find("user").unwrap());
        let other = users().find("4242").unwrap();
        assert_eq!(
            (other.name.as_str(), other.gid, other.groups),
            ("4242", 4242, vec![4242])
        );
        assert_eq!(other.home, "/");
    }

    #[test]
    fn a_number_has_its_accounts_name() {
        assert_eq!(users().name_of(1000), "user");
        assert_eq!(users().name_of(4242), "4242");
    }

    #[test]
    fn a_group_that_is_given_replaces_the_others() {
        let user = users().find("1000:5").unwrap();
        assert_eq!(
            (user.name.as_str(), user.gid, user.groups),
            ("user", 5, vec![5])
        );
    }

    #[test]
    fn an_account_without_home_or_shell_gets_the_defaults() {
        let daemon = users().find("daemon").unwrap();
        assert_eq!(
            (daemon.home.as_str(), daemon.shell.as_str()),
            ("/", "/bin/sh")
        );
    }

    #[test]
    fn refuses_what_is_neither_a_name_nor_numbers() {
        for user in [
            "nobody-here",
            "4294967295",
            "-1",
            "1000:",
            ":5",
            "1:x",
            "99999999999",
            "+1",
        ] {
            assert_eq!(users().find(user), Err(NoSuchUser(user.to_owned())));
        }
    }
}
