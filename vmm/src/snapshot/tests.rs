use proptest::prelude::*;

use super::*;
use crate::devices::DeviceState;
use crate::devices::virtio::ChipState;
use crate::devices::virtio::vsock::{CreditState, Ports, SpareState};
use crate::machine::tests::saved;

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn bytes_of(state: &MachineState) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    write(&file, state).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A file whose header is right for whatever the state is.
pub(crate) fn sealed(body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&62u32.to_le_bytes());
    bytes[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    bytes[24..32].copy_from_slice(&checksum(body).to_le_bytes());
    seal_header(&mut bytes);
    bytes.extend_from_slice(body);
    bytes
}

fn seal_header(bytes: &mut [u8]) {
    let of_header = checksum(&bytes[..32]);
    bytes[32..40].copy_from_slice(&of_header.to_le_bytes());
}

pub(crate) fn read_bytes(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
    read(&file(bytes))
}

fn refusal(bytes: &[u8]) -> SnapshotError {
    read_bytes(bytes).expect_err("must be refused")
}

/// The state with one field changed, in a file that is right otherwise.
fn read_changed(change: impl FnOnce(&mut MachineState)) -> Result<MachineState, SnapshotError> {
    let mut state = saved();
    change(&mut state);
    read_bytes(&sealed(&postcard::to_stdvec(&state).unwrap()))
}

#[test]
fn what_is_written_is_read() {
    let bytes = bytes_of(&saved());
    assert_eq!(bytes, sealed(&postcard::to_stdvec(&saved()).unwrap()));
    let read = read_bytes(&bytes).unwrap();
    assert_eq!(bytes_of(&read), bytes);
    assert_eq!(read.devices, saved().devices);
    assert_eq!(read.memory, saved().memory);
}

/// This fails when a state's encoding changes. Then older snapshots decode to
/// nonsense: raise FORMAT_VERSION, and have the loader turn the version before into
/// the new one, unless that was never released.
#[test]
fn the_format_is_what_it_was() {
    let mut state = saved();
    let ports = Ports {
        host_port: 1 << 30,
        guest_port: 52,
    };
    for device in &mut state.devices {
        if let DeviceState::Virtio(transport) = &mut device.state
            && let ChipState::Vsock(vsock) = &mut transport.chip
        {
            vsock.lost.push(ports);
            vsock.spares.push(SpareState {
                ports,
                credit: CreditState {
                    buf_alloc_bytes: 1,
                    received: 2,
                    forwarded: 3,
                    announced: 4,
                    peer_buf_alloc_bytes: 5,
                    sent: 6,
                    peer_forwarded: 7,
                },
                unread: b"unread".to_vec(),
            });
        }
    }
    let body = postcard::to_stdvec(&state).unwrap();
    assert_eq!(
        (body.len(), checksum(&body)),
        (10_134, 16_122_725_935_744_969_776)
    );
}

#[test]
fn a_truncated_snapshot_is_refused_at_every_length() {
    let bytes = bytes_of(&saved());
    let file = file(&bytes);
    for length in (0..bytes.len() as u64).rev() {
        file.set_len(length).unwrap();
        let expected = if length < HEADER_BYTES as u64 {
            HEADER_BYTES as u64
        } else {
            bytes.len() as u64
        };
        match read(&file) {
            Err(SnapshotError::Truncated {
                actual,
                expected: wanted,
            }) => assert_eq!((actual, wanted), (length, expected)),
            other => panic!("{length} bytes: {other:?}"),
        }
    }
}

#[test]
fn every_flipped_bit_of_the_header_is_found() {
    let bytes = bytes_of(&saved());
    for bit in 0..HEADER_BYTES * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let error = refusal(&damaged);
        let right = match bit / 8 {
            0..8 => matches!(error, SnapshotError::Magic(_)),
            // Of 2, one bit makes 0 and others make more.
            8..12 if bit == 8 * 8 + 1 => matches!(error, SnapshotError::Outdated(0)),
            8..12 => matches!(error, SnapshotError::Version(_)),
            _ => matches!(error, SnapshotError::Checksum("header")),
        };
        assert!(right, "bit {bit}: {error:?}");
    }
}

#[test]
fn every_flipped_bit_of_the_state_is_found() {
    let bytes = bytes_of(&saved());
    // Every bit of some bytes, and one bit of all.
    let some = (HEADER_BYTES..bytes.len()).step_by(97);
    let every = some.flat_map(|byte| (0..8).map(move |bit| (byte, bit)));
    let one = (HEADER_BYTES..bytes.len()).map(|byte| (byte, byte % 8));
    for (byte, bit) in every.chain(one) {
        let mut damaged = bytes.clone();
        damaged[byte] ^= 1 << bit;
        let error = refusal(&damaged);
        assert!(
            matches!(error, SnapshotError::Checksum("state")),
            "byte {byte}: {error:?}"
        );
    }
}

/// A header that is right in itself, but not one that this monitor can take.
#[test]
fn foreign_headers_are_refused_by_what_they_are() {
    let changed = |at: usize, word: &[u8]| {
        let mut bytes = bytes_of(&saved());
        bytes[at..at + word.len()].copy_from_slice(word);
        seal_header(&mut bytes);
        refusal(&bytes)
    };
    assert!(
        matches!(changed(0, b"SBXSNAPZ"), SnapshotError::Magic(magic) if &magic == b"SBXSNAPZ")
    );
    for version in [3, u32::MAX] {
        let error = changed(8, &version.to_le_bytes());
        assert!(matches!(error, SnapshotError::Version(found) if found == version));
    }
    for version in [0, 1u32] {
        let error = changed(8, &version.to_le_bytes());
        assert!(matches!(error, SnapshotError::Outdated(found) if found == version));
        assert!(error.to_string().ends_with("make it again"), "{error}");
    }
    // A newer format may have another header: its version is told before its
    // checksum, which may be elsewhere, is missed.
    let mut newer = bytes_of(&saved());
    newer[8] = 3;
    assert!(matches!(refusal(&newer), SnapshotError::Version(3)));
    let arm = 183u32;
    let error = changed(12, &arm.to_le_bytes());
    assert!(matches!(error, SnapshotError::Architecture(183)));
    for length in [STATE_MAX_BYTES + 1, u64::MAX, 1 << 63] {
        let error = changed(16, &length.to_le_bytes());
        assert!(
            matches!(error, SnapshotError::Checksum("length")),
            "{error:?}"
        );
    }
    // The longest is not there, but only that is wrong with it.
    let error = changed(16, &STATE_MAX_BYTES.to_le_bytes());
    assert!(
        matches!(error, SnapshotError::Truncated { .. }),
        "{error:?}"
    );
}

#[test]
fn bytes_after_the_state_are_refused() {
    let mut bytes = bytes_of(&saved());
    let expected = bytes.len() as u64;
    bytes.push(0);
    let error = refusal(&bytes);
    assert!(
        matches!(error, SnapshotError::Trailing { actual, expected: own } if actual == expected + 1 && own == expected),
        "{error:?}"
    );
    // In what the checksum covers.
    let mut body = postcard::to_stdvec(&saved()).unwrap();
    body.push(0);
    assert!(matches!(refusal(&sealed(&body)), SnapshotError::Decode(_)));
}

#[test]
fn what_is_no_file_of_ours_is_refused() {
    assert!(matches!(
        refusal(b""),
        SnapshotError::Truncated { actual: 0, .. }
    ));
    assert!(matches!(refusal(&[0x7f; 4096]), SnapshotError::Magic(_)));
    let error = read(&File::open("/").unwrap()).expect_err("a folder");
    assert!(matches!(
        error,
        SnapshotError::Io(_) | SnapshotError::Truncated { .. }
    ));
}

/// A file of the longest state cannot decode to gigabytes.
#[test]
fn lists_are_bounded() {
    let too_long: [fn(&mut MachineState); 7] = [
        |state| state.vcpus = vec![state.vcpus[0].clone(); 33],
        |state| state.cpu.cpuid = vec![Default::default(); 257],
        |state| state.devices = vec![state.devices[0].clone(); 23],
        |state| state.disk_layers = vec![1; 19],
        |state| state.memory.runs = vec![state.memory.runs[0]; MAX_RUNS + 1],
        |state| state.vcpus[0].msrs = vec![(0, 0); 4097],
        |state| state.vcpus[0].xsave = vec![0; (1 << 14) + 1],
    ];
    for (which, change) in too_long.into_iter().enumerate() {
        let error = read_changed(change).expect_err("must be refused");
        assert!(
            matches!(error, SnapshotError::Decode(_)),
            "{which}: {error:?}"
        );
    }
    let longest: [fn(&mut MachineState); 3] = [
        |state| state.vcpus = vec![state.vcpus[0].clone(); 32],
        |state| state.cpu.cpuid = vec![Default::default(); 256],
        |state| state.memory.runs = vec![state.memory.runs[0]; MAX_RUNS],
    ];
    for change in longest {
        read_changed(change).unwrap();
    }
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let mut state = saved();
    state.memory.runs = vec![state.memory.runs[0]; MAX_RUNS + 1];
    let file = tempfile::tempfile().unwrap();
    let error = write(&file, &state).expect_err("must be refused");
    assert!(matches!(error, SnapshotError::Fragmented(runs) if runs == MAX_RUNS + 1));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

/// 32 vCPUs and a map of memory as long as it may be fit.
#[test]
fn the_longest_state_fits() {
    let mut state = saved();
    let vcpu = state.vcpus[0].clone();
    state.vcpus = vec![vcpu; 32];
    for vcpu in &mut state.vcpus {
        vcpu.xsave = vec![u32::MAX; 4096];
        vcpu.msrs = vec![(u32::MAX, u64::MAX); 512];
    }
    // Of 1 TiB.
    let pages = 1 << 28;
    let run = crate::memory::runs::Run {
        start_page: pages - 1,
        pages,
        layer: 127,
        layer_page: pages - 1,
    };
    state.memory.runs = vec![run; MAX_RUNS];
    assert!(bytes_of(&state).len() as u64 <= STATE_MAX_BYTES + HEADER_BYTES as u64);
    read_bytes(&bytes_of(&state)).unwrap();
}

proptest! {
    /// Whatever a file says, with checksums that are right, it is refused or
    /// decoded, and then written again and read.
    #[test]
    fn any_state_is_survived(body in prop::collection::vec(any::<u8>(), 0..4096)) {
        if let Ok(state) = read_bytes(&sealed(&body)) {
            read_bytes(&bytes_of(&state)).unwrap();
        }
    }

    #[test]
    fn any_file_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(read_bytes(&bytes).is_err());
    }

    /// The length of a list is a varint that says anything, before few bytes.
    #[test]
    fn any_length_of_a_list_is_survived(at in any::<prop::sample::Index>(), length in any::<u64>()) {
        let mut body = postcard::to_stdvec(&saved()).unwrap();
        let at = at.index(body.len());
        let varint = postcard::to_stdvec(&length).unwrap();
        body.splice(at..(at + 1), varint);
        let _ = read_bytes(&sealed(&body));
    }
}
