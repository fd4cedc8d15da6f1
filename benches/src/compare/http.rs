//! As much of HTTP/1.1 as a monitor's API socket needs: one request at a time,
//! JSON to it, a status and perhaps a message back.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long an answer may take: a snapshot is written to disk within one.
const PATIENCE: Duration = Duration::from_secs(60);
/// No error message is longer.
const MAX_BODY_BYTES: u64 = 64 * 1024;

/// A connection to an API socket.
pub(super) struct Api(BufReader<UnixStream>);

// === impl Api ===

impl Api {
    pub(super) fn connect(socket: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(super) fn put(&mut self, path: &str, body: &Value) -> Result<()> {
        self.request("PUT", path, body)
    }

    pub(super) fn patch(&mut self, path: &str, body: &Value) -> Result<()> {
        self.request("PATCH", path, body)
    }

    /// What is not answered with a 2xx is an error with the peer's message.
    fn request(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        let stream = self.0.get_mut();
        stream
            .write_all(request.as_bytes())
            .with_context(|| format!("sending {method} {path}"))?;
        let (status, message) = self
            .response()
            .with_context(|| format!("reading the answer to {method} {path}"))?;
        if !(200..300).contains(&status) {
            bail!("{method} {path} was answered with {status}: {message}");
        }
        Ok(())
    }

    fn response(&mut self) -> Result<(u16, String)> {
        let status = self.line()?;
        let status = status
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1))
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("not an HTTP status line: {status:?}"))?;
        let mut length = 0;
        loop {
            let line = self.line()?;
            match line.split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().context("Content-Length")?;
                }
                Some(_) => {}
                None if line.is_empty() => break,
                None => bail!("not an HTTP header: {line:?}"),
            }
        }
        if length > MAX_BODY_BYTES {
            bail!("a body of {length} bytes");
        }
        let mut body = vec![0; length as usize];
        self.0.read_exact(&mut body)?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = (&mut self.0).take(MAX_BODY_BYTES).read_line(&mut line)?;
        if read == 0 {
            bail!("the connection was closed");
        }
        Ok(line.trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Answers one request with `answer`; gives the request.
    fn serve(answer: &'static str) -> (Result<()>, String) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let mut api = Api::connect(&socket).unwrap();
        let answered = api.put("/vm", &serde_json::json!({"state": "Paused"}));
        (answered, server.join().unwrap())
    }

    #[test]
    fn a_request_is_whole() {
        let (answered, request) = serve("HTTP/1.1 204 \r\nServer: x\r\n\r\n");
        answered.unwrap();
        assert!(request.starts_with("PUT /vm HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nContent-Length: 18\r\n"), "{request}");
        assert!(
            request.ends_with("\r\n\r\n{\"state\":\"Paused\"}"),
            "{request}"
        );
    }

    #[test]
    fn a_refusal_is_told() {
        let (answered, _) = serve("HTTP/1.1 400 Bad Request\r\ncontent-length: 9\r\n\r\nno kernel");
        let error = answered.unwrap_err().to_string();
        assert!(
            error.contains("400") && error.contains("no kernel"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for answer in [
            "",
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno header\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        ] {
            assert!(serve(answer).0.is_err(), "{answer:?}");
        }
    }
}
