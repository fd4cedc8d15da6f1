//! The languages: what runs them, and how it is started.
//!
//! A runner is a small program in the language itself, embedded here. It reads its
//! own source from its descriptor 3, so that no file has to be kept in the guest and
//! what `ps` shows of it is short, and then one run after the other; see `channel`.

use soulbox_proto::guest::v1::Language;

/// How code of one language is run.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) language: Language,
    /// Of the context that is there without being made.
    pub(super) default_context: &'static str,
    pub(super) argv: &'static [&'static str],
    /// What the guest lacks when there is no such program.
    pub(super) install: &'static str,
}

const PYTHON_BOOT: &str = "import io;c=io.open(3,'rb',closefd=False);\
    exec(compile(c.read(int(c.readline())),'<soulbox>','exec'),\
    {'__name__':'<soulbox>','channel':c})";
const NODE_BOOT: &str = "{const f=require('fs'),b=Buffer.alloc(1);let n='';\
    while(f.readSync(3,b)&&b[0]!==10)n+=b;\
    const s=Buffer.alloc(+n);for(let i=0;i<s.length;)i+=f.readSync(3,s,i,s.length-i);\
    require('vm').runInThisContext(s.toString(),{filename:'soulbox-runner'})\
    (require,(s,o)=>o?import(s,o):import(s))}";
const BASH_BOOT: &str = "IFS= read -r -d '' -u 3 __soulbox; eval \"$__soulbox\"";

const RUNNERS: [Runner; 4] = [
    Runner {
        language: Language::Python,
        default_context: "python",
        argv: &["python3", "-c", PYTHON_BOOT],
        install: "python3 (3.8 or later)",
    },
    Runner {
        language: Language::Javascript,
        default_context: "javascript",
        argv: &["node", "--expose-internals", "-e", NODE_BOOT, "javascript"],
        install: "node (18 or later)",
    },
    Runner {
        language: Language::Typescript,
        default_context: "typescript",
        argv: &["node", "--expose-internals", "-e", NODE_BOOT, "typescript"],
        install: "node (18 or later)",
    },
    Runner {
        language: Language::Bash,
        default_context: "bash",
        argv: &["bash", "-c", BASH_BOOT],
        install: "bash (4.4 or later)",
    },
];

// === impl Runner ===

impl Runner {
    pub(super) fn of(language: Language) -> Option<&'static Self> {
        RUNNERS.iter().find(|runner| runner.language == language)
    }

    /// The one whose default context has this id.
    pub(super) fn of_default_context(id: &str) -> Option<&'static Self> {
        RUNNERS.iter().find(|runner| runner.default_context == id)
    }

    /// What it reads first: its source, in the parts that it loads when it needs them.
    pub(super) fn source(&self) -> Vec<u8> {
        let parts: &[&str] = match self.language {
            Language::Bash => {
                let source = include_str!("runners/bash.sh");
                return [source.as_bytes(), b"\0"].concat();
            }
            Language::Javascript | Language::Typescript => &[include_str!("runners/node.js")],
            Language::Python | Language::Unspecified => &[
                include_str!("runners/python.py"),
                include_str!("runners/python_magic.py"),
                include_str!("runners/python_rich.py"),
                include_str!("runners/python_charts.py"),
            ],
        };
        let mut source = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
        for part in parts {
            source.extend_from_slice(format!("{}\n", part.len()).as_bytes());
            source.extend_from_slice(part.as_bytes());
        }
        source
    }
}
