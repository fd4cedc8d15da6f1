//! Accepting TCP connections, so many at a time.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How long a listener that cannot accept rests.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts for ever. Connections over the limit wait in the kernel; those that run end
/// with this. `who` is for the log.
pub(crate) async fn accept<F>(
    listener: TcpListener,
    who: impl Display,
    max_connections: usize,
    mut serve: impl FnMut(TcpStream) -> F,
) -> std::convert::Infallible
where
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(max_connections));
    let mut running = JoinSet::new();
    loop {
        let accept = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            let permit = permit.map_err(io::Error::other)?;
            let (stream, _) = listener.accept().await?;
            io::Result::Ok((stream, permit))
        };
        let accepted = tokio::select! {
            accepted = accept => accepted,
            Some(_) = running.join_next() => continue,
        };
        match accepted {
            Ok((stream, permit)) => {
                let served = serve(stream);
                running.spawn(async move {
                    served.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%who, %error, "connections cannot be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
