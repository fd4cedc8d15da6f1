use super::*;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn unlimited() -> Limits {
    Limits {
        queries_per_second: 1_000_000,
        burst: 1_000_000,
        ..Limits::default()
    }
}

/// A header that counts a few records, and bytes that look a little like names
/// and records.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..20),
        Just(vec![0xc0, 12]),
        Just(b"\x03api\x04test\x00\x00\x01\x00\x01".to_vec()),
        Just(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x01".to_vec()),
        Just(b"\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x02\xc0\x0c".to_vec()),
        Just(b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00".to_vec()),
    ];
    let pieces = proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat());
    let counts = proptest::array::uniform4(0_u8..3);
    (any::<[u8; 2]>(), counts, pieces).prop_map(|(flags, counts, pieces)| {
        let counts = counts.into_iter().flat_map(|count| [0, count]);
        flags.into_iter().chain(counts).chain(pieces).collect()
    })
}

#[test]
fn no_question_ends_the_resolver() {
    let runtime = runtime();
    let (upstream, guest) = runtime.block_on(async {
        let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
        let policy = policy(&["*.test"], vec![upstream.address]);
        let guest = Guest::with(policy, unlimited(), Slot::new(false)).await;
        (upstream, guest)
    });
    let ran = TestRunner::new(Config::with_cases(300)).run(&body(), |body| {
        runtime.block_on(async {
            let message = [&[1, 2], body.as_slice()].concat();
            let socket = guest.socket().await;
            socket.send(&message).await.unwrap();
            let mut stream = TcpStream::connect(guest.address).await.unwrap();
            let length = u16::try_from(message.len()).unwrap();
            let _ = stream.write_all(&length.to_be_bytes()).await;
            let _ = stream.write_all(&message).await;
            let _ = stream.shutdown().await;
            let mut said = Vec::new();
            let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut said))
                .await
                .unwrap();
            assert!(said.is_empty() || said[2..4] == [1, 2]);
        });
        Ok(())
    });
    ran.unwrap();
    let told = runtime.block_on(guest.ask("api.test", RecordType::A));
    assert_eq!(told.answers.len(), 1);
    drop(upstream);
}

#[test]
fn no_answer_ends_the_resolver() {
    let runtime = runtime();
    let said = Arc::new(Mutex::new(Vec::new()));
    let (upstream, guest) = runtime.block_on(async {
        let said = Arc::clone(&said);
        let upstream = Upstream::start(move |question, _| {
            let id = question.metadata.id.to_be_bytes();
            let garbage = [&id, said.lock().unwrap().as_slice()].concat();
            // What follows keeps the resolver from waiting for more.
            vec![garbage, failure(question, ResponseCode::NXDomain)]
        })
        .await;
        let policy = policy(&["*.test"], vec![upstream.address]);
        let guest = Guest::with(policy, unlimited(), Slot::new(false)).await;
        (upstream, guest)
    });
    let ran = TestRunner::new(Config::with_cases(300)).run(&body(), |body| {
        *said.lock().unwrap() = body;
        // It is answered, whatever with.
        runtime.block_on(guest.ask("api.test", RecordType::A));
        Ok(())
    });
    ran.unwrap();
    assert!(upstream.times_asked() >= 300);
}
