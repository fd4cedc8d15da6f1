//! What of a server's answer is an answer to the question, and may be told.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Message, Query as Question, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::{MAX_TTL, MIN_TTL};

/// Aliases that lead to one another; as many as resolvers follow.
const MAX_ALIASES: usize = 16;
/// More than any name has: an answer must not fill the host's sets.
const MAX_RECORDS: usize = 256;

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Selected {
    pub(super) code: ResponseCode,
    /// Aliases, in order, and then what was asked for.
    pub(super) records: Vec<Record>,
    /// The SOA record by which guests remember that there is nothing.
    pub(super) authority: Option<Record>,
    /// What the records lead to.
    pub(super) addresses: Vec<IpAddr>,
    /// Of every record.
    pub(super) ttl: Duration,
}

/// Takes from `message` the aliases that lead on from the name asked for, and the
/// records at their end, without the addresses that are not `allowed`. Where
/// none are left the answer is empty, not NXDOMAIN: that would say that the name
/// has no records of other types either.
///
/// Every record gets the smallest TTL of them: none must be remembered for longer
/// than the addresses are open.
pub(super) fn select(
    question: &Question,
    message: &Message,
    allowed: impl Fn(&IpAddr) -> bool,
) -> Selected {
    let wanted = question.query_type();
    let mut name = question.name();
    let mut records: Vec<Record> = Vec::new();
    let mut addresses = Vec::new();
    for _ in 0..=MAX_ALIASES {
        let answers = of(message, name, wanted).take(MAX_RECORDS);
        let found = records.len();
        for record in answers {
            match address(&record.data) {
                Some(address) if !allowed(&address) => continue,
                Some(address) if addresses.contains(&address) => continue,
                Some(address) => addresses.push(address),
                // Whatever it is, it is not what was asked for.
                None if matches!(wanted, RecordType::A | RecordType::AAAA) => continue,
                None => {}
            }
            records.push(record.clone());
        }
        if records.len() > found {
            break;
        }
        let alias = of(message, name, RecordType::CNAME).find_map(|record| match &record.data {
            RData::CNAME(target) => Some((record, &target.0)),
            _ => None,
        });
        let Some((record, target)) = alias else { break };
        records.push(record.clone());
        name = target;
    }

    let authority = message.authorities.iter().find(|record| {
        addresses.is_empty()
            && record.record_type() == RecordType::SOA
            && record.dns_class == DNSClass::IN
            && record.name.zone_of(name)
    });
    let mut authority = authority.cloned();
    let ttls = records.iter().chain(&authority).map(|record| record.ttl);
    let ttl = Duration::from_secs(ttls.min().unwrap_or(0).into()).clamp(MIN_TTL, MAX_TTL);
    for record in records.iter_mut().chain(&mut authority) {
        record.ttl = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
    }
    Selected {
        code: message.metadata.response_code,
        records,
        authority,
        addresses,
        ttl,
    }
}

fn of<'a>(
    message: &'a Message,
    name: &'a Name,
    record_type: RecordType,
) -> impl Iterator<Item = &'a Record> {
    message.answers.iter().filter(move |record| {
        record.dns_class == DNSClass::IN
            && record.record_type() == record_type
            && record.name == *name
    })
}

/// The address in a record; an IPv4 address as such, however it is written.
fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, TXT};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn a(owner: &str, address: &str, ttl: u32) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A(address.parse().unwrap())))
    }

    fn aaaa(owner: &str, address: &str, ttl: u32) -> Record {
        Record::from_rdata(
            name(owner),
            ttl,
            RData::AAAA(AAAA(address.parse().unwrap())),
        )
    }

    fn alias(owner: &str, target: &str, ttl: u32) -> Record {
        Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
    }

    fn message(answers: Vec<Record>) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.answers = answers;
        message
    }

    fn selected(record_type: RecordType, answers: Vec<Record>) -> Selected {
        let question = Question::query(name("a.test."), record_type);
        select(&question, &message(answers), |address| {
            !address.to_string().starts_with("10.")
        })
    }

    fn addresses(selected: &Selected) -> Vec<String> {
        selected.addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn aliases_are_followed_and_the_rest_is_left_out() {
        let answers = vec![
            a("c.test.", "192.0.2.1", 300),
            a("c.test.", "192.0.2.1", 300),
            a("c.test.", "192.0.2.2", 300),
            a("other.test.", "192.0.2.3", 5),
            aaaa("c.test.", "2001:db8::1", 300),
            alias("B.test.", "C.test.", 20),
            alias("a.test.", "b.test.", 300),
        ];
        let selected = selected(RecordType::A, answers);
        assert_eq!(addresses(&selected), ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(selected.ttl, Duration::from_secs(20));
        let types: Vec<_> = selected.records.iter().map(Record::record_type).collect();
        assert_eq!(
            types,
            [
                RecordType::CNAME,
                RecordType::CNAME,
                RecordType::A,
                RecordType::A
            ]
        );
        assert!(selected.records.iter().all(|record| record.ttl == 20));
    }

    #[test]
    fn a_circle_of_aliases_ends() {
        let answers = vec![
            alias("a.test.", "b.test.", 1),
            alias("b.test.", "a.test.", 1),
        ];
        let selected = selected(RecordType::A, answers);
        assert_eq!(selected.records.len(), MAX_ALIASES + 1);
        assert!(selected.addresses.is_empty());
    }

    #[test]
    fn a_denied_address_is_not_told_in_any_form() {
        for (record_type, answers) in [
            (RecordType::A, vec![a("a.test.", "10.0.0.1", 60)]),
            (
                RecordType::AAAA,
                vec![aaaa("a.test.", "::ffff:10.0.0.1", 60)],
            ),
        ] {
            let selected = selected(record_type, answers);
            assert_eq!(selected.code, ResponseCode::NoError);
            assert!(selected.records.is_empty() && selected.addresses.is_empty());
        }
        let both = vec![a("a.test.", "10.0.0.1", 60), a("a.test.", "192.0.2.1", 60)];
        assert_eq!(addresses(&selected(RecordType::A, both)), ["192.0.2.1"]);
    }

    #[test]
    fn ttls_are_kept_within_bounds() {
        for (ttl, kept) in [(0, 1), (1, 1), (3600, 3600), (u32::MAX, 3600)] {
            let selected = selected(RecordType::A, vec![a("a.test.", "192.0.2.1", ttl)]);
            assert_eq!(selected.ttl, Duration::from_secs(kept));
            assert_eq!(u64::from(selected.records[0].ttl), kept);
        }
    }

    #[test]
    fn an_answer_is_not_endless() {
        let records = (0..1000).map(|index| {
            let address = format!("192.0.{}.{}", index / 250, index % 250);
            a("a.test.", &address, 60)
        });
        let selected = selected(RecordType::A, records.collect());
        assert_eq!(selected.addresses.len(), MAX_RECORDS);
    }

    #[test]
    fn other_types_pass_and_open_nothing() {
        let txt = Record::from_rdata(name("a.test."), 60, RData::TXT(TXT::new(vec!["x".into()])));
        let selected = selected(
            RecordType::TXT,
            vec![txt.clone(), a("a.test.", "192.0.2.1", 60)],
        );
        assert_eq!(selected.records, [txt]);
        assert!(selected.addresses.is_empty());
    }

    #[test]
    fn nothing_is_told_with_its_zones_authority_only() {
        let soa = |zone: &str| {
            let data = SOA::new(name(zone), name(zone), 1, 2, 3, 4, 60);
            Record::from_rdata(name(zone), 7200, RData::SOA(data))
        };
        let mut message = message(Vec::new());
        message.metadata.response_code = ResponseCode::NXDomain;
        message.authorities = vec![soa("evil.example."), soa("test."), soa("test.")];
        let question = Question::query(name("a.test."), RecordType::A);
        let selected = select(&question, &message, |_| true);
        assert_eq!(selected.code, ResponseCode::NXDomain);
        let authority = selected.authority.unwrap();
        assert_eq!((authority.name, authority.ttl), (name("test."), 3600));
    }

    proptest! {
        #[test]
        fn nothing_is_told_that_is_not_allowed(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            counts in any::<[u8; 4]>(),
        ) {
            // A header that counts a few records of each section, then anything.
            let mut message = vec![0, 1, 0x80, 0];
            message.extend(counts.into_iter().flat_map(|count| [0, count % 4]));
            message.extend(bytes);
            if let Ok(message) = Message::from_vec(&message) {
                for record in &message.answers {
                    let question = Question::query(record.name.clone(), record.record_type());
                    let selected = select(&question, &message, |_| false);
                    prop_assert!(selected.addresses.is_empty());
                    prop_assert!(selected.records.iter().all(|record| address(&record.data).is_none()));
                }
            }
        }
    }
}
