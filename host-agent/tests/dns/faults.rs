use super::*;

fn quick() -> Limits {
    Limits {
        attempt: Duration::from_millis(500),
        ..Limits::default()
    }
}

#[tokio::test]
async fn a_server_that_fails_is_passed_over() {
    let dead = Upstream::silent().await;
    let failing =
        Upstream::start(|question, _| vec![failure(question, ResponseCode::ServFail)]).await;
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let nobody = closed.local_addr().unwrap();
    drop(closed);
    let good = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let servers = vec![dead.address, failing.address, nobody, good.address];
    let guest = Guest::with(policy(&["api.test"], servers), quick(), Slot::new(false)).await;
    for _ in 0..3 {
        let told = guest.ask("api.test", RecordType::A).await;
        assert_eq!(told.answers, [a("api.test", "192.0.2.1", 60)]);
    }
    // The one that answered is asked first from then on.
    assert_eq!((dead.times_asked(), failing.times_asked()), (1, 1));
    assert_eq!(good.times_asked(), 3);
}

#[tokio::test]
async fn without_any_server_the_guest_hears_of_it() {
    let dead = Upstream::silent().await;
    let failing =
        Upstream::start(|question, _| vec![failure(question, ResponseCode::Refused)]).await;
    for servers in [vec![dead.address, failing.address], vec![]] {
        let guest = Guest::with(policy(&["*.test"], servers), quick(), Slot::new(false)).await;
        let told = guest.ask("api.test", RecordType::A).await;
        assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
    }
    // A lost datagram is sent again.
    assert_eq!(dead.times_asked(), 2);
    // However many there are, there is an end.
    let limits = Limits {
        total: Duration::from_millis(300),
        ..quick()
    };
    let servers = vec![dead.address; 1000];
    let guest = Guest::with(policy(&["*.test"], servers), limits, Slot::new(false)).await;
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn an_answer_to_something_else_is_not_believed() {
    let upstream = Upstream::start(|question, _| {
        let evil = vec![a("api.test", "198.51.100.1", 60)];
        let mut other_id = reply(question);
        other_id.metadata.id ^= 1;
        other_id.answers.clone_from(&evil);
        let mut other_name = reply(question);
        other_name.queries[0].set_name(name("evil.test"));
        other_name.answers.clone_from(&evil);
        let mut other_type = reply(question);
        other_type.queries[0].set_query_type(RecordType::TXT);
        other_type.answers.clone_from(&evil);
        let mut no_answer = reply(question);
        no_answer.metadata.message_type = MessageType::Query;
        no_answer.answers = evil;
        let wrong = [other_id, other_name, other_type, no_answer];
        let mut all: Vec<Vec<u8>> = wrong.iter().map(|wrong| wrong.to_vec().unwrap()).collect();
        all.push(b"nonsense".to_vec());
        all.push(answer(question, vec![a("api.test", "192.0.2.1", 60)]));
        all
    })
    .await;
    let guest = Guest::start(&["api.test"], &[&upstream]).await;
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.answers, [a("api.test", "192.0.2.1", 60)]);
    assert_eq!(guest.opened(), [opened("api.test", &["192.0.2.1"], 60)]);
}

#[tokio::test]
async fn a_wrong_or_broken_answer_over_tcp_is_a_failure() {
    let upstream = Upstream::start(|question, is_datagram| {
        let mut message = reply(question);
        message.metadata.truncation = is_datagram;
        if !is_datagram {
            message.metadata.id ^= 1;
        }
        vec![message.to_vec().unwrap()]
    })
    .await;
    let guest = Guest::with(
        policy(&["*.test"], vec![upstream.address]),
        quick(),
        Slot::new(false),
    )
    .await;
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
    // One that says that it is long, and over TCP nothing.
    let upstream = Upstream::start(|question, is_datagram| {
        let mut message = reply(question);
        message.metadata.truncation = true;
        is_datagram
            .then(|| message.to_vec().unwrap())
            .into_iter()
            .collect()
    })
    .await;
    let guest = Guest::with(
        policy(&["*.test"], vec![upstream.address]),
        quick(),
        Slot::new(false),
    )
    .await;
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn every_question_has_an_id_and_a_port_of_its_own() {
    let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let guest = Guest::start(&["api.test"], &[&upstream]).await;
    for _ in 0..20 {
        guest.ask("api.test", RecordType::A).await;
    }
    let asked = upstream.asked.lock().unwrap();
    let mut ids: Vec<u16> = asked.iter().map(|question| question.metadata.id).collect();
    ids.sort_unstable();
    ids.dedup();
    // Of 65,536; two may meet, many do not.
    assert!(ids.len() > 15, "{ids:?}");
    let step = u32::from(ids[ids.len() - 1]) - u32::from(ids[0]);
    assert!(step > 1000, "{ids:?}");
}

#[tokio::test]
async fn a_guest_that_asks_too_much_is_not_answered() {
    let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let limits = Limits {
        queries_per_second: 1,
        burst: 10,
        ..Limits::default()
    };
    let server = vec![upstream.address];
    let guest = Guest::with(
        policy(&["api.test"], server.clone()),
        limits,
        Slot::new(false),
    )
    .await;
    for _ in 0..10 {
        guest.ask("api.test", RecordType::A).await;
    }
    let asked = question("api.test", RecordType::A).to_vec().unwrap();
    for _ in 0..1000 {
        guest.socket().await.send(&asked).await.unwrap();
    }
    let mut stream = TcpStream::connect(guest.address).await.unwrap();
    let _ = stream
        .write_all(&[&[0, 26], asked.as_slice()].concat())
        .await;
    let mut said = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut said))
        .await
        .unwrap();
    // A second or a few may have passed since.
    assert!(upstream.times_asked() < 500, "{}", upstream.times_asked());

    // Nor does it hold more than its share of the host's sockets.
    let dead = Upstream::silent().await;
    let limits = Limits {
        concurrent: 5,
        queries_per_second: 1000,
        burst: 1000,
        attempt: LONG,
        total: LONG,
        ..Limits::default()
    };
    let guest = Guest::with(
        policy(&["*.test"], vec![dead.address]),
        limits,
        Slot::new(false),
    )
    .await;
    for _ in 0..100 {
        guest.socket().await.send(&asked).await.unwrap();
    }
    let over = tokio::time::Instant::now() + LONG;
    while dead.times_asked() < 5 {
        assert!(tokio::time::Instant::now() < over);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(dead.times_asked(), 5);
}

#[tokio::test]
async fn a_slow_or_long_question_over_tcp_is_cut_off() {
    let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let limits = Limits {
        tcp_connections: 1,
        idle: Duration::from_millis(100),
        ..Limits::default()
    };
    let server = vec![upstream.address];
    let guest = Guest::with(policy(&["api.test"], server), limits, Slot::new(false)).await;
    for begun in [
        b"".as_slice(),
        &[0],
        &[0, 30, 1, 2],
        &[0xff, 0xff],
        &[0, 3, 1, 2, 3],
    ] {
        let mut stream = TcpStream::connect(guest.address).await.unwrap();
        stream.write_all(begun).await.unwrap();
        let mut said = Vec::new();
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut said))
            .await
            .unwrap();
        assert_eq!(said, b"");
    }
    let told = guest.ask_over_tcp("api.test", RecordType::A).await;
    assert_eq!(told.answers.len(), 1);
}
