//! What the guest is told of its CPU: what KVM supports here, with the topology
//! of this machine and without what a host cannot promise to a clone.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::machine::kvm::{KvmError, refused};

/// Names the rules below in a snapshot.
pub const PROFILE: &str = "host-1";

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_THERMAL: u32 = 0x6;
const LEAF_PERFORMANCE_MONITORING: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX: MONITOR/MWAIT (KVM runs them as NOPs).
const ECX_MONITOR: u32 = 1 << 3;
/// Leaf 1, ECX: nested virtualization is not offered.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: one package holds several logical processors.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: SVM.
const ECX_SVM: u32 = 1 << 2;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;

/// Leaf 0x4000_0001, EAX: these clocks and the stable bit are what a guest
/// needs; MSR-based steal time and async page faults go with the host that
/// offered them, and are left out.
const KVM_CLOCKS: u32 = 1 << 0 | 1 << 3 | 1 << 24;
const KVM_PV_EOI: u32 = 1 << 6;
const KVM_PV_UNHALT: u32 = 1 << 7;
const KVM_PV_SEND_IPI: u32 = 1 << 11;

/// Topology level types (leaf 0xb, ECX bits 15:8).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the vCPUs of a machine share: the CPUID of the first. KVM's own has the
/// number of the CPU that it was asked on.
pub fn template(kvm: &Kvm, vcpu_count: u8) -> Result<CpuId, KvmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(for_vcpu(&supported, 0, vcpu_count))
}

/// The CPUID of one vCPU: one package of `vcpu_count` cores of one thread each.
pub fn for_vcpu(template: &CpuId, index: u8, vcpu_count: u8) -> CpuId {
    let mut cpuid = template.clone();
    for entry in cpuid.as_mut_slice() {
        normalise(entry, u32::from(index), u32::from(vcpu_count));
    }
    cpuid
}

fn normalise(entry: &mut kvm_cpuid_entry2, index: u32, vcpu_count: u32) {
    // As many bits as number the cores of the package.
    let core_bits = vcpu_count.next_power_of_two().trailing_zeros();
    match entry.function {
        LEAF_FEATURES => {
            let brand_and_cache_line = entry.ebx & 0xffff;
            entry.ebx = brand_and_cache_line | vcpu_count << 16 | index << 24;
            entry.ecx &= !(ECX_MONITOR | ECX_VMX);
            // KVM never lists the deadline timer, since it hangs on the local APIC
            // being in the kernel (api.rst, KVM_GET_SUPPORTED_CPUID). Ours is;
            // without the bit a guest calibrates against a PIT that is not there.
            entry.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
            entry.edx &= !EDX_HTT;
            if vcpu_count > 1 {
                entry.edx |= EDX_HTT;
            }
        }
        LEAF_CACHES => {
            // EAX 31:26, cores of the package less one; 25:14, sharers of this
            // cache less one: all cores for the third level, one below it.
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { vcpu_count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharers << 14;
            if entry.eax & 0x1f != 0 {
                entry.eax |= (vcpu_count - 1) << 26;
            }
        }
        // Thermal and power management, performance counters: the host's own.
        LEAF_THERMAL | LEAF_PERFORMANCE_MONITORING => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
            let (shift, processors, kind) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (core_bits, vcpu_count, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = processors;
            entry.ecx = entry.index | kind << 8;
            entry.edx = index;
        }
        LEAF_KVM_FEATURES => {
            entry.eax &= KVM_CLOCKS | KVM_PV_EOI | KVM_PV_UNHALT | KVM_PV_SEND_IPI;
        }
        LEAF_AMD_FEATURES => entry.ecx &= !ECX_SVM,
        LEAF_AMD_SIZES => entry.ecx = core_bits << 12 | (vcpu_count - 1),
        LEAF_AMD_CACHES => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { vcpu_count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharers << 14;
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = index;
            // EBX 15:8, threads of a core less one; 7:0, core id.
            entry.ebx = index;
            // ECX 10:8, nodes less one; 7:0, node id.
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(function: u32, level: u32, index: u8, vcpus: u8) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 {
            function,
            index: level,
            eax: 0x0000_0063,
            ebx: 0x0a01_0800,
            ecx: u32::MAX,
            edx: 0,
            ..Default::default()
        };
        let template = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(&template, index, vcpus).as_slice()[0]
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        for index in 0..4 {
            let features = normalised(LEAF_FEATURES, 0, index, 4);
            assert_eq!(features.ebx >> 24, u32::from(index));
            assert_eq!((features.ebx >> 16) & 0xff, 4);
            assert_eq!(features.ebx & 0xffff, 0x0800, "the rest is the host's");
            assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
            assert_eq!(features.ecx & (ECX_MONITOR | ECX_VMX), 0);
            assert_eq!(normalised(LEAF_TOPOLOGY, 1, index, 4).edx, u32::from(index));
        }
    }

    #[test]
    fn the_number_of_the_cpu_that_was_asked_is_forgotten() {
        let of = |asked_on: u32| {
            let entry = |function, ebx, edx| kvm_cpuid_entry2 {
                function,
                ebx,
                edx,
                ..Default::default()
            };
            let entries = [
                entry(LEAF_FEATURES, 0x0800 | asked_on << 24, 0),
                entry(LEAF_TOPOLOGY, 0, asked_on),
            ];
            let first = for_vcpu(&CpuId::from_entries(&entries).unwrap(), 0, 2);
            // Another vCPU's is made from the first one's.
            assert_eq!(for_vcpu(&first, 1, 2).as_slice()[0].ebx >> 24, 1);
            first
        };
        assert_eq!(of(0).as_slice(), of(5).as_slice());
    }

    #[test]
    fn topology_is_one_package_of_single_threaded_cores() {
        let (thread, core) = (
            normalised(LEAF_TOPOLOGY, 0, 0, 6),
            normalised(LEAF_TOPOLOGY, 1, 0, 6),
        );
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
        assert_eq!(normalised(LEAF_AMD_SIZES, 0, 0, 6).ecx, 0x3005);
        assert_eq!(normalised(LEAF_FEATURES, 0, 0, 1).edx & EDX_HTT, 0);
    }

    #[test]
    fn a_third_level_cache_is_shared_by_all() {
        assert_eq!((normalised(LEAF_CACHES, 3, 0, 8).eax >> 14) & 0xfff, 7);
    }
}
