//! A guest's question, and how answers to it are written.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};

use super::select::Selected;

/// RFC 1035, section 4.2.1: what fits where EDNS says nothing else.
const PLAIN_BYTES: u16 = 512;
/// The largest that no path fragments; <https://dnsflagday.net/2020/>.
pub(super) const EDNS_BYTES: u16 = 1232;
const HEADER_BYTES: usize = 12;

pub(super) struct Query {
    id: u16,
    recursion_desired: bool,
    pub(super) question: Question,
    /// The largest datagram that the asker takes, where it knows EDNS.
    payload_bytes: Option<u16>,
}

/// What is not a question that can be looked up; with the answer, if it gets one.
pub(super) struct Rejected(pub(super) Option<Vec<u8>>);

// === impl Query ===

impl Query {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Rejected> {
        let &[high, low, flags, ..] = bytes else {
            return Err(Rejected(None));
        };
        // An answer to an answer could go on for ever.
        if bytes.len() < HEADER_BYTES || flags & 0x80 != 0 {
            return Err(Rejected(None));
        }
        let id = u16::from_be_bytes([high, low]);
        let reject = |op_code, code| {
            let message = Message::error_msg(id, op_code, code);
            Rejected(message.to_vec().ok())
        };
        let Ok(message) = Message::from_vec(bytes) else {
            return Err(reject(OpCode::Query, ResponseCode::FormErr));
        };
        let metadata = message.metadata;
        if metadata.message_type != MessageType::Query || metadata.op_code != OpCode::Query {
            return Err(reject(metadata.op_code, ResponseCode::NotImp));
        }
        let Ok([question]) = <[Question; 1]>::try_from(message.queries) else {
            return Err(reject(OpCode::Query, ResponseCode::FormErr));
        };
        let query = Self {
            id,
            recursion_desired: metadata.recursion_desired,
            question,
            payload_bytes: message.edns.as_ref().map(Edns::max_payload),
        };
        if message.edns.is_some_and(|edns| edns.version() != 0) {
            return Err(Rejected(query.failed(ResponseCode::BADVERS)));
        }
        let is_refused = query.question.query_class() != DNSClass::IN
            || matches!(
                query.question.query_type(),
                RecordType::ANY | RecordType::AXFR | RecordType::IXFR
            );
        if is_refused {
            return Err(Rejected(query.failed(ResponseCode::Refused)));
        }
        Ok(query)
    }

    /// What the asker takes in one datagram.
    pub(super) fn datagram_bytes(&self) -> usize {
        let asked = self.payload_bytes.unwrap_or(PLAIN_BYTES);
        usize::from(asked.clamp(PLAIN_BYTES, EDNS_BYTES))
    }

    pub(super) fn failed(&self, code: ResponseCode) -> Option<Vec<u8>> {
        self.response(code).to_vec().ok()
    }

    /// Tells the asker to come back over TCP.
    pub(super) fn truncated(&self) -> Option<Vec<u8>> {
        let mut message = self.response(ResponseCode::NoError);
        message.metadata.truncation = true;
        message.to_vec().ok()
    }

    pub(super) fn answer(&self, selected: &Selected) -> Option<Vec<u8>> {
        let mut message = self.response(selected.code);
        message.answers.clone_from(&selected.records);
        message.authorities.extend(selected.authority.clone());
        message.to_vec().ok()
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::error_msg(self.id, OpCode::Query, code);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.queries.push(self.question.clone());
        if self.payload_bytes.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(EDNS_BYTES);
            message.set_edns(edns);
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Name;
    use proptest::prelude::*;

    use super::*;

    fn query(class: DNSClass, record_type: RecordType) -> Message {
        let mut question = Question::query(Name::from_ascii("a.test.").unwrap(), record_type);
        question.set_query_class(class);
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.queries.push(question);
        message
    }

    /// What is said to a message that is no question.
    fn rejection(message: &Message) -> ResponseCode {
        let Err(Rejected(Some(answer))) = Query::read(&message.to_vec().unwrap()) else {
            panic!("{message:?} is not rejected");
        };
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.id, 7);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        answer.metadata.response_code
    }

    #[test]
    fn what_cannot_be_looked_up_is_told_why() {
        let plain = || query(DNSClass::IN, RecordType::A);
        assert!(Query::read(&plain().to_vec().unwrap()).is_ok());
        for (class, record_type) in [
            (DNSClass::CH, RecordType::TXT),
            (DNSClass::IN, RecordType::ANY),
            (DNSClass::IN, RecordType::AXFR),
            (DNSClass::IN, RecordType::IXFR),
        ] {
            let refused = rejection(&query(class, record_type));
            assert_eq!(refused, ResponseCode::Refused);
        }
        let mut twice = plain();
        twice.queries.push(twice.queries[0].clone());
        assert_eq!(rejection(&twice), ResponseCode::FormErr);
        let mut none = plain();
        none.queries.clear();
        assert_eq!(rejection(&none), ResponseCode::FormErr);
        let mut update = plain();
        update.metadata.op_code = OpCode::Notify;
        assert_eq!(rejection(&update), ResponseCode::NotImp);
        let mut newer = plain();
        newer.set_edns(Edns::new().set_version(1).clone());
        // BADVERS; BADSIG has the same number (RFC 8945, section 3).
        assert_eq!(u16::from(rejection(&newer)), 16);
    }

    #[test]
    fn an_answer_gets_none() {
        let mut answer = query(DNSClass::IN, RecordType::A);
        answer.metadata.message_type = MessageType::Response;
        let bytes = answer.to_vec().unwrap();
        assert!(matches!(Query::read(&bytes), Err(Rejected(None))));
        assert!(matches!(Query::read(&[0; 11]), Err(Rejected(None))));
    }

    #[test]
    fn a_datagrams_size_is_between_what_dns_and_what_paths_take() {
        for (asked, taken) in [
            (None, 512),
            (Some(0), 512),
            (Some(1000), 1000),
            (Some(65535), 1232),
        ] {
            let mut message = query(DNSClass::IN, RecordType::A);
            if let Some(asked) = asked {
                message.set_edns(Edns::new().set_max_payload(asked).clone());
            }
            let query = Query::read(&message.to_vec().unwrap()).ok().unwrap();
            assert_eq!(query.datagram_bytes(), taken);
        }
    }

    proptest! {
        #[test]
        fn no_question_is_too_strange(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            as_query in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if let (true, Some(header)) = (as_query, bytes.get_mut(2..12)) {
                header.copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            }
            match Query::read(&bytes) {
                Ok(query) => {
                    let answer = query.failed(ResponseCode::ServFail).unwrap();
                    prop_assert_eq!(&answer[..2], &bytes[..2]);
                    prop_assert!(answer.len() <= 512);
                }
                Err(Rejected(Some(answer))) => {
                    prop_assert_eq!(&answer[..2], &bytes[..2]);
                    // It amplifies nothing.
                    prop_assert!(answer.len() <= bytes.len().max(HEADER_BYTES) + 11);
                }
                Err(Rejected(None)) => {}
            }
        }
    }
}
