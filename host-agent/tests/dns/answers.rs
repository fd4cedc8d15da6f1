use super::*;

#[tokio::test]
async fn addresses_are_told_and_opened_for_their_ttl() {
    let upstream = Upstream::start(|question, _| {
        let records = match question.queries[0].query_type() {
            RecordType::A => vec![
                a("api.test", "192.0.2.1", 77),
                a("api.test", "192.0.2.2", 77),
            ],
            RecordType::AAAA => vec![aaaa("api.test", "2001:db8::1", 9)],
            other => panic!("{other}"),
        };
        vec![answer(question, records)]
    })
    .await;
    let guest = Guest::start(&["api.test"], &[&upstream]).await;

    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::NoError);
    assert_eq!(
        told.answers,
        [
            a("api.test", "192.0.2.1", 77),
            a("api.test", "192.0.2.2", 77)
        ]
    );
    assert_eq!(
        guest.opened(),
        [opened("api.test", &["192.0.2.1", "192.0.2.2"], 77)]
    );
    let told = guest.ask_over_tcp("API.test", RecordType::AAAA).await;
    assert_eq!(told.answers, [aaaa("api.test", "2001:db8::1", 9)]);
    assert_eq!(
        guest.opened()[1..],
        [opened("api.test", &["2001:db8::1"], 9)]
    );
}

#[tokio::test]
async fn an_alias_leads_to_what_it_stands_for() {
    let upstream = Upstream::with(vec![
        a("edge.cdn.test", "192.0.2.9", 300),
        a("stray.test", "192.0.2.10", 300),
        alias("www.site.test", "edge.cdn.test", 30),
    ])
    .await;
    // The alias's target need not be allowed itself; every domain of the name counts.
    let guest = Guest::start(&["www.site.test", "*.site.test"], &[&upstream]).await;
    let told = guest.ask("www.site.test", RecordType::A).await;
    assert_eq!(
        told.answers,
        [
            alias("www.site.test", "edge.cdn.test", 30),
            a("edge.cdn.test", "192.0.2.9", 30)
        ]
    );
    let mut both =
        ["www.site.test", "*.site.test"].map(|domain| opened(domain, &["192.0.2.9"], 30));
    both.sort_unstable();
    assert_eq!(guest.opened(), both);
}

#[tokio::test]
async fn other_names_are_refused_and_nobody_is_asked() {
    let upstream = Upstream::with(vec![a("other.test", "192.0.2.1", 60)]).await;
    let guest = Guest::start(&["*.api.test"], &[&upstream]).await;
    for refused in [
        "other.test",
        "api.test",
        "notapi.test",
        "x.api.test.evil.test",
    ] {
        let told = guest.ask(refused, RecordType::A).await;
        assert_eq!(told.metadata.response_code, ResponseCode::Refused);
    }
    let told = guest.ask("x.api.test", RecordType::ANY).await;
    assert_eq!(told.metadata.response_code, ResponseCode::Refused);
    // These carry addresses: clients make do with A and AAAA.
    let told = guest.ask("x.api.test", RecordType::HTTPS).await;
    assert_eq!(told.metadata.response_code, ResponseCode::NoError);
    assert!(told.answers.is_empty());
    assert_eq!(upstream.times_asked(), 0);
    assert_eq!(guest.opened(), []);
}

#[tokio::test]
async fn names_of_no_domain_open_nothing() {
    let upstream = Upstream::with(vec![a("other.test", "192.0.2.1", 60)]).await;
    let policy = Policy {
        others: Others::Resolve,
        ..policy(&[], vec![upstream.address])
    };
    let guest = Guest::with(policy, Limits::default(), Slot::new(false)).await;
    let told = guest.ask("other.test", RecordType::A).await;
    assert_eq!(told.answers.len(), 1);
    assert_eq!(guest.opened(), []);
}

#[tokio::test]
async fn what_is_not_there_is_said_as_the_server_says_it() {
    let upstream =
        Upstream::start(|question, _| vec![failure(question, ResponseCode::NXDomain)]).await;
    let guest = Guest::start(&["*.test"], &[&upstream]).await;
    let told = guest.ask("gone.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(upstream.times_asked(), 1);
    assert_eq!(guest.opened(), []);
}

#[tokio::test]
async fn a_name_that_leads_where_the_guest_may_not_go_leads_nowhere() {
    let upstream = Upstream::start(|question, _| {
        let records = match question.queries[0].query_type() {
            RecordType::A => vec![a("evil.test", "10.0.0.1", 60)],
            _ => vec![aaaa("evil.test", "::ffff:10.0.0.1", 60)],
        };
        vec![answer(question, records)]
    })
    .await;
    let guest = Guest::start(&["evil.test", "half.test"], &[&upstream]).await;
    for record_type in [RecordType::A, RecordType::AAAA] {
        let told = guest.ask("evil.test", record_type).await;
        assert_eq!(told.metadata.response_code, ResponseCode::NoError);
        assert!(told.answers.is_empty());
    }
    assert_eq!(guest.opened(), []);

    let half = vec![
        a("half.test", "10.0.0.1", 60),
        a("half.test", "192.0.2.1", 60),
    ];
    let upstream = Upstream::with(half).await;
    let guest = Guest::start(&["half.test"], &[&upstream]).await;
    let told = guest.ask("half.test", RecordType::A).await;
    assert_eq!(told.answers, [a("half.test", "192.0.2.1", 60)]);
    assert_eq!(guest.opened(), [opened("half.test", &["192.0.2.1"], 60)]);
}

#[tokio::test]
async fn a_policy_holds_from_when_it_is_sent() {
    let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let guest = Guest::start(&["api.test"], &[&upstream]).await;
    let answers = |told: Message| (told.metadata.response_code, told.answers.len());
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(answers(told), (ResponseCode::NoError, 1));

    let server = vec![upstream.address];
    guest
        .policy
        .send_replace(Arc::new(policy(&[], server.clone())));
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(answers(told), (ResponseCode::Refused, 0));
    let nowhere = Policy {
        allowed: Arc::new(|_| false),
        ..policy(&["api.test"], server.clone())
    };
    guest.policy.send_replace(Arc::new(nowhere));
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(answers(told), (ResponseCode::NoError, 0));
    assert_eq!(guest.opened().len(), 1);
    guest
        .policy
        .send_replace(Arc::new(policy(&["*.test", "api.test"], server)));
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(answers(told), (ResponseCode::NoError, 1));
    assert_eq!(guest.opened().len(), 3);
}

#[tokio::test]
async fn a_policy_holds_for_questions_that_wait() {
    let (asked, mut was_asked) = tokio::sync::mpsc::unbounded_channel();
    let first = Upstream::start(move |_, _| {
        asked.send(()).unwrap();
        Vec::new()
    })
    .await;
    let second = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let guest = Guest::start(&["api.test"], &[&first, &second]).await;
    let change = async {
        was_asked.recv().await.unwrap();
        guest.policy.send_replace(Arc::new(policy(&[], Vec::new())));
    };
    let (told, ()) = tokio::join!(guest.ask("api.test", RecordType::A), change);
    assert_eq!(second.times_asked(), 1);
    assert_eq!(told.metadata.response_code, ResponseCode::Refused);
    assert_eq!(guest.opened(), []);
}

#[tokio::test]
async fn an_answer_waits_until_its_addresses_are_open() {
    let upstream = Upstream::with(vec![a("api.test", "192.0.2.1", 60)]).await;
    let guest = Guest::start(&["api.test"], &[&upstream]).await;
    let all = u32::try_from(guest.slot.may_open.available_permits()).unwrap();
    let held = guest.slot.may_open.acquire_many(all).await.unwrap();
    let socket = guest.socket().await;
    let asked = question("api.test", RecordType::A).to_vec().unwrap();
    socket.send(&asked).await.unwrap();
    let mut buffer = [0; 512];
    let early = tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut buffer)).await;
    assert!(early.is_err());
    drop(held);
    assert_eq!(receive(&socket).await.answers.len(), 1);

    let slot = Slot::new(true);
    let policy = policy(&["api.test"], vec![upstream.address]);
    let guest = Guest::with(policy, Limits::default(), slot).await;
    let told = guest.ask("api.test", RecordType::A).await;
    assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
    assert!(told.answers.is_empty());
}

#[tokio::test]
async fn a_long_answer_comes_over_tcp() {
    let many: Vec<Record> = (1..=200)
        .map(|index| a("many.test", &format!("192.0.2.{index}"), 60))
        .collect();
    let upstream = Upstream::start({
        let many = many.clone();
        move |question, is_datagram| {
            let mut message = reply(question);
            if is_datagram {
                message.metadata.truncation = true;
            } else {
                message.answers.clone_from(&many);
            }
            vec![message.to_vec().unwrap()]
        }
    })
    .await;
    let guest = Guest::start(&["many.test"], &[&upstream]).await;
    for question in [
        question("many.test", RecordType::A),
        with_edns(question("many.test", RecordType::A), 65535),
    ] {
        let told = guest.send(&question).await;
        assert!(told.metadata.truncation && told.answers.is_empty());
    }
    // Nothing was told, so nothing is open.
    assert_eq!(guest.opened(), []);
    let told = guest.ask_over_tcp("many.test", RecordType::A).await;
    assert_eq!(told.answers, many);
    assert_eq!(guest.opened()[0].1.len(), 200);
}

#[tokio::test]
async fn edns_makes_room_in_a_datagram() {
    let some: Vec<Record> = (1..=50)
        .map(|index| a("some.test", &format!("192.0.2.{index}"), 60))
        .collect();
    let upstream = Upstream::with(some.clone()).await;
    let guest = Guest::start(&["some.test"], &[&upstream]).await;
    let plain = question("some.test", RecordType::A);
    assert!(guest.send(&plain).await.metadata.truncation);
    let told = guest.send(&with_edns(plain, 4096)).await;
    assert_eq!(told.answers, some);
    assert_eq!(told.edns.unwrap().max_payload(), 1232);
    assert_eq!(upstream.asked.lock().unwrap()[0].max_payload(), 1232);
}

#[tokio::test]
async fn a_connection_carries_several_questions() {
    let upstream = Upstream::start(|question, _| {
        let name = question.queries[0].name().clone();
        let record = Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1)));
        vec![answer(question, vec![record])]
    })
    .await;
    let guest = Guest::start(&["*.test"], &[&upstream]).await;
    let mut stream = TcpStream::connect(guest.address).await.unwrap();
    for of in ["a.test", "b.test", "c.test"] {
        let told = ask_stream(&mut stream, &question(of, RecordType::A)).await;
        assert_eq!(told.answers, [a(of, "192.0.2.1", 60)]);
    }
}
