//! Which CPU features a snapshot needs that a host lacks.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of CPUID that holds one feature a bit.
struct FeatureWord {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// By bit, as in Linux's /proc/cpuinfo; "" where a bit has no name there.
    names: &'static [(u8, &'static str)],
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Leaf 1, ECX: OSXSAVE mirrors CR4 and is no feature of the host.
const OSXSAVE: u32 = 1 << 27;

const WORDS: [FeatureWord; 12] = [
    FeatureWord {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        names: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    FeatureWord {
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        names: &[
            (4, "tsc"),
            (6, "pae"),
            (8, "cx8"),
            (9, "apic"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        names: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        names: &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: 0,
        register: Register::Edx,
        names: &[
            (4, "fsrm"),
            (8, "avx512_vp2intersect"),
            (10, "md_clear"),
            (14, "serialize"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "spec_ctrl"),
            (27, "stibp"),
            (28, "flush_l1d"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    },
    FeatureWord {
        leaf: 7,
        subleaf: 1,
        register: Register::Eax,
        names: &[
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (10, "fzrm"),
            (11, "fsrs"),
            (12, "fsrc"),
        ],
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 0,
        register: Register::Eax,
        names: &[],
    },
    FeatureWord {
        leaf: 0xd,
        subleaf: 1,
        register: Register::Eax,
        names: &[
            (0, "xsaveopt"),
            (1, "xsavec"),
            (2, "xgetbv1"),
            (3, "xsaves"),
        ],
    },
    FeatureWord {
        leaf: 0x4000_0001,
        subleaf: 0,
        register: Register::Eax,
        names: &[
            (3, "kvmclock"),
            (6, "kvm_pv_eoi"),
            (7, "kvm_pv_unhalt"),
            (11, "kvm_pv_send_ipi"),
            (24, "kvmclock_stable"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Ecx,
        names: &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Edx,
        names: &[
            (11, "syscall"),
            (20, "nx"),
            (26, "pdpe1gb"),
            (27, "rdtscp"),
            (29, "lm"),
        ],
    },
    FeatureWord {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: Register::Ebx,
        names: &[
            (0, "clzero"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "stibp"),
        ],
    },
];

/// The features in `wanted` that are not in `host`, by name. Both are CPUIDs as
/// [`super::cpuid`] makes them.
pub fn missing(wanted: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in &WORDS {
        let mut lacking = word.of(wanted) & !word.of(host);
        if word.leaf == 1 && matches!(word.register, Register::Ecx) {
            lacking &= !OSXSAVE;
        }
        for bit in (0..32u8).filter(|bit| lacking & (1 << bit) != 0) {
            missing.push(word.name(bit));
        }
    }
    missing
}

// === impl FeatureWord ===

impl FeatureWord {
    fn of(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
        let entry = cpuid
            .iter()
            .find(|entry| entry.function == self.leaf && entry.index == self.subleaf);
        entry.map_or(0, |entry| match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
    }

    fn name(&self, bit: u8) -> String {
        let known = self.names.iter().find(|(named, _)| *named == bit);
        match (known, self.register) {
            (Some((_, name)), _) => (*name).to_owned(),
            (None, Register::Eax) => format!("CPUID.{:x}.{}:EAX[{bit}]", self.leaf, self.subleaf),
            (None, Register::Ebx) => format!("CPUID.{:x}.{}:EBX[{bit}]", self.leaf, self.subleaf),
            (None, Register::Ecx) => format!("CPUID.{:x}.{}:ECX[{bit}]", self.leaf, self.subleaf),
            (None, Register::Edx) => format!("CPUID.{:x}.{}:EDX[{bit}]", self.leaf, self.subleaf),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ebx,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let wanted = [
            entry(1, 0, 0, 1 << 28 | OSXSAVE),
            entry(7, 0, 1 << 16 | 1 << 5, 1 << 31),
        ];
        let host = [entry(1, 0, 0, 0), entry(7, 0, 1 << 5, 0)];
        assert_eq!(
            missing(&wanted, &host),
            ["avx", "avx512f", "CPUID.7.0:ECX[31]"]
        );
        assert!(missing(&host, &wanted).is_empty(), "more is no harm");
        assert_eq!(missing(&wanted, &[]).len(), 4);
    }
}
